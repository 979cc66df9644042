"""Every method takes 20 steps on a GPU, through the real stages, and its loss falls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.gpu.bench import Bench, Outcome, make_job
from tests.tiny import make_tiny_gptq

if TYPE_CHECKING:
    from collections.abc import Callable

METHODS: dict[str, dict[str, Any]] = {
    "QLoRA NF4, 1B": {"type": "QLoRA"},
    "LoRA BF16, 1B": {"type": "LoRA", "baseWeights": {"format": "BF16"}},
    "LoRA Int8, 1B": {"type": "LoRA", "baseWeights": {"format": "Int8"}},
    "LoRA FP8, 1B": {"type": "LoRA", "baseWeights": {"format": "FP8"}},
    "Full, 1B": {"type": "Full"},
}


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_falls_in_20_steps(name: str, bench: Bench, told: Callable[[Outcome], Outcome]) -> None:
    rate = {"learningRate": 0.0001} if METHODS[name]["type"] == "Full" else {}
    outcome = told(bench.train(name, make_job("1b", METHODS[name], **rate)))
    assert outcome.last_loss < outcome.first_loss - 0.2


def test_the_loss_falls_in_20_steps_on_a_gptq_base(bench: Bench, told: Callable[[Outcome], Outcome]) -> None:
    pytest.importorskip("gptqmodel", reason="gptqmodel, which holds GPTQ layers, is not installed here")
    make_tiny_gptq(bench.models / "gptq", hidden_size=1024, layers=8)
    job = make_job("gptq", {"type": "QLoRA", "baseWeights": {"format": "GPTQ"}})
    outcome = told(bench.train("QLoRA GPTQ, 8 layers of 1024", job))
    assert outcome.last_loss < outcome.first_loss - 0.2
