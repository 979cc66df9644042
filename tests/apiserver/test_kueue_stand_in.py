"""Queued jobs: the operator and the real Job controller beside a stand-in for Kueue. Pods are played by the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from finetune_operator.queueing import PRIORITY_LABEL, QUEUE_LABEL
from finetune_trainer.progress import ExitCode, Reason
from tests.apiserver import players
from tests.apiserver.api import JSON, Space, wait_for
from tests.apiserver.cases import SHARED, spec
from tests.apiserver.conftest import Operator, quiet_for
from tests.apiserver.kueue import STOPPING, KueueStandIn, workload_api
from tests.apiserver.webhook import broken_webhook
from tests.unit.operator.builders import word

GPU = "nvidia.com/gpu"
QUEUED = {QUEUE_LABEL: "team-a"}
HIGH = QUEUED | {PRIORITY_LABEL: "high"}
LOW = QUEUED | {PRIORITY_LABEL: "low"}


@pytest.fixture(scope="module", autouse=True)
def _workload_api(shared_space: Space) -> Iterator[None]:
    with workload_api(shared_space, "v1beta1", "v1beta2"):
        yield


@pytest.fixture
def kueue(space: Space) -> Iterator[KueueStandIn]:
    """A queue of 4 GPUs for one namespace."""
    with KueueStandIn(space, {GPU: 4}).running() as stand_in:
        yield stand_in
    print(stand_in.refused)


# --- the stand-in itself, by the record of what Kueue wrote


def plain_job(space: Space, name: str, gpus: int, labels: dict[str, str]) -> None:
    """A suspended Job of one pod, nobody's but Kueue's."""
    container = {
        "name": "trainer",
        "image": "x",
        "resources": {"limits": {GPU: str(gpus)}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    secure = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    pod = {"restartPolicy": "Never", "containers": [container], "securityContext": secure}
    spec = {"suspend": True, "backoffLimit": 0, "podReplacementPolicy": "Failed", "template": {"spec": pod}}
    metadata = {"name": name, "labels": labels}
    space.create("jobs", {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec})


def workload_of(space: Space, job: str) -> JSON | None:
    return next((w for w in space.all("workloads") if w["metadata"]["name"].startswith(f"job-{job}-")), None)


def said(space: Space, job: str, kind: str) -> JSON:
    """A condition of a Job's Workload."""
    conditions = (workload_of(space, job) or {}).get("status", {}).get("conditions", ())
    return next((c for c in conditions if c["type"] == kind), {})


def wait_said(space: Space, job: str, kind: str, reason: str) -> JSON:
    wait_for(lambda: said(space, job, kind).get("reason") == reason, f"{kind} {reason} of {job}")
    return said(space, job, kind)


