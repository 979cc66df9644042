"""All that is known of a job, read from its work folder: manifests, and the files that stages leave in `report/`.

Only small files are read, never weights. What is missing or damaged is left out: the stages themselves verify.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from finetune_trainer.config import (
    FLOATING,
    SOURCE_FIELDS,
    HuggingFaceSource,
    Merge,
    MergeBase,
    Model,
    ModelScopeSource,
    OciSource,
    S3Source,
    S3Target,
    VolumeSource,
)
from finetune_trainer.data.tokenized import PREVIEW_NAME
from finetune_trainer.fetch import revision
from finetune_trainer.ingest import named_datasets
from finetune_trainer.progress import Stage
from finetune_trainer.reporting.record import (
    REPORT_NAME,
    Gate,
    History,
    JobReport,
    MadeArtifact,
    Origin,
    Part,
    PreviewRow,
    PublishedPlace,
    Sample,
    StageRun,
)
from finetune_trainer.runtime import manifest
from finetune_trainer.runtime.errors import TrainerError
from finetune_trainer.training.course import EVAL_LOSS
from finetune_trainer.training.memory import MEMORY_NAME, StepMemory
from finetune_trainer.training.samples import SAMPLES_NAME
from finetune_trainer.training.start import START_NAME, Start
from finetune_trainer.training.tracking import LINES_NAME

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from datetime import datetime
    from pathlib import Path

    from finetune_trainer.config import JobConfig, Source
    from finetune_trainer.progress import Resolved
    from finetune_trainer.runtime.manifest import Manifest
    from finetune_trainer.runtime.work import WorkFolder

log = logging.getLogger(__name__)

HISTORY_LINES = 500
"""Of each kind: more are no use in a chart."""
SHOWN_CHARACTERS = 4000
"""Of a text in the report; the files beside it have all of it."""

Item = TypeVar("Item")
Record = TypeVar("Record", bound=Model)


def collect(config: JobConfig, work: WorkFolder, runs: Sequence[StageRun], now: datetime) -> JobReport:
    """The report of what is in the work folder; `runs`: the stages that ended."""
    data = _manifest_in(work.data)
    settings = None if data is None else data.result.resolved
    made = [(path, found) for path in _paths(config) if (found := _manifest_in(work.root / path)) is not None]
    artifacts = tuple(artifact for path, found in made if (artifact := _artifact(path, found)) is not None)
    return JobReport(
        job=work.root.name,
        written_at=now,
        stages=tuple(sorted(runs, key=lambda run: tuple(Stage).index(run.stage))),
        origins=tuple(_origins(config, work, settings)),
        settings=settings,
        data=None if data is None else data.result.data,
        estimate=None if data is None else data.result.estimate,
        memory=_read(StepMemory, work.report / MEMORY_NAME),
        start=_read(Start, work.report / START_NAME),
        data_digest=None if data is None else data.digest,
        training=next((found.result.training for _, found in made if found.result.training is not None), None),
        history=read_history(work.report / LINES_NAME),
        artifacts=artifacts,
        gates=tuple(_gates(config, settings, {each.name: each for each in artifacts})),
        published=tuple(_published(config, work)),
        samples=_read_samples(work.report / SAMPLES_NAME),
        preview=_read_preview(work.report / PREVIEW_NAME),
    )


def read_runs(report: Path) -> tuple[StageRun, ...]:
    """The stages of the report that is there; none where there is no report that can be read."""
    try:
        return JobReport.model_validate_json((report / REPORT_NAME).read_bytes()).stages
    except FileNotFoundError:
        return ()
    except ValidationError:
        log.warning("report/%s is of another version or damaged: it is written anew", REPORT_NAME)
        return ()


def with_run(runs: Sequence[StageRun], run: StageRun) -> list[StageRun]:
    """The runs with this one; of a stage that found its work done already the run that did it stays."""
    known = [each for each in runs if (each.stage, each.name) == (run.stage, run.name)]
    if any(each.digest == run.digest for each in known):
        return list(runs)
    return [*(each for each in runs if each not in known), run]


# Manifests


def _paths(config: JobConfig) -> list[str]:
    """Where artifacts may be, in the order in which they are made."""
    return ["adapter", "merged", *(f"quantized/{entry.name}" for entry in config.quantize or ())]


def _manifest_in(folder: Path) -> Manifest | None:
    try:
        return manifest.read(folder)
    except TrainerError:
        return None


def _artifact(path: str, found: Manifest) -> MadeArtifact | None:
    told = manifest.artifact_of(found, path)
    if told is None:
        return None
    made = found.result.artifact
    return MadeArtifact(
        **dict(told),
        files=len(found.files),
        made_from=found.inputs,
        base=made.base if made else None,
        calibration=made.calibration if made else None,
    )


def _published(config: JobConfig, work: WorkFolder) -> Iterator[PublishedPlace]:
    """Where artifacts went."""
    for _, _, entry in config.destinations():
        found = _manifest_in(work.published(entry.name))
        if found is not None and (told := found.result.published) is not None:
            endpoint = entry.kind.address if isinstance(entry.kind, S3Target) else None
            yield PublishedPlace(**dict(told), endpoint=endpoint)


# Gates


def _gates(config: JobConfig, settings: Resolved | None, made: Mapping[str, MadeArtifact]) -> Iterator[Gate]:
    """Every gate of the job, with the figure that it is for."""
    merge, merged = config.merge or Merge(), made.get("merged")
    base = merged.base if merged is not None else None
    trained = MergeBase.ORIGINAL if settings is not None and settings.base_format in FLOATING else MergeBase.DEQUANTIZED
    if (limit := merge.max_kl_divergence) is not None:
        yield _gate("merged", "merge.maxKLDivergence", limit, merged if base == trained else None, "kl_divergence")
    if (limit := merge.max_loss_increase) is not None:
        asked = merged if base == MergeBase.ORIGINAL else None
        yield _gate("merged", "merge.maxLossIncrease", limit, asked, "loss_increase")
    for index, entry in enumerate(config.quantize or ()):
        if (limit := entry.max_perplexity_increase_percent) is not None:
            field = f"quantize[{index}].maxPerplexityIncreasePercent"
            yield _gate(entry.name, field, limit, made.get(entry.name), "perplexity_increase_percent")


def _gate(name: str, field: str, limit: float, asked: MadeArtifact | None, figure: str) -> Gate:
    measured = getattr(asked.measured, figure) if asked is not None and asked.measured is not None else None
    passed = None if measured is None else measured <= limit
    return Gate(artifact=name, field=field, limit=limit, measured=measured, passed=passed)


# Sources


def _origins(config: JobConfig, work: WorkFolder, settings: Resolved | None) -> Iterator[Origin]:
    """Every source of the config, with the commit that it was pinned to."""
    names = {slot: name for slot, (name, _) in named_datasets(config).items()}
    pinned = dict(_pinned_datasets(settings))
    folders = {"model": work.model, "original": work.original}
    for slot, field, source in config.sources():
        name = names.get(slot)
        found = pinned.get(name) if name is not None else _revision_in(folders.get(slot))
        yield Origin(field=field, name=name, kind=_kind(source), place=_place(source), revision=found)


def _pinned_datasets(settings: Resolved | None) -> Iterator[tuple[str, str]]:
    """Name and commit, of `NAME@COMMIT`."""
    for told in settings.data_revisions if settings else ():
        name, _, commit = told.rpartition("@")
        yield name, commit


def _revision_in(folder: Path | None) -> str | None:
    try:
        return None if folder is None else revision(folder)
    except (OSError, ValueError):
        return None


def _kind(source: Source) -> str:
    given = source.model_dump(by_alias=True, exclude_none=True)
    return next(field for field in SOURCE_FIELDS if field in given)


def _place(source: Source) -> str:
    """Where that is, in a word; neither endpoints nor the names of secrets."""
    match source.kind:
        case HuggingFaceSource() | ModelScopeSource() as hub:
            return hub.repo
        case VolumeSource() as volume:
            return f"{volume.claim_name}/{volume.path}"
        case S3Source() as bucket:
            return bucket.uri
        case OciSource() as artifact:
            return artifact.reference


# Files in report/


def read_history(path: Path) -> History | None:
    """The lines of a training so far; one that was cut off is left out. None if there are none."""
    lines = [line for line in _json_lines(path) if isinstance(line, dict) and "step" in line]
    if not lines:
        return None
    measured = [line for line in lines if EVAL_LOSS in line]
    training = [line for line in lines if "loss" in line]
    return History(training=tuple(thinned(training)), measured=tuple(thinned(measured)), lines=len(lines))


def thinned(items: Sequence[Item], at_most: int = HISTORY_LINES) -> list[Item]:
    """At most so many, evenly chosen, the first and the last among them."""
    if len(items) <= at_most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (at_most - 1))] for index in range(at_most)]


def _read(kind: type[Record], path: Path) -> Record | None:
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _read_samples(path: Path) -> tuple[Sample, ...]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        return tuple(Sample(**{name: shortened(text) for name, text in record.items()}) for record in records)
    except (FileNotFoundError, ValueError):
        return ()


def _read_preview(path: Path) -> tuple[PreviewRow, ...]:
    """The rows; without those of an older trainer, which did not tell their parts."""
    return tuple(
        PreviewRow(
            tokens=record["tokens"],
            loss_tokens=record["lossTokens"],
            parts=_parts(record["parts"]),
            rejected=_parts(record.get("rejected", {}).get("parts", ())),
        )
        for record in _json_lines(path)
        if "parts" in record
    )


def _parts(records: Sequence[dict[str, Any]]) -> tuple[Part, ...]:
    """The parts of a row, up to as many characters as are shown."""
    left, parts = SHOWN_CHARACTERS, []
    for record in records:
        if left > 0:
            parts.append(Part(text=shortened(record["text"], left), learned=record["learned"]))
            left -= len(record["text"])
    return tuple(parts)


def shortened(text: str, at_most: int = SHOWN_CHARACTERS) -> str:
    """The text, or its beginning and an ellipsis."""
    return text if len(text) <= at_most else text[:at_most] + "\u2026"


def _json_lines(path: Path) -> Iterator[Any]:
    """The lines of a file that are JSON; the last may be half written."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue
