"""A training of two pods: they meet by DNS, share a volume, are one attempt, and start again together."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.addons import SHARED_CLASS
from cluster.target import Target
from tests.e2e.conftest import remove_jobs
from tests.e2e.jobs import Jobs, adapter_digest, checkpoint_step, eventually, processes_of, send

TWO_PODS: dict[str, Any] = {
    "parallelism": {"numNodes": 2, "gpusPerNode": 0},
    "output": {
        "volume": {"create": {"size": "1Gi", "storageClassName": SHARED_CLASS, "accessModes": ["ReadWriteMany"]}}
    },
    "training": {
        "maxSteps": 40,
        "globalBatchSize": 4,
        "perDeviceTrainBatchSize": 1,
        "maxLength": 64,
        "learningRate": 0.001,
        "checkpoint": {"everySteps": 5},
        "eval": {"everySteps": 20},
    },
    "method": {"lora": {"r": 4, "dropout": 0.1}},
}


def pod_of(jobs: Jobs, name: str, index: int) -> str:
    """The running train pod with this index, once there is one."""

    def running() -> str | None:
        for pod in jobs.pods(name, "train"):
            labels = pod["metadata"]["labels"]
            of_index = labels.get("batch.kubernetes.io/job-completion-index") == str(index)
            if of_index and pod["status"]["phase"] == "Running":
                return str(pod["metadata"]["name"])
        return None

    return eventually(f"{name}'s train pod {index} runs", running)


def ranks_in_mid_run(jobs: Jobs, first: str, peer: str) -> list[int]:
    """The peer's ranks, once there is a checkpoint in mid-run; looked up before: the training goes on meanwhile."""
    eventually("a first checkpoint", lambda: checkpoint_step(jobs, first) >= 5)
    ranks = processes_of(jobs, peer)
    eventually("a checkpoint in mid-run", lambda: checkpoint_step(jobs, first) >= 10)
    return ranks


@pytest.fixture(scope="module")
def unbroken_pair(operator: Target, staged: str) -> str:
    """The digest of the adapter that two pods come to where nothing disturbs them."""
    remove_jobs(operator, staged)
    jobs = Jobs(operator, staged)
    jobs.apply("pair", **TWO_PODS)
    assert jobs.finish("pair", 600)["phase"] == "Succeeded", jobs.tell("pair")
    assert "pair-train-2" not in jobs.stage_jobs("pair")
    return adapter_digest(jobs, "pair")


def test_a_killed_peer_restarts_both_pods_which_end_with_the_same_weights(jobs: Jobs, unbroken_pair: str) -> None:
    jobs.apply("hurt", **TWO_PODS)
    first, peer = pod_of(jobs, "hurt", 0), pod_of(jobs, "hurt", 1)
    send("KILL", ranks_in_mid_run(jobs, first, peer))  # not their launcher, whose word tells what happened
    eventually("the next attempt", lambda: "hurt-train-2" in jobs.stage_jobs("hurt"))
    left = {pod["metadata"]["name"] for pod in jobs.pods("hurt", "train") if pod["status"]["phase"] == "Running"}
    assert not left & {first, peer}, "a pod of the failed attempt is still at work"
    status = jobs.finish("hurt", 600)
    assert status["phase"] == "Succeeded", jobs.tell("hurt")
    assert status["training"]["resumedFromStep"] >= 10
    assert jobs.stage_jobs("hurt") == ["hurt-merge-2", "hurt-prepare-1", "hurt-train-1", "hurt-train-2"]
    assert adapter_digest(jobs, "hurt") == unbroken_pair


def test_a_frozen_peer_is_taken_for_hung_and_both_pods_start_again(jobs: Jobs, unbroken_pair: str) -> None:
    jobs.apply("hung", **TWO_PODS, runPolicy={"stallTimeoutSeconds": 60, "checkpointGraceSeconds": 5})
    first, peer = pod_of(jobs, "hung", 0), pod_of(jobs, "hung", 1)
    send("STOP", ranks_in_mid_run(jobs, first, peer))
    told = jobs.ended("hung", 1)
    assert told["reason"] == "StalledTraining", told
    status = jobs.finish("hung", 600)
    assert status["phase"] == "Succeeded", jobs.tell("hung")
    assert status["training"]["resumedFromStep"] >= 10
    trained = [name for name in jobs.stage_jobs("hung") if "train" in name]
    assert trained == ["hung-train-2"], "the hung pods would have gone on: their Job is deleted"
    assert adapter_digest(jobs, "hung") == unbroken_pair


@pytest.mark.parametrize("sharding", ["Full", "GradOp"])
def test_a_model_trained_whole_by_two_pods_is_sharded_and_published_whole(jobs: Jobs, sharding: str) -> None:
    jobs.apply(
        "whole",
        **TWO_PODS
        | {
            "method": {"type": "Full"},
            "parallelism": {"numNodes": 2, "gpusPerNode": 0, "strategy": "FSDP", "fsdp": {"sharding": sharding}},
            "training": TWO_PODS["training"] | {"maxSteps": 6},
        },
    )
    status = jobs.finish("whole", 600)
    assert status["phase"] == "Succeeded", jobs.tell("whole")
    assert status["resolved"]["parallelism"]["strategy"] == "FSDP"
    (made,) = status["artifacts"]
    assert (made["name"], made["type"]) == ("model", "Merged")
    assert float(made["measured"]["evalLoss"]) < float(made["measured"]["evalLossBase"])
