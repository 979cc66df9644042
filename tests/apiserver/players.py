"""Pods without a kubelet: the real controllers make them, the test says how they fare."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from finetune_operator.api import Label, format_time
from tests.apiserver.api import JSON, RefusedError, Space, wait_for
from tests.unit.operator.builders import word


def now() -> str:
    return format_time(datetime.now(UTC))


def pod_of(space: Space, job: str, index: int = 0) -> JSON:
    """The pod that the Job controller made, or the one with this index."""

    def probe() -> JSON | None:
        pods = (
            pod for pod in space.all("pods") if pod["metadata"]["labels"].get("batch.kubernetes.io/job-name") == job
        )
        return next((pod for pod in pods if _index(pod) == index), None)

    return wait_for(probe, f"pod {index} of Job {job}")


def _index(pod: JSON) -> int:
    return int(pod["metadata"].get("annotations", {}).get(Label.INDEX, 0))


def bind(space: Space, pod: JSON) -> None:
    """The pod has a node, whose kubelet is the test: deleted, it stays until it is `gone`.

    A node of its own: there is no such Node, and the cluster clears away what is on one that has been missing for 40 s.
    """
    target = {"apiVersion": "v1", "kind": "Node", "name": f"played-{pod['metadata']['uid']}"}
    body = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod["metadata"]["name"]}, "target": target}
    space.call("POST", f"{space.path('pods', pod['metadata']['name'])}/binding", body)


def told_to_leave(space: Space, pod: JSON) -> None:
    """Wait until the pod is being deleted: its container would have SIGTERM now."""
    wait_for(lambda: "deletionTimestamp" in space.read("pods", pod["metadata"]["name"])["metadata"], "SIGTERM")


def gone(space: Space, pod: JSON) -> None:
    """The kubelet has cleared the pod away, or the cluster did before it (see `bind`)."""
    body = {"gracePeriodSeconds": 0, "preconditions": {"uid": pod["metadata"]["uid"]}}
    try:
        space.call("DELETE", space.path("pods", pod["metadata"]["name"]), body)
    except RefusedError as error:
        if "not found" not in str(error):
            raise


def patch_pod(space: Space, pod: JSON, status: JSON) -> None:
    path = f"{space.path('pods', pod['metadata']['name'])}/status"
    space.call("PATCH", path, {"status": status}, "application/merge-patch+json")


def container(state: JSON) -> list[JSON]:
    ready = "running" in state
    return [{"name": "trainer", "image": "x", "imageID": "x", "restartCount": 0, "ready": ready, "state": state}]


def run(space: Space, job: str, address: str = "127.0.0.1", *, index: int = 0) -> JSON:
    """The pod's container starts."""
    pod = pod_of(space, job, index)
    status = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "startTime": now()}
    patch_pod(space, pod, status | {"containerStatuses": container({"running": {"startedAt": now()}})})
    return pod


def end(space: Space, job: str, code: int = 0, message: str = "", *, index: int = 0, **status: Any) -> None:
    """The pod's container ends."""
    end_pod(space, pod_of(space, job, index), code, message, **status)


def end_pod(space: Space, pod: JSON, code: int = 0, message: str = "", **status: Any) -> None:
    """This very pod's container ends."""
    state = {"exitCode": code, "reason": "Error" if code else "Completed", "message": message}
    state |= {"startedAt": now(), "finishedAt": now()}
    phase = {"phase": "Failed" if code else "Succeeded", "containerStatuses": container({"terminated": state})}
    patch_pod(space, pod, phase | status)


def succeed(space: Space, job: str) -> None:
    """The pod ends with the last word that proves its stage."""
    labels = pod_of(space, job)["metadata"]["labels"]
    end(space, job, 0, word(labels[Label.STAGE], int(labels[Label.ATTEMPT])).to_json())


def next_job(space: Space, name: str, stage: str, attempt: int) -> str:
    """The name of the Job of this attempt, once it is there."""
    job = f"{name}-{stage}-{attempt}"
    wait_for(lambda: space.find("jobs", job), f"Job {job}")
    return job
