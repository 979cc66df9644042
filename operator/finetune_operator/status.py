"""Status and next actions from observed facts. Pure: same facts, same decision; every phase is decided here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime

from finetune_operator import names
from finetune_operator.api import (
    ATTEMPTS_KEPT,
    AttemptStatus,
    FineTuneJob,
    Overrides,
    Phase,
    Status,
    cut,
    format_time,
    parse_time,
)
from finetune_operator.consent import objection
from finetune_operator.facts import Conflict, Facts, Gang, Refusal, StageJob, after
from finetune_operator.failures import Failure, decisive, failure, obstacle, refusal_of, refused, waiting
from finetune_operator.figures import BYTES, share
from finetune_operator.journal import (
    SLACK_SECONDS,
    Entry,
    Journal,
    alive,
    close,
    enter,
    hear_live,
    next_number,
    read,
    scene,
    withdraw,
)
from finetune_operator.limits import seconds_left, start_begin
from finetune_operator.manifests import News
from finetune_operator.names import Step
from finetune_operator.reasons import Reason, Retry
from finetune_operator.settings import Settings
from finetune_operator.telling import View, build_conditions, build_news, build_status
from finetune_trainer.progress import Reason as Said
from finetune_trainer.progress import Stage

BACKOFF_LIMIT_SECONDS = 300
LOOK_AGAIN_SECONDS = 10
"""For what is told by no watch: events, a taken name that becomes free."""

LEAVING_SECONDS = 5
"""Between two looks at pods that were told to leave; their ends are heard of besides."""

SETTLING_SECONDS = 1
"""A queue says within so long why a Job waits, and tells it nowhere where it would be heard of."""

QUEUED_SECONDS = 30
"""For a reason to wait that changes; to be admitted, or to have to make way, is heard of at once."""

ROOM_SECONDS = 15
"""Only what still has no node after so long is told of as waiting for room."""


@dataclass(frozen=True)
class Start:
    """Make the Job of an attempt, and before it what it mounts."""

    step: Step
    attempt: int
    overrides: Overrides | None = None


@dataclass(frozen=True)
class Stop:
    """Delete a Job of ours and its pod."""

    name: str
    uid: str


@dataclass(frozen=True)
class Remove:
    """Delete the finished FineTuneJob itself."""


@dataclass(frozen=True)
class Decision:
    """What is to be done, what is to be said, and when to look again."""

    status: Status
    actions: tuple[Start | Stop | Remove, ...] = ()
    events: tuple[News, ...] = ()
    requeue_after_seconds: float | None = None


def decide(facts: Facts, settings: Settings, now: datetime) -> Decision:
    """The next actions and the status. A finished job is never touched again."""
    job = facts.job
    if job.deleting or job.managed_elsewhere:
        return Decision(job.status)
    if job.status.finished:
        return _outlive(job, now)
    if job.problem is not None:
        if (leaving := _let_go(facts, now)) is not None:  # begun by an operator that understood it
            return Decision(job.status, leaving, requeue_after_seconds=LEAVING_SECONDS)
        said = f"{job.problem} Correct it and apply the job under a new name."
        return _reject(job, View(Phase.FAILED, Reason.INVALID_SPEC, cut(said)), now)
    if (found := objection(facts, settings)) is not None:
        return _reject(job, View(Phase.FAILED, found.reason, cut(found.message)), now)
    return _advance(facts, read(facts, settings, now), settings, now)


def _outlive(job: FineTuneJob, now: datetime) -> Decision:
    """A finished job stays as it is, until its time to live is over."""
    limit = job.spec.ttl_seconds if job.spec is not None else None
    if limit is None or job.status.completion_time is None:
        return Decision(job.status)
    left = (after(parse_time(job.status.completion_time), limit) - now).total_seconds()
    return Decision(job.status, (Remove(),) if left <= 0 else (), requeue_after_seconds=left if left > 0 else None)


def _advance(facts: Facts, journal: Journal, settings: Settings, now: datetime) -> Decision:
    """One of: cancel, suspend, go on watching the live attempt, clear up after a judged one, end, start the next."""
    wish = facts.job.valid_spec
    last = journal.last_failure
    over = all(journal.proven(step) for step in journal.steps) or (last is not None and last.retry == Retry.NEVER)
    if wish.cancel and not over:
        return _cancel(facts, journal, now)
    if not over and (wish.suspend or facts.job.status.suspended):
        return _suspend(facts, journal, settings, now)
    return _go_on(facts, journal, settings, now)


def _go_on(facts: Facts, journal: Journal, settings: Settings, now: datetime) -> Decision:
    """What is due where nobody holds the job back."""
    if journal.live is not None:
        return _watch(facts, journal, journal.live, settings, now)
    if (clearing := _clear_up(facts, journal, now)) is not None:
        return clearing
    last = journal.last_failure
    if last is not None and last.retry == Retry.NEVER:
        return _end(facts, journal, View(Phase.FAILED, last.reason or Reason.UNKNOWN, last.message or ""), now)
    step = next((step for step in journal.steps if not journal.proven(step)), None)
    if step is None:
        return _end(facts, journal, View(Phase.SUCCEEDED, Reason.COMPLETED, _summary(journal)), now)
    return _next(facts, journal, step, settings, now)


# --- cancelled, suspended --------------------------------------------------------------------------------------------


def _cancel(facts: Facts, journal: Journal, now: datetime) -> Decision:
    """Pods save and leave first; then the job is over, with what is there."""
    where = f" at {journal.training.progress}" if journal.training and journal.training.progress else ""
    found = failure(Reason.CANCELLED, f"The job was cancelled on request{where}")
    if (leaving := _let_go(facts, now)) is not None:
        view = View(_phase_now(facts, journal), Reason.CANCELLED, "Cancelled on request: its pods save and leave.")
        status = build_status(facts, journal, view, now, progress=facts.job.status.progress)
        return Decision(status, leaving, build_news(facts.job, journal, status), LEAVING_SECONDS)
    return _end(facts, withdraw(journal, found, now), View(Phase.CANCELLED, found.reason, found.message), now)


def _suspend(facts: Facts, journal: Journal, settings: Settings, now: datetime) -> Decision:
    """On record first, then the pods leave; when the wish is taken back, the same attempt is made anew."""
    job = facts.job
    wanted, recorded = bool(job.valid_spec.suspend), job.status.suspended
    live = journal.live
    there = live is not None and any(not each.ended for each in facts.jobs if each.position == journal.of(live))
    if recorded and not wanted and (there or live is None):  # made anew already or never stopped; nothing under way
        return _go_on(facts, journal if there else replace(journal, active_seconds=0), settings, now)
    leaving = _let_go(facts, now)
    if leaving is None:
        journal = replace(journal, active_seconds=0)  # on record before it goes on
    if recorded and not wanted and leaving is None:
        return _resume(facts, journal, settings, now)
    doing = "its pods save and leave" if leaving is not None else "no GPU is held"
    found = waiting(Reason.SUSPENDED, f"Suspended on request: {doing}")
    view = View(Phase.SUSPENDED, found.reason, found.message, suspended=True)
    status = build_status(facts, _pending(journal, found.message), view, now, progress=job.status.progress)
    actions = leaving if recorded and leaving is not None else ()
    again = None if leaving is None else (LEAVING_SECONDS if recorded else 0)
    return Decision(status, actions, build_news(job, journal, status), again)


def _pending(journal: Journal, message: str) -> Journal:
    """The live attempt's stage waits."""
    if journal.live is None:
        return journal
    stage = journal.stages[journal.live.stage]
    waits = journal.with_stage(stage.model_copy(update={"state": "Pending", "message": message}))
    return waits.with_live(running_since=None)


