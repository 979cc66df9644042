"""What a user asks for: the trainer's configuration, and what only a cluster needs."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Self

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from finetune_operator.api.words import GROUP, MANAGER
from finetune_trainer import config
from finetune_trainer.config import ClaimName, JobConfig, Model

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
GPU_RESOURCE = "nvidia.com/gpu"

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
    def _exactly_one(self) -> Self:
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


class Output(config.Output):
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


ENV_NAME_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]*$"
RESERVED_ENV_PATTERN = (
    r"^(LD_.*|PYTHON.*|HF_TOKEN|HF_TOKEN_PATH|HUGGING_FACE_HUB_TOKEN|HF_HUB_OFFLINE|HOME|PATH|RANK|LOCAL_RANK"
    r"|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|JOB_COMPLETION_INDEX|FINETUNE_.*)$"
)
"""Variables that would change what runs in a pod, carry a secret in the open, or are the operator's own to set."""
DRILL_ENV_PREFIX = "FINETUNE_DRILL_"
"""Fire drills of the trainer, which a job may ask for."""


class EnvVar(Model):
    """One variable of the trainer's environment. Secrets are given by the fields that name a Secret."""

    name: str = Field(min_length=1, max_length=253, pattern=ENV_NAME_PATTERN, description="Name of the variable.")
    value: str = Field(max_length=4096, description="Its value.")

    @model_validator(mode="after")
    def _may_be_set(self) -> Self:
        if re.match(RESERVED_ENV_PATTERN, self.name) and not self.name.startswith(DRILL_ENV_PREFIX):
            msg = "pod.env: this variable is set by the operator or changes what code runs, drop it"
            raise ValueError(msg)
        return self


class Pod(config.Pod):
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
    env: tuple[EnvVar, ...] | None = Field(
        default=None,
        max_length=64,
        description="Environment of every stage, e.g. NCCL_DEBUG. Names are unique; LD_*, PYTHON*, HF_TOKEN and what "
        "the operator sets itself are refused.",
    )

    @model_validator(mode="after")
    def _gpus_are_counted_once(self) -> Self:
        resources = self.resources or Resources()
        if any(self.gpu_resource in (amounts or {}) for amounts in (resources.requests, resources.limits)):
            msg = "pod.resources: GPUs are counted by parallelism.gpusPerNode, drop them here"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _variables_are_set_once(self) -> Self:
        names = [variable.name for variable in self.env or ()]
        if len(set(names)) < len(names):
            msg = "pod.env: each name at most once"
            raise ValueError(msg)
        return self

    @property
    def gpu_resource(self) -> str:
        """The extended resource that counts as one GPU."""
        return self.gpu_resource_name or GPU_RESOURCE


class StopAfter(StrEnum):
    """The last stage of a job that is not to run to its end."""

    PREPARE = "Prepare"


WEEK_SECONDS = 7 * 24 * 3600
YEAR_SECONDS = 365 * 24 * 3600
MAX_RETRIES = 3
STALL_TIMEOUT_SECONDS = 3600
CHECKPOINT_GRACE_SECONDS = 120


class RunPolicy(Model):
    """How failures are dealt with, and how long things may take."""

    max_retries: int | None = Field(
        default=None,
        ge=0,
        le=100,
        description="How often a failed stage is run again, over the whole job. Preempted and drained pods do not "
        "count, nor does healing after the GPU's memory ran out; what only you can mend is not retried. "
        f"Default {MAX_RETRIES}.",
    )
    active_deadline_seconds: int | None = Field(
        default=None,
        ge=1,
        le=YEAR_SECONDS,
        description="How long pods may run in all. Time in a queue, without a node or suspended does not count; it "
        "begins anew on resume. Default: no limit.",
    )
    start_deadline_seconds: int | None = Field(
        default=None,
        ge=1,
        le=YEAR_SECONDS,
        description="How long a stage may wait for quota or for a node that has room. Default: for ever.",
    )
    stall_timeout_seconds: int | None = Field(
        default=None,
        ge=10,
        le=WEEK_SECONDS,
        description="After how long without any progress a stage is taken for hung and run again. "
        f"Default {STALL_TIMEOUT_SECONDS}.",
    )
    checkpoint_grace_seconds: int | None = Field(
        default=None,
        ge=1,
        le=24 * 3600,
        description="How long a pod that is told to leave has to save a checkpoint. "
        f"Default {CHECKPOINT_GRACE_SECONDS}.",
    )
    ttl_seconds_after_finished: int | None = Field(
        default=None,
        ge=0,
        le=YEAR_SECONDS,
        description="When a finished FineTuneJob is deleted; can be changed. Default: never.",
    )
    stop_after: StopAfter | None = Field(
        default=None,
        description="Prepare: end after the data and the model are checked and fixed. Default: run all.",
        json_schema_extra={"maxLength": 16},  # a rule compares it, and rules are budgeted by the longest text
    )


