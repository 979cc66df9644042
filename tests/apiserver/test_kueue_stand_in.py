"""Queued jobs: the operator and the real Job controller beside a stand-in for Kueue. Pods are played by the test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from finetune_operator.queueing import PRIORITY_LABEL, QUEUE_LABEL
from tests.apiserver import players
from tests.apiserver.api import JSON, Space, wait_for
from tests.apiserver.kueue import STOPPING, KueueStandIn, workload_api

GPU = "nvidia.com/gpu"
QUEUED = {QUEUE_LABEL: "team-a"}
HIGH = QUEUED | {PRIORITY_LABEL: "high"}
LOW = QUEUED | {PRIORITY_LABEL: "low"}


@pytest.fixture(scope="module", autouse=True)
def _workload_api(shared_space: Space) -> Iterator[None]:
    with workload_api(shared_space):
        yield


@pytest.fixture
def kueue(space: Space) -> Iterator[KueueStandIn]:
    """A queue of 4 GPUs for one namespace."""
    with KueueStandIn(space, {GPU: 4}).running() as stand_in:
        yield stand_in
    print(stand_in.refused)


# --- the stand-in itself, by the record of what Kueue wrote


def plain_job(space: Space, name: str, gpus: int, labels: dict[str, str]) -> None:
    """A suspended Job of one pod, nobody's but Kueue's."""
    container = {
        "name": "trainer",
        "image": "x",
        "resources": {"limits": {GPU: str(gpus)}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    secure = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    pod = {"restartPolicy": "Never", "containers": [container], "securityContext": secure}
    spec = {"suspend": True, "backoffLimit": 0, "podReplacementPolicy": "Failed", "template": {"spec": pod}}
    metadata = {"name": name, "labels": labels}
    space.create("jobs", {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec})


def workload_of(space: Space, job: str) -> JSON | None:
    return next((w for w in space.all("workloads") if w["metadata"]["name"].startswith(f"job-{job}-")), None)


def said(space: Space, job: str, kind: str) -> JSON:
    """A condition of a Job's Workload."""
    conditions = (workload_of(space, job) or {}).get("status", {}).get("conditions", ())
    return next((c for c in conditions if c["type"] == kind), {})


def wait_said(space: Space, job: str, kind: str, reason: str) -> JSON:
    wait_for(lambda: said(space, job, kind).get("reason") == reason, f"{kind} {reason} of {job}")
    return said(space, job, kind)


@pytest.mark.usefixtures("kueue")
def test_the_stand_in_admits_with_one_write_and_gives_quota_back_at_the_end(space: Space) -> None:
    plain_job(space, "first", 4, QUEUED)
    players.run(space, "first")
    job, workload = space.read("jobs", "first"), workload_of(space, "first")
    assert workload is not None
    assert workload["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]
    assert {c["type"]: c["status"] for c in workload["status"]["conditions"]} == {
        "QuotaReserved": "True",
        "Admitted": "True",
    }
    template = job["spec"]["template"]["metadata"]
    assert template["annotations"] == {"kueue.x-k8s.io/workload": workload["metadata"]["name"]}
    assert template["labels"]["kueue.x-k8s.io/cluster-queue-name"] == "gpus"
    plain_job(space, "second", 2, QUEUED)
    waits = wait_said(space, "second", "QuotaReserved", "WaitingForQuota")
    assert "insufficient unused quota for nvidia.com/gpu in flavor gpu, 2 more needed" in waits["message"]
    second = space.read("jobs", "second")
    assert [c["type"] for c in second["status"]["conditions"]] == ["Suspended"], "a Job does not say why it waits"
    players.end(space, "first")
    wait_said(space, "first", "Finished", "Succeeded")
    players.run(space, "second")
    space.delete("jobs", "second")
    wait_for(lambda: workload_of(space, "second") is None, "the Workload gone with its Job")


@pytest.mark.usefixtures("kueue")
def test_the_stand_in_makes_the_lower_priority_give_way_and_takes_it_back(space: Space) -> None:
    plain_job(space, "low", 4, LOW)
    players.run(space, "low")
    bare = space.read("jobs", "low")["spec"]["template"]["metadata"]
    plain_job(space, "high", 4, HIGH)
    players.run(space, "high")
    job = space.read("jobs", "low")
    assert (job["spec"]["suspend"], "startTime" in job["status"], job["status"].get("active")) == (True, False, None)
    assert STOPPING not in job["metadata"].get("annotations", {})
    assert "kueue.x-k8s.io/workload" in bare["annotations"]
    assert "annotations" not in job["spec"]["template"]["metadata"]
    assert said(space, "low", "Evicted")["reason"] == said(space, "low", "Requeued")["reason"] == "Preempted"
    assert said(space, "low", "Preempted")["reason"] == "InClusterQueue"
    assert not any(c["type"] in ("Failed", "FailureTarget") for c in job["status"]["conditions"])
    players.end(space, "high")
    players.run(space, "low")
    assert said(space, "low", "Evicted")["message"].startswith("Previously: Preempted to accommodate")


@pytest.mark.usefixtures("kueue")
def test_the_stand_in_wins_over_whoever_else_writes_suspend(space: Space) -> None:
    plain_job(space, "first", 4, QUEUED)
    before = players.run(space, "first")
    space.merge("jobs", "first", {"spec": {"suspend": True}})
    wait_for(lambda: pods_of(space, "first") - {before["metadata"]["uid"]}, "a new pod: the work of the first is lost")
    assert said(space, "first", "QuotaReserved")["status"] == "True"
    plain_job(space, "second", 4, QUEUED)
    wait_said(space, "second", "QuotaReserved", "WaitingForQuota")
    space.merge("jobs", "second", {"spec": {"suspend": False}})
    wait_for(lambda: space.read("jobs", "second")["spec"]["suspend"], "suspended again")
    wait_for(lambda: not pods_of(space, "second"), "its pod gone")


def pods_of(space: Space, job: str) -> set[str]:
    pods = (pod for pod in space.all("pods") if pod["metadata"]["labels"].get("batch.kubernetes.io/job-name") == job)
    return {pod["metadata"]["uid"] for pod in pods if "deletionTimestamp" not in pod["metadata"]}


@pytest.mark.usefixtures("kueue")
@pytest.mark.parametrize(
    ("gpus", "queue", "reason", "message"),
    [
        pytest.param(8, "team-a", "ExceedsMaxQuota", "capacity (4)", id="more than the queue ever has"),
        pytest.param(1, "absent", "Misconfigured", "LocalQueue absent doesn't exist", id="no such queue"),
    ],
)
def test_the_stand_in_never_fails_what_it_cannot_admit(
    space: Space, gpus: int, queue: str, reason: str, message: str
) -> None:
    plain_job(space, "first", gpus, {QUEUE_LABEL: queue})
    assert message in wait_said(space, "first", "QuotaReserved", reason)["message"]
    assert space.read("jobs", "first")["spec"]["suspend"]


@pytest.mark.usefixtures("kueue")
def test_the_stand_in_makes_a_deleted_workload_anew(space: Space) -> None:
    plain_job(space, "first", 4, QUEUED)
    players.run(space, "first")
    before = workload_of(space, "first")
    assert before is not None
    space.delete("workloads", before["metadata"]["name"])

    def renewed() -> bool:
        found = workload_of(space, "first")
        return found is not None and found["metadata"]["uid"] != before["metadata"]["uid"]

    wait_for(renewed, "a new Workload")
    players.run(space, "first")
