"""What the resource tells: phase, conditions, stages, training, artifacts, attempts."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from finetune_operator.api.words import ATTEMPTS_KEPT, DATASETS_KEPT, JSON
from finetune_trainer.config import Model
from finetune_trainer.progress import MESSAGE_LIMIT_CHARACTERS, Estimate


class Phase(StrEnum):
    """Where a job is. An open set for its readers."""

    PENDING = "Pending"
    QUEUED = "Queued"
    SUSPENDED = "Suspended"
    PREPARING = "Preparing"
    TRAINING = "Training"
    MERGING = "Merging"
    QUANTIZING = "Quantizing"
    PUBLISHING = "Publishing"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    CANCELLED = "Cancelled"


ENDS = (Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED)
"""Phases of a job that has ended, for good."""


class ConditionType(StrEnum):
    """What is said of a job in conditions."""

    ACCEPTED = "Accepted"
    SUCCEEDED = "Succeeded"
    FINISHED = "Finished"
    SUSPENDED = "Suspended"
    QUOTA_RESERVED = "QuotaReserved"


PUBLISHED_KEPT = 8
"""As many as there are entries of output.publish."""

Text = Annotated[str, Field(max_length=MESSAGE_LIMIT_CHARACTERS)]
Number = Annotated[str, Field(max_length=40)]
"""A measured figure with 4 digits, as text: a NaN would make every write of the status fail."""
Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]


class Condition(Model):
    """One thing that is true, false or not known yet."""

    type: str = Field(description="Accepted, Succeeded, Finished, Suspended or QuotaReserved.")
    status: str = Field(description="True, False or Unknown.")
    reason: str = Field(description="One word, for machines.")
    message: Text = Field(description="A sentence, for people.")
    last_transition_time: Time = Field(description="Since when the status is this.")
    observed_generation: int | None = Field(default=None, description="Generation of the spec it was said of.")


class StageStatus(Model):
    """One stage, in the order of the line."""

    name: str = Field(description="prepare, train, merge, or quantize- or publish- and the name of the entry.")
    state: str = Field(description="Waiting, Pending, Running, Retrying (waits to be run again), Succeeded or Failed.")
    attempt: int | None = Field(default=None, description="Number of its latest attempt.")
    job: str | None = Field(default=None, description="Name of that attempt's Job: kubectl logs job/NAME.")
    start_time: Time | None = Field(default=None, description="Begin of that attempt.")
    completion_time: Time | None = Field(default=None, description="End of that attempt.")
    message: Text | None = Field(default=None, description="What it is doing, or how it ended.")
    manifest_digest: str | None = Field(default=None, description="SHA-256 of its manifest: the proof that it is done.")


class TrainingStatus(Model):
    """How training goes. Figures are text with 4 digits."""

    step: int | None = Field(default=None, description="Optimizer steps done.")
    total_steps: int | None = Field(default=None, description="Optimizer steps of the whole run.")
    epoch: Number | None = Field(default=None, description="Passes over the rows.")
    loss: Number | None = Field(default=None, description="Training loss, nats a token.")
    eval_loss: Number | None = Field(default=None, description="Held-out loss, nats a token.")
    best_eval_loss: Number | None = Field(default=None, description="Lowest held-out loss so far, nats a token.")
    best_step: int | None = Field(default=None, description="Step of that loss, once training has ended.")
    stopped_early: bool | None = Field(default=None, description="Whether early stopping ended the training.")
    tokens_per_second: Number | None = Field(default=None, description="Throughput.")
    peak_memory: Number | None = Field(default=None, description="Most memory in use, in GiB.")
    progress: str | None = Field(default=None, description='For example "128/300 (43%)".')
    eta: str | None = Field(default=None, description='Time left, for example "12m".')
    last_checkpoint_step: int | None = Field(default=None, description="Step of the newest verified checkpoint.")
    last_checkpoint_time: Time | None = Field(default=None, description="When that checkpoint was complete.")
    resumed_from_step: int | None = Field(default=None, description="Step that the last attempt went on from.")
    trainable_parameters: int | None = Field(default=None, description="Parameters that are trained.")
    total_parameters: int | None = Field(default=None, description="Parameters in all.")


class DatasetStatus(Model):
    """What the rows of one dataset are like."""

    name: str = Field(description="Its name, or its index.")
    train_rows: int = Field(description="Rows trained on.")
    eval_rows: int = Field(description="Rows measured on.")
    dropped_rows: int = Field(description="Rows too long or without a token to learn from.")
    truncated_rows: int = Field(description="Rows cut at maxLength.")
    train_tokens: int = Field(description="Tokens of the training rows.")


class DataStatus(Model):
    """What the rows are like. Lengths in tokens."""

    train_rows: int = Field(description="Rows trained on.")
    eval_rows: int = Field(description="Rows measured on.")
    dropped_rows: int = Field(description="Rows too long or without a token to learn from.")
    truncated_rows: int = Field(description="Rows cut at maxLength.")
    train_tokens: int = Field(description="Tokens of the training rows.")
    loss_tokens: int = Field(description="Those of them that count in the loss.")
    length_p50: int = Field(description="Length of the middle row.")
    length_p95: int = Field(description="Length that 95 of 100 rows stay below.")
    length_p99: int = Field(description="Length that 99 of 100 rows stay below.")
    length_max: int = Field(description="Length of the longest row.")
    packed_rows: int | None = Field(default=None, description="Sequences that the rows were packed into.")
    datasets: tuple[DatasetStatus, ...] | None = Field(
        default=None, max_length=DATASETS_KEPT, description="The same of each dataset."
    )


class EstimateStatus(Estimate):
    """What one GPU is expected to hold in training, worked out by prepare, in bytes; and what it held."""

    measured_peak_bytes: int | None = Field(
        default=None, description="The peak of a step, corrected by what the first steps took."
    )


class MeasuredStatus(Model):
    """Quality on the held-out rows. Figures are text with 4 digits."""

    preference_accuracy: Number | None = Field(
        default=None, description="DPO: share of held-out pairs whose better answer is preferred."
    )
    eval_loss: Number | None = Field(default=None, description="Nats a token.")
    perplexity: Number | None = Field(default=None, description="exp of the loss.")
    eval_loss_base: Number | None = Field(default=None, description="Before training, nats a token.")
    kl_divergence: Number | None = Field(default=None, description="From the model it was made from, nats a token.")
    top1_agreement: Number | None = Field(default=None, description="Share of tokens with the same first choice.")
    perplexity_increase_percent: Number | None = Field(default=None, description="Against the model it was made from.")
    loss_increase: Number | None = Field(default=None, description="The same in nats a token.")
    eval_loss_dequantized: Number | None = Field(
        default=None, description="Merge base Auto: of the adapter on the dequantized weights, nats a token."
    )
    eval_loss_original: Number | None = Field(
        default=None, description="Merge base Auto: of the adapter on the original weights, nats a token."
    )


class PublishedStatus(Model):
    """A place where an artifact is, complete and verified there."""

    name: str = Field(description="Name of the entry of output.publish.")
    uri: str = Field(description="Where it can be fetched from, with the commit or digest where the place has one.")
    digest: str = Field(description="SHA-256 of the manifest of the files that went out.")
    size: str = Field(description='For example "269 MiB".')
    size_bytes: int = Field(description="All files that went out.")


class ArtifactStatus(Model):
    """One thing that came out, complete and verified."""

    name: str = Field(description="adapter, merged, model (trained whole), or the name of the quantized form.")
    type: str = Field(description="Adapter, Merged or Quantized.")
    claim_name: str = Field(description="PersistentVolumeClaim that holds it.")
    path: str = Field(description="Folder inside the claim.")
    size: str = Field(description='For example "269 MiB".')
    size_bytes: int = Field(description="All its files.")
    digest: str = Field(description="SHA-256 of its manifest.")
    measured: MeasuredStatus | None = Field(default=None, description="Quality on the held-out rows.")
    published: tuple[PublishedStatus, ...] | None = Field(
        default=None, max_length=PUBLISHED_KEPT, description="Where else it is: output.publish."
    )


class Overrides(Model):
    """What an attempt changes of status.resolved, so that it fits into the GPU's memory. The global batch stays."""

    micro_batch_size: int = Field(description="Rows a forward pass on one device.")
    gradient_accumulation_steps: int = Field(description="Forward passes an optimizer step.")
    gradient_checkpointing: str | None = Field(default=None, description="Full, where that was needed as well.")