def _resume(facts: Facts, journal: Journal, settings: Settings, now: datetime) -> Decision:
    """The attempt that was suspended, under its own number."""
    live = journal.attempts[-1]
    step = journal.step(live.stage)
    journal = journal.with_live(running_since=None, waiting_since=None)
    if (stuck := next((pod for pod in facts.gang(journal.of(live)).pods if not pod.ended), None)) is not None:
        # Perhaps still at work, where nobody hears of it: only a newer number fences it off.
        found = failure(Reason.NODE_LOST, f"Pod {stuck.name} was told to leave and never did")
        return _go_on(facts, close(journal, facts.job, step, found, now), settings, now)
    if (prevented := _prevented(facts, journal, step, settings, now)) is not None:
        return prevented
    view = View(step.phase, "Starting", f"Stage {step.title} goes on from where it was suspended.")
    status = build_status(facts, journal, view, now, progress=facts.job.status.progress)
    start = Start(step, live.number, live.overrides)
    return Decision(status, (start,), build_news(facts.job, journal, status), LOOK_AGAIN_SECONDS)


def _let_go(facts: Facts, now: datetime) -> tuple[Stop, ...] | None:
    """Deletions by which all pods get to leave; empty while they are leaving, None once all have left."""
    strays = _strays(facts)
    leaving = any(alive(pod, now) for pod in facts.pods) or any(job.deleting for job in facts.jobs)
    return strays if strays or leaving else None


