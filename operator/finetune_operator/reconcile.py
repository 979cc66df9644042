"""One pass: observe, decide, act, write the status once, tell the news.

Nothing is remembered between passes but how long a pod's progress has stood still, and which jobs were begun just now.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from finetune_operator.api import JSON, KIND, FineTuneJob, Status
from finetune_operator.facts import (
    Conflict,
    Facts,
    Gang,
    Owner,
    Refusal,
    StageJob,
    StagePod,
    after,
    parse_jobs,
    parse_pods,
    parse_warnings,
)
from finetune_operator.kube import ExistsError, Kube, KubeError, NotFoundError
from finetune_operator.manifests import (
    News,
    build_claim,
    build_config_map,
    build_event,
    build_service,
    build_stage_job,
)
from finetune_operator.metrics import Metrics
from finetune_operator.progress import ProgressReader
from finetune_operator.queue import Key
from finetune_operator.queueing import NOT_TAKEN_UP, Queueing, admitted, parse_waiting
from finetune_operator.settings import Settings
from finetune_operator.status import Decision, Remove, Start, Stop, decide

SETTLE_SECONDS = 5
"""A pod that does not run after so long may have a warning to tell."""

NEW_SECONDS = 10
"""A job this young, of which nothing has been told, has not come further than its first attempt."""

TELL_SECONDS = 0.3
"""The first that is told of a job that has begun is how its first pod fares: one status less is written for it."""

BUSY = (429, 503, 504)
"""HTTP: an API server that has no time says nothing about what it was asked."""

log = logging.getLogger(__name__)


class TakenError(Exception):
    """A name of ours is taken by an object that is not ours."""

    def __init__(self, conflict: Conflict) -> None:
        super().__init__(f"{conflict.kind} {conflict.name} is not ours")
        self.conflict = conflict


class RefusedError(Exception):
    """The API server would not create something; `error` is its answer."""

    def __init__(self, refusal: Refusal, error: KubeError) -> None:
        super().__init__(f"{refusal.kind} {refusal.name}: {error}")
        self.refusal = refusal
        self.error = error


@dataclass(frozen=True)
class World:
    """What a pass has at hand."""

    kube: Kube
    progress: ProgressReader
    settings: Settings
    metrics: Metrics
    clock: Callable[[], datetime]
    heard: dict[Key, JSON] = field(default_factory=dict)
    """Jobs of which nothing has been told, as the watch brought them: a first pass need not ask for them again."""
    begun: set[Key] = field(default_factory=set)
    """Jobs whose first pods were asked for in the pass before, and of which nothing has been told."""


async def reconcile(key: Key, world: World) -> float | None:
    """Bring one FineTuneJob nearer to its spec; seconds until the next look, None if only changes matter.

    Safe to run at any moment, any number of times. Raises `KubeError` where the API server refuses a call, after having
    told the user if it is something to be created: whoever called tries again, ever later.
    """
    begun = key in world.begun
    world.begun.discard(key)
    facts = await observe(key, world, begun=begun)
    if facts is None:
        return None  # deleted: its children go by owner reference
    decision = decide(facts, world.settings, world.clock())
    error = None
    try:
        await act(facts.job, decision, world)
        if not begun and not facts.job.stored_status and any(isinstance(action, Start) for action in decision.actions):
            world.begun.add(key)
            return TELL_SECONDS
    except TakenError as taken:
        decision = decide(replace(facts, conflicts=(taken.conflict,)), world.settings, world.clock())
    except RefusedError as refused:
        decision = decide(replace(facts, refusal=refused.refusal), world.settings, world.clock())
        error = refused.error
    await write_status(facts.job, decision.status, world)
    await tell(facts.job, decision.events, world)
    if error is not None and not decision.status.finished:
        raise error
    return decision.requeue_after_seconds


# --- observe ---------------------------------------------------------------------------------------------------------


async def observe(key: Key, world: World, *, begun: bool = False) -> Facts | None:
    """The job and its children as they are now; None if the job is gone. `begun` by the pass before: it has some."""
    try:
        body = world.heard.pop(key, None) or await world.kube.read(KIND, key.namespace, key.name)
    except NotFoundError:
        return None
    job = FineTuneJob.parse(body)
    if job.status.finished or job.deleting or job.managed_elsewhere or (job.problem and not job.stored_status):
        return Facts(job)
    if job.problem is None and not begun and _is_new(job, world.clock()):
        return Facts(job, claim_modes=await _claim_modes(job, world.kube))
    jobs = parse_jobs(await world.kube.children("Job", key.namespace, key.name), job.uid)
    pods = parse_pods(await world.kube.children("Pod", key.namespace, key.name), job.uid)
    if job.problem is not None:
        return Facts(job, jobs, pods)  # begun by an operator that understood it
    facts = Facts(job, jobs, pods, claim_modes=await _claim_modes(job, world.kube))
    latest = jobs[-1] if jobs else None
    if latest is None or latest.ended:
        return facts
    facts = replace(facts, queueing=await _queueing(job, latest, world))
    return await _look_closer(facts, latest, facts.gang(latest.position), world)


def _is_new(job: FineTuneJob, now: datetime) -> bool:
    """Whether nothing can be there yet but what a first pass makes, so that two lists can be saved.

    Such a pass may have been cut off before its status was written. What it made has the names that this one asks for:
    the API server says that it is there, it is ours by its owner, and it is left as it is. A status that was lost is
    another matter, of a job that had time to have one: only the lists tell how far it had come.
    """
    return not job.stored_status and now < after(job.created, NEW_SECONDS)


async def _queueing(job: FineTuneJob, live: StageJob, world: World) -> Queueing | None:
    """How the Job fares in its queue; None of one without a queue, and as long as Kueue may not have seen it yet."""
    if not live.suspended:
        return admitted(live.name, live.queue) if live.queue else None
    workloads = await world.kube.workloads(job.namespace, live.uid) if live.queue else []
    found = parse_waiting(live.name, live.queue, workloads)
    fresh = world.clock() < after(live.created, SETTLE_SECONDS)
    return None if found.reason == NOT_TAKEN_UP and fresh else found


async def _claim_modes(job: FineTuneJob, kube: Kube) -> tuple[str, ...] | None:
    """Access modes of a claim that is brought for several pods to share, before the job begins; None if not there."""
    claim = job.valid_spec.existing_claim
    if claim is None or job.valid_spec.num_nodes == 1 or job.status.attempts:
        return None
    try:
        found = await kube.read("PersistentVolumeClaim", job.namespace, claim)
    except NotFoundError:
        return None
    return tuple(found["spec"].get("accessModes") or ())


async def _look_closer(facts: Facts, job: StageJob, gang: Gang, world: World) -> Facts:
    """The live attempt's progress, or what keeps it from starting."""
    leader = gang.leader
    if gang.started:
        return await _hear(facts, leader, world)
    late = gang.late[0] if gang.complete and gang.late else None
    since = (late.scheduled or late.created) if late is not None else job.started or job.created
    if job.suspended or (late is None and gang.complete) or world.clock() < after(since, SETTLE_SECONDS):
        return facts
    about = late.uid if late is not None else job.uid
    return replace(facts, warnings=parse_warnings(await world.kube.events(facts.job.namespace, about)))