class AttemptStatus(Model):
    """One run of one stage. Without completionTime it is the live one."""

    number: int = Field(
        description="1 in a job of which nothing had to be run again; running a stage again takes the next number."
    )
    stage: str = Field(description="Name of the stage. Stage and number together tell a run from all others.")
    start_time: Time | None = Field(default=None, description="When it was made.")
    completion_time: Time | None = Field(default=None, description="When its end was seen.")
    reason: str | None = Field(default=None, description="How it ended, in one word.")
    message: Text | None = Field(default=None, description="How it ended, in a sentence.")
    retry: str | None = Field(
        default=None, description="Free: run again, uncounted. Counted: run again, counted. Never: not run again."
    )
    running_since: Time | None = Field(default=None, description="Since when all its pods run, while they do.")
    blocked_since: Time | None = Field(
        default=None, description="Since when something that has to be mended keeps its pods from starting."
    )
    waiting_since: Time | None = Field(default=None, description="Since when its queue has it wait again, if it does.")
    overrides: Overrides | None = Field(default=None, description="What it changed after the GPU's memory ran out.")


class Status(Model):
    """What became of the job, for people and machines."""

    observed_generation: int | None = Field(default=None, description="Generation of the spec that this is about.")
    phase: str | None = Field(
        default=None,
        description="Pending, Queued, Suspended, Preparing, Training, Merging, Quantizing, Publishing, Succeeded, "
        "Failed or Cancelled.",
    )
    reason: str | None = Field(default=None, description="Why it stands where it stands, in one word.")
    message: Text | None = Field(default=None, description="The same in a sentence, with the way out.")
    progress: str | None = Field(
        default=None,
        description="Training steps, or in other stages that stage's own work: done/total (percent), of bytes percent.",
    )
    start_time: Time | None = Field(default=None, description="When the operator first saw the job.")
    completion_time: Time | None = Field(default=None, description="When it ended, however it ended.")
    claim_name: str | None = Field(default=None, description="PersistentVolumeClaim that the job works in.")
    folder: str | None = Field(default=None, description="The job's folder inside that claim.")
    report: str | None = Field(
        default=None,
        description="The report of what was done and measured, a page for a browser: its path inside the claim.",
    )
    attempt_count: int | None = Field(
        default=None, description="Number of the latest attempt: 1 unless a stage had to be run again."
    )
    retries: int | None = Field(
        default=None, description="How often a stage was run again that counts against runPolicy.maxRetries."
    )
    active_seconds: int | None = Field(
        default=None, description="How long pods have run, before the live attempt; runPolicy.activeDeadlineSeconds."
    )
    training: TrainingStatus | None = Field(default=None, description="How training goes.")
    data: DataStatus | None = Field(default=None, description="What the rows are like.")
    estimate: EstimateStatus | None = Field(default=None, description="The memory that a GPU needs for the training.")
    resolved: dict[str, Any] | None = Field(
        default=None,
        description="Every setting that was unset and every source that could move, fixed once by the prepare stage.",
        json_schema_extra={"x-kubernetes-preserve-unknown-fields": True},
    )
    conditions: tuple[Condition, ...] | None = Field(
        default=None, max_length=16, description="Accepted, Succeeded, Finished, Suspended, QuotaReserved."
    )
    stages: tuple[StageStatus, ...] | None = Field(default=None, max_length=20, description="The line of stages.")
    artifacts: tuple[ArtifactStatus, ...] | None = Field(default=None, max_length=16, description="What came out.")
    attempts: tuple[AttemptStatus, ...] | None = Field(
        default=None, max_length=ATTEMPTS_KEPT, description="The last runs of stages, oldest first."
    )

    @property
    def finished(self) -> bool:
        """Whether the job has ended, for good."""
        return any(c.type == ConditionType.FINISHED and c.status == "True" for c in self.conditions or ())

    def condition(self, kind: ConditionType) -> Condition | None:
        """What is said of the job in this condition, if anything is."""
        return next((c for c in self.conditions or () if c.type == kind), None)

    @property
    def suspended(self) -> bool:
        """Whether it is on record that the job is suspended by its user."""
        found = self.condition(ConditionType.SUSPENDED)
        return found is not None and found.status == "True"

    def failed_since(self, before: Status) -> tuple[AttemptStatus, ...]:
        """Attempts that failed and were not known to have."""
        known = {(each.stage, each.number) for each in before.attempts or () if each.completion_time is not None}
        attempts = self.attempts or ()
        return tuple(each for each in attempts if each.retry is not None and (each.stage, each.number) not in known)

    def to_dict(self) -> JSON:
        """As the API server stores it.

        Without objects that hold nothing: one that held something before would become null by server-side apply, which
        the schema refuses, and with it the whole status.
        """
        told = self.model_dump(by_alias=True, exclude_none=True, mode="json")
        return {name: value for name, value in told.items() if value != {}}
