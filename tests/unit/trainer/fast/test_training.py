"""Whole runs by the fast path, on CPU: what they learn, and how they go on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from finetune_trainer.fast.host import HostEmbedding
from finetune_trainer.training import trainers
from finetune_trainer.training.course import EVAL_LOSS
from tests.tiny import make_tiny_model
from tests.unit.trainer.runs import SETTINGS, CrashAfter, CrashError, Run, replace_settings, same_bits

if TYPE_CHECKING:
    from pathlib import Path

    from finetune_trainer.progress import Resolved

FAST = replace_settings(SETTINGS, fast_path=True, gradient_checkpointing="Full")
LORA = {"method": "LoRA", "base_format": "FP32", "double_quantization": False}


@pytest.fixture(scope="module")
def untied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("untied") / "qwen2", architecture="Qwen2", layers=3)


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast path wherever prepare settled it: torch's own operations stand for its kernels."""
    monkeypatch.setattr(trainers, "is_fast", lambda resolved, *_: resolved.fast_path)


def settle(**changes: Any) -> Resolved:
    return replace_settings(FAST, **changes)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("changes", [{}, LORA, LORA | {"packing": True}], ids=["NF4", "LoRA", "packed"])
def test_a_run_learns_what_it_learns_by_autograd(tiny_model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = settle(lora={"dropout": 0.0}, **changes)
    runs = {fast: Run(tiny_model, tmp_path / str(fast), settings).change(fast_path=fast) for fast in (True, False)}
    found = {fast: run.go() for fast, run in runs.items()}
    assert runs[True].loop._trainer.fast is not None
    assert runs[False].loop._trainer.fast is None
    for name, learnt in found[True].items():
        torch.testing.assert_close(learnt, found[False][name], rtol=0.02, atol=1e-4)
    lines = [[line["loss"] for line in run.loop._course.lines if "loss" in line] for run in runs.values()]
    assert lines[0] == pytest.approx(lines[1], rel=1e-4)
    assert lines[0][-1] < lines[0][0]


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("offloads", [False, True], ids=["all on the device", "offload"])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(untied_model: Path, tmp_path: Path, offloads: bool) -> None:
    unbroken = Run(untied_model, tmp_path / "unbroken", settle()).go()
    cut = Run(untied_model, tmp_path / "cut", settle(offloads=offloads))
    with pytest.raises(CrashError):
        cut.go(CrashAfter(5))
    assert same_bits(cut.go(), unbroken)
    model: Any = cut.loop._trainer.model
    assert type(model.get_input_embeddings()) is (HostEmbedding if offloads else torch.nn.Embedding)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("changes", [{}, LORA, LORA | {"packing": True}], ids=["NF4", "LoRA", "packed"])
@pytest.mark.parametrize("checkpointing", ["Full", "Selective"])
def test_offload_changes_nothing_that_is_learned_or_measured(
    untied_model: Path, tmp_path: Path, changes: dict[str, Any], checkpointing: str
) -> None:
    settings = settle(gradient_checkpointing=checkpointing, **changes)
    runs = [Run(untied_model, tmp_path / str(to_host), settings).change(offloads=to_host) for to_host in (False, True)]
    learnt = [run.go() for run in runs]
    assert same_bits(*learnt)
    measured = [[line[EVAL_LOSS] for line in run.loop._course.lines if EVAL_LOSS in line] for run in runs]
    assert measured[0]
    assert measured[0] == measured[1]


@pytest.mark.usefixtures("forced")
def test_tokens_are_counted_and_no_gradient_is_left(tiny_model: Path, tmp_path: Path) -> None:
    runs = [Run(tiny_model, tmp_path / str(fast), settle(fast_path=fast)) for fast in (True, False)]
    for run in runs:
        run.go()
    by_hand, by_autograd = ([tokens for tokens, _ in run.loop._steps] for run in runs)
    assert by_hand == by_autograd
    assert all(by_hand)
    model, fast = runs[0].loop._trainer.model, runs[0].loop._trainer.fast
    assert model is not None
    assert fast is not None
    assert all(parameter.grad is None for parameter in model.parameters())
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert {id(parameter) for parameter in fast.stepped} == trained
