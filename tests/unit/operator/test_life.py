"""The life of a job as its user steers it: suspended, resumed, cancelled, given so much time, left alone."""

from __future__ import annotations

from datetime import timedelta

import pytest

from finetune_operator.api import JSON, Condition, ConditionType, format_time
from finetune_operator.facts import Facts
from finetune_operator.journal import SLACK_SECONDS
from finetune_operator.status import Remove, Stop, decide
from finetune_trainer.progress import Progress, Reason, Stage
from tests.unit.operator.builders import (
    SETTINGS,
    SPEC,
    START,
    WHOLE,
    Cluster,
    a_job,
    condition,
    container,
    ended,
    play,
    stages_made,
)


def training(spec: JSON = WHOLE, *, running: bool = True) -> Cluster:
    """A job whose train stage is under way."""
    cluster = Cluster(spec=spec)
    cluster.settle()
    cluster.say()
    cluster.settle()
    if running:
        cluster.run_pod()
        cluster.settle()
    return cluster


def suspended(cluster: Cluster) -> Condition | None:
    return cluster.job.status.condition(ConditionType.SUSPENDED)


# --- suspend ---------------------------------------------------------------------------------------------------------


def test_a_suspension_is_on_record_before_anything_is_deleted() -> None:
    cluster = training()
    cluster.wish(suspend=True)
    first = cluster.step()
    assert (first.actions, first.status.phase, first.requeue_after_seconds) == ((), "Suspended", 0)
    assert cluster.live == "demo-train-1"
    cluster.step()
    assert "demo-train-1" not in cluster.jobs


def test_a_resumed_job_goes_on_under_the_same_attempt() -> None:
    cluster = training()
    cluster.wish(suspend=True)
    cluster.settle()
    assert (cluster.job.status.phase, cluster.job.status.reason) == ("Suspended", "Suspended")
    assert cluster.jobs.keys() == {"demo-prepare-1"}
    held = suspended(cluster)
    assert held is not None
    assert held.status == "True"
    cluster.wish(suspend=False)
    cluster.settle()
    assert cluster.live == "demo-train-1"
    freed = suspended(cluster)
    assert freed is not None
    assert freed.status == "False"
    play(cluster)
    assert cluster.job.status.phase == "Succeeded"
    assert [(a.stage, a.number) for a in cluster.job.status.attempts or ()][:2] == [("prepare", 1), ("train", 1)]
    assert (cluster.job.status.attempt_count, cluster.job.status.retries) == (1, 0)


def test_pods_have_their_time_to_save_before_the_attempt_is_made_anew() -> None:
    cluster = training()
    cluster.slow = True
    cluster.wish(suspend=True)
    cluster.settle()
    cluster.wish(suspend=False)
    cluster.settle()
    assert cluster.job.status.phase == "Suspended"
    assert "leave" in (cluster.job.status.message or "")
    cluster.leave()
    cluster.settle()
    assert (cluster.job.status.phase, cluster.live, cluster.made) == ("Training", "demo-train-1", 3)


def test_what_a_pod_says_as_it_leaves_is_no_failure() -> None:
    cluster = training()
    cluster.slow = True
    cluster.wish(suspend=True)
    cluster.settle()
    for pod in cluster.live_pods:
        cluster.pods[pod]["status"] = {"phase": "Failed", "reason": "Error"}
    cluster.settle()
    assert (cluster.job.status.phase, cluster.job.status.retries) == ("Suspended", 0)
    cluster.leave()
    cluster.wish(suspend=None)
    cluster.settle()
    assert cluster.live == "demo-train-1"


def test_a_stage_that_was_proven_while_it_left_is_not_run_again() -> None:
    cluster = training()
    cluster.slow = True
    cluster.wish(suspend=True)
    cluster.settle()
    cluster.say()
    cluster.settle()
    assert cluster.job.status.phase == "Suspended"
    cluster.leave()
    cluster.wish(suspend=False)
    cluster.settle()
    assert cluster.live == "demo-merge-1"


def test_a_wish_taken_back_before_anything_was_deleted_changes_nothing() -> None:
    cluster = training()
    cluster.wish(suspend=True)
    cluster.step()
    cluster.wish(suspend=False)
    cluster.settle()
    assert (cluster.job.status.phase, cluster.live, cluster.made) == ("Training", "demo-train-1", 2)


