"""Recipe 1 at its real size: the settings of its example, on the shape of Llama-3-8B with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tests.gpu.bench import GIB, LLAMA_8B, Bench, Outcome, make_texts
from tests.tiny import EOS

if TYPE_CHECKING:
    from collections.abc import Callable

RECIPE = Path(__file__).parents[2] / "examples" / "recipes" / "1-llama3-8b-qlora.yaml"
RECIPE_GIB = 16.6
STEPS = 12


def volume(claim: str, path: str) -> dict[str, Any]:
    return {"volume": {"claimName": claim, "path": path}}


def recipe(steps: int = STEPS) -> dict[str, Any]:
    """Its training half, with sources of this machine and few steps; what it sets stays as it is."""
    spec = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["spec"]
    training = {name: value for name, value in spec["training"].items() if name != "numTrainEpochs"}
    return {
        "model": {**volume("models", "8b"), "attention": spec["model"]["attention"], "tokens": {"pad": EOS}},
        "datasets": [{"name": "rows", "format": "Text", **volume("datasets", "long.jsonl")}],
        "evaluation": {"datasets": [{"name": "test", "format": "Text", **volume("datasets", "test.jsonl")}]},
        "method": spec["method"],
        "training": {**training, "maxSteps": steps},
        "parallelism": {"gpusPerNode": 1},
    }


def test_recipe_1_at_its_real_size_stays_within_its_memory(bench: Bench, told: Callable[[Outcome], Outcome]) -> None:
    datasets = bench.root / "sources" / "datasets"
    rows = 32 * STEPS
    make_texts(datasets / "long.jsonl", range(rows), tokens=1200)
    make_texts(datasets / "test.jsonl", range(rows, rows + 8), tokens=1200)
    bench.make_model("8b", LLAMA_8B)
    outcome = told(bench.train(f"recipe 1, 8B ({RECIPE_GIB} GiB by hand)", recipe()))
    assert outcome.last_loss < outcome.first_loss
    assert outcome.peak_bytes < RECIPE_GIB * GIB