async def _hear(facts: Facts, leader: StagePod | None, world: World) -> Facts:
    """The leader's progress, and since when it has not moved; a pod that never told any may be out of reach."""
    if leader is None or not leader.running or not leader.ip:
        return facts
    progress, still_seconds = await world.progress.read(leader, facts.job.valid_spec.stall_timeout_seconds)
    if progress is None and facts.job.status.progress is None:
        return facts
    return replace(facts, progress=progress, still_since=world.clock() - timedelta(seconds=still_seconds))


# --- act -------------------------------------------------------------------------------------------------------------


async def act(job: FineTuneJob, decision: Decision, world: World) -> None:
    """Create and delete; `TakenError` if a name is taken, `RefusedError` if a creation is refused."""
    for action in decision.actions:
        match action:
            case Stop():
                await world.kube.delete("Job", job.namespace, action.name, action.uid)
            case Remove():
                await world.kube.delete(KIND, job.namespace, job.name, job.uid)
            case Start():
                await start(job, action, world)


async def start(job: FineTuneJob, action: Start, world: World) -> None:
    """What the attempt mounts, then its Job. What is there already and ours is left as it is."""
    mounted = [build_claim(job, world.settings), build_config_map(job)]
    if action.step.pods > 1:
        mounted.append(build_service(job))
    await together(ensure(job, manifest, world.kube) for manifest in mounted if manifest is not None)
    await ensure(job, build_stage_job(job, action.step, action.attempt, world.settings, action.overrides), world.kube)


