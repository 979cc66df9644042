"""Which of several operators works: the one that holds a Lease (coordination.k8s.io/v1). The others stand by.

The rules are those of client-go's leaderelection. A candidate judges by its own clock how long the Lease has said the
same, never by the times in it. Each write names the version it was made from. The holder stops at `RENEW_SECONDS` after
the last renewal it sent, the next may begin at `LEASE_SECONDS` after the last one it saw: between the two nobody works.

kubernetes.aio.leaderelection (37.0) was not enough: a refused connection ends it, its calls have no limit of their own
(so the deadline passes unseen while one hangs), it reckons with the wall clock and writes local time as UTC, and it
knows neither jitter nor release nor a stop before the next write.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NoReturn

from finetune_operator.api import JSON
from finetune_operator.kube import ERRORS, ExistsError, Kube, NotFoundError, StaleError, what
from finetune_operator.watch import Beat

LEASE_SECONDS = 15
RENEW_SECONDS = 10
RETRY_SECONDS = 2.0
"""Between two renewals of the holder."""

LOOK_SECONDS = 1.0
"""Between two looks of a candidate. What it sees late it also waits for longer: 15 + 1 s are its worst case."""

CALL_SECONDS = 3.0
"""Of one call: a connection that hangs leaves time for another before the holder must stop."""

JITTER = 0.1
LATE = "it was not renewed in time"

log = logging.getLogger(__name__)


# --- what a Lease says (pure) ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ObservedLease:
    """A Lease as it was last read, and since when it says the same by the reader's own clock. No metadata: no Lease."""

    metadata: JSON
    spec: JSON
    since: float

    @property
    def holder(self) -> str:
        """Who has it; empty: nobody."""
        return self.spec.get("holderIdentity") or ""

    def foreign(self, me: str) -> bool:
        """Whether somebody else has it."""
        return self.holder not in {"", me}

    def wait(self, me: str, now: float) -> float:
        """Seconds until `me` may take it; 0: now."""
        duration = self.spec.get("leaseDurationSeconds") or LEASE_SECONDS
        return max(0.0, self.since + duration - now) if self.foreign(me) else 0.0


NOTHING = ObservedLease({}, {}, 0)


def see(before: ObservedLease, lease: JSON | None, now: float) -> ObservedLease:
    """What a look shows that was answered at `now`; None: there is no such Lease."""
    if lease is None:
        return NOTHING
    spec = lease.get("spec") or {}
    return ObservedLease(lease["metadata"], spec, before.since if before.spec == spec else now)


def claim(observed: ObservedLease, me: str, now: datetime) -> JSON:
    """What the holder writes: that it took the Lease now, or has it still. The times are for people to read."""
    moment = now.isoformat(timespec="microseconds").replace("+00:00", "Z")
    ours = {"holderIdentity": me, "leaseDurationSeconds": LEASE_SECONDS, "renewTime": moment}
    if observed.holder == me:
        return observed.spec | ours
    transitions = observed.spec.get("leaseTransitions", -1) + 1
    return observed.spec | ours | {"acquireTime": moment, "leaseTransitions": transitions}


def give_up(observed: ObservedLease) -> JSON:
    """What the holder writes in the end: nobody has it, the next may take it at once."""
    kept = {name: value for name, value in observed.spec.items() if name != "holderIdentity"}
    return kept | {"leaseDurationSeconds": 1}


# --- one candidate ---------------------------------------------------------------------------------------------------


