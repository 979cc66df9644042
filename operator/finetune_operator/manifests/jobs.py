"""The Job of one attempt of one stage: one pod, Pod Security `restricted`, run once. Pure."""

from __future__ import annotations

from typing import Any

from finetune_operator import names
from finetune_operator.api import JSON, FineTuneJob, Label, Pod
from finetune_operator.manifests.meta import build_labels, build_metadata
from finetune_operator.names import Step
from finetune_operator.settings import Settings
from finetune_trainer.config import MODEL_TOKEN_FILE
from finetune_trainer.progress import PROGRESS_PORT, Stage

USER = 65532
GPU_RESOURCE = "nvidia.com/gpu"
GRACE_SECONDS = 120
"""For a checkpoint after SIGTERM."""

LOST_NODE_SECONDS = 30
"""A pod leaves a node that is not heard of after this long, not after Kubernetes' 300 s."""


def build_stage_job(job: FineTuneJob, step: Step, attempt: int, settings: Settings) -> JSON:
    """The Job of this attempt. Never retried by Kubernetes: the operator owns retries, each under a new number."""
    labels = {Label.STAGE: step.key, Label.ATTEMPT: str(attempt)}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": build_metadata(job, names.stage_job(job, step, attempt), labels),
        "spec": {
            "backoffLimit": 0,
            "parallelism": 1,
            "completions": 1,
            "podReplacementPolicy": "Failed",
            "template": {
                "metadata": {"labels": build_labels(job) | labels},
                "spec": build_pod_spec(job, step, attempt, settings),
            },
        },
    }


def build_pod_spec(job: FineTuneJob, step: Step, attempt: int, settings: Settings) -> JSON:
    """The pod: no token, no service links, no root, nowhere to write but its claim and /tmp."""
    pod = job.valid_spec.pod or Pod()
    volumes, mounts = _volumes(job, step)
    spec: JSON = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "tolerations": _tolerations(pod),
        "volumes": volumes,
        "containers": [_container(job, step, attempt, settings, mounts)],
    }
    return spec | _placement(pod)


