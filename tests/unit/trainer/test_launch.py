"""A node's parent process: several nodes end together, each with its own word, whatever becomes of their ranks.

Nodes are processes of this machine that meet over loopback.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from finetune_trainer.launch import Node, Rank, _last_word, word_path
from finetune_trainer.progress import ExitCode, LastWord, Progress, Reason, Stage
from tests.tiny import make_config
from tests.unit.trainer.conftest import Desk
from tests.unit.trainer.gang import PATIENCE_SECONDS, ROOT, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NODES = 2
FULL: dict[str, Any] = {"method": {"type": "Full"}, "parallelism": {"numNodes": NODES, "gpusPerNode": 0}}
QLORA: dict[str, Any] = {"parallelism": {"numNodes": NODES, "gpusPerNode": 0}}
TRAINING = {"globalBatchSize": 8, "perDeviceTrainBatchSize": 2, "learningRate": 0.01}


@dataclass
class Started:
    """One node's parent process."""

    index: int
    process: subprocess.Popen[str]
    word_file: Path

    def say(self) -> Iterator[str]:
        assert self.process.stderr is not None
        return iter(self.process.stderr.readline, "")

    def wait_for(self, words: str) -> None:
        assert any(words in line for line in self.say()), f"node {self.index} never said '{words}'"

    @property
    def rank(self) -> int:
        """The process of its one rank."""
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return int(found.split()[0])

    def end(self) -> tuple[int, LastWord]:
        self.process.communicate(timeout=PATIENCE_SECONDS)
        return self.process.returncode, LastWord.model_validate_json(self.word_file.read_bytes())


