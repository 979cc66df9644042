"""Direct preference optimization: TRL's losses on pairs that prepare tokenized, against a reference that stays.

The reference is what training began with: a fresh adapter switched off, a copy of the adapter that the run goes on
from, or, for a model that is trained whole, the base held once more.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from trl.trainer.dpo_trainer import DPOTrainer

from finetune_trainer.data.tokenized import INPUT_IDS, LOSS_MASK, REJECTED_IDS, REJECTED_MASK
from finetune_trainer.evaluate import IGNORED, HeldOut, PairRow, evaluating, pad, polled, token_row
from finetune_trainer.runtime.distributed import total, world_size
from finetune_trainer.training.adapters import TRAINED
from finetune_trainer.training.exact import Exact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

log = logging.getLogger(__name__)

REFERENCE = "ref"
"""TRL's name of the copy of what an adapter began with."""


class DpoTrainer(Exact, DPOTrainer):
    """DPOTrainer with our order of rows, our checkpoints, and an eye on every loss."""

    zero_loss_is_failure: ClassVar[bool] = False
    """A hinge is exactly 0 where all pairs are told apart, and a sigmoid rounds to it."""
    loss_is_scaled_for_ga = True
    """By `compute_loss`: each pair of a step weighs the same, also where ranks or micro-batches have unequally many."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:  # noqa: ANN401 - TRL's signature
        return dataset  # tokenized by prepare; TRL would do it from text

    def weights_are_set(self) -> None:
        """Fix the reference of a run that goes on from an adapter."""
        if REFERENCE in getattr(self.model, "peft_config", ()):
            copy_start_to_reference(self.model)

    def compute_loss(
        self,
        model: Any,  # noqa: ANN401 - Trainer's signature
        inputs: Any,  # noqa: ANN401 - Trainer's signature
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ANN401 - Trainer's signature
    ) -> Any:  # noqa: ANN401 - Trainer's signature
        """Mean loss of the pairs; in training their share of the mean of the whole step's pairs."""
        with _figures_of_one_rank(self.accelerator):
            found = super().compute_loss(model, inputs, return_outputs)  # type: ignore[no-untyped-call]
        if num_items_in_batch is None:
            return found
        return found * (_pairs(inputs) / num_items_in_batch * world_size())  # of all ranks, which are averaged

    def _get_num_items_in_batch(self, batch_samples: Sequence[Any], _: torch.device) -> int:
        """Pairs of the step, over all ranks."""
        return int(total([sum(map(_pairs, batch_samples))])[0])

    def measure(self, rows: Sequence[PairRow], poll: Callable[[int, int], None] | None = None) -> HeldOut:
        """Loss, accuracy and margin over pairs, in TRL's own terms; batches are the same each time."""
        figures = ("rewards/accuracies", "rewards/margins")
        sums, count = [0.0] * 3, 0
        with evaluating(self.model):
            for batch, counts in polled(rows, poll):
                loss = self.compute_loss(self.model, self._prepare_inputs(collate(batch)))
                told = (float(loss), *(self._metrics["eval"][name][-1] for name in figures))
                sums = [known + counts * value * len(batch) for known, value in zip(sums, told, strict=True)]
                count += counts * len(batch)
            self._metrics["eval"].clear()
        *sums, pairs = total([*sums, count])
        loss, accuracy, margin = (known / max(pairs, 1) for known in sums)
        return HeldOut(loss, accuracy, margin)


def _pairs(inputs: Mapping[str, torch.Tensor]) -> int:
    """Pairs of which a token counts; a rank that has none left keeps the others company with one that has none."""
    counts = inputs["completion_mask"].any(dim=1)
    return int(counts[: len(counts) // 2].sum())


@contextmanager
def _figures_of_one_rank(accelerator: Any) -> Iterator[None]:  # noqa: ANN401 - accelerate's
    """Let TRL (1.16) tell the figures of a rank's own batch: to gather them, batches would have to be all alike."""
    accelerator.gather = accelerator.gather_for_metrics = lambda figure: figure
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics


def collate_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """`collate` of rows that are columns by name, as a dataset gives them."""
    return collate(
        [
            PairRow(token_row(row[INPUT_IDS], row[LOSS_MASK]), token_row(row[REJECTED_IDS], row[REJECTED_MASK]))
            for row in rows
        ]
    )


def collate(pairs: Sequence[PairRow]) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask`, `completion_mask` [2 pairs, longest]: the better answers, then the others."""
    ids, mask, labels = pad([*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)])
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": (labels != IGNORED).long()}


def freeze(reference: Any) -> Any:  # noqa: ANN401 - a transformers model
    """The base, loaded a second time, as what never trains."""
    log.info("DPO holds the base as its reference as well: %.2f GiB more", reference.get_memory_footprint() / 2**30)
    return reference.requires_grad_(False)


def copy_start_to_reference(model: Any) -> None:  # noqa: ANN401 - a PEFT model
    """Make the reference adapter equal to the one that the run goes on from, bit by bit.

    TRL (1.16) leaves out adapters of embeddings and rows of added tokens, whose names end in the adapter's, and rounds
    an adapter on a 4-bit base to bf16 after it copied it.
    """
    tensors = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parts = name.split(".")
        if TRAINED in parts:
            reference = tensors[".".join(REFERENCE if part == TRAINED else part for part in parts)]
            reference.data = tensor.detach().clone()
