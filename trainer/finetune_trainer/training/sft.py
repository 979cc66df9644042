"""Supervised fine-tuning: the loss of the tokens that count, nats a token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from trl.trainer.sft_trainer import SFTTrainer

from finetune_trainer.evaluate import IGNORED, HeldOut, TokenRow, logits_that_count, measure_loss
from finetune_trainer.runtime.distributed import world_size
from finetune_trainer.training.exact import Exact

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class SftTrainer(Exact, SFTTrainer):
    """SFTTrainer with our order of rows, our checkpoints, and an eye on every loss."""

    def measure(self, rows: Sequence[TokenRow], poll: Callable[[int, int], None] | None = None) -> HeldOut:
        """Mean loss of the tokens that count."""
        return HeldOut(self.beside_passes(lambda: measure_loss(self.model, rows, poll)))

    def compute_loss(
        self,
        model: Any,  # noqa: ANN401 - Trainer's signature
        inputs: Any,  # noqa: ANN401 - Trainer's signature
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ANN401 - Trainer's signature
    ) -> Any:  # noqa: ANN401 - Trainer's signature
        """Mean loss of the tokens that count in a whole step.

        By the fast path where there is one; it knows one process alone.
        On CPU TRL's head scores prompts too, and entropies besides (1.16): 30% of a step. The loss is the same. The
        routers of experts have a loss of their own, which stays TRL's.
        """
        if self.fast is not None and not return_outputs:
            counted = (inputs["labels"][:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
            return self.fast.loss(inputs, counted)
        if self.args.device.type != "cpu" or self.aux_loss_enabled or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]
        logits, targets = logits_that_count(model, inputs)
        total = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        if num_items_in_batch is None:
            return total / len(targets)
        return total / num_items_in_batch * world_size()  # of all ranks, whose gradients are averaged
