"""The plainest possible kopf operator: on.create makes a Job, on.event patches the status. What a tutorial would write.

No claim, no configuration, no retries, no check of whose a Job is; a restart writes the status of every Job again.
"""

from __future__ import annotations

import os
from typing import Any

import kopf
from kubernetes.aio import client, config

API = ("finetune.dev", "v1alpha1")
PLURAL = "finetunejobs"


@kopf.on.startup()
async def connect(memo: Any, **_: Any) -> None:  # noqa: ANN401 - kopf's
    """One client for all handlers."""
    await config.load_kube_config(os.environ["KUBECONFIG"])  # type: ignore[no-untyped-call]
    memo.api = client.ApiClient()


@kopf.on.create(*API, PLURAL)
async def make_job(name: str, namespace: Any, memo: Any, body: kopf.Body, **_: Any) -> None:  # noqa: ANN401
    """One Job of one pod."""
    pod = {"restartPolicy": "Never", "containers": [{"name": "trainer", "image": "registry.test/trainer:1"}]}
    job: Any = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": f"{name}-prepare-1", "namespace": namespace, "labels": {"made-by": "plain"}},
        "spec": {"backoffLimit": 0, "template": {"spec": pod}},
    }
    kopf.append_owner_reference(job, owner=body)
    await client.BatchV1Api(memo.api).create_namespaced_job(namespace, job)


@kopf.on.event("batch", "v1", "jobs", labels={"made-by": "plain"})
async def tell(namespace: Any, memo: Any, body: kopf.Body, **_: Any) -> None:  # noqa: ANN401
    """The Job's state as the resource's phase."""
    owner = body["metadata"]["ownerReferences"][0]["name"]
    status = {"status": {"phase": phase(body.get("status") or {})}}
    await client.CustomObjectsApi(memo.api).patch_namespaced_custom_object_status(
        *API, namespace, PLURAL, owner, status, _content_type="application/merge-patch+json"
    )


def phase(status: dict[str, Any]) -> str:
    """What to call it."""
    if status.get("succeeded"):
        return "Succeeded"
    if status.get("failed"):
        return "Failed"
    return "Running" if status.get("active") else "Pending"
