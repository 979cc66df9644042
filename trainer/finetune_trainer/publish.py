"""finetune-trainer publish --name NAME --config job.json --work DIR: an artifact put where others fetch it.

Exactly the files that the artifact's manifest names, verified right before, with a model card and the licence of the
base; all of them named again, with their SHA-256, in a manifest.json that is put there last. What stays in
`published/<name>/` is what was written for it: the card, and that manifest.
"""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from finetune_trainer.config import HuggingFaceTarget
from finetune_trainer.progress import Published
from finetune_trainer.publishing import build_sink
from finetune_trainer.publishing.base import Outgoing, Parcel
from finetune_trainer.publishing.card import Card, build_card, title
from finetune_trainer.publishing.delivery import deliver
from finetune_trainer.publishing.licence import CARD, find_licence
from finetune_trainer.reporting.collect import collect, read_runs
from finetune_trainer.runtime import manifest, stages
from finetune_trainer.runtime.manifest import MANIFEST_NAME, FileEntry, Manifest, Result

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from finetune_trainer.config import JobConfig, Publish
    from finetune_trainer.publishing.licence import Licence
    from finetune_trainer.runtime.context import Context

OUTER_MANIFEST = "remote-manifest.json"
"""In `published/<name>/`: what is manifest.json where it was published."""


def run(config: JobConfig, context: Context) -> Manifest:
    """Write the card, send what is not there yet, and keep the proof."""
    slot, field, entry = next(each for each in config.destinations() if each[2].name == context.name)
    sink = build_sink(slot, field, entry, context)

    def build(folder: Path) -> Result:
        artifact = manifest.read(context.work.root / stages.artifact_path(entry))
        parcel = pack(config, entry, artifact, folder, context)
        address = deliver(sink, parcel, context)
        context.report.begin("keeping the proof")
        return Result(
            message=f"Published to {address}: {len(parcel.everything)} files, {parcel.size_bytes:,} bytes.",
            published=Published(
                name=entry.name,
                artifact=artifact.result.artifact.name if artifact.result.artifact else entry.artifact,
                uri=address,
                digest=f"sha256:{parcel.marker.entry.sha256}",
                size_bytes=parcel.size_bytes,
            ),
        )

    return context.publish(build)


def pack(config: JobConfig, entry: Publish, artifact: Manifest, folder: Path, context: Context) -> Parcel:
    """The artifact's files with card, licence and manifest; these are written into `folder`."""
    path = stages.artifact_path(entry)
    source, licence = context.work.root / path, find_licence(context.work.model)
    card = _card(config, entry, artifact, licence, context)
    (folder / CARD).write_text(build_card(card), encoding="utf-8")
    theirs = [Outgoing(source / each.path, each) for each in artifact.files if each.path != CARD]
    known = {each.name for each in theirs}
    ours = [_outgoing(each) for each in (folder / CARD, *_copied(licence, known, folder))]
    files = tuple(sorted([*theirs, *ours], key=lambda each: each.name))
    outer = Manifest(
        stage=context.goal.stage,
        config_digest=context.goal.config_digest,
        inputs={path: artifact.digest},
        files=tuple(each.entry for each in files),
        result=Result(message=f"{title(card)}.", artifact=artifact.result.artifact),
    )
    (folder / OUTER_MANIFEST).write_bytes(outer.to_bytes())
    marker = _outgoing(folder / OUTER_MANIFEST, MANIFEST_NAME)
    return Parcel(title(card), files, marker, licence.identifier)


def _card(config: JobConfig, entry: Publish, artifact: Manifest, licence: Licence, context: Context) -> Card:
    """What the card is written from."""
    kind, path = entry.kind, stages.artifact_path(entry)
    report = collect(config, context.work, read_runs(context.work.report), datetime.now(UTC))
    return Card(
        artifact=entry.artifact,
        path=path,
        place=kind.repo if isinstance(kind, HuggingFaceTarget) else f"./{entry.name}",
        report=report,
        licence=licence,
        quantized=next((each for each in context.prepared.quantize if each.name == entry.quantize_name), None),
        files=tuple(each.path for each in artifact.files),
    )


def _copied(licence: Licence, known: set[str], folder: Path) -> Iterable[Path]:
    """Texts of the licence that the artifact does not bring itself, as adapters do not."""
    for path in licence.files:
        if path.name not in known:
            shutil.copyfile(path, folder / path.name)
            yield folder / path.name


def _outgoing(path: Path, name: str | None = None) -> Outgoing:
    """A file that was written for the occasion."""
    entry = FileEntry(path=name or path.name, size=path.stat().st_size, sha256=manifest.sha256_of_file(path))
    return Outgoing(path, entry)
