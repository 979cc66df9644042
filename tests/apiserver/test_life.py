"""The life of a job as its user steers it, against a real API server. Pods are played."""

from __future__ import annotations

import pytest

from finetune_trainer.progress import Reason
from tests.apiserver import players
from tests.apiserver.api import JSON, Space, wait_for
from tests.apiserver.cases import spec
from tests.apiserver.conftest import quiet_for
from tests.unit.operator.builders import word

SPEC = spec(parallelism={"gpusPerNode": 0})

pytestmark = pytest.mark.usefixtures("operator")


def steer(space: Space, **wish: object) -> None:
    """The user edits the spec."""
    space.merge("finetunejobs", "demo", {"spec": wish})


def trains(space: Space, **more: object) -> JSON:
    """A job whose training has a pod on a node; the pod."""
    space.submit("demo", SPEC | more)
    players.succeed(space, players.next_job(space, "demo", "prepare", 1))
    job = players.next_job(space, "demo", "train", 1)
    players.bind(space, players.pod_of(space, job))
    pod = players.run(space, job)
    space.wait_status("demo", phase="Training", reason="Running")
    return pod


def condition(space: Space, kind: str) -> JSON:
    found = [c for c in space.read("finetunejobs", "demo")["status"]["conditions"] if c["type"] == kind]
    return found[0] if found else {}


def test_a_suspended_job_frees_its_played_pod_and_goes_on_under_the_same_attempt(space: Space) -> None:
    pod = trains(space)
    steer(space, suspend=True)
    players.told_to_leave(space, pod)
    space.wait_status("demo", phase="Suspended")
    assert condition(space, "Suspended")["status"] == "True"
    steer(space, suspend=False)
    assert quiet_for(2, lambda: str(space.names("jobs"))), "the pod has not left yet"
    players.end_pod(space, pod, 20, word("train", 1, Reason.INTERRUPTED, "Saved.").to_json())
    players.gone(space, pod)
    wait_for(lambda: space.find("jobs", "demo-train-1"), "the same attempt anew")
    players.succeed(space, "demo-train-1")
    players.succeed(space, players.next_job(space, "demo", "merge", 1))
    status = space.wait_status("demo", phase="Succeeded")
    assert (status["attemptCount"], status["retries"], condition(space, "Suspended")["status"]) == (1, 0, "False")


def test_a_cancelled_job_ends_when_its_played_pod_has_left(space: Space) -> None:
    pod = trains(space)
    steer(space, cancel=True)
    players.told_to_leave(space, pod)
    assert condition(space, "Finished")["status"] == "False"
    players.end_pod(space, pod, 20)
    players.gone(space, pod)
    status = space.wait_status("demo", phase="Cancelled")
    assert (status["reason"], condition(space, "Succeeded")["status"]) == ("Cancelled", "False")
    assert space.names("jobs") == ["demo-prepare-1"]


def test_a_finished_job_is_removed_after_its_time_to_live_which_can_be_set_afterwards(space: Space) -> None:
    space.submit("demo", SPEC | {"runPolicy": {"stopAfter": "Prepare"}})
    players.succeed(space, players.next_job(space, "demo", "prepare", 1))
    space.wait_status("demo", phase="Succeeded")
    steer(space, runPolicy={"ttlSecondsAfterFinished": 1})
    wait_for(lambda: not space.names("finetunejobs"), "the FineTuneJob removed")
    wait_for(lambda: not space.names("jobs"), "its Jobs collected")
    assert len(space.names("persistentvolumeclaims")) == 1


def test_a_job_of_another_manager_stays_as_it_is(space: Space) -> None:
    space.submit("demo", SPEC | {"managedBy": "example.com/other"})
    space.submit("ours", SPEC)
    players.next_job(space, "ours", "prepare", 1)
    assert space.names("jobs") == ["ours-prepare-1"]
    assert "status" not in space.read("finetunejobs", "demo")


def test_played_pods_that_run_out_of_gpu_memory_train_on_with_smaller_micro_batches(space: Space) -> None:
    space.submit("demo", SPEC)
    players.succeed(space, players.next_job(space, "demo", "prepare", 1))
    last = word("train", 1, Reason.OUT_OF_MEMORY, "Rank 0 ran out of GPU memory at step 12.").to_json()
    players.end(space, players.next_job(space, "demo", "train", 1), 16, last)
    healed = space.read("jobs", players.next_job(space, "demo", "train", 2))
    assert healed["spec"]["template"]["spec"]["containers"][0]["args"][-2:] == ["--micro-batch", "2"]
    status = space.wait_status("demo", attemptCount=2)
    assert status["attempts"][-1]["overrides"] == {"microBatchSize": 2, "gradientAccumulationSteps": 4}
    assert status["retries"] == 0
