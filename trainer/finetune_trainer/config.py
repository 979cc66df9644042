"""CONTRACT: what a job is to do. The operator writes it as JSON, the trainer reads it.

The models below are both the trainer's configuration file and the training half of a FineTuneJob's spec
(`finetune_operator.api.Spec` adds what only a cluster needs), so a field is declared, bounded and described once.
In JSON and YAML names are camelCase, in Python snake_case. A field left out is unset: whatever depends on
the model or the data is resolved by the prepare stage (`finetune_trainer.resolve`), never here.

Imports nothing heavier than pydantic.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.alias_generators import to_camel

NAME_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
"""A DNS label: safe as a Kubernetes name and as a folder name."""

SUBDOMAIN_PATTERN = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
"""A DNS subdomain: what Kubernetes allows as a name of most things."""

STEPS_LIMIT = 100_000_000
SEED_LIMIT = 2**32 - 1

MODEL_TOKEN_FILE = "model-token"  # noqa: S105 - a file name
"""Below the secrets folder: the token for the base model's repository."""

RELATIVE_PATH_PATTERN = r"^[^/\x00].*$"


class Model(BaseModel):
    """A closed, frozen record: a typo in a field is an error."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, allow_inf_nan=False
    )

    def to_json(self) -> str:
        """The record as JSON with its public names, unset fields left out, the same bytes for the same record."""
        return self.model_dump_json(by_alias=True, exclude_none=True)


ClaimName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=253,
        pattern=SUBDOMAIN_PATTERN,
        description="Name of a PersistentVolumeClaim in the namespace of the job.",
    ),
]
ShortName = Annotated[str, Field(min_length=1, max_length=40, pattern=NAME_PATTERN)]
RelativePath = Annotated[str, Field(min_length=1, max_length=1024, pattern=RELATIVE_PATH_PATTERN)]
SecretName = Annotated[str, Field(min_length=1, max_length=253, pattern=SUBDOMAIN_PATTERN)]


class SecretKeyRef(Model):
    """One key of a Secret in the job's namespace."""

    name: SecretName = Field(description="Name of the Secret.")
    key: str = Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$", description="Key within the Secret.")


class VolumeSource(Model):
    """Files on a PersistentVolumeClaim of the job's namespace, mounted read-only while the job is prepared."""

    claim_name: ClaimName
    path: RelativePath = Field(description="File or folder inside the claim, relative, without leading slash.")

    @field_validator("path")
    @classmethod
    def _inside_the_claim(cls, path: str) -> str:
        if ".." in path.split("/"):
            msg = "path: no part may be '..'"
            raise ValueError(msg)
        return path


class HuggingFaceSource(Model):
    """A repository of the Hugging Face hub, pinned to a commit when the job is prepared."""

    repo: str = Field(min_length=1, max_length=200, pattern=r"^[\w.-]+(/[\w.-]+)?$", description="Owner and name.")
    revision: str = Field(default="main", min_length=1, max_length=200, description="Branch, tag or commit.")
    token_secret_ref: SecretKeyRef | None = Field(default=None, description="Token for a private or gated repository.")


class BaseModelSource(Model):
    """The base model: exactly one source."""

    hugging_face: HuggingFaceSource | None = Field(default=None, description="A repository of the Hugging Face hub.")
    volume: VolumeSource | None = Field(
        default=None,
        description="A folder with config, tokenizer and safetensors, or one GGUF file (converted once).",
    )

    @model_validator(mode="after")
    def _exactly_one_source(self) -> Self:
        if (self.hugging_face is None) == (self.volume is None):
            msg = "model: exactly one source is needed: huggingFace or volume"
            raise ValueError(msg)
        return self


class DatasetFormat(StrEnum):
    """How a row becomes text."""

    AUTO = "Auto"
    TEXT = "Text"
    INSTRUCTION = "Instruction"
    CHAT = "Chat"


class Columns(Model):
    """Names of the fields of a row. Which ones count depends on the format."""

    text: str | None = Field(default=None, max_length=200, description="Text: the whole text. Default text.")
    instruction: str | None = Field(
        default=None, max_length=200, description="Instruction: what is asked. Default instruction."
    )
    input: str | None = Field(
        default=None,
        max_length=200,
        description="Instruction: further input, may be missing. Default input or context.",
    )
    output: str | None = Field(
        default=None, max_length=200, description="Instruction: the answer. Default output or response."
    )
    messages: str | None = Field(
        default=None, max_length=200, description="Chat: the list of messages with role and content. Default messages."
    )