def _phase_now(facts: Facts, journal: Journal) -> Phase:
    """The phase of the step that is due."""
    due = next((step for step in journal.steps if not journal.proven(step)), journal.steps[-1])
    return _phase(journal, due, running=any(pod.started is not None for pod in facts.pods))


# --- the live attempt ------------------------------------------------------------------------------------------------


def _watch(facts: Facts, journal: Journal, live: AttemptStatus, settings: Settings, now: datetime) -> Decision:
    """An attempt is under way: tell how it fares."""
    gang, job = facts.gang(journal.of(live)), facts.job_of(journal.of(live))
    step = journal.step(live.stage)
    found = _worth_telling(obstacle(gang, facts.warnings), start_begin(gang, job), now)
    journal = _observe_progress(facts, journal, step, gang)
    view = _queued(facts) or _view(facts, journal, step, gang, found)
    stage = journal.stages[step.title]
    state = "Running" if gang.running and view.phase is not Phase.QUEUED else "Pending"
    journal = journal.with_stage(stage.model_copy(update={"state": state, "message": view.message}))
    status = build_status(facts, journal, view, now, progress=_progress(facts, journal, step, live))
    limit_seconds = seconds_left(scene(journal, facts, step, now), settings)
    after_seconds = _look_again(gang, _usual_pause(facts, gang, job, settings), limit_seconds, now)
    return Decision(status, events=build_news(facts.job, journal, status), requeue_after_seconds=after_seconds)


def _queued(facts: Facts) -> View | None:
    """What is to be said while a queue holds the live attempt back, once it is known."""
    held = facts.queueing
    return None if held is None or held.admitted else View(Phase.QUEUED, held.reason, held.message)


def _worth_telling(found: Failure | None, since: datetime | None, now: datetime) -> Failure | None:
    """Not a node that is full for a moment: the scheduler counts the stage before for some seconds after its end."""
    if found is None or found.reason != Reason.UNSCHEDULABLE or since is None:
        return found
    return found if now >= after(since, ROOM_SECONDS) else None


def _observe_progress(facts: Facts, journal: Journal, step: Step, gang: Gang) -> Journal:
    if step.stage is not Stage.TRAIN or not gang.running or facts.progress is None:
        return journal
    return hear_live(journal, facts.progress)


