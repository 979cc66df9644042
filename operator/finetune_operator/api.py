"""The resource: its spec (the trainer's configuration and what only a cluster needs), its status, its words.

Errors: `InvalidJobError` says in a sentence why a stored resource cannot be understood.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, WithJsonSchema, model_validator

from finetune_trainer.config import ClaimName, JobConfig, Model

GROUP = "finetune.dev"
VERSION = "v1alpha1"
KIND = "FineTuneJob"
PLURAL = "finetunejobs"
API_VERSION = f"{GROUP}/{VERSION}"
MANAGER = "finetune-operator"
"""Field manager, value of the managed-by label, and reporter of events."""

NAME_LIMIT_CHARACTERS = 40
MESSAGE_LIMIT_CHARACTERS = 1024
ATTEMPTS_KEPT = 10

JSON = dict[str, Any]
"""An object as the API server speaks it."""


class Label:
    """Labels of everything the operator makes."""

    MANAGED_BY = "app.kubernetes.io/managed-by"
    JOB_NAME = f"{GROUP}/job-name"
    JOB_UID = f"{GROUP}/job-uid"
    STAGE = f"{GROUP}/stage"
    ATTEMPT = f"{GROUP}/attempt"


# --- spec ------------------------------------------------------------------------------------------------------------

QUANTITY_PATTERN = r"^([0-9]+|[0-9]*\.[0-9]+)(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi|E|Ei)?$"


def _quantity_text(value: object) -> object:
    """YAML makes `cpu: 2` a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Quantity = Annotated[
    str,
    BeforeValidator(_quantity_text),
    Field(max_length=40, pattern=QUANTITY_PATTERN),
    WithJsonSchema(
        {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "pattern": QUANTITY_PATTERN,
            "x-kubernetes-int-or-string": True,
        }
    ),
]
Quantities = Annotated[dict[str, Quantity], Field(max_length=32)]
LabelText = Annotated[str, Field(max_length=317)]


class AccessMode(StrEnum):
    """Who may mount a claim."""

    READ_WRITE_ONCE = "ReadWriteOnce"
    READ_WRITE_ONCE_POD = "ReadWriteOncePod"
    READ_WRITE_MANY = "ReadWriteMany"


def _distinct(modes: tuple[AccessMode, ...] | None) -> tuple[AccessMode, ...] | None:
    if modes is not None and len(set(modes)) < len(modes):
        msg = "output.volume.create.accessModes: each mode at most once"
        raise ValueError(msg)
    return modes


class CreateClaim(Model):
    """A claim made for this job, named `<job>-<first 8 characters of its uid>`."""

    size: Quantity | None = Field(default=None, description="Capacity, e.g. 100Gi. Default: the operator's.")
    storage_class_name: str | None = Field(
        default=None,
        min_length=1,
        max_length=253,
        description="StorageClass. Default: the operator's, or the cluster's.",
    )
    access_modes: Annotated[tuple[AccessMode, ...] | None, AfterValidator(_distinct)] = Field(
        default=None, min_length=1, max_length=3, description="Who may mount it. Default ReadWriteOnce."
    )


class ExistingClaim(Model):
    """A claim that is there; the job works in a folder of its own in it."""

    claim_name: ClaimName


class OutputVolume(Model):
    """Where the job works and leaves its results: exactly one of create and existing."""

    create: CreateClaim | None = Field(default=None, description="Make a claim for this job. The default.")
    existing: ExistingClaim | None = Field(default=None, description="Use a claim of the job's namespace.")

    @model_validator(mode="after")
    def _at_most_one(self) -> Self:
        if (self.create is None) == (self.existing is None):
            msg = "output.volume: exactly one is needed: create or existing"
            raise ValueError(msg)
        return self


class WhenDeleted(StrEnum):
    """What becomes of a created claim when the FineTuneJob is deleted."""

    RETAIN = "Retain"
    DELETE = "Delete"


class RetentionPolicy(Model):
    """What outlives the job."""

    when_deleted: WhenDeleted | None = Field(
        default=None,
        description="Retain keeps a created claim when the FineTuneJob is deleted, Delete does not. Default Retain.",
    )


class Output(Model):
    """Where the results go."""

    volume: OutputVolume | None = Field(default=None, description="The claim. Default: one is made for the job.")
    retention_policy: RetentionPolicy | None = Field(default=None, description="What outlives the job.")


