"""The operator's own environment: FINETUNE_TRAINER_IMAGE, FINETUNE_HEALTH_PORT and so on. The chart sets it.

Objects are given as JSON, e.g. FINETUNE_TRAINER_ENV='{"HF_ENDPOINT": "https://mirror.example"}'.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "FINETUNE_"

Endpoint = Annotated[str, Field(pattern=r"^https?://[^\s/@]+(/[^\s]*)?$")]
AccessMode = Literal["ReadWriteOnce", "ReadWriteOncePod", "ReadWriteMany"]


class SettingsError(Exception):
    """The environment does not make a working operator; the message says which variable and why."""


class Resources(BaseModel):
    """Requests and limits of a container, as Kubernetes quantities."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests: dict[str, str] = {}
    limits: dict[str, str] = {}


class Settings(BaseSettings):
    """Everything an administrator decides once for all jobs."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    trainer_image: str = Field(min_length=1, description="Image of every stage; its entry point is finetune-trainer.")
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    default_resources: Resources = Field(
        default=Resources(requests={"cpu": "1", "memory": "4Gi"}),
        description="For jobs that set no spec.pod.resources.",
    )
    trainer_env: dict[str, str] = Field(
        default={},
        description="Environment of the stages that reach the network (prepare, publish, and train where a tracker is "
        "told), e.g. HF_ENDPOINT or HTTPS_PROXY.",
    )
    allow_remote_code: bool = Field(
        default=False, description="Whether jobs may run Python code that a model brings (model.trustRemoteCode)."
    )
    endpoints: tuple[Endpoint, ...] = Field(
        default=(),
        description="Addresses below which S3 endpoints, OCI registries and trackers may lie. Empty: anywhere.",
    )

    default_volume_size: str = Field(default="50Gi", description="Of a claim made for a job that names no size.")
    default_storage_class: str = Field(default="", description="Of such a claim. Empty: the cluster's default class.")
    default_access_mode: AccessMode = "ReadWriteOnce"

    watch_namespace: str = Field(default="", description="The one namespace to serve. Empty: all.")
    lease: str = Field(
        default="",
        pattern=r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?/[a-z0-9]([-.a-z0-9]*[a-z0-9])?)?$",
        description="namespace/name of the Lease by which one of several operators works while the others stand by. "
        "Empty: there is no other.",
    )
    workers: int = Field(
        default=8, ge=2, le=64, description="Jobs worked on at once; half of that only begins new ones."
    )
    progress_interval_seconds: float = Field(
        default=30, gt=0, description="Between two looks at a running stage's progress."
    )
    start_deadline_seconds: float = Field(
        default=300, gt=0, description="For what has to be mended before a pod can start: image, claim, mount, secret."
    )
    retry_backoff_seconds: float = Field(
        default=10, ge=0, description="Before a first retry; doubled with each further one of a stage, at most 300."
    )
    resync_seconds: float = Field(default=300, gt=0, description="Between two looks at all jobs, whatever was heard.")
    request_timeout_seconds: float = Field(default=30, gt=0, description="Of a call to the API server.")

    health_port: int = Field(
        default=8081, ge=0, le=65535, description="Serves /healthz (alive) and /readyz (watching)."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["json", "text"] = "json"

    @classmethod
    def from_environment(cls) -> Self:
        """The settings, or a SettingsError that names the variable."""
        try:
            return cls()
        except ValidationError as error:
            raise SettingsError(describe(error)) from None


def describe(error: ValidationError) -> str:
    """One line for each variable that is missing or wrong."""
    lines = []
    for problem in error.errors(include_url=False, include_context=False):
        name = PREFIX + str(problem["loc"][0]).upper() if problem["loc"] else "The environment"
        missing = problem["type"] == "missing"
        hint = "is not set: the image of the stages, e.g. registry.example/finetune-trainer:0.1.0"
        lines.append(f"{name} {hint if missing else 'is wrong: ' + problem['msg']}.")
    return "\n".join(lines)
