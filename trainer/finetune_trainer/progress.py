"""CONTRACT: what the trainer reports. The operator reads it.

Three ways, from the liveliest to the last:

- `Progress`, served by rank 0 as JSON under `/progress` while a stage runs;
- an exit code out of `ExitCode`;
- `LastWord`, at most 4 KiB of JSON in the container's termination message.

Imports nothing heavier than pydantic.
"""

from __future__ import annotations

from datetime import datetime
from enum import IntEnum, StrEnum
from typing import Self

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
    PUBLISH = "publish"


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
    OUT_OF_HOST_MEMORY = "OutOfHostMemory"
    NON_FINITE_LOSS = "NonFiniteLoss"
    VERIFICATION_FAILED = "VerificationFailed"
    GATE_FAILED = "GateFailed"
    RENDEZVOUS_FAILED = "RendezvousFailed"
    PEER_LOST = "PeerLost"
    INTERRUPTED = "Interrupted"
    UNKNOWN = "Unknown"


class ExitCode(IntEnum):
    """The trainer's exit codes, each with what it means; the operator believes them where the last word is lost."""

    meaning: str

    COMPLETED = 0, "done"
    UNKNOWN = 1, "anything else"
    INVALID_CONFIG = 10, "a field of the config, or fields that do not go together"
    INVALID_DATASET = 11, "a row, a file or a column of a dataset"
    INVALID_MODEL = 12, "the base model's files"
    NOT_FOUND = 13, "a file, a claim or a repository is not there"
    ACCESS_DENIED = 14, "a token or a permission is missing"
    VOLUME_FULL = 15, "no space left on the work volume"
    OUT_OF_MEMORY = 16, "the GPU's memory does not suffice"
    NON_FINITE_LOSS = 17, "the loss became zero, NaN or infinite"
    VERIFICATION_FAILED = 18, "a file is not what its manifest says"
    RENDEZVOUS_FAILED = 19, "the pods of the stage did not meet in time"
    INTERRUPTED = 20, "saved and left on request, to be run again"
    PEER_LOST = 21, "another pod of the stage was lost: the reason stands there"
    OUT_OF_HOST_MEMORY = 22, "the machine's or the pod's own memory does not suffice"
    GATE_FAILED = 23, "a measured figure is worse than the job allows"

    def __new__(cls, code: int, meaning: str) -> Self:
        """A number that knows what it means."""
        made = int.__new__(cls, code)
        made._value_ = code
        made.meaning = meaning
        return made

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
    pulse: int = Field(
        default=0,
        description="Grows with every piece of work of whatever kind: a tensor read, a micro-batch, a chunk hashed. As "
        "long as it stands still, nothing is done.",
    )
    still_seconds: float = Field(default=0.0, ge=0, description="For how long the pulse had stood still when it told.")
    epoch: float | None = None
    loss: float | None = Field(default=None, description="Mean training loss since the last log line, nats a token.")
    eval_loss: float | None = Field(default=None, description="Held-out loss, nats a token.")
    best_eval_loss: float | None = Field(default=None, description="Lowest held-out loss so far, nats a token.")
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    peak_memory_bytes: int | None = None
    measured_peak_bytes: int | None = Field(
        default=None, description="The estimated peak of training, corrected by what the first steps took."
    )
    checkpoint_step: int | None = Field(default=None, description="Step of the newest verified checkpoint.")
    checkpoint_time: datetime | None = Field(default=None, description="When that checkpoint was complete.")
    resumed_from_step: int | None = Field(
        default=None, description="Step that this attempt went on from; unset where it began at the start."
    )


class ResolvedLora(Model):
    """The settings of the adapter, in PEFT's terms."""

    r: int
    alpha: int
    dropout: float
    target_modules: tuple[str, ...]
    target_parameters: tuple[str, ...] = ()
    exclude_modules: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    bias: str = "None"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: str = "Default"


class ResolvedGaLore(Model):
    """The settings of GaLore."""

    rank: int
    update_interval: int
    scale: float


class ResolvedDpo(Model):
    """The settings of DPO."""

    beta: float
    loss_type: str
    label_smoothing: float


class ResolvedEarlyStopping(Model):
    """When a run ends before its last step."""

    patience: int = Field(description="Measurements in a row without a better one.")
    threshold: float = Field(description="What counts as better, nats a token.")


class ResolvedParallelism(Model):
    """How devices share the work."""

    num_nodes: int
    gpus_per_node: int
    world_size: int = Field(description="Processes in all.")
    strategy: str = Field(description="Single (one process), DDP or FSDP.")
    sharding: str | None = Field(default=None, description="FSDP: Full or GradOp.")
    cpu_offload: bool = False


