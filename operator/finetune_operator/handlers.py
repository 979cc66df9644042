"""kopf's part: it watches FineTuneJobs and puts their keys into the queue. And the loops that empty the queue."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, NoReturn

import kopf

from finetune_operator.api import GROUP, KIND, PLURAL, VERSION
from finetune_operator.health import Health, serve
from finetune_operator.kube import CONNECT_SECONDS, ERRORS, GRACE_SECONDS, PAGE, Kube, KubeError, StaleError, what
from finetune_operator.lease import RENEW_SECONDS, Elector
from finetune_operator.logs import key_in_logs
from finetune_operator.metrics import Metrics, Result
from finetune_operator.progress import ProgressReader
from finetune_operator.queue import AWAY_BACKOFF_SECONDS, LAST_BACKOFF_SECONDS, Key, Queue
from finetune_operator.reconcile import BUSY, World, reconcile
from finetune_operator.settings import Settings
from finetune_operator.watch import WATCH_SECONDS, ChildWatch, Ended, Resync, key_of_job

PASS_LIMIT_SECONDS = 180
"""A pass is many calls, each with its own limit; one that takes longer hangs."""

WORKER_WAIT_SECONDS = 30

GATHER_SECONDS = 0.2
"""A Job's pods, their states and what we write ourselves change one after another: one pass sees them all."""

OnEvent = Callable[..., Coroutine[Any, Any, None]]
Loop = Coroutine[Any, Any, None]

log = logging.getLogger(__name__)


class EndlessBackoffs:
    """1, 2, 4 ... 15 s with jitter, for ever: a watcher must never give up (kopf's own list ends after 54 s)."""

    def __iter__(self) -> Iterator[float]:
        for attempt in itertools.count():
            yield min(2.0 ** min(attempt, 5), AWAY_BACKOFF_SECONDS) * (0.5 + random.random())  # noqa: S311 - jitter


async def run(settings: Settings, stop: asyncio.Event, start_anew: Callable[[], NoReturn]) -> None:
    """Everything, until `stop`: probes, the Lease, and while it is held the work. Without it, `start_anew`."""
    health, metrics = Health(), Metrics()
    probes = await serve(health, metrics, settings.health_port)
    kube = await Kube.connect(settings.request_timeout_seconds, metrics.called)
    progress = ProgressReader(settings.progress_interval_seconds)
    world = World(kube, progress, settings, metrics, clock=lambda: datetime.now(UTC))
    try:
        if settings.lease:
            await _work_elected(world, health, stop, start_anew)
        else:
            await _work(world, health, stop)
    finally:
        await progress.close()
        await kube.close()
        await probes.cleanup()


async def _work_elected(world: World, health: Health, stop: asyncio.Event, start_anew: Callable[[], NoReturn]) -> None:
    """Stand by until the Lease can be had, work while it is held, release it when all work has ended."""
    elector = Elector(world.kube, world.settings.lease, health.expect("lease", RENEW_SECONDS * 3), start_anew)
    if await elector.acquire(stop, health.stand_by):
        async with elector.leading():
            await _work(replace(world, kube=world.kube.guarded(elector.check)), health, stop)


@dataclass(frozen=True)
class Watches:
    """The watches of children, the queue that they fill, and the jobs that have ended."""

    queue: Queue
    ended: Ended
    children: tuple[ChildWatch, ...]

    @classmethod
    def of(cls, world: World, health: Health) -> Watches:
        """The watches of Jobs and pods, and a queue that they fill."""
        queue, ended = Queue(waited=world.metrics.waited), Ended()
        world.metrics.queue(lambda: len(queue))
        on_key = partial(queue.add_after, seconds=GATHER_SECONDS)
        children = (
            ChildWatch(world.kube, kind, namespace_of(world), on_key, ended, _beat_of_watch(kind, health))
            for kind in ("Job", "Pod")
        )
        return cls(queue, ended, tuple(children))


def namespace_of(world: World) -> str | None:
    """The one namespace that is served; None: all."""
    return world.settings.watch_namespace or None


def _beat_of_watch(kind: str, health: Health) -> Callable[[], None]:
    return health.expect(f"watch of {kind}s", WATCH_SECONDS * 2)


