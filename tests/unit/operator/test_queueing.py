"""What is told of a Job that waits in a queue, by what Kueue says of its Workload."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from finetune_operator.api import JSON
from finetune_operator.queueing import (
    HELD_BY_HAND,
    NO_KUEUE,
    NOT_TAKEN_UP,
    PRIORITY_LABEL,
    QUEUE_LABEL,
    REMEDIES,
    Queueing,
    build_queue_labels,
    parse_waiting,
)
from tests.unit.operator.builders import a_job, condition

SHORT = (
    "couldn't assign flavors to pod set main: insufficient unused quota for nvidia.com/gpu in flavor gpu, 4 more needed"
)
PREEMPTED = "Preempted to accommodate a workload (UID: 1, JobUID: 2) due to prioritization in the ClusterQueue"


def waiting(*conditions: JSON) -> Queueing:
    body = {"metadata": {"name": "job-demo-train-1-0a1b2"}, "status": {"conditions": list(conditions)}}
    return parse_waiting("demo-train-1", "team-a", [body])


def quota(reason: str, message: str) -> JSON:
    return condition("QuotaReserved", reason, message, "False")


@pytest.mark.parametrize(
    ("reason", "message", "remedy"),
    [
        pytest.param("WaitingForQuota", SHORT, "starts when others in the queue end", id="others hold the quota"),
        pytest.param("ExceedsMaxQuota", "insufficient quota", "can never start in this queue", id="more than there is"),
        pytest.param(
            "Misconfigured", "LocalQueue team-a doesn't exist", "LocalQueue team-a put in order", id="no such queue"
        ),
        pytest.param("Inadmissible", "ClusterQueue x is inactive", f"label {QUEUE_LABEL}", id="an older Kueue's word"),
        pytest.param("WaitingForPreemptedWorkloads", "Pending", "have stopped", id="others make way"),
        pytest.param("Pending", "no room", "waits in LocalQueue team-a", id="a word that is not known here"),
    ],
)
def test_why_there_is_no_quota_is_told_in_kueues_words_with_the_way_out(reason: str, message: str, remedy: str) -> None:
    found = waiting(quota(reason, message))
    assert (found.reason, found.reserved) == (reason, False)
    assert found.message.startswith(f"{message}. ")
    assert remedy in found.message


def test_a_preemption_is_told_until_the_job_is_admitted_again() -> None:
    evicted = condition("Evicted", "Preempted", PREEMPTED)
    found = waiting(evicted, quota("WaitingForQuota", SHORT))
    assert (found.reason, found.reserved) == ("Preempted", False)
    assert found.message.startswith(PREEMPTED)
    assert "last checkpoint" in found.message
    assert found.message.endswith(f"Now: {SHORT}.")
    stopping = waiting(evicted, condition("QuotaReserved", "QuotaReserved", "Quota reserved"))
    assert (stopping.reason, stopping.reserved) == ("Preempted", False), "its pods have not stopped yet"
    again = waiting(condition("Evicted", "QuotaReserved", f"Previously: {PREEMPTED}", "False"), quota("Pending", "x"))
    assert again.reason == "Pending"


def test_a_workload_that_is_held_by_hand_is_named() -> None:
    found = waiting(condition("Evicted", "Deactivated", "The workload is deactivated"), quota("Pending", "x"))
    assert (found.reason, "spec.active of Workload job-demo-train-1-0a1b2" in found.message) == ("Deactivated", True)


def test_reserved_quota_alone_does_not_start_a_job() -> None:
    checks = condition("Admitted", "UnsatisfiedAdmissionChecks", "Waiting for provisioning", "False")
    found = waiting(condition("QuotaReserved", "QuotaReserved"), checks)
    assert (found.reason, found.reserved) == ("UnsatisfiedAdmissionChecks", True)
    assert found.message.startswith("Waiting for provisioning. ")


@pytest.mark.parametrize(
    ("workloads", "reason", "said"),
    [
        pytest.param(None, "NoKueue", "this cluster has no Kueue", id="the API is not there"),
        pytest.param([], "NotTakenUp", "check that Kueue runs", id="no Workload yet"),
        pytest.param([{"metadata": {"name": "w"}}], "NotTakenUp", "not said yet", id="a Workload without a status"),
    ],
)
def test_where_kueue_says_nothing_that_is_told(workloads: list[JSON] | None, reason: str, said: str) -> None:
    found = parse_waiting("demo-train-1", "team-a", workloads)
    assert (found.reason, found.reserved) == (reason, False)
    assert said in found.message


def test_the_longest_words_leave_room_for_the_way_out() -> None:
    found = waiting(condition("Evicted", "Preempted", "x" * 2000), quota("WaitingForQuota", "y" * 2000))
    assert len(found.message) <= 1024
    assert "last checkpoint" in found.message


def test_the_example_asks_for_a_queue_and_a_priority() -> None:
    body = yaml.safe_load((Path(__file__).parents[3] / "examples" / "queued.yaml").read_text())
    job = a_job(body["spec"], labels=body["metadata"]["labels"])
    assert job.problem is None
    assert build_queue_labels(job) == body["metadata"]["labels"]


@pytest.mark.parametrize("reason", [*REMEDIES, NO_KUEUE, NOT_TAKEN_UP, HELD_BY_HAND, QUEUE_LABEL, PRIORITY_LABEL])
def test_the_docs_tell_every_reason_for_which_a_job_waits(reason: str) -> None:
    assert f"`{reason}`" in (Path(__file__).parents[3] / "docs" / "queueing.md").read_text()