def _progress(facts: Facts, journal: Journal, step: Step, live: AttemptStatus) -> str | None:
    """The live stage's own count: as just told, or as told before of this same attempt.

    What a training reads and proves before and between its steps is no progress of it.
    """
    told = facts.progress
    if told is not None and (told.stage, told.attempt) == (step.stage, live.number):
        counted = share(told.done, told.total, told.unit)
        if step.stage is not Stage.TRAIN:
            return counted
        steps = journal.training.progress if journal.training else None
        return steps or (None if told.unit == BYTES else counted)
    before = (facts.job.status.attempts or (None,))[-1]
    same = before is not None and (before.stage, before.number) == (live.stage, live.number)
    return facts.job.status.progress if same else None


def _view(facts: Facts, journal: Journal, step: Step, gang: Gang, found: Failure | None) -> View:
    """What is to be said of a live attempt."""
    if found is not None:
        return View(_phase(journal, step, running=False), found.reason, found.message)
    if gang.running:
        doing = facts.progress.activity if facts.progress is not None else _before(facts.job, step)
        message = f"Stage {step.title} runs{f': {doing}' if doing else ''}."
        return View(step.phase, "Running", cut(message.replace("..", ".")))
    begun = sum(pod.started is not None for pod in gang.pods)
    count = f": {begun} of {gang.size} pods run" if gang.size > 1 else ""
    return View(_phase(journal, step, running=False), "Starting", f"Stage {step.title} starts{count}.")


def _before(job: FineTuneJob, step: Step) -> str:
    """The activity that was told before, where nothing new is told."""
    message = next((stage.message or "" for stage in job.status.stages or () if stage.name == step.title), "")
    prefix = f"Stage {step.title} runs: "
    return message.removeprefix(prefix).removesuffix(".") if message.startswith(prefix) else ""


def _phase(journal: Journal, step: Step, *, running: bool) -> Phase:
    """Pending until a first pod runs, then the phase of the step that is due."""
    fresh = step.stage is Stage.PREPARE and journal.count <= 1
    return Phase.PENDING if fresh and not running else step.phase


def _usual_pause(facts: Facts, gang: Gang, job: StageJob | None, settings: Settings) -> float:
    """Seconds until a live attempt may have something new to tell that no watch tells."""
    if job is not None and job.suspended:
        return SETTLING_SECONDS if facts.queueing is None else QUEUED_SECONDS
    return settings.progress_interval_seconds if gang.running else LOOK_AGAIN_SECONDS


def _look_again(gang: Gang, usual: float, limit_seconds: float | None, now: datetime) -> float:
    """Seconds until the next look at a live attempt."""
    if leaving := [pod.gone_by for pod in gang.pods if pod.gone_by is not None]:
        usual = max((after(max(leaving), SLACK_SECONDS) - now).total_seconds(), 1)
    return usual if limit_seconds is None else min(usual, limit_seconds)


# --- between attempts ------------------------------------------------------------------------------------------------


def _clear_up(facts: Facts, journal: Journal, now: datetime) -> Decision | None:
    """Nothing of a judged attempt may be at work any more. It is deleted once its end is on record, not before."""
    strays = _strays(facts)
    leaving = [pod for pod in facts.pods if alive(pod, now)]
    if not strays and not leaving:
        return None
    status = build_status(facts, journal, _leaving(journal), now)
    recorded = status.attempts == facts.job.status.attempts
    actions = strays if recorded else ()
    return Decision(status, actions, build_news(facts.job, journal, status), 1 if recorded else 0)


def _leaving(journal: Journal) -> View:
    """What is to be said while a judged attempt still leaves, or one of which nothing is known but its pod."""
    if not journal.attempts:
        return View(Phase.PENDING, "Starting", "A pod from before has not ended yet; the first stage starts after it.")
    last = journal.attempts[-1]
    return View(_phase(journal, journal.step(last.stage), running=False), last.reason or "", last.message or "")


def _strays(facts: Facts) -> tuple[Stop, ...]:
    """Deletions of all Jobs that may still bring forth work."""
    at_work = (job for job in facts.jobs if not job.ended and _may_work(facts.gang(job.position)))
    return tuple(Stop(job.name, job.uid) for job in at_work)


