"""A fire drill: a GPU that runs out of memory, where there is no GPU.

Set by FINETUNE_DRILL_OUT_OF_MEMORY, e.g. `step=3,micro-batch=2`: from step 3 on a micro-batch above 2 does not fit, and
rank 0 raises what torch raises then. All that follows is what follows on a GPU. With `,checkpointing=Full` any
micro-batch fits while activations are computed again (gradient checkpointing Full).
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune_trainer.config import DRILL_OUT_OF_MEMORY_VARIABLE, GradientCheckpointing
from finetune_trainer.runtime.distributed import leads
from finetune_trainer.runtime.errors import InvalidConfig

if TYPE_CHECKING:
    from finetune_trainer.progress import Resolved

log = logging.getLogger(__name__)

PATTERN = re.compile(r"step=([1-9]\d{0,8}),micro-batch=(\d{1,9})(,checkpointing=Full)?")


@dataclass(frozen=True)
class Drill:
    """What fits, and from which step on anything else does not."""

    step: int
    micro_batch: int
    """The largest that fits; 0: none."""
    full_fits: bool
    """Whether all fit with gradient checkpointing Full."""

    def fails(self, step: int, resolved: Resolved) -> bool:
        """Whether memory runs out at this step."""
        spared = self.full_fits and resolved.gradient_checkpointing == GradientCheckpointing.FULL
        return step >= self.step and resolved.micro_batch_size > self.micro_batch and not spared

    def strike(self, step: int, resolved: Resolved) -> None:
        """Fail as torch does, on one of the ranks, as it is on GPUs; the others learn of it."""
        if not (leads() and self.fails(step, resolved)):
            return
        import torch  # noqa: PLC0415 - slow

        log.warning("FIRE DRILL: out of memory at step %d", step)
        msg = f"CUDA out of memory. Simulated by {DRILL_OUT_OF_MEMORY_VARIABLE}"
        raise torch.OutOfMemoryError(msg)


def read_drill() -> Drill | None:
    """The drill that the environment asks for, if any. InvalidConfig."""
    asked = os.environ.get(DRILL_OUT_OF_MEMORY_VARIABLE)
    if asked is None:
        return None
    found = PATTERN.fullmatch(asked)
    if found is None:
        msg = f"{DRILL_OUT_OF_MEMORY_VARIABLE} is {asked!r}. Set it to step=N,micro-batch=M or to that with "
        raise InvalidConfig(msg + ",checkpointing=Full behind it, or not at all.")
    log.warning("FIRE DRILL: %s=%s simulates a GPU that runs out of memory", DRILL_OUT_OF_MEMORY_VARIABLE, asked)
    return Drill(int(found[1]), int(found[2]), found[3] is not None)