def _container(job: FineTuneJob, step: Step, attempt: int, settings: Settings, mounts: list[JSON]) -> JSON:
    return {
        "name": "trainer",
        "image": settings.trainer_image,
        "imagePullPolicy": settings.image_pull_policy,
        "args": build_arguments(job, step, attempt),
        "env": [{"name": name, "value": value} for name, value in _environment(step, settings).items()],
        "ports": [{"name": "progress", "containerPort": PROGRESS_PORT}],
        "resources": _resources(job, step, settings),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        # Where the trainer could not write its last word, the end of its log says why.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    }


def build_arguments(job: FineTuneJob, step: Step, attempt: int) -> list[str]:
    """What the image's entry point, finetune-trainer, is called with."""
    arguments = [step.stage.value, "--config", f"{names.CONFIG}/{names.CONFIG_FILE}"]
    arguments += ["--work", f"{names.WORK}/{names.folder(job)}", "--attempt", str(attempt)]
    arguments += ["--progress-port", str(PROGRESS_PORT)]
    return arguments if step.entry is None else [*arguments, "--name", step.entry]


def _environment(step: Step, settings: Settings) -> dict[str, str]:
    """Prepare may reach the hub, with the administrator's endpoint and proxies; nothing after it may."""
    if step.stage is Stage.PREPARE:
        return settings.trainer_env | {"HOME": "/tmp"}  # noqa: S108 - the pod's own
    return {"HF_HUB_OFFLINE": "1", "HOME": "/tmp"}  # noqa: S108


def _resources(job: FineTuneJob, step: Step, settings: Settings) -> JSON:
    """The job's resources or the chart's. Every stage that runs the model holds the GPUs; prepare never does."""
    pod = job.valid_spec.pod or Pod()
    gpu = pod.gpu_resource_name or GPU_RESOURCE
    wish: Any = pod.resources or settings.default_resources
    requests, limits = (
        {name: amount for name, amount in (amounts or {}).items() if name != gpu}
        for amounts in (wish.requests, wish.limits)
    )
    gpus = job.valid_spec.config.gpus_per_node
    if gpus and step.stage is not Stage.PREPARE:
        limits[gpu] = str(gpus)
    return {name: amounts for name, amounts in (("requests", requests), ("limits", limits)) if amounts}


def _tolerations(pod: Pod) -> list[JSON]:
    own = [t.model_dump(by_alias=True, exclude_none=True) for t in pod.tolerations or ()]
    lost = [
        {"key": f"node.kubernetes.io/{key}", "operator": "Exists", "effect": "NoExecute"}
        | {"tolerationSeconds": LOST_NODE_SECONDS}
        for key in ("not-ready", "unreachable")
    ]
    named = {toleration.get("key") for toleration in own}
    return own + [toleration for toleration in lost if toleration["key"] not in named]


def _placement(pod: Pod) -> JSON:
    wishes = {
        "nodeSelector": pod.node_selector,
        "priorityClassName": pod.priority_class_name,
        "runtimeClassName": pod.runtime_class_name,
        "imagePullSecrets": [{"name": secret.name} for secret in pod.image_pull_secrets or ()],
    }
    return {name: wish for name, wish in wishes.items() if wish}


def _volumes(job: FineTuneJob, step: Step) -> tuple[list[JSON], list[JSON]]:
    """Volumes and their mounts: the work claim, the configuration, /tmp, and what only one stage needs."""
    pairs = [
        _claim("work", names.claim(job), names.WORK, read_only=False),
        (
            {"name": "config", "configMap": {"name": names.config_map(job)}},
            {"name": "config", "mountPath": names.CONFIG, "readOnly": True},
        ),
        ({"name": "tmp", "emptyDir": {}}, {"name": "tmp", "mountPath": "/tmp"}),  # noqa: S108
    ]
    if step.stage is Stage.PREPARE:
        pairs += _sources(job)
    if step.stage is Stage.TRAIN:
        pairs.append(({"name": "shm", "emptyDir": {"medium": "Memory"}}, {"name": "shm", "mountPath": "/dev/shm"}))  # noqa: S108
    volumes, mounts = zip(*pairs, strict=True)
    merged = {volume["name"]: volume for volume in volumes}
    return list(merged.values()), list(mounts)


def _claim(volume: str, claim: str, path: str, *, read_only: bool) -> tuple[JSON, JSON]:
    mount: JSON = {"name": volume, "mountPath": path}
    source: JSON = {"claimName": claim}
    if read_only:
        mount["readOnly"] = True
        source["readOnly"] = True  # and so Kubernetes does not hand the files to our group
    return {"name": volume, "persistentVolumeClaim": source}, mount


def _sources(job: FineTuneJob) -> list[tuple[JSON, JSON]]:
    """What prepare reads: claims, each mounted once (the work claim's own volume serves where it is a source too)."""
    work = names.claim(job)
    pairs = []
    for index, claim in enumerate(names.source_claims(job.valid_spec)):
        path = f"{names.SOURCES}/{claim}"
        if claim == work:
            pairs.append(
                (_claim("work", work, path, read_only=False)[0], {"name": "work", "mountPath": path, "readOnly": True})
            )
        else:
            pairs.append(_claim(f"source-{index}", claim, path, read_only=True))
    source = job.valid_spec.model.hugging_face
    if source is not None and source.token_secret_ref is not None:
        pairs.append(_token(source.token_secret_ref.name, source.token_secret_ref.key))
    return pairs


def _token(secret: str, key: str) -> tuple[JSON, JSON]:
    items = [{"key": key, "path": MODEL_TOKEN_FILE}]
    return (
        {"name": "model-token", "secret": {"secretName": secret, "items": items, "defaultMode": 0o440}},
        {"name": "model-token", "mountPath": names.SECRETS, "readOnly": True},
    )
