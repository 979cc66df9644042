"""The attempts of a job: what the status remembers, folded with what is seen of Jobs and pods. Pure.

The status may lag behind (a write was lost, the operator was killed), so attempts are counted by what is there: each
Job that the status does not know is entered, each open attempt that has ended is judged, in the order of their
positions: by number, and under one number by the line.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from finetune_operator import names
from finetune_operator.api import (
    ATTEMPTS_KEPT,
    JSON,
    ArtifactStatus,
    AttemptStatus,
    DataStatus,
    EstimateStatus,
    FineTuneJob,
    Overrides,
    StageStatus,
    TrainingStatus,
    cut,
    format_time,
    parse_time,
)
from finetune_operator.facts import Facts, Gang, StageJob, StagePod, after
from finetune_operator.failures import Failure, classify, decisive, ending_with, failure, obstacle, parting
from finetune_operator.figures import (
    artifact_status,
    data_status,
    estimate_status,
    final_training,
    live_training,
    published_status,
    resolved_status,
    with_measured,
)
from finetune_operator.healing import describe, relieve
from finetune_operator.limits import Scene, exceeded
from finetune_operator.names import Position, Step
from finetune_operator.reasons import TABLE, Reason, Retry
from finetune_operator.settings import Settings
from finetune_trainer.progress import LastWord, Progress, Stage
from finetune_trainer.progress import Reason as Said

SLACK_SECONDS = 30
"""A pod that is being deleted and still not gone so long after its time is on a lost node: it is waited for no more."""

LOST_WORDS_IN_A_ROW = 3


@dataclass(frozen=True)
class Journal:
    """Where a job is: its attempts, the stages proven, and what they said."""

    steps: tuple[Step, ...]
    stages: dict[str, StageStatus]
    """By title, in the order of the line."""
    attempts: tuple[AttemptStatus, ...] = ()
    count: int = 0
    """The number of the latest attempt."""
    retries: int = 0
    active_seconds: int = 0
    """How long pods have run, before the live attempt."""
    artifacts: tuple[ArtifactStatus, ...] = ()
    data: DataStatus | None = None
    estimate: EstimateStatus | None = None
    resolved: JSON | None = None
    training: TrainingStatus | None = None

    @classmethod
    def remembered(cls, job: FineTuneJob) -> Journal:
        """What the stored status says."""
        status = job.status
        known = {stage.name: stage for stage in status.stages or ()}
        steps = names.line(job.valid_spec)
        titles = [step.title for step in steps]
        return cls(
            steps=steps,
            stages={title: known.get(title, StageStatus(name=title, state="Waiting")) for title in titles},
            attempts=tuple(attempt for attempt in status.attempts or () if attempt.stage in titles),
            count=status.attempt_count or 0,
            retries=status.retries or 0,
            active_seconds=status.active_seconds or 0,
            artifacts=status.artifacts or (),
            data=status.data,
            estimate=status.estimate,
            resolved=status.resolved,
            training=status.training,
        )

    @property
    def live(self) -> AttemptStatus | None:
        """The attempt that has not ended."""
        last = self.attempts[-1] if self.attempts else None
        return last if last is not None and last.completion_time is None else None

    @property
    def last_failure(self) -> AttemptStatus | None:
        """The last attempt, if it failed."""
        last = self.attempts[-1] if self.attempts else None
        return last if last is not None and last.retry is not None else None

    @property
    def position(self) -> Position:
        """The latest attempt known of."""
        tried = [(stage.name, stage.attempt) for stage in self.stages.values() if stage.attempt is not None]
        tried += [(attempt.stage, attempt.number) for attempt in self.attempts]
        return max([(self.count, -1), *((number, self.step(title).place) for title, number in tried)])

    def step(self, title: str) -> Step:
        """The step that the status calls so."""
        return next(step for step in self.steps if step.title == title)

    def of(self, attempt: AttemptStatus) -> Position:
        """An attempt's position."""
        return attempt.number, self.step(attempt.stage).place

    def proven(self, step: Step) -> bool:
        """Whether a step's proof has been seen."""
        return self.stages[step.title].manifest_digest is not None

    def overrides(self) -> Overrides | None:
        """What the next training changes of the resolved settings: what the last one did, or what heals it."""
        last = next((attempt for attempt in reversed(self.attempts) if attempt.stage == Stage.TRAIN.value), None)
        if last is None or last.reason != Said.OUT_OF_MEMORY:
            return last.overrides if last is not None else None
        return relieve(self.resolved, last.overrides)

    def active(self, now: datetime) -> timedelta:
        """How long pods have run in all."""
        since = self.live.running_since if self.live is not None else None
        return timedelta(seconds=self.active_seconds) + (now - parse_time(since) if since else timedelta())

    def with_live(self, **update: object) -> Journal:
        """The journal with the live attempt told anew."""
        return replace(self, attempts=(*self.attempts[:-1], self.attempts[-1].model_copy(update=update)))

    def failures_in_a_row(self, stage: str) -> tuple[AttemptStatus, ...]:
        """The last attempts, as far back as this stage only failed."""
        row: list[AttemptStatus] = []
        for attempt in reversed(self.attempts):
            if attempt.stage != stage or attempt.retry is None:
                break
            row.append(attempt)
        return tuple(row)

    def with_stage(self, stage: StageStatus) -> Journal:
        """The journal with one stage told anew."""
        return replace(self, stages=self.stages | {stage.name: stage})


