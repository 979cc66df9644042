"""A training ends where it should, and publishes the weights that it says it does."""

from __future__ import annotations

import json
import math
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from finetune_trainer.evaluate import HeldOut
from finetune_trainer.progress import ResolvedEarlyStopping, Stage, TrainFacts
from finetune_trainer.runtime import manifest
from finetune_trainer.runtime.errors import NonFiniteLoss
from finetune_trainer.runtime.manifest import Target
from finetune_trainer.training.checkpoint import Checkpoints
from finetune_trainer.training.state import TRAINED_NAME
from tests.tiny import EOS
from tests.unit.trainer.runs import CrashAfter, CrashError, Run, make_rows, same_bits, weights
from tests.unit.trainer.test_resume import figures, flip_a_byte

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.unit.trainer.conftest import Desk

PATIENCE_2 = ResolvedEarlyStopping(patience=2, threshold=0.0)
RISING = {1: 3.0, 2: 2.0, 3: 2.5, 4: 2.1, 5: 1.0, 6: 9.0, 7: 9.0, 8: 9.0}
"""Held-out losses by step: with patience 2 the run ends at step 4, and step 2 is the best."""


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the held-out losses be RISING, while training itself is real; the steps that were measured."""
    from finetune_trainer.training.sft import SftTrainer  # noqa: PLC0415 - slow

    steps: list[int] = []

    def measure(trainer: Any, _rows: Any, _poll: Callable[[int, int], None] | None = None) -> HeldOut:
        steps.append(trainer.state.global_step)
        return HeldOut(RISING[trainer.state.global_step])

    monkeypatch.setattr(SftTrainer, "measure", measure)
    return steps


# Early stopping


def test_a_run_whose_held_out_loss_no_longer_falls_ends(tiny_model: Path, tmp_path: Path, measured: list[int]) -> None:
    run = Run(tiny_model, tmp_path).change(eval_steps=1, checkpoint_steps=3, early_stopping=PATIENCE_2, logging_steps=3)
    run.go()
    facts = run.loop.facts()
    assert measured == [1, 2, 3, 4]
    assert (facts.steps, facts.stopped_early, facts.best_step, facts.best_eval_loss) == (4, True, 2, 2.0)
    progress = run.loop._context.report.current
    assert (progress.done, progress.total, progress.best_eval_loss, progress.eval_loss) == (4, 4, 2.0, 2.1)
    assert run.checkpoints.newest_good() == tmp_path / "checkpoints" / "step-00000004"
    assert [line["step"] for line in run.loop._course.lines if "loss" in line] == [3, 4]


def test_until_it_ends_early_a_run_takes_the_very_steps_of_one_that_does_not(
    tiny_model: Path, tmp_path: Path, measured: list[int]
) -> None:
    whole = Run(tiny_model, tmp_path / "whole").change(eval_steps=1)
    whole.go()
    run = Run(tiny_model, tmp_path / "early").change(eval_steps=1, early_stopping=PATIENCE_2)
    run.go()
    lines = [line for line in whole.loop._course.lines if line["step"] <= 4]
    assert figures(run.loop._course.lines) == figures(lines)
    assert measured


@pytest.mark.parametrize("step", [3, 4], ids=["before its end", "after its end"])
def test_patience_outlives_a_crash(tiny_model: Path, tmp_path: Path, measured: list[int], step: int) -> None:
    settings = {"eval_steps": 1, "checkpoint_steps": 1, "early_stopping": PATIENCE_2}
    whole = Run(tiny_model, tmp_path / "whole").change(**settings)
    unbroken = whole.go()
    measured.clear()
    run = Run(tiny_model, tmp_path / "broken").change(**settings)
    with pytest.raises(CrashError):
        run.go(CrashAfter(step))
    assert same_bits(run.go(), unbroken)
    assert run.loop.facts() == whole.loop.facts()
    assert measured == [1, 2, 3, 4]
    assert run.loop._context.report.current.total == 4


# The best


def test_the_best_weights_are_published_where_asked_for(tiny_model: Path, tmp_path: Path, measured: list[int]) -> None:
    kept = Run(tiny_model, tmp_path / "two steps").change(eval_steps=1, checkpoint_steps=100)
    kept.attempt = 1
    trainer, _ = kept.build()
    trainer.add_callback(CrashAfter(2))
    with pytest.raises(CrashError):
        trainer.train()
    run = Run(tiny_model, tmp_path / "best").change(
        eval_steps=1, checkpoint_steps=100, restore_best=True, early_stopping=PATIENCE_2
    )
    found = run.go()
    assert same_bits(found, weights(trainer.model))
    assert run.loop.published is not None
    assert (run.loop.published["step"], run.loop.published["eval_loss"]) == (2, 2.0)
    assert run.loop.facts().steps == 4
    assert measured


def test_figures_are_those_of_the_weights_that_are_published(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune_trainer.training.sft import SftTrainer  # noqa: PLC0415 - slow

    truly: Any = SftTrainer.measure

    def worse_after_step_3(trainer: Any, *rest: Any) -> HeldOut:
        return HeldOut(truly(trainer, *rest).loss + (10.0 if trainer.state.global_step > 3 else 0.0))

    monkeypatch.setattr(SftTrainer, "measure", worse_after_step_3)
    run = Run(tiny_model, tmp_path).change(eval_steps=1, checkpoint_steps=100, restore_best=True, total_steps=6)
    run.go()
    assert run.loop.published is not None
    assert run.loop.published["step"] == 3
    assert run.loop.published["eval_loss"] == truly(run.loop._trainer, make_rows(4, seed=9)).loss


def test_a_damaged_best_checkpoint_gives_way_to_the_next_best(
    tiny_model: Path, tmp_path: Path, measured: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tiny_model, tmp_path).change(
        eval_steps=1, checkpoint_steps=1, checkpoint_keep=8, restore_best=True, total_steps=4
    )
    run.attempt = 1
    trainer, loop = run.build()
    trainer.train()
    flip_a_byte(tmp_path / "checkpoints" / "step-00000002" / TRAINED_NAME)
    loop.end()
    assert loop.published is not None
    assert loop.published["step"] == 4, "whose weights are in memory"
    assert loop.facts().best_step == 2
    assert "step-00000002 is damaged" in caplog.text
    assert measured


def test_without_being_asked_for_the_last_weights_are_published(
    tiny_model: Path, tmp_path: Path, measured: list[int]
) -> None:
    run = Run(tiny_model, tmp_path).change(eval_steps=1, total_steps=4)
    run.go()
    assert run.loop.published is not None
    assert run.loop.published["step"] == measured[-1] == 4


def test_a_held_out_loss_that_is_no_number_ends_the_run(
    tiny_model: Path, tmp_path: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RISING, 3, math.nan)
    run = Run(tiny_model, tmp_path)
    with pytest.raises(NonFiniteLoss, match=r"The held-out loss is nan at step 3. Lower training.learningRate"):
        run.go()
    assert measured == [3]


# What is kept


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


def fill(folder: Path) -> None:
    (folder / "weights").write_bytes(b"weights")


def facts(step: int, best: int) -> TrainFacts:
    return TrainFacts(steps=step, epochs=1, trainable_parameters=1, total_parameters=1, best_step=best)


def test_the_best_is_kept_besides_the_newest_until_a_better_one_is_saved(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Target(Stage.TRAIN, tmp_path / "adapter", "adapter", "sha256:0"), 1, keep=2)
    folder, kept = checkpoints.folder, []
    for step, ranking in enumerate([(1,), (2, 1), (2, 1), (2, 4, 1), (2, 4), (6, 2)], start=1):
        checkpoints.save(step, fill, facts(step, ranking[0]), ranking)
        kept.append(steps_in(folder))
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6]]
    found = manifest.read(folder / "step-00000006").result.training
    assert found is not None
    assert found.best_step == 6


def test_of_measurements_without_a_checkpoint_none_is_waited_for(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Target(Stage.TRAIN, tmp_path / "adapter", "adapter", "sha256:0"), 1, keep=1)
    for step in (2, 4, 6):
        checkpoints.save(step, fill, facts(step, 1), [1, 2, 4, 6])
    assert steps_in(checkpoints.folder) == [2, 6]


def test_a_resumed_run_does_not_lose_the_best(tiny_model: Path, tmp_path: Path, measured: list[int]) -> None:
    run = Run(tiny_model, tmp_path).change(eval_steps=2, checkpoint_steps=2, checkpoint_keep=1)
    with pytest.raises(CrashError):
        run.go(CrashAfter(5))
    assert steps_in(tmp_path / "checkpoints") == [2, 4]
    run.go()
    assert steps_in(tmp_path / "checkpoints") == [2, 8]
    assert run.loop.facts().best_step == 2
    assert measured == [2, 4, 6, 8]


def test_the_stage_tells_that_it_ended_early_and_whose_weights_it_took(
    desk: Desk, config: dict[str, Any], measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RISING, 0, 4.0)
    config["training"] = {
        "globalBatchSize": 8,
        "maxSteps": 8,
        "eval": {"everySteps": 1},
        "restoreBest": True,
        "earlyStopping": {"patience": 2},
    }
    assert desk.run("prepare", config)[0] == 0
    code, word = desk.run("train", config)
    assert code == 0
    assert word is not None
    assert word.message == (
        "Trained 4 of 8 steps, until the held-out loss no longer fell: "
        "held-out loss 4.0000 before, 2.0000 after, with the weights of step 2."
    )
    assert word.artifact is not None
    assert word.artifact.measured is not None
    assert (word.artifact.measured.eval_loss, word.artifact.measured.eval_loss_base) == (2.0, 4.0)
    assert measured == [0, 1, 2, 3, 4]
    lines = (desk.work / "report" / "training.jsonl").read_text().splitlines()
    assert len(lines) == 8


# Seeds


def test_everything_random_comes_from_the_seed_whatever_the_process_did_before(
    tiny_model: Path, tmp_path: Path
) -> None:
    settings = {"total_steps": 2, "neftune_noise_alpha": 5.0}
    runs = []
    for name, seed in (("one", 7), ("another", 7), ("other seed", 8)):
        random.seed(name)
        np.random.seed(len(name))  # noqa: NPY002 - the generator that libraries use
        torch.manual_seed(len(name))
        runs.append(Run(tiny_model, tmp_path / name).change(seed=seed, **settings).go())
    one, another, other = runs
    assert same_bits(one, another)
    assert not same_bits(one, other)


# What is published


def test_a_model_that_is_trained_whole_is_published_as_one_that_can_be_served(
    desk: Desk, config: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 - slow

    config["method"] = {"type": "Full"}
    config["training"] = {"globalBatchSize": 8, "maxSteps": 3, "learningRate": 0.001}
    assert desk.run("prepare", config)[0] == 0
    code, word = desk.run("train", config)
    assert code == 0
    assert word is not None
    assert word.artifact is not None
    assert (word.artifact.name, word.artifact.type, word.artifact.path) == ("model", "Merged", "merged")
    assert word.artifact.measured is not None
    assert word.artifact.measured.eval_loss is not None
    assert word.training is not None
    assert word.training.trainable_parameters == word.training.total_parameters
    model = AutoModelForCausalLM.from_pretrained(desk.work / "merged")
    assert model.dtype is torch.bfloat16
    assert AutoTokenizer.from_pretrained(desk.work / "merged").eos_token == EOS
    layers = json.loads((desk.work / "report" / "layers.json").read_text())
    assert layers["before"] == layers["after"]
