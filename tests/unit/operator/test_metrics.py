"""What each metric means: what it is made of, and when it changes and ends."""

from __future__ import annotations

import asyncio
import itertools
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

import pytest

from finetune_operator.api import JSON, AttemptStatus, Condition, Phase, Status
from finetune_operator.handlers import work
from finetune_operator.kube import Kube, KubeError, StaleError
from finetune_operator.logs import JsonFormatter
from finetune_operator.metrics import Metrics, Result
from finetune_operator.progress import ProgressReader
from finetune_operator.queue import Key, Queue
from finetune_operator.reasons import Reason
from finetune_operator.reconcile import World, write_status
from tests.unit.operator.builders import SETTINGS, START, a_job, job_body

DEMO = Key("default", "demo")
NOON = datetime(2026, 11, 22, 12, 0, tzinfo=UTC).timestamp()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(clock=lambda: NOON)


def value(metrics: Metrics, metric: str, /, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(metric, labels)


def at(minute: int, second: int = 0) -> str:
    """A time before noon."""
    return f"2026-11-22T11:{minute:02}:{second:02}Z"


def attempt(stage: str = "train", number: int = 1, **fields: Any) -> AttemptStatus:
    return AttemptStatus(number=number, stage=stage, start_time=at(0), **fields)


def failed(number: int = 1, reason: str = "Evicted", retry: str = "Free", stage: str = "train") -> AttemptStatus:
    return attempt(stage, number, reason=reason, retry=retry, completion_time=at(30))


def status(*attempts: AttemptStatus, **fields: Any) -> Status:
    return Status(attempts=attempts, **fields)


def see(metrics: Metrics, name: str = "demo", **fields: Any) -> None:
    metrics.jobs.see(Key("default", name), job_body(name=name, status=fields))


# --- jobs by phase ---------------------------------------------------------------------------------------------------


def phases(metrics: Metrics) -> dict[str, float]:
    """Those of which there are any."""
    (family,) = (found for found in metrics.registry.collect() if found.name == "finetune_jobs")
    return {sample.labels["phase"]: sample.value for sample in family.samples if sample.value}


def test_jobs_are_counted_by_their_phase_as_it_was_last_told(metrics: Metrics) -> None:
    see(metrics, "a", phase="Training")
    see(metrics, "b", phase="Training")
    see(metrics, "c", phase="Succeeded")
    see(metrics, "b", phase="Merging")
    assert phases(metrics) == {"Training": 1, "Merging": 1, "Succeeded": 1}


def test_a_job_that_nobody_looked_at_yet_is_pending(metrics: Metrics) -> None:
    see(metrics)
    assert phases(metrics) == {"Pending": 1}


def test_a_deleted_job_is_counted_no_more(metrics: Metrics) -> None:
    see(metrics, phase="Training")
    metrics.jobs.forget([DEMO, Key("default", "never seen")])
    assert phases(metrics) == {}


def test_every_phase_is_told_also_without_a_job(metrics: Metrics) -> None:
    assert {phase: value(metrics, "finetune_jobs", phase=phase) for phase in Phase} == dict.fromkeys(Phase, 0)


def test_a_phase_of_another_version_is_counted_as_it_is_called(metrics: Metrics) -> None:
    see(metrics, phase="Publishing")
    assert phases(metrics) == {"Publishing": 1}


# --- figures of a job ------------------------------------------------------------------------------------------------

TRAINING: JSON = {
    "phase": "Training",
    "attempts": [{"number": 1, "stage": "train", "startTime": at(0), "runningSince": at(10)}],
    "training": {"step": 30, "totalSteps": 300, "tokensPerSecond": "1234.5"},
}
FIGURES = (
    "finetune_training_step",
    "finetune_training_total_steps",
    "finetune_tokens_per_second",
    "finetune_checkpoint_age_seconds",
    "finetune_job_retries",
)


def figures(metrics: Metrics) -> list[float | None]:
    return [value(metrics, metric, namespace="default", name="demo") for metric in FIGURES]


def test_a_training_tells_its_figures_while_its_pods_run(metrics: Metrics) -> None:
    see(metrics, **TRAINING)
    assert figures(metrics) == [30, 300, 1234.5, 50 * 60, None]


def test_a_training_that_has_told_nothing_yet_has_only_an_age(metrics: Metrics) -> None:
    see(metrics, **TRAINING | {"training": None})
    assert figures(metrics) == [None, None, None, 50 * 60, None]


@pytest.mark.parametrize(
    ("saved", "minutes"),
    [
        pytest.param(at(40), 20, id="since it was complete"),
        pytest.param(at(5), 50, id="since training runs, where it is of an attempt before"),
        pytest.param("2026-11-22T12:00:30Z", 0, id="never in the future, whatever the clock of its node says"),
    ],
)
def test_the_age_of_a_checkpoint_is_what_a_lost_pod_would_cost(metrics: Metrics, saved: str, minutes: int) -> None:
    see(metrics, **TRAINING | {"training": TRAINING["training"] | {"lastCheckpointTime": saved}})
    assert value(metrics, "finetune_checkpoint_age_seconds", namespace="default", name="demo") == minutes * 60


@pytest.mark.parametrize(
    "after",
    [
        pytest.param({"attempts": [{"number": 1, "stage": "train"}]}, id="its pods wait again"),
        pytest.param({"attempts": [{"number": 1, "stage": "merge", "runningSince": at(50)}]}, id="the next stage runs"),
        pytest.param({"phase": "Failed"}, id="the job has ended"),
    ],
)
def test_the_figures_of_a_training_end_with_it(metrics: Metrics, after: JSON) -> None:
    see(metrics, **TRAINING)
    see(metrics, **TRAINING | after)
    assert figures(metrics) == [None] * 5


def test_the_figures_of_a_deleted_job_end(metrics: Metrics) -> None:
    see(metrics, **TRAINING, retries=2)
    metrics.jobs.forget([DEMO])
    assert figures(metrics) == [None] * 5


def test_retries_are_told_of_jobs_that_needed_any_until_they_end(metrics: Metrics) -> None:
    told = []
    for phase, retries in (("Training", 0), ("Training", 2), ("Merging", 2), ("Failed", 3)):
        see(metrics, phase=phase, retries=retries)
        told.append(value(metrics, "finetune_job_retries", namespace="default", name="demo"))
    assert told == [None, 2, 2, None]


# --- what a written status tells -------------------------------------------------------------------------------------


def restarts(metrics: Metrics) -> dict[str, float]:
    """By reason, those of which there are any."""
    (family,) = (found for found in metrics.registry.collect() if found.name == "finetune_job_restarts")
    return {sample.labels["reason"]: sample.value for sample in family.samples if sample.value}


def test_a_stage_that_is_run_again_counts_once_under_what_ended_it(metrics: Metrics) -> None:
    again = status(failed(reason="NodeLost"), attempt(number=2))
    metrics.wrote(status(attempt()), status(failed(reason="NodeLost")))
    assert restarts(metrics) == {}, "it may still come to an end instead"
    metrics.wrote(status(failed(reason="NodeLost")), again)
    metrics.wrote(again, status(failed(reason="NodeLost"), attempt(number=2, running_since=at(40))))
    assert restarts(metrics) == {"NodeLost": 1}


def test_an_end_and_a_new_begin_in_one_write_count_too(metrics: Metrics) -> None:
    metrics.wrote(status(attempt()), status(failed(reason="OutOfMemory"), attempt(number=2)))
    assert restarts(metrics) == {"OutOfMemory": 1}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(status(), status(attempt("prepare")), id="the first attempt"),
        pytest.param(status(), Status(), id="a job that was refused"),
        pytest.param(
            status(attempt("prepare", completion_time=at(5), reason="Completed")),
            status(attempt("prepare", completion_time=at(5), reason="Completed"), attempt()),
            id="the next stage",
        ),
        pytest.param(status(attempt()), status(failed(retry="Never")), id="an end"),
    ],
)
def test_what_is_not_run_again_is_no_restart(metrics: Metrics, before: Status, after: Status) -> None:
    metrics.wrote(before, after)
    assert restarts(metrics) == {}


