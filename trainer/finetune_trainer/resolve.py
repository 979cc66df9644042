"""Every setting that was left open, fixed once. Pure: the same config and facts, the same settings.

Every refusal names the field in camelCase and the way out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from finetune_trainer.config import (
    BaseFormat,
    BaseWeights,
    Checkpoint,
    ComputeDtype,
    EverySteps,
    GradientCheckpointing,
    JobConfig,
    Lora,
    LrScheduler,
    Method,
    Training,
)
from finetune_trainer.errors import InvalidConfig
from finetune_trainer.progress import DataFacts, Resolved, ResolvedQuantize

if TYPE_CHECKING:
    from collections.abc import Iterable

    from finetune_trainer.model import ModelFacts

T = TypeVar("T")

DEFAULT_MAX_LENGTH = 2048
DEFAULT_LEARNING_RATE = 0.0002
DEFAULT_GLOBAL_BATCH = 16
LARGEST_DEFAULT_MICRO_BATCH = 4
"""Rows of 2,048 tokens of an 8B QLoRA with checkpointing fit a 24 GB GPU four at a time; more gains little speed."""
SHORT_RUN_STEPS = 1000
GROUP_SIZES = (128, 64, 32)
OPTIMIZER = "adamw_torch"
ATTENTION = "sdpa"
ALL_LINEAR = "all-linear"
DEFAULT_BITS = 4


@dataclass(frozen=True)
class SourceFacts:
    """What the job is made from."""

    model_digest: str
    model_revision: str | None
    data_digest: str


def resolve(config: JobConfig, sources: SourceFacts, model: ModelFacts, data: DataFacts) -> Resolved:
    """All settings of the job. InvalidConfig where a field does not go with the model, the rows or the device."""
    method, training = config.method or Method(), config.training or Training()
    lora, weights = method.lora or Lora(), method.base_weights or BaseWeights()
    rank = _or(lora.r, 16)
    global_batch, micro_batch = resolve_batch(training)
    total_steps, epochs = resolve_length(training, data.train_rows, global_batch)
    tenth = max(1, math.ceil(total_steps / 10))
    checkpoint = training.checkpoint or Checkpoint()
    return Resolved(
        model_digest=sources.model_digest,
        model_revision=sources.model_revision,
        data_digest=sources.data_digest,
        architecture=model.architecture,
        parameters=model.parameters,
        max_length=resolve_max_length(config, model),
        global_batch_size=global_batch,
        micro_batch_size=micro_batch,
        gradient_accumulation_steps=global_batch // micro_batch,
        total_steps=total_steps,
        num_train_epochs=epochs,
        learning_rate=_or(training.learning_rate, DEFAULT_LEARNING_RATE),
        lr_scheduler=_or(training.lr_scheduler, LrScheduler.COSINE).value,
        warmup_steps=resolve_warmup(training, total_steps),
        weight_decay=_or(training.weight_decay, 0.0),
        max_grad_norm=_or(training.max_grad_norm, 1.0),
        optimizer=OPTIMIZER,
        compute_dtype=resolve_compute_dtype(config),
        attention=ATTENTION,
        gradient_checkpointing=resolve_gradient_checkpointing(config),
        base_format=_or(weights.format, BaseFormat.NF4).value,
        double_quantization=_or(weights.double_quantization, True),
        lora_r=rank,
        lora_alpha=_or(lora.alpha, 2 * rank),
        lora_dropout=_or(lora.dropout, 0.0),
        target_modules=resolve_target_modules(config, model),
        seed=_or(training.seed, 42),
        logging_steps=_or(training.logging_steps, 1),
        eval_steps=_or((training.eval or EverySteps()).every_steps, tenth),
        checkpoint_steps=_or(checkpoint.every_steps, tenth),
        checkpoint_keep=_or(checkpoint.keep, 2),
        quantize=resolve_quantize(config, model),
    )


def check_early(config: JobConfig, model: ModelFacts) -> None:
    """All that can be refused before the rows are read. InvalidConfig."""
    resolve_max_length(config, model)
    resolve_target_modules(config, model)
    resolve_quantize(config, model)
    resolve_compute_dtype(config)
    resolve_batch(config.training or Training())


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def resolve_max_length(config: JobConfig, model: ModelFacts) -> int:
    """Tokens a row may have: 2,048 unless set, never more than the model can tell apart."""
    asked = config.training.max_length if config.training else None
    limit = model.max_positions
    if asked is None:
        return min(DEFAULT_MAX_LENGTH, limit or DEFAULT_MAX_LENGTH)
    if limit is not None and asked > limit:
        msg = f"training.maxLength is {asked:,}, the model's limit is {limit:,} tokens. Set it to {limit:,} or less."
        raise InvalidConfig(msg)
    return asked


def resolve_batch(training: Training) -> tuple[int, int]:
    """Rows an optimizer step and rows a forward pass. The second divides the first."""
    micro = training.per_device_train_batch_size
    total = training.global_batch_size
    if total is None:
        total = DEFAULT_GLOBAL_BATCH
        if micro is not None and total % micro:
            msg = (
                f"training.perDeviceTrainBatchSize {micro} does not divide globalBatchSize (by default {total}). "
                f"Set globalBatchSize to a multiple of {micro}, or perDeviceTrainBatchSize to {_divisors(total)}."
            )
            raise InvalidConfig(msg)
    if micro is None:
        micro = max(size for size in range(1, LARGEST_DEFAULT_MICRO_BATCH + 1) if total % size == 0)
    return total, micro


def _divisors(number: int) -> str:
    return ", ".join(str(size) for size in range(1, number + 1) if number % size == 0)


def resolve_length(training: Training, rows: int, global_batch: int) -> tuple[int, float]:
    """Optimizer steps and epochs of the run.

    As transformers' Trainer counts: the last step of an epoch takes what rows are left, so an epoch has
    ceil(rows / globalBatchSize) steps, and a run ceil(epochs x that).
    """
    steps_an_epoch = math.ceil(rows / global_batch)
    if training.max_steps is not None:
        return training.max_steps, round(training.max_steps / steps_an_epoch, 6)
    epochs = _or(training.num_train_epochs, 1.0)
    return math.ceil(epochs * steps_an_epoch), epochs


def resolve_warmup(training: Training, total_steps: int) -> int:
    """Steps of warm-up: as set, or a tenth of short runs and 3% of long ones, rounded up."""
    if training.warmup_steps is not None:
        if training.warmup_steps >= total_steps:
            msg = (
                f"training.warmupSteps is {training.warmup_steps:,}, but the whole run has {total_steps:,} steps. "
                "Set it lower, or set warmupRatio instead."
            )
            raise InvalidConfig(msg)
        return training.warmup_steps
    default = 0.1 if total_steps < SHORT_RUN_STEPS else 0.03
    steps = math.ceil(round(_or(training.warmup_ratio, default) * total_steps, 9))
    return min(steps, total_steps - 1)


def resolve_compute_dtype(config: JobConfig) -> str:
    """FP32 on CPU, BF16 on a GPU.

    Prepare holds no GPU, so it cannot see one without bf16; there the train stage takes FP16 where Auto was asked for.
    """
    asked = _or(config.method.compute_dtype if config.method else None, ComputeDtype.AUTO)
    on_cpu = config.gpus_per_node == 0
    if asked is ComputeDtype.FP16 and on_cpu:
        msg = (
            "method.computeDtype FP16 needs a GPU, parallelism.gpusPerNode is 0. Leave computeDtype unset, or set FP32."
        )
        raise InvalidConfig(msg)
    if asked is ComputeDtype.AUTO:
        return (ComputeDtype.FP32 if on_cpu else ComputeDtype.BF16).value
    return asked.value


def resolve_gradient_checkpointing(config: JobConfig) -> bool:
    """On for a GPU, where memory is short; off on CPU, where time is."""
    training = config.training or Training()
    asked = _or(training.gradient_checkpointing, GradientCheckpointing.AUTO)
    return config.gpus_per_node > 0 if asked is GradientCheckpointing.AUTO else asked is GradientCheckpointing.FULL


def resolve_target_modules(config: JobConfig, model: ModelFacts) -> tuple[str, ...]:
    """Names of the layers to adapt, as PEFT takes them: last parts of names, or longer ends of them."""
    lora = config.method.lora if config.method else None
    asked = lora.target_modules if lora else None
    if not model.linear_layers:
        msg = f"{model.architecture} has no linear layers that an adapter could be put on. Use another model."
        raise InvalidConfig(msg)
    if asked is None or asked == (ALL_LINEAR,):
        return model.linear_names
    for name in asked:
        if not any(layer == name or layer.endswith("." + name) for layer in model.linear_layers):
            there = ", ".join(model.linear_names)
            msg = (
                f"method.lora.targetModules: {model.architecture} has no linear layer '{name}'. "
                f"Use some of {there}, or leave targetModules unset for all of them."
            )
            raise InvalidConfig(msg)
    return tuple(dict.fromkeys(asked))


def resolve_quantize(config: JobConfig, model: ModelFacts) -> tuple[ResolvedQuantize, ...]:
    """The quantized forms with a group size that fits every layer."""
    return tuple(
        ResolvedQuantize(
            name=entry.name,
            bits=_or(entry.bits, DEFAULT_BITS),
            group_size=_group_size(entry.name, entry.group_size, set(model.linear_layers.values())),
        )
        for entry in config.quantize or ()
    )


def _group_size(name: str, asked: int | None, columns: Iterable[int]) -> int:
    """The largest usual group size that divides the input columns of all layers, or the one asked for."""
    common = math.gcd(*columns)
    fitting = [size for size in GROUP_SIZES if common % size == 0]
    if asked is not None:
        if common % asked:
            choice = f"Use {_one_of(fitting)}, or leave it unset." if fitting else "No usual size fits this model."
            msg = (
                f"quantize '{name}': groupSize {asked} does not divide the model's layers ({_sizes(columns)} columns). "
            )
            raise InvalidConfig(msg + choice)
        return asked
    if not fitting:
        msg = f"quantize '{name}': none of the group sizes 128, 64, 32 divides the layers ({_sizes(columns)} columns). "
        raise InvalidConfig(msg + "Set groupSize to a divisor of them from 16 up, or leave quantize out.")
    return fitting[0]


def _one_of(sizes: list[int]) -> str:
    return " or ".join(str(size) for size in sizes)


def _sizes(columns: Iterable[int]) -> str:
    return ", ".join(str(size) for size in sorted(set(columns)))
