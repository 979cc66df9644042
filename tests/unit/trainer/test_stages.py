"""What each stage leaves, whatever the method: the next one finds it, and another config's is never taken."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from finetune_trainer.progress import ExitCode
from tests.tiny import make_tiny_gptq, make_tiny_model

if TYPE_CHECKING:
    from tests.unit.trainer.conftest import Desk

FEW_STEPS = {"training": {"globalBatchSize": 8, "maxSteps": 4, "learningRate": 0.01}, "evaluation": {"percent": 20}}
GPTQ4 = {"name": "gptq4", "method": "GPTQ", "groupSize": 32, "calibration": {"samples": 8, "maxLength": 48}}


def evaluated(desk: Desk, config: dict[str, Any]) -> dict[str, float]:
    """Held-out loss of every artifact, by its name."""
    assert desk.run("evaluate", config)[0] == 0
    figures: dict[str, dict[str, float]] = json.loads((desk.work / "report" / "evaluation.json").read_text())
    return {name: each["evalLoss"] for name, each in figures.items()}


@pytest.mark.parametrize("kind", ["Full", "GaLore"])
def test_a_model_trained_whole_is_finished_and_can_be_quantized(desk: Desk, config: dict[str, Any], kind: str) -> None:
    config |= FEW_STEPS | {"method": {"type": kind}, "quantize": [GPTQ4]}
    assert desk.run("prepare", config)[0] == 0
    code, word = desk.run("train", config)
    assert code == 0
    assert word is not None
    assert word.artifact is not None
    assert (word.artifact.name, word.artifact.type, word.artifact.path) == ("model", "Merged", "merged")
    code, word = desk.run("merge", config)
    assert code == ExitCode.INVALID_CONFIG
    assert word is not None
    assert f"method.type {kind} trains the model itself: there is nothing to merge" in word.message
    assert desk.run("quantize", config)[0] == 0
    losses = evaluated(desk, config)
    assert list(losses) == ["base", "model", "gptq4"]
    assert losses["model"] < losses["base"]


def test_an_adapter_on_gptq_goes_into_the_original_weights(desk: Desk, config: dict[str, Any]) -> None:
    make_tiny_gptq(desk.models / "gptq")
    make_tiny_model(desk.models / "original", dtype="float16")
    config["model"]["volume"]["path"] = "gptq"
    config |= FEW_STEPS | {
        "method": {"baseWeights": {"format": "GPTQ"}},
        "merge": {
            "base": "Original",
            "original": {"volume": {"claimName": "models", "path": "original"}},
            "maxShardSize": "100KB",
        },
    }
    for stage in ("prepare", "train"):
        assert desk.run(stage, config)[0] == 0
    code, word = desk.run("merge", config)
    assert code == 0
    assert word is not None
    assert "on the GPTQ weights that it was trained on" in word.message
    assert len(list((desk.work / "merged").glob("*.safetensors"))) > 1
    assert desk.run("merge", config)[0] == 0, "it is there already"
    losses = evaluated(desk, config)
    assert list(losses) == ["base", "adapter", "merged"]
    assert max(losses["adapter"], losses["merged"]) < losses["base"]


def test_another_model_than_the_original_is_refused_in_prepare(desk: Desk, config: dict[str, Any]) -> None:
    make_tiny_model(desk.models / "original", hidden_size=128)
    config["merge"] = {"original": {"volume": {"claimName": "models", "path": "original"}}}
    code, word = desk.run("prepare", config)
    assert code == ExitCode.INVALID_MODEL
    assert word is not None
    assert "merge.original: layer model.layers.0.self_attn.q_proj is 128 x 128, of the base 64 x 64" in word.message
    assert not (desk.work / "data").exists()


def test_settings_of_later_stages_are_not_what_an_adapter_depends_on(desk: Desk, config: dict[str, Any]) -> None:
    """Merged with other settings it is another artifact of the same adapter."""
    config |= FEW_STEPS
    for stage in ("prepare", "train"):
        assert desk.run(stage, config)[0] == 0
    adapter = json.loads((desk.work / "adapter" / "manifest.json").read_text())["configDigest"]
    other = desk.work.rename(desk.root / "first")
    assert desk.run("prepare", config | {"merge": {"dtype": "FP32"}, "quantize": [GPTQ4]})[0] == 0
    assert desk.run("train", config | {"merge": {"dtype": "FP32"}, "quantize": [GPTQ4]})[0] == 0
    assert json.loads((desk.work / "adapter" / "manifest.json").read_text())["configDigest"] == adapter
    assert (other / "adapter").is_dir()
