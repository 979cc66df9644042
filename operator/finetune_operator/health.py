"""/healthz: all loops are alive. /readyz: FineTuneJobs are watched, or this is a standby. Silence is no illness.

On the same port: /metrics.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

from aiohttp import web

from finetune_operator.metrics import Metrics

KOPF_WATCHER = "watcher for finetunejobs"


class Health:
    """Heartbeats of the operator's loops."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._beats: dict[str, tuple[float, float]] = {}
        self.ready = False
        self._watching = False

    def stand_by(self) -> None:
        """Another operator works, this one would at once: else `helm --wait` would wait for the standby for ever."""
        self.ready = True

    def begin(self) -> None:
        """The work begins or ends: nothing is watched."""
        self.ready = self._watching = False

    def watch(self) -> None:
        """FineTuneJobs are watched, from now until `begin`."""
        self.ready = self._watching = True

    def expect(self, name: str, at_least_every_seconds: float) -> Callable[[], None]:
        """Register a loop; it is to call the result so often."""
        beat = partial(self._beat, name, at_least_every_seconds)
        beat()
        return beat

    def _beat(self, name: str, seconds: float) -> None:
        self._beats[name] = (self._clock(), seconds)

    def ailing(self) -> list[str]:
        """What is wrong, one line each; empty if all is well."""
        now = self._clock()
        late = [
            f"{name} has given no sign for {now - last:.0f} s"
            for name, (last, limit) in self._beats.items()
            if now - last > limit
        ]
        lost = self._watching and not self.kopf_watches()
        return [*late, "kopf's watcher of FineTuneJobs is gone"] if lost else late

    def forget(self, name: str) -> None:
        """The loop has done what it was for."""
        self._beats.pop(name, None)

    def kopf_watches(self) -> bool:
        """Kopf can outlive its own watcher (with its default backoffs it does after 54 s)."""
        return any(KOPF_WATCHER in task.get_name() for task in asyncio.all_tasks())


async def serve(health: Health, metrics: Metrics, port: int) -> web.AppRunner:
    """Serve the three paths on all addresses; port 0 takes any."""

    async def healthz(_: web.Request) -> web.Response:
        ailing = health.ailing()
        return web.Response(text="\n".join(ailing) or "ok", status=503 if ailing else 200)

    async def readyz(_: web.Request) -> web.Response:
        return web.Response(text="ok" if health.ready else "starting", status=200 if health.ready else 503)

    async def scrape(request: web.Request) -> web.Response:
        body, content_type = metrics.render(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", scrape)])
    runner = web.AppRunner(app, handle_signals=False, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, port=port).start()
    return runner