def alive(pod: StagePod, now: datetime) -> bool:
    """Whether a pod is to be waited for: a lost one may still be at work, but the fence keeps its work out."""
    if pod.ended or pod.lost:
        return False
    return pod.gone_by is None or now < after(pod.gone_by, SLACK_SECONDS)


def read(facts: Facts, settings: Settings, now: datetime) -> Journal:
    """The journal, up to date with what is seen."""
    journal = Journal.remembered(facts.job)
    by_key = {step.key: step for step in journal.steps}
    if journal.live is not None:
        journal = _look(journal, facts, journal.step(journal.live.stage), settings, now)
    for job in facts.jobs:
        if job.position > journal.position and job.step in by_key:
            entry = Entry(by_key[job.step], job.attempt, job.name, job.created, job.overrides)
            journal = enter(_superseded(journal, facts.job, job), entry)
            journal = _look(journal, facts, by_key[job.step], settings, now)
    return journal


def _superseded(journal: Journal, job: FineTuneJob, by: StageJob) -> Journal:
    """An attempt after which another was made had ended: the status that said how was lost, and the pod is gone."""
    live = journal.live
    if live is None:
        return journal
    found = failure(Reason.LOST_WORD, f"Stage {live.stage} ended before {by.name} was made; its last word is gone")
    return close(journal, job, journal.step(live.stage), found, by.created)


def next_number(facts: Facts, journal: Journal, step: Step) -> int:
    """The number for a step's next attempt: the latest there is, or the one after it for what was tried under that.

    Jobs and pods count too, whose making never reached the status.
    """
    made = [job.position for job in facts.jobs] + [pod.position for pod in facts.pods]
    latest = max([journal.position, *made])
    number = max(latest[0], 1)
    return number if (number, step.place) > latest else number + 1


@dataclass(frozen=True)
class Entry:
    """An attempt that begins, or has begun."""

    step: Step
    number: int
    job: str
    """Name of its Job."""
    begun: datetime
    overrides: Overrides | None = None


def enter(journal: Journal, entry: Entry) -> Journal:
    """A new attempt begins."""
    begun, title = format_time(entry.begun), entry.step.title
    attempt = AttemptStatus(number=entry.number, stage=title, start_time=begun, overrides=entry.overrides)
    stage = StageStatus(
        name=title, state="Pending", attempt=entry.number, job=entry.job, start_time=begun, message="Starting."
    )
    kept = (*journal.attempts, attempt)[-ATTEMPTS_KEPT:]
    return replace(journal.with_stage(stage), attempts=kept, count=entry.number)


def scene(journal: Journal, facts: Facts, step: Step, now: datetime) -> Scene:
    """The live attempt, for its limits."""
    live = journal.attempts[-1]
    gang, job = facts.gang(journal.of(live)), facts.job_of(journal.of(live))
    return Scene(
        facts, step, gang, job, now, journal.active(now), _since(live.waiting_since), _since(live.blocked_since)
    )


def _since(time: str | None) -> datetime | None:
    return parse_time(time) if time else None


def _look(journal: Journal, facts: Facts, step: Step, settings: Settings, now: datetime) -> Journal:
    """Judge the open attempt, if it has ended."""
    position = journal.of(journal.attempts[-1])
    gang, job = facts.gang(position), facts.job_of(position)
    journal = _blocked(_clock(journal, gang, job, now), gang, facts.warnings, now)
    word = gang.proof(job)
    if word is not None:
        return prove(journal, facts.job, step, word, _ended_at(gang, job, now))
    if on_hold(facts, job):
        return journal
    found = verdict(gang, job, now) or _unreplaced(facts, gang, job, now)
    found = found or exceeded(scene(journal, facts, step, now), settings)
    if found is None:
        return _note(journal, parting(gang))
    found = _in_vain(_noted(journal, found), facts.job)
    return close(journal, facts.job, step, found, _ended_at(gang, job, now))