async def _work(world: World, health: Health, stop: asyncio.Event) -> None:
    """kopf, the watches of children, resync, workers."""
    health.begin()
    world.metrics.leads(leads=True)
    try:
        watches = Watches.of(world, health)
        await begin_watching(watches, world, health, stop)
        if not stop.is_set():
            await _run_loops(watches, world, health, stop)
    finally:
        world.metrics.leads(leads=False)


async def _run_loops(watches: Watches, world: World, health: Health, stop: asyncio.Event) -> None:
    """Until kopf ends, on `stop` or on a signal (it takes the signals over). A loop that breaks ends all."""
    watching = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        loops = [
            *(watch.run() for watch in watches.children),
            _resync(watches, world, health),
            *_workers(watches.queue, world, health),
        ]
        tasks = [group.create_task(loop) for loop in loops]
        ready = group.create_task(_tell_ready(watching, health))
        await run_kopf(partial(_on_event, watches, world), world.settings, stop, watching)
        log.info("Stopping")
        health.begin()
        for task in (*tasks, ready):
            task.cancel()


def _resync(watches: Watches, world: World, health: Health) -> Loop:
    seconds, on_key, ended = world.settings.resync_seconds, watches.queue.add, watches.ended
    beat = health.expect("resync", seconds * 3)
    return Resync(world.kube, namespace_of(world), seconds, on_key, world.metrics.jobs, ended, beat).run()


def _workers(queue: Queue, world: World, health: Health) -> Iterator[Loop]:
    """Some only begin jobs: a crowd of running ones keeps no new one waiting."""
    for number in range(world.settings.workers):
        beat = health.expect(f"worker {number}", PASS_LIMIT_SECONDS * 2)
        yield work(queue, world, beat, new=number < world.settings.workers // 2)


async def _tell_ready(watching: asyncio.Event, health: Health) -> None:
    await watching.wait()
    while not health.kopf_watches():  # noqa: ASYNC110 - kopf tells nobody
        await asyncio.sleep(0.1)
    health.watch()
    log.info("Watching FineTuneJobs")


async def begin_watching(watches: Watches, world: World, health: Health, stop: asyncio.Event) -> None:
    """Until the API server knows FineTuneJobs, for which kopf would look once, and then watch nothing.

    The children's watches begin here: with kopf's list of all FineTuneJobs, which comes after, nothing is missed, and
    there is no need to read every child there is.
    """
    beat = health.expect("start", 120)
    for pause in EndlessBackoffs():
        beat()
        try:
            await world.kube.list_page(KIND, namespace_of(world), limit=1)
            for watch in watches.children:
                await watch.begin()
        except ERRORS as error:
            log.warning("FineTuneJobs cannot be listed yet, trying again in %.0f s: %s", pause, what(error))
        else:
            health.forget("start")
            return
        try:
            await asyncio.wait_for(stop.wait(), pause)
        except TimeoutError:
            continue
        return


# --- workers ---------------------------------------------------------------------------------------------------------


async def work(queue: Queue, world: World, beat: Callable[[], None], *, new: bool = False) -> None:
    """Take keys, or new ones only, and reconcile them.

    Never returns: what a pass raises is logged and the key tried again.
    """
    while True:
        beat()
        try:
            async with asyncio.timeout(WORKER_WAIT_SECONDS):  # wait_for makes tasks, for which kopf's exit waits 5 s
                key = await queue.get(new=new)
        except TimeoutError:
            continue
        with key_in_logs(key):
            requeue = await attempt(queue, world, key)
        queue.done(key)
        if requeue is not None:
            queue.add_after(key, requeue)


async def attempt(queue: Queue, world: World, key: Key) -> float | None:
    """One pass, timed; seconds until the next, None if only changes matter."""
    began = time.monotonic()
    result, requeue = await _pass(queue, world, key)
    world.metrics.passed(result, time.monotonic() - began)
    return requeue


async def _pass(queue: Queue, world: World, key: Key) -> tuple[Result, float | None]:
    try:
        async with asyncio.timeout(PASS_LIMIT_SECONDS):
            requeue = await reconcile(key, world)
    except StaleError:
        return Result.REQUEUE, 0.05  # somebody else wrote: look again
    except ERRORS as error:
        pause = queue.backoff(key, LAST_BACKOFF_SECONDS if _refused(error) else AWAY_BACKOFF_SECONDS)
        return Result.ERROR, _later(world, pause, f"The API server did not do as asked: {what(error)}")
    except Exception as error:  # noqa: BLE001 - a bug in one job's pass must not stop the others
        return Result.ERROR, _later(world, queue.backoff(key), "The pass failed", error)
    queue.forget(key)
    return (Result.SUCCESS if requeue is None else Result.REQUEUE_AFTER), requeue


def _refused(error: Exception) -> bool:
    """Whether the API server said no, which it may do for long; else it is away or busy, and may be back any moment."""
    return isinstance(error, KubeError) and error.status not in BUSY


def _later(world: World, pause: float, why: str, error: Exception | None = None) -> float:
    world.metrics.put_off()
    log.warning("%s; trying again in %.1f s", why, pause, exc_info=error)
    return pause


# --- kopf ------------------------------------------------------------------------------------------------------------


async def run_kopf(on_event: OnEvent, settings: Settings, stop: asyncio.Event, watching: asyncio.Event) -> None:
    """kopf, embedded; returns when `stop` is set."""
    registry = kopf.OperatorRegistry()
    kopf.on.startup(registry=registry)(partial(_configure, settings.request_timeout_seconds))
    kopf.on.login(registry=registry)(_login)
    kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)(on_event)
    kopf.on.cleanup(registry=registry)(partial(_raise_flag, stop))
    await kopf.operator(
        registry=registry,
        standalone=True,
        clusterwide=not settings.watch_namespace,
        namespaces=[settings.watch_namespace] if settings.watch_namespace else [],
        stop_flag=stop,
        ready_flag=watching,
    )