@dataclass
class Writes:
    """A stand-in for the API server's answer to a write of the status."""

    answer: KubeError | None = None

    async def apply_status(self, *_: Any) -> None:
        if self.answer is not None:
            raise self.answer


async def test_a_restart_counts_when_a_stand_in_took_the_status_and_only_then(metrics: Metrics) -> None:
    before, after = status(failed(reason="NodeLost")), status(failed(reason="NodeLost"), attempt(number=2))
    found, taken = a_job(status=before.to_dict()), a_job(status=after.to_dict())

    def world(answer: KubeError | None) -> World:
        return World(cast("Kube", Writes(answer)), ProgressReader(30), SETTINGS, metrics, lambda: START)

    for refusal in (StaleError(409, "it has changed"), KubeError(503, "busy")):
        with pytest.raises(KubeError):
            await write_status(found, after, world(refusal))
    assert restarts(metrics) == {}, "a write that was lost"
    await write_status(found, after, world(None))
    await write_status(taken, after, world(None))
    assert restarts(metrics) == {"NodeLost": 1}, "a pass more, that has nothing to write"


@pytest.mark.parametrize("reason", [Reason.NODE_LOST, Reason.STALLED_TRAINING, "OutOfMemory"])
def test_restarts_are_told_from_the_start(metrics: Metrics, reason: str) -> None:
    assert value(metrics, "finetune_job_restarts_total", reason=reason) == 0


