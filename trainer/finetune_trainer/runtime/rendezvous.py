"""How the processes of a stage find each other, and how the others learn that one is gone.

Rank 0 keeps a store (torch's TCPStore) at MASTER_ADDR:MASTER_PORT. Everybody signs in there, within a bounded time;
whoever fails leaves its reason there, and everybody looks once a second. A collective alone would not tell: NCCL waits
for a lost peer until its timeout, and gloo says no more than that a connection was closed.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from finetune_trainer.config import RENDEZVOUS_TIMEOUT_VARIABLE
from finetune_trainer.progress import Reason
from finetune_trainer.runtime.errors import Interrupted, PeerLost, RendezvousFailed, TrainerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 900.0
"""Until all have come: nodes pull the image at different times."""
LOOK_EVERY_SECONDS = 1.0
PATIENCE_SECONDS = 5.0
"""How long a rank that lost a peer has to end by itself, and to hear what the peer said."""
FAILED = "failed"


@dataclass(frozen=True)
class Place:
    """Who this process is and where all of them meet, as torchrun tells it."""

    rank: int
    world_size: int
    host: str
    port: int
    attempt: int
    timeout_seconds: float

    @classmethod
    def from_environment(cls, attempt: int) -> Place:
        """RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; the time to wait may be set as well."""
        return cls(
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            host=os.environ["MASTER_ADDR"],
            port=int(os.environ["MASTER_PORT"]),
            attempt=attempt,
            timeout_seconds=float(os.environ.get(RENDEZVOUS_TIMEOUT_VARIABLE, TIMEOUT_SECONDS)),
        )


@dataclass(frozen=True)
class Failed:
    """What a rank said when it failed."""

    rank: int
    reason: Reason
    message: str

    def error(self) -> TrainerError:
        """The same failure for another rank to raise."""
        kinds = {kind.reason: kind for kind in TrainerError.__subclasses__()}
        by_name = self.message.startswith(f"Rank {self.rank} ")
        return kinds.get(self.reason, TrainerError)(self.message if by_name else f"Rank {self.rank}: {self.message}")


def meet(place: Place, stopping: threading.Event) -> Any:  # noqa: ANN401 - a TCPStore
    """The store, once everybody has signed in. RendezvousFailed tells who is missing; Interrupted if asked to leave."""
    waits = _turns(place, stopping)
    store = _keep_store(place) if place.rank == 0 else _reach_store(place, waits)
    store.set(_name(place, place.rank), socket.gethostname())
    while missing := [rank for rank in range(place.world_size) if not store.check([_name(place, rank)])]:
        if not next(waits, False):
            raise RendezvousFailed(_told(place, f"rank {', '.join(map(str, missing))} did not come"))
    return store


def _name(place: Place, rank: int) -> str:
    """Of the attempt: a process of an older one that is still about is not counted."""
    return f"attempt-{place.attempt}/rank-{rank}"


def _turns(place: Place, stopping: threading.Event) -> Iterator[bool]:
    """Turns to look again, until the time is up."""
    deadline = time.monotonic() + place.timeout_seconds
    while time.monotonic() < deadline:
        if stopping.wait(LOOK_EVERY_SECONDS / 4):
            msg = "Asked to leave while waiting for the other processes; the next attempt starts the stage again."
            raise Interrupted(msg)
        yield True


def _keep_store(place: Place) -> Any:  # noqa: ANN401 - a TCPStore
    from torch.distributed import DistNetworkError, TCPStore  # type: ignore[attr-defined]  # noqa: PLC0415 - slow

    try:
        return TCPStore("localhost", place.port, place.world_size, is_master=True, wait_for_workers=False)
    except DistNetworkError as error:
        msg = f"Port {place.port} cannot be listened on, where the other processes look for rank 0: {error}"
        raise RendezvousFailed(msg) from error


def _reach_store(place: Place, waits: Iterator[bool]) -> Any:  # noqa: ANN401 - a TCPStore
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]  # noqa: PLC0415 - slow

    why: Exception | None = None
    for _ in waits:
        try:
            socket.create_connection((place.host, place.port), timeout=PATIENCE_SECONDS).close()
            return TCPStore(place.host, place.port, timeout=timedelta(seconds=PATIENCE_SECONDS), wait_for_workers=False)
        except (OSError, DistError) as error:
            why = error
    raise RendezvousFailed(_told(place, f"rank 0 was not reached ({why})")) from why


def _told(place: Place, what: str) -> str:
    return (
        f"The {place.world_size} processes did not meet at {place.host}:{place.port} within "
        f"{place.timeout_seconds:g} s: {what}. Check that the pods of all nodes run and that the network lets "
        f"them reach that port."
    )


class Watch:
    """Looks after the other ranks from a thread of its own, as long as the group is together."""

    def __init__(self, place: Place, leave: Callable[[TrainerError], None]) -> None:
        """`leave(error)` ends the process: it is called where the main thread cannot, stuck in a collective."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # noqa: PLC0415 - slow

        host = "localhost" if place.rank == 0 else place.host
        self._store = TCPStore(host, place.port, timeout=timedelta(seconds=PATIENCE_SECONDS), wait_for_workers=False)
        self._place, self._leave = place, leave
        self._parent = os.getppid()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._look, name="peers", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no longer: whoever leaves now does so in order."""
        self._over.set()

    def tell(self, error: TrainerError | None, message: str) -> None:
        """Leave word of this rank's failure for the others; the first one's word stands."""
        word = {
            "rank": self._place.rank,
            "reason": (error.reason if error else Reason.UNKNOWN).value,
            "message": message,
        }
        try:
            with self._lock:
                self._store.compare_set(self._key, "", json.dumps(word))
        except RuntimeError as lost:
            log.warning("the other processes cannot be told: %s", lost)

    def heard(self, patience_seconds: float = 0.0) -> TrainerError | None:
        """What another rank failed for, if one said so; PeerLost if the store itself is gone."""
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                found = self._failed()
            except RuntimeError as error:
                return PeerLost(told_lost(f"the store of rank 0 is gone ({error})"))
            if found is not None or time.monotonic() >= deadline:
                return found.error() if found else None
            time.sleep(LOOK_EVERY_SECONDS / 4)

    @property
    def _key(self) -> str:
        return f"attempt-{self._place.attempt}/{FAILED}"

    def _failed(self) -> Failed | None:
        with self._lock:
            if not self._store.check([self._key]):
                return None
            word = json.loads(self._store.get(self._key))
        found = Failed(word["rank"], Reason(word["reason"]), word["message"])
        return None if found.rank == self._place.rank else found

    def _look(self) -> None:
        while not self._over.wait(LOOK_EVERY_SECONDS):
            error = self._orphaned() or self.heard()
            if error is not None and not isinstance(error, Interrupted):
                self._let_go(error)
                return

    def _orphaned(self) -> TrainerError | None:
        """The launcher was killed: nobody would end this process."""
        return PeerLost(told_lost("the parent process is gone")) if os.getppid() != self._parent else None

    def _let_go(self, error: TrainerError) -> None:
        if not self._over.wait(PATIENCE_SECONDS):
            self._leave(error)


def told_lost(what: str) -> str:
    """What a rank says of a peer that ended without a word."""
    return f"Another process of the stage was lost: {what}. Its own pod's end or log says why."
