"""What Prometheus is told, under /metrics: how the operator works and how its jobs fare. Nothing is decided by it.

Names are those that dashboards know from controller-runtime and client-go; what is our own begins with `finetune_`.
Labels have closed sets of values, or name a job: with the job, or with its training, such a series ends.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily

from finetune_operator.api import ENDS, JSON, AttemptStatus, ConditionType, Phase, Status, parse_time
from finetune_operator.queue import Key
from finetune_operator.reasons import TABLE, Reason, Retry
from finetune_trainer.progress import Stage

NAME = "finetunejob"
"""Of the controller and of its queue."""

PASS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180)
QUEUE_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 5, 10, 30, 60, 300)
WAIT_SECONDS = (1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400)
"""Buckets: a stage waits for its image some seconds, for GPUs some hours."""


class Result(StrEnum):
    """How a pass ended, in controller-runtime's words."""

    SUCCESS = "success"
    REQUEUE = "requeue"
    REQUEUE_AFTER = "requeue_after"
    ERROR = "error"


class Metrics:
    """All that is told, in a registry of its own."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.jobs = Jobs(clock)
        self.registry.register(self.jobs)
        ProcessCollector(registry=self.registry)
        self._leader = Gauge(
            "finetune_operator_leader", "1 while this replica is the one that works.", registry=self.registry
        )
        self._define_passes()
        self._define_queue()
        self._define_outcomes()
        self._calls = Counter(
            "rest_client_requests",
            "Calls to the API server by the status of the answer; <error>: there was none.",
            ["code", "method", "kind"],
            registry=self.registry,
        )

    def _define_passes(self) -> None:
        label, registry = ["controller"], self.registry
        passes = Counter("controller_runtime_reconcile", "Passes by result.", [*label, "result"], registry=registry)
        self._passes = {result: passes.labels(NAME, result.value) for result in Result}
        errors = Counter("controller_runtime_reconcile_errors", "Passes that failed.", label, registry=registry)
        self._errors = errors.labels(NAME)
        name = "controller_runtime_reconcile_time_seconds"
        seconds = Histogram(name, "How long a pass took.", label, registry=registry, buckets=PASS_SECONDS)
        self._pass_seconds = seconds.labels(NAME)

    def _define_queue(self) -> None:
        label, registry = ["name"], self.registry
        depth = Gauge("workqueue_depth", "Jobs that wait for a worker.", label, registry=registry)
        self._depth = depth.labels(NAME)
        name = "workqueue_queue_duration_seconds"
        seconds = Histogram(
            name, "How long a job waited for a worker.", label, registry=registry, buckets=QUEUE_SECONDS
        )
        self._queue_seconds = seconds.labels(NAME)
        retries = Counter("workqueue_retries", "Jobs put off after a pass that failed.", label, registry=registry)
        self._queue_retries = retries.labels(NAME)

    def _define_outcomes(self) -> None:
        """With every label from the start: that a series begins at 1 is no increase to Prometheus."""
        about = "Stages run again, by what ended them before."
        self._restarts = Counter("finetune_job_restarts", about, ["reason"], registry=self.registry)
        for reason, row in TABLE.items():
            if row.retry is not Retry.WAITS:
                self._restarts.labels(str(reason))
        name, about = (
            "finetune_job_queue_to_running_seconds",
            "From the making of a stage's Job until all its pods run.",
        )
        self._waits = Histogram(name, about, ["stage"], registry=self.registry, buckets=WAIT_SECONDS)
        for stage in Stage:
            self._waits.labels(stage.value)

    # --- what is seen

    def leads(self, *, leads: bool) -> None:
        """This replica works, or does so no more."""
        self._leader.set(leads)

    def queue(self, depth: Callable[[], int]) -> None:
        """There is a queue; ask this for its depth."""
        self._depth.set_function(depth)

    def waited(self, seconds: float) -> None:
        """A worker took a key that had been in the queue for so long."""
        self._queue_seconds.observe(seconds)

    def put_off(self) -> None:
        """A key is to be tried again later: its pass failed."""
        self._queue_retries.inc()

    def passed(self, result: Result, seconds: float) -> None:
        """A pass has ended."""
        self._passes[result].inc()
        self._pass_seconds.observe(seconds)
        if result is Result.ERROR:
            self._errors.inc()

    def called(self, method: str, kind: str, code: str) -> None:
        """The API server has answered a call, or has not."""
        self._calls.labels(code, method, kind).inc()

    def wrote(self, before: Status, after: Status) -> None:
        """A status was written over the one before, for certain: what is new in it happened once and counts once."""
        if (reason := restarted(before, after)) is not None:
            self._restarts.labels(reason).inc()
        if (wait := begun(before, after)) is not None:
            stage, seconds = wait
            self._waits.labels(stage).observe(seconds)

    # --- what is told

    def render(self, accept: str) -> tuple[bytes, str]:
        """Everything in the form that an Accept header asks for, and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


# --- what a status tells that the one before did not -----------------------------------------------------------------