@pytest.mark.usefixtures("kueue")
def test_the_stand_in_admits_with_one_write_and_gives_quota_back_at_the_end(space: Space) -> None:
    plain_job(space, "first", 4, QUEUED)
    players.run(space, "first")
    job, workload = space.read("jobs", "first"), workload_of(space, "first")
    assert workload is not None
    assert workload["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]
    assert {c["type"]: c["status"] for c in workload["status"]["conditions"]} == {
        "QuotaReserved": "True",
        "Admitted": "True",
    }
    template = job["spec"]["template"]["metadata"]
    assert template["annotations"] == {"kueue.x-k8s.io/workload": workload["metadata"]["name"]}
    assert template["labels"]["kueue.x-k8s.io/cluster-queue-name"] == "gpus"
    plain_job(space, "second", 2, QUEUED)
    waits = wait_said(space, "second", "QuotaReserved", "WaitingForQuota")
    assert "insufficient unused quota for nvidia.com/gpu in flavor gpu, 2 more needed" in waits["message"]
    second = space.read("jobs", "second")
    assert [c["type"] for c in second["status"]["conditions"]] == ["Suspended"], "a Job does not say why it waits"
    players.end(space, "first")
    wait_said(space, "first", "Finished", "Succeeded")
    players.run(space, "second")
    space.delete("jobs", "second")
    wait_for(lambda: workload_of(space, "second") is None, "the Workload gone with its Job")


@pytest.mark.usefixtures("kueue")
def test_the_stand_in_makes_the_lower_priority_give_way_and_takes_it_back(space: Space) -> None:
    plain_job(space, "low", 4, LOW)
    players.run(space, "low")
    bare = space.read("jobs", "low")["spec"]["template"]["metadata"]
    plain_job(space, "high", 4, HIGH)
    players.run(space, "high")
    job = space.read("jobs", "low")
    assert (job["spec"]["suspend"], "startTime" in job["status"], job["status"].get("active")) == (True, False, None)
    assert STOPPING not in job["metadata"].get("annotations", {})
    assert "kueue.x-k8s.io/workload" in bare["annotations"]
    assert "annotations" not in job["spec"]["template"]["metadata"]
    assert said(space, "low", "Evicted")["reason"] == said(space, "low", "Requeued")["reason"] == "Preempted"
    assert said(space, "low", "Preempted")["reason"] == "InClusterQueue"
    assert not any(c["type"] in ("Failed", "FailureTarget") for c in job["status"]["conditions"])
    players.end(space, "high")
    players.run(space, "low")
    assert said(space, "low", "Evicted")["message"].startswith("Previously: Preempted to accommodate")


@pytest.mark.usefixtures("kueue")
def test_the_stand_in_wins_over_whoever_else_writes_suspend(space: Space) -> None:
    plain_job(space, "first", 4, QUEUED)
    before = players.run(space, "first")
    space.merge("jobs", "first", {"spec": {"suspend": True}})
    wait_for(lambda: pods_of(space, "first") - {before["metadata"]["uid"]}, "a new pod: the work of the first is lost")
    assert said(space, "first", "QuotaReserved")["status"] == "True"
    plain_job(space, "second", 4, QUEUED)
    wait_said(space, "second", "QuotaReserved", "WaitingForQuota")
    space.merge("jobs", "second", {"spec": {"suspend": False}})
    wait_for(lambda: space.read("jobs", "second")["spec"]["suspend"], "suspended again")
    wait_for(lambda: not pods_of(space, "second"), "its pod gone")


def pods_of(space: Space, job: str) -> set[str]:
    pods = (pod for pod in space.all("pods") if pod["metadata"]["labels"].get("batch.kubernetes.io/job-name") == job)
    return {pod["metadata"]["uid"] for pod in pods if "deletionTimestamp" not in pod["metadata"]}


@pytest.mark.usefixtures("kueue")
@pytest.mark.parametrize(
    ("gpus", "queue", "reason", "message"),
    [
        pytest.param(8, "team-a", "ExceedsMaxQuota", "capacity (4)", id="more than the queue ever has"),
        pytest.param(1, "absent", "Misconfigured", "LocalQueue absent doesn't exist", id="no such queue"),
    ],
)
def test_the_stand_in_never_fails_what_it_cannot_admit(
    space: Space, gpus: int, queue: str, reason: str, message: str
) -> None:
    plain_job(space, "first", gpus, {QUEUE_LABEL: queue})
    assert message in wait_said(space, "first", "QuotaReserved", reason)["message"]
    assert space.read("jobs", "first")["spec"]["suspend"]


@pytest.mark.usefixtures("kueue")
def test_the_stand_in_makes_a_deleted_workload_anew(space: Space) -> None:
    plain_job(space, "first", 4, QUEUED)
    players.run(space, "first")
    before = workload_of(space, "first")
    assert before is not None
    space.delete("workloads", before["metadata"]["name"])

    def renewed() -> bool:
        found = workload_of(space, "first")
        return found is not None and found["metadata"]["uid"] != before["metadata"]["uid"]

    wait_for(renewed, "a new Workload")
    players.run(space, "first")


# --- the operator beside it

SPEC = spec(parallelism={"gpusPerNode": 4}, merge={"policy": "Never"})
SAVED = ExitCode.INTERRUPTED.value


def to_training(space: Space, name: str, labels: dict[str, str] = QUEUED, **changes: Any) -> str:
    """A job as far as its training, which asks for all four GPUs; preparing asks for none."""
    space.submit(name, SPEC | changes, labels)
    players.succeed(space, players.next_job(space, name, "prepare", 1))
    return players.next_job(space, name, "train", 1)


def quota_of(space: Space, name: str) -> JSON:
    """The condition QuotaReserved."""
    return next((c for c in space.status(name).get("conditions", ()) if c["type"] == "QuotaReserved"), {})


def news_of(space: Space, name: str) -> list[str]:
    events = (event for event in space.all("events") if event["involvedObject"]["name"] == name)
    return [f"{event['reason']}: {event['message']}" for event in sorted(events, key=lambda e: e["metadata"]["name"])]


def no_failure(status: JSON) -> bool:
    """Whether nothing of what happened counts as one."""
    ends = {attempt.get("reason") for attempt in status["attempts"]}
    return status["retries"] == 0 and status["attemptCount"] == 1 and ends <= {None, "Completed"}


@pytest.mark.usefixtures("kueue")
def test_an_operator_that_is_killed_at_every_turn_makes_each_queued_job_once(
    new_operator: Callable[..., Operator], space: Space
) -> None:
    """First of all: the other tests' common operator, once it is there, would do the work while this one is down."""
    operator = new_operator()
    job = to_training(space, "low", LOW)
    players.run(space, job)
    before = space.read("jobs", job)["metadata"]["uid"]
    operator.restart()
    space.wait_status("low", phase="Training", reason="Running")
    operator.kill()
    plain_job(space, "high", 4, HIGH)
    players.run(space, "high")
    operator.start()
    space.wait_status("low", phase="Queued", reason="Preempted")
    operator.kill()
    players.end(space, "high")
    players.run(space, job)
    operator.start()
    wait_for(lambda: operator.get("/readyz") == 200, "the operator at work")
    assert no_failure(space.wait_status("low", phase="Training", reason="Running"))
    assert space.read("jobs", job)["metadata"]["uid"] == before
    assert space.names("jobs") == ["high", "low-prepare-1", "low-train-1"]


@pytest.mark.usefixtures("operator", "kueue")
def test_a_queued_job_runs_from_stage_to_stage_as_the_stand_in_lets_it(space: Space) -> None:
    space.submit("demo", SPEC, QUEUED)
    for stage, phase in (("prepare", "Preparing"), ("train", "Training")):
        job = players.next_job(space, "demo", stage, 1)
        assert space.read("jobs", job)["metadata"]["labels"].items() >= QUEUED.items()
        players.run(space, job)
        space.wait_status("demo", phase=phase, reason="Running")
        assert (quota_of(space, "demo")["status"], quota_of(space, "demo")["reason"]) == ("True", "Admitted")
        players.succeed(space, job)
    status = space.wait_status("demo", phase="Succeeded")
    assert no_failure(status)
    assert quota_of(space, "demo")["reason"] == "NotQueued"


@pytest.mark.usefixtures("operator", "kueue")
def test_a_job_without_quota_says_what_is_missing_and_starts_when_it_is_free(space: Space) -> None:
    first = to_training(space, "first")
    players.run(space, first)
    second = to_training(space, "second")
    status = space.wait_status("second", phase="Queued", reason="WaitingForQuota")
    assert "insufficient unused quota for nvidia.com/gpu in flavor gpu, 4 more needed" in status["message"]
    assert "It starts when others in the queue end" in status["message"]
    assert (quota_of(space, "second")["status"], quota_of(space, "second")["message"]) == ("False", status["message"])
    assert quiet_for(6, lambda: space.version("second")), "longer than what would end a pod that cannot start"
    assert not pods_of(space, second), "no pod was ever made before there was quota"
    players.succeed(space, first)
    players.run(space, second)
    assert no_failure(space.wait_status("second", phase="Training", reason="Running"))
    assert quota_of(space, "second")["status"] == "True"


@pytest.mark.usefixtures("operator", "kueue")
def test_a_job_that_gives_way_goes_on_as_the_same_attempt(space: Space) -> None:
    job = to_training(space, "low", LOW)
    pod = players.run(space, job)
    players.bind(space, pod)
    space.wait_status("low", phase="Training", reason="Running")
    high = to_training(space, "high", HIGH)
    players.told_to_leave(space, pod)
    status = space.wait_status("low", phase="Queued", reason="Preempted")
    assert status["message"].startswith("Preempted to accommodate a workload (UID: ")
    assert "goes on from its last checkpoint when it is admitted again" in status["message"]
    interrupted = word("train", 1, Reason.INTERRUPTED, "Saved at step 7 and left.").to_json()
    players.end_pod(space, pod, SAVED, interrupted)
    players.run(space, high)
    assert (space.status("low")["phase"], space.names("jobs").count(job)) == ("Queued", 1)
    players.succeed(space, high)
    wait_for(lambda: not space.read("jobs", job)["spec"]["suspend"], "admitted again, while the old pod is still there")
    assert quiet_for(2, lambda: str(space.status("low")["attemptCount"]))
    players.gone(space, pod)
    wait_for(lambda: pods_of(space, job), "a new pod")
    players.run(space, job)
    assert no_failure(space.wait_status("low", phase="Training", reason="Running"))
    players.succeed(space, job)
    assert no_failure(space.wait_status("low", phase="Succeeded"))
    assert any("Preempted to accommodate" in told for told in news_of(space, "low"))


@pytest.mark.usefixtures("operator", "kueue")
def test_every_time_that_a_job_gives_way_is_told(space: Space) -> None:
    job = to_training(space, "low", LOW)
    for rival in ("first", "second"):
        players.run(space, job)
        space.wait_status("low", phase="Training", reason="Running")
        high = to_training(space, rival, HIGH)
        space.wait_status("low", phase="Queued", reason="Preempted")
        players.succeed(space, high)
    players.run(space, job)
    assert no_failure(space.wait_status("low", phase="Training", reason="Running"))
    assert len([told for told in news_of(space, "low") if "Preempted to accommodate" in told]) == 2


@pytest.mark.usefixtures("operator", "kueue")
@pytest.mark.parametrize(
    ("gpus", "labels", "reason", "remedy"),
    [
        pytest.param(8, QUEUED, "ExceedsMaxQuota", "It can never start in this queue", id="more than there ever is"),
        pytest.param(4, {QUEUE_LABEL: "absent"}, "Misconfigured", "LocalQueue absent put in order", id="no queue"),
    ],
)
def test_what_the_stand_in_can_never_admit_says_so_and_does_not_fail(
    space: Space, gpus: int, labels: dict[str, str], reason: str, remedy: str
) -> None:
    space.submit("demo", SPEC | {"parallelism": {"gpusPerNode": gpus}}, labels)
    if reason == "ExceedsMaxQuota":
        players.succeed(space, players.next_job(space, "demo", "prepare", 1))
    status = space.wait_status("demo", phase="Queued", reason=reason)
    assert remedy in status["message"]
    assert quiet_for(6, lambda: space.version("demo"))


@pytest.mark.usefixtures("operator", "kueue")
def test_a_wrong_queue_is_corrected_by_its_label_and_a_suspension(space: Space) -> None:
    space.submit("demo", SPEC, {QUEUE_LABEL: "absent"})
    space.wait_status("demo", phase="Queued", reason="Misconfigured")
    space.merge("finetunejobs", "demo", {"metadata": {"labels": QUEUED}, "spec": {"suspend": True}})
    space.wait_status("demo", phase="Suspended")
    wait_for(lambda: not space.all("workloads"), "out of the queue")
    space.merge("finetunejobs", "demo", {"spec": {"suspend": False}})
    players.run(space, players.next_job(space, "demo", "prepare", 1))
    assert no_failure(space.wait_status("demo", phase="Preparing", reason="Running"))


@pytest.mark.usefixtures("operator", "kueue")
def test_a_suspended_job_gives_its_quota_back_and_lines_up_again(space: Space) -> None:
    first = to_training(space, "first")
    players.run(space, first)
    space.wait_status("first", phase="Training", reason="Running")
    second = to_training(space, "second")
    space.wait_status("second", reason="WaitingForQuota")
    space.merge("finetunejobs", "first", {"spec": {"suspend": True}})
    players.run(space, second)
    space.wait_status("first", phase="Suspended")
    wait_for(lambda: quota_of(space, "first")["status"] == "False", "the quota given back")
    space.merge("finetunejobs", "first", {"spec": {"suspend": False}})
    status = space.wait_status("first", phase="Queued", reason="WaitingForQuota")
    players.succeed(space, second)
    players.run(space, first)
    status = space.wait_status("first", phase="Training", reason="Running")
    assert (status["retries"], status["attemptCount"]) == (0, 1)


@pytest.mark.usefixtures("operator", "kueue")
def test_a_queued_job_is_suspended_and_lines_up_again(space: Space) -> None:
    players.run(space, to_training(space, "first"))
    to_training(space, "second")
    space.wait_status("second", reason="WaitingForQuota")
    space.merge("finetunejobs", "second", {"spec": {"suspend": True}})
    space.wait_status("second", phase="Suspended")
    wait_for(lambda: workload_of(space, "second-train-1") is None, "out of the queue")
    space.merge("finetunejobs", "second", {"spec": {"suspend": False}})
    status = space.wait_status("second", phase="Queued", reason="WaitingForQuota")
    assert (status["retries"], status["attemptCount"]) == (0, 1)


@pytest.mark.usefixtures("operator", "kueue")
def test_a_deleted_job_leaves_its_queue(space: Space) -> None:
    players.run(space, to_training(space, "first"))
    second = to_training(space, "second")
    space.wait_status("second", reason="WaitingForQuota")
    space.delete("finetunejobs", "first")
    players.run(space, second)
    space.wait_status("second", phase="Training", reason="Running")
    wait_for(lambda: workload_of(space, "first-train-1") is None, "the Workload gone")


@pytest.mark.usefixtures("operator", "kueue")
def test_who_suspends_the_stages_job_by_hand_costs_the_work_but_no_retry(space: Space) -> None:
    job = to_training(space, "demo")
    pod = players.run(space, job)
    players.bind(space, pod)
    space.wait_status("demo", phase="Training", reason="Running")
    space.merge("jobs", job, {"spec": {"suspend": True}})
    players.told_to_leave(space, pod)
    players.end_pod(space, pod, 143, "")
    wait_for(lambda: not space.read("jobs", job)["spec"]["suspend"], "the stand-in lets it run again")
    players.gone(space, pod)
    wait_for(lambda: pods_of(space, job), "a new pod")
    players.run(space, job)
    assert no_failure(space.wait_status("demo", phase="Training", reason="Running"))
    players.succeed(space, job)
    assert no_failure(space.wait_status("demo", phase="Succeeded"))


@pytest.mark.usefixtures("operator", "kueue")
def test_who_starts_a_waiting_stages_job_by_hand_gains_nothing(space: Space) -> None:
    players.run(space, to_training(space, "first"))
    second = to_training(space, "second")
    space.wait_status("second", reason="WaitingForQuota")
    space.merge("jobs", second, {"spec": {"suspend": False}})
    wait_for(lambda: space.read("jobs", second)["spec"]["suspend"] and not pods_of(space, second), "held again")
    assert no_failure(space.wait_status("second", phase="Queued", reason="WaitingForQuota"))


@pytest.mark.usefixtures("operator", "kueue")
def test_a_workload_deleted_under_a_running_job_costs_no_retry(space: Space) -> None:
    job = to_training(space, "demo")
    before = players.run(space, job)
    space.wait_status("demo", phase="Training", reason="Running")
    workload = workload_of(space, job)
    assert workload is not None
    space.delete("workloads", workload["metadata"]["name"])
    wait_for(lambda: pods_of(space, job) - {before["metadata"]["uid"]}, "a new pod")
    players.run(space, job)
    assert no_failure(space.wait_status("demo", phase="Training", reason="Running"))


@pytest.mark.usefixtures("operator", "kueue")
def test_a_workload_that_is_held_by_hand_holds_the_job_until_it_is_let_go(space: Space) -> None:
    job = to_training(space, "demo")
    players.run(space, job)
    space.wait_status("demo", phase="Training", reason="Running")
    workload = workload_of(space, job)
    assert workload is not None
    name = workload["metadata"]["name"]
    space.merge("workloads", name, {"spec": {"active": False}})
    status = space.wait_status("demo", phase="Queued", reason="Deactivated")
    assert f"spec.active of Workload {name} is true again" in status["message"]
    wait_for(lambda: not pods_of(space, job), "its pod gone, which the Job controller may be slower to do")
    space.merge("workloads", name, {"spec": {"active": True}})
    players.run(space, job)
    assert no_failure(space.wait_status("demo", phase="Training", reason="Running"))


@pytest.mark.usefixtures("operator", "kueue")
def test_a_stages_job_that_others_delete_while_it_waits_lines_up_again(space: Space) -> None:
    players.run(space, to_training(space, "first"))
    second = to_training(space, "second")
    space.wait_status("second", reason="WaitingForQuota")
    space.delete("jobs", second)
    players.next_job(space, "second", "train", 2)
    status = space.wait_status("second", attemptCount=2, phase="Queued", reason="WaitingForQuota")
    assert (status["retries"], status["attempts"][-2]["reason"]) == (0, "JobDeleted")


@pytest.mark.usefixtures("operator")
def test_a_webhook_that_does_not_answer_is_waited_for(space: Space) -> None:
    """Kueue's own is asked about every Job, with or without a queue; while it is away none can be made."""
    with broken_webhook(space):
        space.submit("demo", SPEC, QUEUED)
        status = space.wait_status("demo", reason="CreationRefused")
        assert "failed calling webhook" in status["message"]
    with KueueStandIn(space, {GPU: 4}).running():
        players.run(space, players.next_job(space, "demo", "prepare", 1))
        assert no_failure(space.wait_status("demo", phase="Preparing", reason="Running"))


@pytest.mark.usefixtures("operator")
def test_where_nobody_takes_up_a_queued_job_that_is_told(space: Space) -> None:
    space.submit("demo", SPEC, QUEUED)
    status = space.wait_status("demo", phase="Queued", reason="NotTakenUp")
    assert "check that Kueue runs" in status["message"]


@pytest.mark.usefixtures("operator", "kueue")
def test_two_pods_are_admitted_stopped_and_resumed_together(space: Space) -> None:
    gang = {"parallelism": {"gpusPerNode": 2, "numNodes": 2}, "output": SHARED}
    job = to_training(space, "low", LOW, **gang)
    pods = [players.run(space, job, index=index) for index in (0, 1)]
    for pod in pods:
        players.bind(space, pod)
    space.wait_status("low", phase="Training", reason="Running")
    high = to_training(space, "high", HIGH)
    for pod in pods:
        players.told_to_leave(space, pod)
    interrupted = word("train", 1, Reason.INTERRUPTED, "Saved at step 7 and left.").to_json()
    players.end_pod(space, pods[1], SAVED, interrupted)
    space.wait_status("low", phase="Queued", reason="Preempted")
    players.end_pod(space, pods[0], SAVED, interrupted)
    for pod in pods:
        players.gone(space, pod)
    players.succeed(space, high)
    wait_for(lambda: len(pods_of(space, job)) == 2, "two new pods")
    for index in (0, 1):
        players.run(space, job, index=index)
    assert no_failure(space.wait_status("low", phase="Training", reason="Running"))