def _unreplaced(facts: Facts, gang: Gang, job: StageJob | None, now: datetime) -> Failure | None:
    """A pod that a queue sent away, and that never left, keeps its Job from making another: its node is lost."""
    if job is None or job.suspended or job.ended:
        return None
    made = {pod.index for pod in gang.pods}
    sent_away = (pod for pod in facts.pods if pod.dismissed and pod.position == job.position and pod.belongs_to(job))
    stuck = next((pod for pod in sent_away if not (pod.ended or alive(pod, now) or pod.index in made)), None)
    return failure(Reason.NODE_LOST, f"Pod {stuck.name} was told to leave and never did") if stuck else None


def _note(journal: Journal, seen: Failure | None) -> Journal:
    """Keep why a pod leaves with its attempt: by the next look it may be gone, and its word with it."""
    return journal if seen is None else journal.with_live(reason=str(seen.reason), message=seen.message)


def _noted(journal: Journal, found: Failure) -> Failure:
    """Of a pod that vanished, what was seen of it before."""
    live = journal.attempts[-1]
    if found.reason != Reason.POD_LOST or live.reason is None:
        return found
    row = TABLE.get(live.reason)  # another version of the operator may have written it
    return Failure(live.reason, live.message or found.message, row.retry if row else found.retry)


def on_hold(facts: Facts, job: StageJob | None) -> bool:
    """Whether what becomes of the attempt's pods is the user's own doing: the job is cancelled, or is or was suspended.

    A suspension is over when the attempt's Job has been made anew.
    """
    wish = facts.job.valid_spec
    gone = job is None or job.deleting
    return bool(wish.cancel) or (facts.job.status.suspended and (bool(wish.suspend) or gone))


def _clock(journal: Journal, gang: Gang, job: StageJob | None, now: datetime) -> Journal:
    """Note since when all pods of the live attempt run; stop the clock while its queue holds it back."""
    live = journal.attempts[-1]
    if live.running_since is None and gang.started:
        began = max(pod.started for pod in gang.pods if pod.started is not None)
        return journal.with_live(running_since=format_time(began), waiting_since=None)
    if live.running_since is not None and job is not None and job.suspended and not gang.started:
        return _stop_clock(journal, now).with_live(running_since=None, waiting_since=format_time(now))
    return journal


def _blocked(journal: Journal, gang: Gang, warnings: tuple[str, ...], now: datetime) -> Journal:
    """Note since when something that has to be mended keeps pods from starting: from then on it has its time."""
    found = obstacle(gang, warnings)
    held = found is not None and found.deadline
    if held == (journal.attempts[-1].blocked_since is not None):
        return journal
    return journal.with_live(blocked_since=format_time(now) if held else None)


def _stop_clock(journal: Journal, now: datetime) -> Journal:
    """What the live attempt has run so far is told of the job."""
    return replace(journal, active_seconds=int(max(journal.active(now), timedelta()).total_seconds()))


def verdict(gang: Gang, job: StageJob | None, now: datetime) -> Failure | None:
    """Why the attempt is over without proof, or None while it may still come to something."""
    at_work = any(alive(pod, now) for pod in gang.pods)
    to_come = not gang.complete and job is not None and not job.ended
    if not at_work and not to_come:
        return classify(gang, job)
    return decisive(gang)


def _in_vain(found: Failure, job: FineTuneJob) -> Failure:
    """Pods that waited for one which found no node: nobody's fault, and not the network's."""
    before = job.status
    if found.reason != Said.RENDEZVOUS_FAILED or before.reason != Reason.UNSCHEDULABLE:
        return found
    return Failure(Reason.UNSCHEDULABLE, before.message or found.message, Retry.FREE)


def prove(journal: Journal, job: FineTuneJob, step: Step, word: LastWord, ended: datetime) -> Journal:
    """The stage ended complete, and its manifest's digest is known."""
    time = format_time(ended)
    stage = journal.stages[step.title].model_copy(
        update={
            "state": "Succeeded",
            "completion_time": time,
            "message": cut(word.message),
            "manifest_digest": word.manifest_digest,
        }
    )
    ending = {"reason": Reason.COMPLETED.value, "message": cut(word.message)}
    return _hear(_ended(journal.with_stage(stage), ending, ended), job, word)


