"""Trainings of several pods: they start, fail and end together, and the pod that failed first is believed."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_operator.api import JSON, AttemptStatus, Status, format_time
from finetune_operator.status import Stop
from finetune_trainer.progress import Progress, Reason, Stage
from tests.unit.operator.builders import GANG, START, Cluster, condition, container, ended, play, stages_made, word

NO_ROOM = {"conditions": [condition("PodScheduled", "Unschedulable", "0/3 nodes: Insufficient memory", "False")]}
DISRUPTED = [condition("DisruptionTarget", "PreemptionByScheduler", "preempted by a greater")]


def training() -> Cluster:
    """A cluster in which both pods of a training run."""
    cluster = Cluster(spec=GANG)
    cluster.settle()
    cluster.say()
    cluster.settle()
    cluster.run_pod()
    cluster.settle()
    assert cluster.live_pods == ["demo-train-1", "demo-train-1/1"]
    return cluster


def said(reason: Reason, message: str = "Said.") -> str:
    return word("train", 1, reason, message).to_json()


DONE = word("train", 1).to_json()
DID_ITS_PART = word("train", 1, manifest_digest=None, training=None, artifact=None).to_json()


def first_attempt(cluster: Cluster) -> AttemptStatus:
    return next(attempt for attempt in cluster.job.status.attempts or () if attempt.stage == "train")


def train_state(status: Status) -> tuple[str, str | None]:
    stage = next(stage for stage in status.stages or () if stage.name == "train")
    return stage.state, stage.manifest_digest


# --- the way it should go --------------------------------------------------------------------------------------------


def test_a_training_of_two_pods_takes_its_place_in_the_line() -> None:
    cluster = Cluster(spec=GANG)
    play(cluster)
    assert stages_made(cluster) == ["prepare", "train", "merge"]
    assert cluster.job.status.phase == "Succeeded"


def test_it_runs_when_all_of_its_pods_run() -> None:
    cluster = Cluster(spec=GANG)
    cluster.settle()
    cluster.say()
    cluster.settle()
    cluster.pods[cluster.live]["status"] = {"phase": "Running", "containerStatuses": running()}
    waiting = cluster.settle().status
    cluster.run_pod()
    assert (waiting.reason, waiting.message) == ("Starting", "Stage train starts: 1 of 2 pods run.")
    assert cluster.settle().status.reason == "Running"


def running() -> list[JSON]:
    return container(running={"startedAt": format_time(START)})


def test_progress_is_that_of_the_first_pod_also_after_another_has_done_its_part() -> None:
    cluster = training()
    cluster.end_one(1, 0, DID_ITS_PART)
    cluster.progress = Progress(stage=Stage.TRAIN, attempt=1, activity="training", done=128, total=300)
    status = cluster.settle().status
    assert (status.reason, status.progress) == ("Running", "128/300 (42%)")


def test_the_first_pods_proof_counts_once_all_have_ended_well() -> None:
    cluster = training()
    cluster.end_one(0, 0, DONE)
    early = train_state(cluster.settle().status)
    cluster.end_one(1, 0, DID_ITS_PART)
    assert (early, train_state(cluster.settle().status)) == (("Running", None), ("Succeeded", "train-digest"))


def test_a_complete_job_speaks_for_pods_that_are_gone() -> None:
    cluster = training()
    cluster.end_one(0, 0, DONE)
    del cluster.pods["demo-train-1/1"]
    cluster.jobs[cluster.live]["status"] = {"conditions": [condition("Complete")]}
    assert train_state(cluster.settle().status) == ("Succeeded", "train-digest")


def test_without_the_first_pods_word_nothing_is_proven() -> None:
    cluster = training()
    cluster.end_one(0, 0, "")
    cluster.end_one(1, 0, DONE)
    cluster.settle()
    assert first_attempt(cluster).reason == "LostWord"


# --- who is believed -------------------------------------------------------------------------------------------------


def at(seconds: float, code: int, message: str = "", reason: str = "Error", **status: Any) -> JSON:
    """A pod that ended so many seconds after the start."""
    body = ended(code, reason, message) | status
    body["containerStatuses"][0]["state"]["terminated"]["finishedAt"] = format_time(START + timedelta(seconds=seconds))
    return body


PEER_LOST = said(Reason.PEER_LOST)


@pytest.mark.parametrize(
    ("first", "second", "reason", "retry"),
    [
        pytest.param(at(1, 21, PEER_LOST), at(2, 16, said(Reason.OUT_OF_MEMORY)), "OutOfMemory", "Free",
                     id="a lost connection is not the reason, even if it is told first"),
        pytest.param(at(1, 1, "Traceback: reset by peer"), at(2, 137, "", "OOMKilled"), "OutOfHostMemory", "Never",
                     id="nor one that a library told"),
        pytest.param(at(2, 17, said(Reason.NON_FINITE_LOSS)), at(1, 15, said(Reason.VOLUME_FULL)), "VolumeFull",
                     "Never",
                     id="of two reasons the earlier"),
        pytest.param(at(1, 16, said(Reason.OUT_OF_MEMORY)), at(2, 137, conditions=DISRUPTED), "Preempted", "Free",
                     id="a pod taken away comes before what another says"),
        pytest.param(at(1, 20, said(Reason.INTERRUPTED)), at(2, 1, "boom"), "Unknown", "Counted",
                     id="a pod that was told to leave since another crashed"),
        pytest.param(at(1, 20, said(Reason.INTERRUPTED)), at(2, 20, said(Reason.INTERRUPTED)), "Interrupted", "Free",
                     id="all were told to leave"),
        pytest.param(at(2, 20, said(Reason.INTERRUPTED)), at(1, 21, PEER_LOST), "PeerLost", "Counted",
                     id="a pod that was told to leave since another lost it"),
        pytest.param(at(1, 20, said(Reason.INTERRUPTED)), at(2, 21, PEER_LOST), "Interrupted", "Free",
                     id="a pod that lost another which was told to leave"),
        pytest.param(at(1, 19, said(Reason.RENDEZVOUS_FAILED)), at(2, 19, said(Reason.RENDEZVOUS_FAILED)),
                     "RendezvousFailed", "Counted", id="they did not meet"),
        pytest.param(at(1, 10, said(Reason.INVALID_CONFIG)), at(9, 19, said(Reason.RENDEZVOUS_FAILED)),
                     "InvalidConfig", "Never", id="one waited for another that was over"),
        pytest.param(at(1, 0, DONE, "Completed"), at(2, 139, ""), "Unknown", "Counted",
                     id="the first proved it, another crashed"),
        pytest.param(at(1, 0, DONE, "Completed"), at(2, 137, "", "OOMKilled"), "OutOfHostMemory", "Counted",
                     id="what is proven is run again and ends at once"),
        pytest.param(at(1, 0, "", "Completed"), at(2, 1, "boom"), "Unknown", "Counted",
                     id="a crash comes before a lost word"),
    ],
)  # fmt: skip
def test_the_pod_with_a_reason_of_its_own_is_believed(first: JSON, second: JSON, reason: str, retry: str) -> None:
    for swapped in (False, True):
        if swapped and "Completed" in str(first):
            continue  # only the first pod has anything to prove
        cluster = training()
        cluster.pods["demo-train-1"]["status"] = second if swapped else first
        cluster.pods["demo-train-1/1"]["status"] = first if swapped else second
        cluster.fail_job()
        cluster.settle()
        attempt = first_attempt(cluster)
        assert (attempt.reason, attempt.retry) == (reason, retry)


def test_a_pods_plain_reason_is_told_while_others_still_run() -> None:
    cluster = training()
    cluster.end_one(1, 16, said(Reason.OUT_OF_MEMORY, "Rank 1 ran out of GPU memory."))
    cluster.step()
    attempt = first_attempt(cluster)
    assert attempt.reason == "OutOfMemory"
    assert (attempt.message or "").startswith("Rank 1 ran out of GPU memory. Restarting with micro-batch 2")


def test_a_lost_connection_is_not_believed_before_the_others_have_ended() -> None:
    cluster = training()
    cluster.end_one(1, 21, PEER_LOST)
    assert train_state(cluster.settle().status)[0] == "Running"
    cluster.end_one(0, 137, "", "OOMKilled")
    cluster.settle()
    assert first_attempt(cluster).reason == "OutOfHostMemory"


def test_a_pod_that_hangs_after_the_first_has_ended_is_not_waited_for_without_end() -> None:
    cluster = training()
    cluster.end_one(0, 0, DONE)
    cluster.settle()
    cluster.later(3600)
    cluster.settle()
    assert first_attempt(cluster).reason == "StalledTraining"


def test_a_pod_that_is_taken_away_is_remembered_after_it_is_gone() -> None:
    cluster = training()
    pod = cluster.pods["demo-train-1/1"]
    pod["status"]["conditions"] = DISRUPTED
    pod["metadata"]["deletionTimestamp"] = format_time(cluster.now + timedelta(seconds=120))
    cluster.step()
    del cluster.pods["demo-train-1/1"]
    cluster.end_one(0, 21, PEER_LOST)
    cluster.fail_job()
    cluster.settle()
    assert (first_attempt(cluster).reason, cluster.job.status.retries) == ("Preempted", 0)
    assert stages_made(cluster) == ["prepare", "train", "train"]


# --- restarted whole -------------------------------------------------------------------------------------------------


def test_no_pod_is_left_when_all_start_again_under_the_next_number() -> None:
    cluster = training()
    cluster.end_one(1, 1, "boom")
    cluster.jobs[cluster.live]["status"] = {"conditions": [condition("FailureTarget")]}
    leaving = cluster.pods["demo-train-1"]
    leaving["metadata"]["deletionTimestamp"] = format_time(cluster.now + timedelta(seconds=120))
    cluster.later(60)
    cluster.settle()
    assert cluster.created[-1] == "demo-train-1", "the first pod may still save a checkpoint"
    cluster.pods["demo-train-1"]["status"] = at(61, 20, said(Reason.INTERRUPTED))
    cluster.later(60)
    cluster.settle()
    assert cluster.created[-1] == "demo-train-2"
    assert cluster.live_pods == ["demo-train-2", "demo-train-2/1"]
    assert (first_attempt(cluster).reason, cluster.job.status.retries) == ("Unknown", 1)


def test_a_failing_gang_is_left_to_kubernetes_so_that_its_logs_stay() -> None:
    cluster = training()
    cluster.end_one(1, 16, said(Reason.OUT_OF_MEMORY))
    actions = [action for _ in range(3) for action in cluster.step().actions]
    assert not any(isinstance(action, Stop) for action in actions)


def test_a_job_that_is_deleted_takes_all_pods_along() -> None:
    cluster = training()
    cluster.delete("demo-train-1")
    cluster.settle()
    assert (first_attempt(cluster).reason, cluster.created[-1]) == ("JobDeleted", "demo-train-2")


def test_one_pod_that_vanished_is_told_as_lost() -> None:
    cluster = training()
    del cluster.pods["demo-train-1"]
    cluster.fail_job()
    cluster.settle()
    assert (first_attempt(cluster).reason, first_attempt(cluster).retry) == ("PodLost", "Free")


# --- pods that do not start ------------------------------------------------------------------------------------------


def test_a_pod_without_a_node_is_told_of_and_waited_for_without_end() -> None:
    cluster = Cluster(spec=GANG)
    cluster.settle()
    cluster.say()
    cluster.settle()
    cluster.pods[cluster.live]["status"] = {"phase": "Running", "containerStatuses": running()}
    cluster.pods[f"{cluster.live}/1"]["status"] |= NO_ROOM
    cluster.later(86400)
    status = cluster.settle().status
    assert (status.reason, stages_made(cluster)) == ("Unschedulable", ["prepare", "train"])
    cluster.pods[cluster.live]["status"] = at(86400, 19, said(Reason.RENDEZVOUS_FAILED))
    cluster.fail_job()
    cluster.settle()
    attempt = first_attempt(cluster)
    assert (attempt.reason, attempt.retry, cluster.job.status.retries) == ("Unschedulable", "Free", 0)
    assert "Insufficient memory" in (attempt.message or "")


def test_an_image_that_one_node_cannot_pull_ends_the_whole_after_the_deadline() -> None:
    cluster = Cluster(spec=GANG)
    cluster.settle()
    cluster.say()
    cluster.settle()
    image = container(waiting={"reason": "ImagePullBackOff", "message": "no such image"})
    cluster.pods[cluster.live]["status"] = {"phase": "Running", "containerStatuses": running()}
    cluster.pods[f"{cluster.live}/1"]["status"]["containerStatuses"] = image
    assert cluster.settle().status.reason == "ImagePullFailed"
    cluster.later(301)
    status = cluster.settle().status
    assert (status.phase, status.reason, "demo-train-1" in cluster.jobs) == ("Failed", "ImagePullFailed", False)
    assert not [name for name in cluster.pods if name.startswith("demo-train")]


# --- restarts --------------------------------------------------------------------------------------------------------

MISHAPS = ("lose the status", "delete the Job", "one crashes", "one is lost", "run", "succeed", "give up", "wait")


def mishap(cluster: Cluster, what: str, index: int) -> None:
    """Something happens to the live Job, to one of its pods, or to the operator."""
    name = f"{cluster.live}/{index}" if cluster.jobs and index else (cluster.live if cluster.jobs else "")
    if what == "lose the status":
        cluster.lose_status = True
    elif what == "wait" or name not in cluster.pods or "status" in cluster.jobs[cluster.live]:
        cluster.later(60)
    elif what == "delete the Job":
        cluster.delete(cluster.live)
    elif what == "one crashes":
        cluster.end_one(index, 1, "boom")
    elif what == "one is lost":
        del cluster.pods[name]
    elif what == "run":
        cluster.run_pod()
    elif what == "give up" or len(cluster.live_pods) < cluster.jobs[cluster.live]["spec"]["completions"]:
        cluster.fail_job()
    else:
        cluster.say()


@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(MISHAPS), st.sampled_from([0, 0, 1])), max_size=40))
def test_whatever_happens_to_its_pods_no_job_is_made_twice_or_beside_a_live_one(events: list[tuple[str, int]]) -> None:
    cluster = Cluster(spec=GANG)
    for what, index in events:
        mishap(cluster, what, index)
        cluster.step()  # asserts itself that no name is made twice, nor beside a pod that is alive
    made = [["prepare", "train", "merge"].index(stage) for stage in stages_made(cluster)]
    assert made == sorted(made)
    assert (cluster.job.status.retries or 0) <= 3