async def together(calls: Iterable[Coroutine[None, None, None]]) -> None:
    """All at once; the first error is raised when all have ended, so that none goes on behind our back."""
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


async def ensure(job: FineTuneJob, manifest: JSON, kube: Kube) -> None:
    """Create the object unless it is there and ours."""
    try:
        await kube.create(manifest)
    except ExistsError:
        await _check_owner(job, manifest, kube)
    except KubeError as error:
        if error.status in BUSY:
            raise
        await _check_refusal(job, manifest, error, kube)
    else:
        log.info("%s %s created", manifest["kind"], manifest["metadata"]["name"])


async def _check_refusal(job: FineTuneJob, manifest: JSON, error: KubeError, kube: Kube) -> None:
    """`RefusedError`, unless it is there: a quota that is used up refuses also what it has in it already."""
    try:
        await _check_owner(job, manifest, kube)
    except NotFoundError:
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        raise RefusedError(Refusal(kind, name, error.status, error.message), error) from error


async def _check_owner(job: FineTuneJob, manifest: JSON, kube: Kube) -> None:
    kind, name = manifest["kind"], manifest["metadata"]["name"]
    there = await kube.read(kind, job.namespace, name)
    owner = Owner.parse({"kind": kind, **there}, job)
    if owner.uid != job.uid:
        raise TakenError(Conflict(kind, name, leftover=owner.namesake and owner.uid is not None))


# --- tell ------------------------------------------------------------------------------------------------------------


async def write_status(job: FineTuneJob, status: Status, world: World) -> None:
    """Write the status if it says anything new."""
    told = status.to_dict()
    if told == job.stored_status or job.deleting or job.status.finished or job.managed_elsewhere:
        return
    await world.kube.apply_status(job.namespace, job.name, job.uid, job.resource_version, told)
    world.metrics.wrote(job.status, status)
    log_changes(job.status, status)


def log_changes(before: Status, after: Status) -> None:
    """A line for each attempt that has failed since, and one for a new phase or reason."""
    for each in after.failed_since(before):
        fields = {"stage": each.stage, "attempt": each.number, "reason": each.reason, "retry": each.retry}
        log.warning(
            "Attempt %d of %s failed (%s): %s", each.number, each.stage, each.reason, each.message, extra=fields
        )
    if after.phase != before.phase or after.reason != before.reason:
        fields = {"phase": after.phase, "reason": after.reason}
        log.info("%s (%s): %s", after.phase, after.reason, after.message, extra=fields)


async def tell(job: FineTuneJob, news: tuple[News, ...], world: World) -> None:
    """Record Events, each once. News that cannot be told holds nothing up."""
    for item in news:
        try:
            await world.kube.create(build_event(job, item, world.clock()))
        except ExistsError:
            continue
        except KubeError as error:
            log.warning("The event %s was not recorded: %s", item.reason, error)
