"""A queued training on real pods: a stand-in for Kueue stops it half way, and lets it go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.api import Api
from finetune_operator.queueing import QUEUE_LABEL
from tests.apiserver.api import Space
from tests.apiserver.kueue import KueueStandIn, workload_api
from tests.e2e.jobs import LONG_TRAINING, Jobs, adapter_digest, eventually, in_mid_run, tiny_spec

NO_MERGE = {"merge": {"policy": "Never"}}


@pytest.fixture
def space(jobs: Jobs) -> Iterator[Space]:
    """The staged namespace, with Kueue's stand-in at work: one pod at a time."""
    assert jobs.target.kubeconfig is not None
    found = Space(Api(Path(jobs.target.kubeconfig)), jobs.namespace)
    with workload_api(found, "v1beta1", "v1beta2"), KueueStandIn(found, {"pods": 1}).running():
        yield found


def test_a_training_that_the_stand_in_stops_goes_on_as_the_same_attempt(
    jobs: Jobs, space: Space, unbroken_adapter: str
) -> None:
    space.submit("patient", tiny_spec() | LONG_TRAINING | NO_MERGE, {QUEUE_LABEL: "team-a"})
    in_mid_run(jobs, "patient")
    assert jobs.condition("patient", "QuotaReserved")["status"] == "True"
    activate(space, active=False)
    eventually("it has made way", lambda: jobs.status("patient")["phase"] == "Queued" and not train_pods(jobs))
    assert jobs.status("patient")["reason"] == "Deactivated"
    assert jobs.condition("patient", "QuotaReserved")["status"] == "False"
    activate(space, active=True)
    status = jobs.finish("patient")
    assert status["phase"] == "Succeeded", jobs.tell("patient")
    assert (status["attemptCount"], status.get("retries", 0)) == (1, 0), jobs.tell("patient")
    assert status["training"]["resumedFromStep"] >= 20
    assert adapter_digest(jobs, "patient") == unbroken_adapter


def train_pods(jobs: Jobs) -> list[str]:
    return [pod["metadata"]["name"] for pod in jobs.pods("patient", "train")]


def activate(space: Space, *, active: bool) -> None:
    """Let the training's Workload go on, or hold it."""
    (name,) = [name for name in space.names("workloads") if name.startswith("job-patient-train-1-")]
    space.merge("workloads", name, {"spec": {"active": active}})
