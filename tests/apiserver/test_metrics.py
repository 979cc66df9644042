"""What a real operator tells Prometheus over the life of a job. No kubelet: pods are played by the test."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime

from prometheus_client.parser import text_string_to_metric_families

from finetune_operator.api import JSON
from finetune_trainer.progress import Progress, Stage
from tests.apiserver import players
from tests.apiserver.api import Space, wait_for
from tests.apiserver.cases import spec
from tests.apiserver.conftest import ACCOUNT, Operator

FIGURES = (
    "finetune_training_step",
    "finetune_training_total_steps",
    "finetune_tokens_per_second",
    "finetune_checkpoint_age_seconds",
    "finetune_job_retries",
)
SPEC = spec(merge={"policy": "Never"})


class Scrape:
    """Everything that an operator tells at one moment."""

    def __init__(self, operator: Operator) -> None:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{operator.port}/metrics", timeout=5) as answer:
            self.content_type = answer.headers["Content-Type"]
            text = answer.read().decode()
        self._samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def value(self, metric: str, /, **labels: str) -> float:
        """The sum of all series with these labels."""
        return sum(s.value for s in self._samples if s.name == metric and labels.items() <= s.labels.items())

    def figures(self, space: Space, name: str) -> dict[str, float]:
        """Those of a job."""
        of = {"namespace": space.namespace, "name": name}
        return {s.name: s.value for s in self._samples if s.name in FIGURES and s.labels == of}

    def phases(self) -> dict[str, float]:
        """Those that any job is in."""
        return {s.labels["phase"]: s.value for s in self._samples if s.name == "finetune_jobs" and s.value}


def scrape_when(operator: Operator, so: Callable[[Scrape], bool], what: str) -> Scrape:
    """A scrape of which this is so."""

    def probe() -> Scrape | None:
        if not operator.get("/healthz"):
            return None  # it starts
        scrape = Scrape(operator)
        return scrape if so(scrape) else None

    return wait_for(probe, what)


def test_the_figures_move_with_a_played_job_and_are_right_after_a_restart(
    new_operator: Callable[..., Operator], space: Space, teller: tuple[str, list[Progress]]
) -> None:
    operator = new_operator(FINETUNE_LOG_FORMAT="json")
    wait_for(lambda: operator.get("/readyz") == 200, "the operator ready")
    assert (Scrape(operator).phases(), Scrape(operator).value("finetune_operator_leader")) == ({}, 1)

    space.submit("demo", SPEC)
    players.run(space, players.next_job(space, "demo", "prepare", 1))
    scrape_when(operator, lambda s: s.phases() == {"Preparing": 1}, "a job that prepares")
    players.succeed(space, "demo-prepare-1")

    address, told = teller
    saved = {"checkpoint_step": 20, "checkpoint_time": datetime.now(UTC)}
    told.append(Progress(stage=Stage.TRAIN, attempt=1, activity="training", done=30, total=300, **saved))
    told.append(told[0].model_copy(update={"tokens_per_second": 1234.0}))
    players.run(space, players.next_job(space, "demo", "train", 1), address)
    scrape = scrape_when(
        operator,
        # figures are those that a watch tells of, a wait counts when its end is written: either may be first
        lambda s: "finetune_tokens_per_second" in s.figures(space, "demo") and waited(s, "train") == 1,
        "the figures",
    )
    figures = scrape.figures(space, "demo")
    assert 0 <= figures.pop("finetune_checkpoint_age_seconds") < 60
    assert figures == {
        "finetune_training_step": 30,
        "finetune_training_total_steps": 300,
        "finetune_tokens_per_second": 1234,
    }
    assert scrape.phases() == {"Training": 1}
    for stage in ("prepare", "train"):
        assert waited(scrape, stage) == 1
    assert scrape.value("finetune_job_restarts_total") == 0
    assert scrape.value("rest_client_requests_total", method="POST", kind="Job", code="201") == 2
    assert scrape.value("controller_runtime_reconcile_total", result="error") == 0
    passes = scrape.value("controller_runtime_reconcile_total")
    assert passes <= scrape.value("workqueue_queue_duration_seconds_count")
    assert passes == scrape.value("controller_runtime_reconcile_time_seconds_count") > 0

    players.end(space, "demo-train-1", 1, "Traceback: boom")
    players.next_job(space, "demo", "train", 2)
    scrape_when(operator, lambda s: s.value("finetune_job_restarts_total", reason="Unknown") == 1, "a restart")
    scrape_when(operator, lambda s: s.figures(space, "demo") == {"finetune_job_retries": 1}, "what a watch tells of it")

    operator.restart()
    scrape = scrape_when(operator, lambda s: s.phases() == {"Training": 1}, "the phase after a restart")
    assert scrape.figures(space, "demo") == {"finetune_job_retries": 1}
    players.succeed(space, "demo-train-2")
    scrape = scrape_when(operator, lambda s: s.phases() == {"Succeeded": 1}, "the end")
    assert scrape.figures(space, "demo") == {}
    assert scrape.value("finetune_job_restarts_total") == 0, "what was counted before the restart is not counted again"

    operator.restart()
    scrape = scrape_when(operator, lambda s: s.phases() == {"Succeeded": 1}, "a finished job after a restart")
    assert scrape.value("rest_client_requests_total", kind="FineTuneJob", method="PATCH") == 0
    space.delete("finetunejobs", "demo")
    scrape_when(operator, lambda s: s.phases() == {}, "a deleted job gone")
    check_lines(operator, f"{space.namespace}/demo")


def waited(scrape: Scrape, stage: str) -> float:
    """How many waits for the pods of a stage are over."""
    return scrape.value("finetune_job_queue_to_running_seconds_count", stage=stage)


def test_of_two_operators_that_is_the_leader_which_works(new_operator: Callable[..., Operator]) -> None:
    first = new_operator(FINETUNE_LEASE=f"default/{ACCOUNT}")
    scrape_when(first, lambda s: s.value("finetune_operator_leader") == 1, "a leader")
    second = new_operator(FINETUNE_LEASE=f"default/{ACCOUNT}")
    wait_for(lambda: second.get("/readyz") == 200, "the standby ready")
    assert Scrape(second).value("finetune_operator_leader") == 0
    assert first.stop() == 0
    scrape_when(second, lambda s: s.value("finetune_operator_leader") == 1, "the standby in the place of the leader")


def check_lines(operator: Operator, key: str) -> None:
    """Each line about a job names it, and that of a failed attempt says which one and why."""
    lines: list[JSON] = [json.loads(line) for line in operator.log.read_text().splitlines()]
    about = [line for line in lines if line["logger"] == "finetune_operator.reconcile"]
    assert {line.get("finetunejob") for line in about} == {key}
    (failed,) = (line for line in about if "retry" in line)
    assert (failed["stage"], failed["attempt"], failed["reason"], failed["retry"]) == ("train", 1, "Unknown", "Counted")
    assert (failed["level"], "boom" in failed["message"]) == ("WARNING", True)
    ended = [(line["phase"], line["reason"]) for line in about if "phase" in line][-1]
    assert ended == ("Succeeded", "Completed")
