"""The parent of a node's ranks: starts them, hands them signals, and says the node's last word.

Ranks are told who they are as torchrun tells it (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), so that
`torchrun -m finetune_trainer train ...` does as well. Torchrun's own agent (torch 2.13) kills ranks half a minute after
a SIGTERM, which is too soon for a checkpoint, and keeps torch in the memory of a process that only waits.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from finetune_trainer.config import NODE_RANK_VARIABLE, RENDEZVOUS_VARIABLE, Parallelism
from finetune_trainer.models.loading import usable_cores
from finetune_trainer.progress import ExitCode, LastWord, Reason, Stage
from finetune_trainer.runtime import distributed
from finetune_trainer.runtime.errors import InvalidConfig
from finetune_trainer.runtime.farewell import shortened
from finetune_trainer.runtime.wording import end_of_process
from finetune_trainer.training.start import BEGAN_VARIABLE, process_began

if TYPE_CHECKING:
    import threading
    from collections.abc import Sequence

    from finetune_trainer.config import JobConfig

log = logging.getLogger(__name__)

WORDS_VARIABLE = "FINETUNE_RANK_WORDS"
"""Folder where each rank leaves its last word for the parent."""
LOOK_EVERY_SECONDS = 0.2
LEAVE_SECONDS = 15.0
"""For the other ranks of a node to end after one failed: they hear of it within a second or two."""
FOLLOWING_REASONS = (Reason.INTERRUPTED, Reason.PEER_LOST)
"""What ranks end for because another one did; its own reason says more.

Fewer than the operator's `failures.LATE_REASONS`: the parent sees in which order its ranks end, so an Unknown or
RendezvousFailed that came first is believed here; of pods only the times that kubelets note are known.
"""


@dataclass(frozen=True)
class Node:
    """Where this node stands among those of the stage."""

    index: int
    count: int
    ranks: int
    """Processes of this node."""
    host: str
    port: int

    @property
    def world_size(self) -> int:
        """Processes of all nodes."""
        return self.count * self.ranks

    def environment(self, local_rank: int) -> dict[str, str]:
        """What one rank is told. Where they are not set, threads are shared out among the ranks of the node."""
        own = {
            "RANK": str(self.index * self.ranks + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.ranks),
            "MASTER_ADDR": self.host,
            "MASTER_PORT": str(self.port),
            BEGAN_VARIABLE: str(process_began()),
        }
        defaults = {"OMP_NUM_THREADS": str(max(1, usable_cores() // self.ranks))}
        if self.count == 1:
            defaults["GLOO_SOCKET_IFNAME"] = "lo"  # a workstation's own name may lead nowhere
        return defaults | dict(os.environ) | own


@dataclass(eq=False)
class Rank:
    """One process, and how it ended."""

    number: int
    process: subprocess.Popen[bytes]
    words: Path
    code: int | None = None

    def look(self) -> bool:
        """Whether it has ended by now."""
        self.code = self.process.poll()
        return self.code is not None

    @property
    def failed(self) -> bool:
        """Whether it ended, and not well."""
        return self.code not in (None, ExitCode.COMPLETED)

    def word(self, attempt: int) -> LastWord:
        """What it said, or what its end says where it said nothing."""
        try:
            return LastWord.model_validate_json(word_path(self.words, self.number).read_bytes())
        except (OSError, ValidationError):
            code = self.code or 0
            reason = {each.value: each.reason for each in ExitCode}.get(code, Reason.UNKNOWN)
            message = shortened(f"Rank {self.number} {end_of_process(code)}. The log says more.")
            return LastWord(stage=Stage.TRAIN, attempt=attempt, reason=reason, message=message)


def is_parent(config: JobConfig) -> bool:
    """Whether this process is to start ranks rather than to be one."""
    return config.world_size > 1 and "RANK" not in os.environ


def word_path(folder: Path, rank: int) -> Path:
    """Where a rank leaves its last word for the parent."""
    return folder / f"rank-{rank}.json"


def own_word_path() -> Path | None:
    """Where this rank is to leave its last word; None if nobody of ours started it."""
    folder = os.environ.get(WORDS_VARIABLE)
    return None if folder is None else word_path(Path(folder), distributed.rank())


def find_node(config: JobConfig) -> Node:
    """This node's place: told by the environment where there are several, alone otherwise. InvalidConfig."""
    parallelism = config.parallelism or Parallelism()
    if config.num_nodes == 1:
        return Node(0, 1, parallelism.ranks_per_node, "localhost", _free_port())
    host, _, port = os.environ.get(RENDEZVOUS_VARIABLE, "").rpartition(":")
    index = os.environ.get(NODE_RANK_VARIABLE, "")
    if not host or not port.isdigit() or not index.isdigit():
        msg = (
            f"parallelism.numNodes is {config.num_nodes}: on each node set {RENDEZVOUS_VARIABLE} to host:port of the "
            f"first one, and {NODE_RANK_VARIABLE} to the node's number from 0. Or set numNodes to 1."
        )
        raise InvalidConfig(msg)
    return Node(int(index), config.num_nodes, parallelism.ranks_per_node, host, int(port))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port: int = found.getsockname()[1]
        return port


