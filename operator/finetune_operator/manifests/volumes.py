"""What a stage's pod mounts: the work claim, its configuration, the claims and secrets that the stage needs. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from finetune_operator import names
from finetune_operator.api import JSON, FineTuneJob, Spec
from finetune_operator.names import Step
from finetune_trainer.config import (
    MLFLOW_SLOT,
    TOKEN_FILE,
    WANDB_KEY_FILE,
    WANDB_SLOT,
    HuggingFaceSource,
    ModelScopeSource,
    OciSource,
    Publish,
    S3Source,
    SecretKeyRef,
    SecretRef,
    Tracking,
    VolumeSource,
)
from finetune_trainer.progress import Stage

TMP = "/tmp"  # noqa: S108 - the pod's own
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - likewise

Mounted = tuple[JSON, JSON]
"""A volume and its mount."""


def build_volumes(job: FineTuneJob, step: Step) -> tuple[list[JSON], list[JSON]]:
    """Volumes and their mounts. Secrets are seen where they are used: by prepare, train (trackers), each publish.

    Prepare sees those of publishing too: the kubelet, and prepare itself, tell what is missing before a GPU is held,
    and the operator needs no right to read Secrets.
    """
    pairs = [
        _claim("work", names.claim(job), names.WORK, read_only=False),
        (
            {"name": "config", "configMap": {"name": names.config_map(job)}},
            {"name": "config", "mountPath": names.CONFIG, "readOnly": True},
        ),
        ({"name": "tmp", "emptyDir": {}}, {"name": "tmp", "mountPath": TMP}),
    ]
    if step.stage is Stage.PREPARE:
        pairs += [*_source_claims(job), *_source_secrets(job.valid_spec)]
        pairs += _target_secrets(job.valid_spec.destinations_seen_early())
    if step.stage is Stage.TRAIN:
        memory = {"name": "shm", "emptyDir": {"medium": "Memory"}}
        pairs += [(memory, {"name": "shm", "mountPath": SHARED_MEMORY}), *_tracker_secrets(job.valid_spec)]
    if step.stage is Stage.PUBLISH:
        pairs += _target_secrets(each for each in job.valid_spec.destinations() if each[2].name == step.entry)
    volumes, mounts = zip(*pairs, strict=True)
    merged = {volume["name"]: volume for volume in volumes}
    return list(merged.values()), list(mounts)


def _claim(volume: str, claim: str, path: str, *, read_only: bool) -> Mounted:
    mount: JSON = {"name": volume, "mountPath": path}
    source: JSON = {"claimName": claim}
    if read_only:
        mount["readOnly"] = True
        source["readOnly"] = True  # and so Kubernetes does not hand the files to our group
    return {"name": volume, "persistentVolumeClaim": source}, mount


def _source_claims(job: FineTuneJob) -> Iterator[Mounted]:
    """Claims, each mounted once (the work claim's own volume serves where it is a source too)."""
    work = names.claim(job)
    for index, claim in enumerate(names.source_claims(job.valid_spec)):
        path = f"{names.SOURCES}/{claim}"
        if claim == work:
            yield _claim("work", work, path, read_only=False)[0], {"name": "work", "mountPath": path, "readOnly": True}
        else:
            yield _claim(f"source-{index}", claim, path, read_only=True)


def _source_secrets(spec: Spec) -> Iterator[Mounted]:
    """Of each source its own, in the folder of its slot."""
    for slot, _, source in spec.sources():
        if not isinstance(source.kind, VolumeSource):
            yield from _secret(slot, _secret_of(source.kind), TOKEN_FILE)


def _target_secrets(destinations: Iterable[tuple[str, str, Publish]]) -> Iterator[Mounted]:
    """Of each place its own, in the folder of its slot."""
    for slot, _, entry in destinations:
        yield from _secret(slot, _secret_of(entry.kind), TOKEN_FILE)


def _secret_of(place: HuggingFaceSource | ModelScopeSource | S3Source | OciSource) -> SecretKeyRef | SecretRef | None:
    """Hubs are told a token, stores and registries their own kinds of credentials."""
    if isinstance(place, HuggingFaceSource | ModelScopeSource):
        return place.token_secret_ref
    return place.credentials_secret_ref


def _tracker_secrets(spec: Spec) -> Iterator[Mounted]:
    tracking = spec.tracking or Tracking()
    if tracking.wandb is not None:
        yield from _secret(WANDB_SLOT, tracking.wandb.api_key_secret_ref, WANDB_KEY_FILE)
    if tracking.mlflow is not None:
        yield from _secret(MLFLOW_SLOT, tracking.mlflow.credentials_secret_ref)


def _secret(slot: str, reference: SecretKeyRef | SecretRef | None, file: str = "") -> Iterator[Mounted]:
    """One key of a Secret as `file`, or a whole Secret, below the slot's folder."""
    if reference is None:
        return
    source: JSON = {"secretName": reference.name, "defaultMode": 0o440}
    if isinstance(reference, SecretKeyRef):
        source["items"] = [{"key": reference.key, "path": file}]
    name = f"secret-{slot}"
    yield {"name": name, "secret": source}, {"name": name, "mountPath": f"{names.SECRETS}/{slot}", "readOnly": True}
