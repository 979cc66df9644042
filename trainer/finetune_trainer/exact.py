"""What the trainers of all objectives share: our order of rows, our checkpoints, an eye on every loss.

Trainer's own saving, evaluating and loading are not used: saves are not atomic, a resume is not exact, and a
not-a-number loss is hidden (transformers 5.23). The loop itself, its optimizer, schedule and accumulation, is theirs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import Trainer

from finetune_trainer import state

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from finetune_trainer.evaluate import HeldOut
    from finetune_trainer.order import RowOrder


class Exact(Trainer):
    """Stands before a TRL trainer among the bases of a class."""

    zero_loss_is_failure: ClassVar[bool] = True
    """Whether a loss of exactly 0 tells that numbers were lost."""
    row_order: RowOrder
    step_loss: torch.Tensor | None = None
    """Sum of the losses of the micro-batches since the last optimizer step."""
    step_tokens: int = 0
    step_gradient_norm: float = 0.0
    """Of the last step's gradients, before they were clipped."""

    def weights_are_set(self) -> None:
        """Called once, when the model has the weights and dtypes that training begins with."""

    def measure(self, rows: Sequence[Any], poll: Callable[[int, int], None] | None = None) -> HeldOut:
        """The model as it is now on held-out rows. `poll(rows done, rows in all)` is called on the way; it may raise.

        Deterministic: the same weights and rows give the same figures.
        """
        raise NotImplementedError

    def _get_train_sampler(self, train_dataset: Any = None) -> RowOrder:  # noqa: ANN401, ARG002 - Trainer's signature
        return self.row_order

    def _run_epoch(self, *rest: Any, **named: Any) -> None:  # noqa: ANN401 - Trainer's signature
        self.row_order.epoch = named["epoch"]
        super()._run_epoch(*rest, **named)  # type: ignore[no-untyped-call]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ANN401 - Trainer's signature
        state.read_weights(model or self.model, Path(resume_from_checkpoint))

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:  # noqa: ANN401 - Trainer's signature
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        self.step_gradient_norm = float(norm)
        return norm

    def training_step(self, model: Any, inputs: Any, *rest: Any) -> torch.Tensor:  # noqa: ANN401 - Trainer's signature
        """Take a micro-batch; remember its loss and its tokens."""
        mask = inputs.get("attention_mask")  # packed rows have none, and hardly any padding
        self.step_tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
        loss: torch.Tensor = super().training_step(model, inputs, *rest)
        self.step_loss = loss.detach() if self.step_loss is None else self.step_loss + loss.detach()
        return loss