@dataclass
class Nodes:
    """The nodes of one train stage on a prepared work folder."""

    desk: Desk
    port: int
    started: list[Started]

    def start(self, index: int, *arguments: str, **environment: str) -> Started:
        word = self.desk.root / f"word-{index}"
        folders = ["--work", str(self.desk.work), "--sources", str(self.desk.sources)]
        options = ["--config", str(self.desk.root / "job.json"), *folders, "--termination-log", str(word), *arguments]
        own = {"FINETUNE_RENDEZVOUS": f"localhost:{self.port}", "JOB_COMPLETION_INDEX": str(index)}
        paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'trainer'}", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        process = subprocess.Popen(
            [sys.executable, "-m", "finetune_trainer", "train", *options],
            env={**os.environ, **paths, **own, **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(Started(index, process, word))
        return self.started[-1]

    def start_all(self) -> list[Started]:
        return [self.start(index) for index in range(NODES)]


@pytest.fixture
def nodes(desk: Desk) -> Iterator[Nodes]:
    nodes = Nodes(desk, free_port(), [])
    yield nodes
    for node in nodes.started:
        node.process.kill()
        node.process.wait()
        assert node.process.stderr is not None
        node.process.stderr.close()


def prepare(desk: Desk, **fields: Any) -> None:
    assert desk.run("prepare", make_config(**fields))[0] == 0


def test_two_nodes_train_a_sharded_model_and_publish_it_whole(nodes: Nodes) -> None:
    prepare(nodes.desk, **FULL, training={**TRAINING, "maxSteps": 3})
    first, second = nodes.start_all()
    code, word = first.end()
    assert (code, word.succeeded) == (ExitCode.COMPLETED, True)
    code, other = second.end()
    assert (code, other.reason, other.manifest_digest) == (ExitCode.COMPLETED, Reason.COMPLETED, None)
    assert "node 0" in other.message
    report = json.loads((nodes.desk.work / "report" / "report.json").read_text())
    assert [run["stage"] for run in report["stages"]] == ["prepare", "train"]
    published = read_model(nodes.desk.work / "merged")
    sharded = read_shards(nodes.desk.work, published)
    for name, tensor in published.items():
        assert tensor.equal(sharded[name].to(tensor.dtype)), name


def read_model(folder: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow

    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def read_shards(work: Path, published: dict[str, Any]) -> dict[str, Any]:
    """The weights of the last checkpoint under the names of the published ones, as torch puts them together."""
    import torch.distributed.checkpoint as dcp  # noqa: PLC0415 - slow
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader  # noqa: PLC0415

    newest = max((work / "checkpoints").glob("step-*"))
    whole = {f"weight.{name}": tensor.detach().float().zero_() for name, tensor in published.items()}
    dcp.load(whole, storage_reader=HuggingFaceStorageReader(str(newest)))  # type: ignore[attr-defined]
    return {name.removeprefix("weight."): tensor for name, tensor in whole.items()}


def test_a_killed_rank_ends_all_nodes_and_each_says_why(nodes: Nodes) -> None:
    prepare(nodes.desk, **QLORA, training={**TRAINING, "maxSteps": 10_000, "warmupSteps": 1})
    first, second = nodes.start_all()
    first.wait_for("step 2/")
    os.kill(second.rank, signal.SIGKILL)
    code, word = second.end()
    assert (code, word.reason) == (ExitCode.UNKNOWN, Reason.UNKNOWN)
    assert word.message.startswith("Rank 1 was killed (SIGKILL)")
    code, word = first.end()
    assert (code, word.reason) == (ExitCode.PEER_LOST, Reason.PEER_LOST)


def test_one_node_asked_to_leave_takes_all_along_with_a_checkpoint(nodes: Nodes) -> None:
    prepare(nodes.desk, **QLORA, training={**TRAINING, "maxSteps": 10_000, "warmupSteps": 1})
    first, second = nodes.start_all()
    first.wait_for("step 2/")
    second.process.send_signal(signal.SIGTERM)
    for node in (first, second):
        code, word = node.end()
        assert (code, word.reason) == (ExitCode.INTERRUPTED, Reason.INTERRUPTED)
    assert list((nodes.desk.work / "checkpoints").glob("step-*"))


def test_where_a_peer_hangs_progress_is_told_and_stands_still(nodes: Nodes) -> None:
    prepare(nodes.desk, **QLORA, training={**TRAINING, "maxSteps": 10_000, "warmupSteps": 1})
    port = free_port()
    first, second = nodes.start(0, "--progress-port", str(port)), nodes.start(1)
    first.wait_for("step 2/")
    hanging = second.rank
    os.kill(hanging, signal.SIGSTOP)
    try:
        wait_until(lambda: still_for(port, 20))
        stopped = read_progress(port)
        assert stopped.activity == "training"
    finally:
        os.kill(hanging, signal.SIGCONT)
    wait_until(lambda: read_progress(port).pulse > stopped.pulse)


def read_progress(port: int) -> Progress:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/progress", timeout=10) as answer:
        return Progress.model_validate_json(answer.read())


def still_for(port: int, looks: int) -> bool:
    """Whether so many looks in a row, a step of this training apart, tell the same; but for how long they do."""
    pulse = read_progress(port).pulse
    return all(not threading.Event().wait(0.2) and read_progress(port).pulse == pulse for _ in range(looks))


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("index", "missing"), [(0, "rank 1 did not come"), (1, "rank 0 was not reached")], ids=["rank 0", "another"]
)
def test_whoever_waits_in_vain_says_for_whom(nodes: Nodes, index: int, missing: str) -> None:
    prepare(nodes.desk, **QLORA, training={**TRAINING, "maxSteps": 3})
    code, word = nodes.start(index, FINETUNE_RENDEZVOUS_TIMEOUT_SECONDS="1").end()
    assert (code, word.reason) == (ExitCode.RENDEZVOUS_FAILED, Reason.RENDEZVOUS_FAILED)
    assert missing in word.message
    assert f"localhost:{nodes.port} within 1 s" in word.message


def test_a_node_that_is_not_told_where_to_meet_says_what_to_set(desk: Desk) -> None:
    prepare(desk, **QLORA, training={**TRAINING, "maxSteps": 3})
    code, word = desk.run("train", make_config(**QLORA, training={**TRAINING, "maxSteps": 3}))
    assert code == ExitCode.INVALID_CONFIG
    assert word is not None
    assert "FINETUNE_RENDEZVOUS" in word.message


# What a node says of its ranks


@pytest.mark.parametrize(
    ("index", "ends", "reason", "told"),
    [
        pytest.param(0, [(1, 0, "fine"), (0, 0, "all done")], Reason.COMPLETED, "all done", id="rank 0's own word"),
        pytest.param(1, [(2, 0, "fine")], Reason.COMPLETED, "told by node 0", id="another node's ranks did their part"),
        pytest.param(
            0,
            [(1, 21, "lost"), (0, 16, "no memory")],
            Reason.OUT_OF_MEMORY,
            "no memory",
            id="the cause, not who lost it",
        ),
        pytest.param(0, [(1, 20, "left"), (0, 21, "lost")], Reason.INTERRUPTED, "left", id="asked to leave, and saved"),
        pytest.param(0, [(1, 15, "full"), (0, 17, "NaN")], Reason.VOLUME_FULL, "full", id="the first of two causes"),
        pytest.param(0, [(1, -11, None), (0, 21, "lost")], Reason.UNKNOWN, "SIGSEGV", id="killed without a word"),
        pytest.param(0, [(1, 13, None)], Reason.NOT_FOUND, "without a word", id="an exit code alone"),
    ],
)
def test_a_node_says_what_says_most(
    tmp_path: Path, index: int, ends: list[tuple[int, int, str | None]], reason: Reason, told: str
) -> None:
    ranks = [ended(tmp_path, number, code, message) for number, code, message in ends]
    word = _last_word(Node(index, 2, 2, "localhost", 1), ranks, attempt=1)
    assert word.reason is reason
    assert told in word.message


def ended(words: Path, number: int, code: int, message: str | None) -> Rank:
    if message is not None:
        reason = next(each.reason for each in ExitCode if each == code)
        word = LastWord(stage=Stage.TRAIN, attempt=1, reason=reason, message=message)
        word_path(words, number).write_text(word.to_json())
    return Rank(number, None, words, code)  # type: ignore[arg-type]  # it has ended


def test_ranks_are_counted_over_the_nodes_and_share_their_nodes_cores() -> None:
    node = Node(1, 2, 8, "job-0.train", 29500)
    told = node.environment(3)
    assert {name: told[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")} == {
        "RANK": "11",
        "LOCAL_RANK": "3",
        "WORLD_SIZE": "16",
        "MASTER_ADDR": "job-0.train",
    }
    assert int(told["OMP_NUM_THREADS"]) >= 1
