"""How far a stage is, for people and for the operator.

`Report` holds the one current `Progress`. Rank 0 serves it over HTTP: `/progress` (JSON), `/metrics` (Prometheus),
`/healthz`. On a terminal it is drawn as a bar; in a log it is a line at least every half minute of long work.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune_trainer.progress import Progress, Stage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from prometheus_client.core import GaugeMetricFamily
    from tqdm import tqdm

log = logging.getLogger(__name__)

LINE_EVERY_SECONDS = 30.0
ETA_AFTER_SECONDS = 2.0
GROWTH_EVERY_SECONDS = 5.0


class Mark(NamedTuple):
    """The beginning of an activity, in seconds of `time.monotonic`."""

    activity: str
    at: float


class Report:
    """The current Progress, safe to change from any thread."""

    def __init__(self, stage: Stage, attempt: int, *, bar: bool | None = None) -> None:
        """`bar`: draw on the terminal; by default where stderr is one."""
        self._lock = threading.RLock()
        self._progress = Progress(stage=stage, attempt=attempt, activity="starting")
        self._pulse = 0
        self._began = self._last_line = self._moved = time.monotonic()
        self._marks = [Mark(self._progress.activity, self._began)]
        self._bar: tqdm[Any] | None = None
        self._draws = sys.stderr.isatty() if bar is None else bar

    @property
    def current(self) -> Progress:
        """The Progress of this moment."""
        with self._lock:
            still = round(time.monotonic() - self._moved, 1)
            return self._progress.model_copy(update={"pulse": self._pulse, "still_seconds": still})

    @property
    def marks(self) -> tuple[Mark, ...]:
        """What was begun so far, in its order."""
        with self._lock:
            return tuple(self._marks)

    def begin(self, activity: str, total: int = 0, unit: str = "steps") -> None:
        """Start on something else: counts from zero, `total` 0 if unknown. What was measured stays."""
        with self._lock:
            self._close_bar()
            self._began = self._last_line = time.monotonic()
            self._marks.append(Mark(activity, self._began))
            self._change(activity=activity, done=0, total=total, unit=unit, eta_seconds=None)
            if not self._draws:
                log.info("%s%s", activity, f" ({total:,} {unit})" if total else "")

    def update(self, **changes: Any) -> None:  # noqa: ANN401 - fields of Progress
        """Change fields of the Progress, by their Python names. `eta_seconds` is worked out unless it is given."""
        with self._lock:
            before = self._progress.done
            self._change(**changes)
            if "done" in changes and "eta_seconds" not in changes:
                self._change(eta_seconds=self._eta(before))
            self._draw()

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        with self._lock:
            self.update(done=self._progress.done + count)

    def beat(self, *_: object) -> None:
        """Something was done that no figure tells of. Takes any arguments, to be a callback of many kinds."""
        with self._lock:
            self._move()

    @contextmanager
    def growing(self, folder: Path) -> Iterator[None]:
        """Beat whenever the files of a folder have grown: for libraries that write for minutes without a word."""
        stop = threading.Event()

        def look() -> None:
            size = 0
            while not stop.wait(GROWTH_EVERY_SECONDS):
                before, size = size, _bytes_in(folder)
                if size != before:
                    self.beat()

        watcher = threading.Thread(target=look, name="growth", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()

    def bytes_progress(self, done: int, total: int) -> None:
        """Take the progress of hashing or copying: a callback for `manifest.verify` and `manifest.publish`."""
        self.update(done=done, total=total, unit="bytes")

    def line_if_due(self) -> None:
        """A line for the log if half a minute went by without one."""
        with self._lock:
            now = time.monotonic()
            if self._draws or now - self._last_line < LINE_EVERY_SECONDS:
                return
            self._last_line = now
            log.info("%s", describe(self._progress, now - self._began))

    def close(self) -> None:
        """Take the bar off the terminal."""
        with self._lock:
            self._close_bar()

    def _change(self, **changes: Any) -> None:  # noqa: ANN401 - fields of Progress
        self._move()
        self._progress = Progress.model_validate({**self._progress.model_dump(), **changes})

    def _move(self) -> None:
        self._pulse += 1
        self._moved = time.monotonic()

    def _eta(self, done_before: int) -> float | None:
        """Seconds left, at the mean rate since the activity began; what was told before as long as no more is done.

        By that rate it would only grow meanwhile. `done_before`: when it was told.
        """
        elapsed, progress = time.monotonic() - self._began, self._progress
        if progress.done == done_before:
            return progress.eta_seconds
        if elapsed < ETA_AFTER_SECONDS or not 0 < progress.done <= progress.total:
            return None
        return round(elapsed / progress.done * (progress.total - progress.done), 1)

    def _draw(self) -> None:
        if not self._draws:
            self.line_if_due()
            return
        progress = self._progress
        if self._bar is None:
            from tqdm import tqdm  # noqa: PLC0415 - only on a terminal

            self._bar = tqdm(
                disable=False,
                desc=progress.activity,
                unit=" " + progress.unit,
                unit_scale=True,
                dynamic_ncols=True,
                leave=True,
            )
        self._bar.total = progress.total or None
        if progress.loss is not None:
            self._bar.set_postfix(loss=f"{progress.loss:.4f}", refresh=False)
        self._bar.update(progress.done - self._bar.n)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _bytes_in(folder: Path) -> int:
    """Of all files below a folder, some of which may vanish meanwhile."""
    found = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            found += path.stat().st_size
    return found


@contextmanager
def beating_with_bars(report: Report) -> Iterator[None]:
    """Beat with every step of what libraries would draw a bar for: tensors they load, layers they merge.

    Their bars are switched off, and iterated over all the same.
    """
    from tqdm import tqdm  # noqa: PLC0415 - lazy

    iterate = tqdm.__iter__

    def counted(bar: Any) -> Iterator[Any]:  # noqa: ANN401 - a tqdm
        for each in iterate(bar):
            report.beat()
            yield each

    tqdm.__iter__ = counted
    try:
        yield
    finally:
        tqdm.__iter__ = iterate


def describe(progress: Progress, elapsed_seconds: float) -> str:
    """A line for a log: what, how far, how long still."""
    parts = [progress.activity]
    if progress.total:
        parts.append(f"{progress.done:,}/{progress.total:,} {progress.unit} ({100 * progress.done // progress.total}%)")
    elif progress.done:
        parts.append(f"{progress.done:,} {progress.unit}")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    parts.append(f"{elapsed_seconds:.0f} s so far")
    if progress.eta_seconds is not None:
        parts.append(f"about {progress.eta_seconds:.0f} s left")
    return ", ".join(parts)


@contextmanager
def reporting(report: Report, port: int | None) -> Iterator[None]:
    """Keep the log alive and, with a port, serve the report while the body runs."""
    stop = threading.Event()
    ticker = threading.Thread(target=_tick, args=(report, stop), name="report", daemon=True)
    ticker.start()
    server = None if port is None else _start_server(report, port)
    try:
        yield
    finally:
        stop.set()
        if server is not None:
            server.shutdown()
            server.server_close()
        report.close()


def _tick(report: Report, stop: threading.Event) -> None:
    while not stop.wait(1.0):
        report.line_if_due()


def _start_server(report: Report, port: int) -> ThreadingHTTPServer:
    server = build_server(report, port)
    threading.Thread(target=server.serve_forever, args=(0.2,), name="progress", daemon=True).start()
    log.info("progress is served on port %d", server.server_address[1])
    return server


def build_server(report: Report, port: int) -> ThreadingHTTPServer:
    """`/progress`, `/metrics` and `/healthz` of a report; port 0 takes a free one."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the name http.server calls
            answers = {"/progress": _progress_answer, "/metrics": _metrics_answer, "/healthz": _healthz_answer}
            answer = answers.get(self.path.split("?", 1)[0])
            if answer is None:
                self.send_error(HTTPStatus.NOT_FOUND, "there is /progress, /metrics and /healthz")
                return
            content_type, body = answer(report)
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name http.server gives it
            """Say nothing: a pull every few seconds is no news."""

    server = ThreadingHTTPServer(("", port), Handler)
    server.daemon_threads = True
    return server


