"""Decisions of a training are a function of what was measured, the same in a resumed run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from finetune_trainer.progress import ResolvedEarlyStopping
from finetune_trainer.training.course import Course, Line, best_first, epochs_done, is_due, stops_early, without_better


def measured(*losses: float) -> list[Line]:
    """Measurements at steps 10, 20, 30, ..."""
    return [{"step": 10 * (index + 1), "eval_loss": loss} for index, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "threshold", "count"),
    [
        pytest.param((), 0.0, 0, id="nothing measured"),
        pytest.param((5.0,), 0.0, 0, id="the first is the best so far"),
        pytest.param((3.0, 2.0, 1.0), 0.0, 0, id="it falls"),
        pytest.param((3.0, 2.0, 2.5, 2.4), 0.0, 2, id="it rose and does not come below the lowest"),
        pytest.param((3.0, 2.0, 2.5, 1.9), 0.0, 0, id="a new lowest begins the count anew"),
        pytest.param((2.0, 2.0), 0.0, 1, id="the same is not better"),
        pytest.param((2.0, 1.95), 0.1, 1, id="a gain within the threshold is none"),
        pytest.param((2.0, 1.95, 1.89), 0.1, 0, id="small gains add up"),
        pytest.param((2.0, 1.9), 0.1, 1, id="the threshold itself is not enough"),
        pytest.param((-0.5, -0.9, -0.7), 0.0, 1, id="losses below zero, as some of DPO's are"),
    ],
)
def test_measurements_without_a_better_one_are_counted(losses: tuple[float, ...], threshold: float, count: int) -> None:
    assert without_better(measured(*losses), threshold) == count


@pytest.mark.parametrize(("losses", "stops"), [((2.0, 2.1), False), ((2.0, 2.1, 2.2), True), ((2.0, 2.1, 1.0), False)])
def test_a_run_ends_when_patience_does(losses: tuple[float, ...], stops: bool) -> None:
    assert stops_early(measured(*losses), ResolvedEarlyStopping(patience=2, threshold=0.0)) is stops
    assert not stops_early(measured(*losses), None)


def test_of_equal_losses_the_earlier_is_the_best() -> None:
    assert [line["step"] for line in best_first(measured(2.0, 1.0, 1.0, 3.0))] == [20, 30, 10, 40]


@pytest.mark.parametrize(("step", "due"), [(3, False), (4, True), (8, True), (9, False), (10, True)])
def test_what_is_done_each_so_many_steps_is_done_at_the_end_too(step: int, due: bool) -> None:
    assert is_due(step, 4, 10) is due


def test_a_checkpoint_gives_back_lines_and_losses_to_the_last_bit(tmp_path: Path) -> None:
    course = Course()
    course.add({"step": 1, "loss": 0.1 + 0.2, "grad_norm": math.inf})
    course.add({"step": 1, "eval_loss": 1 / 3})
    course.losses = [1e-17, 2.5]
    course.write(tmp_path)
    assert Course.read(tmp_path) == course
    assert course.lines[0] == {"step": 1, "loss": 0.1 + 0.2}
    assert course.loss == 0.1 + 0.2
    assert course.take_losses() == (1e-17 + 2.5) / 2
    assert course.losses == []


@pytest.mark.parametrize(("step", "epochs"), [(0, 0.0), (1, 0.4), (2, 0.8), (3, 1.0), (4, 1.4), (6, 2.0)])
def test_epochs_are_counted_in_rows(step: int, epochs: float) -> None:
    assert epochs_done(step, rows=10, global_batch=4) == epochs
