"""Figures for people."""

from __future__ import annotations

import math
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.api import TrainingStatus
from finetune_operator.figures import (
    data_status,
    digits,
    duration,
    final_training,
    live_training,
    resolved_status,
    share,
    size,
)
from finetune_trainer.progress import Measured, Progress, Stage, TrainFacts
from tests.unit.operator.builders import data_facts, resolved


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.20441, "1.204"), (0.000213456, "0.0002135"), (12345.6, "12346"), (0.0, "0"), (None, None), (math.nan, None)],
)
def test_figures_have_four_digits(value: float | None, text: str | None) -> None:
    assert digits(value) == text


@given(st.floats())
def test_a_figure_is_a_number_or_nothing(value: float) -> None:
    text = digits(value)
    assert text is None or math.isfinite(float(text))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.9, "59s"), (725, "12m"), (12000, "3h20m"), (190000, "2d4h"), (math.inf, None), (-1, None)],
)
def test_time_left_is_as_coarse_as_it_is_certain(seconds: float, text: str | None) -> None:
    assert duration(seconds) == text


def test_a_share_of_an_unknown_total_is_not_told() -> None:
    assert (share(1, 0), share(128, 300)) == (None, "128/300 (42%)")


def test_a_share_of_bytes_is_told_in_sizes_for_people() -> None:
    assert (share(48 * 2**20, 269 * 2**20, "bytes"), share(0, 0, "bytes")) == ("48 MiB/269 MiB (17%)", None)
    assert share(3, 4, "rows") == "3/4 (75%)"


@pytest.mark.parametrize(("count", "text"), [(12, "12 B"), (2**20, "1.0 MiB"), (269 * 2**20, "269 MiB")])
def test_sizes_are_for_people(count: int, text: str) -> None:
    assert size(count) == text


def test_what_a_train_stage_does_besides_steps_leaves_the_count_of_steps_alone() -> None:
    before = TrainingStatus(step=128, total_steps=300, progress="128/300 (42%)")
    loading = Progress(stage=Stage.TRAIN, attempt=2, activity="loading the base model")
    assert live_training(loading, before) == before


def test_what_only_the_running_stage_knows_outlives_its_end() -> None:
    running = Progress(
        stage=Stage.TRAIN,
        attempt=2,
        activity="training",
        done=24,
        total=40,
        tokens_per_second=1234.5,
        peak_memory_bytes=2**30,
        resumed_from_step=20,
    )
    live = live_training(running, TrainingStatus())
    assert live.resumed_from_step == 20
    told = final_training(TrainFacts(steps=40, epochs=1, trainable_parameters=5, total_parameters=9), None, live)
    assert (told.resumed_from_step, told.tokens_per_second, told.peak_memory) == (20, "1234", "1")
    assert (told.step, told.eta) == (40, None)


def test_when_the_newest_checkpoint_was_complete_is_told_until_training_ends() -> None:
    saved = datetime(2026, 11, 22, 12, 30, 15, 999, tzinfo=UTC)
    running = Progress(
        stage=Stage.TRAIN, attempt=1, activity="training", done=24, total=40, checkpoint_step=20, checkpoint_time=saved
    )
    live = live_training(Progress.model_validate_json(running.to_json()), None)
    assert (live.last_checkpoint_step, live.last_checkpoint_time) == (20, "2026-11-22T12:30:15Z")
    facts = TrainFacts(steps=40, epochs=1, trainable_parameters=5, total_parameters=9)
    assert final_training(facts, None, live).last_checkpoint_time is None


def test_the_best_of_a_training_is_told_live_and_at_the_end() -> None:
    running = Progress(stage=Stage.TRAIN, attempt=1, activity="training", done=24, total=40, best_eval_loss=1.23456)
    live = live_training(running, None)
    facts = TrainFacts(steps=30, epochs=1, trainable_parameters=5, total_parameters=9)
    ended = facts.model_copy(update={"best_step": 20, "best_eval_loss": 1.2, "stopped_early": True})
    told = final_training(ended, None, live)
    assert (live.best_eval_loss, live.best_step, live.stopped_early) == ("1.235", None, None)
    assert (told.best_eval_loss, told.best_step, told.stopped_early) == ("1.2", 20, True)
    assert final_training(facts, None, live).stopped_early is None


def test_rows_are_told_of_each_dataset_and_of_so_many_and_no_more() -> None:
    facts = data_facts()
    told = data_status(facts)
    assert (told.truncated_rows, told.length_p99, told.packed_rows) == (7, 7, 3)
    assert [(one.name, one.train_rows, one.truncated_rows) for one in told.datasets or ()] == [("a", 7, 7), ("b", 7, 7)]
    many = facts.model_copy(update={"datasets": facts.datasets * 20})
    assert len(data_status(many).datasets or ()) == 32
    assert data_status(facts.model_copy(update={"datasets": ()})).datasets is None


def test_fractions_inside_resolved_settings_are_text() -> None:
    told = resolved_status(resolved())
    assert told["learningRate"] == "0.0002"
    assert told["lora"] == {
        "r": 16, "alpha": 32, "dropout": "0.05", "targetModules": ["q_proj", "v_proj"],
        "targetParameters": [], "excludeModules": [], "modulesToSave": [],
        "bias": "None", "useRslora": False, "useDora": False, "initLoraWeights": "Default",
    }  # fmt: skip


def test_the_last_word_replaces_what_was_polled_before_it() -> None:
    polled = TrainingStatus(step=38, total_steps=40, loss="1.4", eval_loss="1.7", last_checkpoint_step=20)
    facts = TrainFacts(steps=40, epochs=1, loss=1.20441, trainable_parameters=5, total_parameters=9)
    told = final_training(facts, Measured(eval_loss=1.5), polled)
    assert (told.loss, told.eval_loss, told.last_checkpoint_step) == ("1.204", "1.5", 40)
    assert told.progress == "40/40 (100%)"
    assert final_training(facts, None, polled).eval_loss == "1.7", "nothing newer was measured"
