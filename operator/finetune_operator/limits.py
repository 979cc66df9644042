"""What ends an attempt whose pods would go on, or wait on, by themselves: deadlines, and no sign of progress. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from finetune_operator.api import Spec, cut
from finetune_operator.facts import Facts, Gang, StageJob, after
from finetune_operator.failures import Failure, failure, obstacle
from finetune_operator.names import Step
from finetune_operator.reasons import Reason
from finetune_operator.settings import Settings
from finetune_trainer.progress import Stage


@dataclass(frozen=True)
class Scene:
    """A live attempt, and the time."""

    facts: Facts
    step: Step
    gang: Gang
    job: StageJob | None
    now: datetime
    active: timedelta
    """How long pods of the job have run in all, those of this attempt included."""
    waiting_since: datetime | None = None
    """When it was sent back to wait for its turn, if it was."""
    blocked_since: datetime | None = None
    """Since when something that has to be mended keeps its pods from starting."""

    @property
    def spec(self) -> Spec:
        """What the user allows."""
        return self.facts.job.valid_spec

    @property
    def obstacle(self) -> Failure | None:
        """What keeps the pods from starting."""
        return obstacle(self.gang, self.facts.warnings)

    @property
    def queued(self) -> bool:
        """Whether a queue holds the attempt back."""
        return self.job is not None and self.job.suspended


def exceeded(scene: Scene, settings: Settings) -> Failure | None:
    """The limit that the attempt is beyond, if any."""
    return _too_long(scene) or _stalled(scene) or _overdue(scene, settings) or _waited(scene)


def seconds_left(scene: Scene, settings: Settings) -> float | None:
    """Seconds until the next limit may be reached; None if none draws near by itself."""
    ends = [_active_end(scene), _stall_end(scene), _overdue_end(scene, settings), _wait_end(scene)]
    left = [(end - scene.now).total_seconds() for end in ends if end is not None]
    return max(min(left), 0.1) if left else None


def _reached(end: datetime | None, now: datetime) -> bool:
    return end is not None and now >= end


# --- how long pods may run -------------------------------------------------------------------------------------------


def _active_end(scene: Scene) -> datetime | None:
    limit = scene.spec.active_deadline_seconds
    if limit is None or not scene.gang.running:
        return None
    return scene.now + timedelta(seconds=limit) - scene.active


def _too_long(scene: Scene) -> Failure | None:
    if not _reached(_active_end(scene), scene.now):
        return None
    limit = scene.spec.active_deadline_seconds
    what = f"The job's pods have run for {limit} s in all, as long as runPolicy.activeDeadlineSeconds allows"
    return failure(Reason.DEADLINE_EXCEEDED, what)


# --- without progress ------------------------------------------------------------------------------------------------


def _stall_end(scene: Scene) -> datetime | None:
    leader = scene.gang.leader
    if not scene.gang.running:
        return None
    since = leader.ended_at if leader is not None and leader.ended else scene.facts.still_since
    return after(since, scene.spec.stall_timeout_seconds) if since is not None else None


def _stalled(scene: Scene) -> Failure | None:
    if not _reached(_stall_end(scene), scene.now):
        return None
    told = scene.facts.progress
    doing = f" (last heard of: {told.activity})" if told is not None else ""
    what = f"Stage {scene.step.title} made no progress for {scene.spec.stall_timeout_seconds} s{doing}"
    return failure(Reason.STALLED_TRAINING if scene.step.stage is Stage.TRAIN else Reason.STALLED, what)


# --- before pods run -------------------------------------------------------------------------------------------------


def start_begin(gang: Gang, job: StageJob | None) -> datetime | None:
    """From when on the pods should have started: time without a node does not count."""
    if gang.late:
        return max(pod.scheduled or pod.created for pod in gang.late)
    return job.started or job.created if job is not None else None


def _overdue_end(scene: Scene, settings: Settings) -> datetime | None:
    """The end for what has to be mended before a pod can start."""
    found, since = scene.obstacle, start_begin(scene.gang, scene.job)
    if found is None or not found.deadline or since is None:
        return None
    return after(max(since, scene.blocked_since or since), settings.start_deadline_seconds)


def _overdue(scene: Scene, settings: Settings) -> Failure | None:
    found = scene.obstacle
    if found is None or not _reached(_overdue_end(scene, settings), scene.now):
        return None
    return replace(found, message=cut(f"{found.message} Not mended within {settings.start_deadline_seconds:.0f} s."))


def _wait_end(scene: Scene) -> datetime | None:
    """The end of waiting for quota or for a node."""
    limit = scene.spec.start_deadline_seconds
    if limit is None or scene.job is None or not _waits_for_room(scene):
        return None
    return after(max(scene.waiting_since or scene.job.created, scene.job.created), limit)


def _waits_for_room(scene: Scene) -> bool:
    found = scene.obstacle
    return scene.queued or (found is not None and not found.deadline)


def _waited(scene: Scene) -> Failure | None:
    if not _reached(_wait_end(scene), scene.now):
        return None
    found = (scene.facts.queueing if scene.queued else None) or scene.obstacle
    why = f": {found.message}" if found is not None else ""
    limit = scene.spec.start_deadline_seconds
    what = f"Stage {scene.step.title} did not start within runPolicy.startDeadlineSeconds of {limit} s{why}"
    return failure(Reason.DEADLINE_EXCEEDED, what)