MANAGED_BY_PATTERN = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9._]*[A-Za-z0-9])?$"
OPERATOR = f"{GROUP}/{MANAGER}"
"""What managedBy says of the jobs that are this operator's."""


class Spec(JobConfig):
    """One fine-tuning job. Immutable but for suspend, cancel and the TTL: an edit is a new name."""

    suspend: bool | None = Field(
        default=None,
        description="true: save a checkpoint and free the GPUs; false again: go on from it. Can be changed.",
    )
    cancel: bool | None = Field(
        default=None, description="true: end the job for good, what is there is kept. Can be set, never taken back."
    )
    managed_by: str | None = Field(
        default=None,
        min_length=3,
        max_length=63,
        pattern=MANAGED_BY_PATTERN,
        description=f"Who reconciles the job, as domain/name. Default {OPERATOR}; with any other, this operator leaves "
        "the job alone.",
    )
    output: Output | None = Field(default=None, description="Where the results go.")
    pod: Pod | None = Field(default=None, description="What the stage pods need of the cluster.")
    run_policy: RunPolicy | None = Field(
        default=None, description="How failures are dealt with, and how long things may take."
    )

    @model_validator(mode="after")
    def _nodes_share_a_volume(self) -> Self:
        claim = self.created_claim
        if self.num_nodes > 1 and claim is not None and AccessMode.READ_WRITE_MANY not in (claim.access_modes or ()):
            msg = "parallelism.numNodes above 1: set output.volume.create.accessModes to [ReadWriteMany]"
            raise ValueError(msg)
        return self

    @property
    def config(self) -> JobConfig:
        """The half that the trainer reads."""
        fields = {name: getattr(self, name) for name in JobConfig.model_fields}
        publish = self.output.publish if self.output else None
        memory = self.pod.gpu_memory if self.pod else None
        fields["output"] = publish and config.Output(publish=publish)
        fields["pod"] = memory and config.Pod(gpu_memory=memory)
        return JobConfig.model_construct(**fields)

    @property
    def created_claim(self) -> CreateClaim | None:
        """The claim to make, or None if an existing one is used."""
        volume = self.output.volume if self.output else None
        if volume is None:
            return CreateClaim()
        return volume.create

    @property
    def existing_claim(self) -> str | None:
        """Name of the claim that the job brings, if it does."""
        volume = self.output.volume if self.output else None
        return volume.existing.claim_name if volume is not None and volume.existing is not None else None

    @property
    def keeps_claim(self) -> bool:
        """Whether a created claim outlives the job."""
        policy = self.output.retention_policy if self.output else None
        return policy is None or policy.when_deleted is not WhenDeleted.DELETE

    @property
    def max_retries(self) -> int:
        """How often a failed stage is run again."""
        asked = self._policy.max_retries
        return MAX_RETRIES if asked is None else asked

    @property
    def stops_after_prepare(self) -> bool:
        """Whether the job ends before it trains."""
        return self._policy.stop_after is StopAfter.PREPARE

    @property
    def stall_timeout_seconds(self) -> int:
        """After how long without progress a stage is hung."""
        return self._policy.stall_timeout_seconds or STALL_TIMEOUT_SECONDS

    @property
    def checkpoint_grace_seconds(self) -> int:
        """How long a pod has between SIGTERM and SIGKILL."""
        return self._policy.checkpoint_grace_seconds or CHECKPOINT_GRACE_SECONDS

    @property
    def active_deadline_seconds(self) -> int | None:
        """How long pods may run in all."""
        return self._policy.active_deadline_seconds

    @property
    def start_deadline_seconds(self) -> int | None:
        """How long a stage may wait for room."""
        return self._policy.start_deadline_seconds

    @property
    def ttl_seconds(self) -> int | None:
        """How long the resource stays once it is finished."""
        return self._policy.ttl_seconds_after_finished

    @property
    def _policy(self) -> RunPolicy:
        return self.run_policy or RunPolicy()
