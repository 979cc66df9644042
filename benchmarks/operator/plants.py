"""Objects made in numbers: jobs to be done, jobs that look as if the operator had finished them, pods of others."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.operator.client import APPLY, Client, many, path
from finetune_operator.api import API_VERSION, KIND, MANAGER, Label

JSON = dict[str, Any]
SPEC: JSON = {
    "model": {"huggingFace": {"repo": "Qwen/Qwen2.5-3B-Instruct"}},
    "datasets": [{"huggingFace": {"repo": "databricks/databricks-dolly-15k"}}],
    "parallelism": {"gpusPerNode": 0},
    "runPolicy": {"stopAfter": "Prepare"},
}
NOBODY = "benchmark/nobody"
"""Who manages planted Jobs, and schedules planted pods."""

JOB_LABELS = ("batch.kubernetes.io/job-name", "job-name", "batch.kubernetes.io/controller-uid", "controller-uid")
"""Set by Kubernetes itself."""


def resource(name: str) -> JSON:
    """A FineTuneJob of one stage."""
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name}, "spec": SPEC}


def job_of(name: str) -> str:
    """The name of its Job."""
    return f"{name}-prepare-1"


def bare_job(name: str) -> JSON:
    """The least Job that a FineTuneJob could have."""
    pod = {"restartPolicy": "Never", "containers": [{"name": "trainer", "image": "registry.test/trainer:1"}]}
    spec = {"backoffLimit": 0, "template": {"spec": pod}}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job_of(name)}, "spec": spec}


async def foreign_pods(client: Client, number: int) -> None:
    """Pods that are none of an operator's business."""
    pod = {"schedulerName": NOBODY, "containers": [{"name": "x", "image": "registry.test/x"}]}
    await many(
        partial(client.create, "pods", {"metadata": {"name": f"foreign-{index:05}"}, "spec": pod})
        for index in range(number)
    )


async def finished_jobs(client: Client, model: str, number: int) -> None:
    """Copies of a job that an operator has finished, each with a Job and a pod as that one has."""
    done = await client.call("GET", path("finetunejobs", model))
    job = await client.call("GET", path("jobs", job_of(model)))
    pods = await client.call("GET", f"{path('pods')}?labelSelector={JOB_LABELS[0]}={job_of(model)}")
    found = Finished(done, job, pods["items"][0])
    await many(partial(_plant, client, found, f"done-{index:05}") for index in range(number))


@dataclass(frozen=True)
class Finished:
    """A finished FineTuneJob, its Job and its pod."""

    done: JSON
    job: JSON
    pod: JSON


async def _plant(client: Client, model: Finished, name: str) -> None:
    done = _copy(model.done, name)
    made = await client.create("finetunejobs", done)
    await client.patch_status("finetunejobs", name, _applied(model.done), APPLY, f"?fieldManager={MANAGER}")
    job = _copy(model.job, job_of(name), made)
    job["spec"] = _without(job["spec"], "selector", "suspend") | {"managedBy": NOBODY}
    job["spec"]["template"]["metadata"]["labels"] = job["metadata"]["labels"]
    await client.create("jobs", job)
    await client.patch_status("jobs", job_of(name), {"status": model.job["status"]})
    pod = _copy(model.pod, f"{job_of(name)}-x", made)
    pod["spec"] = _without(pod["spec"], "nodeName") | {"schedulerName": NOBODY}
    await client.create("pods", pod)
    await client.patch_status("pods", f"{job_of(name)}-x", {"status": model.pod["status"]})


def _copy(body: JSON, name: str, owner: JSON | None = None) -> JSON:
    """A body as that of a new object, which belongs to another FineTuneJob."""
    kept = {key: body["metadata"].get(key) or {} for key in ("labels", "annotations")}
    labels = _without(kept["labels"], *JOB_LABELS)
    metadata: JSON = {"name": name, "labels": labels, "annotations": kept["annotations"]}
    if owner is not None:
        told = {"name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"]}
        metadata["ownerReferences"] = [{"apiVersion": API_VERSION, "kind": KIND, "controller": True} | told]
        ours = {Label.JOB_NAME: told["name"], Label.JOB_UID: told["uid"]}
        metadata["labels"] = labels | {key: value for key, value in ours.items() if key in labels}
    return copy.deepcopy(_without(body, "status", "metadata")) | {"metadata": metadata}


def _applied(body: JSON) -> JSON:
    return {"apiVersion": API_VERSION, "kind": KIND, "status": body["status"]}


def _without(body: JSON, *keys: str) -> JSON:
    return {key: value for key, value in body.items() if key not in keys}
