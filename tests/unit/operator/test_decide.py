"""What a job does next and says, from what is seen of its Jobs and pods."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_operator.api import JSON, FineTuneJob, Status, format_time
from finetune_operator.facts import Conflict, Facts, Refusal
from finetune_operator.status import Decision, Start, Stop, decide
from finetune_trainer.progress import Progress, Reason, Stage
from tests.unit.operator.builders import (
    RUNNING,
    SETTINGS,
    SPEC,
    START,
    WHOLE,
    Cluster,
    a_job,
    condition,
    container,
    digests,
    ended,
    job_body,
    play,
    stages_made,
    steps,
    word,
)


def finished(status: Status) -> dict[str, str]:
    return {c.type: c.status for c in status.conditions or ()}


def test_a_new_job_gets_its_first_stage_and_a_whole_status() -> None:
    cluster = Cluster()
    decision = cluster.step()
    assert decision.actions == (Start(decision.actions[0].step, 1),)  # type: ignore[union-attr]
    status = decision.status
    assert (status.phase, status.attempt_count, status.retries) == ("Pending", 1, 0)
    assert [stage.state for stage in status.stages or ()] == ["Pending", *["Waiting"] * 4]
    assert finished(status) == {"Accepted": "True", "Succeeded": "Unknown", "Finished": "False"}
    assert cluster.said == ["Pending"]


def test_every_stage_runs_once_in_order_and_the_job_succeeds() -> None:
    cluster = Cluster()
    play(cluster)
    status = cluster.job.status
    assert steps() == ["prepare", "train", "merge", "quantize-0", "publish-0"]
    assert cluster.created == [f"demo-{step}-1" for step in steps()]
    assert [(attempt.stage, attempt.number) for attempt in status.attempts or ()] == [
        ("prepare", 1), ("train", 1), ("merge", 1), ("quantize-gptq4", 1), ("publish-bucket", 1)
    ]  # fmt: skip
    assert (status.phase, status.reason, status.retries) == ("Succeeded", "Completed", 0)
    assert status.attempt_count == 1, "nothing was run again"
    assert finished(status) == {"Accepted": "True", "Succeeded": "True", "Finished": "True"}
    assert digests(cluster) == [f"{step}-digest" for step in steps()]
    assert [artifact.path for artifact in status.artifacts or ()] == [
        "demo-0123abcd/train",
        "demo-0123abcd/merge",
        "demo-0123abcd/quantize-0",
    ]
    assert status.resolved is not None
    assert status.resolved["learningRate"] == "0.0002"
    assert status.training is not None
    assert (status.training.loss, status.training.eta, status.progress) == ("1.204", None, "40/40 (100%)")
    assert (status.training.eval_loss, status.training.last_checkpoint_step) == ("1.5", 40)
    assert "Succeeded" in cluster.said


def test_the_phase_is_that_of_the_stage_that_is_due() -> None:
    cluster = Cluster()
    phases = []
    for _ in steps():
        cluster.settle()
        cluster.run_pod()
        phases.append(cluster.settle().status.phase)
        cluster.say()
    assert phases == ["Preparing", "Training", "Merging", "Quantizing", "Publishing"]


def test_the_report_is_told_once_a_stage_has_written_it() -> None:
    cluster = Cluster()
    cluster.settle()
    assert cluster.job.status.report is None
    cluster.say()
    assert cluster.settle().status.report == "demo-0123abcd/report/index.html"


def test_a_job_without_merge_ends_with_the_adapter() -> None:
    cluster = Cluster(spec=SPEC | {"merge": {"policy": "Never"}})
    play(cluster)
    assert stages_made(cluster) == ["prepare", "train"]


def test_a_finished_job_is_never_touched_again() -> None:
    cluster = Cluster()
    play(cluster)
    cluster.jobs.clear()
    cluster.pods.clear()
    cluster.later(3600)
    writes = cluster.writes
    decision = cluster.step()
    assert (decision.actions, decision.events, decision.requeue_after_seconds) == ((), (), None)
    assert cluster.writes == writes


def test_nothing_is_written_when_nothing_has_changed() -> None:
    cluster = Cluster()
    cluster.settle()
    cluster.run_pod()
    cluster.settle()
    writes = cluster.writes
    for _ in range(5):
        cluster.later(30)
        cluster.step()
    assert cluster.writes == writes


def test_a_deleted_job_resource_is_left_alone() -> None:
    job = a_job(deletionTimestamp=format_time(START))
    assert decide(Facts(job), SETTINGS, START).actions == ()


# --- progress --------------------------------------------------------------------------------------------------------


def begin_training(cluster: Cluster) -> None:
    """Prepare is done, and the pod of train runs."""
    cluster.settle()
    cluster.say()
    cluster.settle()
    cluster.run_pod()


def training(cluster: Cluster, **told: float) -> Status:
    begin_training(cluster)
    cluster.progress = Progress(stage=Stage.TRAIN, attempt=1, activity="training", done=128, total=300, **told)
    return cluster.settle().status


def test_progress_is_told_in_figures_a_person_can_read() -> None:
    status = training(Cluster(), loss=1.20441, eta_seconds=725, tokens_per_second=1234.56, epoch=0.43)
    assert status.training is not None
    assert status.progress == "128/300 (42%)"
    assert (status.training.loss, status.training.eta) == ("1.204", "12m")
    assert status.message == "Stage train runs: training."


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_is_no_number_never_reaches_the_status(value: float) -> None:
    told = Progress.model_construct(
        stage=Stage.TRAIN,
        attempt=1,
        activity="x",
        done=1,
        total=2,
        loss=value,
        unit="steps",
        epoch=None,
        eval_loss=value,
        tokens_per_second=value,
        eta_seconds=value,
        peak_memory_bytes=None,
        checkpoint_step=None,
    )
    cluster = Cluster()
    training(cluster)
    cluster.progress = told
    status = cluster.settle().status
    assert status.training is not None
    assert (status.training.loss, status.training.eta) == (None, None)


def test_a_pod_that_stops_telling_keeps_what_it_told() -> None:
    cluster = Cluster()
    before = training(cluster, loss=1.5, eta_seconds=725)
    cluster.progress = None
    assert cluster.settle().status == before


def test_the_count_of_one_stage_is_never_told_of_the_next() -> None:
    cluster = Cluster()
    cluster.settle()
    cluster.run_pod()
    counted = {"activity": "copying the model", "done": 114, "total": 254, "unit": "bytes"}
    cluster.progress = Progress(stage=Stage.PREPARE, attempt=1, **counted)
    assert cluster.settle().status.progress == "114 B/254 B (44%)"
    cluster.progress = None
    cluster.say()
    cluster.lose_status = True
    cluster.step()
    assert (cluster.live, cluster.status["progress"]) == ("demo-train-1", "114 B/254 B (44%)")
    assert cluster.settle().status.progress is None
    cluster.run_pod()
    assert cluster.settle().status.progress is None
    cluster.progress = Progress(stage=Stage.PREPARE, attempt=1, **counted)  # another stage's pod, of the same number
    assert cluster.settle().status.progress is None


def test_bytes_are_no_training_steps() -> None:
    cluster = Cluster()
    training(cluster)
    counted = {"activity": "proving the adapter", "done": 114, "total": 254, "unit": "bytes"}
    cluster.progress = Progress(stage=Stage.TRAIN, attempt=1, **counted)
    status = cluster.settle().status
    assert status.progress == "128/300 (42%)", "not that of the bytes"
    assert status.training is not None
    assert (status.training.step, status.training.progress) == (128, "128/300 (42%)")


def test_a_training_that_is_run_again_keeps_its_progress_until_it_counts_on() -> None:
    cluster = Cluster()
    training(cluster)
    cluster.end_pod(20, "", "Error")
    cluster.settle()
    cluster.later(400)
    cluster.settle()
    cluster.run_pod()
    for told in ({"activity": "verifying data/", "done": 9, "total": 9, "unit": "bytes"}, {"activity": "loading"}):
        cluster.progress = Progress(stage=Stage.TRAIN, attempt=2, **told)
        assert cluster.settle().status.progress == "128/300 (42%)"
    cluster.progress = Progress(stage=Stage.TRAIN, attempt=2, activity="training", done=120, total=300)
    assert cluster.settle().status.progress == "120/300 (40%)"


def test_before_the_first_step_of_a_training_what_it_measures_is_progress_and_what_it_verifies_is_none() -> None:
    cluster = Cluster()
    begin_training(cluster)
    told = {"activity": "verifying data/", "done": 254, "total": 254, "unit": "bytes"}
    cluster.progress = Progress(stage=Stage.TRAIN, attempt=1, **told)
    assert cluster.settle().status.progress is None
    told = {"activity": "measuring the base model", "done": 3, "total": 4, "unit": "rows"}
    cluster.progress = Progress(stage=Stage.TRAIN, attempt=1, **told)
    assert cluster.settle().status.progress == "3/4 (75%)"


def test_after_the_end_the_progress_is_that_of_the_training() -> None:
    cluster = Cluster()
    for _ in steps():
        cluster.settle()
        cluster.run_pod()
        stage = Stage(cluster.live.split("-")[1])
        cluster.progress = Progress(stage=stage, attempt=1, activity="x", done=7, total=7, unit="rows")
        assert cluster.settle().status.progress == "7/7 (100%)"
        cluster.say()
    status = cluster.settle().status
    assert (status.phase, status.progress) == ("Succeeded", "40/40 (100%)")


def test_a_training_that_nobody_listened_to_is_told_in_full_by_its_last_word() -> None:
    cluster = Cluster()
    begin_training(cluster)
    last = {"activity": "checking what was written", "done": 9, "total": 9, "unit": "bytes"}
    figures = {"resumed_from_step": 20, "tokens_per_second": 1234.5, "peak_memory_bytes": 2**30}
    cluster.say(progress=Progress(stage=Stage.TRAIN, attempt=1, **last, **figures))
    told = cluster.settle().status.training
    assert told is not None
    assert (told.resumed_from_step, told.tokens_per_second, told.peak_memory) == (20, "1234", "1")
    assert (told.step, told.progress) == (40, "40/40 (100%)")


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_only_running_a_stage_again_takes_the_next_number() -> None:
    cluster = Cluster()
    cluster.settle()
    cluster.say()
    cluster.settle()
    cluster.end_pod(137, "", "Error", conditions=[condition("DisruptionTarget", "PreemptionByScheduler")])
    play(cluster)
    made = ["prepare-1", "train-1", "train-2", "merge-2", "quantize-0-2", "publish-0-2"]
    assert cluster.created == [f"demo-{name}" for name in made]
    assert [f"{attempt.stage}-{attempt.number}" for attempt in cluster.job.status.attempts or ()] == [
        *made[:-2], "quantize-gptq4-2", "publish-bucket-2"
    ]  # fmt: skip
    assert cluster.job.status.attempt_count == 2


def test_quantized_forms_share_a_number() -> None:
    forms = [{"name": "b", "method": "GPTQ"}, {"name": "a", "method": "GPTQ"}]
    cluster = Cluster(spec=SPEC | {"quantize": forms})
    play(cluster)
    assert cluster.created[-2:] == ["demo-quantize-0-1", "demo-quantize-1-1"]
    assert cluster.job.status.phase == "Succeeded"


def test_a_number_is_taken_by_a_pod_even_if_neither_status_nor_job_know_of_it() -> None:
    cluster = Cluster()
    cluster.settle()
    cluster.say()
    cluster.lose_status = True
    cluster.step()
    cluster.end_pod(1, "boom", "Error")
    del cluster.jobs["demo-train-1"]
    cluster.settle()
    assert cluster.created == ["demo-prepare-1", "demo-train-1", "demo-train-2"]


def test_a_pod_that_leaves_and_that_nobody_remembers_is_waited_for() -> None:
    cluster = Cluster()
    cluster.lose_status = True
    cluster.step()
    cluster.run_pod()
    del cluster.jobs["demo-prepare-1"]
    status = cluster.settle().status
    assert (cluster.created, status.phase, status.reason) == (["demo-prepare-1"], "Pending", "Starting")
    cluster.pods["demo-prepare-1"]["metadata"]["deletionTimestamp"] = format_time(cluster.now)
    cluster.later(31)
    cluster.settle()
    assert cluster.created == ["demo-prepare-1", "demo-prepare-2"]


def test_every_event_of_a_job_has_a_name_of_its_own() -> None:
    cluster = Cluster(spec=WHOLE | {"runPolicy": {"maxRetries": 9}})
    for _ in steps():
        for ends_well in (False, True):
            cluster.later(400)
            cluster.settle()
            cluster.pods[cluster.live]["status"] |= NO_ROOM
            cluster.later(20)
            cluster.settle()
            if ends_well:
                cluster.say()
            else:
                cluster.end_pod(1, "boom", "Error")
            cluster.settle()
    assert cluster.job.status.phase == "Succeeded"
    assert cluster.said.count("Unschedulable") == 2 * len(steps())
    assert len(cluster.keys) == len(set(cluster.keys))


# --- failures and retries --------------------------------------------------------------------------------------------


def fail(cluster: Cluster, code: int = 1, message: str = "Traceback: boom") -> None:
    cluster.settle()
    cluster.later(400)
    cluster.settle()
    cluster.end_pod(code, message, "Error")
    cluster.settle()


def test_an_unknown_failure_is_retried_so_often_and_no_more() -> None:
    cluster = Cluster()
    for _ in range(4):
        fail(cluster)
    status = cluster.job.status
    assert stages_made(cluster) == ["prepare"] * 4
    assert (status.phase, status.reason, status.retries) == ("Failed", "Unknown", 3)
    assert "Gave up after 3 retries" in (status.message or "")
    assert "boom" in (status.message or "")
    assert finished(status) == {"Accepted": "True", "Succeeded": "False", "Finished": "True"}


def test_a_stage_has_failed_only_when_it_is_not_run_again() -> None:
    def state() -> str:
        return (cluster.job.status.stages or ())[0].state

    cluster = Cluster(spec=SPEC | {"runPolicy": {"maxRetries": 1}})
    cluster.settle()
    cluster.end_pod(1, "boom", "Error")
    cluster.settle()
    waiting = state()
    taken = replace(cluster.facts, conflicts=(Conflict("Job", "demo-prepare-2", leftover=False),))
    ended = decide(taken, SETTINGS, cluster.now + timedelta(seconds=301)).status
    fail(cluster)
    assert (waiting, state()) == ("Retrying", "Failed")
    assert (ended.phase, (ended.stages or ())[0].state) == ("Failed", "Failed"), "and not when the job has ended"


def test_max_retries_zero_retries_nothing() -> None:
    cluster = Cluster(spec=SPEC | {"runPolicy": {"maxRetries": 0}})
    fail(cluster)
    assert cluster.job.status.phase == "Failed"
    assert cluster.created == ["demo-prepare-1"]


def test_a_retry_waits_twice_as_long_each_time() -> None:
    cluster = Cluster()
    waits = []
    for _ in range(3):
        cluster.settle()
        cluster.end_pod(1, "boom", "Error")
        cluster.pods[cluster.live]["status"]["containerStatuses"][0]["state"]["terminated"]["finishedAt"] = format_time(
            cluster.now
        )
        waits.append(cluster.settle().requeue_after_seconds)
        cluster.later(400)
    assert waits == [10, 20, 40]


@pytest.mark.parametrize("reason", [Reason.INVALID_DATASET, Reason.NOT_FOUND, Reason.VOLUME_FULL])
def test_what_only_the_user_can_mend_ends_at_once_in_the_trainers_words(reason: Reason) -> None:
    cluster = Cluster()
    cluster.settle()
    cluster.say(reason=reason, message="dataset 'dolly', line 3: no field 'text'. Set columns.")
    cluster.settle()
    status = cluster.job.status
    assert (status.phase, status.reason) == ("Failed", reason)
    assert status.message == "dataset 'dolly', line 3: no field 'text'. Set columns."
    assert len(cluster.created) == 1


def test_a_disrupted_pod_does_not_count() -> None:
    cluster = Cluster()
    for _ in range(7):
        cluster.settle()
        cluster.later(400)
        cluster.settle()
        cluster.end_pod(137, "", "Error", conditions=[condition("DisruptionTarget", "PreemptionByScheduler")])
        cluster.settle()
    play(cluster)
    assert (cluster.job.status.phase, cluster.job.status.retries) == ("Succeeded", 0)


def test_a_lost_word_runs_the_stage_again_uncounted() -> None:
    cluster = Cluster()
    cluster.settle()
    cluster.end_pod(0, "this is no JSON")
    play(cluster)
    status = cluster.job.status
    assert stages_made(cluster) == ["prepare", *steps()]
    assert (status.phase, status.retries) == ("Succeeded", 0)


def test_three_lost_words_in_a_row_end_the_job_with_a_clear_word() -> None:
    cluster = Cluster()
    for _ in range(3):
        fail(cluster, 0, "")
    status = cluster.job.status
    assert len(cluster.created) == 3
    assert (status.phase, status.reason) == ("Failed", "LostWord")
    assert "3 times without a last word" in (status.message or "")


def test_a_word_of_another_attempt_proves_nothing() -> None:
    cluster = Cluster()
    cluster.settle()
    cluster.end_pod(0, word("prepare", 9).to_json())
    cluster.settle()
    assert digests(cluster)[0] is None


def test_a_deleted_stage_job_is_run_again_under_the_next_number() -> None:
    cluster = Cluster()
    cluster.settle()
    cluster.run_pod()
    cluster.settle()
    cluster.delete("demo-prepare-1")
    play(cluster)
    assert stages_made(cluster)[:3] == ["prepare", "prepare", "train"]
    assert cluster.job.status.retries == 0
    assert "JobDeleted" in cluster.said


def test_attempts_in_the_status_are_the_last_ten() -> None:
    cluster = Cluster(spec=WHOLE | {"runPolicy": {"maxRetries": 20}})
    for _ in range(15):
        fail(cluster)
    assert cluster.created[-1] == "demo-prepare-16"
    attempts = cluster.job.status.attempts or ()
    assert (len(attempts), attempts[-2].number, cluster.job.status.retries) == (10, 15, 15)


# --- what may come, and what never starts ----------------------------------------------------------------------------

IMAGE = {"containerStatuses": container(waiting={"reason": "ImagePullBackOff", "message": "no such image"})}
NO_CLAIM = {
    "conditions": [condition("PodScheduled", "Unschedulable", 'persistentvolumeclaim "models" not found', "False")]
}
NO_ROOM = {
    "conditions": [condition("PodScheduled", "Unschedulable", "0/3 nodes: Insufficient nvidia.com/gpu", "False")]
}


@pytest.mark.parametrize(
    ("status", "reason", "says"),
    [(IMAGE, "ImagePullFailed", "no such image"), (NO_CLAIM, "VolumeUnbound", "'models' is not there")],
)
def test_an_obstacle_shows_at_once_and_ends_the_job_after_the_deadline(
    status: dict[str, object], reason: str, says: str
) -> None:
    cluster = Cluster()
    cluster.settle()
    cluster.pods[cluster.live]["status"] |= status
    told = cluster.settle().status
    assert (told.phase, told.reason) == ("Pending", reason)
    assert says in (told.message or "")
    cluster.later(299)
    assert cluster.settle().status.phase == "Pending"
    cluster.later(2)
    first = cluster.step()
    assert (first.actions, first.status.phase) == ((), "Pending")
    assert any(isinstance(action, Stop) for action in cluster.step().actions)
    told = cluster.settle().status
    assert (told.phase, told.reason, cluster.jobs) == ("Failed", reason, {})
    assert "Not mended within 300 s" in (told.message or "")


def test_an_obstacle_that_goes_away_is_forgotten() -> None:
    cluster = Cluster()
    cluster.settle()
    cluster.pods[cluster.live]["status"] |= NO_CLAIM
    cluster.settle()
    cluster.run_pod()
    assert cluster.settle().status.reason == "Running"


def test_a_full_cluster_is_waited_for_without_end() -> None:
    cluster = Cluster()
    cluster.settle()
    cluster.pods[cluster.live]["status"] |= NO_ROOM
    cluster.later(86400)
    status = cluster.settle().status
    assert (status.phase, status.reason) == ("Pending", "Unschedulable")
    assert "Insufficient nvidia.com/gpu" in (status.message or "")


def test_a_node_that_is_full_for_a_moment_is_not_told_of() -> None:
    """The scheduler counts the pod of the stage before for some seconds after its end."""
    cluster = Cluster()
    cluster.settle()
    cluster.say()
    cluster.settle()
    cluster.pods[cluster.live]["status"] |= NO_ROOM
    cluster.later(5)
    assert cluster.settle().status.reason == "Starting"
    cluster.run_pod()
    cluster.settle()
    assert "Unschedulable" not in cluster.said


def test_a_pod_that_is_being_deleted_has_its_time_to_save_a_checkpoint() -> None:
    cluster = Cluster()
    cluster.settle()
    cluster.run_pod()
    cluster.settle()
    cluster.pods[cluster.live]["metadata"]["deletionTimestamp"] = format_time(cluster.now + timedelta(seconds=120))
    taint = condition("DisruptionTarget", "DeletionByTaintManager")
    cluster.pods[cluster.live]["status"]["conditions"] = [taint, condition("Ready")]
    cluster.jobs[cluster.live]["status"] = {"conditions": [condition("FailureTarget", "BackoffLimitExceeded")]}
    cluster.settle()
    assert len(cluster.created) == 1
    cluster.later(151)
    cluster.settle()
    assert cluster.created == ["demo-prepare-1", "demo-prepare-2"]
    assert (cluster.job.status.attempts or ())[0].reason == "Evicted"


def test_a_pod_on_a_node_that_is_not_heard_of_is_not_waited_for() -> None:
    cluster = Cluster()
    cluster.settle()
    cluster.run_pod()
    cluster.settle()
    first = cluster.live
    cluster.pods[first]["metadata"]["deletionTimestamp"] = format_time(cluster.now + timedelta(seconds=120))
    taint = condition("DisruptionTarget", "DeletionByTaintManager")
    cluster.pods[first]["status"]["conditions"] = [taint, condition("Ready", status="False")]
    cluster.slow = True
    cluster.settle()
    assert cluster.created == [first, "demo-prepare-2"]
    assert cluster.jobs[first]["metadata"]["deletionTimestamp"]
    (lost, _) = cluster.job.status.attempts or ()
    assert (lost.reason, lost.retry, cluster.job.status.retries) == ("NodeLost", "Free", 0)


def test_a_taken_name_is_waited_for_then_ends_the_job() -> None:
    cluster = Cluster()
    facts = Facts(cluster.job, conflicts=(Conflict("Job", "demo-prepare-1", leftover=False),))
    early = decide(facts, SETTINGS, START)
    late = decide(facts, SETTINGS, START + timedelta(seconds=301))
    assert (early.actions, early.status.phase, early.status.reason) == ((), "Pending", "NameConflict")
    assert (late.status.phase, late.status.reason, late.actions) == ("Failed", "NameConflict", ())


def test_leftovers_of_a_namesake_are_waited_for_without_end() -> None:
    facts = Facts(a_job(), conflicts=(Conflict("ConfigMap", "demo-config", leftover=True),))
    late = decide(facts, SETTINGS, START + timedelta(days=1))
    assert (late.status.phase, late.status.reason) == ("Pending", "NameConflict")


WEBHOOK = 'Internal error occurred: failed calling webhook "w": read tcp 127.0.0.1:{}->127.0.0.1:1: reset'


def refused(status: int, message: str, before: JSON | None = None, *, seconds: float = 0) -> Decision:
    refusal = Refusal("Job", "demo-prepare-1", status, message)
    return decide(Facts(a_job(status=before), refusal=refusal), SETTINGS, START + timedelta(seconds=seconds))


@pytest.mark.parametrize(
    ("status", "message", "reason", "says"),
    [
        (403, "jobs is forbidden: exceeded quota: jobs, requested: 1", "QuotaExceeded", "until the namespace's quota"),
        (403, 'jobs.batch is forbidden: User "x" cannot create', "CreationRefused", "It is tried again"),
        (500, WEBHOOK.format(4), "CreationRefused", "It is tried again"),
        (400, "admission webhook denied the request: no team label", "CreationRefused", "no team label"),
    ],
)
def test_a_job_that_cannot_be_made_is_told_and_waited_for(status: int, message: str, reason: str, says: str) -> None:
    for seconds in (0, 86400):
        told = refused(status, message, seconds=seconds)
        assert (told.actions, told.status.phase, told.status.reason) == ((), "Pending", reason)
        assert says in (told.status.message or "")
        assert "Job demo-prepare-1 cannot be created" in (told.status.message or "")
        assert (told.status.attempt_count, told.status.attempts) == (0, None), "nothing was tried"


def test_a_refusal_that_never_reads_the_same_is_written_once() -> None:
    """Each write of the status is a change that brings the next pass at once: there would be no pause between them."""
    first = refused(500, WEBHOOK.format(40001)).status.to_dict()
    second = refused(500, WEBHOOK.format(40002), first, seconds=60)
    assert second.status.to_dict() == first
    assert second.events == ()
    other = refused(403, "exceeded quota: jobs", first)
    assert (other.status.reason, "exceeded quota" in (other.status.message or "")) == ("QuotaExceeded", True)


def test_a_job_that_can_never_be_made_ends_with_the_api_servers_word() -> None:
    told = refused(422, "Job.batch is invalid: requests must be less than or equal to cpu limit")
    assert (told.status.phase, told.status.reason, told.actions) == ("Failed", "InvalidSpec", ())
    assert "less than or equal to cpu limit" in (told.status.message or "")


# --- stored specs that make no sense ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [{}, SPEC | {"pause": True}, SPEC | {"quantize": [{"name": "x", "method": "AWQ9"}]}])
def test_a_stored_spec_of_another_version_is_an_end_not_a_crash(spec: dict[str, object]) -> None:
    decision = decide(Facts(a_job(spec)), SETTINGS, START)
    assert finished(decision.status) == {"Accepted": "False", "Succeeded": "False", "Finished": "True"}
    assert (decision.status.phase, decision.status.reason) == ("Failed", "InvalidSpec")
    assert decision.actions == ()


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["phase", "conditions", "stages", "attempts", "type", "status", "name", "training"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_no_stored_status_makes_a_pass_crash(junk: object) -> None:
    status = junk if isinstance(junk, dict) else {"conditions": junk, "attempts": junk, "stages": junk}
    job = FineTuneJob.parse({**job_body(), "status": status})
    decide(Facts(job), SETTINGS, START)


# --- restarts --------------------------------------------------------------------------------------------------------

MISHAPS = ("lose the status", "delete the Job", "lose the word", "disrupt", "crash", "run", "succeed", "wait")


def mishap(cluster: Cluster, what: str) -> None:
    """Something happens to the live Job, or to the operator."""
    if what == "lose the status":
        cluster.lose_status = True
    elif what == "wait" or not cluster.jobs or "status" in cluster.jobs[cluster.live]:
        cluster.later(60)
    elif what == "delete the Job":
        cluster.delete(cluster.live)
    elif what == "lose the word":
        cluster.end_pod(0, "")
    elif what == "disrupt":
        cluster.end_pod(137, "", "Error", conditions=[condition("DisruptionTarget", "EvictionByEvictionAPI")])
    elif what == "crash":
        cluster.end_pod(1, "boom", "Error")
    elif what == "run":
        cluster.pods[cluster.live]["status"] = dict(RUNNING)
    else:
        cluster.say()


@settings(max_examples=150)
@given(st.lists(st.sampled_from(MISHAPS), max_size=40))
def test_whatever_happens_no_job_is_made_twice_and_the_line_stays_in_order(events: list[str]) -> None:
    cluster = Cluster()
    for what in events:
        mishap(cluster, what)
        cluster.step()  # asserts itself that no name is made twice
        proven = [digest is not None for digest in digests(cluster)]
        assert proven == sorted(proven, reverse=True)
    made = [steps().index(stage) for stage in stages_made(cluster)]
    assert made == sorted(made), "no stage before its predecessor's proof"
    assert (cluster.job.status.retries or 0) <= 3


@settings(max_examples=100)
@given(st.sets(st.integers(0, 40)))
def test_lost_status_writes_change_nothing_in_the_outcome(lost: set[int]) -> None:
    cluster, passes = Cluster(), 0
    while not cluster.job.status.finished and passes < 100:
        cluster.lose_status = passes in lost
        cluster.step()
        passes += 1
        if cluster.jobs and "status" not in cluster.jobs[cluster.live] and passes % 2:
            cluster.say()
    assert stages_made(cluster) == steps()
    assert cluster.job.status.phase == "Succeeded"
    assert digests(cluster) == [f"{step}-digest" for step in steps()]


def test_an_attempt_whose_end_was_never_written_is_not_left_open() -> None:
    """Proven, the next stage's Job made, the status write lost; then the pod is gone before its Job is complete."""
    cluster = Cluster()
    cluster.settle()
    cluster.run_pod()
    cluster.settle()
    first = cluster.live
    cluster.pods[first]["status"] = ended(0, "Completed", word("prepare", 1).to_json())
    cluster.lose_status = True
    cluster.step()
    assert cluster.live == "demo-train-1"
    del cluster.pods[first]
    cluster.settle()
    open_ones = [a.stage for a in cluster.job.status.attempts or () if a.completion_time is None]
    assert open_ones == ["train"]
    play(cluster)
    assert cluster.job.status.phase == "Succeeded"
    assert all(attempt.completion_time for attempt in cluster.job.status.attempts or ())
