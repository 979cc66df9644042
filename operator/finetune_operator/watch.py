"""List and watch children by label, endlessly: each change puts the key of its FineTuneJob into the queue.

Holds no objects. A lost watch is taken up again where it ended, after 410 from a new list, after errors ever later.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from finetune_operator.api import JSON, KIND, MANAGER, Label
from finetune_operator.kube import GoneError, Kube, KubeError
from finetune_operator.metrics import Jobs
from finetune_operator.queue import Key

WATCH_SECONDS = 240
PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
SELECTOR = f"{Label.MANAGED_BY}={MANAGER}"
ERRORS = (KubeError, aiohttp.ClientError, TimeoutError, OSError, ValueError)

log = logging.getLogger(__name__)

Beat = Callable[[], None]
"""Says that a loop is alive."""


def key_of_child(body: JSON) -> Key | None:
    """The FineTuneJob that a child belongs to."""
    metadata = body["metadata"]
    name = (metadata.get("labels") or {}).get(Label.JOB_NAME)
    return Key(metadata["namespace"], name) if name else None


def key_of_job(body: Mapping[str, Any]) -> Key:
    """The key of a FineTuneJob."""
    return Key(body["metadata"]["namespace"], body["metadata"]["name"])


@dataclass(frozen=True)
class ChildWatch:
    """The children of one kind, in all namespaces or one."""

    kube: Kube
    kind: str
    namespace: str | None
    on_key: Callable[[Key], None]
    beat: Beat

    async def run(self) -> None:
        """Never returns."""
        version = ""
        pause = PAUSE_SECONDS
        while True:
            self.beat()
            try:
                version = version or await self._list()
                version = await self._follow(version)
                pause = PAUSE_SECONDS
            except GoneError:
                version = ""
            except ERRORS as error:
                log.warning("The watch of %ss broke, again in about %.0f s: %s", self.kind, pause, error or type(error))
                await asyncio.sleep(pause * (0.5 + random.random()))  # noqa: S311 - jitter
                pause = min(pause * 2, LONGEST_PAUSE_SECONDS)

    async def _list(self) -> str:
        """Hear of all children there are; the version from which to watch on."""
        version = ""
        async for page in self.kube.pages(self.kind, self.namespace, labelSelector=SELECTOR):
            self.beat()
            version = version or page["metadata"]["resourceVersion"]
            for body in page.get("items") or ():
                self._hear(body)
        return version

    async def _follow(self, version: str) -> str:
        """Hear of changes until the server ends the watch; the version to go on from."""
        query = {"labelSelector": SELECTOR, "resourceVersion": version}
        async for event in self.kube.watch(self.kind, self.namespace, timeoutSeconds=WATCH_SECONDS, **query):
            self.beat()
            version = event["object"]["metadata"]["resourceVersion"]
            if event["type"] != "BOOKMARK":
                self._hear(event["object"])
        return version

    def _hear(self, body: JSON) -> None:
        if (key := key_of_child(body)) is not None:
            self.on_key(key)


@dataclass(frozen=True)
class Resync:
    """A look at all FineTuneJobs now and then, whatever was or was not heard."""

    kube: Kube
    namespace: str | None
    seconds: float
    on_key: Callable[[Key], None]
    jobs: Jobs
    beat: Beat

    async def run(self) -> None:
        """Never returns."""
        while True:
            self.beat()
            try:
                await self._look()
            except ERRORS as error:
                log.warning("FineTuneJobs cannot be listed, again in %.0f s: %s", self.seconds, error or type(error))
            await asyncio.sleep(self.seconds * (0.9 + 0.2 * random.random()))  # noqa: S311 - jitter

    async def _look(self) -> None:
        """Put those that have not ended into the queue; forget those of whose deletion no watch told."""
        known, listed = self.jobs.known(), set()
        async for page in self.kube.pages(KIND, self.namespace):
            for body in page.get("items") or ():
                listed.add(key_of_job(body))
                if not is_finished(body):
                    self.on_key(key_of_job(body))
        self.jobs.forget(known - listed)


def is_finished(body: JSON) -> bool:
    """Whether a FineTuneJob has ended, for good."""
    conditions = (body.get("status") or {}).get("conditions") or ()
    return any(c.get("type") == "Finished" and c.get("status") == "True" for c in conditions)
