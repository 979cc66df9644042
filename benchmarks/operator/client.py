"""A client that makes many objects quickly, and a watch that notes when each object is first heard of."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import tempfile
import time
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import aiohttp

from benchmarks.operator.ground import NAMESPACE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

JSON = dict[str, Any]
AT_ONCE = 32
LINE_LIMIT_BYTES = 2**20
ROOTS = {"finetunejobs": "/apis/finetune.dev/v1alpha1", "jobs": "/apis/batch/v1"}
METADATA_ONLY = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
MERGE, APPLY = "application/merge-patch+json", "application/apply-patch+yaml"


def path(plural: str, name: str = "") -> str:
    """Of a collection or an object in the benchmark's namespace."""
    return f"{ROOTS.get(plural, '/api/v1')}/namespaces/{NAMESPACE}/{plural}{'/' if name else ''}{name}"


class Client(AbstractAsyncContextManager["Client"]):
    """The administrator, on few connections that stay open."""

    def __init__(self, kubeconfig: Path) -> None:
        config = json.loads(kubeconfig.read_text())
        self._server: str = config["clusters"][0]["cluster"]["server"]
        self._tls = _tls(config)
        self._free = asyncio.Semaphore(AT_ONCE)

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(ssl=self._tls, limit=AT_ONCE + 8)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
        self._session = aiohttp.ClientSession(
            self._server, connector=connector, timeout=timeout, read_bufsize=LINE_LIMIT_BYTES
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def call(self, method: str, url: str, body: JSON | None = None, kind: str = "application/json") -> JSON:
        """One call; `RuntimeError` where it is refused."""
        data = None if body is None else json.dumps(body).encode()
        async with self._free, self._session.request(method, url, data=data, headers={"Content-Type": kind}) as answer:
            content = await answer.read()
            if answer.status >= 400:  # noqa: PLR2004 - refused
                raise RuntimeError(f"{method} {url}: {answer.status} {content[:300]!r}")
        parsed: JSON = json.loads(content)
        return parsed

    async def create(self, plural: str, body: JSON) -> JSON:
        """Make an object."""
        return await self.call("POST", path(plural), body)

    async def patch_status(self, plural: str, name: str, body: JSON, kind: str = MERGE, query: str = "") -> JSON:
        """Write an object's status."""
        return await self.call("PATCH", f"{path(plural, name)}/status{query}", body, kind)

    async def lines(self, url: str, accept: str) -> Any:  # noqa: ANN401 - an async iterator of bytes
        """The raw lines of a watch."""
        async with self._session.get(url, headers={"Accept": accept}) as answer:
            async for line in answer.content:
                yield line


async def many(calls: Iterable[Callable[[], Awaitable[Any]]]) -> None:
    """All calls, some at once; the first error ends them."""
    waiting = list(reversed(list(calls)))

    async def work() -> None:
        while waiting:
            await waiting.pop()()

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(work())


class Sightings(AbstractAsyncContextManager["Sightings"]):
    """When each object of a kind was first seen in the state that is asked for, as time.time()."""

    def __init__(self, client: Client, plural: str, wanted: Callable[[JSON], bool] | None = None) -> None:
        self._client = client
        self._plural = plural
        self._wanted = wanted
        self.seen: dict[str, float] = {}
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        listed = await self._client.call("GET", f"{path(self._plural)}?limit=1")
        self._task = asyncio.create_task(self._follow(listed["metadata"]["resourceVersion"]))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self, version: str) -> None:
        accept = METADATA_ONLY if self._wanted is None else "application/json"
        while True:
            query = f"watch=true&allowWatchBookmarks=true&resourceVersion={version}"
            async for line in self._client.lines(f"{path(self._plural)}?{query}", accept):
                heard = time.time()
                event = json.loads(line)
                version = event["object"]["metadata"]["resourceVersion"]
                self._note(event, heard)

    def _note(self, event: JSON, heard: float) -> None:
        name, body = event["object"]["metadata"].get("name"), event["object"]
        if event["type"] in ("BOOKMARK", "DELETED") or name in self.seen:
            return
        if self._wanted is None or self._wanted(body):
            self.seen[name] = heard
            self._changed.set()

    async def wait(self, names: Iterable[str], limit_seconds: float, tell: Callable[[int], None]) -> bool:
        """Until all are seen; False at the limit. `tell` hears how many."""
        wanted, end = set(names), time.time() + limit_seconds
        while missing := len(wanted - self.seen.keys()):
            tell(len(wanted) - missing)
            self._changed.clear()
            try:
                async with asyncio.timeout(end - time.time()):
                    await self._changed.wait()
            except TimeoutError:
                return False
        return True


def _tls(config: JSON) -> ssl.SSLContext:
    cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    context = ssl.create_default_context(cadata=base64.b64decode(cluster["certificate-authority-data"]).decode())
    with tempfile.NamedTemporaryFile() as pair:
        pair.write(b"".join(base64.b64decode(user[f"client-{part}-data"]) for part in ("key", "certificate")))
        pair.flush()
        context.load_cert_chain(pair.name)
    return context