class Resources(Model):
    """Requests and limits of the stage's container. GPUs are set by parallelism.gpusPerNode."""

    requests: Quantities | None = Field(default=None, description="What the pod is sure to get, e.g. cpu: 4.")
    limits: Quantities | None = Field(
        default=None, description="What it may take at most; above the memory limit it is killed."
    )


class Toleration(Model):
    """A taint that the stage pods put up with, as in a pod's spec."""

    key: LabelText | None = Field(default=None, description="Key of the taint. Unset with Exists: all taints.")
    operator: Annotated[str, Field(pattern="^(Exists|Equal)$")] | None = Field(
        default=None, max_length=6, description="Exists or Equal. Default Equal."
    )
    value: Annotated[str, Field(max_length=63)] | None = Field(default=None, description="Value, for Equal.")
    effect: Annotated[str, Field(pattern="^(NoSchedule|PreferNoSchedule|NoExecute)$")] | None = Field(
        default=None, max_length=16, description="NoSchedule, PreferNoSchedule or NoExecute. Unset: all."
    )
    toleration_seconds: int | None = Field(
        default=None, ge=0, le=31536000, description="For NoExecute: how long to stay. Unset: for ever."
    )


class ImagePullSecret(Model):
    """A Secret with registry credentials in the job's namespace."""

    name: str = Field(min_length=1, max_length=253, description="Name of the Secret.")


class Pod(Model):
    """What the stage pods need of the cluster. Typed fields only: there is no pod template."""

    resources: Resources | None = Field(
        default=None, description="Requests and limits of every stage. Default: the operator's."
    )
    node_selector: Annotated[dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=32)] | None = Field(
        default=None, description="Labels that a node must carry."
    )
    tolerations: tuple[Toleration, ...] | None = Field(
        default=None, max_length=32, description="Taints that the pods put up with."
    )
    priority_class_name: str | None = Field(
        default=None, min_length=1, max_length=253, description="PriorityClass of the pods."
    )
    runtime_class_name: str | None = Field(
        default=None, min_length=1, max_length=253, description="RuntimeClass of the pods."
    )
    image_pull_secrets: tuple[ImagePullSecret, ...] | None = Field(
        default=None, max_length=16, description="Credentials for the registry of the trainer's image."
    )
    gpu_resource_name: str | None = Field(
        default=None,
        min_length=3,
        max_length=253,
        pattern=r"^[a-z0-9][-a-z0-9.]*/[A-Za-z0-9][-A-Za-z0-9_.]*$",
        description="Extended resource that counts as one GPU. Default nvidia.com/gpu.",
    )


class RunPolicy(Model):
    """How failures are dealt with."""

    max_retries: int | None = Field(
        default=None,
        ge=0,
        le=100,
        description="How often a failed stage is run again, over the whole job. Preempted and drained pods do not "
        "count; what only you can mend is not retried. Default 3.",
    )


class Spec(JobConfig):
    """One fine-tuning job. Immutable: an edit is a new name."""

    output: Output | None = Field(default=None, description="Where the results go.")
    pod: Pod | None = Field(default=None, description="What the stage pods need of the cluster.")
    run_policy: RunPolicy | None = Field(default=None, description="How failures are dealt with.")

    @property
    def config(self) -> JobConfig:
        """The half that the trainer reads."""
        return JobConfig.model_construct(**{name: getattr(self, name) for name in JobConfig.model_fields})

    @property
    def created_claim(self) -> CreateClaim | None:
        """The claim to make, or None if an existing one is used."""
        volume = self.output.volume if self.output else None
        if volume is None:
            return CreateClaim()
        return volume.create

    @property
    def keeps_claim(self) -> bool:
        """Whether a created claim outlives the job."""
        policy = self.output.retention_policy if self.output else None
        return policy is None or policy.when_deleted is not WhenDeleted.DELETE

    @property
    def max_retries(self) -> int:
        """How often a failed stage is run again."""
        policy = self.run_policy
        return 3 if policy is None or policy.max_retries is None else policy.max_retries


# --- status ----------------------------------------------------------------------------------------------------------


