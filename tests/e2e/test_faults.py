"""Killed pods, a killed operator, a full disk, a deletion: what the user gets is the same, or a clear word."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.staging import read_file
from cluster.target import OPERATOR_NAMESPACE, Target, TargetError
from tests.e2e.conftest import remove_jobs
from tests.e2e.jobs import Jobs, eventually, in_cluster

LONG_TRAINING: dict[str, Any] = {
    "training": {
        "maxSteps": 100,
        "globalBatchSize": 4,
        "perDeviceTrainBatchSize": 2,
        "maxLength": 64,
        "learningRate": 0.001,
        "checkpoint": {"everySteps": 10},
        "eval": {"everySteps": 50},
    },
    "method": {"lora": {"r": 4, "dropout": 0.1}},
}
QUANTIZE = {"quantize": [{"name": "g4", "method": "GPTQ", "calibration": {"samples": 8, "maxLength": 64}}]}
STAGES = ("prepare", "train", "merge", "quantize-0")


def adapter_digest(jobs: Jobs, name: str) -> str:
    """The digest of the adapter's weights, as its manifest has it."""
    status = jobs.status(name)
    text = read_file(jobs.target, jobs.namespace, status["claimName"], f"{status['folder']}/adapter/manifest.json")
    (digest,) = [f["sha256"] for f in json.loads(text)["files"] if f["path"] == "adapter_model.safetensors"]
    return str(digest)


def step_of(jobs: Jobs, pod: str) -> int:
    """The checkpoint that a running train pod has reached, 0 before the first."""
    try:
        path = f"/api/v1/namespaces/{jobs.namespace}/pods/{pod}:8080/proxy/progress"
        text = jobs.target.kubectl("get", "--raw", path)
    except TargetError:
        return 0
    return int(json.loads(text).get("checkpointStep") or 0)


def test_killed_pods_and_a_killed_operator_change_nothing_in_the_outcome(jobs: Jobs) -> None:
    spec = LONG_TRAINING | QUANTIZE
    jobs.apply("unbroken", **spec)
    assert jobs.finish("unbroken", 600)["phase"] == "Succeeded", jobs.tell("unbroken")
    assert jobs.stage_jobs("unbroken") == sorted(
        f"unbroken-{stage}-1" for stage in ("prepare", "train", "merge", "quantize-0")
    )

    jobs.apply("broken", **spec)
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
    assert adapter_digest(jobs, "broken") == adapter_digest(jobs, "unbroken")


def kill_in_mid_run(jobs: Jobs, name: str, pod: str) -> None:
    """SIGKILL a trainer some steps after a checkpoint, and wait for the next."""
    eventually("a checkpoint in mid-run", lambda: step_of(jobs, pod) >= 20)
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


def test_deletion_while_training_leaves_no_pod_and_keeps_the_claim(jobs: Jobs) -> None:
    jobs.apply("deleted", **LONG_TRAINING)
    jobs.running_pod("deleted", "train")
    claim = jobs.status("deleted")["claimName"]
    jobs.target.kubectl("delete", "finetunejob", "deleted", "-n", jobs.namespace, "--wait")
    eventually("its pods are gone", lambda: not any(jobs.pods("deleted", stage) for stage in STAGES))
    assert jobs.stage_jobs("deleted") == []
    assert jobs.target.get("pvc", claim, jobs.namespace)["status"]["phase"] == "Bound"


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
    eventually("a first checkpoint", lambda: step_of(jobs, pod) >= 10)
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
