"""List and watch children by label, endlessly: each change puts the key of its FineTuneJob into the queue.

Holds no objects. A lost watch is taken up again where it ended, after 410 from a new list, after errors ever later.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp

from finetune_operator.api import JSON, KIND, MANAGER, Label
from finetune_operator.kube import GoneError, Kube, KubeError
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


def key_of_job(body: JSON) -> Key:
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


async def resync(kube: Kube, namespace: str | None, seconds: float, on_key: Callable[[Key], None], beat: Beat) -> None:
    """Put every FineTuneJob into the queue now and then, whatever was or was not heard. Never returns."""
    while True:
        beat()
        try:
            async for page in kube.pages(KIND, namespace):
                for body in page.get("items") or ():
                    if not is_finished(body):
                        on_key(key_of_job(body))
        except ERRORS as error:
            log.warning("Listing all FineTuneJobs failed, trying again in %.0f s: %s", seconds, error or type(error))
        await asyncio.sleep(seconds * (0.9 + 0.2 * random.random()))  # noqa: S311 - jitter


def is_finished(body: JSON) -> bool:
    """Whether a FineTuneJob has ended, for good."""
    conditions = (body.get("status") or {}).get("conditions") or ()
    return any(c.get("type") == "Finished" and c.get("status") == "True" for c in conditions)