def test_a_resumption_whose_status_was_lost_is_seen() -> None:
    cluster = training()
    cluster.wish(suspend=True)
    cluster.settle()
    cluster.wish(suspend=False)
    cluster.lose_status = True
    cluster.step()
    assert suspended(cluster) is not None
    cluster.settle()
    assert (cluster.live, cluster.made, cluster.job.status.phase) == ("demo-train-1", 3, "Training")
    play(cluster)
    assert cluster.job.status.attempt_count == 1


def test_beside_a_pod_that_never_left_the_next_number_goes_on() -> None:
    cluster = training()
    cluster.slow = True
    cluster.wish(suspend=True)
    cluster.settle()
    del cluster.jobs["demo-train-1"]
    cluster.later(120 + SLACK_SECONDS)
    cluster.settle()
    cluster.wish(suspend=False)
    cluster.settle()
    assert (cluster.live, cluster.job.status.retries) == ("demo-train-2", 0)


def test_a_job_suspended_from_the_start_makes_nothing_until_it_is_resumed() -> None:
    cluster = Cluster(spec=SPEC | {"suspend": True})
    cluster.settle()
    assert (cluster.job.status.phase, cluster.created) == ("Suspended", [])
    cluster.wish(suspend=False)
    play(cluster)
    assert cluster.job.status.phase == "Succeeded"


def test_a_failure_before_the_suspension_is_an_end() -> None:
    cluster = training()
    cluster.say(reason=Reason.INVALID_DATASET, message="Row 3: no text.")
    cluster.wish(suspend=True)
    cluster.settle()
    assert (cluster.job.status.phase, cluster.job.status.reason) == ("Failed", "InvalidDataset")


# --- cancel ----------------------------------------------------------------------------------------------------------


def test_a_cancelled_job_ends_when_its_pods_have_left() -> None:
    cluster = training()
    cluster.slow = True
    cluster.wish(cancel=True)
    cluster.settle()
    assert not cluster.job.status.finished
    cluster.leave()
    cluster.settle()
    status = cluster.job.status
    assert (status.phase, status.reason, status.finished) == ("Cancelled", "Cancelled", True)
    succeeded = status.condition(ConditionType.SUCCEEDED)
    assert succeeded is not None
    assert (succeeded.status, succeeded.reason) == ("False", "Cancelled")
    assert (status.attempts or ())[-1].reason == "Cancelled"
    assert all(stage.state != "Running" for stage in status.stages or ())


@pytest.mark.parametrize("spec", [SPEC | {"cancel": True}, SPEC | {"cancel": True, "suspend": True}])
def test_a_job_that_is_cancelled_before_it_begins_makes_nothing(spec: JSON) -> None:
    cluster = Cluster(spec=spec)
    cluster.settle()
    assert (cluster.job.status.phase, cluster.created) == ("Cancelled", [])


def test_it_is_too_late_to_cancel_what_is_complete() -> None:
    cluster = training(SPEC | {"merge": {"policy": "Never"}})
    cluster.say()
    cluster.wish(cancel=True)
    cluster.settle()
    assert cluster.job.status.phase == "Succeeded"


# --- a pod that is taken away ----------------------------------------------------------------------------------------


def test_why_a_pod_was_taken_away_is_told_even_if_it_is_gone_at_the_next_look() -> None:
    cluster = training()
    pod = cluster.pods["demo-train-1"]
    pod["status"]["conditions"] = [condition("DisruptionTarget", "EvictionByEvictionAPI", "Eviction API: evicting")]
    pod["metadata"]["deletionTimestamp"] = format_time(cluster.now)
    cluster.step()
    assert cluster.created[-1] == "demo-train-1", "it saves its checkpoint first"
    del cluster.pods["demo-train-1"]
    cluster.fail_job()
    cluster.settle()
    told = next(attempt for attempt in cluster.job.status.attempts or () if attempt.stage == "train")
    assert (told.reason, told.retry) == ("Evicted", "Free")
    assert "evicted" in (told.message or "")
    assert cluster.created[-1] == "demo-train-2"


