"""The Job of one attempt of one stage: one pod, or one a node; Pod Security `restricted`, run once. Pure."""

from __future__ import annotations

from typing import Any

from finetune_operator import names
from finetune_operator.api import JSON, OVERRIDES_ANNOTATION, FineTuneJob, Label, Overrides, Pod
from finetune_operator.manifests.meta import build_labels, build_metadata
from finetune_operator.manifests.volumes import TMP, build_volumes
from finetune_operator.names import Step
from finetune_operator.queueing import QUEUE_LABEL, build_queue_labels
from finetune_operator.settings import Settings
from finetune_trainer.config import (
    CLAIM_VARIABLE,
    JOB_VARIABLE,
    REMOTE_CODE_VARIABLE,
    RENDEZVOUS_PORT,
    RENDEZVOUS_VARIABLE,
)
from finetune_trainer.progress import PROGRESS_PORT, Stage

USER = 65532
AT_REPOSITORIES = (Stage.PREPARE, Stage.PUBLISH)
"""Stages that fetch from hubs, buckets and registries, or send to them."""

LOST_NODE_SECONDS = 30
"""A pod leaves a node that is not heard of after this long, not after Kubernetes' 300 s."""


def build_stage_job(
    job: FineTuneJob, step: Step, attempt: int, settings: Settings, overrides: Overrides | None = None
) -> JSON:
    """The Job of this attempt. Never retried by Kubernetes: the operator owns retries, each under a new number."""
    labels = {Label.STAGE: step.key, Label.ATTEMPT: str(attempt)}
    metadata = build_metadata(job, names.stage_job(job, step, attempt), labels | build_queue_labels(job))
    pod = build_pod_spec(job, step, attempt, settings)
    if overrides is not None:
        metadata["annotations"] = {OVERRIDES_ANNOTATION: overrides.to_json()}
        pod["containers"][0]["args"] += override_arguments(overrides)
    queued = QUEUE_LABEL in metadata["labels"]
    held = {"suspend": True} if queued else {}  # else a pod could start before Kueue has seen the Job
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            **held,
            "backoffLimit": 0,
            "parallelism": step.pods,
            "completions": step.pods,
            **({"completionMode": "Indexed"} if step.pods > 1 else {}),
            "podReplacementPolicy": "Failed",
            "template": {
                "metadata": {"labels": build_labels(job) | labels},
                "spec": pod,
            },
        },
    }


def build_pod_spec(job: FineTuneJob, step: Step, attempt: int, settings: Settings) -> JSON:
    """The pod: no token, no service links, no root, nowhere to write but its claim and /tmp."""
    pod = job.valid_spec.pod or Pod()
    volumes, mounts = build_volumes(job, step)
    spec: JSON = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": job.valid_spec.checkpoint_grace_seconds,
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
    if step.pods > 1:
        spec["subdomain"] = names.service(job)  # and a host name each, which Kubernetes makes of Job and index
    return spec | _placement(pod)


def _container(job: FineTuneJob, step: Step, attempt: int, settings: Settings, mounts: list[JSON]) -> JSON:
    return {
        "name": "trainer",
        "image": settings.trainer_image,
        "imagePullPolicy": settings.image_pull_policy,
        "args": build_arguments(job, step, attempt),
        "env": [{"name": name, "value": value} for name, value in _environment(job, step, attempt, settings).items()],
        "ports": _ports(step),
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


def override_arguments(overrides: Overrides) -> list[str]:
    """What a training is told to change of the resolved settings; it works the accumulation out itself."""
    arguments = ["--micro-batch", str(overrides.micro_batch_size)]
    if overrides.gradient_checkpointing is None:
        return arguments
    return [*arguments, "--gradient-checkpointing", overrides.gradient_checkpointing]


def _ports(step: Step) -> list[JSON]:
    ports = [{"name": "progress", "containerPort": PROGRESS_PORT}]
    return ports if step.pods == 1 else [*ports, {"name": "rendezvous", "containerPort": RENDEZVOUS_PORT}]


def _environment(job: FineTuneJob, step: Step, attempt: int, settings: Settings) -> dict[str, str]:
    """The administrator's endpoint and proxies where the network is reached; the hub only to fetch and to publish."""
    own = {"HOME": TMP, JOB_VARIABLE: f"{job.namespace}/{job.name}", CLAIM_VARIABLE: names.claim(job)}
    if step.stage not in AT_REPOSITORIES:
        own["HF_HUB_OFFLINE"] = "1"
    if settings.allow_remote_code:
        own[REMOTE_CODE_VARIABLE] = "1"
    if step.pods > 1:
        own[RENDEZVOUS_VARIABLE] = names.rendezvous(job, step, attempt)
    asked = {variable.name: variable.value for variable in (job.valid_spec.pod or Pod()).env or ()}
    return (settings.trainer_env if _reaches_out(job, step) else {}) | asked | own


def _reaches_out(job: FineTuneJob, step: Step) -> bool:
    """Prepare fetches, publish sends; train talks to a tracker, where it is told of one that is online."""
    tracking = job.valid_spec.tracking
    if step.stage in AT_REPOSITORIES or tracking is None:
        return step.stage in AT_REPOSITORIES
    online = tracking.wandb is not None and tracking.wandb.api_key_secret_ref is not None
    return step.stage is Stage.TRAIN and (online or tracking.mlflow is not None)


def _resources(job: FineTuneJob, step: Step, settings: Settings) -> JSON:
    """The job's resources or the chart's, and the GPUs; those that the chart names are for nobody."""
    pod = job.valid_spec.pod or Pod()
    wish: Any = pod.resources or settings.default_resources
    requests, limits = (
        {name: amount for name, amount in (amounts or {}).items() if name != pod.gpu_resource}
        for amounts in (wish.requests, wish.limits)
    )
    if gpus := _gpus(job, step):
        limits[pod.gpu_resource] = str(gpus)
    return {name: amounts for name, amounts in (("requests", requests), ("limits", limits)) if amounts}


def _gpus(job: FineTuneJob, step: Step) -> int:
    """GPUs of a pod: none to fetch and send files, all that the job asks for to train, one to merge or quantize."""
    asked = job.valid_spec.gpus_per_node
    most = {Stage.PREPARE: 0, Stage.TRAIN: asked, Stage.PUBLISH: 0}.get(step.stage, 1)
    return min(asked, most)


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