def waits(metrics: Metrics, stage: str = "train") -> tuple[float | None, float | None]:
    """How many, and their seconds in all."""
    name = "finetune_job_queue_to_running_seconds"
    return value(metrics, f"{name}_count", stage=stage), value(metrics, f"{name}_sum", stage=stage)


def test_a_wait_is_from_the_making_of_a_stages_job_to_all_its_pods_running(metrics: Metrics) -> None:
    runs = status(attempt(running_since=at(2, 5)))
    metrics.wrote(status(attempt()), runs)
    metrics.wrote(runs, status(attempt(running_since=at(2, 5)), progress="1/3 (33%)"))
    assert waits(metrics) == (1, 125)


def test_a_wait_that_ended_while_no_operator_looked_counts(metrics: Metrics) -> None:
    metrics.wrote(status(), status(attempt("prepare", running_since=at(1))))
    assert waits(metrics, "prepare") == (1, 60)


def test_waits_of_quantizations_are_told_together_whatever_users_call_them(metrics: Metrics) -> None:
    metrics.wrote(status(), status(attempt("quantize-my-own-name", running_since=at(1))))
    assert waits(metrics, "quantize") == (1, 60)


def test_what_the_queue_took_back_waits_anew(metrics: Metrics) -> None:
    metrics.wrote(status(attempt(waiting_since=at(20))), status(attempt(running_since=at(25))))
    assert waits(metrics) == (1, 5 * 60)


def test_what_was_suspended_waits_from_its_resumption(metrics: Metrics) -> None:
    resumed = Condition(type="Suspended", status="False", reason="Resumed", message="", last_transition_time=at(50))
    metrics.wrote(status(attempt()), status(attempt(running_since=at(51)), conditions=(resumed,)))
    assert waits(metrics) == (1, 60)


# --- the operator's own work -----------------------------------------------------------------------------------------


