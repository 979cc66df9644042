"""Who leads, when, and until when: in a time of the test's own, against a stand-in for the API server's one Lease."""

from __future__ import annotations

import asyncio
import copy
import itertools
import random
import selectors
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NoReturn, cast

import pytest
from kubernetes.aio.client.configuration import Configuration

from finetune_operator.api import JSON
from finetune_operator.kube import ExistsError, Kube, NotFoundError, StaleError
from finetune_operator.lease import (
    CALL_SECONDS,
    LEASE_SECONDS,
    LOOK_SECONDS,
    NOTHING,
    RENEW_SECONDS,
    RETRY_SECONDS,
    Elector,
    ObservedLease,
    claim,
    give_up,
    see,
)

LONGEST_LOOK = LOOK_SECONDS * 1.1
LONGEST_RETRY = RETRY_SECONDS * 1.1
EVER = 1e9


# --- what a Lease says -----------------------------------------------------------------------------------------------

LONG_AGO = "2001-01-01T00:00:00.000000Z"


def lease(holder: str | None, version: str = "1", **spec: Any) -> JSON:
    held = {"holderIdentity": holder} if holder else {}
    return {"metadata": {"resourceVersion": version}, "spec": held | {"leaseDurationSeconds": 15} | spec}


@pytest.mark.parametrize(
    ("found", "wait"),
    [
        pytest.param(None, 0, id="there is none"),
        pytest.param(lease(None), 0, id="nobody has it"),
        pytest.param(lease("me", renewTime=LONG_AGO), 0, id="it is mine"),
        pytest.param(lease("other"), 15, id="first seen: it may have been renewed just now"),
        pytest.param(lease("other", renewTime=LONG_AGO), 15, id="the holder's clock is not believed"),
        pytest.param(lease("other", leaseDurationSeconds=40), 40, id="the holder's own duration counts"),
        pytest.param(lease("other", leaseDurationSeconds=None), 15, id="a record without a duration"),
    ],
)
def test_a_lease_seen_for_the_first_time_may_be_taken_after(found: JSON | None, wait: float) -> None:
    assert see(NOTHING, found, now=100).wait("me", now=100) == wait


def test_it_may_be_taken_when_it_has_said_the_same_for_its_duration() -> None:
    first = see(NOTHING, lease("other", renewTime="a"), now=100)
    same = see(first, lease("other", version="2", renewTime="a"), now=114)
    assert (same.wait("me", 114), same.wait("me", 115)) == (1, 0)
    renewed = see(same, lease("other", version="3", renewTime="b"), now=114)
    assert renewed.wait("me", 115) == 14
    assert renewed.metadata["resourceVersion"] == "3"


def test_who_takes_it_says_since_when_and_who_renews_it_keeps_that() -> None:
    first, later = datetime(2026, 11, 23, tzinfo=UTC), datetime(2026, 11, 23, 0, 0, 2, tzinfo=UTC)
    made = claim(NOTHING, "me", first)
    assert made == {
        "holderIdentity": "me",
        "leaseDurationSeconds": 15,
        "acquireTime": "2026-11-23T00:00:00.000000Z",
        "renewTime": "2026-11-23T00:00:00.000000Z",
        "leaseTransitions": 0,
    }
    renewed = claim(ObservedLease({}, made, 0), "me", later)
    assert renewed == made | {"renewTime": "2026-11-23T00:00:02.000000Z"}
    taken = claim(ObservedLease({}, made, 0), "other", later)
    assert (taken["acquireTime"], taken["leaseTransitions"]) == ("2026-11-23T00:00:02.000000Z", 1)


def test_what_is_given_up_belongs_to_nobody() -> None:
    given = give_up(ObservedLease({}, claim(NOTHING, "me", datetime.now(UTC)), 0))
    assert see(NOTHING, {"metadata": {}, "spec": given}, 0).holder == ""
    assert given["leaseDurationSeconds"] >= 1  # the API server demands it


def test_the_holder_stops_before_the_next_one_may_begin() -> None:
    assert CALL_SECONDS < RENEW_SECONDS < LEASE_SECONDS
    assert LONGEST_RETRY + CALL_SECONDS + LONGEST_RETRY + CALL_SECONDS > RENEW_SECONDS > LONGEST_RETRY + CALL_SECONDS


# --- a time of its own -----------------------------------------------------------------------------------------------


