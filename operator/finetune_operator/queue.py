"""A queue of keys: each once, never two at work on the same key, failures tried again ever later.

The semantics are those of client-go's workqueue: a key added while it is in work is handed out again afterwards. Some
hands take only keys that are new, the others whatever has waited longest: a crowd of running jobs keeps no new one from
its beginning, and a crowd of new ones keeps none from its next stage for longer than those before it take.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

FIRST_BACKOFF_SECONDS = 0.5
LAST_BACKOFF_SECONDS = 120.0
AWAY_BACKOFF_SECONDS = 15.0
"""The longest where nobody answers: an API server that is back is met again soon, however long it was gone."""

JITTER = 0.25


@dataclass(frozen=True, order=True)
class Key:
    """One FineTuneJob."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Queue:
    """Keys to be worked on, some of them later."""

    def __init__(
        self,
        jitter: Callable[[], float] = random.random,
        waited: Callable[[float], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`waited` is told of each key that is handed out how many seconds it was ready for that."""
        self._new: dict[Key, float] = {}
        self._ready: dict[Key, float] = {}
        self._working: set[Key] = set()
        self._again: set[Key] = set()
        self._later: dict[Key, asyncio.TimerHandle] = {}
        self._failures: dict[Key, int] = {}
        self._any, self._any_new = asyncio.Event(), asyncio.Event()
        """Set when there is something to hand out."""
        self._jitter = jitter
        self._waited = waited
        self._clock = clock

    def __len__(self) -> int:
        return len(self._new) + len(self._ready)

    def add(self, key: Key, *, new: bool = False) -> None:
        """Have the key worked on as soon as there is a hand free."""
        if key in self._working:
            self._again.add(key)
            return
        self._cancel_later(key)
        if new:
            self._new.setdefault(key, self._ready.pop(key, self._clock()))
            self._any_new.set()
        elif key not in self._new:
            self._ready.setdefault(key, self._clock())
        self._any.set()

    def add_after(self, key: Key, seconds: float) -> None:
        """Have the key worked on in so many seconds, or earlier if that was asked for before."""
        if seconds <= 0:
            self.add(key)
            return
        loop = asyncio.get_running_loop()
        earlier = self._later.get(key)
        if key in self._new or key in self._ready or (earlier is not None and earlier.when() <= loop.time() + seconds):
            return
        self._cancel_later(key)
        self._later[key] = loop.call_later(seconds, self._due, key)

    def backoff(self, key: Key, longest_seconds: float = LAST_BACKOFF_SECONDS) -> float:
        """The key failed: seconds until it should be tried again, ever more."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        pause = min(FIRST_BACKOFF_SECONDS * 2.0 ** min(failures, 20), longest_seconds)
        return pause * (1 + JITTER * self._jitter())

    def forget(self, key: Key) -> None:
        """The key went well: its next failure is a first one."""
        self._failures.pop(key, None)

    async def get(self, *, new: bool = False) -> Key:
        """The key that has waited longest, or the next new one only; it is in work until `done`."""
        filled = self._any_new if new else self._any
        while (keys := self._next(new=new)) is None:
            filled.clear()
            await filled.wait()
        key = next(iter(keys))
        self._waited(self._clock() - keys.pop(key))
        self._working.add(key)
        return key

    def _next(self, *, new: bool) -> dict[Key, float] | None:
        """Those of which the first comes next; None if none wait."""
        waiting = [keys for keys in ((self._new,) if new else (self._new, self._ready)) if keys]
        return min(waiting, key=lambda keys: next(iter(keys.values())), default=None)

    def done(self, key: Key) -> None:
        """The key is in work no more; if it was added meanwhile, it is next in line again."""
        self._working.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def _due(self, key: Key) -> None:
        self._later.pop(key, None)
        self.add(key)

    def _cancel_later(self, key: Key) -> None:
        handle = self._later.pop(key, None)
        if handle is not None:
            handle.cancel()
