"""The quantized model is small, loads anywhere, writes, and names nothing of the machine it was made on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from finetune_trainer import quantize
from finetune_trainer.config import Quantize
from finetune_trainer.evaluate import TokenRow
from finetune_trainer.progress import ExitCode

if TYPE_CHECKING:
    from tests.unit.trainer.conftest import Desk

ENTRY = {"name": "gptq4", "method": "GPTQ", "groupSize": 32, "calibration": {"samples": 8, "maxLength": 48}}


def test_a_quantized_model_loads_and_writes_in_a_bare_pod(desk: Desk, config: dict[str, Any], tmp_path: Path) -> None:
    """No compiler on the path, no network, a current folder that cannot be written."""
    config |= {
        "training": {"globalBatchSize": 8, "maxSteps": 6, "learningRate": 0.02},
        "evaluation": {"percent": 20},
        "quantize": [ENTRY],
    }
    for stage in ("prepare", "train", "merge"):
        assert desk.run(stage, config)[0] == 0
    run_bare(desk, tmp_path)
    folder = desk.work / "quantized" / "gptq4"
    manifest = json.loads((folder / "manifest.json").read_text())
    measured = manifest["result"]["artifact"]["measured"]
    assert measured["klDivergence"] > 0
    assert measured["top1Agreement"] > 0.5
    assert "perplexityIncreasePercent" in measured
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (settings["bits"], settings["group_size"], settings["quant_method"]) == (4, 32, "gptq")
    for name in ("config.json", "quantize_config.json"):
        text = (folder / name).read_text()
        assert str(tmp_path) not in text
        assert "offload" not in text
        assert "/tmp" not in text  # noqa: S108 - must not be there
    assert not list(folder.glob("*log*"))


def run_bare(desk: Desk, tmp_path: Path) -> None:
    """The quantize stage as a process of its own in an environment as poor as a pod's."""
    root = Path(__file__).parents[3]
    nothing, home, current = (tmp_path / name for name in ("bin", "home", "current"))
    for folder in (nothing, home, current):
        folder.mkdir()
    current.chmod(0o555)
    environment = {
        "PATH": str(nothing),
        "HOME": str(home),
        "TMPDIR": str(home),
        "PYTHONPATH": str(root / "trainer"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }
    folders = ["--config", str(desk.root / "job.json"), "--work", str(desk.work), "--sources", str(desk.sources)]
    done = subprocess.run(
        [sys.executable, "-m", "finetune_trainer", "quantize", *folders],
        cwd=current,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ExitCode.COMPLETED, done.stderr
    assert not list(current.iterdir())


def test_calibration_rows_are_plain_seeded_and_cut() -> None:
    entry = Quantize.model_validate(ENTRY)
    rows = [TokenRow([index] * 100, [index] * 100) for index in range(20)]
    chosen = quantize.choose_calibration(rows, entry, seed=1)
    assert chosen == quantize.choose_calibration(rows, entry, seed=1)
    assert chosen != quantize.choose_calibration(rows, entry, seed=2)
    assert [len(item["input_ids"]) for item in chosen] == [48] * 8
    assert all(type(item) is dict and item["attention_mask"] == [1] * 48 for item in chosen)
    assert len(quantize.choose_calibration(rows[:3], entry, seed=1)) == len(rows[:3])


def test_a_model_without_quantized_layers_is_found_out(tmp_path: Path) -> None:
    import torch  # noqa: PLC0415 - slow

    from finetune_trainer.errors import VerificationFailed  # noqa: PLC0415 - beside its use

    with pytest.raises(VerificationFailed, match="without a single quantized layer"):
        quantize.verify_layers(torch.nn.Linear(2, 2), tmp_path)
