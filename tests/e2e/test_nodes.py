"""What nodes do to pods: told, uncounted, healed. A pod is evicted, tainted away, preempted, has no room, or its node
is lost while the pod works on: real kubelets, the second one's containers going on where it is killed.

Two nodes; GPUs are only counted (an extended resource on the node's status), the trainings run on CPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from cluster import base_image
from cluster.addons import SHARED_CLASS
from cluster.target import ROOT, Target
from tests.e2e.conftest import FIRST_NODE
from tests.e2e.jobs import (
    LONG_TRAINING,
    Jobs,
    adapter_digest,
    eventually,
    in_cluster,
    in_mid_run,
    processes_of,
    send,
    tiny_spec,
    work_folder,
)

SECOND = "second"
GPU = "nvidia.com/gpu"
TRAINING = LONG_TRAINING | {
    "merge": {"policy": "Never"},
    "output": {
        "volume": {"create": {"size": "1Gi", "storageClassName": SHARED_CLASS, "accessModes": ["ReadWriteMany"]}}
    },
}
"""On a volume that pods of both nodes reach."""


def node(change: str) -> None:
    subprocess.run([sys.executable, "-m", "cluster", "node", change, SECOND], cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def second_node(cluster: Target) -> Iterator[str]:
    """A second node of the cluster, with the images of the first."""
    assert cluster.kubeconfig, "only the local cluster can be given nodes"
    node("add")
    yield SECOND
    node("remove")


@contextmanager
def cordoned(target: Target, name: str) -> Iterator[None]:
    """No new pod comes to the node meanwhile."""
    target.kubectl("cordon", name)
    try:
        yield
    finally:
        target.kubectl("uncordon", name)


def evict(jobs: Jobs, pod: str) -> None:
    metadata = {"name": pod, "namespace": jobs.namespace}
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
    path = f"/api/v1/namespaces/{jobs.namespace}/pods/{pod}/eviction"
    jobs.target.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(eviction))


def check_outcome(jobs: Jobs, name: str, unbroken: str) -> None:
    """Run again from a checkpoint, uncounted, with the outcome of an undisturbed training."""
    status = jobs.finish(name)
    assert status["phase"] == "Succeeded", jobs.tell(name)
    assert status["attemptCount"] >= 2  # a kubelet may refuse the pod once: it has not heard yet that a taint is gone
    assert status.get("retries", 0) == 0
    assert status["training"]["resumedFromStep"] >= 20
    assert adapter_digest(jobs, name) == unbroken


def test_an_evicted_training_says_so_and_goes_on_from_its_checkpoint(jobs: Jobs, unbroken_adapter: str) -> None:
    jobs.apply("drained", **TRAINING)
    evict(jobs, in_mid_run(jobs, "drained"))
    told = jobs.ended("drained", 1)
    assert (told["reason"], told["retry"]) == ("Evicted", "Free"), told
    assert "evicted" in told["message"]
    check_outcome(jobs, "drained", unbroken_adapter)


def test_a_tainted_node_is_left_and_taken_again_when_the_taint_is_gone(
    jobs: Jobs, second_node: str, unbroken_adapter: str
) -> None:
    taint = "maintenance=now:NoExecute"
    with cordoned(jobs.target, FIRST_NODE):
        jobs.apply("tainted", **TRAINING)
        in_mid_run(jobs, "tainted")
        jobs.target.kubectl("taint", "nodes", second_node, taint)
        try:
            told = jobs.ended("tainted", 1)
            assert (told["reason"], told["retry"]) == ("Evicted", "Free"), told
            assert "NoExecute taint" in told["message"]
            eventually("it waits for a node", lambda: jobs.status("tainted")["reason"] == "Unschedulable")
            message = jobs.status("tainted")["message"]
            for word in ("0/2 nodes", "untolerated taint", "were unschedulable"):
                assert word in message
        finally:
            jobs.target.kubectl("taint", "nodes", second_node, f"{taint}-")
        check_outcome(jobs, "tainted", unbroken_adapter)
    pods = jobs.pods("tainted", "train")
    assert {pod["spec"]["nodeName"] for pod in pods} == {second_node}


def test_a_lost_node_is_not_waited_for_and_its_trainer_still_alive_changes_nothing_any_more(
    jobs: Jobs, second_node: str, unbroken_adapter: str
) -> None:
    """It freezes as the cable is cut, and wakes when its successor has done its work: the worst moment to commit."""
    jobs.apply("lost", **TRAINING, pod=tiny_spec()["pod"] | {"tolerations": [LEAVES_SOON]})
    with cordoned(jobs.target, FIRST_NODE):
        trainer = processes_of(jobs, jobs.running_pod("lost", "train"))
        pod = in_mid_run(jobs, "lost")
        send("STOP", trainer)
    node("lose")
    try:
        told = jobs.ended("lost", 1)
        assert (told["reason"], told["retry"]) == ("NodeLost", "Free"), told
        check_outcome(jobs, "lost", unbroken_adapter)
        assert "deletionTimestamp" in jobs.target.get("pod", pod, jobs.namespace)["metadata"], "nobody waited for it"
        before = committed(jobs, "lost")
        send("CONT", trainer)
        eventually("the old trainer gives up", lambda: not alive(trainer))
        said = log_on(second_node, pod)
        assert "Attempt 2 of this job has started since" in said, said[-2000:]
        assert committed(jobs, "lost") == before
    finally:
        node("add")
    eventually("the pod is cleared away", lambda: pod not in names_of(jobs.pods("lost", "train")))


@pytest.mark.chaos
def test_a_trainer_that_goes_on_writing_behind_a_cut_cable_is_shut_out_by_its_successor(
    jobs: Jobs, second_node: str, full_trials: bool
) -> None:
    """Both write for a while, each what it may: what comes of it is what an undisturbed training comes to."""
    if not full_trials:
        pytest.skip("takes minutes: make chaos")
    training = TRAINING | {"training": TRAINING["training"] | {"maxSteps": 2000}}
    jobs.apply("cut", **training, pod=tiny_spec()["pod"] | {"tolerations": [LEAVES_SOON]})
    with cordoned(jobs.target, FIRST_NODE):
        trainer = processes_of(jobs, jobs.running_pod("cut", "train"))
        pod = in_mid_run(jobs, "cut")
    node("lose")
    try:
        assert jobs.ended("cut", 1)["reason"] == "NodeLost", jobs.tell("cut")
        eventually("the old trainer gives up", lambda: not alive(trainer))
        assert "Attempt 2 of this job has started since" in log_on(second_node, pod)
        status = jobs.finish("cut", 900)
        assert status["phase"] == "Succeeded", jobs.tell("cut")
    finally:
        node("add")
    jobs.apply("calm", **training)
    assert jobs.finish("calm", 900)["phase"] == "Succeeded"
    assert adapter_digest(jobs, "cut") == adapter_digest(jobs, "calm")


LEAVES_SOON = {
    "key": "node.kubernetes.io/unreachable",
    "operator": "Exists",
    "effect": "NoExecute",
    "tolerationSeconds": 5,
}


def committed(jobs: Jobs, name: str) -> dict[str, tuple[int, int]]:
    """Every file of the work folder but the hidden ones of runs under way, and which attempt lives: inode and time."""
    folder = work_folder(jobs, name)
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    kept = [path for path in files if path.name == ".live-attempt" or not any(p.startswith(".") for p in path.parts)]
    found = {str(path): (folder / path).stat() for path in kept}
    return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in found.items()}


def alive(processes: list[int]) -> bool:
    found = in_cluster("sh", "-c", f"ls -d {' '.join(f'/proc/{number}' for number in processes)} 2>/dev/null || true")
    return bool(found.split())


def log_on(name: str, pod: str) -> str:
    """A pod's log as its node keeps it: a lost node answers nobody."""
    return in_cluster("sh", "-c", f"cat /var/log/pods-{name}/*_{pod}_*/trainer/*.log")


