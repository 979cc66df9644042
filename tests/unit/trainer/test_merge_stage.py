"""The merge stage as a job meets it: what is worse than allowed, or broken, ends it and nothing is published."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from finetune_trainer.models import loading
from finetune_trainer.models.folder import ADAPTER_WEIGHTS
from finetune_trainer.progress import ExitCode, LastWord, Reason
from finetune_trainer.runtime import manifest
from tests.tiny import make_config, make_instructions, make_jsonl, make_tiny_model
from tests.unit.trainer.conftest import Desk

CONFIG = make_config(
    evaluation={"percent": 20},
    training={"maxSteps": 6, "maxLength": 64, "globalBatchSize": 8, "learningRate": 0.02},
    merge={"base": "Dequantized", "maxKLDivergence": 1e-9},
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A job that has come as far as its adapter."""
    desk = Desk(tmp_path_factory.mktemp("trained"))
    make_tiny_model(desk.models / "tiny")
    make_jsonl(desk.datasets / "rows.jsonl", make_instructions(40))
    for stage in ("prepare", "train"):
        code, word = desk.run(stage, CONFIG)
        assert code == ExitCode.COMPLETED, word
    return desk


@pytest.fixture
def desk(trained: Desk, tmp_path: Path) -> Desk:
    return Desk(Path(shutil.copytree(trained.root, tmp_path / "job")))


def merge_in_vain(desk: Desk) -> tuple[int, LastWord]:
    """Run the stage; what it says. Nothing of it is left where others look."""
    code, word = desk.run("merge", CONFIG)
    assert word is not None
    assert word.artifact is None
    assert not desk.work.joinpath("merged").exists()
    assert not list(desk.work.glob(".merged*"))
    return code, word


def test_a_gate_that_fires_ends_the_stage_with_reason_figures_and_remedy(desk: Desk) -> None:
    code, word = merge_in_vain(desk)
    assert code == ExitCode.GATE_FAILED
    assert word.reason is Reason.GATE_FAILED
    assert "nats a token (KL) away from the trained one, merge.maxKLDivergence allows 1e-09" in word.message
    assert "held-out loss" in word.message
    assert "Set merge.dtype to FP32" in word.message


def test_an_adapter_that_is_merged_ten_times_too_large_is_found_out(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = loading.put_adapter

    def scaled(base: Any, adapter: Path) -> Any:
        adapted = put(base, adapter)
        for name, tensor in adapted.named_parameters():
            if "lora_B" in name:
                tensor.data.mul_(10.0)
        return adapted

    monkeypatch.setattr("finetune_trainer.models.streaming.put_adapter", scaled)
    code, word = merge_in_vain(desk)
    assert code == ExitCode.VERIFICATION_FAILED
    assert "The merged model is not the one that was trained: KL" in word.message
    assert "held-out loss" in word.message


def scale_adapter(desk: Desk, factor: float) -> None:
    """Change the adapter's files."""
    path = desk.work / "adapter" / ADAPTER_WEIGHTS
    tensors = {name: tensor * factor if "lora_B" in name else tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def prove_anew(folder: Path) -> None:
    """Let an artifact's manifest say of its files what they are now."""
    found = manifest.read(folder)
    files = tuple(
        entry.model_copy(update={"sha256": manifest.sha256_of_file(folder / entry.path)}) for entry in found.files
    )
    (folder / manifest.MANIFEST_NAME).write_bytes(found.model_copy(update={"files": files}).to_bytes())


def test_an_adapter_whose_files_were_scaled_by_ten_is_found_out(desk: Desk) -> None:
    scale_adapter(desk, 10.0)
    code, word = merge_in_vain(desk)
    assert code == ExitCode.VERIFICATION_FAILED
    assert f"{ADAPTER_WEIGHTS} is not what was written: its SHA-256 differs" in word.message


def test_an_adapter_that_came_out_scaled_by_ten_is_found_out(desk: Desk) -> None:
    """Its manifest is good, and the merged model is the adapter on its base: what training measured tells."""
    before = manifest.read(desk.work / "adapter").result.artifact
    assert before is not None
    assert before.measured is not None
    scale_adapter(desk, 10.0)
    prove_anew(desk.work / "adapter")
    code, word = merge_in_vain(desk)
    assert code == ExitCode.VERIFICATION_FAILED
    assert "The adapter is not the one that was trained: held-out loss" in word.message
    assert f"{before.measured.eval_loss:.4f} when training ended" in word.message


@pytest.mark.parametrize("name", ["model/model.safetensors", "adapter/adapter_model.safetensors"])
def test_a_truncated_file_is_named(desk: Desk, name: str) -> None:
    path = desk.work / name
    path.write_bytes(path.read_bytes()[:-100])
    code, word = merge_in_vain(desk)
    assert code == ExitCode.VERIFICATION_FAILED
    assert name in word.message
    assert "bytes, its manifest says" in word.message
