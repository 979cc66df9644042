"""Figures as the status tells them: text of 4 digits, never NaN. Pure."""

from __future__ import annotations

import math
from typing import Any

from finetune_operator.api import (
    DATASETS_KEPT,
    JSON,
    ArtifactStatus,
    DataStatus,
    EstimateStatus,
    MeasuredStatus,
    PublishedStatus,
    TrainingStatus,
    format_time,
)
from finetune_trainer.progress import (
    Artifact,
    DataFacts,
    Estimate,
    Measured,
    Progress,
    Published,
    Resolved,
    TrainFacts,
)

MINUTE, HOUR, DAY = 60, 3600, 86400
STEPS, BYTES = "steps", "bytes"
"""Units of progress."""


def digits(value: float | None) -> str | None:
    """A figure with 4 digits; None for what is unknown or not a number."""
    if value is None or not math.isfinite(value):
        return None
    text = f"{value:.4g}"
    return f"{value:.0f}" if "e+" in text else text


def gib(size_bytes: int | None) -> str | None:
    """Bytes in GiB."""
    return None if size_bytes is None else digits(size_bytes / 2**30)


def size(size_bytes: int) -> str:
    """Bytes for people: 269 MiB."""
    amount, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:  # noqa: PLR2004 - a unit
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.0f} {unit}" if amount >= 10 or unit == "B" else f"{amount:.1f} {unit}"  # noqa: PLR2004


def share(done: int, total: int, unit: str = STEPS) -> str | None:
    """Done of total: 128/300 (42%), 48 MiB/269 MiB (17%). None where the total is not known."""
    if total <= 0:
        return None
    counted = f"{size(done)}/{size(total)}" if unit == BYTES else f"{done}/{total}"
    return f"{counted} ({100 * done // total}%)"


def duration(seconds: float | None) -> str | None:
    """Time left, as coarse as it is certain: 45s, 12m, 3h20m, 2d4h."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return None
    whole = int(seconds)
    if whole < MINUTE:
        return f"{whole}s"
    if whole < HOUR:
        return f"{whole // MINUTE}m"
    if whole < 2 * DAY:
        return f"{whole // HOUR}h{whole % HOUR // MINUTE}m"
    return f"{whole // DAY}d{whole % DAY // HOUR}h"


def live_training(progress: Progress, before: TrainingStatus | None) -> TrainingStatus:
    """Training as the running stage tells it; what it does not say yet stays as it was."""
    told: dict[str, Any] = {
        "epoch": digits(progress.epoch),
        "loss": digits(progress.loss),
        "eval_loss": digits(progress.eval_loss),
        "best_eval_loss": digits(progress.best_eval_loss),
        "tokens_per_second": digits(progress.tokens_per_second),
        "peak_memory": gib(progress.peak_memory_bytes),
        "last_checkpoint_step": progress.checkpoint_step,
        "last_checkpoint_time": format_time(progress.checkpoint_time) if progress.checkpoint_time else None,
        "resumed_from_step": progress.resumed_from_step,
    }
    if progress.unit == STEPS and progress.total:  # a train stage also loads, reads, proves and writes
        told |= {"step": progress.done, "total_steps": progress.total}
        told["progress"] = share(progress.done, progress.total)
    kept = (before or TrainingStatus()).model_copy(update={k: v for k, v in told.items() if v is not None})
    return kept.model_copy(update={"eta": duration(progress.eta_seconds)})


def final_training(facts: TrainFacts, measured: Measured | None, before: TrainingStatus | None) -> TrainingStatus:
    """Training as its last word tells it; speed, memory and resumes stay as they were told live."""
    before = before or TrainingStatus()
    return before.model_copy(
        update={
            "step": facts.steps,
            "total_steps": facts.steps,
            "epoch": digits(facts.epochs),
            "loss": digits(facts.loss) or before.loss,
            "eval_loss": digits(measured.eval_loss if measured else None) or before.eval_loss,
            "best_eval_loss": digits(facts.best_eval_loss) or before.best_eval_loss,
            "best_step": facts.best_step,
            "stopped_early": facts.stopped_early or None,
            "last_checkpoint_step": facts.steps,
            "last_checkpoint_time": None,  # told to show what a lost pod would cost: nothing any more
            "progress": share(facts.steps, facts.steps),
            "eta": None,
            "trainable_parameters": facts.trainable_parameters,
            "total_parameters": facts.total_parameters,
        }
    )


def data_status(facts: DataFacts) -> DataStatus:
    """The rows, and those of each dataset."""
    told = facts.model_dump(exclude_none=True)
    told["datasets"] = told["datasets"][:DATASETS_KEPT] or None
    return DataStatus.model_validate(told)


def estimate_status(estimate: Estimate) -> EstimateStatus:
    """What a GPU is expected to hold."""
    return EstimateStatus.model_validate(estimate.model_dump())


def with_measured(estimate: EstimateStatus | None, progress: Progress) -> EstimateStatus | None:
    """The same, with what the first steps took, once that is told."""
    if estimate is None or progress.measured_peak_bytes is None:
        return estimate
    return estimate.model_copy(update={"measured_peak_bytes": progress.measured_peak_bytes})


def resolved_status(resolved: Resolved) -> JSON:
    """The settings; fractions as text of 6 digits: as numbers they would come back otherwise than they were written."""
    return {name: _plain(value) for name, value in resolved.model_dump(by_alias=True, exclude_none=True).items()}


def _plain(value: object) -> object:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return {name: _plain(inside) for name, inside in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def artifact_status(artifact: Artifact, claim: str, folder: str) -> ArtifactStatus:
    """An artifact, with the place where it can be fetched."""
    measured = artifact.measured
    figures = {name: digits(value) for name, value in measured.model_dump().items()} if measured else None
    return ArtifactStatus(
        name=artifact.name,
        type=artifact.type,
        claim_name=claim,
        path=f"{folder}/{artifact.path}",
        size=size(artifact.size_bytes),
        size_bytes=artifact.size_bytes,
        digest=artifact.digest,
        measured=MeasuredStatus(**figures) if figures else None,
    )


def published_status(artifact: ArtifactStatus, published: Published) -> ArtifactStatus:
    """An artifact, with one more place where it is."""
    others = tuple(each for each in artifact.published or () if each.name != published.name)
    told = PublishedStatus(
        name=published.name,
        uri=published.uri,
        digest=published.digest,
        size=size(published.size_bytes),
        size_bytes=published.size_bytes,
    )
    return artifact.model_copy(update={"published": (*others, told)})