class Hours(selectors.DefaultSelector):
    """Where nothing is to be read, waiting takes no time but moves the clock on."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0)
        if not found:
            assert timeout is not None, "everybody waits for nothing"
            self.now += timeout
        return found


def in_its_own_time(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Hours pass in a moment."""
    hours = Hours()

    def make_loop() -> asyncio.SelectorEventLoop:
        loop = asyncio.SelectorEventLoop(hours)
        loop.time = lambda: hours.now  # type: ignore[method-assign]
        loop.set_exception_handler(lambda _, context: print(context["message"]))  # of an alarm: it raises LostError
        return loop

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(story())


def now() -> float:
    return asyncio.get_running_loop().time()


@dataclass
class StandIn:
    """The API server as far as one Lease is concerned."""

    stored: JSON | None = None
    version: int = 0
    writes: list[tuple[float, str]] = field(default_factory=list)
    written: asyncio.Event = field(default_factory=asyncio.Event)

    def read(self) -> JSON:
        if self.stored is None:
            raise NotFoundError(404, "no such Lease")
        return copy.deepcopy(self.stored)

    def create(self, body: JSON) -> JSON:
        if self.stored is not None:
            raise ExistsError(409, "there already")
        return self._store(body)

    def replace(self, body: JSON) -> JSON:
        if self.stored is None:
            raise NotFoundError(404, "no such Lease")
        if body["metadata"]["resourceVersion"] != str(self.version):
            raise StaleError(409, "changed")
        return self._store(body)

    def edit(self, **spec: Any) -> None:
        """By somebody else."""
        found = self.read()
        self._store(found | {"spec": found["spec"] | spec})

    def _store(self, body: JSON) -> JSON:
        self.version += 1
        self.stored = copy.deepcopy(body | {"metadata": body["metadata"] | {"resourceVersion": str(self.version)}})
        self.writes.append((now(), body["spec"].get("holderIdentity", "")))
        self.written.set()
        return self.read()


@dataclass
class Line:
    """One candidate's way to the server; `away`, `hang` and `deaf` say until when it is broken."""

    server: StandIn
    delay: Callable[[], float]
    away: float = 0
    """Connections are refused."""
    hang: float = 0
    """Calls are neither heard nor answered."""
    deaf: float = 0
    """Calls are heard and done, the answer is lost."""

    async def read(self, *_: str) -> JSON:
        return await self._call(self.server.read)

    async def create(self, body: JSON) -> JSON:
        return await self._call(self.server.create, body)

    async def replace(self, body: JSON) -> JSON:
        return await self._call(self.server.replace, body)

    async def _call(self, done: Callable[..., JSON], *arguments: JSON) -> JSON:
        await asyncio.sleep(self.delay())
        if now() < self.away:
            raise ConnectionRefusedError("simulated")
        if now() < self.hang:
            await asyncio.sleep(EVER)
        answer = done(*arguments)
        await asyncio.sleep(self.delay())
        if now() < max(self.deaf, self.away):
            await asyncio.sleep(EVER)
        return answer


class LostError(Exception):
    """Stands for the end of the process."""


class Candidate:
    """One operator: it works while it holds the Lease."""

    def __init__(self, server: StandIn, delay: Callable[[], float] = lambda: 0.01) -> None:
        self.line = Line(server, delay)
        self.elector = Elector(cast("Kube", self.line), "ns/lease", lambda: None, self._end, clock=now)
        self.stop = asyncio.Event()
        self.standby_since: float | None = None
        self.led_since: float | None = None
        self.lost_at: float | None = None
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        if await self.elector.acquire(self.stop, self._note_standby):
            self.led_since = now()
            async with self.elector.leading():
                await self.stop.wait()

    def _note_standby(self) -> None:
        self.standby_since = self.standby_since or now()

    def _end(self) -> NoReturn:
        self.lost_at = self.lost_at or now()
        self.task.cancel()
        raise LostError

    @property
    def leads(self) -> bool:
        return self.led_since is not None and self.elector.held

    def die(self) -> None:
        """As by SIGKILL: nothing is said any more."""
        self.elector._until = -EVER
        self.task.cancel()


async def leading(server: StandIn) -> Candidate:
    """A candidate that has led for a while."""
    first = Candidate(server)
    await asyncio.sleep(60)
    assert first.leads
    return first


# --- stories ---------------------------------------------------------------------------------------------------------


