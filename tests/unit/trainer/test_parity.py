"""Our training is that of TRL and PEFT called by hand, loss by loss, for every method (benchmarks/parity.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks.parity import METHODS, STEPS, Method, compare
from finetune_trainer.models.loading import set_up_torch
from tests.tiny import make_tiny_gptq

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny_gptq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gptq(tmp_path_factory.mktemp("model") / "gptq")


@pytest.fixture(autouse=True)
def _torch_set_up() -> None:
    set_up_torch()


def named(name: str) -> Method:
    return next(method for method in METHODS if method.name == name)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_losses_are_those_of_trl_and_peft_called_by_hand(method: Method, tiny_model: Path, tiny_gptq: Path) -> None:
    parity = compare(method, tiny_gptq if method.gptq else tiny_model, CPU)
    assert len(parity.ours) == STEPS
    assert parity.ours[-1] < parity.ours[0]
    assert parity.difference < method.noise, (parity.ours, parity.by_hand)


@pytest.mark.parametrize("other", ["DoRA", "rsLoRA"])
def test_one_setting_that_differs_shows(other: str, tiny_model: Path) -> None:
    mixed = replace(named("LoRA FP32"), by_hand=named(other).by_hand)
    assert compare(mixed, tiny_model, CPU).difference > 1e-3