class Dataset(Model):
    """Rows to learn from or to measure on: a jsonl file, or a folder of them read in the order of their names."""

    name: ShortName | None = Field(default=None, description="Used in messages. Default: its index.")
    volume: VolumeSource = Field(description="A jsonl file, or a folder with jsonl files.")
    format: DatasetFormat | None = Field(
        default=None, description="Auto (from the fields of the first row), Text, Instruction or Chat. Default Auto."
    )
    columns: Columns | None = Field(default=None, description="Names of the fields, where they are not the usual ones.")


class Evaluation(Model):
    """What the loss is measured on: a share of the training rows, or datasets of their own."""

    percent: float | None = Field(
        default=None, ge=0, le=50, description="Share of the rows held out, in percent. 0: none. Default 5."
    )
    datasets: tuple[Dataset, ...] | None = Field(
        default=None, min_length=1, max_length=16, description="Rows that are never trained on."
    )
    max_rows: int | None = Field(default=None, ge=1, le=10_000_000, description="At most so many rows. Default 500.")
    seed: int | None = Field(default=None, ge=0, le=SEED_LIMIT, description="Seed of the choice of rows. Default 42.")

    @model_validator(mode="after")
    def _percent_or_datasets(self) -> Self:
        if self.percent is not None and self.datasets is not None:
            msg = "evaluation: percent and datasets are alternatives, set one"
            raise ValueError(msg)
        return self


class MethodType(StrEnum):
    """What is trained."""

    QLORA = "QLoRA"


class BaseFormat(StrEnum):
    """How the frozen base weights are held."""

    NF4 = "NF4"


class ComputeDtype(StrEnum):
    """What products are computed in."""

    AUTO = "Auto"
    BF16 = "BF16"
    FP16 = "FP16"
    FP32 = "FP32"


class Lora(Model):
    """Low-rank adapters, in PEFT's terms."""

    r: int | None = Field(default=None, ge=1, le=1024, description="Rank. Default 16.")
    alpha: int | None = Field(default=None, ge=1, le=4096, description="Scale of the update is alpha / r. Default 2 r.")
    dropout: float | None = Field(default=None, ge=0, lt=1, description="Dropout before the adapter. Default 0.")
    target_modules: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="Names of the layers to adapt. Default: all linear layers.",
    )


class BaseWeights(Model):
    """The frozen base model's weights."""

    format: BaseFormat | None = Field(default=None, description="NF4: 4-bit NormalFloat. Default NF4.")
    double_quantization: bool | None = Field(
        default=None, description="Quantize the scales as well (0.37 bits a weight less). Default true."
    )


class Method(Model):
    """What is trained and how the base is held."""

    type: MethodType | None = Field(default=None, description="QLoRA: adapters on a 4-bit base. Default QLoRA.")
    lora: Lora | None = Field(default=None, description="Settings of the adapters.")
    base_weights: BaseWeights | None = Field(default=None, description="Settings of the frozen base.")
    compute_dtype: ComputeDtype | None = Field(
        default=None, description="Auto: BF16 where the GPU has it, else FP16; FP32 on CPU. Default Auto."
    )


class LrScheduler(StrEnum):
    """Course of the learning rate after the warm-up."""

    COSINE = "Cosine"
    LINEAR = "Linear"
    CONSTANT = "Constant"


class GradientCheckpointing(StrEnum):
    """Trade compute for memory by recomputing activations."""

    AUTO = "Auto"
    FULL = "Full"
    OFF = "Off"


class EverySteps(Model):
    """How often, in optimizer steps."""

    every_steps: int | None = Field(
        default=None, ge=1, le=STEPS_LIMIT, description="Each so many optimizer steps. Default: a tenth of the run."
    )


class Checkpoint(EverySteps):
    """When to save, and how many to keep."""

    keep: int | None = Field(default=None, ge=1, le=100, description="How many checkpoints to keep. Default 2.")


