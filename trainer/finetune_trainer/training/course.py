"""How a training has gone so far, and what follows from it.

Decisions rest on the measurements alone, so that a resumed run decides as an unbroken one. A checkpoint holds all of it
as `course.json`; `report/training.jsonl` holds its lines, one a log line or a measurement, in Trainer's own names:

    {"step": 10, "epoch": 0.5, "loss": 1.92, "learning_rate": 0.0002, "grad_norm": 0.8, "tokens_per_second": 412.0, ...}
    {"step": 10, "epoch": 0.5, "eval_loss": 1.87}
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from finetune_trainer.progress import ResolvedEarlyStopping

COURSE_NAME = "course.json"
EVAL_LOSS, EVAL_ACCURACY = "eval_loss", "eval_preference_accuracy"

Line = dict[str, float]


@dataclass
class Course:
    """The lines so far, and the losses that stand in none of them yet."""

    lines: list[Line] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Of the steps since the last log line, nats a token."""

    @property
    def measurements(self) -> list[Line]:
        """The lines that tell a held-out loss, in their order."""
        return [line for line in self.lines if EVAL_LOSS in line]

    @property
    def loss(self) -> float | None:
        """Training loss of the last log line, nats a token."""
        return next((line["loss"] for line in reversed(self.lines) if "loss" in line), None)

    def take_losses(self) -> float:
        """Mean loss of the steps since the last log line; counted anew from here."""
        mean = sum(self.losses) / len(self.losses)
        self.losses = []
        return mean

    def add(self, line: Line) -> Line:
        """One more line. Figures that JSON cannot hold (the norm of gradients that overflowed) are left out."""
        finite = {name: value for name, value in line.items() if math.isfinite(value)}
        self.lines.append(finite)
        return finite

    def write(self, folder: Path) -> None:
        """Into a checkpoint."""
        (folder / COURSE_NAME).write_text(json.dumps({"lines": self.lines, "losses": self.losses}), encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Course:
        """Out of a checkpoint."""
        record: dict[str, Any] = json.loads((folder / COURSE_NAME).read_text(encoding="utf-8"))
        return Course(record["lines"], record["losses"])


def epochs_done(step: int, rows: int, global_batch: int) -> float:
    """Passes over the rows after so many steps. Trainer counts micro-batches, whose number an override changes."""
    whole, rest = divmod(step, math.ceil(rows / global_batch))
    return round(whole + min(rest * global_batch, rows) / rows, 4)


def is_due(step: int, every: int, total_steps: int) -> bool:
    """Whether something is done after this step: each so many, and after the last."""
    return step == total_steps or step % every == 0


def best_first(measurements: Sequence[Line]) -> list[Line]:
    """The lowest held-out loss first; of equal ones the earlier."""
    return sorted(measurements, key=lambda line: line[EVAL_LOSS])


def without_better(measurements: Sequence[Line], threshold: float) -> int:
    """Measurements in a row since one was better, by more than the threshold, than the better one before it.

    What counts against the threshold is the last that was better, so that many small gains are a gain.
    """
    count, better = 0, math.inf
    for line in measurements:
        if line[EVAL_LOSS] < better - threshold:
            count, better = 0, line[EVAL_LOSS]
        else:
            count += 1
    return count


def stops_early(measurements: Sequence[Line], stopping: ResolvedEarlyStopping | None) -> bool:
    """Whether the held-out loss has not fallen for long enough."""
    return stopping is not None and without_better(measurements, stopping.threshold) >= stopping.patience