def test_a_first_candidate_of_a_stand_in_leads_at_once_and_keeps_the_lease_by_its_renewals_alone() -> None:
    async def story() -> None:
        server = StandIn()
        first = Candidate(server)
        await asyncio.sleep(0.1)
        assert first.leads
        await asyncio.sleep(3600)
        assert first.leads
        times = [time for time, _ in server.writes]
        pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert 0.9 * RETRY_SECONDS < min(pauses) < max(pauses) < 1.1 * RETRY_SECONDS + 0.1

    in_its_own_time(story)


def test_a_second_candidate_of_a_stand_in_stands_by_and_writes_nothing() -> None:
    async def story() -> None:
        server = StandIn()
        first = await leading(server)
        second = Candidate(server)
        await asyncio.sleep(3600)
        assert first.leads
        assert second.standby_since is not None
        assert second.led_since is None
        assert {who for _, who in server.writes} == {first.elector.me}

    in_its_own_time(story)


@pytest.mark.parametrize("killed_after", [0.0, 0.3, 1.1, 1.9])
def test_a_killed_holder_of_a_stand_in_is_followed_after_the_lease_has_run_out(killed_after: float) -> None:
    async def story() -> None:
        server = StandIn()
        first = await leading(server)
        second = Candidate(server)
        await asyncio.sleep(30 + killed_after)
        renewed, killed = server.writes[-1][0], now()
        first.die()
        await asyncio.sleep(30)
        assert second.led_since is not None
        assert second.led_since - renewed >= LEASE_SECONDS
        assert second.led_since - killed <= LEASE_SECONDS + LONGEST_LOOK + 0.2

    in_its_own_time(story)


def test_a_holder_of_a_stand_in_told_to_stop_is_followed_at_once() -> None:
    async def story() -> None:
        server = StandIn()
        first = await leading(server)
        second = Candidate(server)
        await asyncio.sleep(30)
        first.stop.set()
        await first.task
        assert not first.elector.held
        left = now()
        await asyncio.sleep(5)
        assert second.led_since is not None
        assert second.led_since - left <= LONGEST_LOOK + 0.1

    in_its_own_time(story)


def test_a_holder_told_to_stop_before_it_heard_of_its_last_renewal_by_a_stand_in_leaves_the_lease_to_others() -> None:
    async def story() -> None:
        server = StandIn()
        first = await leading(server)
        first.line.delay = lambda: 0.5
        server.written.clear()
        await server.written.wait()
        seen = len(server.writes) - 1
        first.stop.set()
        await first.task
        assert [holder for _, holder in server.writes[seen:]] == [first.elector.me, ""]

    in_its_own_time(story)


BREAKS = ("away", "hang", "deaf")


@pytest.mark.parametrize("broken", ["", *BREAKS])
def test_a_standby_told_to_stop_stops_whether_or_not_it_hears_of_a_stand_in(broken: str) -> None:
    async def story() -> None:
        server = StandIn()
        await leading(server)
        second = Candidate(server)
        await asyncio.sleep(30)
        if broken:
            setattr(second.line, broken, EVER)
            await asyncio.sleep(30)
        before = now()
        second.stop.set()
        await second.task
        assert now() - before <= CALL_SECONDS
        assert second.elector.me not in {who for _, who in server.writes}

    in_its_own_time(story)


