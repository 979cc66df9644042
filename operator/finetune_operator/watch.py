"""List and watch children by label, endlessly: each change puts the key of its FineTuneJob into the queue.

Holds no objects, and asks only for their metadata. A lost watch is taken up again where it ended, after 410 from a new
list, after errors ever later.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune_operator.api import JSON, KIND, MANAGER, Label
from finetune_operator.kube import ERRORS, METADATA, METADATA_LIST, GoneError, Kube, what
from finetune_operator.metrics import Jobs
from finetune_operator.queue import AWAY_BACKOFF_SECONDS, Key

WATCH_SECONDS = 240
PAUSE_SECONDS = 1.0
SELECTOR = f"{Label.MANAGED_BY}={MANAGER}"
TTL = "ttlSecondsAfterFinished"

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


class Ended:
    """FineTuneJobs that have ended and are to stay: what is still heard of their children calls for no pass.

    By uid: a namesake is none of them. Whoever has a time to live is none either, it is looked at until it is gone.
    """

    def __init__(self) -> None:
        self._uids: dict[Key, str] = {}

    def see(self, body: Mapping[str, Any]) -> bool:
        """Take note of a FineTuneJob as it is now; whether it is one of them."""
        if ended := is_finished(body) and TTL not in ((body.get("spec") or {}).get("runPolicy") or {}):
            self._uids[key_of_job(body)] = body["metadata"]["uid"]
        else:
            self.forget([key_of_job(body)])
        return ended

    def forget(self, keys: Iterable[Key]) -> None:
        """These are gone."""
        for key in keys:
            self._uids.pop(key, None)

    def has_child(self, body: JSON) -> bool:
        """Whether one of them is the owner of this child."""
        key = key_of_child(body)
        return key is not None and self._uids.get(key) == body["metadata"]["labels"].get(Label.JOB_UID)


@dataclass
class ChildWatch:
    """The children of one kind, in all namespaces or one."""

    kube: Kube
    kind: str
    namespace: str | None
    on_key: Callable[[Key], None]
    ended: Ended
    beat: Beat
    version: str = ""
    """From where to watch on; none: from a list."""

    async def begin(self) -> None:
        """Watch from now on, without a word of what is there: who lists all FineTuneJobs after this misses nothing."""
        self.beat()
        page = await self.kube.list_page(
            self.kind, self.namespace, accept=METADATA_LIST, limit=1, labelSelector=SELECTOR
        )
        self.version = page["metadata"]["resourceVersion"]

    async def run(self) -> None:
        """Never returns."""
        pause = PAUSE_SECONDS
        while True:
            self.beat()
            begun = time.monotonic()
            try:
                self.version = self.version or await self._list()
                await self._follow()
                pause = PAUSE_SECONDS
            except GoneError:
                self.version = ""
            except ERRORS as error:
                log.warning("The watch of %ss broke, again in about %.0f s: %s", self.kind, pause, what(error))
                await asyncio.sleep(pause * (0.5 + random.random()))  # noqa: S311 - jitter
                pause = min(pause * 2, AWAY_BACKOFF_SECONDS)
                continue
            if time.monotonic() - begun < PAUSE_SECONDS:  # as by a proxy that answers and hangs up
                await asyncio.sleep(PAUSE_SECONDS * (0.5 + random.random()))  # noqa: S311 - jitter

    async def _list(self) -> str:
        """Hear of all children there are; the version from which to watch on."""
        version = ""
        async for page in self.kube.pages(self.kind, self.namespace, accept=METADATA_LIST, labelSelector=SELECTOR):
            self.beat()
            version = version or page["metadata"]["resourceVersion"]
            for body in page.get("items") or ():
                self._hear(body)
        return version

    async def _follow(self) -> None:
        """Hear of changes until the server ends the watch."""
        query = {"labelSelector": SELECTOR, "resourceVersion": self.version}
        events = self.kube.watch(self.kind, self.namespace, accept=METADATA, timeoutSeconds=WATCH_SECONDS, **query)
        async for event in events:
            self.beat()
            self.version = event["object"]["metadata"]["resourceVersion"]
            if event["type"] != "BOOKMARK":
                self._hear(event["object"])

    def _hear(self, body: JSON) -> None:
        if (key := key_of_child(body)) is not None and not self.ended.has_child(body):
            self.on_key(key)


@dataclass(frozen=True)
class Resync:
    """A look at all FineTuneJobs now and then, whatever was or was not heard."""

    kube: Kube
    namespace: str | None
    seconds: float
    on_key: Callable[[Key], None]
    jobs: Jobs
    ended: Ended
    beat: Beat

    async def run(self) -> None:
        """Never returns. The first look is kopf's, when it begins to watch."""
        while True:
            self.beat()
            await asyncio.sleep(self.seconds * (0.9 + 0.2 * random.random()))  # noqa: S311 - jitter
            try:
                await self._look()
            except ERRORS as error:
                log.warning("FineTuneJobs cannot be listed, again in %.0f s: %s", self.seconds, what(error))

    async def _look(self) -> None:
        """Put those that have not ended into the queue; forget those of whose deletion no watch told."""
        known, listed = self.jobs.known(), set()
        async for page in self.kube.pages(KIND, self.namespace):
            for body in page.get("items") or ():
                listed.add(key_of_job(body))
                if not is_finished(body):
                    self.on_key(key_of_job(body))
        self.jobs.forget(known - listed)
        self.ended.forget(known - listed)


def is_finished(body: Mapping[str, Any]) -> bool:
    """Whether a FineTuneJob has ended, for good."""
    conditions = (body.get("status") or {}).get("conditions") or ()
    return any(c.get("type") == "Finished" and c.get("status") == "True" for c in conditions)
