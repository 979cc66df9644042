"""The settings of a run in the terms of transformers and TRL."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.sft_config import SFTConfig

from finetune_trainer.config import Optimizer
from finetune_trainer.runtime.distributed import world_size
from finetune_trainer.runtime.errors import InvalidConfig

if TYPE_CHECKING:
    from pathlib import Path

    from finetune_trainer.progress import Resolved

SCHEDULERS = {
    "Cosine": "cosine",
    "Linear": "linear",
    "Constant": "constant_with_warmup",
    "CosineWithRestarts": "cosine_with_restarts",
    "Polynomial": "polynomial",
    "InverseSqrt": "inverse_sqrt",
}
PRODUCTS = frozenset(
    packet.default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
    if (packet := getattr(torch.ops.aten, name, None)) is not None
)
"""Operations that take the time of a layer; attention by its kernels, which not every build of torch has."""
OPTIMIZERS = {
    "AdamW": "adamw_torch",
    "AdamW8bit": "adamw_bnb_8bit",
    "PagedAdamW": "paged_adamw_32bit",
    "PagedAdamW8bit": "paged_adamw_8bit",
    "Adafactor": "adafactor",
    "SGD": "sgd",
}
DPO_LOSSES = {
    "Sigmoid": "sigmoid",
    "SigmoidNorm": "sigmoid_norm",
    "Hinge": "hinge",
    "Ipo": "ipo",
    "ExoPair": "exo_pair",
    "NcaPair": "nca_pair",
    "Robust": "robust",
    "BcoPair": "bco_pair",
    "SppoHard": "sppo_hard",
    "Aot": "aot",
    "AotUnpaired": "aot_unpaired",
    "ApoZero": "apo_zero",
    "ApoDown": "apo_down",
    "Discopop": "discopop",
}


def build_arguments(
    resolved: Resolved, dtype: torch.dtype, device: torch.device, scratch: Path, *, fast: bool = False
) -> SFTConfig | DPOConfig:
    """The settings in TRL's terms. Rows are tokenized, masked and packed already, and never cut.

    `fast`: whether the fast path is taken; a step of AdamW is one launch there.
    """
    shared = _shared(resolved, dtype, device, scratch)
    if fast and resolved.optimizer == Optimizer.ADAMW:
        shared["optim"] = "adamw_torch_fused"
    arguments = _in_words_of_trl(resolved, shared)
    arguments._n_gpu = min(arguments.n_gpu, 1)  # noqa: SLF001 - else a process would spread over all GPUs that it sees
    return arguments


def _in_words_of_trl(resolved: Resolved, shared: dict[str, Any]) -> SFTConfig | DPOConfig:
    if resolved.dpo is None:
        return SFTConfig(
            **shared,
            neftune_noise_alpha=resolved.neftune_noise_alpha,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            packing=False,
        )
    return DPOConfig(
        **shared,
        beta=resolved.dpo.beta,
        loss_type=[DPO_LOSSES[resolved.dpo.loss_type]],
        label_smoothing=resolved.dpo.label_smoothing,
        disable_dropout=True,
        max_length=None,
    )


def _shared(resolved: Resolved, dtype: torch.dtype, device: torch.device, scratch: Path) -> dict[str, Any]:
    """What transformers' Trainer is told, whatever the objective."""
    return {
        "output_dir": str(scratch),
        "max_steps": resolved.total_steps,
        "num_train_epochs": math.ceil(resolved.num_train_epochs),
        "per_device_train_batch_size": resolved.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(resolved),
        "learning_rate": resolved.learning_rate,
        "lr_scheduler_type": SCHEDULERS[resolved.lr_scheduler],
        "lr_scheduler_kwargs": _course(resolved),
        "warmup_steps": resolved.warmup_steps,
        "weight_decay": resolved.weight_decay,
        "max_grad_norm": resolved.max_grad_norm,
        "optim": OPTIMIZERS[resolved.optimizer],
        "adam_beta1": resolved.adam_beta1,
        "adam_beta2": resolved.adam_beta2,
        "activation_checkpointing": resolved.gradient_checkpointing != "Off",
        "activation_checkpointing_kwargs": _checkpointing(resolved),
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "use_cpu": device.type == "cpu",
        "seed": resolved.seed,
        "logging_steps": resolved.logging_steps,
        "logging_nan_inf_filter": False,  # it hides what `Loop` watches for
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,  # a collator makes of columns what the model takes
        "dataloader_pin_memory": device.type != "cpu",
        "restore_callback_states_from_checkpoint": False,
    }


def accumulation_steps(resolved: Resolved) -> int:
    """Micro-batches a step on one rank, with as many ranks as there are. InvalidConfig if they do not come out even."""
    together = resolved.micro_batch_size * world_size()
    if resolved.global_batch_size % together:
        msg = (
            f"training.globalBatchSize is {resolved.global_batch_size}, which {world_size()} processes with "
            f"perDeviceTrainBatchSize {resolved.micro_batch_size} do not share evenly. "
            f"Start {resolved.parallelism.world_size}, as parallelism says, or a number that divides the batch."
        )
        raise InvalidConfig(msg)
    return resolved.global_batch_size // together


def _course(resolved: Resolved) -> dict[str, Any]:
    """What tells schedules from simpler ones.

    By transformers' defaults (5.23) restarts never come, and a polynomial is a line that ends at 1e-7, which a peak
    may be below.
    """
    match resolved.lr_scheduler:
        case "CosineWithRestarts":
            return {"num_cycles": max(2, round(resolved.num_train_epochs))}
        case "Polynomial":
            return {"power": 2.0, "lr_end": 0.0}
        case _:
            return {}


def _checkpointing(resolved: Resolved) -> dict[str, Any]:
    """How activations are recomputed in the backward pass; Selective: all but what products and attention gave."""
    if resolved.gradient_checkpointing != "Selective":
        return {"use_reentrant": False}
    return {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, _keep_products)}


def _keep_products(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:  # noqa: ANN401 - torch's signature
    kept = operation in PRODUCTS or "flash_attn" in str(operation)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
