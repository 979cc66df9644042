"""How far the running stage is, asked of its pod. A pod that does not answer is no error."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import aiohttp
from pydantic import ValidationError

from finetune_operator.facts import StagePod
from finetune_trainer.progress import PROGRESS_PORT, Progress

TIMEOUT_SECONDS = 2.0
LIMIT_BYTES = 65536

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Heard:
    """What a pod told last."""

    progress: Progress | None
    asked: float
    moved: float
    """When its pulse was last seen or said to have moved. Times are those of the reader's clock, in seconds."""


class ProgressReader:
    """Asks each pod at most once an interval, and gives the last answer in between."""

    def __init__(self, interval_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval = interval_seconds
        self._clock = clock
        self._heard: dict[str, Heard] = {}
        self._session: aiohttp.ClientSession | None = None

    async def read(self, pod: StagePod, patience_seconds: float) -> tuple[Progress | None, float]:
        """The pod's progress, at most an interval old, None if it never told; and for how many seconds it has been so.

        Where that has been so for `patience_seconds`, it is asked again, however lately it was: an old answer is no
        sign that nothing moves. The pod itself counts the seconds, whichever operator asks. Of one that does not answer
        any more they are counted in this process alone: after a restart it is given its whole time again.
        """
        now = self._clock()
        self._forget(now)
        heard = self._heard.get(pod.uid)
        if heard is None or now - heard.asked >= self._interval * 0.9 or now - heard.moved >= patience_seconds:
            heard = self._heard[pod.uid] = _after(heard, await self._ask(pod), now)
        return heard.progress, now - heard.moved

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    def _forget(self, now: float) -> None:
        """Drop what is no longer asked for."""
        old = [uid for uid, heard in self._heard.items() if now - heard.asked > 20 * self._interval]
        for uid in old:
            del self._heard[uid]

    async def _ask(self, pod: StagePod) -> Progress | None:
        host = f"[{pod.ip}]" if ":" in pod.ip else pod.ip
        try:
            async with self._open().get(f"http://{host}:{PROGRESS_PORT}/progress") as response:
                content = await response.content.read(LIMIT_BYTES)
            progress = Progress.model_validate_json(content)
        except (aiohttp.ClientError, TimeoutError, OSError, ValidationError) as error:
            log.debug("Pod %s does not tell its progress: %s", pod.name, error)
            return None
        return progress if (progress.attempt, progress.stage) == (pod.attempt, pod.stage) else None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
            connector = aiohttp.TCPConnector(force_close=True)
            self._session = aiohttp.ClientSession(timeout=timeout, connector=connector, trust_env=False)
        return self._session


def _after(before: Heard | None, told: Progress | None, now: float) -> Heard:
    """What is known after one more question."""
    if told is not None:
        return Heard(told, now, now - told.still_seconds)
    return Heard(None, now, now) if before is None else replace(before, asked=now)
