"""What is done to an operator, and what is measured of it. Each returns figures by the keys of `report.ROWS`."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field
from functools import partial
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from benchmarks.operator import plants
from benchmarks.operator.calls import Call, count
from benchmarks.operator.client import Client, Sightings, many
from benchmarks.operator.contestants import Contestant, Running
from benchmarks.operator.processes import Used, memory_mib, quiet
from cluster.progress import say

if TYPE_CHECKING:
    from benchmarks.operator.ground import Ground
    from benchmarks.operator.report import Figures

JSON = dict[str, Any]

STEADY_RATE, SLOW_RATE = 20.0, 3.0
"""FineTuneJobs a second."""

LIMIT_SECONDS = 900.0
LOOK_SECONDS = 1.0
CALM_SECONDS = 3.0
IDLE_SECONDS = 30.0
TELL_SECONDS = 10.0


@dataclass
class Bench:
    """A ground, a client, and who is measured on it."""

    ground: Ground
    client: Client
    contestant: Contestant
    jobs: int
    """How many a full-size scenario has."""
    _told: float = field(default_factory=time.monotonic)

    def tell(self, what: str) -> None:
        """A line of progress."""
        say(f"{self.contestant.title}: {what}")

    def tell_share(self, what: str, total: int, done: int) -> None:
        """A line of progress now and then."""
        if time.monotonic() - self._told > TELL_SECONDS:
            self._told = time.monotonic()
            self.tell(f"{done:,} of {total:,} {what}")

    async def ask(self, name: str) -> None:
        """A FineTuneJob."""
        await self.client.create("finetunejobs", plants.resource(name))
        if not self.contestant.works:
            await self.client.create("jobs", plants.bare_job(name))

    def ends(self) -> Sightings:
        """Of FineTuneJobs that have succeeded; without an operator, of their Jobs."""
        return Sightings(self.client, *(("finetunejobs", finished) if self.contestant.works else ("jobs", complete)))

    def at_end(self, names: list[str]) -> list[str]:
        """What `ends` will see of these FineTuneJobs."""
        return names if self.contestant.works else [plants.job_of(name) for name in names]

    def processes(self, operator: Running) -> dict[str, int]:
        """All that share the cores, by name."""
        return {"operator": operator.pid, **self.ground.pids, "benchmark": os.getpid()}

    def calls(self, mark: int) -> list[Call]:
        """What the contestant has asked of the API server since."""
        return self.ground.calls.since(mark, self.contestant.user)


def finished(body: JSON) -> bool:
    """Whether a FineTuneJob has succeeded."""
    return (body.get("status") or {}).get("phase") == "Succeeded"


def complete(body: JSON) -> bool:
    """Whether a Job has succeeded."""
    return bool((body.get("status") or {}).get("succeeded"))


# --- a stream of jobs ------------------------------------------------------------------------------------------------


async def steady(at: Bench) -> Figures:
    """Jobs at a fast and at a slow pace."""
    with Running(at.contestant, at.ground) as operator:
        await _warm_up(at, operator)
        fast = await _stream(at, operator, "fast", STEADY_RATE, int(at.jobs * 0.3))
        slow = await _stream(at, operator, "slow", SLOW_RATE, int(at.jobs * 0.06))
    names = ("p50", "p99", "writes")
    return {f"{pace}-{name}": got[name] for pace, got in (("fast", fast), ("slow", slow)) for name in names}


async def _warm_up(at: Bench, operator: Running) -> None:
    """Until the operator serves: a first job is at its end."""
    async with at.ends() as ends:
        await at.ask("warm-up")
        while not await ends.wait(at.at_end(["warm-up"]), LOOK_SECONDS, lambda _: None):
            operator.must_run()


async def _stream(at: Bench, operator: Running, prefix: str, rate: float, number: int) -> Figures:
    """So many jobs at this rate: how long from the call that makes one to the sight of its Job."""
    used = Used(at.processes(operator))
    at.tell(f"{number:,} jobs at {rate:g} a second")
    names = [f"{prefix}-{index:05}" for index in range(number)]
    mark, asked = at.ground.calls.mark(), dict[str, float]()
    async with Sightings(at.client, "jobs") as made, at.ends() as ends:

        async def ask(name: str) -> None:
            asked[name] = time.time()
            await at.ask(name)

        begin = time.time()
        async with asyncio.TaskGroup() as group:
            for index, name in enumerate(names):
                await asyncio.sleep(begin + index / rate - time.time())
                group.create_task(ask(name))
        await _all(at, made, [plants.job_of(name) for name in names], "Jobs")
        await _all(at, ends, at.at_end(names), "finished")
    waits = sorted(1000 * (made.seen[plants.job_of(name)] - asked[name]) for name in names)
    cuts = quantiles(waits, n=100, method="inclusive")
    calls = at.calls(mark)
    at.tell(f"p50 {cuts[49]:.0f} ms, p99 {cuts[98]:.0f} ms; {count(calls)}")
    at.tell(f"CPU a job, ms: {used.by_job(number)}")
    return {"p50": cuts[49], "p99": cuts[98], "writes": sum(call.writes for call in calls) / number}


async def _all(at: Bench, sightings: Sightings, names: list[str], what: str) -> None:
    tell = partial(at.tell_share, what, len(names))
    if not await sightings.wait(names, LIMIT_SECONDS, tell):
        missing = len(set(names) - sightings.seen.keys())
        raise TimeoutError(f"{missing} of {len(names)} not seen within {LIMIT_SECONDS} s: {what}")


# --- many at once ----------------------------------------------------------------------------------------------------


async def burst(at: Bench) -> Figures:
    """All jobs at once."""
    with Running(at.contestant, at.ground) as operator:
        await _warm_up(at, operator)
        await asyncio.sleep(CALM_SECONDS)
        return await _burst(at, operator)


async def _burst(at: Bench, operator: Running) -> Figures:
    at.tell(f"{at.jobs:,} jobs at once")
    names = [f"burst-{index:05}" for index in range(at.jobs)]
    mark, used = at.ground.calls.mark(), Used(at.processes(operator))
    async with Sightings(at.client, "jobs") as made, at.ends() as ends:
        begin = time.time()
        await many(partial(at.ask, name) for name in names)
        asked = time.time()
        await _all(at, made, [plants.job_of(name) for name in names], "Jobs")
        await _all(at, ends, at.at_end(names), "finished")
    await quiet(operator.pid, CALM_SECONDS, LIMIT_SECONDS)
    calls = at.calls(mark)
    at.tell(f"asked for within {asked - begin:.1f} s; {count(calls)}")
    at.tell(f"CPU a job, ms: {used.by_job(at.jobs)}")
    return {
        "burst-jobs": max(made.seen.values()) - begin,
        "burst-finished": max(ends.seen.values()) - begin,
        "burst-writes": sum(call.writes for call in calls) / at.jobs,
        "burst-events": sum(call.resource == "events" for call in calls) / at.jobs,
        "burst-reads": sum(call.verb in ("get", "list") for call in calls) / at.jobs,
        "burst-operator-cpu": 1000 * used.seconds("operator") / at.jobs,
        "burst-server-cpu": 1000 * used.seconds("kube-apiserver") / at.jobs,
        "burst-memory": memory_mib(operator.pid, "VmHWM"),
    }


# --- a restart among what is there -----------------------------------------------------------------------------------


async def restart(at: Bench) -> Figures:
    """A restart among finished jobs and pods of others, then nothing at all happens for a while."""
    return await _restart(at, "restart", at.jobs, 5 * at.jobs)


async def large(at: Bench) -> Figures:
    """The same among five times as many jobs and twice as many pods."""
    return await _restart(at, "large", 5 * at.jobs, 10 * at.jobs)


async def _restart(at: Bench, key: str, jobs: int, pods: int) -> Figures:
    with Running(at.contestant, at.ground) as operator:
        await _warm_up(at, operator)
    at.tell(f"planting {jobs:,} finished jobs and {pods:,} foreign pods")
    await plants.finished_jobs(at.client, "warm-up", jobs)
    await plants.foreign_pods(at.client, pods)
    at.tell("restarting")
    mark, begin = at.ground.calls.mark(), time.time()
    with Running(at.contestant, at.ground) as operator:
        last = await quiet(operator.pid, CALM_SECONDS, LIMIT_SECONDS)
        calls = at.calls(mark)
        at.tell(f"quiet after {last - begin:.1f} s; {count(calls)}")
        figures = {
            f"{key}-quiet": max([last, *(call.at for call in calls if call.resource != "leases")]) - begin,
            f"{key}-writes": float(sum(call.writes for call in calls)),
            f"{key}-memory": memory_mib(operator.pid),
        }
        return figures | (await _idle(at, operator) if key == "restart" else {})


async def _idle(at: Bench, operator: Running) -> Figures:
    """What an operator does when there is nothing to do."""
    at.tell(f"idle for {IDLE_SECONDS:.0f} s")
    mark, used = at.ground.calls.mark(), Used({"operator": operator.pid})
    await asyncio.sleep(IDLE_SECONDS)
    calls = at.calls(mark)
    at.tell(f"idle: {count(calls) or 'no call'}")
    leases = [call for call in calls if call.resource == "leases" and call.verb != "get"]
    return {
        "idle-leases": len(leases) / IDLE_SECONDS,
        "idle-others": float(sum(call.resource != "leases" for call in calls)),
        "idle-cpu": 100 * used.seconds("operator") / IDLE_SECONDS,
        "idle-memory": memory_mib(operator.pid),
    }


# --- the leader is killed --------------------------------------------------------------------------------------------


async def leader(at: Bench) -> Figures:
    """Two replicas; the leader is killed, and a job is made at that moment."""
    with Running(at.contestant, at.ground) as first:
        await _warm_up(at, first)
        with Running(at.contestant, at.ground, replica=1) as second:
            await quiet(second.pid, CALM_SECONDS, LIMIT_SECONDS)
            at.tell("killing the leader")
            async with Sightings(at.client, "jobs") as made:
                first.kill()
                begin = time.time()
                await at.client.create("finetunejobs", plants.resource("orphan"))
                await _all(at, made, [plants.job_of("orphan")], "Jobs")
    return {"leader-killed": made.seen[plants.job_of("orphan")] - begin}
