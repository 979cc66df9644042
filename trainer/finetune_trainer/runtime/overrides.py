"""What one run of train does otherwise than prepare fixed it, after a GPU's memory did not suffice.

Neither changes what is learned: the same rows make up each step, in smaller pieces, or activations are computed twice.
So neither stands in what prepare wrote, and checkpoints are of the same run with and without them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune_trainer.config import SORTING_LOSSES
from finetune_trainer.runtime.distributed import world_size
from finetune_trainer.runtime.errors import InvalidConfig

if TYPE_CHECKING:
    from finetune_trainer.progress import Resolved

log = logging.getLogger(__name__)

MICRO_BATCH_OPTION = "--micro-batch"
CHECKPOINTING_OPTION = "--gradient-checkpointing"


@dataclass(frozen=True)
class Overrides:
    """As the command line gives them; None leaves a setting as it is."""

    micro_batch: int | None = None
    """Rows a forward pass on one device. The global batch stays."""
    gradient_checkpointing: str | None = None
    """Full, Selective or Off."""

    def applied(self, resolved: Resolved) -> Resolved:
        """The settings of this run. InvalidConfig where the micro-batch does not divide each process's share."""
        changes: dict[str, int | str] = {}
        if self.micro_batch is not None:
            check_micro_batch(self.micro_batch, resolved)
            changes["micro_batch_size"] = self.micro_batch
            changes["gradient_accumulation_steps"] = resolved.global_batch_size // (self.micro_batch * world_size())
        if self.gradient_checkpointing is not None:
            changes["gradient_checkpointing"] = self.gradient_checkpointing
        return resolved.model_copy(update=changes)

    def tell(self, resolved: Resolved) -> None:
        """Put into the log what differs from what prepare fixed."""
        for name, value in self.applied(resolved):
            if (before := getattr(resolved, name)) != value:
                log.info("this run: %s %s instead of %s", name.replace("_", " "), value, before)


def check_micro_batch(micro_batch: int, resolved: Resolved) -> None:
    """InvalidConfig unless so many rows at a time give the same steps, and the same loss."""
    processes, batch = world_size(), resolved.global_batch_size
    if micro_batch < 1 or batch % (micro_batch * processes):
        fitting = ", ".join(str(size) for size in range(1, batch + 1) if batch % (size * processes) == 0)
        msg = (
            f"{MICRO_BATCH_OPTION} {micro_batch} does not divide each process's share of training.globalBatchSize "
            f"{batch} ({batch / processes:g} rows). "
        )
        raise InvalidConfig(msg + (f"Pass one of {fitting}." if fitting else "Start as many processes as do."))
    if resolved.dpo and resolved.dpo.loss_type in SORTING_LOSSES and micro_batch != resolved.micro_batch_size:
        msg = (
            f"{MICRO_BATCH_OPTION} {micro_batch}: objective.dpo.lossType {resolved.dpo.loss_type} compares the pairs "
            f"of a micro-batch, which has {resolved.micro_batch_size}; with another number it is another loss. "
        )
        raise InvalidConfig(msg + f"Pass {CHECKPOINTING_OPTION} Full instead, or use a larger GPU.")
