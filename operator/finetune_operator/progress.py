"""How far the running stage is, asked of its pod. A pod that does not answer is no error."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import aiohttp
from pydantic import ValidationError

from finetune_operator.facts import StagePod
from finetune_trainer.progress import PROGRESS_PORT, Progress

TIMEOUT_SECONDS = 2.0
LIMIT_BYTES = 65536

log = logging.getLogger(__name__)


class ProgressReader:
    """Asks each pod at most once an interval, and gives the last answer in between."""

    def __init__(self, interval_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval = interval_seconds
        self._clock = clock
        self._heard: dict[str, tuple[float, Progress | None]] = {}
        self._session: aiohttp.ClientSession | None = None

    async def read(self, pod: StagePod) -> Progress | None:
        """The pod's progress, at most an interval old; None if it does not tell."""
        now = self._clock()
        self._forget(now)
        heard = self._heard.get(pod.uid)
        if heard is not None and now - heard[0] < self._interval * 0.9:
            return heard[1]
        progress = await self._ask(pod) or (heard[1] if heard else None)
        self._heard[pod.uid] = (now, progress)
        return progress

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    def _forget(self, now: float) -> None:
        """Drop what is no longer asked for."""
        old = [uid for uid, (heard, _) in self._heard.items() if now - heard > 20 * self._interval]
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
