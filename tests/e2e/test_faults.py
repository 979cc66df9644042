"""Killed pods, a killed operator, a full disk, a deletion: what the user gets is the same, or a clear word."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cluster.target import OPERATOR_NAMESPACE, Target, TargetError
from tests.e2e.conftest import remove_jobs
from tests.e2e.jobs import (
    LONG_TRAINING,
    Jobs,
    adapter_digest,
    checkpoint_step,
    eventually,
    in_cluster,
    in_mid_run,
    inhabitants,
    send,
    tiny_spec,
    work_folder,
)

QUANTIZE = {"quantize": [{"name": "g4", "method": "GPTQ", "calibration": {"samples": 8, "maxLength": 64}}]}
NO_MERGE = {"merge": {"policy": "Never"}}
STAGES = ("prepare", "train", "merge", "quantize-0")


def test_killed_pods_and_a_killed_operator_change_nothing_in_the_outcome(jobs: Jobs, unbroken_adapter: str) -> None:
    jobs.apply("broken", **LONG_TRAINING, **QUANTIZE)
    for stage in STAGES:
        pod = jobs.running_pod("broken", stage)
        kill_operator(jobs.target)
        if stage == "train":
            kill_in_mid_run(jobs, "broken", pod)
            kill_operator(jobs.target)
    status = jobs.finish("broken", 600)
    assert status["phase"] == "Succeeded", jobs.tell("broken")
    assert jobs.stage_jobs("broken") == sorted(
        ["broken-prepare-1", "broken-train-1", "broken-train-2", "broken-merge-2", "broken-quantize-0-2"]
    )
    assert status["training"]["resumedFromStep"] >= 20
    assert status["retries"] == 1
    assert adapter_digest(jobs, "broken") == unbroken_adapter


def kill_in_mid_run(jobs: Jobs, name: str, pod: str) -> None:
    """SIGKILL a trainer some steps after a checkpoint, and wait for the next."""
    eventually("a checkpoint in mid-run", lambda: checkpoint_step(jobs, pod) >= 20)
    in_cluster("pkill", "-KILL", "-f", f"finetune-trainer train .*/{name}-")
    eventually("a new train pod", lambda: other_pod(jobs, name, "train", pod))


def other_pod(jobs: Jobs, name: str, stage: str, before: str) -> str | None:
    names = [pod["metadata"]["name"] for pod in jobs.pods(name, stage) if pod["status"]["phase"] == "Running"]
    return next((found for found in names if found != before), None)


def kill_operator(target: Target) -> None:
    """End the operator's process without a moment's grace; its Deployment starts another."""
    target.kubectl(
        "delete", "pods", "-n", OPERATOR_NAMESPACE, "-l", "app.kubernetes.io/name=finetune-operator",
        "--grace-period=0", "--force",
    )  # fmt: skip


def test_a_killed_leader_is_replaced_while_a_job_trains_and_nothing_is_made_twice(
    jobs: Jobs, unbroken_adapter: str
) -> None:
    jobs.apply("led", **LONG_TRAINING, **NO_MERGE)
    jobs.running_pod("led", "train")
    leader = holder(jobs.target)
    processes = inhabitants(jobs.target, OPERATOR_NAMESPACE, leader.partition("_")[0])
    in_mid_run(jobs, "led")  # looked up before: the training must not end meanwhile
    send("KILL", processes)
    status = jobs.finish("led")
    assert status["phase"] == "Succeeded", jobs.tell("led")
    assert holder(jobs.target) not in ("", leader)
    assert jobs.stage_jobs("led") == ["led-prepare-1", "led-train-1"]
    assert status["attemptCount"] == 1
    assert adapter_digest(jobs, "led") == unbroken_adapter


def holder(target: Target) -> str:
    """Which process leads, as the Lease has it: <pod>_<random>."""
    lease = target.get("lease", "finetune-operator", OPERATOR_NAMESPACE)
    return str(lease["spec"].get("holderIdentity", ""))


@pytest.mark.chaos
def test_deletion_in_any_phase_leaves_no_pod_and_keeps_the_claim(
    jobs: Jobs, rng: random.Random, full_trials: bool
) -> None:
    for stage in STAGES if full_trials else [rng.choice(STAGES)]:
        name = f"deleted-in-{stage}"
        jobs.apply(name, **LONG_TRAINING, **QUANTIZE)
        jobs.running_pod(name, stage)
        claim = jobs.status(name)["claimName"]
        jobs.target.kubectl("delete", "finetunejob", name, "-n", jobs.namespace, "--wait")
        eventually("its pods are gone", partial(gone, jobs, name))
        assert jobs.stage_jobs(name) == []
        assert jobs.target.get("pvc", claim, jobs.namespace)["status"]["phase"] == "Bound"


def test_a_suspended_training_frees_its_pod_and_goes_on_as_the_same_attempt(jobs: Jobs, unbroken_adapter: str) -> None:
    jobs.apply("asleep", **LONG_TRAINING, **NO_MERGE)
    in_mid_run(jobs, "asleep")
    jobs.patch("asleep", suspend=True)
    eventually("it is suspended", lambda: jobs.status("asleep")["phase"] == "Suspended" and no_pods(jobs, "asleep"))
    assert jobs.condition("asleep", "Suspended")["status"] == "True"
    assert jobs.stage_jobs("asleep") == ["asleep-prepare-1"]
    assert checkpoints(jobs, "asleep"), "the checkpoint is kept"
    jobs.patch("asleep", suspend=False)
    status = jobs.finish("asleep")
    assert status["phase"] == "Succeeded", jobs.tell("asleep")
    assert (status["attemptCount"], status.get("retries", 0)) == (1, 0)
    assert jobs.stage_jobs("asleep") == ["asleep-prepare-1", "asleep-train-1"]
    assert status["training"]["resumedFromStep"] >= 20
    assert jobs.condition("asleep", "Suspended")["status"] == "False"
    assert adapter_digest(jobs, "asleep") == unbroken_adapter


def test_a_cancelled_training_ends_for_good_and_keeps_its_claim_and_checkpoint(jobs: Jobs) -> None:
    jobs.apply("unwanted", **LONG_TRAINING)
    in_mid_run(jobs, "unwanted")
    jobs.patch("unwanted", cancel=True)
    status = jobs.finish("unwanted")
    assert status["phase"] == "Cancelled", jobs.tell("unwanted")
    found = jobs.condition("unwanted", "Succeeded")
    assert (found["status"], found["reason"]) == ("False", "Cancelled")
    eventually("its pods are gone", lambda: no_pods(jobs, "unwanted"))
    assert checkpoints(jobs, "unwanted")
    with pytest.raises(TargetError, match="cancel"):
        jobs.patch("unwanted", cancel=False)


def no_pods(jobs: Jobs, name: str) -> bool:
    """Whether nothing of a job is at work any more."""
    pods = [pod for stage in STAGES for pod in jobs.pods(name, stage)]
    return all(pod["status"]["phase"] in ("Succeeded", "Failed") for pod in pods)


def checkpoints(jobs: Jobs, name: str) -> list[Path]:
    return list(work_folder(jobs, name).glob("checkpoints/*/manifest.json"))


def test_a_simulated_shortage_of_gpu_memory_is_healed_with_the_same_global_batch(jobs: Jobs) -> None:
    training = LONG_TRAINING["training"] | {"maxSteps": 20, "perDeviceTrainBatchSize": 4}
    jobs.apply("tight", **LONG_TRAINING | {"training": training}, **NO_MERGE, pod=drill("step=12,micro-batch=1"))
    status = jobs.finish("tight")
    assert status["phase"] == "Succeeded", jobs.tell("tight")
    tries = [attempt for attempt in status["attempts"] if attempt["stage"] == "train"]
    assert [attempt["reason"] for attempt in tries] == ["OutOfMemory", "OutOfMemory", "Completed"]
    assert "Restarting with micro-batch 2 and the same global batch of 4." in tries[0]["message"]
    assert [attempt.get("overrides", {}).get("microBatchSize") for attempt in tries] == [None, 2, 1]
    assert [attempt["overrides"]["gradientAccumulationSteps"] for attempt in tries[1:]] == [2, 4]
    assert status["training"]["resumedFromStep"] == 10
    assert status.get("retries", 0) == 0, "these steps count against no limit"


def test_a_simulated_shortage_of_gpu_memory_that_nothing_heals_ends_with_the_way_out(jobs: Jobs) -> None:
    training = LONG_TRAINING["training"] | {"maxSteps": 20}
    jobs.apply("never", **LONG_TRAINING | {"training": training}, pod=drill("step=2,micro-batch=0"))
    status = jobs.finish("never")
    assert status["phase"] == "Failed", jobs.tell("never")
    assert jobs.condition("never", "Succeeded")["reason"] == "OutOfMemory"
    for word in ("step 2", "micro-batch 1", "larger GPU"):
        assert word in status["message"]
    tries = [attempt for attempt in status["attempts"] if attempt["stage"] == "train"]
    assert [attempt.get("overrides", {}).get("microBatchSize") for attempt in tries] == [None, 1, 1]
    assert tries[-1]["overrides"]["gradientCheckpointing"] == "Full"
    assert status.get("retries", 0) == 0


def gone(jobs: Jobs, name: str) -> bool:
    """Whether no pod of a job is left."""
    return not any(jobs.pods(name, stage) for stage in STAGES)


def drill(asked: str) -> dict[str, Any]:
    """A pod whose trainer simulates a GPU that runs out of memory."""
    pod: dict[str, Any] = tiny_spec()["pod"]
    return pod | {"env": [*pod["env"], {"name": "FINETUNE_DRILL_OUT_OF_MEMORY", "value": asked}]}


@pytest.fixture
def small_disk(operator: Target, staged: str) -> Iterator[tuple[str, Path]]:
    """A claim on a small volume of its own, and its folder inside the cluster."""
    folder = Path("/tmp/finetune-small-disk")  # noqa: S108 - inside the cluster's own mount namespace
    in_cluster("mkdir", "-p", str(folder))
    in_cluster("mount", "-t", "tmpfs", "-o", "size=96m,mode=0777", "tmpfs", str(folder))
    node = json.loads(operator.kubectl("get", "nodes", "-o", "json"))["items"][0]["metadata"]["name"]
    operator.apply(small_volume(folder, node), small_claim(staged))
    yield "small", folder
    remove_jobs(operator, staged)
    operator.kubectl("delete", "pvc", "small", "-n", staged, "--wait")
    operator.kubectl("delete", "pv", "finetune-small", "--wait")
    in_cluster("umount", str(folder))


def small_volume(folder: Path, node: str) -> dict[str, Any]:
    affinity = {"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": "finetune-small"},
        "spec": {
            "capacity": {"storage": "96Mi"},
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": "small",
            "local": {"path": str(folder)},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [affinity]}]}},
        },
    }


def small_claim(namespace: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "small", "namespace": namespace},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": "small",
            "volumeName": "finetune-small",
            "resources": {"requests": {"storage": "96Mi"}},
        },
    }


def test_a_full_volume_ends_with_a_clear_word_and_keeps_the_last_good_checkpoint(
    jobs: Jobs, small_disk: tuple[str, Path]
) -> None:
    claim, folder = small_disk
    training = LONG_TRAINING["training"] | {"maxSteps": 5000}
    jobs.apply("full", training=training, output={"volume": {"existing": {"claimName": claim}}})
    pod = jobs.running_pod("full", "train")
    eventually("a first checkpoint", lambda: checkpoint_step(jobs, pod) >= 10)
    in_cluster("sh", "-c", f"dd if=/dev/zero of={folder}/somebody-elses bs=4k 2>/dev/null || true")
    status = jobs.finish("full")
    assert status["phase"] == "Failed"
    assert jobs.condition("full", "Succeeded")["reason"] == "VolumeFull", jobs.tell("full")
    assert "checkpoint" in status["message"]
    listing = in_cluster("find", str(folder), "-path", "*/checkpoints/*", "-name", "manifest.json").split()
    assert listing, "no checkpoint was left"
    for manifest in map(Path, listing):
        for file in json.loads(in_cluster("cat", str(manifest)))["files"]:
            digest = in_cluster("sha256sum", str(manifest.parent / file["path"])).split()[0]
            assert digest == file["sha256"].removeprefix("sha256:")
    assert not [line for line in in_cluster("find", str(folder), "-name", "*partial*").split() if line]
