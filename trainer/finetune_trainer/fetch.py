"""Models brought into the work folder: the base with the adapter to go on from, and the model to merge into."""

from __future__ import annotations

import json
import logging
import os
from typing import TYPE_CHECKING

from finetune_trainer.config import REMOTE_CODE_VARIABLE
from finetune_trainer.models import folder as model
from finetune_trainer.models import gguf
from finetune_trainer.runtime import manifest, stages
from finetune_trainer.runtime.errors import InvalidConfig, VerificationFailed
from finetune_trainer.runtime.manifest import Manifest, Result, Target
from finetune_trainer.runtime.work import require_space
from finetune_trainer.sources import fetch_source

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from finetune_trainer.config import JobConfig, Source
    from finetune_trainer.runtime.context import Context
    from finetune_trainer.sources import Fetched

    Builder = Callable[[JobConfig, Context, Path], str]
    """Fills a folder; a sentence on what it is."""

log = logging.getLogger(__name__)

CHUNK_BYTES = 16 << 20
REVISION_FILE = "source.json"
"""In a model's folder: where it came from, with the commit or digest it was pinned to."""


def fetch_models(config: JobConfig, context: Context) -> dict[str, Manifest]:
    """The manifests of the models in the work folder, by their folders; fetched unless an earlier attempt did so."""
    builders: dict[str, Builder] = {"model": _build_base, "original": _build_original}
    return {
        name: _fetched(target, builders[name], config, context)
        for name, target in stages.fetched_targets(config, context.work).items()
    }


def reusable(target: Target, context: Context) -> Manifest | None:
    """What an earlier attempt made of the target, if it is whole; a damaged one is made anew."""
    try:
        if stages.finished(target) is None:
            return None
        context.report.begin(f"{target.path}/ is there already: verifying it", unit="bytes")
        return manifest.verify(target.folder, context.report.bytes_progress)
    except VerificationFailed as error:
        log.warning("%s Making it anew.", error)
        return None


def revision(folder: Path) -> str | None:
    """The commit or digest that a model was pinned to; None from a volume."""
    pinned: str | None = json.loads((folder / REVISION_FILE).read_text()).get("revision")
    return pinned


def _fetched(target: Target, build: Builder, config: JobConfig, context: Context) -> Manifest:
    if (found := reusable(target, context)) is not None:
        return found

    def fill(folder: Path) -> Result:
        message = build(config, context, folder)
        context.report.begin(f"proving {target.path}/", unit="bytes")
        return Result(message=message)

    return manifest.publish(target, context.attempt, fill, context.report.bytes_progress)


def _build_base(config: JobConfig, context: Context, folder: Path) -> str:
    """The base model, and in a folder of its own the adapter to go on from: first the small, then the large."""
    code = bool(config.model.trust_remote_code)
    if code and os.environ.get(REMOTE_CODE_VARIABLE) != "1":
        msg = "model.trustRemoteCode: the administrator has not consented to running code that models bring. Ask for "
        raise InvalidConfig(msg + f"{REMOTE_CODE_VARIABLE}=1 in the trainer, or use a model without code of its own.")
    if config.model.adapter is not None:
        _take_adapter(config.model.adapter, context, folder / model.ADAPTER_FOLDER)
    _take_model("model", "model", config.model, context, folder, code=code)
    return "The base model, as it was given."


def _build_original(config: JobConfig, context: Context, folder: Path) -> str:
    """The model that the adapter is merged into."""
    if config.merge is None or config.merge.original is None:
        msg = "merge.original is not set"
        raise AssertionError(msg)
    _take_model("original", "merge.original", config.merge.original, context, folder, gptq=False)
    return "The model to merge into, as it was given."


def _take_model(  # noqa: PLR0913 - two kinds of models
    slot: str,
    field: str,
    source: Source,
    context: Context,
    folder: Path,
    *,
    gptq: bool = True,
    code: bool = False,
) -> None:
    """A model's files out of its source, checked. InvalidModel and what fetching raises."""
    fetched = fetch_source(slot, field, source, context)
    told = {"source": type(source.kind).__name__, "revision": fetched.revision}
    if (path := gguf.find(fetched.path, fetched.where)) is not None:
        told |= gguf.convert(path, fetched.where, context, folder)
    else:
        _take(fetched, model.check_folder(fetched.path, fetched.where, gptq=gptq, code=code), context, folder)
    (folder / REVISION_FILE).write_text(json.dumps(told, sort_keys=True) + "\n")


def _take_adapter(source: Source, context: Context, folder: Path) -> None:
    """An adapter's files out of its source, checked. InvalidModel and what fetching raises."""
    fetched = fetch_source("adapter", "model.adapter", source, context)
    model.read_adapter(fetched.path, fetched.where)
    folder.mkdir()
    _take(fetched, (model.ADAPTER_CONFIG, model.ADAPTER_WEIGHTS), context, folder)


def _take(fetched: Fetched, names: Sequence[str], context: Context, folder: Path) -> None:
    """Copy files from a claim, which may change or vanish; downloads get a second name, which costs nothing."""
    total = sum((fetched.path / name).stat().st_size for name in names)
    if not fetched.downloaded:
        require_space(folder, total, fetched.where)
    context.report.begin("copying the model", total, "bytes")
    for name in names:
        if not (fetched.downloaded and _linked(fetched.path / name, folder / name)):
            copy(fetched.path / name, folder / name, context)


def _linked(source: Path, target: Path) -> bool:
    """Whether the file system gave the file a second name."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def copy(source: Path, target: Path, context: Context) -> None:
    """Copy a file, telling how far it is; leaves on request between two chunks."""
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(CHUNK_BYTES):
            context.raise_if_stopping()
            writer.write(chunk)
            context.report.advance(len(chunk))
