"""What is decided about a job that Kueue holds back, stops and lets go on."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest

from finetune_operator import names
from finetune_operator.api import Condition, ConditionType, format_time
from finetune_operator.facts import parse_pods
from finetune_operator.journal import SLACK_SECONDS
from finetune_operator.queueing import QUEUE_LABEL, Queueing, admitted
from finetune_trainer.progress import Reason
from tests.unit.operator.builders import (
    GANG,
    SPEC,
    UID,
    Cluster,
    container,
    ended,
    pod_body,
    word,
)

SHORT = Queueing("WaitingForQuota", "4 more needed. It starts when others in the queue end.")
FIRST = Queueing("Preempted", "Preempted. It goes on from its last checkpoint.")


def queued(cluster: Cluster | None = None) -> Cluster:
    """A job whose first stage waits."""
    cluster = cluster or Cluster(spec=SPEC, labels={QUEUE_LABEL: "team-a"})
    cluster.step()
    hold(cluster, SHORT)
    return cluster


def hold(cluster: Cluster, held: Queueing) -> None:
    """Kueue stops the newest Job; its pods are gone."""
    cluster.jobs[cluster.live]["spec"]["suspend"] = True
    cluster.jobs[cluster.live].get("status", {}).pop("startTime", None)
    for name in cluster.live_pods:
        del cluster.pods[name]
    cluster.queueing = held
    cluster.settle()


def let_run(cluster: Cluster, *, running: bool = True) -> None:
    """Kueue admits the newest Job, and Kubernetes makes its pods."""
    name = cluster.live
    cluster.jobs[name]["spec"]["suspend"] = False
    cluster.jobs[name]["status"] = {"startTime": format_time(cluster.now)}
    step, attempt = name.removeprefix("demo-").rsplit("-", 1)
    for index in range(cluster.jobs[name]["spec"]["completions"]):
        pod = pod_body(step, int(attempt), index=index)
        pod["metadata"]["creationTimestamp"] = format_time(cluster.now)
        cluster.pods[name if index == 0 else f"{name}/{index}"] = pod
    cluster.queueing = admitted(name, "team-a")
    if running:
        cluster.run_pod()
    cluster.settle()


def quota(cluster: Cluster) -> Condition:
    found = cluster.job.status.condition(ConditionType.QUOTA_RESERVED)
    assert found is not None
    return found


def test_as_long_as_nothing_is_known_a_held_job_starts_and_is_looked_at_again_soon() -> None:
    cluster = Cluster(spec=SPEC, labels={QUEUE_LABEL: "team-a"})
    cluster.step()
    cluster.pods.clear()
    decision = cluster.step()
    assert cluster.jobs[cluster.live]["spec"]["suspend"]
    assert (decision.status.phase, decision.status.reason, decision.requeue_after_seconds) == ("Pending", "Starting", 1)
    assert decision.status.condition(ConditionType.QUOTA_RESERVED) is None


def test_a_held_job_says_why_and_is_looked_at_again_now_and_then() -> None:
    cluster = queued()
    decision = cluster.step()
    status = decision.status
    assert (status.phase, status.reason, status.message) == ("Queued", SHORT.reason, SHORT.message)
    assert (decision.actions, decision.requeue_after_seconds) == ((), 30)
    assert (quota(cluster).status, quota(cluster).reason, quota(cluster).message) == ("False", *status_of(cluster))
    assert status.stages is not None
    assert status.stages[0].state == "Pending"


def status_of(cluster: Cluster) -> tuple[str | None, str | None]:
    return cluster.job.status.reason, cluster.job.status.message


def test_time_in_the_queue_counts_against_no_deadline_of_a_pod() -> None:
    cluster = queued()
    cluster.later(100_000)
    cluster.settle()
    assert (cluster.job.status.phase, cluster.live) == ("Queued", "demo-prepare-1")
    let_run(cluster, running=False)
    for name in cluster.live_pods:
        waits = {"reason": "ImagePullBackOff", "message": "no such image"}
        cluster.pods[name]["status"]["containerStatuses"] = container(waiting=waits)
    cluster.settle()
    assert (cluster.job.status.phase, cluster.job.status.reason) == ("Pending", "ImagePullFailed"), "it has just begun"


def test_a_pod_that_cannot_be_made_has_its_time_from_when_the_job_was_admitted() -> None:
    cluster = queued()
    cluster.later(100_000)
    let_run(cluster)
    cluster.pods.clear()
    cluster.warnings = ("FailedCreate: some policy forbids it",)
    cluster.settle()
    assert (cluster.job.status.phase, cluster.job.status.reason) == ("Pending", "PodRefused")


def test_an_admitted_job_runs_and_holds_quota_until_it_has_ended() -> None:
    cluster = queued()
    let_run(cluster)
    assert (cluster.job.status.phase, quota(cluster).status, quota(cluster).reason) == ("Preparing", "True", "Admitted")
    for _ in range(2):
        cluster.say()
        cluster.settle()
    cluster.say()
    cluster.settle()
    assert (cluster.job.status.phase, quota(cluster).status) == ("Succeeded", "False")


def test_a_job_that_has_to_make_way_is_queued_at_once_and_goes_on_as_the_same_attempt() -> None:
    cluster = queued()
    let_run(cluster)
    cluster.jobs[cluster.live]["spec"]["suspend"] = True
    cluster.queueing = FIRST
    cluster.step()
    assert (cluster.job.status.phase, cluster.job.status.reason) == ("Queued", "Preempted"), "while its pod still saves"
    dismiss(cluster)
    cluster.settle()
    assert (cluster.job.status.phase, cluster.job.status.retries, cluster.live) == ("Queued", 0, "demo-prepare-1")
    let_run(cluster)
    status = cluster.job.status
    assert (status.phase, status.reason, status.attempt_count) == ("Preparing", "Running", 1)
    assert [attempt.reason for attempt in status.attempts or ()] == [None]


def dismiss(cluster: Cluster, *, code: int = 20) -> None:
    """The suspended Job has let its pods go; they have saved, ended, and are still to be seen."""
    told = word("prepare", 1, Reason.INTERRUPTED, "Saved and left.").to_json()
    for name in cluster.live_pods:
        cluster.pods[name]["metadata"] |= {"finalizers": [], "deletionTimestamp": format_time(cluster.now)}
        cluster.pods[name]["status"] = ended(code, message=told)


def test_pods_of_before_are_not_taken_for_those_of_a_job_that_was_admitted_again_meanwhile() -> None:
    cluster = queued(Cluster(spec=GANG, labels={QUEUE_LABEL: "team-a"}))
    let_run(cluster)
    dismiss(cluster, code=143)
    cluster.jobs[cluster.live]["spec"]["suspend"] = False
    decision = cluster.settle()
    assert (decision.actions, decision.status.retries, cluster.live) == ((), 0, "demo-prepare-1")
    assert decision.status.reason == "Starting"


def test_a_pod_that_never_leaves_does_not_hold_up_a_job_that_was_admitted_again() -> None:
    cluster = queued()
    let_run(cluster)
    (name,) = cluster.live_pods
    gone_by = format_time(cluster.now + timedelta(seconds=120))
    cluster.pods[name]["metadata"] |= {"finalizers": [], "deletionTimestamp": gone_by}
    decision = cluster.settle()
    assert (decision.status.reason, decision.actions) == ("Starting", ()), "Kubernetes waits for it too"
    cluster.later(120 + SLACK_SECONDS)
    cluster.settle()
    status = cluster.job.status
    assert (cluster.live, status.retries, status.attempt_count) == ("demo-prepare-2", 0, 2)
    assert [attempt.reason for attempt in status.attempts or ()] == ["NodeLost", None]


@pytest.mark.parametrize(
    ("finalizers", "disruption", "dismissed"),
    [
        pytest.param([], False, True, id="a suspended Job counts its pods no more"),
        pytest.param(["batch.kubernetes.io/job-tracking"], False, False, id="somebody deleted the pod"),
        pytest.param([], True, False, id="its node was drained"),
    ],
)
def test_only_what_a_suspended_job_sent_away_is_dismissed(
    finalizers: list[str], disruption: bool, dismissed: bool
) -> None:
    body = pod_body()
    body["metadata"] |= {"finalizers": finalizers, "deletionTimestamp": body["metadata"]["creationTimestamp"]}
    if disruption:
        body["status"]["conditions"] = [{"type": "DisruptionTarget", "status": "True"}]
    assert parse_pods([body], UID)[0].dismissed is dismissed


def test_each_time_that_a_job_makes_way_is_an_event_of_its_own() -> None:
    cluster = queued()
    for seconds in (60, 120):
        cluster.later(seconds)
        let_run(cluster)
        cluster.later(seconds)
        hold(cluster, FIRST)
    assert cluster.said.count("Queued") == 3
    assert len(set(cluster.keys)) == len(cluster.keys)
    assert all(re.fullmatch(r"[a-z0-9.-]+", names.event(cluster.job, key)) for key in cluster.keys)


def test_a_job_that_waited_long_enough_for_its_users_patience_ends() -> None:
    cluster = queued(Cluster(spec=SPEC | {"runPolicy": {"startDeadlineSeconds": 60}}, labels={QUEUE_LABEL: "team-a"}))
    cluster.later(61)
    cluster.settle()
    assert (cluster.job.status.phase, cluster.job.status.reason) == ("Failed", "DeadlineExceeded")
    assert SHORT.message in (cluster.job.status.message or "")


def test_suspended_time_is_no_time_in_the_queue() -> None:
    spec = SPEC | {"runPolicy": {"startDeadlineSeconds": 600}}
    cluster = queued(Cluster(spec=spec, labels={QUEUE_LABEL: "team-a"}))
    let_run(cluster)
    hold(cluster, FIRST)
    cluster.wish(suspend=True)
    cluster.settle()
    cluster.queueing = None
    cluster.later(10_000)
    cluster.wish(suspend=False)
    cluster.settle()
    assert not cluster.job.status.finished
