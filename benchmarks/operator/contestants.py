"""The operators that are measured, each as a process of its own with an identity of its own."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.operator.calls import OURS, PLAIN
from benchmarks.operator.ground import NAMESPACE
from cluster.errors import ClusterError
from cluster.processes import Component, free_ports, spawn, stop, tail

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Self

    from benchmarks.operator.ground import Ground

AS_IN_ITS_IMAGE = """
import runpy, sys
sys.modules["google.auth"] = None  # the trainer's trackers bring it; Kubernetes' client would load it where it is
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
"""A script that runs the module it is given, with its arguments."""

STOP_SECONDS = 30


@dataclass(frozen=True)
class Contestant:
    """How to start one."""

    title: str
    user: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    works: bool = True
    """Else the benchmark makes the Jobs itself, and no status is written: the least that the machine can do."""


FINETUNE = Contestant(
    title="ours",
    user=OURS,
    arguments=("finetune_operator",),
    environment={
        "FINETUNE_TRAINER_IMAGE": "registry.test/trainer:1",
        "FINETUNE_LOG_FORMAT": "text",
        "FINETUNE_LEASE": f"{NAMESPACE}/{OURS}",
    },
)
KOPF = Contestant(
    title="plain kopf",
    user=PLAIN,
    arguments=("kopf", "run", "--all-namespaces", "--standalone", "--module", "benchmarks.operator.plain"),
)
NOBODY = Contestant(title="no operator", user="no-operator", arguments=("benchmarks.operator.nobody",), works=False)


class Running:
    """A contestant at work, for the length of a `with`."""

    def __init__(self, contestant: Contestant, ground: Ground, replica: int = 0) -> None:
        self.contestant = contestant
        port = free_ports(1)[0]
        kubeconfig = str(ground.kubeconfig_of(contestant.user))
        environment = {
            **contestant.environment,
            "KUBECONFIG": kubeconfig,
            "FINETUNE_HEALTH_PORT": str(port),
            "PYTHONDONTWRITEBYTECODE": "",  # compiled once, as in an image
            "PYTHONPYCACHEPREFIX": str(ground.directory / "bytecode"),
        }
        command = (sys.executable, "-c", AS_IN_ITS_IMAGE, *contestant.arguments)
        log = ground.layout.log(f"{contestant.user}-{replica}")
        self._component = Component(contestant.user, command, log, environment=environment)

    def __enter__(self) -> Self:
        self._process: subprocess.Popen[bytes] = spawn(self._component)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stop(self._process, STOP_SECONDS)

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def must_run(self) -> None:
        """`ClusterError` with the end of its log if it has ended."""
        if self._process.poll() is not None:
            raise ClusterError(f"{self.contestant.title} has ended.{tail(Path(self._component.log))}")

    def kill(self) -> None:
        """SIGKILL: nothing is said, nothing is tidied."""
        self._process.kill()
        self._process.wait()