def _may_work(gang: Gang) -> bool:
    """Whether a Job may still bring forth work: a pod has not ended, or is yet to come. A failing one ends alone.

    A lost pod's Job is in this state for ever, and would replace the pod when its node comes back.
    """
    if any(pod.lost for pod in gang.pods):
        return True
    return decisive(gang) is None and (not gang.complete or any(not pod.ended for pod in gang.pods))


def _next(facts: Facts, journal: Journal, step: Step, settings: Settings, now: datetime) -> Decision:
    """The step that is due: begun, or what stands in its way."""
    return _prevented(facts, journal, step, settings, now) or _start(facts, journal, step, settings, now)


def _prevented(facts: Facts, journal: Journal, step: Step, settings: Settings, now: datetime) -> Decision | None:
    """What the API server said when the step's Job was to be made, if it was not made."""
    if facts.refusal is not None:
        return _refused(facts, facts.refusal, journal, step, now)
    return _conflicted(facts, journal, step, settings, now) if facts.conflicts else None


def _start(facts: Facts, journal: Journal, step: Step, settings: Settings, now: datetime) -> Decision:
    """The next attempt, at once or after the wait that its failures ask for."""
    wait = _backoff(journal, step, settings, now)
    if wait > 0:
        view = _retrying(journal, step, facts.job.valid_spec.max_retries)
        status = build_status(facts, journal, view, now)
        return Decision(status, events=build_news(facts.job, journal, status), requeue_after_seconds=wait)
    attempt = next_number(facts, journal, step)
    overrides = journal.overrides() if step.stage is Stage.TRAIN else None
    entered = enter(journal, Entry(step, attempt, names.stage_job(facts.job, step, attempt), now, overrides))
    view = View(_phase(entered, step, running=False), "Starting", f"Stage {step.title} starts.")
    if journal.last_failure is not None:
        view = _retrying(journal, step, facts.job.valid_spec.max_retries)
    status = build_status(facts, entered, view, now)
    actions: tuple[Start | Stop, ...] = (*_outdated(facts, step, attempt), Start(step, attempt, overrides))
    return Decision(status, actions, build_news(facts.job, entered, status), LOOK_AGAIN_SECONDS)


def _outdated(facts: Facts, step: Step, attempt: int) -> tuple[Stop, ...]:
    """Ended Jobs of attempts so old that the status does not tell of them: they would pile up to the quota."""
    old = (job for job in facts.jobs if job.step == step.key and job.attempt <= attempt - ATTEMPTS_KEPT)
    return tuple(Stop(job.name, job.uid) for job in old if job.ended and not job.deleting)


def _backoff(journal: Journal, step: Step, settings: Settings, now: datetime) -> float:
    """Seconds to wait yet: none before a first uncounted retry, else doubling with each failure in a row."""
    row = journal.failures_in_a_row(step.title)
    if not row or row[0].completion_time is None or row[0].reason == Said.OUT_OF_MEMORY:
        return 0  # memory is healed by a change, not by time
    exponent = len(row) - (1 if row[0].retry == Retry.COUNTED else 2)
    if exponent < 0:
        return 0
    pause = min(settings.retry_backoff_seconds * 2.0**exponent, BACKOFF_LIMIT_SECONDS)
    return (after(parse_time(row[0].completion_time), pause) - now).total_seconds()


def _retrying(journal: Journal, step: Step, max_retries: int) -> View:
    last = journal.last_failure
    if last is None:
        return View(step.phase, "Starting", f"Stage {step.title} starts.")
    count = f" (retry {journal.retries} of {max_retries})" if last.retry == Retry.COUNTED else ""
    message = f"Stage {step.title} is run again{count}: {last.message}"
    return View(step.phase, last.reason or "Retrying", cut(message))