async def _raise_flag(stop: asyncio.Event, **_: Any) -> None:  # noqa: ANN401 - kopf's
    """Ended by a signal, kopf would wait 5 s for its own task that still waits for the flag."""
    stop.set()


class NothingKept(kopf.DiffBaseStorage):
    """kopf copies each object that it hears of whole, to compare it with the last one for handlers that we have not.

    That was nearly half of its time for an object.
    """

    def build(self, **_: Any) -> kopf.BodyEssence:  # noqa: ANN401 - kopf's
        """Nothing is of interest."""
        return kopf.BodyEssence()

    def fetch(self, **_: Any) -> kopf.BodyEssence | None:  # noqa: ANN401 - kopf's
        """Nothing was kept."""
        return None

    def store(self, **_: Any) -> None:  # noqa: ANN401 - kopf's
        """Nothing is kept."""


def _configure(request_timeout_seconds: float, settings: kopf.OperatorSettings, **_: Any) -> None:  # noqa: ANN401
    """No peering, no finalizers, no events of its own, and no giving up; limits as those of `Kube`."""
    settings.peering.standalone = True
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.persistence.diffbase_storage = NothingKept()
    settings.networking.error_backoffs = EndlessBackoffs()
    settings.networking.request_timeout = request_timeout_seconds
    settings.networking.connect_timeout = CONNECT_SECONDS
    settings.watching.server_timeout = WATCH_SECONDS
    settings.watching.client_timeout = WATCH_SECONDS + GRACE_SECONDS
    settings.watching.connect_timeout = CONNECT_SECONDS
    settings.watching.inactivity_timeout = WATCH_SECONDS + GRACE_SECONDS
    settings.watching.chunk_size = PAGE
    settings.queueing.idle_timeout = 1.0
    settings.process.ultimate_exiting_timeout = 10


def _login(**kwargs: Any) -> kopf.ConnectionInfo | None:  # noqa: ANN401
    """As `Kube.connect` does, without the sync client's weight."""
    if "KUBECONFIG" not in os.environ and (found := kopf.login_with_service_account(**kwargs)):
        return found
    return kopf.login_with_kubeconfig(**kwargs)


async def _on_event(watches: Watches, world: World, event: kopf.RawEvent, **_: Any) -> None:  # noqa: ANN401
    """Any change of a FineTuneJob; one that has ended is only counted."""
    body = event["object"]
    key = key_of_job(body)
    world.heard.pop(key, None)
    if event["type"] == "DELETED":
        world.metrics.jobs.forget([key])
        watches.ended.forget([key])
        watches.queue.add(key)
        return
    world.metrics.jobs.see(key, body)
    if watches.ended.see(body):
        return
    if body.get("status"):
        watches.queue.add_after(key, GATHER_SECONDS)
    else:
        world.heard[key] = dict(body)
        watches.queue.add(key, new=True)
