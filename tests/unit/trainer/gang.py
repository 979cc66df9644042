"""Real processes that share a training on this machine (gloo, loopback). Starting takes long: kept for many calls."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
PATIENCE_SECONDS = 300
"""For processes that all import torch first, on a busy machine of few cores."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port: int = found.getsockname()[1]
        return port


def environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "trainer"), os.environ.get("PYTHONPATH")])),
    }


@dataclass
class Gang:
    """So many ranks that wait for something to do."""

    world_size: int
    folder: Path
    ranks: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self) -> Gang:
        port = free_port()
        for rank in range(self.world_size):
            command = [sys.executable, "-m", "tests.unit.trainer.gang", str(self.folder)]
            self.ranks.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment(rank, self.world_size, port),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        return self

    def call(self, function: str, **arguments: Any) -> list[Any]:
        """Call `module:function` on all ranks; what each returned, or the exception that it raised."""
        import torch  # noqa: PLC0415 - slow

        for process in self.ranks:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"function": function, "arguments": arguments}) + "\n")
            process.stdin.flush()
        return [torch.load(self._answer(process), weights_only=False) for process in self.ranks]

    def _answer(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], PATIENCE_SECONDS)
        line = process.stdout.readline() if ready else ""
        if not line:
            self._give_up()
            raise AssertionError(f"no answer within {PATIENCE_SECONDS} s; exit code {process.poll()}")
        return line.strip()

    def _give_up(self) -> None:
        """Show where each rank is, and end them: what they would answer now is nobody's question any more."""
        for process in self.ranks:
            process.send_signal(signal.SIGUSR1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1)
            process.kill()

    def stop(self) -> None:
        for process in self.ranks:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.ranks:
            try:
                process.wait(timeout=PATIENCE_SECONDS)
            finally:
                process.kill()
                process.wait()
                assert process.stdout is not None
                process.stdout.close()


def serve(folder: Path) -> None:
    """Be one of the ranks: a call a line on stdin, a file's name a line on stdout."""
    from finetune_trainer.models.loading import set_up_torch  # noqa: PLC0415
    from finetune_trainer.runtime import distributed  # noqa: PLC0415 - after the environment is set

    answers, number = os.fdopen(os.dup(1), "w"), 0
    os.dup2(2, 1)  # whatever else is printed
    faulthandler.register(signal.SIGUSR1)
    set_up_torch()
    import torch  # noqa: PLC0415

    with distributed.joined("cpu", 1, threading.Event(), lambda error: os._exit(99 if error else 98)):
        for line in sys.stdin:
            number += 1
            path = folder / f"answer-{distributed.rank()}-{number}"
            torch.save(_called(json.loads(line)), path)
            print(path, file=answers, flush=True)


def _called(call: dict[str, Any]) -> Any:
    from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: PLC0415 - slow

    module, _, name = call["function"].partition(":")
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    try:
        return getattr(importlib.import_module(module), name)(**call["arguments"])
    except Exception as error:  # noqa: BLE001 - the test decides
        import traceback  # noqa: PLC0415

        traceback.print_exc()
        return error


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