class ResolvedMerge(Model):
    """How the adapter is merged."""

    base: str = Field(description="Dequantized, Original, or Auto: the better one as the merge stage measures it.")
    dtype: str
    max_shard_size: str


class ResolvedQuantize(Model):
    """The settings of one quantized form."""

    name: str
    method: str
    bits: int | None = Field(default=None, description="GPTQ, AWQ.")
    group_size: int | None = Field(default=None, description="GPTQ, AWQ.")
    symmetric: bool | None = Field(default=None, description="GPTQ, AWQ.")
    act_order: bool | None = Field(default=None, description="GPTQ.")
    dampening_frac: float | None = Field(default=None, description="GPTQ.")
    gguf_type: str | None = Field(default=None, description="GGUF.")


class Resolved(Model):
    """Every setting that was unset and every source that could move, fixed once by prepare."""

    model_digest: str = Field(description="Digest of the base model's manifest.")
    model_revision: str | None = Field(default=None, description="Commit or digest, for a model that could move.")
    data_digest: str = Field(description="Digest of the rows trained and measured on.")
    data_revisions: tuple[str, ...] = Field(default=(), description="Commits of datasets that could move, NAME@COMMIT.")
    architecture: str = Field(description="The model's class, e.g. LlamaForCausalLM.")
    parameters: int = Field(description="Parameters of the base model.")
    method: str = Field(description="QLoRA, LoRA, Full or GaLore.")
    objective: str = Field(description="SFT or DPO.")
    max_length: int = Field(description="Tokens.")
    packing: bool = Field(description="Whether short rows share a sequence.")
    global_batch_size: int = Field(description="Rows an optimizer step, over all devices.")
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
    adam_beta1: float
    adam_beta2: float
    compute_dtype: str
    attention: str
    gradient_checkpointing: str = Field(description="Full, Selective or Off.")
    fast_path: bool = Field(
        default=False, description="Whether the trainer's own forward and backward pass is taken, not autograd's."
    )
    offloads: bool = Field(
        default=False,
        description="Whether inputs of blocks, what attention gave and the embedding lie in host memory meanwhile.",
    )
    plain_because: str | None = Field(default=None, description="Why it is not, in words.")
    neftune_noise_alpha: float | None = None
    fp8_products: bool = Field(default=False, description="Whether products with the base are in FP8.")
    base_format: str = Field(description="How the base is held: NF4, FP4, GPTQ, Int8, FP8, BF16, FP16 or FP32.")
    double_quantization: bool
    lora: ResolvedLora | None = Field(default=None, description="QLoRA, LoRA.")
    galore: ResolvedGaLore | None = Field(default=None, description="GaLore.")
    dpo: ResolvedDpo | None = Field(default=None, description="DPO.")
    added_tokens: tuple[int, ...] = Field(default=(), description="Ids of new tokens: of embeddings only these train.")
    dataset_weights: tuple[float, ...] = Field(
        default=(), description="Share of each dataset in an epoch, if weighted."
    )
    shuffle: bool
    seed: int
    logging_steps: int
    eval_steps: int
    checkpoint_steps: int
    checkpoint_keep: int
    restore_best: bool
    early_stopping: ResolvedEarlyStopping | None = None
    parallelism: ResolvedParallelism
    merge: ResolvedMerge | None = Field(default=None, description="Where a merge stage follows.")
    quantize: tuple[ResolvedQuantize, ...] = ()


class Estimate(Model):
    """What one GPU is expected to hold in training: worked out by `settings.estimate` before a GPU is held.

    Not all parts are held at the worst moment of a step, so the peak may be less than their sum.
    """

    weights_bytes: int = Field(description="The base as it is held, and a reference that is held besides.")
    adapter_bytes: int = Field(description="What an adapter adds to it.")
    gradients_bytes: int = Field(description="Of all that trains.")
    optimizer_bytes: int = Field(description="Its states; those of paged optimizers may lie in host memory.")
    activations_bytes: int = Field(description="Kept by the forward pass for the backward pass.")
    logits_bytes: int = Field(description="Taken by the output head and the loss.")
    workspace_bytes: int = Field(
        description="Passing values of kernels, casts, collectives, and of the optimizer's step."
    )
    peak_bytes: int = Field(description="Most that a step holds at a time, as torch's allocator counts.")
    measuring_bytes: int = Field(description="Most that is held while held-out rows are measured.")
    reserve_bytes: int = Field(description="CUDA itself, and memory lost between tensors.")
    total_bytes: int = Field(description="What a GPU must have.")
    host_bytes: int | None = Field(
        default=None, description="Of host memory, pinned: what is offloaded. Not in the total."
    )
    micro_batch_size: int = Field(description="Rows a forward pass that this is of.")
    length: int = Field(description="Tokens of the longest row.")
    gradient_checkpointing: str = Field(description="Full, Selective or Off.")
    gpu_memory_bytes: int | None = Field(default=None, description="Of one GPU: pod.gpuMemory.")


