"""What a user asks for: the trainer's configuration, and what only a cluster needs."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

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

    @model_validator(mode="after")
    def _gpus_are_counted_once(self) -> Self:
        resources = self.resources or Resources()
        if any(self.gpu_resource in (amounts or {}) for amounts in (resources.requests, resources.limits)):
            msg = "pod.resources: GPUs are counted by parallelism.gpusPerNode, drop them here"
            raise ValueError(msg)
        return self

    @property
    def gpu_resource(self) -> str:
        """The extended resource that counts as one GPU."""
        return self.gpu_resource_name or GPU_RESOURCE


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
        return JobConfig.model_construct(**{name: getattr(self, name) for name in JobConfig.model_fields})

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
        policy = self.run_policy
        return 3 if policy is None or policy.max_retries is None else policy.max_retries
