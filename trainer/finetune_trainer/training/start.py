"""How long an attempt took to its first step, part by part.

The parts are the activities that the report told one after another, so nothing is told twice and nothing left out.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from finetune_trainer.config import Model
from finetune_trainer.runtime.work import write_report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune_trainer.runtime.context import Context
    from finetune_trainer.runtime.report import Mark

log = logging.getLogger(__name__)

START_NAME = "start.json"
"""In `report/`."""
BEGAN_VARIABLE = "FINETUNE_BEGAN"
"""When the parent of the ranks began, in seconds of CLOCK_MONOTONIC: its time is theirs too."""
FIRST_STEP = "the first step"
START_TIME_FIELD = 19
"""Of /proc/PID/stat, counted from behind the name: proc(5) counts it as the 22nd."""


class StartPart(Model):
    """Something that was done before the first step."""

    activity: str = Field(description="As it was told while it was done.")
    seconds: float


class Start(Model):
    """From the start of the process to the end of the first step of an attempt."""

    attempt: int
    seconds: float
    parts: tuple[StartPart, ...] = Field(description="In their order; they add up to the seconds.")

    def tell(self) -> None:
        """Put it into the log."""
        told = ", ".join(f"{part.activity} {part.seconds:.1f}" for part in self.parts)
        log.info("the first step ended %.1f s after the start of the process: %s", self.seconds, told)


def reckon(attempt: int, began: float, marks: Sequence[Mark], ended: float) -> Start:
    """Parts of the time from `began` to `ended`, by the beginnings of activities. Pure.

    The first activity is under way since the process began; each lasts until the next, the last is the first step.
    What was gone about several times is one part. Seconds of one clock.
    """
    names = [*(mark.activity for mark in marks[:-1]), FIRST_STEP]
    limits = [began, *(mark.at for mark in marks[1:]), ended]
    seconds = dict.fromkeys(names, 0.0)
    for name, start, end in zip(names, limits, limits[1:], strict=False):
        seconds[name] += end - start
    parts = tuple(StartPart(activity=name, seconds=round(each, 2)) for name, each in seconds.items())
    return Start(attempt=attempt, seconds=round(ended - began, 2), parts=parts)


def process_began() -> float:
    """When this process, or the parent that started it as a rank, began, in seconds of `time.monotonic`.

    By the kernel's account, so that the interpreter's own start and its imports count.
    """
    if (told := os.environ.get(BEGAN_VARIABLE)) is not None:
        return float(told)
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    after_boot = int(fields[START_TIME_FIELD]) / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - after_boot)


def tell_start(context: Context) -> None:
    """Now that the first step has ended: tell what the start took, and leave it for the report."""
    found = reckon(context.attempt, process_began(), context.report.marks, time.monotonic())
    found.tell()
    try:
        with context.committing():
            write_report(context.work.report / START_NAME, found.to_json() + "\n")
    except OSError as error:
        log.warning("report/%s could not be written: %s", START_NAME, error)
