"""Every setting that was left open, fixed once. Pure: the same config and facts, the same settings.

Every refusal names the field in camelCase and the way out.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from finetune_trainer.config import (
    BITSANDBYTES,
    DEFAULT_SEED,
    SORTING_LOSSES,
    BaseWeights,
    Checkpoint,
    Dpo,
    DpoLossType,
    Every,
    JobConfig,
    LrScheduler,
    Method,
    MethodType,
    ObjectiveType,
    Offload,
    Training,
)
from finetune_trainer.progress import (
    DataFacts,
    Resolved,
    ResolvedDpo,
    ResolvedEarlyStopping,
)
from finetune_trainer.runtime.errors import InvalidConfig
from finetune_trainer.settings.devices import resolve_parallelism
from finetune_trainer.settings.fast import with_path
from finetune_trainer.settings.methods import (
    check_added_tokens,
    check_method,
    resolve_attention,
    resolve_base_format,
    resolve_compute_dtype,
    resolve_galore,
    resolve_gradient_checkpointing,
    resolve_lora,
    resolve_optimizer,
)
from finetune_trainer.settings.methods import or_default as _or
from finetune_trainer.settings.outcome import check_outcome, resolve_merge, resolve_quantize

if TYPE_CHECKING:
    from finetune_trainer.models.folder import ModelFacts

log = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_MAX_LENGTH = 2048
LEARNING_RATES = {
    (ObjectiveType.SFT, MethodType.QLORA): 0.0002,
    (ObjectiveType.SFT, MethodType.LORA): 0.0002,
    (ObjectiveType.SFT, MethodType.FULL): 0.00002,
    (ObjectiveType.SFT, MethodType.GALORE): 0.00001,
    (ObjectiveType.DPO, MethodType.QLORA): 0.000005,
    (ObjectiveType.DPO, MethodType.LORA): 0.000005,
    (ObjectiveType.DPO, MethodType.FULL): 0.000001,
    (ObjectiveType.DPO, MethodType.GALORE): 0.000001,
}
LABEL_SMOOTHING = {DpoLossType.EXO_PAIR: 0.001, DpoLossType.ROBUST: 0.1}
ADAPTER_GLOBAL_BATCH, WHOLE_GLOBAL_BATCH = 16, 32
FULL_WEIGHT_DECAY = 0.01
LARGEST_DEFAULT_MICRO_BATCH = 4
"""Rows of 2,048 tokens of an 8B QLoRA with checkpointing fit a 24 GB GPU four at a time; more gains little speed."""
SHORT_RUN_STEPS = 1000


@dataclass(frozen=True)
class SourceFacts:
    """What the job is made from."""

    model_digest: str
    model_revision: str | None
    data_digest: str
    data_revisions: tuple[str, ...] = ()


def resolve(
    config: JobConfig,
    sources: SourceFacts,
    model: ModelFacts,
    data: DataFacts,
    added_tokens: tuple[int, ...] = (),
) -> Resolved:
    """All settings of the job. InvalidConfig where a field does not go with the model, the rows or the device."""
    check_added_tokens(config, model, added_tokens)
    method, training = config.method or Method(), config.training or Training()
    global_batch, micro_batch = resolve_batch(config)
    sequences = _or(data.packed_rows, data.train_rows)
    total_steps, epochs = resolve_length(training, sequences, global_batch)
    check_held_out(config, data.eval_rows)
    checkpoint = training.checkpoint or Checkpoint()
    settled = Resolved(
        model_digest=sources.model_digest,
        model_revision=sources.model_revision,
        data_digest=sources.data_digest,
        data_revisions=sources.data_revisions,
        architecture=model.architecture,
        parameters=model.parameters,
        method=config.method_type.value,
        objective=config.objective_type.value,
        max_length=resolve_max_length(config, model),
        packing=data.packed_rows is not None,
        global_batch_size=global_batch,
        micro_batch_size=micro_batch,
        gradient_accumulation_steps=global_batch // (micro_batch * config.world_size),
        total_steps=total_steps,
        num_train_epochs=epochs,
        learning_rate=_or(training.learning_rate, LEARNING_RATES[config.objective_type, config.method_type]),
        lr_scheduler=_or(training.lr_scheduler, LrScheduler.COSINE).value,
        warmup_steps=resolve_warmup(training, total_steps),
        weight_decay=_or(training.weight_decay, FULL_WEIGHT_DECAY if config.method_type is MethodType.FULL else 0.0),
        max_grad_norm=_or(training.max_grad_norm, 1.0),
        optimizer=resolve_optimizer(config).value,
        adam_beta1=_or(training.adam_beta1, 0.9),
        adam_beta2=_or(training.adam_beta2, 0.999),
        compute_dtype=resolve_compute_dtype(config),
        fp8_products=bool(config.method and config.method.fp8_products),
        attention=resolve_attention(config).value,
        gradient_checkpointing=resolve_gradient_checkpointing(config).value,
        offloads=training.offload is Offload.ON,
        neftune_noise_alpha=training.neftune_noise_alpha,
        base_format=resolve_base_format(config).value,
        double_quantization=resolve_base_format(config) in BITSANDBYTES
        and _or((method.base_weights or BaseWeights()).double_quantization, True),
        lora=resolve_lora(config, model),
        galore=resolve_galore(config, model),
        dpo=resolve_dpo(config),
        added_tokens=added_tokens,
        dataset_weights=resolve_dataset_weights(config),
        shuffle=_or(training.shuffle, True),
        seed=_or(training.seed, DEFAULT_SEED),
        logging_steps=_or(training.logging_steps, 1),
        eval_steps=resolve_interval("eval", training.eval or Every(), total_steps),
        checkpoint_steps=resolve_checkpoint_steps(checkpoint, total_steps, sequences, global_batch),
        checkpoint_keep=_or(checkpoint.keep, 2),
        restore_best=_or(training.restore_best, False),
        early_stopping=resolve_early_stopping(training),
        parallelism=resolve_parallelism(config),
        merge=resolve_merge(config),
        quantize=resolve_quantize(config, model),
    )
    return with_path(config, settled, model, data.length_max)


def check_early(config: JobConfig, model: ModelFacts) -> None:
    """All that can be refused before the rows are read. InvalidConfig."""
    resolve_max_length(config, model)
    check_method(config, model)
    check_outcome(config, model)
    resolve_batch(config)
    resolve_dpo(config)
    resolve_parallelism(config)


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


def resolve_batch(config: JobConfig) -> tuple[int, int]:
    """Rows an optimizer step and rows a forward pass on one device. Devices times the second divide the first."""
    training, world_size = config.training or Training(), config.world_size
    micro, total = training.per_device_train_batch_size, training.global_batch_size
    if total is None:
        total = default_global_batch(config)
        if total % ((micro or 1) * world_size):
            msg = (
                f"training.globalBatchSize is {total} by default, which {world_size:,} devices with "
                f"perDeviceTrainBatchSize {micro or 1} do not share evenly. "
                f"Set globalBatchSize to a multiple of {(micro or 1) * world_size:,}."
            )
            raise InvalidConfig(msg)
    if micro is None:
        share = total // world_size
        micro = max(size for size in range(1, LARGEST_DEFAULT_MICRO_BATCH + 1) if share % size == 0)
    return total, micro


def default_global_batch(config: JobConfig) -> int:
    """16 rows a step for adapters in SFT, 32 for all else."""
    small = config.trains_adapter and config.objective_type is ObjectiveType.SFT
    return ADAPTER_GLOBAL_BATCH if small else WHOLE_GLOBAL_BATCH


def resolve_dpo(config: JobConfig) -> ResolvedDpo | None:
    """The settings of DPO, TRL's where unset; smoothing as the papers of ExoPair and Robust have it."""
    if config.objective_type is not ObjectiveType.DPO:
        return None
    asked = (config.objective.dpo if config.objective else None) or Dpo()
    loss_type = _or(asked.loss_type, DpoLossType.SIGMOID)
    _, micro_batch = resolve_batch(config)
    if loss_type in SORTING_LOSSES and micro_batch == 1:
        msg = (
            f"objective.dpo.lossType {loss_type} compares the pairs of a micro-batch, which has one. "
            "Set training.perDeviceTrainBatchSize to 2 or more, or use another lossType."
        )
        raise InvalidConfig(msg)
    return ResolvedDpo(
        beta=_or(asked.beta, 0.1),
        loss_type=loss_type.value,
        label_smoothing=_or(asked.label_smoothing, LABEL_SMOOTHING.get(loss_type, 0.0)),
    )


