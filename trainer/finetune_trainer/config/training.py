"""Hyperparameters of the optimization, and how many devices share the work."""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from finetune_trainer.config.base import DEFAULT_SEED, SEED_LIMIT, STEPS_LIMIT, Model


class LrScheduler(StrEnum):
    """Course of the learning rate after the warm-up."""

    COSINE = "Cosine"
    LINEAR = "Linear"
    CONSTANT = "Constant"
    COSINE_WITH_RESTARTS = "CosineWithRestarts"
    POLYNOMIAL = "Polynomial"
    INVERSE_SQRT = "InverseSqrt"


class Optimizer(StrEnum):
    """What moves the weights."""

    ADAMW = "AdamW"
    ADAMW_8BIT = "AdamW8bit"
    PAGED_ADAMW = "PagedAdamW"
    PAGED_ADAMW_8BIT = "PagedAdamW8bit"
    ADAFACTOR = "Adafactor"
    SGD = "SGD"


WITHOUT_BETAS = (Optimizer.ADAFACTOR, Optimizer.SGD)
"""Optimizers that know no adamBeta1 and adamBeta2."""


class LongRows(StrEnum):
    """What becomes of rows longer than maxLength."""

    DROP = "Drop"
    TRUNCATE = "Truncate"
    SPLIT = "Split"
    FAIL = "Fail"


class Packing(StrEnum):
    """Whether short rows share a sequence."""

    AUTO = "Auto"
    ON = "On"
    OFF = "Off"


class GradientCheckpointing(StrEnum):
    """Trade compute for memory by recomputing activations."""

    AUTO = "Auto"
    FULL = "Full"
    SELECTIVE = "Selective"
    OFF = "Off"


class FastPath(StrEnum):
    """Whether the blocks of a Llama with adapters are computed by the trainer's own code."""

    AUTO = "Auto"
    OFF = "Off"


class Offload(StrEnum):
    """Whether what the fast path can do without for a while lies in host memory."""

    AUTO = "Auto"
    ON = "On"
    OFF = "Off"


class Every(Model):
    """How often: in optimizer steps, or as a share of the run."""

    every_steps: int | None = Field(
        default=None, ge=1, le=STEPS_LIMIT, description="Each so many optimizer steps. Default: a tenth of the run."
    )
    every_percent: float | None = Field(default=None, gt=0, le=100, description="Each so many percent of the run.")

    @model_validator(mode="after")
    def _one_interval(self) -> Self:
        if self.every_steps is not None and self.every_percent is not None:
            msg = "training: everySteps and everyPercent are alternatives, set one"
            raise ValueError(msg)
        return self


class Checkpoint(Every):
    """When to save, and how many to keep."""

    every_epoch: bool | None = Field(default=None, description="At the end of each epoch. Default false.")
    keep: int | None = Field(default=None, ge=1, le=100, description="How many to keep, the best besides. Default 2.")

    @model_validator(mode="after")
    def _epoch_or_interval(self) -> Self:
        if self.every_epoch and (self.every_steps is not None or self.every_percent is not None):
            msg = "training.checkpoint: everyEpoch, everySteps and everyPercent are alternatives, set one"
            raise ValueError(msg)
        return self


class EarlyStopping(Model):
    """End when the held-out loss no longer falls."""

    patience: int = Field(ge=1, le=1000, description="Measurements in a row without a better one.")
    threshold: float | None = Field(
        default=None, ge=0, le=10, description="What counts as better, nats a token. Default 0."
    )


