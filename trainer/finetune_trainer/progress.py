"""CONTRACT: what the trainer reports. The operator reads it.

Three ways, from the liveliest to the last:

- `Progress`, served by rank 0 as JSON under `/progress` while a stage runs;
- an exit code out of `ExitCode`;
- `LastWord`, at most 4 KiB of JSON in the container's termination message.

Imports nothing heavier than pydantic.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum

from pydantic import Field

from finetune_trainer.config import Model

LAST_WORD_LIMIT_BYTES = 4096
"""Kubernetes keeps no more of a termination message."""

MESSAGE_LIMIT_CHARACTERS = 1024

PROGRESS_PORT = 8080


class Stage(StrEnum):
    """The stages of a job, in their order."""

    PREPARE = "prepare"
    TRAIN = "train"
    MERGE = "merge"
    QUANTIZE = "quantize"


class Reason(StrEnum):
    """Why a stage ended, as the trainer itself knows it."""

    COMPLETED = "Completed"
    INVALID_CONFIG = "InvalidConfig"
    INVALID_DATASET = "InvalidDataset"
    INVALID_MODEL = "InvalidModel"
    NOT_FOUND = "NotFound"
    ACCESS_DENIED = "AccessDenied"
    VOLUME_FULL = "VolumeFull"
    OUT_OF_MEMORY = "OutOfMemory"
    NON_FINITE_LOSS = "NonFiniteLoss"
    VERIFICATION_FAILED = "VerificationFailed"
    INTERRUPTED = "Interrupted"
    UNKNOWN = "Unknown"


class ExitCode(IntEnum):
    """The trainer's exit codes; the operator believes them where the last word is lost."""

    COMPLETED = 0
    UNKNOWN = 1
    INVALID_CONFIG = 10
    INVALID_DATASET = 11
    INVALID_MODEL = 12
    NOT_FOUND = 13
    ACCESS_DENIED = 14
    VOLUME_FULL = 15
    OUT_OF_MEMORY = 16
    NON_FINITE_LOSS = 17
    VERIFICATION_FAILED = 18
    INTERRUPTED = 20
    """Saved a checkpoint on SIGTERM and left: nobody's fault."""

    @property
    def reason(self) -> Reason:
        """The reason of the same name."""
        return Reason[self.name]


def exit_code(reason: Reason) -> ExitCode:
    """The exit code of the same name."""
    return ExitCode[reason.name]


class Progress(Model):
    """How far a stage is. Counts are of `unit`; absent figures are not known yet."""

    stage: Stage
    attempt: int
    activity: str = Field(description="What is being done now, e.g. 'loading the base model'.")
    done: int = 0
    total: int = 0
    unit: str = Field(default="steps", description="steps, rows, layers, answers or bytes.")
    epoch: float | None = None
    loss: float | None = Field(default=None, description="Mean training loss since the last log line, nats a token.")
    eval_loss: float | None = Field(default=None, description="Held-out loss, nats a token.")
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    peak_memory_bytes: int | None = None
    checkpoint_step: int | None = Field(default=None, description="Step of the newest verified checkpoint.")
    resumed_from_step: int | None = Field(
        default=None, description="Step that this attempt went on from; unset where it began at the start."
    )


class ResolvedQuantize(Model):
    """The settings of one quantized form."""

    name: str
    bits: int
    group_size: int


class Resolved(Model):
    """Every setting that was unset and every source that could move, fixed once by prepare."""

    model_digest: str = Field(description="Digest of the base model's manifest.")
    model_revision: str | None = Field(default=None, description="Commit, for a model from a hub.")
    data_digest: str = Field(description="Digest of the rows trained and measured on.")
    architecture: str = Field(description="The model's class, e.g. LlamaForCausalLM.")
    parameters: int = Field(description="Parameters of the base model.")
    max_length: int = Field(description="Tokens.")
    global_batch_size: int = Field(description="Rows an optimizer step.")
    micro_batch_size: int = Field(description="Rows a forward pass on one device.")
    gradient_accumulation_steps: int
    total_steps: int = Field(description="Optimizer steps of the whole run.")
    num_train_epochs: float
    learning_rate: float
    lr_scheduler: str
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    optimizer: str
    compute_dtype: str
    attention: str
    gradient_checkpointing: bool
    base_format: str
    double_quantization: bool
    lora_r: int
    lora_alpha: int
    lora_dropout: float
    target_modules: tuple[str, ...]
    seed: int
    logging_steps: int
    eval_steps: int
    checkpoint_steps: int
    checkpoint_keep: int
    quantize: tuple[ResolvedQuantize, ...] = ()


class DataFacts(Model):
    """What the rows are like. Lengths in tokens, of the rows kept for training."""

    train_rows: int
    eval_rows: int
    dropped_rows: int = Field(description="Rows too long or without a token to learn from.")
    train_tokens: int
    loss_tokens: int = Field(description="Tokens of the training rows that count in the loss.")
    length_p50: int
    length_p95: int
    length_max: int


class Measured(Model):
    """Quality of an artifact on the held-out rows."""

    eval_loss: float | None = Field(default=None, description="Nats a token.")
    perplexity: float | None = None
    eval_loss_base: float | None = Field(default=None, description="Of the base model before training, nats a token.")
    kl_divergence: float | None = Field(
        default=None, description="From the model it was made from, nats a token, mean over held-out loss tokens."
    )
    top1_agreement: float | None = Field(
        default=None, description="Share of tokens with the same first choice, 0 to 1."
    )
    perplexity_increase_percent: float | None = Field(default=None, description="Against the model it was made from.")


class Artifact(Model):
    """One thing that came out, complete and verified."""

    name: str = Field(description="adapter, merged, or the name of the quantized form.")
    type: str = Field(description="Adapter, Merged or Quantized.")
    path: str = Field(description="Folder, relative to the job's work folder.")
    size_bytes: int
    digest: str = Field(description="SHA-256 of its manifest.")
    measured: Measured | None = None


class TrainFacts(Model):
    """What training did. Speed, memory and resumes are told live alone: in a manifest they would change its digest."""

    steps: int
    epochs: float
    loss: float | None = Field(default=None, description="Training loss of the last log line, nats a token.")
    trainable_parameters: int
    total_parameters: int


class LastWord(Model):
    """What a stage says when it ends."""

    stage: Stage
    attempt: int
    reason: Reason
    message: str = Field(max_length=MESSAGE_LIMIT_CHARACTERS, description="A sentence for people, with the way out.")
    manifest_digest: str | None = Field(default=None, description="SHA-256 of the stage's manifest: its proof.")
    resolved: Resolved | None = None
    data: DataFacts | None = None
    training: TrainFacts | None = None
    artifact: Artifact | None = None

    @property
    def succeeded(self) -> bool:
        """Whether the stage ended complete and proven."""
        return self.reason is Reason.COMPLETED and self.manifest_digest is not None