FULL = condition("PodScheduled", "Unschedulable", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.", "False")

# --- time ------------------------------------------------------------------------------------------------------------


def policy(spec: JSON = SPEC, **policy: object) -> JSON:
    return spec | {"runPolicy": policy}


def test_the_time_that_pods_run_is_limited_over_all_stages() -> None:
    cluster = Cluster(spec=policy(activeDeadlineSeconds=100))
    cluster.settle()
    cluster.run_pod()
    cluster.settle()
    cluster.later(60)
    cluster.say()
    cluster.jobs[cluster.live]["status"]["completionTime"] = format_time(cluster.now)
    for body in cluster.pods.values():
        body["status"]["containerStatuses"][0]["state"]["terminated"]["finishedAt"] = format_time(cluster.now)
    cluster.settle()
    assert cluster.job.status.active_seconds == 60
    cluster.later(1000)  # without a node
    cluster.run_pod()
    for pod in cluster.live_pods:
        running = {"startedAt": format_time(cluster.now)}
        cluster.pods[pod]["status"]["containerStatuses"][0]["state"] = {"running": running}
    left = cluster.settle()
    assert cluster.job.status.phase == "Training"
    assert (left.requeue_after_seconds or 0) <= 40
    cluster.later(41)
    cluster.settle()
    status = cluster.job.status
    assert (status.phase, status.reason) == ("Failed", "DeadlineExceeded")
    assert "activeDeadlineSeconds" in (status.message or "")


def test_the_time_begins_anew_on_resume() -> None:
    cluster = training(policy(activeDeadlineSeconds=100))
    cluster.later(90)
    cluster.wish(suspend=True)
    cluster.settle()
    cluster.later(1000)
    cluster.wish(suspend=False)
    cluster.settle()
    cluster.later(50)
    cluster.settle()
    assert cluster.job.status.phase == "Training"


def test_the_time_begins_anew_though_the_pod_that_saved_is_still_to_be_seen() -> None:
    cluster = training(policy(activeDeadlineSeconds=100))
    cluster.slow = True
    cluster.wish(suspend=True)
    cluster.settle()
    del cluster.jobs["demo-train-1"]  # deleted in the background: gone at once
    cluster.wish(suspend=False)
    cluster.settle()
    cluster.pods["demo-train-1"]["status"] = ended(20)
    cluster.settle()
    assert cluster.live == "demo-train-1"
    assert (cluster.job.status.attempts or ())[-1].running_since is None


def test_the_time_begins_anew_where_the_stage_ended_as_it_left() -> None:
    cluster = training(policy(activeDeadlineSeconds=100))
    cluster.slow = True
    cluster.later(90)
    cluster.wish(suspend=True)
    cluster.settle()
    cluster.say()
    state = cluster.pods["demo-train-1"]["status"]["containerStatuses"][0]["state"]["terminated"]
    state["finishedAt"] = format_time(cluster.now)
    cluster.settle()
    cluster.leave()
    cluster.wish(suspend=False)
    cluster.settle()
    assert (cluster.live, cluster.job.status.active_seconds or 0) == ("demo-merge-1", 0)


def test_waiting_for_a_node_ends_where_the_user_says_so() -> None:
    cluster = training(policy(startDeadlineSeconds=600), running=False)
    full = condition(
        "PodScheduled", "Unschedulable", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.", "False"
    )
    cluster.pods[cluster.live]["status"]["conditions"] = [full]
    cluster.later(599)
    cluster.settle()
    assert (cluster.job.status.phase, cluster.job.status.reason) == ("Training", "Unschedulable")
    cluster.later(1)
    cluster.settle()
    assert (cluster.job.status.phase, cluster.job.status.reason) == ("Failed", "DeadlineExceeded")
    assert "3 Insufficient nvidia.com/gpu" in (cluster.job.status.message or "")


def test_waiting_for_a_node_has_no_end_of_its_own() -> None:
    cluster = training(running=False)
    full = condition(
        "PodScheduled", "Unschedulable", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.", "False"
    )
    cluster.pods[cluster.live]["status"]["conditions"] = [full]
    cluster.later(30 * 24 * 3600)
    cluster.settle()
    assert (cluster.job.status.phase, cluster.job.status.reason) == ("Training", "Unschedulable")


def test_a_training_without_progress_is_hung_and_run_again_counted() -> None:
    cluster = training(policy(stallTimeoutSeconds=300))
    cluster.progress = Progress(stage=Stage.TRAIN, attempt=1, activity="training", done=12, total=40)
    cluster.still_since = cluster.now
    cluster.later(299)
    waits = cluster.settle()
    assert (waits.requeue_after_seconds or 0) <= 1
    assert cluster.job.status.retries == 0
    cluster.later(1)
    cluster.settle()
    status = cluster.job.status
    hung = next(a for a in status.attempts or () if a.stage == "train")
    assert (hung.reason, hung.retry, status.retries) == ("StalledTraining", "Counted", 1)
    assert "last heard of: training" in (hung.message or "")
    cluster.still_since = None
    cluster.later(60)
    cluster.settle()
    assert stages_made(cluster) == ["prepare", "train", "train"]


def test_a_volume_that_a_lost_node_still_has_is_waited_for() -> None:
    cluster = training(running=False)
    cluster.pods[cluster.live]["status"]["conditions"] = [condition("PodScheduled")]
    cluster.warnings = ("FailedMount: timed out", "FailedAttachVolume: Multi-Attach error for volume pvc-1")
    cluster.settle()
    cluster.later(3000)
    cluster.settle()
    assert (cluster.job.status.phase, cluster.job.status.reason) == ("Training", "MountFailed")


def test_what_has_to_be_mended_has_its_time_from_when_it_broke() -> None:
    cluster = training(running=False)
    status = cluster.pods[cluster.live]["status"]
    pulling = container(waiting={"reason": "ContainerCreating"})
    status |= {"conditions": [condition("PodScheduled")], "containerStatuses": pulling}
    cluster.later(400)
    cluster.settle()
    status["containerStatuses"] = container(waiting={"reason": "ErrImagePull", "message": "reset"})
    cluster.settle()
    assert (cluster.job.status.phase, cluster.job.status.reason) == ("Training", "ImagePullFailed")
    cluster.later(301)
    cluster.settle()
    assert cluster.job.status.phase == "Failed"


def test_a_nodes_clock_that_runs_ahead_holds_no_retry_back() -> None:
    cluster = training()
    cluster.end_pod(1, "boom", "Error")
    state = cluster.pods[cluster.live]["status"]["containerStatuses"][0]["state"]["terminated"]
    state["finishedAt"] = format_time(cluster.now + timedelta(hours=3))
    assert (cluster.settle().requeue_after_seconds or 0) <= 10


def test_of_many_attempts_only_the_last_jobs_are_kept() -> None:
    cluster = training()
    for _ in range(15):
        cluster.end_pod(143, conditions=[condition("DisruptionTarget", "PreemptionByScheduler")])
        cluster.settle()
        cluster.later(400)
        cluster.settle()
    assert len(cluster.jobs) <= 12
    assert cluster.live == "demo-train-16"


def test_a_finished_job_is_removed_when_its_time_to_live_is_over() -> None:
    cluster = Cluster(spec=policy(ttlSecondsAfterFinished=60))
    play(cluster)
    rest = cluster.step()
    assert (rest.actions, rest.requeue_after_seconds) == ((), 60)
    cluster.later(60)
    assert cluster.step().actions == (Remove(),)
    assert cluster.removed


def test_a_finished_job_without_a_time_to_live_stays() -> None:
    cluster = Cluster(spec=SPEC)
    play(cluster)
    cluster.later(10**8)
    rest = cluster.step()
    assert (rest.actions, rest.requeue_after_seconds) == ((), None)


# --- another version of the operator ---------------------------------------------------------------------------------


def test_a_running_job_that_is_not_understood_any_more_ends_after_its_pods() -> None:
    cluster = training()
    cluster.wish(notOfThisVersion=1)
    first = cluster.step()
    assert [action.name for action in first.actions if isinstance(action, Stop)] == ["demo-train-1"]
    assert not first.status.finished
    cluster.settle()
    status = cluster.job.status
    assert (status.reason, status.finished, "demo-train-1" in cluster.jobs) == ("InvalidSpec", True, False)
    assert status.claim_name is not None


# --- whose job it is, and how far it goes ----------------------------------------------------------------------------


def test_a_job_of_another_manager_is_left_alone() -> None:
    cluster = Cluster(spec=SPEC | {"managedBy": "example.com/other"})
    decision = cluster.step()
    assert (decision.actions, cluster.status, cluster.created) == ((), {}, [])


def test_a_job_that_names_this_operator_is_taken_on() -> None:
    cluster = Cluster(spec=SPEC | {"managedBy": "finetune.dev/finetune-operator"})
    cluster.settle()
    assert cluster.created == ["demo-prepare-1"]


def test_a_job_that_stops_after_prepare_succeeds_with_what_was_resolved() -> None:
    cluster = Cluster(spec=policy(WHOLE, stopAfter="Prepare"))
    play(cluster)
    status = cluster.job.status
    assert (status.phase, stages_made(cluster)) == ("Succeeded", ["prepare"])
    assert status.resolved is not None
    assert status.data is not None


@pytest.mark.parametrize("later", [timedelta(0), timedelta(days=400)])
def test_a_job_that_is_being_deleted_is_not_touched(later: timedelta) -> None:
    job = a_job(policy(ttlSecondsAfterFinished=1), deletionTimestamp=format_time(START))
    decision = decide(Facts(job), SETTINGS, START + later)
    assert (decision.actions, decision.status) == ((), job.status)