class Training(Model):
    """Hyperparameters of the optimization."""

    learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Peak learning rate. Default 0.0002 (QLoRA, LoRA), 0.00002 (Full), 0.00001 (GaLore); DPO 0.000005 "
        "(adapters), 0.000001.",
    )
    lr_scheduler: LrScheduler | None = Field(
        default=None,
        description="Cosine, Linear, Constant, CosineWithRestarts, Polynomial or InverseSqrt. Default Cosine.",
    )
    warmup_ratio: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Warm-up as a share of all steps. Default 0.1 below 1,000 steps, else 0.03.",
    )
    warmup_steps: int | None = Field(default=None, ge=0, le=STEPS_LIMIT, description="Warm-up in steps.")
    num_train_epochs: float | None = Field(default=None, gt=0, le=1000, description="Passes over the rows. Default 1.")
    max_steps: int | None = Field(
        default=None, ge=1, le=STEPS_LIMIT, description="Optimizer steps, however long an epoch is."
    )
    weight_decay: float | None = Field(
        default=None, ge=0, le=1, description="AdamW's weight decay. Default 0, for Full 0.01."
    )
    max_grad_norm: float | None = Field(
        default=None, gt=0, le=1_000_000, description="Gradients are clipped to this norm. Default 1."
    )
    adam_beta1: float | None = Field(
        default=None, ge=0, lt=1, description="AdamW's first beta; Adafactor and SGD have none. Default 0.9."
    )
    adam_beta2: float | None = Field(
        default=None, ge=0, lt=1, description="AdamW's second beta; Adafactor and SGD have none. Default 0.999."
    )
    global_batch_size: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="Rows an optimizer step, over all devices. Default 16; Full, GaLore and DPO 32.",
    )
    per_device_train_batch_size: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Micro-batch, in rows; times the number of devices it divides globalBatchSize. Default at most 4; "
        "with pod.gpuMemory as many as fill the GPU.",
    )
    max_length: int | None = Field(
        default=None, ge=8, le=1048576, description="Longest row, in tokens. Default 2048 or the model's own limit."
    )
    long_rows: LongRows | None = Field(
        default=None,
        description="Rows longer than maxLength: Drop, Truncate, Split or Fail. Default Drop where the prompt is "
        "masked, Split for Text.",
    )
    packing: Packing | None = Field(
        default=None,
        description="Several short rows in one sequence, kept apart. Auto: on where attention keeps them apart, off "
        "for DPO and below 100 steps. Default Auto.",
    )
    optimizer: Optimizer | None = Field(
        default=None,
        description="AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit, Adafactor or SGD. Default AdamW.",
    )
    gradient_checkpointing: GradientCheckpointing | None = Field(
        default=None,
        description="Full: recompute all activations; Selective: all but products; Auto: Full on a GPU, Off on CPU; "
        "with pod.gpuMemory what is faster of those that fit. Default Auto.",
    )
    fast_path: FastPath | None = Field(
        default=None,
        description="Auto: adapters on a Llama, Mistral, Qwen2 or Qwen3 in 16 or 4 bits on one GPU are trained by the "
        "trainer's own forward and backward pass, which is faster and keeps less of a pass; all else, and "
        "Off, by autograd. Default Auto.",
    )
    offload: Offload | None = Field(
        default=None,
        description="On: on the fast path the input of each block, with checkpointing Selective what attention gave as "
        "well, and the embedding lie in pinned host memory, which takes less of the GPU and learns the same. Auto: "
        "where pod.gpuMemory would else be too little, or fit small micro-batches alone. Default Auto.",
    )
    neftune_noise_alpha: float | None = Field(
        default=None, gt=0, le=1000, description="Noise on embeddings while training (NEFTune). Default none."
    )
    shuffle: bool | None = Field(default=None, description="Take rows in another order each epoch. Default true.")
    seed: int | None = Field(
        default=None, ge=0, le=SEED_LIMIT, description=f"Seed of everything random. Default {DEFAULT_SEED}."
    )
    logging_steps: int | None = Field(
        default=None, ge=1, le=STEPS_LIMIT, description="Steps between two lines of the log. Default 1."
    )
    eval: Every | None = Field(default=None, description="When to measure the held-out loss.")
    checkpoint: Checkpoint | None = Field(default=None, description="When to save a checkpoint.")
    restore_best: bool | None = Field(
        default=None, description="End with the weights of the lowest held-out loss, not the last ones. Default false."
    )
    early_stopping: EarlyStopping | None = Field(
        default=None, description="End when the held-out loss no longer falls. Default: off."
    )

    @model_validator(mode="after")
    def _betas_are_used(self) -> Self:
        asked = self.adam_beta1 is not None or self.adam_beta2 is not None
        if asked and self.optimizer in WITHOUT_BETAS:
            msg = (
                f"training: adamBeta1 and adamBeta2 are for AdamW, optimizer is {self.optimizer}: "
                "drop them, or set optimizer to AdamW"
            )
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _alternatives(self) -> Self:
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            msg = "training: warmupRatio and warmupSteps are alternatives, set one"
            raise ValueError(msg)
        if self.num_train_epochs is not None and self.max_steps is not None:
            msg = "training: numTrainEpochs and maxSteps are alternatives, set one"
            raise ValueError(msg)
        return self


class Strategy(StrEnum):
    """How devices share the work."""

    AUTO = "Auto"
    DDP = "DDP"
    FSDP = "FSDP"


class Sharding(StrEnum):
    """What FSDP spreads over the devices."""

    FULL = "Full"
    GRAD_OP = "GradOp"


class Fsdp(Model):
    """Fully sharded data parallelism (FSDP2)."""

    sharding: Sharding | None = Field(
        default=None,
        description="Full: weights, gradients and optimizer (ZeRO-3). GradOp: weights are gathered once a step "
        "(ZeRO-2). Default Full.",
    )
    cpu_offload: bool | None = Field(default=None, description="Keep the shards in host memory. Default false.")


class Parallelism(Model):
    """How many devices train, and how they share the work."""

    num_nodes: int | None = Field(default=None, ge=1, le=64, description="Pods of the train stage. Default 1.")
    gpus_per_node: int | None = Field(
        default=None, ge=0, le=16, description="GPUs a pod, or 0 to try out on CPU. Default 1."
    )
    strategy: Strategy | None = Field(
        default=None, description="Auto: on several devices FSDP for Full or with fsdp, else DDP. Default Auto."
    )
    fsdp: Fsdp | None = Field(default=None, description="Settings of FSDP.")

    @model_validator(mode="after")
    def _fsdp_settings_for_fsdp(self) -> Self:
        if self.fsdp is not None and self.strategy is Strategy.DDP:
            msg = "parallelism: fsdp is for strategy FSDP, strategy is DDP"
            raise ValueError(msg)
        return self

    @property
    def ranks_per_node(self) -> int:
        """Processes a pod: one a GPU, one on CPU."""
        return max(1, 1 if self.gpus_per_node is None else self.gpus_per_node)

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return (self.num_nodes or 1) * self.ranks_per_node
