"""What a training that ran out of GPU memory changes before it is run again. Pure.

The next smaller divisor of the rank's batch becomes the micro-batch, and the accumulation grows, so that an optimizer
step still sees the same global batch; at micro-batch 1 all activations are computed anew (full checkpointing). A loss
that compares the pairs of a micro-batch keeps its own: there full checkpointing is all that may help. After that there
is nothing left that a setting of this kind could change. So healing ends by itself, and needs no limit.
"""

from __future__ import annotations

from finetune_operator.api import JSON, Overrides
from finetune_trainer.config import SORTING_LOSSES

FULL = "Full"


def relieve(resolved: JSON | None, before: Overrides | None) -> Overrides | None:
    """The next smaller way to train, from how it was resolved and what was changed before; None if there is none."""
    if resolved is None:
        return None
    micro = before.micro_batch_size if before else int(resolved["microBatchSize"])
    checkpointing = (before.gradient_checkpointing if before else None) or resolved.get("gradientCheckpointing")
    rank_batch = int(resolved["microBatchSize"]) * int(resolved["gradientAccumulationSteps"])
    kept = before.gradient_checkpointing if before else None
    if micro > 1 and not compares_pairs(resolved):
        smaller = max(divisor for divisor in range(1, micro) if rank_batch % divisor == 0)
        return _overrides(smaller, rank_batch, kept)
    return None if checkpointing == FULL else _overrides(micro, rank_batch, FULL)


def compares_pairs(resolved: JSON) -> bool:
    """Whether the loss depends on which pairs share a micro-batch: the trainer refuses another size then."""
    return (resolved.get("dpo") or {}).get("lossType") in SORTING_LOSSES


def _overrides(micro: int, rank_batch: int, checkpointing: str | None) -> Overrides:
    return Overrides(
        micro_batch_size=micro,
        gradient_accumulation_steps=rank_batch // micro,
        gradient_checkpointing=checkpointing,
    )


def describe(overrides: Overrides, resolved: JSON) -> str:
    """What is changed, in a sentence."""
    what = f"micro-batch {overrides.micro_batch_size}"
    if overrides.gradient_checkpointing == FULL:
        what += ", full gradient checkpointing"
    return f"Restarting with {what} and the same global batch of {resolved['globalBatchSize']}."
