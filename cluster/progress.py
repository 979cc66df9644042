"""Says how far long work has come: a bar that redraws on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator

BAR_WIDTH = 24
REDRAW_SECONDS = 0.5
LOG_LINE_SECONDS = 30.0


def say(message: str) -> None:
    """Print one line of progress. Standard output stays free for results."""
    print(message, file=sys.stderr, flush=True)


class Progress:
    """Steps of one piece of work, of which ``total`` are expected."""

    def __init__(self, title: str, total: int, stream: TextIO | None = None) -> None:
        """Name the work; nothing is printed before its first step."""
        self.title = title
        self.total = total
        self.done = 0
        self.stream = stream or sys.stderr
        self._started = time.monotonic()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Show the step while it runs, and the seconds that it took afterwards."""
        started = time.monotonic()
        finished = threading.Event()
        ticker = threading.Thread(target=self._tick, args=(name, started, finished), daemon=True)
        ticker.start()
        try:
            yield
        finally:
            finished.set()
            ticker.join()
        self.done += 1
        self._line(f"{self._head()} {name} ({time.monotonic() - started:.1f} s)")

    def _tick(self, name: str, started: float, finished: threading.Event) -> None:
        terminal = self.stream.isatty()
        while not finished.wait(REDRAW_SECONDS if terminal else LOG_LINE_SECONDS):
            seconds = time.monotonic() - started
            if terminal:
                self.stream.write(f"\r\033[K{self._bar()} {self.title}: {name}, {seconds:.0f} s")
                self.stream.flush()
            else:
                self._line(f"{self._head(running=True)} {name}, still going after {seconds:.0f} s")

    def _bar(self) -> str:
        filled = BAR_WIDTH * self.done // max(self.total, 1)
        return f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}]{self._count(self.done)}{self._time_left()}"

    def _time_left(self) -> str:
        if not self.done:
            return ""
        left = (time.monotonic() - self._started) / self.done * (self.total - self.done)
        return f", about {left:.0f} s left"

    def _head(self, *, running: bool = False) -> str:
        return f"{self.title}{self._count(self.done + running)}:"

    def _count(self, done: int) -> str:
        """How many of how many; of a single step that says nothing."""
        return f" {done}/{self.total}" if self.total > 1 else ""

    def _line(self, text: str) -> None:
        self.stream.write(("\r\033[K" if self.stream.isatty() else "") + text + "\n")
        self.stream.flush()