class DatasetFacts(Model):
    """What the rows of one dataset are like."""

    name: str
    train_rows: int
    eval_rows: int
    dropped_rows: int
    truncated_rows: int
    train_tokens: int


class DataFacts(Model):
    """What the rows are like. Lengths in tokens, of the rows kept for training, before they are packed."""

    train_rows: int
    eval_rows: int
    dropped_rows: int = Field(description="Rows too long or without a token to learn from.")
    truncated_rows: int = Field(default=0, description="Rows cut at maxLength.")
    train_tokens: int
    loss_tokens: int = Field(description="Tokens of the training rows that count in the loss.")
    length_p50: int
    length_p95: int
    length_p99: int
    length_max: int
    packed_rows: int | None = Field(default=None, description="Sequences that the rows were packed into.")
    datasets: tuple[DatasetFacts, ...] = ()


class Measured(Model):
    """Quality of an artifact on the held-out rows."""

    preference_accuracy: float | None = Field(
        default=None, description="DPO: share of held-out pairs whose better answer is preferred, 0 to 1."
    )
    eval_loss: float | None = Field(default=None, description="Nats a token.")
    perplexity: float | None = None
    eval_loss_base: float | None = Field(default=None, description="Before training, nats a token.")
    kl_divergence: float | None = Field(
        default=None, description="From the model it was made from, nats a token, mean over held-out loss tokens."
    )
    top1_agreement: float | None = Field(
        default=None, description="Share of tokens with the same first choice, 0 to 1."
    )
    perplexity_increase_percent: float | None = Field(default=None, description="Against the model it was made from.")
    loss_increase: float | None = Field(default=None, description="The same in nats a token.")
    eval_loss_dequantized: float | None = Field(
        default=None, description="Merge base Auto: of the adapter on the dequantized weights, nats a token."
    )
    eval_loss_original: float | None = Field(
        default=None, description="Merge base Auto: of the adapter on the original weights, nats a token."
    )


class Artifact(Model):
    """One thing that came out, complete and verified."""

    name: str = Field(description="adapter, merged, model (trained whole), or the name of the quantized form.")
    type: str = Field(description="Adapter, Merged (any finished model) or Quantized.")
    path: str = Field(description="Folder, relative to the job's work folder.")
    size_bytes: int
    digest: str = Field(description="SHA-256 of its manifest.")
    measured: Measured | None = None


class Published(Model):
    """An artifact where an entry of output.publish sends it: complete, and compared with what is there."""

    name: str = Field(description="Name of the entry.")
    artifact: str = Field(description="Name of the artifact: adapter, merged, model, or that of the quantized form.")
    uri: str = Field(description="Where it can be fetched from, with the commit or digest where the place has one.")
    digest: str = Field(description="SHA-256 of the manifest of the files that went out.")
    size_bytes: int


class LayerFacts(Model):
    """Parameters of one kind of layer in one dtype, as it is trained."""

    module: str = Field(description="Class of the layer, e.g. Linear4bit.")
    dtype: str
    parameters: int
    trainable: int


class TrainFacts(Model):
    """What training did. Speed, memory and resumes are in Progress: in a manifest they would change its digest."""

    steps: int
    epochs: float
    loss: float | None = Field(default=None, description="Training loss of the last log line, nats a token.")
    trainable_parameters: int
    total_parameters: int
    best_step: int | None = Field(default=None, description="Step of the lowest held-out loss.")
    best_eval_loss: float | None = Field(default=None, description="That loss, nats a token.")
    stopped_early: bool = Field(default=False, description="Whether early stopping ended the run.")
    layers: tuple[LayerFacts, ...] = Field(default=(), description="Module classes and dtypes as trained.")


class LastWord(Model):
    """What a stage says when it ends."""

    stage: Stage
    attempt: int
    reason: Reason
    message: str = Field(max_length=MESSAGE_LIMIT_CHARACTERS, description="A sentence for people, with the way out.")
    manifest_digest: str | None = Field(default=None, description="SHA-256 of the stage's manifest: its proof.")
    resolved: Resolved | None = None
    data: DataFacts | None = None
    estimate: Estimate | None = None
    training: TrainFacts | None = None
    artifact: Artifact | None = None
    published: Published | None = Field(default=None, description="Of a publish stage.")
    progress: Progress | None = Field(
        default=None, description="Of a training that ended well: what was told live last, for who was not listening."
    )

    @property
    def succeeded(self) -> bool:
        """Whether the stage ended complete and proven."""
        return self.reason is Reason.COMPLETED and self.manifest_digest is not None