def run(config: JobConfig, arguments: Sequence[str], attempt: int, stopping: threading.Event) -> LastWord:
    """Run the node's ranks of the train stage to their end; `arguments` is this process's own command line."""
    node = find_node(config)
    log.info("node %d of %d: starting %d of %d processes", node.index, node.count, node.ranks, node.world_size)
    with tempfile.TemporaryDirectory(prefix="finetune-ranks-") as folder:
        ranks = [_start(node, local_rank, arguments, Path(folder)) for local_rank in range(node.ranks)]
        try:
            ended = Overseer(ranks, stopping).wait()
            return _last_word(node, ended, attempt)
        finally:
            for rank in ranks:
                rank.process.kill()
                rank.process.wait()


def _start(node: Node, local_rank: int, arguments: Sequence[str], words: Path) -> Rank:
    environment = node.environment(local_rank) | {WORDS_VARIABLE: str(words)}
    command = [sys.executable, "-m", "finetune_trainer", *arguments]
    process = subprocess.Popen(command, env=environment, start_new_session=True)  # noqa: S603 - ourselves
    return Rank(int(environment["RANK"]), process, words)


@dataclass
class Overseer:
    """Waits for all ranks; hands on the wish to stop; ends those that a failed one leaves behind."""

    ranks: list[Rank]
    stopping: threading.Event
    asked: bool = False
    deadline: float | None = None
    ended: list[Rank] = field(default_factory=list)

    def wait(self) -> list[Rank]:
        """All of them, in the order of their ends."""
        while len(self.ended) < len(self.ranks):
            self._hand_on()
            self._look()
            if self.deadline is not None and time.monotonic() > self.deadline:
                self._end()
            time.sleep(LOOK_EVERY_SECONDS)
        return self.ended

    @property
    def _running(self) -> list[Rank]:
        return [rank for rank in self.ranks if rank not in self.ended]

    def _hand_on(self) -> None:
        if self.stopping.is_set() and not self.asked:
            self.asked = True
            for rank in self._running:
                rank.process.send_signal(signal.SIGTERM)

    def _look(self) -> None:
        for rank in self._running:
            if not rank.look():
                continue
            self.ended.append(rank)
            if rank.failed and rank.code != ExitCode.INTERRUPTED and self.deadline is None:
                log.warning("rank %d ended with %s: ending the others", rank.number, rank.code)
                self.deadline = time.monotonic() + LEAVE_SECONDS

    def _end(self) -> None:
        for rank in self._running:
            log.warning("rank %d does not end by itself: killing it", rank.number)
            rank.process.kill()


def _last_word(node: Node, ranks: Sequence[Rank], attempt: int) -> LastWord:
    """Rank 0's word where all went well; else that of the first that failed, and for a reason of its own."""
    words = [rank.word(attempt) for rank in ranks if rank.failed]
    if words:
        return min(words, key=_distance_from_cause)
    if node.index == 0:
        return next(rank for rank in ranks if rank.number == 0).word(attempt)
    message = f"Node {node.index} of {node.count} did its part; the result is told by node 0."
    return LastWord(stage=Stage.TRAIN, attempt=attempt, reason=Reason.COMPLETED, message=message)


def _distance_from_cause(word: LastWord) -> int:
    return FOLLOWING_REASONS.index(word.reason) + 1 if word.reason in FOLLOWING_REASONS else 0