def test_a_holder_that_a_stand_in_leaves_without_an_answer_says_what_that_was(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        first = await leading(StandIn())
        first.line.hang = now() + LONGEST_RETRY + 0.1
        await asyncio.sleep(RENEW_SECONDS)

    in_its_own_time(story)
    assert "are left: TimeoutError" in caplog.text


@pytest.mark.parametrize("broken", BREAKS)
def test_a_line_to_a_stand_in_that_is_broken_for_less_than_the_deadline_changes_nothing(broken: str) -> None:
    async def story() -> None:
        server = StandIn()
        first, second = await leading(server), Candidate(server)
        await asyncio.sleep(30)
        setattr(first.line, broken, now() + RENEW_SECONDS - LONGEST_RETRY - CALL_SECONDS - 0.2)
        await asyncio.sleep(60)
        assert first.leads
        assert first.lost_at is None
        assert second.led_since is None

    in_its_own_time(story)


@pytest.mark.parametrize("broken", BREAKS)
def test_a_holder_cut_off_from_a_stand_in_has_ended_its_work_before_the_next_begins(broken: str) -> None:
    async def story() -> None:
        server = StandIn()
        first, second = await leading(server), Candidate(server)
        await asyncio.sleep(30)
        began = now()
        setattr(first.line, broken, began + 600)
        await asyncio.sleep(60)
        assert first.lost_at is not None
        assert second.led_since is not None
        assert RENEW_SECONDS - LONGEST_RETRY < first.lost_at - began <= RENEW_SECONDS + 0.1
        assert second.led_since - first.lost_at > 4

    in_its_own_time(story)


@pytest.mark.parametrize("broken", BREAKS)
def test_a_stand_in_that_is_gone_for_all_has_one_leader_again_when_it_is_back(broken: str) -> None:
    async def story() -> None:
        server = StandIn()
        both = first, second = await leading(server), Candidate(server)
        await asyncio.sleep(30)
        for one in both:
            setattr(one.line, broken, now() + 600)
        await asyncio.sleep(599)
        assert not first.leads
        assert not second.leads
        await asyncio.sleep(LEASE_SECONDS + 6)  # one call that hangs for 3 s, two looks of 1.1 s, and the write
        assert second.leads

    in_its_own_time(story)


def test_a_holder_of_a_stand_in_whose_lease_is_taken_ends_its_work_at_the_next_renewal() -> None:
    async def story() -> None:
        server = StandIn()
        first = await leading(server)
        server.edit(holderIdentity="other")
        taken = now()
        await asyncio.sleep(10)
        assert first.lost_at is not None
        assert first.lost_at - taken <= LONGEST_RETRY + 0.1
        assert server.stored is not None
        assert server.stored["spec"]["holderIdentity"] == "other"

    in_its_own_time(story)


def test_a_lease_of_a_stand_in_that_is_edited_or_deleted_is_held_on() -> None:
    async def story() -> None:
        server = StandIn()
        first = await leading(server)
        server.edit(preferredHolder="whoever")
        await asyncio.sleep(10)
        assert server.stored is not None
        assert server.stored["spec"]["preferredHolder"] == "whoever"
        server.stored = None
        await asyncio.sleep(10)
        assert server.stored is not None
        assert first.leads

    in_its_own_time(story)


def test_a_write_after_the_lease_has_run_out_ends_the_work_before_it_is_sent() -> None:
    async def story() -> None:
        first = await leading(StandIn())
        first.elector.check()
        stopped_for = RENEW_SECONDS + 1
        first.elector._clock = lambda: now() + stopped_for  # as after SIGSTOP and SIGCONT: no timer has had its turn
        with pytest.raises(LostError):
            first.elector.check()

    in_its_own_time(story)


async def test_a_client_that_asks_before_each_write_sends_nothing_that_is_refused() -> None:
    def refuse() -> NoReturn:
        raise LostError

    kube = Kube(Configuration(host="http://127.0.0.1:1"), 5, lambda *_: None)  # where nobody listens
    guarded = kube.guarded(refuse)
    body = {"kind": "Job", "metadata": {"namespace": "ns", "name": "x"}}
    for write in (guarded.create(body), guarded.replace(body), guarded.delete("Job", "ns", "x", "uid")):
        with pytest.raises(LostError):
            await write
    with pytest.raises(LostError):
        await guarded.apply_status("ns", "x", "uid", "1", {})
    with pytest.raises(OSError, match="Cannot connect"):
        await guarded.read("Job", "ns", "x")
    with pytest.raises(OSError, match="Cannot connect"):
        await kube.create(body)
    await kube.close()


@pytest.mark.parametrize("seed", range(12))
def test_never_two_lead_at_once_whatever_befalls_the_lines_to_a_stand_in(seed: int) -> None:
    """Candidates come, die and stop; lines break in all ways, answers are slow and overtake each other."""
    dice = random.Random(seed)
    terms: set[str] = set()

    def delay() -> float:
        return dice.choice((0.001, 0.02, dice.uniform(0, 4)))

    async def story() -> None:
        server = StandIn()
        candidates = [Candidate(server, delay) for _ in range(3)]
        for _ in range(100):
            befall(candidates, dice)
            candidates = [one if not one.task.done() else Candidate(server, delay) for one in candidates]
            for _ in range(dice.randrange(40)):
                await asyncio.sleep(0.5)
                leaders = [one.elector.me for one in candidates if one.leads]
                assert len(leaders) <= 1
                terms.update(leaders)
        for one in candidates:
            one.task.cancel()

    in_its_own_time(story)
    assert len(terms) > 5


def befall(candidates: list[Candidate], dice: random.Random) -> None:
    """Something happens to one of them, or nothing."""
    one = dice.choice(candidates)
    match dice.randrange(6):
        case 0:
            one.die()
        case 1:
            one.stop.set()
        case 2 | 3:
            setattr(one.line, dice.choice(BREAKS), now() + dice.uniform(0, 40))