def names_of(pods: list[dict[str, Any]]) -> set[str]:
    return {pod["metadata"]["name"] for pod in pods}


@pytest.fixture
def one_gpu(cluster: Target) -> Iterator[None]:
    """The first node says that it has one GPU: counted by scheduler and kubelet, seen by no container."""
    place = f"/status/{{}}/{GPU.replace('/', '~1')}"
    for change in ("add", "remove"):
        patch = [{"op": change, "path": place.format(amount), "value": "1"} for amount in ("capacity", "allocatable")]
        cluster.kubectl("patch", "node", FIRST_NODE, "--subresource=status", "--type=json", "-p", json.dumps(patch))
        if change == "add":
            yield


@pytest.fixture
def urgent(cluster: Target, staged: str) -> Iterator[dict[str, Any]]:
    """A pod that wants the GPU, and is worth more than a training."""
    cluster.apply(
        {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": "urgent"}, "value": 1000}
    )
    yield urgent_pod(staged)
    cluster.kubectl("delete", "pod", "urgent", "-n", staged, "--ignore-not-found", "--wait")
    cluster.kubectl("delete", "priorityclass", "urgent")


def urgent_pod(namespace: str) -> dict[str, Any]:
    container = {
        "name": "main",
        "image": base_image.reference(),
        "command": ["sleep", "1000"],
        "resources": {"limits": {GPU: "1"}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    spec = {
        "priorityClassName": "urgent",
        "terminationGracePeriodSeconds": 0,
        "containers": [container],
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "urgent", "namespace": namespace},
        "spec": spec,
    }


@pytest.mark.usefixtures("one_gpu")
def test_a_preempted_training_says_so_and_goes_on_when_there_is_room_again(
    jobs: Jobs, urgent: dict[str, Any], unbroken_adapter: str
) -> None:
    pod = tiny_spec()["pod"]
    pod["resources"]["limits"] |= {GPU: "1"}
    pod["gpuResourceName"] = "example.com/none"  # so that the spec may count the other by hand, and train on CPU
    jobs.apply("outranked", **TRAINING, pod=pod)
    in_mid_run(jobs, "outranked")
    jobs.target.apply(urgent)
    told = jobs.ended("outranked", 1)
    assert (told["reason"], told["retry"]) == ("Preempted", "Free"), told
    eventually("it waits for the GPU", lambda: jobs.status("outranked")["reason"] == "Unschedulable")
    assert f"Insufficient {GPU}" in jobs.status("outranked")["message"]
    jobs.target.kubectl("delete", "pod", "urgent", "-n", jobs.namespace, "--wait")
    check_outcome(jobs, "outranked", unbroken_adapter)


@pytest.mark.usefixtures("one_gpu")
def test_more_gpus_than_any_node_has_are_named(jobs: Jobs) -> None:
    jobs.apply("greedy", parallelism={"gpusPerNode": 2}, runPolicy={"startDeadlineSeconds": 20})
    status = jobs.finish("greedy")
    assert status["phase"] == "Failed", jobs.tell("greedy")
    assert jobs.condition("greedy", "Succeeded")["reason"] == "DeadlineExceeded"
    assert f"Insufficient {GPU}" in status["message"]
    assert jobs.stage_jobs("greedy") == ["greedy-prepare-1"], "a Job whose pod never began is deleted"