def _conflicted(facts: Facts, journal: Journal, step: Step, settings: Settings, now: datetime) -> Decision:
    """A name of ours is taken: never adopted, never deleted, waited for a while."""
    conflict = facts.conflicts[0]
    since = _settled_at(facts.job, journal)
    expired = not conflict.leftover and now >= after(since, settings.start_deadline_seconds)
    message = _conflict_message(conflict)
    if expired:
        return _end(facts, journal, View(Phase.FAILED, Reason.NAME_CONFLICT, message), now)
    phase = _phase_due(facts, journal, step)
    status = build_status(facts, journal, View(phase, Reason.NAME_CONFLICT, message), now)
    return Decision(status, events=build_news(facts.job, journal, status), requeue_after_seconds=LOOK_AGAIN_SECONDS / 2)


def _conflict_message(conflict: Conflict) -> str:
    if conflict.leftover:
        return f"{conflict.kind} {conflict.name} is left from an earlier job of this name; waiting until it is deleted."
    remedy = "Delete or rename it, or give the FineTuneJob another name."
    return f"{conflict.kind} {conflict.name} is there already and does not belong to this job. {remedy}"


def _phase_due(facts: Facts, journal: Journal, step: Step) -> Phase:
    """The phase of a step whose attempt is yet to be made."""
    return _phase(replace(journal, count=next_number(facts, journal, step)), step, running=False)


def _refused(facts: Facts, refusal: Refusal, journal: Journal, step: Step, now: datetime) -> Decision:
    """The attempt could not be made. Who acts tries again, ever later; what can never be made is an end."""
    found = refused(refusal)
    if found.deadline:
        return _end(facts, journal, View(Phase.FAILED, found.reason, found.message), now)
    message = found.message
    before = facts.job.status
    if before.reason == found.reason and (before.message or "").startswith(refusal_of(refusal)):
        # Said already. Where the words differ each time, to write them would bring the next pass at once, for ever.
        message = before.message or message
    status = build_status(facts, journal, View(_phase_due(facts, journal, step), found.reason, message), now)
    return Decision(status, events=build_news(facts.job, journal, status))


def _settled_at(job: FineTuneJob, journal: Journal) -> datetime:
    """Since when the next step was due."""
    ended = journal.attempts[-1].completion_time if journal.attempts else None
    return parse_time(ended) if ended else job.created


# --- the end ---------------------------------------------------------------------------------------------------------


def _end(facts: Facts, journal: Journal, view: View, now: datetime) -> Decision:
    """Terminal, for good: nothing is run again any more."""
    for stage in journal.stages.values():
        if stage.state == "Retrying":
            journal = journal.with_stage(stage.model_copy(update={"state": "Failed"}))
    status = build_status(facts, journal, view, now, progress=_final_progress(facts, journal))
    return Decision(status, events=build_news(facts.job, journal, status))


def _final_progress(facts: Facts, journal: Journal) -> str | None:
    training = journal.training.progress if journal.training else None
    return training or facts.job.status.progress


def _reject(job: FineTuneJob, view: View, now: datetime) -> Decision:
    """A stored spec that this operator cannot or must not act on."""
    status = Status(
        observed_generation=job.generation,
        phase=view.phase.value,
        reason=str(view.reason),
        message=view.message,
        start_time=job.status.start_time or format_time(now),
        completion_time=format_time(now),
        claim_name=job.status.claim_name,
        folder=job.status.folder,
        report=job.status.report,
        conditions=build_conditions(job, view, now, accepted=False),
        stages=job.status.stages,
        artifacts=job.status.artifacts,
        attempts=job.status.attempts,
    )
    return Decision(status, events=(News("invalid", str(view.reason), view.message, warning=True),))


def _summary(journal: Journal) -> str:
    made = ", ".join(artifact.name for artifact in journal.artifacts)
    sent = ", ".join(place.name for artifact in journal.artifacts for place in artifact.published or ())
    told = f"{f': {made}' if made else ''}{f'; published: {sent}' if sent else ''}"
    return cut(f"All stages are complete and verified{told}.")
