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
from transformers import TrainerCallback

from finetune_trainer import manifest, train
from finetune_trainer.checkpoint import size_of
from finetune_trainer.errors import Interrupted, VolumeFull
from tests.unit.trainer.runs import SETTINGS, Run, make_rows, replace_settings, same_bits, weights

if TYPE_CHECKING:
    import torch

    from finetune_trainer.context import Context


class CrashError(Exception):
    """What a lost machine looks like from inside."""


class CrashAfter(TrainerCallback):
    """Dies after a step, before anything else is done about it but what the loop did."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - Trainer's
        if state.global_step == self.step:
            raise CrashError


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
    cut_off(folder / "step-00000004" / "adapter.safetensors")
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


def test_asked_to_leave_it_saves_and_the_next_attempt_goes_on_exactly(
    tiny_model: Path, tmp_path: Path, unbroken: dict[float, dict[str, torch.Tensor]]
) -> None:
    run = Run(tiny_model, tmp_path)
    run.attempt = 1
    trainer, loop = run.build()
    trainer.add_callback(AskAfter(loop._context.stopping, 3))
    with pytest.raises(Interrupted, match="step 4 of 8"):
        trainer.train()
    assert run.checkpoints.newest_good() == tmp_path / "checkpoints" / "step-00000004"
    assert same_bits(run.go(), unbroken[0.1])


class AskAfter(TrainerCallback):
    """SIGTERM in the course of the next step."""

    def __init__(self, stopping: Any, step: int) -> None:
        self.stopping, self.step = stopping, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - Trainer's
        if state.global_step == self.step:
            self.stopping.set()


def ask_while_measuring(context: Context) -> None:
    """SIGTERM as soon as the held-out loss is measured."""
    update = context.report.update

    def ask(**changes: Any) -> None:
        if "measuring" in changes.get("activity", ""):
            context.stopping.set()
        update(**changes)

    context.report.update = ask  # type: ignore[method-assign]


def test_asked_to_leave_while_it_measures_it_saves_as_well(tiny_model: Path, tmp_path: Path) -> None:
    run = Run(tiny_model, tmp_path).change(eval_steps=1, checkpoint_steps=100)
    run.attempt = 1
    trainer, loop = run.build()
    ask_while_measuring(loop._context)
    with pytest.raises(Interrupted):
        trainer.train()
    assert run.checkpoints.newest_good() == tmp_path / "checkpoints" / "step-00000001"


@pytest.mark.parametrize("asked", [False, True], ids=["left alone", "asked to leave while it measures"])
def test_killed_between_the_last_step_and_the_adapter_it_takes_the_checkpoint_over(
    tiny_model: Path, tmp_path: Path, unbroken: dict[float, dict[str, torch.Tensor]], asked: bool
) -> None:
    run = Run(tiny_model, tmp_path)
    with pytest.raises(CrashError):
        run.go(CrashAfter(8))
    start = run.checkpoints.newest_good()
    assert start == tmp_path / "checkpoints" / "step-00000008"
    run.attempt = 2
    trainer, _ = run.build()
    context, rows = run.context(), train.Rows(make_rows(), make_rows(4, seed=9), [])
    if asked:
        ask_while_measuring(context)
        with pytest.raises(Interrupted, match="step 8 of 8"):
            train._train(trainer, run.settings, rows, run.checkpoints, start, context)
    else:
        loop = train._train(trainer, run.settings, rows, run.checkpoints, start, context)
        assert loop.facts().steps == 8
        assert loop.eval_loss is not None
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
from finetune_trainer import state
write = state.write_state
def told(trainer, folder):
    print("saving", flush=True)
    write(trainer, folder)
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
