"""One real local cluster for all end-to-end tests, the operator on it, and tiny models on its claims."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import staging
from cluster.addons import SHARED_CLASS
from cluster.joining import numbers
from cluster.namespace import find
from cluster.paths import default_state
from cluster.target import ROOT, Target, local_target
from tests.e2e.jobs import LONG_TRAINING, Jobs, adapter_digest
from tests.tiny import make_tiny_model

NAMESPACE = "finetune-e2e"
FIRST_NODE = default_state().node_name
TEST_SECONDS = 1800
"""Of a test with the fixtures that it is the first to need: images, the demo of 5 minutes on 2 cores with nothing else
to do. Every wait has a deadline of its own."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/e2e" in item.path.as_posix() and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_SECONDS))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Target]:
    """The local cluster with both images; stopped afterwards unless it was running before."""
    was_down = find(default_state()) is None
    for left_over in () if was_down else numbers(default_state()):  # by tests that were killed; pods would go there
        subprocess.run([sys.executable, "-m", "cluster", "node", "remove", left_over], cwd=ROOT, check=True)
    yield local_target()
    if was_down:
        subprocess.run([sys.executable, "-m", "cluster", "down"], cwd=ROOT, check=True)


def quick_operator(cluster: Target, **values: object) -> None:
    """The operator, eager to report and with short deadlines; on the first node, beside which others come and go."""
    settings = {
        "operator.progressIntervalSeconds": 1,
        "operator.startDeadlineSeconds": 15,
        "nodeSelector": {"kubernetes.io/hostname": FIRST_NODE},
    }
    cluster.install_chart(**(settings | values))


@pytest.fixture(scope="module")
def operator(cluster: Target) -> Target:
    quick_operator(cluster)
    return cluster


@pytest.fixture(scope="session")
def staged(cluster: Target, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A namespace with Pod Security `restricted`, a claim with models and one with datasets."""
    folder = tmp_path_factory.mktemp("staged")
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}})
    for name in ("models", "datasets"):
        claim = staging.build_claim(name, "1Gi")
        claim["spec"] |= {"storageClassName": SHARED_CLASS, "accessModes": ["ReadWriteMany"]}  # for pods of any node
        cluster.kubectl("apply", "-n", NAMESPACE, "-f", "-", stdin=json.dumps(claim))
    staging.put_files(cluster, NAMESPACE, files(folder))
    return NAMESPACE


def files(folder: Path) -> dict[str, Path]:
    """Good and bad models and datasets, by their place on the claims."""
    make_tiny_model(folder / "tiny")
    (folder / "no-model").mkdir()
    (folder / "no-model" / "README.md").write_text("nothing here\n", encoding="utf-8")
    rows = [{"instruction": f"What is {i} plus {i}?", "output": f"It is {i + i}."} for i in range(200)]
    datasets = {
        "train.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "wrong-column.jsonl": json.dumps({"question": "?", "reply": "!"}) + "\n",
        "empty.jsonl": "",
        "no-json.jsonl": json.dumps(rows[0]) + "\n" + json.dumps(rows[1]) + "\nthis is no JSON\n",
    }
    for name, text in datasets.items():
        (folder / name).write_text(text, encoding="utf-8")
    placed = {f"datasets/{name}": folder / name for name in datasets}
    return placed | {"models/tiny": folder / "tiny", "models/no-model": folder / "no-model"}


@pytest.fixture(scope="session")
def unbroken_adapter(cluster: Target, staged: str) -> str:
    """The digest of the adapter that the long training comes to where nothing disturbs it."""
    quick_operator(cluster)
    jobs = Jobs(cluster, staged)
    remove_jobs(cluster, staged)
    jobs.apply("unbroken", **LONG_TRAINING)
    assert jobs.finish("unbroken")["phase"] == "Succeeded", jobs.tell("unbroken")
    assert jobs.stage_jobs("unbroken") == ["unbroken-merge-1", "unbroken-prepare-1", "unbroken-train-1"]
    return adapter_digest(jobs, "unbroken")


@pytest.fixture
def jobs(operator: Target, staged: str) -> Iterator[Jobs]:
    """The jobs of the staged namespace; none is left from before, all are gone afterwards."""
    remove_jobs(operator, staged)
    yield Jobs(operator, staged)
    remove_jobs(operator, staged)


def remove_jobs(cluster: Target, namespace: str) -> None:
    """All FineTuneJobs, with what belongs to them."""
    for kind in ("finetunejobs", "jobs"):
        cluster.kubectl("delete", kind, "--all", "-n", namespace, "--wait")
