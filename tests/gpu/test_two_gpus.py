"""Two processes with a GPU each share a training, by the real command and NCCL: sharded, told to leave, gone on."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from finetune_trainer.__main__ import main
from finetune_trainer.progress import ExitCode
from tests.gpu.bench import Bench, Outcome, make_job

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
STEPS, LEAVE_AFTER = 12, 4
TWO = {"gpusPerNode": 2}

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")


class Command:
    """The command's stages on one job."""

    def __init__(self, bench: Bench, work: Path, job: dict[str, Any]) -> None:
        """`work`: the job's folder, new."""
        path = bench.root / "job.json"
        path.write_text(json.dumps(job))
        self.options = ["--config", str(path), "--work", str(work), "--sources", str(bench.root / "sources")]
        self.options += ["--termination-log", str(bench.root / "last-word")]
        assert main(["prepare", *self.options]) == ExitCode.COMPLETED

    def train(self, attempt: int, leave_after: int | None = None) -> tuple[int, str]:
        """Train in processes of their own, which are told to leave after that step; the exit code and the log."""
        command = [sys.executable, "-m", "finetune_trainer", "train", *self.options, "--attempt", str(attempt)]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        told = []
        assert process.stderr is not None
        for line in process.stderr:
            print(line, end="")
            told.append(line)
            if leave_after is not None and f"step {leave_after}/{STEPS} loss" in line:
                process.send_signal(signal.SIGTERM)
        return process.wait(), "".join(told)


@pytest.fixture
def work(bench: Bench) -> Iterator[Path]:
    yield bench.root / "work"
    shutil.rmtree(bench.root / "work", ignore_errors=True)


def make_pair_job(method: dict[str, Any], **training: Any) -> dict[str, Any]:
    """A job of 12 steps on two GPUs, with one checkpoint at its end."""
    training = {"maxSteps": STEPS, "checkpoint": {"everySteps": STEPS}, "warmupSteps": 0, **training}
    return make_job("1b", method, **training) | {"parallelism": TWO}


def test_a_sharded_training_that_is_told_to_leave_goes_on(
    bench: Bench, work: Path, told: Callable[[Outcome], Outcome]
) -> None:
    command = Command(bench, work, make_pair_job({"type": "Full"}, learningRate=0.0001))
    code, log = command.train(1, leave_after=LEAVE_AFTER)
    assert code == ExitCode.INTERRUPTED, log
    code, log = command.train(2)  # which ends with an error if any weight is not a DTensor
    assert code == ExitCode.COMPLETED, log
    found = re.search(r"going on from step (\d+)", log)
    assert found, log
    resumed = int(found[1])
    assert LEAVE_AFTER <= resumed < STEPS
    outcome = told(Outcome.of("Full, 1B, FSDP, 2 GPUs", work, resumed))
    assert outcome.last_loss < outcome.first_loss - 0.5


@pytest.mark.parametrize(
    ("name", "method"),
    [("QLoRA NF4", {"type": "QLoRA"}), ("LoRA FP8", {"type": "LoRA", "baseWeights": {"format": "FP8"}})],
)
def test_adapters_are_trained_in_step_on_two_gpus(
    name: str, method: dict[str, Any], bench: Bench, work: Path, told: Callable[[Outcome], Outcome]
) -> None:
    command = Command(bench, work, make_pair_job(method))
    code, log = command.train(1)
    assert code == ExitCode.COMPLETED, log
    outcome = told(Outcome.of(f"{name}, 1B, DDP, 2 GPUs", work))
    assert outcome.last_loss < outcome.first_loss - 0.5