def resolve_dataset_weights(config: JobConfig) -> tuple[float, ...]:
    """Each dataset's share of an epoch; empty where none has a weight. One that has none among others weighs 1."""
    if all(dataset.weight is None for dataset in config.datasets):
        return ()
    weights = [_or(dataset.weight, 1.0) for dataset in config.datasets]
    return tuple(round(weight / sum(weights), 6) for weight in weights)


def check_held_out(config: JobConfig, eval_rows: int) -> None:
    """Refuse what rests on a held-out loss where the split left no row to measure. InvalidConfig."""
    if eval_rows == 0 and (fields := config.measured_fields):
        msg = (
            f"{fields[0]} needs a held-out loss, but no row was held out. "
            f"Raise evaluation.percent, or drop {fields[0]}."
        )
        raise InvalidConfig(msg)


def resolve_interval(field: str, every: Every, total_steps: int) -> int:
    """Steps between two of something: as set, or a tenth of the run; at most the whole run, at whose end it is done."""
    if every.every_steps is None:
        return max(1, math.ceil(total_steps * _or(every.every_percent, 10.0) / 100))
    if every.every_steps > total_steps:
        told = "training.%s.everySteps is %d, the whole run has %d steps: once, at its end"
        log.warning(told, field, every.every_steps, total_steps)
    return min(every.every_steps, total_steps)


def resolve_checkpoint_steps(checkpoint: Checkpoint, total_steps: int, sequences: int, global_batch: int) -> int:
    """Steps between two checkpoints; an epoch's if so set."""
    if checkpoint.every_epoch:
        return min(math.ceil(sequences / global_batch), total_steps)
    return resolve_interval("checkpoint", checkpoint, total_steps)


def resolve_early_stopping(training: Training) -> ResolvedEarlyStopping | None:
    """When a run ends before its last step; None: never."""
    asked = training.early_stopping
    if asked is None:
        return None
    return ResolvedEarlyStopping(patience=asked.patience, threshold=_or(asked.threshold, 0.0))


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