class Phase(StrEnum):
    """Where a job is. An open set for its readers."""

    PENDING = "Pending"
    PREPARING = "Preparing"
    TRAINING = "Training"
    MERGING = "Merging"
    QUANTIZING = "Quantizing"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class ConditionType(StrEnum):
    """What is said of a job in conditions."""

    ACCEPTED = "Accepted"
    SUCCEEDED = "Succeeded"
    FINISHED = "Finished"


Text = Annotated[str, Field(max_length=MESSAGE_LIMIT_CHARACTERS)]
Number = Annotated[str, Field(max_length=40)]
"""A measured figure with 4 digits, as text: a NaN would make every write of the status fail."""
Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]


class Condition(Model):
    """One thing that is true, false or not known yet."""

    type: str = Field(description="Accepted, Succeeded or Finished.")
    status: str = Field(description="True, False or Unknown.")
    reason: str = Field(description="One word, for machines.")
    message: Text = Field(description="A sentence, for people.")
    last_transition_time: Time = Field(description="Since when the status is this.")
    observed_generation: int | None = Field(default=None, description="Generation of the spec it was said of.")


class StageStatus(Model):
    """One stage, in the order of the line."""

    name: str = Field(description="prepare, train, merge, or quantize- and the name of the entry.")
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
    tokens_per_second: Number | None = Field(default=None, description="Throughput.")
    peak_memory: Number | None = Field(default=None, description="Most memory in use, in GiB.")
    progress: str | None = Field(default=None, description='For example "128/300 (43%)".')
    eta: str | None = Field(default=None, description='Time left, for example "12m".')
    last_checkpoint_step: int | None = Field(default=None, description="Step of the newest verified checkpoint.")
    resumed_from_step: int | None = Field(default=None, description="Step that the last attempt went on from.")
    trainable_parameters: int | None = Field(default=None, description="Parameters of the adapter.")
    total_parameters: int | None = Field(default=None, description="Parameters in all.")


class DataStatus(Model):
    """What the rows are like. Lengths in tokens."""

    train_rows: int = Field(description="Rows trained on.")
    eval_rows: int = Field(description="Rows measured on.")
    dropped_rows: int = Field(description="Rows too long or without a token to learn from.")
    train_tokens: int = Field(description="Tokens of the training rows.")
    loss_tokens: int = Field(description="Those of them that count in the loss.")
    length_p50: int = Field(description="Length of the middle row.")
    length_p95: int = Field(description="Length that 95 of 100 rows stay below.")
    length_max: int = Field(description="Length of the longest row.")


class MeasuredStatus(Model):
    """Quality on the held-out rows. Figures are text with 4 digits."""

    eval_loss: Number | None = Field(default=None, description="Nats a token.")
    perplexity: Number | None = Field(default=None, description="exp of the loss.")
    eval_loss_base: Number | None = Field(default=None, description="Of the base model before training, nats a token.")
    kl_divergence: Number | None = Field(default=None, description="From the model it was made from, nats a token.")
    top1_agreement: Number | None = Field(default=None, description="Share of tokens with the same first choice.")
    perplexity_increase_percent: Number | None = Field(default=None, description="Against the model it was made from.")


class ArtifactStatus(Model):
    """One thing that came out, complete and verified."""

    name: str = Field(description="adapter, merged, or the name of the quantized form.")
    type: str = Field(description="Adapter, Merged or Quantized.")
    claim_name: str = Field(description="PersistentVolumeClaim that holds it.")
    path: str = Field(description="Folder inside the claim.")
    size: str = Field(description='For example "269 MiB".')
    size_bytes: int = Field(description="All its files.")
    digest: str = Field(description="SHA-256 of its manifest.")
    measured: MeasuredStatus | None = Field(default=None, description="Quality on the held-out rows.")


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


