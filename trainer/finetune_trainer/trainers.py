"""The trainer of a job: TRL's for its objective, on the model as its method trains it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback

from finetune_trainer.adapters import build_lora, train_in_fp32
from finetune_trainer.arguments import build_arguments
from finetune_trainer.collate import Collator, as_dataset, build_order
from finetune_trainer.loading import import_peft

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from finetune_trainer.exact import Exact
    from finetune_trainer.progress import Resolved


def build_trainer(  # noqa: PLR0913 - the pieces of a training
    base: Any,  # noqa: ANN401 - a transformers model, or a PEFT model to go on from
    tokenizer: Any,  # noqa: ANN401 - a transformers tokenizer
    rows: pa.Table,
    resolved: Resolved,
    dtype: torch.dtype,
    scratch: Path,
) -> Exact:
    """The trainer of `rows` (`data.read_rows`). `scratch`: Trainer wants a folder's name; nothing is written."""
    import_peft()
    build = _build_sft if resolved.dpo is None else _build_dpo
    trainer = build(
        resolved,
        model=base,
        args=build_arguments(resolved, dtype, base.device, scratch),
        train_dataset=as_dataset(rows),
        processing_class=tokenizer,
        peft_config=None if resolved.lora is None else build_lora(resolved.lora),
    )
    trainer.remove_callback(PrinterCallback)
    train_in_fp32(trainer.model)
    trainer.weights_are_set()
    trainer.row_order = build_order(rows, resolved)
    return trainer


def _build_sft(resolved: Resolved, **pieces: Any) -> Exact:  # noqa: ANN401 - what TRL's trainers take
    from finetune_trainer.sft import SftTrainer  # noqa: PLC0415 - slow

    return SftTrainer(data_collator=Collator(resolved), **pieces)


def _build_dpo(resolved: Resolved, **pieces: Any) -> Exact:  # noqa: ANN401 - what TRL's trainers take
    from finetune_trainer.dpo import DpoTrainer, build_reference, collate_columns  # noqa: PLC0415 - slow

    reference = build_reference(pieces["model"], resolved)
    return DpoTrainer(data_collator=collate_columns, ref_model=reference, **pieces)
