"""The main line: `make demo`'s own command, run once, on a real model; then what its user would look at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.demo import JOB, NAMESPACE
from cluster.target import ROOT, Target
from tests.e2e.jobs import Jobs, in_cluster, work_folder

KL_LIMIT = 2e-3
BUCKETS = "/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~empty-dir"
"""Of the store's pod, as its node sees them: a folder each."""


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


@pytest.fixture
def folder(status: dict[str, Any], cluster: Target) -> Path:
    """The job's, on its claim."""
    assert status["phase"] == "Succeeded"
    return work_folder(Jobs(cluster, NAMESPACE), JOB)


def artifact(status: dict[str, Any], kind: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = [artifact for artifact in status["artifacts"] if artifact["type"] == kind]
    assert len(found) == 1
    return found[0]


def test_the_demo_shows_each_phase_the_outcome_and_what_to_try_next(
    demo: subprocess.CompletedProcess[str], status: dict[str, Any]
) -> None:
    assert status["phase"] == "Succeeded"
    phases = ("Preparing", "Training", "Merging", "Quantizing", "Publishing", "Succeeded")
    for words in (*phases, "before", "after", "published to s3://models/quickstart", "index.html", "cluster-down"):
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


def test_what_the_store_has_is_the_quantized_model_byte_for_byte(
    status: dict[str, Any], cluster: Target, folder: Path
) -> None:
    (place,) = artifact(status, "Quantized")["published"]
    there = stored(cluster, "models/quickstart")
    assert there["manifest.json"] == place["digest"].removeprefix("sha256:")
    made = json.loads((folder / "quantized" / "gptq4" / "manifest.json").read_text(encoding="utf-8"))
    assert {file["path"]: file["sha256"] for file in made["files"]}.items() <= there.items()


def stored(cluster: Target, prefix: str) -> dict[str, str]:
    """SHA-256 of every object below a prefix of the store."""
    uid = cluster.get("pod", "store", NAMESPACE)["metadata"]["uid"]
    sums = in_cluster("sh", "-c", f"cd {BUCKETS.format(uid=uid)}/{prefix} && sha256sum *").splitlines()
    return {name: digest for digest, name in (line.split("  ") for line in sums)}


def test_the_report_tells_what_the_status_tells(status: dict[str, Any], folder: Path) -> None:
    assert status["report"] == f"{folder.name}/report/index.html"
    told = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    by_name = {artifact["name"]: artifact for artifact in told["artifacts"]}
    for made in status["artifacts"]:
        for name, value in made["measured"].items():
            assert float(value) == pytest.approx(by_name[made["name"]]["measured"][name], rel=1e-3)
    assert [place["uri"] for place in told["published"]] == ["s3://models/quickstart/"]
    assert (folder / "report" / "index.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_the_manifests_that_serve_the_models_are_accepted(
    status: dict[str, Any], cluster: Target, folder: Path
) -> None:
    for name in ("adapter", "merged", "gptq4"):
        text = (folder / "report" / "serve" / f"{name}-vllm.yaml").read_text(encoding="utf-8")
        assert status["claimName"] in text
        dry = ("--dry-run=server", "--validate=strict", "--warnings-as-errors")  # Pod Security warns of its pods
        cluster.kubectl("apply", *dry, "-n", NAMESPACE, "-f", "-", stdin=text)


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
