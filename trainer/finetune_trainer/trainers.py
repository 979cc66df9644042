"""TRL's trainers, with our order of rows, our checkpoints, and an eye on every loss.

Trainer's own saving, evaluating and loading are not used: saves are not atomic, a resume is not exact, and a
not-a-number loss is hidden (transformers 5.23). The loop itself, its optimizer, schedule and accumulation, is theirs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback
from trl.trainer.sft_trainer import SFTTrainer

from finetune_trainer import state
from finetune_trainer.adapters import build_lora, train_in_fp32
from finetune_trainer.arguments import build_arguments
from finetune_trainer.evaluate import TokenRow, logits_that_count
from finetune_trainer.loading import import_peft
from finetune_trainer.order import RowOrder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune_trainer.progress import Resolved


class ExactTrainer(SFTTrainer):
    """SFTTrainer with our order of rows, our checkpoints, and an eye on every loss."""

    row_order: RowOrder
    step_loss: torch.Tensor | None = None
    """Sum of the losses of the micro-batches since the last optimizer step."""
    step_tokens: int = 0

    def _get_train_sampler(self, train_dataset: Any = None) -> RowOrder:  # noqa: ANN401, ARG002 - Trainer's signature
        return self.row_order

    def _run_epoch(self, *rest: Any, **named: Any) -> None:  # noqa: ANN401 - Trainer's signature
        self.row_order.epoch = named["epoch"]
        super()._run_epoch(*rest, **named)  # type: ignore[no-untyped-call]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ANN401 - Trainer's signature
        state.read_weights(model or self.model, Path(resume_from_checkpoint))

    def compute_loss(
        self,
        model: Any,  # noqa: ANN401 - Trainer's signature
        inputs: Any,  # noqa: ANN401 - Trainer's signature
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ANN401 - Trainer's signature
    ) -> Any:  # noqa: ANN401 - Trainer's signature
        """Mean loss of the tokens that count in a whole step.

        On CPU TRL's head scores prompts too, and entropies besides (1.16): 30% of a step. The loss is the same.
        """
        if self.args.device.type != "cpu" or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]
        logits, targets = logits_that_count(model, inputs)
        total = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        return total / (len(targets) if num_items_in_batch is None else num_items_in_batch)

    def training_step(self, model: Any, inputs: Any, *rest: Any) -> torch.Tensor:  # noqa: ANN401 - Trainer's signature
        """Take a micro-batch; remember its loss and its tokens."""
        self.step_tokens += int(inputs["attention_mask"].sum())
        loss: torch.Tensor = super().training_step(model, inputs, *rest)  # type: ignore[no-untyped-call]
        self.step_loss = loss.detach() if self.step_loss is None else self.step_loss + loss.detach()
        return loss


def build_trainer(  # noqa: PLR0913 - the pieces of a training
    base: Any,  # noqa: ANN401 - a transformers model
    tokenizer: Any,  # noqa: ANN401 - a transformers tokenizer
    rows: Sequence[TokenRow],
    resolved: Resolved,
    dtype: torch.dtype,
    scratch: Path,
) -> ExactTrainer:
    """The trainer of a fresh adapter on the base. `scratch`: Trainer wants a folder's name; nothing is written."""
    from datasets import Dataset  # noqa: PLC0415 - slow

    import_peft()
    dataset = Dataset.from_dict(
        {"input_ids": [list(row.input_ids) for row in rows], "labels": [list(row.labels) for row in rows]}
    )
    trainer = ExactTrainer(
        model=base,
        args=build_arguments(resolved, dtype, base.device, scratch),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=None if resolved.lora is None else build_lora(resolved.lora),
    )
    trainer.remove_callback(PrinterCallback)
    train_in_fp32(trainer.model)
    trainer.row_order = RowOrder([len(row.input_ids) for row in rows], resolved.seed, resolved.global_batch_size)
    return trainer
