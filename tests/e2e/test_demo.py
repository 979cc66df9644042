"""The main line: `make demo`'s own command, run once, on a real model; then what its user would look at."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from cluster.demo import JOB, NAMESPACE
from cluster.target import ROOT, Target

KL_LIMIT = 2e-3


@pytest.fixture(scope="module")
def demo(cluster: Target) -> subprocess.CompletedProcess[str]:
    assert cluster.kubeconfig, "the demo works on the local cluster"
    done = subprocess.run([sys.executable, "-m", "cluster.demo"], cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout)
    print(done.stderr, file=sys.stderr)
    return done


@pytest.fixture(scope="module")
def status(demo: subprocess.CompletedProcess[str], cluster: Target) -> dict[str, Any]:
    assert demo.returncode == 0, demo.stdout + demo.stderr
    found: dict[str, Any] = cluster.get("finetunejob", JOB, NAMESPACE)["status"]
    return found


def artifact(status: dict[str, Any], kind: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = [artifact for artifact in status["artifacts"] if artifact["type"] == kind]
    assert len(found) == 1
    return found[0]


def test_the_demo_shows_each_phase_the_outcome_and_what_to_try_next(
    demo: subprocess.CompletedProcess[str], status: dict[str, Any]
) -> None:
    assert status["phase"] == "Succeeded"
    for words in ("Preparing", "Training", "Merging", "Quantizing", "Succeeded", "before", "after", "cluster-down"):
        assert words in demo.stdout


def test_the_held_out_loss_falls_by_training(status: dict[str, Any]) -> None:
    measured = artifact(status, "Adapter")["measured"]
    assert float(measured["evalLoss"]) < float(measured["evalLossBase"]) - 0.2


def test_the_merged_model_is_the_trained_model(status: dict[str, Any]) -> None:
    measured = artifact(status, "Merged")["measured"]
    assert 0 <= float(measured["klDivergence"]) < KL_LIMIT
    assert float(measured["top1Agreement"]) > 0.9


def test_the_quantized_model_was_loaded_and_measured(status: dict[str, Any]) -> None:
    quantized, merged = artifact(status, "Quantized"), artifact(status, "Merged")
    assert float(quantized["measured"]["perplexity"]) > 1
    assert float(quantized["measured"]["evalLoss"]) < float(artifact(status, "Adapter")["measured"]["evalLossBase"])
    assert quantized["sizeBytes"] < merged["sizeBytes"]


def test_kubectl_tells_the_story(status: dict[str, Any], cluster: Target) -> None:
    listed = cluster.kubectl("get", "ftj", JOB, "-n", NAMESPACE)
    for words in ("PHASE", "PROGRESS", "LOSS", "ETA", "Succeeded", "24/24 (100%)", status["training"]["loss"]):
        assert words in listed
    described = cluster.kubectl("describe", "ftj", JOB, "-n", NAMESPACE)
    for words in ("Training", "Merging", "Quantizing", "Held-out loss"):
        assert words.lower() in described.lower()
    cluster.kubectl("wait", f"ftj/{JOB}", "-n", NAMESPACE, "--for=condition=Finished", "--timeout=5s")


def test_all_pods_fit_pod_security_restricted_and_are_read_only(status: dict[str, Any], cluster: Target) -> None:
    selector = f"finetune.dev/job-name={JOB}"
    pods = json.loads(cluster.kubectl("get", "pods", "-n", NAMESPACE, "-l", selector, "-o", "json"))
    assert len(pods["items"]) == len(status["stages"])
    for pod in pods["items"]:
        (container,) = pod["spec"]["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        assert not pod["spec"]["automountServiceAccountToken"]
