"""A proxy between operator and API server: it sees every call, and does to it what a network or a server may do.

    with Proxy(kubeconfig) as proxy:
        proxy.rule = Rule()                   # what happens to calls from now on
        operator = Operator(proxy.write_kubeconfig(file), ...)

Speaks plain HTTP to the operator and TLS to the API server; the operator's token passes through it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import ssl
import threading
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import aiohttp
from aiohttp import web
from yarl import URL

from cluster.processes import free_ports
from tests.apiserver.api import JSON

T = TypeVar("T")
HOST = "127.0.0.1"
PATH = re.compile(
    r"/(?:api/v1|apis/[^/]+/[^/]+)(?:/namespaces/(?P<namespace>[^/]+))?/(?P<plural>[^/]+)"
    r"(?:/(?P<name>[^/]+))?(?:/(?P<part>[^/]+))?"
)
PASSED_ON = ("Authorization", "Accept", "Content-Type", "User-Agent")
HEALED_SECONDS = 30


class CutError(Exception):
    """The connection is to break before the operator hears an answer."""


@dataclass(frozen=True)
class Call:
    """One call of the operator."""

    method: str
    path: str
    query: Mapping[str, str]
    body: bytes

    @property
    def writes(self) -> bool:
        return self.method != "GET"

    @property
    def watches(self) -> bool:
        return "watch" in self.query

    @property
    def namespace(self) -> str:
        return self._of_url("namespace")

    @property
    def plural(self) -> str:
        return self._of_url("plural")

    @property
    def part(self) -> str:
        return self._of_url("part")

    @property
    def name(self) -> str:
        """Of what is written: in the address, or for something new in the body."""
        metadata: JSON = json.loads(self.body).get("metadata", {}) if self.method == "POST" else {}
        return self._of_url("name") or metadata.get("name", "")

    def _of_url(self, group: str) -> str:
        found = PATH.fullmatch(self.path)
        return (found[group] or "") if found else ""


@dataclass(frozen=True)
class Answer:
    """What the operator hears."""

    status: int
    body: bytes

    @classmethod
    def refusal(cls, status: int, message: str = "simulated") -> Answer:
        """As the API server says no."""
        said = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": status}
        return cls(status, json.dumps(said).encode())


class Rule:
    """What happens to calls: nothing, unless a test says otherwise."""

    async def before(self, call: Call) -> Answer | None:
        """Before the API server hears of it: an answer in its place, or `CutError`."""

    async def after(self, call: Call, answer: Answer) -> None:
        """After it was done, before the operator hears of it: `CutError`, perhaps. Not for watches."""


@dataclass(frozen=True)
class Done:
    """A call that reached the API server, and what became of it."""

    call: Call
    status: int


@dataclass(eq=False)
class Stream:
    """One open watch."""

    call: Call
    flowing: asyncio.Event = field(default_factory=asyncio.Event)


class Proxy:
    """In a thread of its own; its attributes may be set from any."""

    def __init__(self, kubeconfig: Path) -> None:
        self.port = free_ports(1)[0]
        self.rule = Rule()
        self.writes: list[Done] = []
        """All writes that the API server answered, in their order, whether or not the operator heard."""
        self.gone: list[Call] = []
        """Watches that were told 410: what they were to go on from is forgotten."""
        self._config: JSON = json.loads(kubeconfig.read_text())
        self._streams: set[Stream] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def write_kubeconfig(self, file: Path) -> Path:
        """The kubeconfig that leads through here."""
        config = json.loads(json.dumps(self._config))
        config["clusters"][0]["cluster"] = {"server": f"http://{HOST}:{self.port}"}
        file.write_text(json.dumps(config))
        return file

    def __enter__(self) -> Self:
        self._thread.start()
        self._await(self._connect())
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._await(self._session.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def open(self) -> None:
        """Take connections."""
        self._await(self._listen())

    def close(self) -> None:
        """Break all connections and refuse new ones, as where the API server is gone."""
        self._await(self._runner.cleanup())

    def freeze(self, plural: str) -> int:
        """Let the open watches of one kind tell no more, without an end; how many there are."""

        async def stop() -> int:
            found = [stream for stream in self._streams if stream.call.plural == plural]
            for stream in found:
                stream.flowing.clear()
            return len(found)

        return self._await(stop())

    def watched(self, plural: str) -> int:
        """How many watches of a kind are open and told what happens."""
        return sum(stream.call.plural == plural and stream.flowing.is_set() for stream in tuple(self._streams))

    def _await(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(HEALED_SECONDS)

    async def _connect(self) -> None:
        cluster = self._config["clusters"][0]["cluster"]
        self._server = cluster["server"]
        authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        connector = aiohttp.TCPConnector(ssl=ssl.create_default_context(cadata=authority), limit=0)
        unlimited = aiohttp.ClientTimeout(total=None)
        self._session = aiohttp.ClientSession(connector=connector, timeout=unlimited, read_bufsize=2**20)

    async def _listen(self) -> None:
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(
            app, handle_signals=False, access_log=None, shutdown_timeout=0.1, handler_cancellation=True
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, HOST, self.port).start()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        call = Call(request.method, request.path, dict(request.query), await request.read())
        try:
            answer = await self.rule.before(call)
            if answer is None and call.watches:
                return await self._stream(request, call)
            if answer is None:
                answer = await asyncio.shield(self._forward(request, call))  # also if whoever asked is gone
        except (CutError, aiohttp.ClientError):
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=502)
        return web.Response(status=answer.status, body=answer.body, content_type="application/json")

    async def _forward(self, request: web.Request, call: Call) -> Answer:
        async with self._send(request, call) as response:
            answer = Answer(response.status, await response.read())
        if call.writes:
            self.writes.append(Done(call, answer.status))
        await self.rule.after(call, answer)
        return answer

    async def _stream(self, request: web.Request, call: Call) -> web.StreamResponse:
        stream = Stream(call)
        stream.flowing.set()
        told = web.StreamResponse(headers={"Content-Type": "application/json"})
        async with self._send(request, call) as response:
            told.set_status(response.status)
            await told.prepare(request)
            self._streams.add(stream)
            try:
                async for line in response.content:
                    await stream.flowing.wait()
                    if b'"code":410' in line:
                        self.gone.append(call)
                    await told.write(line)
            finally:
                self._streams.discard(stream)
        return told

    def _send(self, request: web.Request, call: Call) -> Any:
        headers = {name: request.headers[name] for name in PASSED_ON if name in request.headers}
        url = URL(f"{self._server}{request.raw_path}", encoded=True)
        return self._session.request(call.method, url, headers=headers, data=call.body or None)
