"""Where models, adapters and rows come from: exactly one of five kinds of source."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from finetune_trainer.config.base import ClaimName, Model, RelativePath, SecretKeyRef, SecretRef, Url

TOKEN_FILE = "token"  # noqa: S105 - a file name
"""Below a source's folder of secrets: the token for a repository."""
DOCKER_CONFIG_FILE = ".dockerconfigjson"
"""Below a source's folder of secrets: registry credentials, as `kubectl create secret docker-registry` writes them."""
S3_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
"""Keys of the Secret with S3 credentials, and files below the source's folder of secrets. The last is optional."""

DEFAULT_REGION = "us-east-1"
REGION_PATTERN = r"^[A-Za-z0-9._-]+$"
SOURCE_FIELDS = ("huggingFace", "modelScope", "volume", "s3", "oci")
COMMIT_PATTERN = r"^[0-9a-f]{40}$"


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


class ModelScopeSource(Model):
    """A repository of ModelScope, pinned to a commit when the job is prepared."""

    repo: str = Field(min_length=3, max_length=200, pattern=r"^[\w.-]+/[\w.-]+$", description="Owner and name.")
    revision: str = Field(default="master", min_length=1, max_length=200, description="Branch, tag or commit.")
    token_secret_ref: SecretKeyRef | None = Field(default=None, description="Token for a private repository.")


class S3Source(Model):
    """Objects of a bucket that speaks the S3 protocol."""

    uri: str = Field(
        max_length=1024,
        pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/.+$",
        description="s3://bucket/key of one object, or of all objects below a prefix.",
    )
    endpoint: Url | None = Field(default=None, description="Address of the service. Default: AWS.")
    region: str | None = Field(
        default=None,
        min_length=1,
        max_length=60,
        pattern=REGION_PATTERN,
        description="Region. Default us-east-1.",
    )
    credentials_secret_ref: SecretRef | None = Field(
        default=None,
        description="Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if used, AWS_SESSION_TOKEN. "
        "Default: none, the bucket is public.",
    )

    @property
    def address(self) -> str:
        """URL of the service: the endpoint, or AWS's in the region."""
        return (self.endpoint or f"https://s3.{self.region or DEFAULT_REGION}.amazonaws.com").rstrip("/")


class OciSource(Model):
    """Files in an OCI artifact of a registry, as `oras push` makes them."""

    reference: str = Field(
        max_length=512,
        pattern=r"^[A-Za-z0-9.-]+(:[0-9]+)?/[a-z0-9._/-]+(:[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?(@sha256:[0-9a-f]{64})?$",
        description="registry/repository:tag, or @sha256:...; pinned to its digest when the job is prepared.",
    )
    plain_http: bool | None = Field(default=None, description="The registry has no TLS. Default false.")
    credentials_secret_ref: SecretRef | None = Field(
        default=None, description="Secret of the type kubernetes.io/dockerconfigjson. Default: none."
    )


def _require_one_source(record: Source) -> None:
    if len([name for name in Source.model_fields if getattr(record, name) is not None]) != 1:
        msg = f"exactly one source is needed: {', '.join(SOURCE_FIELDS[:-1])} or {SOURCE_FIELDS[-1]}"
        raise ValueError(msg)


class Source(Model):
    """Files from somewhere: exactly one source."""

    hugging_face: HuggingFaceSource | None = Field(default=None, description="A repository of the Hugging Face hub.")
    model_scope: ModelScopeSource | None = Field(default=None, description="A repository of ModelScope.")
    volume: VolumeSource | None = Field(default=None, description="A file or folder on a claim.")
    s3: S3Source | None = Field(default=None, description="Objects of an S3 bucket.")
    oci: OciSource | None = Field(default=None, description="An artifact of an OCI registry.")

    @model_validator(mode="after")
    def _exactly_one_source(self) -> Self:
        _require_one_source(self)
        return self

    @property
    def kind(self) -> HuggingFaceSource | ModelScopeSource | VolumeSource | S3Source | OciSource:
        """The one that is set."""
        found = self.hugging_face or self.model_scope or self.volume or self.s3 or self.oci
        if found is None:
            msg = "a source without a kind"
            raise AssertionError(msg)
        return found


class Split(Model):
    """Which of a repository's files are meant."""

    config: str | None = Field(
        default=None, min_length=1, max_length=200, description="Configuration. Default: the only one."
    )
    split: str | None = Field(default=None, min_length=1, max_length=200, description="Split. Default train.")
    files: tuple[Annotated[str, Field(min_length=1, max_length=500)], ...] | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="Files or patterns (data/train-*.parquet), in place of config and split.",
    )

    @model_validator(mode="after")
    def _files_or_split(self) -> Self:
        if self.files is not None and (self.config is not None or self.split is not None):
            msg = "files are in place of config and split: set either"
            raise ValueError(msg)
        return self


class HuggingFaceDataset(HuggingFaceSource, Split):
    """A dataset's repository of the Hugging Face hub."""


class ModelScopeDataset(ModelScopeSource, Split):
    """A dataset's repository of ModelScope."""


class DatasetSource(Source):
    """Rows from somewhere: exactly one source."""

    hugging_face: HuggingFaceDataset | None = Field(default=None, description="A dataset of the Hugging Face hub.")
    model_scope: ModelScopeDataset | None = Field(default=None, description="A dataset of ModelScope.")
    volume: VolumeSource | None = Field(
        default=None, description="A jsonl, json, csv, parquet or text file, or a folder with such files of one kind."
    )
