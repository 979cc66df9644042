"""CPU and memory of a process, from /proc."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
SAMPLE_SECONDS = 0.1
BUSY_TICKS = 2
"""Of CPU in a sample: less is a heartbeat."""


def cpu_seconds(pid: int) -> float:
    """CPU that the process has used, user and system."""
    return _ticks(pid) / TICKS_A_SECOND


def _ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


class Used:
    """CPU that some processes, by name, have used since."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = pids
        self._before = {name: cpu_seconds(pid) for name, pid in pids.items()}

    def seconds(self, name: str) -> float:
        """Of one of them."""
        return cpu_seconds(self._pids[name]) - self._before[name]

    def by_job(self, jobs: int) -> str:
        """Milliseconds of each, divided by a number of jobs."""
        return ", ".join(f"{name} {1000 * self.seconds(name) / jobs:.1f}" for name in self._pids)


def memory_mib(pid: int, kind: str = "VmRSS") -> float:
    """Resident memory now, or with VmHWM the most there was."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) / 1024


async def quiet(pid: int, calm_seconds: float, limit_seconds: float) -> float:
    """When the process was last at work, as time.time(), once it has been calm for so long."""
    end = time.time() + limit_seconds
    last, before = time.time(), _ticks(pid)
    while time.time() < min(end, last + calm_seconds):
        await asyncio.sleep(SAMPLE_SECONDS)
        now = _ticks(pid)
        if now - before >= BUSY_TICKS:
            last = time.time()
        before = now
    return last
