"""A broken-off training goes on exactly: the last weights are those of an unbroken run, bit by bit."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from finetune_trainer import train
from finetune_trainer.progress import ResolvedGaLore
from finetune_trainer.runtime import manifest
from finetune_trainer.runtime.errors import Interrupted, VolumeFull
from finetune_trainer.training.checkpoint import saved_at, size_of
from finetune_trainer.training.state import TRAINED_NAME
from tests.unit.trainer.runs import (
    SETTINGS,
    CrashAfter,
    CrashError,
    Run,
    make_rows,
    make_table,
    replace_settings,
    same_bits,
    weights,
)

if TYPE_CHECKING:
    import torch

    from finetune_trainer.runtime.context import Context


@pytest.fixture(scope="module")
def unbroken(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[float, dict[str, torch.Tensor]]:
    """The weights of unbroken runs, by dropout."""
    return {
        dropout: Run(
            tiny_model, tmp_path_factory.mktemp("unbroken"), replace_settings(SETTINGS, lora={"dropout": dropout})
        ).go()
        for dropout in (0.0, 0.1)
    }


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("step", [1, 3, 5], ids=["before a checkpoint", "after an epoch's end", "within an epoch"])
def test_after_a_crash_the_weights_are_those_of_an_unbroken_run(
    tiny_model: Path, tmp_path: Path, unbroken: dict[float, dict[str, torch.Tensor]], dropout: float, step: int
) -> None:
    run = Run(tiny_model, tmp_path).change(lora={"dropout": dropout})
    with pytest.raises(CrashError):
        run.go(CrashAfter(step))
    assert same_bits(run.go(), unbroken[dropout])


VARIANTS: dict[str, dict[str, Any]] = {
    "8-bit paged AdamW": {"optimizer": "PagedAdamW8bit"},
    "8-bit AdamW": {"optimizer": "AdamW8bit"},
    "Adafactor": {"optimizer": "Adafactor"},
    "noise on embeddings": {"neftune_noise_alpha": 5.0},
    "rows that share sequences": {"packing": True},
    "an adapter in bf16 products": {"method": "LoRA", "base_format": "BF16"},
    "all weights": {"method": "Full", "base_format": "FP32", "lora": None},
    "all weights, 8-bit paged AdamW": {
        "method": "Full",
        "base_format": "FP32",
        "lora": None,
        "optimizer": "PagedAdamW8bit",
    },
    "GaLore": {
        "method": "GaLore",
        "base_format": "FP32",
        "lora": None,
        "galore": ResolvedGaLore(rank=8, update_interval=2, scale=0.25),
    },
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_whatever_is_trained_goes_on_exactly(tiny_model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    whole, run = (Run(tiny_model, tmp_path / name).change(**settings) for name in ("whole", "broken"))
    unbroken = whole.go()
    with pytest.raises(CrashError):
        run.go(CrashAfter(5))
    assert same_bits(run.go(), unbroken)
    assert run.loop.facts() == whole.loop.facts()


def test_when_the_newest_checkpoint_was_complete_is_told_also_to_who_goes_on_from_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    run = Run(tiny_model, tmp_path).change(checkpoint_steps=2)
    with pytest.raises(CrashError):
        run.go(CrashAfter(3))
    told, saved = run.loop._context.report.current, saved_at(tmp_path / "checkpoints" / "step-00000002")
    assert told.checkpoint_step == 2
    assert told.checkpoint_time is not None
    assert saved <= told.checkpoint_time
    with pytest.raises(CrashError):
        run.go(CrashAfter(3))
    assert run.loop._context.report.current.checkpoint_time == saved


def test_a_run_broken_off_at_a_checkpoint_of_an_epochs_end_goes_on_exactly(
    tiny_model: Path, tmp_path: Path, unbroken: dict[float, dict[str, torch.Tensor]]
) -> None:
    run = Run(tiny_model, tmp_path).change(checkpoint_steps=3)
    with pytest.raises(CrashError):
        run.go(CrashAfter(4))
    assert run.checkpoints.newest_good() == tmp_path / "checkpoints" / "step-00000003"
    assert same_bits(run.go(), unbroken[0.1])


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
    tiny_model: Path,
    tmp_path: Path,
    unbroken: dict[float, dict[str, torch.Tensor]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = Run(tiny_model, tmp_path)
    with pytest.raises(CrashError):
        run.go(CrashAfter(6))
    folder = tmp_path / "checkpoints"
    flip_a_byte(folder / "step-00000006" / "optimizer.pt")
    cut_off(folder / "step-00000004" / TRAINED_NAME)
    assert run.checkpoints.newest_good() == folder / "step-00000002"
    assert [path.name for path in folder.glob("damaged-*")] == ["damaged-step-00000006-1"]
    assert "optimizer.pt" in caplog.text
    assert same_bits(run.go(), unbroken[0.1])
    flip_a_byte(folder / "step-00000008" / "optimizer.pt")
    assert run.checkpoints.newest_good() == folder / "step-00000006"
    assert [path.name for path in folder.glob("damaged-*")] == ["damaged-step-00000008-2"]


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def test_no_more_checkpoints_are_kept_than_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    Run(tiny_model, tmp_path).change(checkpoint_keep=2, total_steps=6).go()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]


@pytest.mark.parametrize(
    ("step", "micro_batch"), [(1, 3), (3, 6)], ids=["within an epoch", "in the first step of the next epoch"]
)
def test_asked_to_leave_within_a_step_it_saves_after_the_micro_batch_and_goes_on_exactly(
    tiny_model: Path, tmp_path: Path, unbroken: dict[float, dict[str, torch.Tensor]], step: int, micro_batch: int
) -> None:
    run = Run(tiny_model, tmp_path).change(checkpoint_steps=100)
    run.attempt = 1
    trainer, loop = run.build()
    asked = AskInMicroBatch(trainer, loop._context.stopping, micro_batch)
    with pytest.raises(Interrupted, match=f"step {step} of 8"):
        trainer.train()
    assert asked.taken == micro_batch
    assert run.checkpoints.newest_good() == tmp_path / "checkpoints" / f"step-{step:08d}"
    assert same_bits(run.go(), unbroken[0.1])


def test_asked_to_leave_before_the_first_step_it_leaves_nothing_behind(tiny_model: Path, tmp_path: Path) -> None:
    run = Run(tiny_model, tmp_path)
    run.attempt = 1
    trainer, loop = run.build()
    AskInMicroBatch(trainer, loop._context.stopping, 1)
    with pytest.raises(Interrupted, match="before the first step"):
        trainer.train()
    assert run.checkpoints.newest_good() is None


class AskInMicroBatch:
    """SIGTERM while the model is at work on one of its micro-batches."""

    def __init__(self, trainer: Any, stopping: Any, number: int) -> None:
        self.taken = 0
        take = trainer.training_step

        def counted(*arguments: Any) -> Any:
            self.taken += 1
            if self.taken == number:
                stopping.set()
            return take(*arguments)

        trainer.training_step = counted


def ask_while_measuring(context: Context, step: int = 0) -> None:
    """SIGTERM as soon as the held-out loss is measured at this step or a later one."""
    update = context.report.update

    def ask(**changes: Any) -> None:
        if "measuring" in changes.get("activity", "") and context.report.current.done >= step:
            context.stopping.set()
        update(**changes)

    context.report.update = ask  # type: ignore[method-assign]


def test_a_measurement_that_was_broken_off_is_made_by_the_next_attempt(
    tiny_model: Path, tmp_path: Path, unbroken: dict[float, dict[str, torch.Tensor]]
) -> None:
    whole = Run(tiny_model, tmp_path / "whole")
    whole.go()
    run = Run(tiny_model, tmp_path / "broken")
    run.attempt = 1
    trainer, loop = run.build()
    ask_while_measuring(loop._context)
    with pytest.raises(Interrupted, match="step 3 of 8"):
        trainer.train()
    assert run.checkpoints.newest_good() == tmp_path / "broken" / "checkpoints" / "step-00000003"
    assert same_bits(run.go(), unbroken[0.1])
    assert run.loop.facts() == whole.loop.facts()
    assert figures(run.loop._course.lines) == figures(whole.loop._course.lines)


def figures(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    """The lines without what a clock or a gauge told."""
    measured = {"tokens_per_second", "peak_memory_bytes"}
    return [{name: value for name, value in line.items() if name not in measured} for line in lines]


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_a_resumed_run_tells_the_very_lines_of_an_unbroken_one(
    tiny_model: Path, tmp_path: Path, logging_steps: int
) -> None:
    whole = Run(tiny_model, tmp_path / "whole").change(logging_steps=logging_steps)
    whole.go()
    run = Run(tiny_model, tmp_path / "broken").change(logging_steps=logging_steps)
    with pytest.raises(CrashError):
        run.go(CrashAfter(5))
    run.go()
    assert figures(run.loop._course.lines) == figures(whole.loop._course.lines)
    assert run.loop.facts() == whole.loop.facts()


@pytest.mark.parametrize("asked", [False, True], ids=["left alone", "asked to leave while it measures"])
def test_killed_between_the_last_step_and_the_adapter_it_takes_the_checkpoint_over(
    tiny_model: Path, tmp_path: Path, unbroken: dict[float, dict[str, torch.Tensor]], asked: bool
) -> None:
    run = Run(tiny_model, tmp_path)
    run.attempt = 1
    trainer, loop = run.build()
    if asked:
        ask_while_measuring(loop._context, step=8)
    else:
        trainer.add_callback(CrashAfter(8))
    with pytest.raises((CrashError, Interrupted)):
        trainer.train()
    start = run.checkpoints.newest_good()
    assert start == tmp_path / "checkpoints" / "step-00000008"
    run.attempt = 2
    trainer, _ = run.build()
    context, rows = run.context(), train.Rows(make_table(make_rows()), make_rows(4, seed=9), [])
    loop = train._take_steps(trainer, rows, run.checkpoints, start, context, run.followers)
    assert loop.facts().steps == 8
    assert loop.published is not None
    assert context.report.current.resumed_from_step == 8
    assert same_bits(weights(trainer.model), unbroken[0.1])
    assert run.checkpoints.newest_good() == start


CHILD = """
import sys
from pathlib import Path
from tests.unit.trainer.runs import Run
run = Run(Path(sys.argv[1]), Path(sys.argv[2]))
class Told:
    pass
