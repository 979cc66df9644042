"""Queued jobs where there is no Kueue, or an older one."""

from __future__ import annotations

from collections.abc import Callable

from finetune_operator.queueing import QUEUE_LABEL
from tests.apiserver import players
from tests.apiserver.api import Space, wait_for
from tests.apiserver.cases import spec
from tests.apiserver.conftest import Operator
from tests.apiserver.kueue import KueueStandIn, workload_api

SPEC = spec(parallelism={"gpusPerNode": 0})
QUEUED = {QUEUE_LABEL: "team-a"}
NewOperator = Callable[..., Operator]


def test_a_queued_job_in_a_cluster_without_kueue_says_so_and_starts_without_its_label(
    new_operator: NewOperator, space: Space
) -> None:
    new_operator()
    space.submit("demo", SPEC, QUEUED)
    status = space.wait_status("demo", phase="Queued", reason="NoKueue")
    assert "this cluster has no Kueue" in status["message"]
    space.merge("finetunejobs", "demo", {"metadata": {"labels": {QUEUE_LABEL: None}}, "spec": {"suspend": True}})
    space.wait_status("demo", phase="Suspended")
    wait_for(lambda: not space.names("jobs"), "the suspended Job gone")
    space.merge("finetunejobs", "demo", {"spec": {"suspend": False}})
    players.run(space, players.next_job(space, "demo", "prepare", 1))
    status = space.wait_status("demo", phase="Preparing", reason="Running")
    assert (status["retries"], status["attemptCount"]) == (0, 1)


def test_what_an_older_kueues_stand_in_says_is_read_as_well(new_operator: NewOperator, space: Space) -> None:
    with workload_api(space, "v1beta1"), KueueStandIn(space, {"pods": 0}).running():
        new_operator()
        space.submit("demo", SPEC, QUEUED)
        status = space.wait_status("demo", phase="Queued", reason="ExceedsMaxQuota")
    assert "insufficient quota for pods in flavor gpu" in status["message"]


def test_a_job_that_is_suspended_by_hand_says_so(new_operator: NewOperator, space: Space) -> None:
    new_operator()
    space.submit("demo", SPEC)
    job = players.next_job(space, "demo", "prepare", 1)
    players.run(space, job)
    space.wait_status("demo", reason="Running")
    space.merge("jobs", job, {"spec": {"suspend": True}})
    assert f"Somebody suspended Job {job}" in space.wait_status("demo", reason="HeldByHand")["message"]
    wait_for(lambda: not space.names("pods"), "its pod gone, which the Job controller may be slower to do")
    space.merge("jobs", job, {"spec": {"suspend": False}})
    players.run(space, job)
    status = space.wait_status("demo", phase="Preparing", reason="Running")
    assert (status["retries"], status["attemptCount"]) == (0, 1)
