"""What a training takes on a GPU is what was estimated from the model's config."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.estimate import GRID, Run, forget, make_model, measure
from finetune_trainer.models.loading import set_up_torch

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("llama QLoRA 8x512 Full", "llama LoRA 8x512 Off", "llama Full 8x512 Full", "llama Int8 4x1024 Full")
RUNS = [run for run in GRID if run.name in NAMES]
WITHIN = 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    set_up_torch()
    folder = tmp_path_factory.mktemp("estimate") / "llama"
    make_model(folder, "llama")
    return folder


@pytest.mark.parametrize("run", RUNS, ids=NAMES)
def test_the_peak_is_within_a_tenth_of_the_estimate(run: Run, folder: Path, tmp_path: Path) -> None:
    forget()
    outcome = measure(run, folder, tmp_path)
    print(outcome)
    assert outcome.expected.peak_bytes == pytest.approx(outcome.peak, rel=WITHIN)
    assert outcome.expected.measuring_bytes == pytest.approx(outcome.measuring, rel=WITHIN)
    assert outcome.reserved + outcome.context < outcome.expected.total_bytes * (1 + WITHIN)