class Status(Model):
    """What became of the job, for people and machines."""

    observed_generation: int | None = Field(default=None, description="Generation of the spec that this is about.")
    phase: str | None = Field(
        default=None, description="Pending, Preparing, Training, Merging, Quantizing, Succeeded or Failed."
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
    attempt_count: int | None = Field(
        default=None, description="Number of the latest attempt: 1 unless a stage had to be run again."
    )
    retries: int | None = Field(
        default=None, description="How often a stage was run again that counts against runPolicy.maxRetries."
    )
    training: TrainingStatus | None = Field(default=None, description="How training goes.")
    data: DataStatus | None = Field(default=None, description="What the rows are like.")
    resolved: dict[str, Any] | None = Field(
        default=None,
        description="Every setting that was unset and every source that could move, fixed once by the prepare stage.",
        json_schema_extra={"x-kubernetes-preserve-unknown-fields": True},
    )
    conditions: tuple[Condition, ...] | None = Field(
        default=None, max_length=16, description="Accepted, Succeeded, Finished."
    )
    stages: tuple[StageStatus, ...] | None = Field(default=None, max_length=16, description="The line of stages.")
    artifacts: tuple[ArtifactStatus, ...] | None = Field(default=None, max_length=16, description="What came out.")
    attempts: tuple[AttemptStatus, ...] | None = Field(
        default=None, max_length=ATTEMPTS_KEPT, description="The last runs of stages, oldest first."
    )

    @property
    def finished(self) -> bool:
        """Whether the job has ended, for good."""
        return any(c.type == ConditionType.FINISHED and c.status == "True" for c in self.conditions or ())

    def to_dict(self) -> JSON:
        """As the API server stores it."""
        return self.model_dump(by_alias=True, exclude_none=True, mode="json")


# --- the resource ----------------------------------------------------------------------------------------------------


class InvalidJobError(Exception):
    """A stored resource that this operator cannot understand, in a sentence."""


@dataclass(frozen=True)
class FineTuneJob:
    """One resource, parsed. `problem` is set, and `spec` is not, where the stored spec makes no sense here."""

    name: str
    namespace: str
    uid: str
    resource_version: str
    generation: int
    created: datetime
    deleting: bool
    status: Status
    stored_status: JSON
    spec: Spec | None
    problem: str | None = None

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> FineTuneJob:
        """The resource as the API server gave it. Never fails on its spec or status."""
        metadata = body["metadata"]
        spec, problem = _parse_spec(body.get("spec") or {})
        if problem is None:
            problem = _name_problem(metadata["name"])
        stored = dict(body.get("status") or {})
        return cls(
            name=metadata["name"],
            namespace=metadata["namespace"],
            uid=metadata["uid"],
            resource_version=metadata["resourceVersion"],
            generation=metadata.get("generation", 1),
            created=parse_time(metadata["creationTimestamp"]),
            deleting="deletionTimestamp" in metadata,
            status=_parse_status(stored),
            stored_status=stored,
            spec=spec if problem is None else None,
            problem=problem,
        )

    @property
    def valid_spec(self) -> Spec:
        """The spec, where there is one to act on."""
        if self.spec is None:
            raise InvalidJobError(self.problem)
        return self.spec


def _parse_spec(spec: JSON) -> tuple[Spec | None, str | None]:
    try:
        return Spec.model_validate(spec), None
    except ValidationError as error:
        return None, sentence(error)


def _name_problem(name: str) -> str | None:
    if len(name) <= NAME_LIMIT_CHARACTERS and "." not in name:
        return None
    return (
        f"metadata.name: at most {NAME_LIMIT_CHARACTERS} characters without dots, so that stages can be named after it."
    )


def _parse_status(stored: JSON) -> Status:
    """The stored status; what an older or newer operator wrote in another shape is dropped field by field."""
    known = {name: field.alias or name for name, field in Status.model_fields.items()}
    kept: JSON = {alias: stored[alias] for alias in known.values() if alias in stored}
    while True:
        try:
            return Status.model_validate(kept)
        except ValidationError as error:
            for problem in error.errors():
                kept.pop(str(problem["loc"][0]), None)


def sentence(error: ValidationError) -> str:
    """What is wrong with a spec, field by field, at most three of them."""
    problems = error.errors(include_url=False, include_context=False)
    parts = []
    for problem in problems[:3]:
        where = ".".join(str(part) for part in problem["loc"])
        what = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            what = "unknown to this version of the operator"
        parts.append(f"spec.{where}: {what}" if where else what)
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""  # noqa: PLR2004 - as many as shown
    return "; ".join(parts) + more + "."


def parse_time(text: str) -> datetime:
    """An RFC 3339 time, with or without fractions."""
    return datetime.fromisoformat(text)


def format_time(time: datetime) -> str:
    """As Kubernetes writes times: UTC, whole seconds."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def cut(text: str, limit: int = MESSAGE_LIMIT_CHARACTERS) -> str:
    """The text, or its begin and an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