from finetune_trainer.training import state
write = state.write_state
def told(*arguments):
    print("saving", flush=True)
    write(*arguments)
    print("written", flush=True)
state.write_state = told
run.go()
"""


@pytest.mark.chaos
@pytest.mark.timeout(0)
def test_killed_at_a_random_moment_it_goes_on_exactly(
    tiny_model: Path,
    tmp_path: Path,
    unbroken: dict[float, dict[str, torch.Tensor]],
    rng: random.Random,
    full_trials: bool,
) -> None:
    for trial in range(200 if full_trials else 2):
        folder = tmp_path / str(trial)
        kill_while_it_saves(tiny_model, folder, rng)
        run = Run(tiny_model, folder)
        run.attempt = 1
        assert same_bits(run.go(), unbroken[0.1]), f"trial {trial}"
        assert not list((folder / "checkpoints").glob(".*"))


def kill_while_it_saves(tiny_model: Path, folder: Path, rng: random.Random) -> None:
    """Start a run in a process of its own, and kill it at a random moment of one of its saves, or right after."""
    root = Path(__file__).parents[3]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tiny_model), str(folder)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'trainer'}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    for _ in range(rng.randint(1, 6)):
        assert child.stdout.readline()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(timeout=rng.uniform(0, 0.05))
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_volume_keeps_the_last_good_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    one = Run(tiny_model, tmp_path / "room").change(total_steps=2)
    one.go()
    room_for_two = int(2.5 * size_of(tmp_path / "room" / "checkpoints"))
    volume = tmp_path / "volume"
    volume.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room_for_two}", "tmpfs", str(volume)], check=True)
    try:
        run = Run(tiny_model, volume)
        with pytest.raises(VolumeFull, match=r"needs at least [\d,]+ bytes, [\d,]+ are free. The checkpoint of step"):
            run.go()
        kept = run.checkpoints.newest_good()
        assert kept is not None
        assert manifest.verify(kept)
        assert not list((volume / "checkpoints").glob(".*"))
    finally:
        subprocess.run(["umount", "--lazy", str(volume)], check=True)
