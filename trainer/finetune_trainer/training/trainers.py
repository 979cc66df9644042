"""The trainer of a job: TRL's for its objective, on the model as its method trains it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback

from finetune_trainer.config import BaseFormat
from finetune_trainer.fast.build import build_fast, is_fast
from finetune_trainer.models import sharding
from finetune_trainer.models.float8 import keep_from_ddp
from finetune_trainer.models.loading import import_peft
from finetune_trainer.training.adapters import build_lora, train_in_fp32, unrounded
from finetune_trainer.training.arguments import build_arguments
from finetune_trainer.training.collate import Collator, as_dataset, build_order

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from finetune_trainer.progress import Resolved
    from finetune_trainer.training.exact import Exact


def build_trainer(  # noqa: PLR0913 - the pieces of a training
    base: Any,  # noqa: ANN401 - a transformers model, or a PEFT model to go on from
    tokenizer: Any,  # noqa: ANN401 - a transformers tokenizer
    rows: pa.Table,
    resolved: Resolved,
    dtype: torch.dtype,
    scratch: Path,
    reference: Any = None,  # noqa: ANN401 - a transformers model
) -> Exact:
    """The trainer of `rows` (`data.read_rows`). `scratch`: Trainer wants a folder's name; nothing is written.

    `reference`: the base once more, for DPO of all weights.
    """
    import_peft()
    peft_config = build_lora(resolved, base)
    fast = is_fast(resolved, base.device, dtype)
    build = partial(_build_sft, resolved, fast) if resolved.dpo is None else partial(_build_dpo, reference)
    with unrounded(base):
        trainer = build(
            model=base,
            args=build_arguments(resolved, dtype, base.device, scratch, fast=fast),
            train_dataset=as_dataset(rows),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
    trainer.remove_callback(PrinterCallback)
    if peft_config is not None:
        train_in_fp32(trainer.model)
    if resolved.base_format == BaseFormat.FP8:
        keep_from_ddp(trainer.model)
    if sharding.is_to_shard(resolved):
        sharding.finish(trainer.model, resolved)
        trainer.is_distributed_loading_by_transformers = True
    if resolved.galore is not None:
        trainer.optimizer_cls_and_kwargs = _galore(trainer.model, resolved)
    trainer.weights_are_set()
    if fast:
        trainer.fast = build_fast(trainer.model, resolved, dtype)
    trainer.row_order = build_order(rows, resolved)
    return trainer


def _galore(model: Any, resolved: Resolved) -> tuple[type, dict[str, Any]]:  # noqa: ANN401 - a transformers model
    from finetune_trainer.training.optimizers import build_galore  # noqa: PLC0415 - slow

    return build_galore(model, resolved)


def _build_sft(resolved: Resolved, fast: bool, **pieces: Any) -> Exact:  # noqa: ANN401 - what TRL's trainers take
    from finetune_trainer.training.sft import SftTrainer  # noqa: PLC0415 - slow

    return SftTrainer(data_collator=Collator(resolved, in_one_row=fast), **pieces)


def _build_dpo(reference: Any, **pieces: Any) -> Exact:  # noqa: ANN401 - what TRL's trainers take
    from finetune_trainer.training.dpo import DpoTrainer, collate_columns, freeze  # noqa: PLC0415 - slow

    frozen = None if reference is None else freeze(reference)
    return DpoTrainer(data_collator=collate_columns, ref_model=frozen, **pieces)