def restarted(before: Status, after: Status) -> str | None:
    """What ended the attempt that a new one follows, if there is a new one and it had to be."""
    *_, last, live = (None, None, *(after.attempts or ()))
    if last is None or live is None or _same(before, live) is not None:
        return None
    return (last.reason or Reason.UNKNOWN) if last.retry is not None else None


def begun(before: Status, after: Status) -> tuple[str, float] | None:
    """The stage whose pods all run now and did not before, and the seconds it waited for that."""
    live = after.attempts[-1] if after.attempts else None
    if live is None or live.running_since is None:
        return None
    known = _same(before, live)
    if known is not None and known.running_since is not None:
        return None
    since = max(_wait_began(known, live, after))
    seconds = (parse_time(live.running_since) - parse_time(since)).total_seconds()
    return live.stage.partition("-")[0], max(seconds, 0)


def _wait_began(known: AttemptStatus | None, live: AttemptStatus, status: Status) -> Iterator[str]:
    """When it was made, when its queue took the pods away again, when the job was resumed."""
    yield live.start_time or ""
    if known is not None and known.waiting_since is not None:
        yield known.waiting_since
    suspended = status.condition(ConditionType.SUSPENDED)
    if suspended is not None and suspended.status == "False":
        yield suspended.last_transition_time


def _same(status: Status, attempt: AttemptStatus) -> AttemptStatus | None:
    """What a status says of this attempt."""
    place = (attempt.stage, attempt.number)
    return next((each for each in status.attempts or () if (each.stage, each.number) == place), None)


# --- the jobs there are ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JobFigures:
    """What is kept of a job: figures of a training only while its pods run, None for what it has not told yet."""

    phase: str
    retries: int | None = None
    """None for none."""
    step: float | None = None
    total_steps: float | None = None
    tokens_per_second: float | None = None
    safe_until: float | None = None
    """Unix time of the newest checkpoint, or since when training runs if that is later: what came after can be lost."""

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> JobFigures:
        """The job as it is stored."""
        status = body.get("status") or {}
        phase = str(status.get("phase") or Phase.PENDING)
        return cls(phase) if phase in ENDS else cls(phase, status.get("retries") or None, **_training(status))


def _training(status: Mapping[str, Any]) -> dict[str, float | None]:
    live: JSON = (status.get("attempts") or ({},))[-1]
    if live.get("stage") != Stage.TRAIN or not live.get("runningSince"):
        return {}
    told = status.get("training") or {}
    times = (live["runningSince"], told.get("lastCheckpointTime"))
    return {
        "step": _number(told.get("step")),
        "total_steps": _number(told.get("totalSteps")),
        "tokens_per_second": _number(told.get("tokensPerSecond")),
        "safe_until": max(parse_time(time).timestamp() for time in times if time),
    }


def _number(figure: str | int | None) -> float | None:
    return None if figure is None else float(figure)


def _age(job: JobFigures, now: float) -> float | None:
    return None if job.safe_until is None else max(now - job.safe_until, 0)


Figure = Callable[[JobFigures, float], float | None]
"""A value at a Unix time, None where there is none."""

PER_JOB: dict[str, tuple[str, Figure]] = {
    "finetune_job_retries": (
        "Retries that count against maxRetries, of jobs that have not ended and needed any.",
        lambda job, _: job.retries,
    ),
    "finetune_training_step": ("Optimizer steps done, while training runs.", lambda job, _: job.step),
    "finetune_training_total_steps": (
        "Optimizer steps of the whole run, while training runs.",
        lambda job, _: job.total_steps,
    ),
    "finetune_tokens_per_second": (
        "Tokens trained on each second, over all devices, while training runs.",
        lambda job, _: job.tokens_per_second,
    ),
    "finetune_checkpoint_age_seconds": (
        "Since the newest verified checkpoint, or since training runs where that is later.",
        _age,
    ),
}
"""Gauges with the labels namespace and name."""


class Jobs:
    """What the API server last said of each job. A collector of prometheus_client's: asked anew at each scrape."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen: dict[Key, JobFigures] = {}

    def see(self, key: Key, body: Mapping[str, Any]) -> None:
        """A job as it is now."""
        self._seen[key] = JobFigures.of(body)

    def forget(self, keys: Iterable[Key]) -> None:
        """These are no more."""
        for key in keys:
            self._seen.pop(key, None)

    def known(self) -> set[Key]:
        """All that were seen and not forgotten."""
        return set(self._seen)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The families, with as many series as there is something to tell."""
        now = self._clock()
        yield self._phases()
        for name, (about, figure) in PER_JOB.items():
            family = GaugeMetricFamily(name, about, labels=["namespace", "name"])
            for key, job in self._seen.items():
                if (value := figure(job, now)) is not None:
                    family.add_metric([key.namespace, key.name], value)
            yield family

    def _phases(self) -> GaugeMetricFamily:
        """Every phase, those without a job too."""
        family = GaugeMetricFamily("finetune_jobs", "FineTuneJobs by phase.", labels=["phase"])
        tally = Tally({phase.value: 0 for phase in Phase})
        tally.update(job.phase for job in self._seen.values())
        for phase, count in tally.items():
            family.add_metric([phase], count)
        return family
