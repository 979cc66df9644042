"""What the trainers of all objectives share: our order of rows, our checkpoints, an eye on every loss.

Trainer's own saving, evaluating and loading are not used: saves are not atomic, a resume is not exact, and a
not-a-number loss is hidden (transformers 5.23). The loop itself, its optimizer, schedule and accumulation, is theirs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer

from finetune_trainer.data.order import FILLER, Share
from finetune_trainer.data.tokenized import LOSS_MASK, REJECTED_MASK
from finetune_trainer.runtime.distributed import rank, world_size
from finetune_trainer.settings.activations import Batch
from finetune_trainer.training import state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch

    from finetune_trainer.data.order import RowOrder
    from finetune_trainer.evaluate import HeldOut
    from finetune_trainer.fast.model import FastModel

T = TypeVar("T")


def batch_seen(inputs: Mapping[str, Any]) -> Batch:
    """How large a micro-batch is; attention is told of rows apart by a mask, or by positions that begin anew."""
    rows, tokens = inputs["input_ids"].shape
    mask = inputs.get("attention_mask")
    return Batch(rows, tokens, masked=not bool(mask.all()) if mask is not None else "cu_seq_lens_q" not in inputs)


class Filled(Dataset[Any]):
    """Rows, and one more under the index FILLER, of which nothing counts."""

    def __init__(self, rows: Any) -> None:  # noqa: ANN401 - datasets.Dataset
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, indexes: Sequence[int]) -> list[dict[str, Any]]:
        """A micro-batch at once, which takes less time than its rows one by one."""
        rows = iter(self._rows.__getitems__([index for index in indexes if index != FILLER]))
        return [self._filler() if index == FILLER else next(rows) for index in indexes]

    def _filler(self) -> dict[str, Any]:
        row: dict[str, Any] = self._rows[0]
        masks = {name: np.zeros_like(mask) for name, mask in row.items() if name in (LOSS_MASK, REJECTED_MASK)}
        return {**row, **masks}


class Exact(Trainer, ABC):
    """Stands before a TRL trainer among the bases of a class, which says how it is measured."""

    zero_loss_is_failure: ClassVar[bool] = True
    """Whether a loss of exactly 0 tells that numbers were lost."""
    row_order: RowOrder
    step_loss: torch.Tensor | None = None
    """Sum of the losses of the micro-batches since the last optimizer step."""
    step_tokens: torch.Tensor | int = 0
    """Of the same micro-batches; on a GPU not waited for."""
    largest_batch: Batch = Batch(0, 0, masked=False)
    """Of the micro-batches so far that with the most tokens."""
    fast: FastModel | None = None
    """Computes losses and gradients in place of autograd, where it can."""
    drill: Callable[[int], None] | None = None
    """Called with the number of the step before each of its micro-batches; it may raise."""
    step_gradient_norm: float = 0.0
    """Of the last step's gradients, before they were clipped."""

    def weights_are_set(self) -> None:
        """Called once, when the model has the weights and dtypes that training begins with."""

    def beside_passes(self, work: Callable[[], T]) -> T:
        """What other work than training on the GPU gives, which may have to be begun anew (`fast/record.py`)."""
        return work() if self.fast is None else self.fast.recorder.beside(work)

    @abstractmethod
    def measure(self, rows: Sequence[Any], poll: Callable[[int, int], None] | None = None) -> HeldOut:
        """The model as it is now on held-out rows. `poll(rows done, rows in all)` is called on the way; it may raise.

        Deterministic: the same weights and rows give the same figures.
        """

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This rank's micro-batches. Accelerate's own sharing repeats rows where they do not come out even."""
        args = self.args
        steps = args.gradient_accumulation_steps * args.per_device_train_batch_size * world_size()
        share = Share(self.row_order, args.per_device_train_batch_size, steps, rank(), world_size())
        return DataLoader(
            Filled(self.train_dataset),
            batch_sampler=share,
            collate_fn=self.data_collator,
            pin_memory=args.dataloader_pin_memory,
        )

    def _run_epoch(self, model: Any, *rest: Any, **named: Any) -> None:  # noqa: ANN401 - Trainer's signature
        """With the fast path the loop steps what trains alone.

        At each step it walks three times over all modules and parameters of what it steps, while the GPU waits.
        """
        self.row_order.epoch = named["epoch"]
        stepped = model if self.fast is None else self.fast.stepped
        super()._run_epoch(stepped, *rest, **named)  # type: ignore[no-untyped-call]

    def floating_point_ops(self, inputs: Any) -> int:  # noqa: ANN401, ARG002 - Trainer's signature
        """Nobody asks for this estimate, for which each step would walk over the whole model once more."""
        return 0

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ANN401 - Trainer's signature
        state.read_weights(model or self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and (state.is_sharded(self.model) or state.has_shards(Path(checkpoint))):
            state.read_optimizer(self, Path(checkpoint))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state.read_random(Path(checkpoint))

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Reduce the gradients of each micro-batch: deferred, each rank would hold those of the whole model."""
        yield

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:  # noqa: ANN401 - Trainer's signature
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        self.step_gradient_norm = float(norm)
        return norm

    def training_step(self, model: Any, inputs: Any, *rest: Any) -> torch.Tensor:  # noqa: ANN401 - Trainer's signature
        """Take a micro-batch; remember its loss and its tokens."""
        if self.drill is not None:
            self.drill(int(self.state.global_step) + 1)
        mask = inputs.get("attention_mask")  # packed rows have none, and hardly any padding
        self.step_tokens += inputs["input_ids"].numel() if mask is None else mask.sum()
        if inputs["input_ids"].numel() > self.largest_batch.total:
            self.largest_batch = batch_seen(inputs)
        loss: torch.Tensor = super().training_step(model, inputs, *rest)
        self.step_loss = loss.detach() if self.step_loss is None else self.step_loss + loss.detach()
        return loss
