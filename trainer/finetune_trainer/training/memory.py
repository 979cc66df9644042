"""The estimated memory of a training held against what its first steps took, and corrected by it.

The steps that come first seldom have the longest rows. So what they took is held against the estimate for their own
largest micro-batch, and the difference from there to the largest of the run is the estimate's.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from pydantic import Field

from finetune_trainer.config import Model
from finetune_trainer.models.folder import describe_config
from finetune_trainer.runtime import manifest
from finetune_trainer.runtime.distributed import leads
from finetune_trainer.runtime.memory import gib
from finetune_trainer.runtime.work import write_report
from finetune_trainer.settings.activations import Batch
from finetune_trainer.settings.estimate import batch_of, estimate

if TYPE_CHECKING:
    import torch

    from finetune_trainer.runtime.context import Context

log = logging.getLogger(__name__)

MEMORY_NAME = "memory.json"
"""In `report/`."""
WATCHED_STEPS = 2
"""The optimizer's states are made at the end of the first step."""


class StepMemory(Model):
    """Peaks of a step, as torch's allocator counts."""

    expected_bytes: int = Field(description="Of the largest micro-batch of the first steps, by the estimate.")
    measured_bytes: int = Field(description="Of the same, as measured.")
    peak_bytes: int = Field(
        description="Of the largest micro-batch of the run: as measured, and what larger rows add by the estimate."
    )

    def tell(self, gpu_bytes: int) -> None:
        """Put it into the log; a warning where the GPU has less."""
        told = "GPU memory of the first steps: %s, estimated %s; the largest rows will need about %s of %s"
        level = logging.WARNING if self.peak_bytes > gpu_bytes else logging.INFO
        figures = (self.measured_bytes, self.expected_bytes, self.peak_bytes, gpu_bytes)
        log.log(level, told, *map(gib, figures))


def correct(expected_bytes: int, measured_bytes: int, largest_bytes: int) -> StepMemory:
    """The peak of the largest micro-batch, of which the estimate says `largest_bytes`."""
    more = max(largest_bytes - expected_bytes, 0)
    return StepMemory(expected_bytes=expected_bytes, measured_bytes=measured_bytes, peak_bytes=measured_bytes + more)


def check_first_steps(context: Context, seen: Batch, measured_bytes: int, *, fast: bool = False) -> StepMemory | None:
    """What the largest micro-batch will take, now that `seen`, the largest so far, has taken so much.

    `fast`: whether the fast path was taken, which prepare cannot know for sure. None where it could not estimate.
    """
    prepared = manifest.read(context.work.data).result
    if prepared.estimate is None or prepared.data is None:
        return None
    facts = describe_config(context.work.model)
    resolved = context.resolved.model_copy(update={"fast_path": fast})
    largest = batch_of(resolved, prepared.data)
    expected, most = (estimate(facts, resolved, batch).peak_bytes for batch in (seen, largest))
    return correct(expected, measured_bytes, most)


class MemoryWatch:
    """Watches the first steps of a run on a GPU, then tells; does nothing without one."""

    def __init__(self, context: Context, device: torch.device, *, fast: bool = False) -> None:
        """Nothing is measured before the first step begins. `fast`: whether the fast path is taken."""
        self._context, self._device, self._fast = context, device, fast
        self._steps = 0

    def begin_step(self) -> None:
        """Forget what was held before the first step: a measurement of the base may have taken more.

        The peak that the progress and the report tell begins anew here as well.
        """
        import torch  # noqa: PLC0415 - slow

        if self._device.type == "cuda" and self._steps == 0:
            torch.cuda.reset_peak_memory_stats(self._device)

    def end_step(self, seen: Batch) -> None:
        """Tell after the first steps. `seen`: the largest micro-batch so far."""
        import torch  # noqa: PLC0415 - slow

        self._steps += 1
        if self._device.type != "cuda" or self._steps != WATCHED_STEPS:
            return
        measured = torch.cuda.max_memory_allocated(self._device)
        found = check_first_steps(self._context, seen, measured, fast=self._fast)
        if found is None:
            return
        self._context.report.update(measured_peak_bytes=found.peak_bytes)
        if leads():
            found.tell(torch.cuda.mem_get_info(self._device)[1])
            write(self._context, found)


def write(context: Context, found: StepMemory) -> None:
    """Leave it for the report."""
    with context.committing():
        write_report(context.work.report / MEMORY_NAME, found.to_json() + "\n")