def since_boot() -> float:
    """Seconds that go on while the machine sleeps, unlike time.monotonic()."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def new_identity() -> str:
    """Of this process and no other, not even of the next in the same pod: <pod>_<random>."""
    return f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"


class Elector:
    """A candidate for one Lease. `lost` must end all work before it returns, at best by not returning at all."""

    def __init__(
        self,
        kube: Kube,
        lease: str,
        beat: Beat,
        lost: Callable[[], NoReturn],
        clock: Callable[[], float] = since_boot,
    ) -> None:
        self.me = new_identity()
        self.lease = lease
        self._namespace, self._name = lease.split("/")
        self._kube = kube
        self._beat = beat
        self._lost = lost
        self._clock = clock
        self._observed = NOTHING
        self._until = float("-inf")
        self._alarm: asyncio.TimerHandle | None = None
        self._said = ""

    @property
    def held(self) -> bool:
        """Whether work may be done at this moment."""
        return self._clock() < self._until

    def check(self) -> None:
        """To be called before every write: a process that was stopped for a while may find the Lease run out here."""
        if not self.held:
            self._lose(LATE)

    async def acquire(self, stop: asyncio.Event, on_standby: Callable[[], None]) -> bool:
        """Try until the Lease is held, for ever if need be; False if told to stop before."""
        while not stop.is_set():
            self._beat()
            pause = _jittered(LOOK_SECONDS)
            try:
                if (wait := await self._look()) == 0:
                    await self._write()
                    self._say(logging.INFO, f"Leading: {self.me} holds the Lease {self.lease}")
                    return True
                pause = min(pause, wait)
                self._say(logging.INFO, f"Standing by: {self._observed.holder} holds the Lease {self.lease}")
                on_standby()
            except ERRORS as error:
                self._say(logging.WARNING, f"The Lease {self.lease} cannot be had yet: {what(error)}")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), pause)
        return False

    @contextlib.asynccontextmanager
    async def leading(self) -> AsyncIterator[None]:
        """While inside, the Lease is renewed; it is released when all that was done inside has ended."""
        try:
            async with asyncio.TaskGroup() as group:
                renewal = group.create_task(self._renew_for_ever())
                try:
                    yield
                finally:
                    renewal.cancel()
        finally:
            await self._release()

    # --- below

    async def _look(self) -> float:
        """Read the Lease; seconds until it may be taken."""
        try:
            lease = await _limited(self._kube.read("Lease", self._namespace, self._name))
        except NotFoundError:
            lease = None
        now = self._clock()
        self._observed = see(self._observed, lease, now)
        return self._observed.wait(self.me, now)

    async def _write(self) -> None:
        """Take the Lease as it was seen, or renew it."""
        sent = self._clock()
        lease = await self._put(self._observed, claim(self._observed, self.me, datetime.now(UTC)))
        self._observed = see(NOTHING, lease, self._clock())
        self._hold(sent + RENEW_SECONDS)

    async def _put(self, observed: ObservedLease, spec: JSON) -> JSON:
        metadata = observed.metadata or {"namespace": self._namespace, "name": self._name}
        body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
        return await _limited(self._kube.replace(body) if observed.metadata else self._kube.create(body))

    def _hold(self, until: float) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._until = until
        self._alarm = asyncio.get_running_loop().call_later(until - self._clock(), self._lose, LATE)

    async def _renew_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_jittered(RETRY_SECONDS))
            self._beat()
            try:
                await self._renew()
            except ERRORS as error:
                left = self._until - self._clock()
                log.warning("The Lease was not renewed, %.1f s are left: %s", left, what(error))

    async def _renew(self) -> None:
        try:
            await self._write()
        except (StaleError, ExistsError, NotFoundError):  # changed or deleted by somebody, or by an answer not heard
            await self._look()
        else:
            return
        if self._observed.foreign(self.me):
            self._lose(f"{self._observed.holder} has it")
        await self._write()

    async def _release(self) -> None:
        """Where this fails, the next one waits until the Lease has run out."""
        if not self.held or self._alarm is None:
            return
        self._alarm.cancel()
        self._until = float("-inf")
        try:
            await self._give_up()
        except ERRORS as error:
            log.warning("The Lease was not released: %s", what(error))
        else:
            log.info("The Lease is released")

    async def _give_up(self) -> None:
        try:
            await self._put(self._observed, give_up(self._observed))
        except StaleError:  # by the last renewal, broken off before its answer was heard
            await self._look()
            if self._observed.holder == self.me:
                await self._put(self._observed, give_up(self._observed))

    def _lose(self, why: str) -> NoReturn:
        self._until = float("-inf")
        log.error("The Lease %s is lost, %s: all work ends here", self.lease, why)
        self._lost()

    def _say(self, level: int, message: str) -> None:
        """Once, not every second."""
        if message != self._said:
            log.log(level, message)
            self._said = message


async def _limited(call: Awaitable[JSON]) -> JSON:
    async with asyncio.timeout(CALL_SECONDS):
        return await call


def _jittered(seconds: float) -> float:
    return seconds * (1 + JITTER * (2 * random.random() - 1))  # noqa: S311 - jitter