class Training(Model):
    """Hyperparameters of the optimization."""

    learning_rate: float | None = Field(default=None, gt=0, le=1, description="Peak learning rate. Default 0.0002.")
    lr_scheduler: LrScheduler | None = Field(default=None, description="Cosine, Linear or Constant. Default Cosine.")
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
    weight_decay: float | None = Field(default=None, ge=0, le=1, description="AdamW's weight decay. Default 0.")
    max_grad_norm: float | None = Field(
        default=None, gt=0, le=1_000_000, description="Gradients are clipped to this norm. Default 1."
    )
    global_batch_size: int | None = Field(
        default=None, ge=1, le=65536, description="Rows an optimizer step. Default 16."
    )
    per_device_train_batch_size: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Micro-batch, in rows; a divisor of globalBatchSize. Default at most 4.",
    )
    max_length: int | None = Field(
        default=None, ge=8, le=1048576, description="Longest row, in tokens. Default 2048 or the model's own limit."
    )
    gradient_checkpointing: GradientCheckpointing | None = Field(
        default=None, description="Auto: Full on a GPU, Off on CPU. Default Auto."
    )
    seed: int | None = Field(default=None, ge=0, le=SEED_LIMIT, description="Seed of everything random. Default 42.")
    logging_steps: int | None = Field(
        default=None, ge=1, le=STEPS_LIMIT, description="Steps between two lines of the log. Default 1."
    )
    eval: EverySteps | None = Field(default=None, description="When to measure the held-out loss.")
    checkpoint: Checkpoint | None = Field(default=None, description="When to save a checkpoint.")

    @model_validator(mode="after")
    def _alternatives(self) -> Self:
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            msg = "training: warmupRatio and warmupSteps are alternatives, set one"
            raise ValueError(msg)
        if self.num_train_epochs is not None and self.max_steps is not None:
            msg = "training: numTrainEpochs and maxSteps are alternatives, set one"
            raise ValueError(msg)
        both = self.global_batch_size and self.per_device_train_batch_size
        if both and (self.global_batch_size or 0) % (self.per_device_train_batch_size or 1):
            msg = "training: perDeviceTrainBatchSize must divide globalBatchSize"
            raise ValueError(msg)
        return self


class Parallelism(Model):
    """How many devices train."""

    gpus_per_node: int | None = Field(default=None, ge=0, le=1, description="1, or 0 to try out on CPU. Default 1.")


class MergePolicy(StrEnum):
    """Whether the adapter is merged into the base."""

    AUTO = "Auto"
    NEVER = "Never"


class Merge(Model):
    """The adapter merged into the dequantized base: the model that was trained, in one piece."""

    policy: MergePolicy | None = Field(
        default=None, description="Auto: merge; Never: end with the adapter. Default Auto."
    )


class QuantizeMethod(StrEnum):
    """How the merged model is made small."""

    GPTQ = "GPTQ"


class Calibration(Model):
    """Rows of the training set that a quantizer looks at."""

    samples: int | None = Field(default=None, ge=1, le=4096, description="How many rows. Default 256.")
    max_length: int | None = Field(default=None, ge=8, le=32768, description="Longest row, in tokens. Default 1024.")


class Quantize(Model):
    """One quantized form of the merged model."""

    name: ShortName = Field(description="Its folder below quantized/ and its name in the status.")
    method: QuantizeMethod = Field(description="GPTQ.")
    bits: Annotated[int, Field(ge=4, le=4)] | None = Field(default=None, description="Bits a weight. Default 4.")
    group_size: int | None = Field(
        default=None,
        ge=16,
        le=1024,
        description="Weights that share a scale; must divide the model's layers. "
        "Default the largest of 128, 64, 32 that does.",
    )
    calibration: Calibration | None = Field(default=None, description="The rows that the quantizer looks at.")


class JobConfig(Model):
    """What one job is to do: the training half of a FineTuneJob's spec, and the trainer's `--config` file."""

    model: BaseModelSource = Field(description="The base model.")
    datasets: tuple[Dataset, ...] = Field(min_length=1, max_length=16, description="What to train on.")
    evaluation: Evaluation | None = Field(default=None, description="What to measure on.")
    method: Method | None = Field(default=None, description="What is trained and how the base is held.")
    training: Training | None = Field(default=None, description="Hyperparameters of the optimization.")
    parallelism: Parallelism | None = Field(default=None, description="How many devices train.")
    merge: Merge | None = Field(default=None, description="What becomes of the adapter.")
    quantize: tuple[Quantize, ...] | None = Field(
        default=None, max_length=8, description="Quantized forms of the merged model; names are unique. Default none."
    )

    @model_validator(mode="after")
    def _measured_rows_are_held_out(self) -> Self:
        percent = self.evaluation.percent if self.evaluation else None
        if percent == 0 and self.training is not None and self.training.eval is not None:
            msg = "evaluation.percent 0 holds nothing out: drop training.eval or hold rows out"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _quantize_needs_a_merge_and_unique_names(self) -> Self:
        entries = self.quantize or ()
        if entries and self.merge is not None and self.merge.policy is MergePolicy.NEVER:
            msg = "quantize needs the merged model: leave merge.policy unset or drop quantize"
            raise ValueError(msg)
        names = [entry.name for entry in entries]
        if len(set(names)) < len(names):
            msg = "quantize: each entry needs a name of its own"
            raise ValueError(msg)
        return self

    @property
    def merges(self) -> bool:
        """Whether the job ends with a merged model."""
        return self.merge is None or self.merge.policy is not MergePolicy.NEVER

    @property
    def gpus_per_node(self) -> int:
        """GPUs a pod of the train stage holds."""
        if self.parallelism is None or self.parallelism.gpus_per_node is None:
            return 1
        return self.parallelism.gpus_per_node
