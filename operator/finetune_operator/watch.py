"""List and watch children by label, endlessly: each change puts the key of its FineTuneJob into the queue.

Holds no objects. A lost watch is taken up again where it ended, after 410 from a new list, after errors ever later.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

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


async def watch_children(
    kube: Kube, kind: str, namespace: str | None, on_key: Callable[[Key], None], beat: Beat
) -> None:
    """Never returns."""
    version = ""
    pause = PAUSE_SECONDS
    while True:
        beat()
        try:
            version = version or await _list(kube, kind, namespace, on_key, beat)
            version = await _follow(kube, kind, namespace, version, on_key, beat)
            pause = PAUSE_SECONDS
        except GoneError:
            version = ""
        except ERRORS as error:
            log.warning("The watch of %ss broke, trying again in about %.0f s: %s", kind, pause, error or type(error))
            await asyncio.sleep(pause * (0.5 + random.random()))  # noqa: S311 - jitter
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)


async def _list(kube: Kube, kind: str, namespace: str | None, on_key: Callable[[Key], None], beat: Beat) -> str:
    """All children there are; the version from which to watch on."""
    version = ""
    async for page in kube.pages(kind, namespace, labelSelector=SELECTOR):
        beat()
        version = version or page["metadata"]["resourceVersion"]
        for body in page.get("items") or ():
            if (key := key_of_child(body)) is not None:
                on_key(key)
    return version


async def _follow(
    kube: Kube, kind: str, namespace: str | None, version: str, on_key: Callable[[Key], None], beat: Beat
) -> str:
    """Hear until the server ends the watch; the version to go on from."""
    query: dict[str, str | int] = {
        "labelSelector": SELECTOR,
        "resourceVersion": version,
        "timeoutSeconds": WATCH_SECONDS,
    }
    async for event in kube.watch(kind, namespace, **query):
        beat()
        version = event["object"]["metadata"]["resourceVersion"]
        if event["type"] != "BOOKMARK" and (key := key_of_child(event["object"])) is not None:
            on_key(key)
    return version


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
