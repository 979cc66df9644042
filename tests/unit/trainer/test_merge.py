"""The merged model is the one that was trained, and a merge that went wrong is found out."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune_trainer import merge
from finetune_trainer.errors import VerificationFailed
from finetune_trainer.evaluate import Comparison, compare
from finetune_trainer.loading import load_base, load_dequantized, load_finished
from finetune_trainer.progress import ExitCode, Reason
from tests.unit.trainer.runs import CPU, SETTINGS, make_rows

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.trainer.conftest import Desk


@pytest.fixture
def trained(desk: Desk, config: dict[str, Any]) -> tuple[Desk, dict[str, Any]]:
    """A desk with an adapter that learned something."""
    config["training"] = {"globalBatchSize": 8, "maxSteps": 12, "learningRate": 0.02}
    config["evaluation"] = {"percent": 20}
    assert desk.run("prepare", config)[0] == desk.run("train", config)[0] == 0
    return desk, config


def test_merged_equals_the_adapter_on_the_dequantized_base(
    trained: tuple[Desk, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, config = trained
    asked: list[int] = []

    def on_cpu(weights_bytes: int) -> torch.device:
        asked.append(weights_bytes)
        return CPU

    monkeypatch.setattr(merge, "working_device", on_cpu)
    code, word = desk.run("merge", config)
    assert code == 0
    assert word is not None
    assert word.artifact is not None
    assert word.artifact.measured is not None
    measured = word.artifact.measured
    assert measured.kl_divergence is not None
    assert measured.kl_divergence < merge.MAX_KL / 10
    assert measured.top1_agreement == pytest.approx(1.0, abs=0.05)
    merged = desk.work / "merged"
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.dtype == torch.bfloat16
    assert asked == [2 * 4 * model.num_parameters()], "room for two models in fp32"
    assert not hasattr(model.config, "quantization_config")
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in merged.iterdir()
    }
    assert {path.stat().st_mode & 0o777 for path in merged.iterdir()} == {0o644}


def test_a_merge_that_lost_the_adapter_is_found_out(
    trained: tuple[Desk, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What merging into the 4-bit layers does in effect: nearly all that was learned is rounded away."""
    desk, config = trained
    write = merge.write_merged

    def without_adapter(adapted: Any, folder: Any) -> None:
        lost = copy.deepcopy(adapted)
        for name, tensor in lost.named_parameters():
            if "lora_B" in name:
                tensor.data.zero_()
        write(lost, folder)

    monkeypatch.setattr(merge, "write_merged", without_adapter)
    code, word = desk.run("merge", config)
    assert code == ExitCode.VERIFICATION_FAILED
    assert word is not None
    assert word.reason is Reason.VERIFICATION_FAILED
    assert "not the one that was trained" in word.message
    assert not (desk.work / "merged").exists()


def test_the_reference_is_the_base_that_was_trained_on_and_not_the_original(tiny_model: Path) -> None:
    trained_on = load_base(tiny_model, SETTINGS, CPU, torch.float32)
    dequantized = load_dequantized(tiny_model, SETTINGS, CPU, torch.float32)
    original = load_finished(tiny_model, CPU, torch.float32)
    rows = make_rows()
    assert compare(trained_on, dequantized, rows).kl == pytest.approx(0.0, abs=1e-9)
    assert compare(trained_on, original, rows).kl > 1e-6
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(dequantized.state_dict()[name], original.state_dict()[name])


@pytest.mark.parametrize(
    ("kl", "same"),
    [
        pytest.param(1e-4, True, id="rounding to bf16"),
        pytest.param(0.03, False, id="a requantized layer"),
        pytest.param(float("nan"), False, id="no number at all"),
    ],
)
def test_the_gate_stands_between_rounding_and_a_broken_merge(kl: float, same: bool) -> None:
    found = Comparison(reference_loss=1.0, loss=1.0, kl=kl, top1=1.0)
    if same:
        merge.verify_same(found)
    else:
        with pytest.raises(VerificationFailed):
            merge.verify_same(found)
