"""PID 1 of the cluster's namespaces: mounts, starts, reaps and reports; it restarts nothing by itself.

When it ends, the kernel ends every process of the cluster and drops its mounts and its network.
Started as ``python3 -m cluster.supervisor STATE`` by cluster/namespace.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import mounts
from cluster.paths import State
from cluster.processes import Component

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEALTH_SECONDS = 2.0
ANSWER_SECONDS = 5.0
SOCKET = "supervisor.sock"


@dataclass
class Child:
    """A component that was started, and how it ended if it did."""

    component: Component
    pid: int
    started: float
    ended: str = ""


class Supervisor:
    """Answers one request at a time; every request is one line of JSON on its own connection."""

    def __init__(self, state: State) -> None:
        """Nothing runs yet."""
        self.state = state
        self.children: dict[str, Child] = {}
        self.verbs: dict[str, Callable[..., dict[str, Any]]] = {
            "start": self.start,
            "signal": self.signal,
            "list": self.report,
            "quit": self.quit,
        }

    def serve(self) -> None:
        """Listen until told to quit."""
        wakeup, written_by_kernel = _wakeup_on_child()
        with wakeup, written_by_kernel, _listening(self.state) as server, selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
            selector.register(wakeup, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is server:
                        self._answer(server.accept()[0])
                    else:
                        wakeup.recv(4096)
                        self._reap()

    def start(self, component: dict[str, Any]) -> dict[str, Any]:
        """Start a component; its output goes to its log."""
        wanted = Component(**component | {"command": tuple(component["command"])})
        Path(wanted.log).parent.mkdir(parents=True, exist_ok=True)
        append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        output = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, wanted.log, append, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        environment = os.environ | dict(wanted.environment)
        pid = os.posix_spawn(
            wanted.command[0], wanted.command, environment, file_actions=output, setsid=True, setsigmask=[]
        )
        self.children[wanted.name] = Child(wanted, pid, time.time())
        return {"pid": pid}

    def signal(self, name: str, number: int) -> dict[str, Any]:
        """Send a signal to a component that still runs."""
        child = self.children.get(name)
        if child and not child.ended:
            os.kill(child.pid, number)
        return {}

    def report(self, *, health: bool = False) -> dict[str, Any]:
        """Report every component that was ever started, asking for its health where wanted."""
        self._reap()
        return {name: _report(child, health=health) for name, child in self.children.items()}

    def quit(self) -> dict[str, Any]:
        """End; the kernel clears away the rest."""
        raise SystemExit(0)

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(ANSWER_SECONDS)
        with connection, contextlib.suppress(OSError), connection.makefile("rw") as stream:
            try:
                request = json.loads(stream.readline() or "{}")
                verb = self.verbs[request.pop("do", "list")]
                answer = verb(**request)
            except Exception as error:  # noqa: BLE001  a bad request must not end PID 1, and everything with it
                answer = {"error": f"{type(error).__name__}: {error}"}
            stream.write(json.dumps(answer) + "\n")

    def _reap(self) -> None:
        """Collect ended processes: components, and orphans that fell to PID 1."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for child in self.children.values():
                if child.pid == pid:
                    child.ended = _how_it_ended(status)


def _report(child: Child, *, health: bool) -> dict[str, Any]:
    report = {
        "pid": child.pid,
        "command": child.component.command,
        "environment": child.component.environment,
        "log": child.component.log,
        "started": child.started,
        "ended": child.ended,
    }
    if health and not child.ended:
        report["health"] = _ask(child.component.health)
    return report


def _how_it_ended(status: int) -> str:
    when = time.strftime("%H:%M:%S")
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name} at {when}"
    return f"exited with code {os.WEXITSTATUS(status)} at {when}"


def _ask(address: str) -> str:
    """Ask a health address; components serve them with certificates of their own making, on loopback only."""
    if not address:
        return "running"
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with urllib.request.urlopen(address, timeout=HEALTH_SECONDS, context=context):  # noqa: S310  a component's own
            return "healthy"
    except urllib.error.HTTPError as error:
        return f"unhealthy: HTTP {error.code}"
    except OSError as error:
        return f"unhealthy: {error}"


def _wakeup_on_child() -> tuple[socket.socket, socket.socket]:
    """Return a socket that becomes readable whenever a child ends, and its other end, to be kept open."""
    ours, kernels = socket.socketpair()
    kernels.setblocking(False)
    signal.set_wakeup_fd(kernels.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    return ours, kernels


@contextlib.contextmanager
def _listening(state: State) -> Iterator[socket.socket]:
    """Listen on the state folder's socket through the folder's descriptor: its path may be longer than 107 bytes."""
    folder = os.open(state.root, os.O_PATH)
    path = Path(f"/proc/self/fd/{folder}/{SOCKET}")
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        path.chmod(0o600)
        server.listen()
        yield server


def main() -> None:
    """Prepare the namespaces, then serve."""
    state = State(Path(sys.argv[1]))
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
    mounts.prepare(state)
    Supervisor(state).serve()


if __name__ == "__main__":
    main()