def _progress_answer(report: Report) -> tuple[str, bytes]:
    return "application/json", report.current.to_json().encode()


def _healthz_answer(_report: Report) -> tuple[str, bytes]:
    return "text/plain; charset=utf-8", b"ok\n"


def _metrics_answer(report: Report) -> tuple[str, bytes]:
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest  # noqa: PLC0415 - lazy

    registry = CollectorRegistry()
    registry.register(_Collector(report))
    return CONTENT_TYPE_LATEST, generate_latest(registry)


METRICS = {
    "done": "Work done, in the stage's own unit.",
    "total": "Work in all, in the stage's own unit.",
    "epoch": "Passes over the rows so far.",
    "loss": "Mean training loss since the last log line, in nats a token.",
    "eval_loss": "Held-out loss, in nats a token.",
    "best_eval_loss": "Lowest held-out loss so far, in nats a token.",
    "tokens_per_second": "Tokens trained on each second.",
    "eta_seconds": "Seconds left, as far as is known.",
    "peak_memory_bytes": "Most memory held so far, of the accelerator or, on CPU, of the process.",
    "checkpoint_step": "Step of the newest verified checkpoint.",
}


class _Collector:
    """The figures of a Progress as gauges `finetune_<name>`, labelled with the stage; absent figures are absent."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def collect(self) -> Iterable[GaugeMetricFamily]:
        from prometheus_client.core import GaugeMetricFamily  # noqa: PLC0415 - lazy

        progress = self._report.current
        for name, help_text in METRICS.items():
            if (value := getattr(progress, name)) is not None:
                family = GaugeMetricFamily(f"finetune_{name}", help_text, labels=["stage", "unit"])
                family.add_metric([progress.stage.value, progress.unit], float(value))
                yield family
