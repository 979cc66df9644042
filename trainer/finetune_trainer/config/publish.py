"""Where finished artifacts go besides the job's volume: exactly one of three kinds of place an entry."""

from __future__ import annotations

import re
from collections import Counter
from enum import StrEnum
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from finetune_trainer.config.base import Model, SecretKeyRef, SecretRef, ShortName, refuse_unreachable
from finetune_trainer.config.sources import COMMIT_PATTERN, HuggingFaceSource, OciSource, S3Source

TARGET_FIELDS = ("huggingFace", "s3", "oci")
HUB_REPO = re.compile(r"(?!.*(--|\.\.|\.git$))\w([\w.-]*\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)
"""What the hub lets be made (`huggingface_hub.utils.validate_repo_id`), with an owner."""
NO_BRANCH = re.compile(rf"//|\.\.|/\.|(/|\.|\.lock)$|{COMMIT_PATTERN}")
"""What git does not take as the name of a branch (`git check-ref-format`), or reads as a commit."""
OCI_PART = r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*"
OCI_REPOSITORY = re.compile(rf"{OCI_PART}(?:/{OCI_PART})*")
"""Of https://github.com/opencontainers/distribution-spec, "Pulling manifests"."""


def _refuse_odd_repository(repo: str) -> str:
    if HUB_REPO.fullmatch(repo) is None:
        raise PydanticCustomError("repository", "It must be owner/name, as the hub allows them")
    return repo


def _refuse_odd_branch(revision: str) -> str:
    if NO_BRANCH.search(revision):
        raise PydanticCustomError("branch", "It must be the name of a branch, and no commit")
    return revision


def _refuse_odd_prefix(uri: str) -> str:
    bucket, *prefix = uri.removeprefix("s3://").removesuffix("/").split("/")
    if not prefix or {"", ".", ".."} & set(prefix) or ".." in bucket or not uri.isprintable():
        raise PydanticCustomError("prefix", "It must be s3://bucket/prefix, no part of it empty, '.' or '..'")
    return uri


def _refuse_odd_reference(reference: str) -> str:
    registry, _, rest = reference.partition("/")
    refuse_unreachable(f"https://{registry}")
    if OCI_REPOSITORY.fullmatch(rest.partition(":")[0]) is None:
        raise PydanticCustomError("reference", "It must be registry/repository:tag, as registries allow them")
    return reference


class PublishedArtifact(StrEnum):
    """Which of a job's artifacts goes out."""

    ADAPTER = "Adapter"
    MERGED = "Merged"
    QUANTIZED = "Quantized"


class HuggingFaceTarget(HuggingFaceSource):
    """A model repository of the Hugging Face hub; made if it is not there."""

    repo: Annotated[str, AfterValidator(_refuse_odd_repository)] = Field(
        min_length=1, max_length=200, pattern=r"^[\w.-]+(/[\w.-]+)?$", description="Owner and name."
    )
    revision: Annotated[str, AfterValidator(_refuse_odd_branch)] = Field(
        default="main",
        min_length=1,
        max_length=200,
        pattern=r"^[A-Za-z0-9._][A-Za-z0-9._/-]*$",
        description="Branch; made if it is not there.",
    )
    private: bool | None = Field(
        default=None, description="Whether a repository that is made can be seen by its owner alone. Default true."
    )
    token_secret_ref: SecretKeyRef = Field(description="Token that may write to the repository.")


class S3Target(S3Source):
    """A prefix in a bucket that speaks the S3 protocol."""

    uri: Annotated[str, AfterValidator(_refuse_odd_prefix)] = Field(
        max_length=1024,
        pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/[^?#]+$",
        description="s3://bucket/prefix: the files go below it, manifest.json last.",
    )
    credentials_secret_ref: SecretRef = Field(
        description="Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if used, AWS_SESSION_TOKEN, which may "
        "list, read, write and delete below the prefix.",
    )


class OciTarget(OciSource):
    """A tag in a repository of an OCI registry."""

    reference: Annotated[str, AfterValidator(_refuse_odd_reference)] = Field(
        max_length=512,
        pattern=r"^[A-Za-z0-9.-]+(:[0-9]+)?/[a-z0-9._/-]+(:[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?$",
        description="registry/repository:tag. Default tag latest.",
    )
    credentials_secret_ref: SecretRef | None = Field(
        default=None, description="Secret of the type kubernetes.io/dockerconfigjson that may push. Default: none."
    )


class Publish(Model):
    """One artifact put in one place: exactly one of huggingFace, s3 and oci."""

    name: ShortName = Field(description="Its name in the status and its folder below published/.")
    artifact: PublishedArtifact = Field(
        description="Adapter; Merged: the finished model, also one that was trained whole; Quantized."
    )
    quantize_name: ShortName | None = Field(
        default=None, description="Quantized: name of the entry of quantize that is meant."
    )
    hugging_face: HuggingFaceTarget | None = Field(default=None, description="A repository of the Hugging Face hub.")
    s3: S3Target | None = Field(default=None, description="A prefix in an S3 bucket.")
    oci: OciTarget | None = Field(default=None, description="A tag in an OCI registry.")

    @model_validator(mode="after")
    def _exactly_one_place(self) -> Self:
        if len([place for place in (self.hugging_face, self.s3, self.oci) if place is not None]) != 1:
            msg = f"output.publish: exactly one place is needed: {', '.join(TARGET_FIELDS[:-1])} or {TARGET_FIELDS[-1]}"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _quantized_is_named(self) -> Self:
        if (self.artifact is PublishedArtifact.QUANTIZED) != (self.quantize_name is not None):
            msg = "output.publish: quantizeName goes with artifact Quantized, which needs it"
            raise ValueError(msg)
        return self

    @property
    def kind(self) -> HuggingFaceTarget | S3Target | OciTarget:
        """The place that is set."""
        found = self.hugging_face or self.s3 or self.oci
        if found is None:
            msg = "an entry without a place"
            raise AssertionError(msg)
        return found

    @property
    def place(self) -> str:
        """Equal for two entries of which the second would overwrite the first."""
        match self.kind:
            case HuggingFaceTarget() as hub:
                return f"{hub.repo}@{hub.revision}"
            case S3Target() as s3:
                return f"{s3.address}/{s3.uri.rstrip('/')}"
            case OciTarget() as oci:
                named = ":" in oci.reference.rpartition("/")[2]
                return oci.reference if named else f"{oci.reference}:latest"


class Output(Model):
    """Where the results go besides the job's volume."""

    publish: tuple[Publish, ...] | None = Field(
        default=None,
        max_length=8,
        description="Artifacts put into repositories, buckets and registries; names are unique. Default none.",
    )

    @model_validator(mode="after")
    def _entries_stand_apart(self) -> Self:
        for what, values in (
            ("a name", [entry.name for entry in self.publish or ()]),
            ("a place", [entry.place for entry in self.publish or ()]),
        ):
            if doubled := [value for value, count in Counter(values).items() if count > 1]:
                msg = f"output.publish: each entry needs {what} of its own, '{doubled[0]}' is there twice"
                raise ValueError(msg)
        return self
