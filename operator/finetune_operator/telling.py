"""What the status and the Events say of a job, from what was found and decided. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from finetune_operator import names
from finetune_operator.api import (
    ENDS,
    AttemptStatus,
    Condition,
    ConditionType,
    FineTuneJob,
    Phase,
    Status,
    format_time,
)
from finetune_operator.facts import Facts
from finetune_operator.journal import Journal
from finetune_operator.manifests import News
from finetune_operator.reasons import Reason


@dataclass(frozen=True)
class View:
    """What the status says of a job that is under way: phase, reason, message."""

    phase: Phase
    reason: str
    message: str
    suspended: bool = False
    """Whether the user holds it back."""


def build_status(facts: Facts, journal: Journal, view: View, now: datetime, *, progress: str | None = None) -> Status:
    """The whole status."""
    job = facts.job
    finished = view.phase in ENDS
    training = journal.training
    if training is not None and view.reason != "Running":
        training = training.model_copy(update={"eta": None})
    return Status(
        observed_generation=job.generation,
        phase=view.phase.value,
        reason=str(view.reason),
        message=view.message,
        progress=progress,
        start_time=job.status.start_time or format_time(now),
        completion_time=format_time(now) if finished else None,
        claim_name=names.claim(job),
        folder=names.folder(job),
        report=names.report(job) if any(map(journal.proven, journal.steps)) else None,
        attempt_count=journal.count,
        retries=journal.retries,
        active_seconds=journal.active_seconds or None,
        training=training,
        data=journal.data,
        estimate=journal.estimate,
        resolved=journal.resolved,
        conditions=(*build_conditions(job, view, now, accepted=True), *_quota(facts, journal, now)),
        stages=tuple(journal.stages.values()),
        artifacts=journal.artifacts or None,
        attempts=journal.attempts or None,
    )


def build_conditions(job: FineTuneJob, view: View, now: datetime, *, accepted: bool) -> tuple[Condition, ...]:
    """Accepted, Succeeded, Finished, and Suspended where it ever was, each with the time since when it stands."""
    yes = ("True", "Accepted", "The spec is understood.")
    said = yes if accepted else ("False", view.reason, view.message)
    succeeded = ("Unknown", "InProgress", "The job is under way.")
    finished = ("False", "InProgress", "The job is under way.")
    if view.phase in ENDS:
        succeeded = (str(view.phase is Phase.SUCCEEDED), str(view.reason), view.message)
        finished = ("True", view.phase.value, view.message)
    told = [
        _condition(job, ConditionType.ACCEPTED, said, now),
        _condition(job, ConditionType.SUCCEEDED, succeeded, now),
        _condition(job, ConditionType.FINISHED, finished, now),
    ]
    if view.suspended:
        told.append(_condition(job, ConditionType.SUSPENDED, ("True", view.reason, view.message), now))
    elif job.status.condition(ConditionType.SUSPENDED) is not None:
        resumed = ("False", "Resumed", "The job is not held back any more.")
        told.append(_condition(job, ConditionType.SUSPENDED, resumed, now))
    return tuple(told)


def _quota(facts: Facts, journal: Journal, now: datetime) -> tuple[Condition, ...]:
    """QuotaReserved, where the job is in a queue or ever was."""
    job, held = facts.job, facts.queueing
    if held is not None and journal.live is not None:
        said = (str(held.reserved), held.reason, held.message)
    elif job.status.condition(ConditionType.QUOTA_RESERVED) is not None:
        said = ("False", "NotQueued", "No stage of the job is in a queue at the moment.")
    else:
        return ()
    return (_condition(job, ConditionType.QUOTA_RESERVED, said, now),)


def _condition(job: FineTuneJob, kind: ConditionType, said: tuple[str, str, str], now: datetime) -> Condition:
    status, reason, message = said
    before = next((c for c in job.status.conditions or () if c.type == kind and c.status == status), None)
    return Condition(
        type=kind.value,
        status=status,
        reason=reason,
        message=message,
        last_transition_time=before.last_transition_time if before else format_time(now),
        observed_generation=job.generation,
    )


QUIET = frozenset({"Running", "Starting", Reason.COMPLETED, Reason.SUSPENDED})


def build_news(job: FineTuneJob, journal: Journal, status: Status) -> tuple[News, ...]:
    """What has changed and is worth an Event: failed attempts, obstacles, phases."""
    news = [
        News(f"{_run(journal, attempt)}-failed", attempt.reason or "", attempt.message or "", warning=True)
        for attempt in status.failed_since(job.status)
    ]
    run = _run(journal, journal.attempts[-1]) if journal.attempts else "new"
    if status.phase != job.status.phase:
        failed = status.phase == Phase.FAILED
        key = f"{run}-{status.phase}{_since(status)}"
        news.append(News(key, status.phase or "", status.message or "", warning=failed))
    elif status.reason != job.status.reason and status.reason not in QUIET and not news:
        news.append(News(f"{run}-{status.reason}", status.reason or "", status.message or "", warning=True))
    return tuple(news)


def _since(status: Status) -> str:
    """What makes news of a phase in which the attempt was before: when it was last held back or let go on."""
    held = (status.condition(kind) for kind in (ConditionType.SUSPENDED, ConditionType.QUOTA_RESERVED))
    last = max((condition.last_transition_time for condition in held if condition is not None), default="")
    return f"-{last.replace(':', '')}" if last else ""


def _run(journal: Journal, attempt: AttemptStatus) -> str:
    """An attempt in the names of its Events."""
    return f"{journal.step(attempt.stage).key}-{attempt.number}"