def _hear(journal: Journal, job: FineTuneJob, word: LastWord) -> Journal:
    """Keep what a last word tells."""
    if word.artifact is not None:
        told = artifact_status(word.artifact, names.claim(job), names.folder(job))
        others = tuple(artifact for artifact in journal.artifacts if artifact.name != told.name)
        journal = replace(journal, artifacts=(*others, told))
    if (sent := word.published) is not None:
        artifacts = (published_status(each, sent) if each.name == sent.artifact else each for each in journal.artifacts)
        journal = replace(journal, artifacts=tuple(artifacts))
    if word.training is not None:
        journal = hear_live(journal, word.progress) if word.progress else journal
        measured = word.artifact.measured if word.artifact else None
        journal = replace(journal, training=final_training(word.training, measured, journal.training))
    return replace(
        journal,
        data=data_status(word.data) if word.data else journal.data,
        estimate=estimate_status(word.estimate) if word.estimate else journal.estimate,
        resolved=resolved_status(word.resolved) if word.resolved else journal.resolved,
    )


def hear_live(journal: Journal, progress: Progress) -> Journal:
    """Keep what a training tells while it runs, and once more in its last word: nobody may have listened before."""
    return replace(
        journal,
        training=live_training(progress, journal.training),
        estimate=with_measured(journal.estimate, progress),
    )


def close(journal: Journal, job: FineTuneJob, step: Step, found: Failure, ended: datetime) -> Journal:
    """The attempt failed: whether the stage is run again is settled here, once."""
    found = _last_straw(journal, step, _healed(journal, found), job.valid_spec.max_retries)
    state = "Failed" if found.retry is Retry.NEVER else "Retrying"
    stage = journal.stages[step.title].model_copy(
        update={"state": state, "completion_time": format_time(ended), "message": found.message}
    )
    ending = {"reason": str(found.reason), "message": found.message, "retry": found.retry.value}
    counted = found.retry is Retry.COUNTED
    return replace(_ended(journal.with_stage(stage), ending, ended), retries=journal.retries + counted)


def _healed(journal: Journal, found: Failure) -> Failure:
    """A training that ran out of GPU memory is run again with less at once, while there is something less."""
    live = journal.attempts[-1]
    if found.reason != Said.OUT_OF_MEMORY or live.stage != Stage.TRAIN.value:
        return found
    less = relieve(journal.resolved, live.overrides)
    if less is None or journal.resolved is None:
        return replace(found, message=ending_with(found.message, TABLE[Said.OUT_OF_MEMORY].remedy))
    return replace(found, retry=Retry.FREE, message=ending_with(found.message, describe(less, journal.resolved)))


def _last_straw(journal: Journal, step: Step, found: Failure, max_retries: int) -> Failure:
    """No retry where none is left."""
    if found.retry is Retry.COUNTED and journal.retries >= max_retries:
        return replace(found, retry=Retry.NEVER, message=cut(f"{found.message} Gave up after {max_retries} retries."))
    if found.reason != Reason.LOST_WORD:
        return found
    earlier = replace(journal, attempts=journal.attempts[:-1]).failures_in_a_row(step.title)
    lost = tuple(itertools.takewhile(lambda attempt: attempt.reason == Reason.LOST_WORD, earlier))
    if len(lost) + 1 < LOST_WORDS_IN_A_ROW:
        return found
    message = f"Stage {step.title} ended well {LOST_WORDS_IN_A_ROW} times without a last word that proves it. "
    remedy = "Check that the trainer's image fits this operator, and that nothing removes pods as they end."
    return replace(found, retry=Retry.NEVER, message=message + remedy)


def _ended(journal: Journal, ending: JSON, ended: datetime) -> Journal:
    """The live attempt is over."""
    stopped = _stop_clock(journal, ended)
    return stopped.with_live(
        **ending, completion_time=format_time(ended), running_since=None, waiting_since=None, blocked_since=None
    )


def withdraw(journal: Journal, found: Failure, now: datetime) -> Journal:
    """The live attempt, if there is one, is given up because of what the user wants."""
    if journal.live is None:
        return journal
    stage = journal.stages[journal.live.stage]
    update = {"state": "Failed", "completion_time": format_time(now), "message": found.message}
    ending = {"reason": found.reason, "message": found.message, "retry": found.retry.value}
    return _ended(journal.with_stage(stage.model_copy(update=update)), ending, now)


def _ended_at(gang: Gang, job: StageJob | None, now: datetime) -> datetime:
    """When an attempt ended, as far as anything tells."""
    ended = [pod.ended_at for pod in gang.pods if pod.ended_at is not None]
    told = max(ended, default=None) or (job.completed if job else None) or now
    return min(told, now)  # a node's clock may run ahead
