"""What a component is, and how one is started and stopped outside of the cluster's namespaces."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

TAIL_LINES = 12
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Component:
    """One long-running process: its command, its log and the address that tells whether it is well."""

    name: str
    command: tuple[str, ...]
    log: str
    health: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return what JSON can carry to the supervisor."""
        return asdict(self)


def wait_until(condition: Callable[[], bool], what: str, seconds: float, log: Path | None = None) -> None:
    """Poll until the condition holds; the error at the deadline ends with the last lines of the log."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"{what} did not come about within {seconds:.0f} s.{tail(log)}")
        time.sleep(POLL_SECONDS)


def tail(log: Path | None) -> str:
    """Return the end of a log as the end of an error message."""
    if log is None or not log.exists():
        return ""
    lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    return f" Its log {log} ends with:\n" + "\n".join(lines)


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback address that nothing listens on at this moment."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def spawn(component: Component) -> subprocess.Popen[bytes]:
    """Start the component as a child that dies with this process, even where this process is killed."""
    log = Path(component.log)
    log.parent.mkdir(parents=True, exist_ok=True)
    tied = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
    with log.open("ab") as output:
        return subprocess.Popen(
            [*tied, *component.command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ | dict(component.environment),
            start_new_session=True,
        )


def stop(process: subprocess.Popen[bytes], seconds: float = 5.0) -> None:
    """Ask the process to end, and kill it at the deadline."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def start_time(pid: int) -> str | None:
    """Return when the process started, in the kernel's ticks: with the PID it names one process for ever."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