def test_passes_are_counted_by_result_and_failed_ones_as_errors(metrics: Metrics) -> None:
    metrics.passed(Result.SUCCESS, 0.02)
    metrics.passed(Result.REQUEUE_AFTER, 0.04)
    metrics.passed(Result.ERROR, 2)
    found = {
        result: value(metrics, "controller_runtime_reconcile_total", controller="finetunejob", result=result)
        for result in Result
    }
    assert found == {"success": 1, "requeue": 0, "requeue_after": 1, "error": 1}
    assert value(metrics, "controller_runtime_reconcile_errors_total", controller="finetunejob") == 1
    assert value(metrics, "controller_runtime_reconcile_time_seconds_sum", controller="finetunejob") == 2.06


async def test_a_pass_that_a_stand_in_fails_counts_as_error_and_retry_and_its_line_names_the_job(
    metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.handler.setFormatter(JsonFormatter())
    world = World(cast("Kube", Refuses()), ProgressReader(30), SETTINGS, metrics, lambda: START)
    queue, beats, done = Queue(), itertools.count(1), asyncio.Event()

    def beat() -> None:
        if next(beats) > 1:  # the first comes before the first pass
            done.set()

    queue.add(DEMO)
    task = asyncio.create_task(work(queue, world, beat))
    async with asyncio.timeout(10):
        await done.wait()
    task.cancel()
    assert value(metrics, "workqueue_retries_total", name="finetunejob") == 1
    assert value(metrics, "controller_runtime_reconcile_total", controller="finetunejob", result="error") == 1
    (line,) = (json.loads(each) for each in caplog.text.splitlines())
    assert (line["finetunejob"], line["level"]) == ("default/demo", "WARNING")
    assert "503: busy; trying again in" in line["message"]


class Refuses:
    """A stand-in for an API server that has no time."""

    async def read(self, *_: Any) -> JSON:
        raise KubeError(503, "busy")


async def test_the_depth_of_the_queue_is_what_waits_and_a_wait_ends_with_a_worker(metrics: Metrics) -> None:
    now = [100.0]
    queue = Queue(waited=metrics.waited, clock=lambda: now[0])
    metrics.queue(lambda: len(queue))
    queue.add(DEMO)
    queue.add(Key("default", "other"))
    assert value(metrics, "workqueue_depth", name="finetunejob") == 2
    now[0] = 107.5
    assert await queue.get() == DEMO
    assert value(metrics, "workqueue_depth", name="finetunejob") == 1
    assert value(metrics, "workqueue_queue_duration_seconds_count", name="finetunejob") == 1
    assert value(metrics, "workqueue_queue_duration_seconds_sum", name="finetunejob") == 7.5


def test_calls_are_counted_by_answer_method_and_kind(metrics: Metrics) -> None:
    metrics.called("GET", "Job", "200")
    metrics.called("GET", "Job", "200")
    metrics.called("GET", "Job", "<error>")
    assert value(metrics, "rest_client_requests_total", code="200", method="GET", kind="Job") == 2
    assert value(metrics, "rest_client_requests_total", code="<error>", method="GET", kind="Job") == 1


def test_a_replica_says_whether_it_leads(metrics: Metrics) -> None:
    told = [value(metrics, "finetune_operator_leader")]
    metrics.leads(leads=True)
    assert [*told, value(metrics, "finetune_operator_leader")] == [0, 1]


def test_each_operator_tells_of_itself_alone() -> None:
    Metrics().leads(leads=True)
    assert value(Metrics(), "finetune_operator_leader") == 0


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("*/*", "text/plain; version=0.0.4; charset=utf-8"),
        ("application/openmetrics-text;version=1.0.0", "application/openmetrics-text; version=1.0.0"),
    ],
)
def test_a_scrape_gets_the_form_that_it_asks_for(metrics: Metrics, accept: str, content_type: str) -> None:
    see(metrics, phase="Training")
    body, told = metrics.render(accept)
    assert told.startswith(content_type)
    assert b'finetune_jobs{phase="Training"} 1.0\n' in body
    assert b"_created" not in body
