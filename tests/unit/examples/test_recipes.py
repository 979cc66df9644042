"""The recipes are what people follow by hand, setting by setting; a small twin differs in sizes alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_operator.api import Spec
from finetune_trainer.data.templates import Sandbox

RECIPES = Path(__file__).parents[3] / "examples" / "recipes"
KEYS = sorted(path.name for path in RECIPES.glob("*.yaml"))

MAY_DIFFER = (
    "model.huggingFace", "model.modelScope", "model.volume", "model.tokens.pad",
    "datasets.*.huggingFace", "datasets.*.volume", "evaluation.datasets.*.huggingFace", "evaluation.datasets.*.volume",
    "method.computeDtype", "method.galore.rank", "method.galore.updateInterval",
    "training.maxLength", "training.maxSteps", "training.numTrainEpochs", "training.learningRate",
    "training.loggingSteps", "training.eval.everySteps", "training.checkpoint.everySteps",
    "training.checkpoint.everyEpoch", "training.globalBatchSize",
    "parallelism.numNodes", "parallelism.gpusPerNode",
    "merge.original", "quantize.*.calibration", "tracking.wandb.apiKeySecretRef",
    "pod", "output",
)  # fmt: skip
"""Where the model and the rows come from, how large and how long, and what a CPU cannot do. Small random models learn
with a larger rate in the few steps that they are given."""

CPU_HOLDS = {"BF16": "FP32"}
"""Of GaLore's weights: AdamW in 16 bits is for GPUs."""


def load(path: Path) -> dict[str, Any]:
    spec: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))["spec"]
    return spec


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each setting with its path; a list of blocks counts as one block, `*`."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from leaves(part, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for part in value:
            yield from leaves(part, f"{path}.*")
    else:
        yield path, value


def settings(spec: dict[str, Any]) -> dict[str, Any]:
    return {
        path: value
        for path, value in leaves(spec)
        if not any(path == free or path.startswith(free + ".") for free in MAY_DIFFER)
    }


@pytest.mark.parametrize("name", KEYS)
def test_a_recipe_and_its_twin_are_valid(name: str) -> None:
    for path in (RECIPES / name, RECIPES / "small" / name):
        Spec.model_validate(load(path))


@pytest.mark.parametrize("name", KEYS)
def test_a_twin_differs_from_its_recipe_in_sizes_alone(name: str) -> None:
    recipe, twin = settings(load(RECIPES / name)), settings(load(RECIPES / "small" / name))
    if recipe.get("method.type") == "GaLore":
        recipe["method.baseWeights.format"] = CPU_HOLDS[recipe["method.baseWeights.format"]]
    assert twin == recipe


def test_every_recipe_has_a_twin_and_no_twin_is_without() -> None:
    assert sorted(path.name for path in (RECIPES / "small").glob("*.yaml")) == KEYS


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param(
            "1-llama3-8b-qlora",
            {
                "method.baseWeights.format": "NF4", "method.baseWeights.doubleQuantization": True,
                "method.lora.r": 16, "method.lora.alpha": 16, "method.lora.dropout": 0.05, "method.lora.bias": "None",
                "method.lora.targetModules":
                    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
                "training.maxLength": 512, "training.perDeviceTrainBatchSize": 8, "training.globalBatchSize": 32,
                "training.optimizer": "PagedAdamW8bit", "training.learningRate": 1e-4,
                "training.lrScheduler": "Linear", "training.warmupRatio": 0.1, "training.numTrainEpochs": 3,
                "training.eval.everySteps": 100, "training.checkpoint.everyEpoch": True,
                "merge.base": "Dequantized", "quantize.*.method": "AWQ", "quantize.*.groupSize": 128,
                "quantize.*.bits": 4, "quantize.*.symmetric": False,
            },
            id="1",
        ),
        pytest.param(
            "2-llama2-70b-fsdp",
            {
                "method.type": "Full", "method.computeDtype": "BF16", "training.packing": "On",
                "training.maxLength": 2048, "training.maxSteps": 500, "training.loggingSteps": 25,
                "training.eval.everySteps": 100, "training.checkpoint.everySteps": 250,
                "training.perDeviceTrainBatchSize": 1, "training.globalBatchSize": 16, "training.learningRate": 5e-5,
                "training.lrScheduler": "Cosine", "training.weightDecay": 0.01, "training.warmupRatio": 0.03,
                "training.gradientCheckpointing": "Full", "parallelism.numNodes": 2, "parallelism.gpusPerNode": 8,
                "parallelism.strategy": "FSDP", "parallelism.fsdp.sharding": "Full",
                "datasets.*.columns.text": "content",
            },
            id="2",
        ),
        pytest.param(
            "3a-qwen-1.8b-gptq",
            {
                "method.baseWeights.format": "GPTQ", "method.computeDtype": "BF16", "training.numTrainEpochs": 5,
                "training.perDeviceTrainBatchSize": 1, "training.globalBatchSize": 2 * 16,
                "training.checkpoint.everySteps": 1000, "training.checkpoint.keep": 10, "training.learningRate": 1e-5,
                "training.lrScheduler": "Cosine", "training.weightDecay": 0.1, "training.adamBeta2": 0.95,
                "training.warmupRatio": 0.01, "training.maxLength": 512, "training.gradientCheckpointing": "Full",
                "parallelism.gpusPerNode": 2, "parallelism.strategy": "DDP", "merge.base": "Original",
                "merge.maxShardSize": "2048MB",
            },
            id="3a",
        ),
        pytest.param(
            "3b-llama2-7b-qlora",
            {
                "method.lora.r": 64, "method.lora.alpha": 16, "method.lora.dropout": 0.1,
                "method.baseWeights.format": "NF4", "method.baseWeights.doubleQuantization": False,
                "method.computeDtype": "FP16", "merge.base": "Original",
            },
            id="3b",
        ),
        pytest.param(
            "4-starcoder-lora-int8",
            {
                "method.type": "LoRA", "method.baseWeights.format": "Int8", "method.computeDtype": "FP16",
                "method.lora.r": 16, "method.lora.alpha": 32, "method.lora.dropout": 0.05,
                "method.lora.targetModules": ["attn.c_proj", "attn.c_attn"], "training.perDeviceTrainBatchSize": 1,
                "training.globalBatchSize": 16, "training.learningRate": 5e-6, "training.eval.everySteps": 100,
                "training.checkpoint.everySteps": 100, "training.restoreBest": True, "merge.dtype": "FP16",
            },
            id="4",
        ),
        pytest.param(
            "5-llama2-7b-dolly",
            {
                "method.baseWeights.format": "NF4", "method.baseWeights.doubleQuantization": True,
                "method.lora.r": 16, "method.lora.alpha": 64, "method.lora.dropout": 0.1,
                "training.perDeviceTrainBatchSize": 1, "training.globalBatchSize": 4, "training.warmupSteps": 2,
                "training.maxSteps": 20, "training.learningRate": 2e-4, "training.optimizer": "PagedAdamW8bit",
                "training.restoreBest": True, "merge.dtype": "BF16",
            },
            id="5",
        ),
    ],
)  # fmt: skip
def test_a_recipe_has_the_settings_that_people_follow(name: str, expected: dict[str, Any]) -> None:
    found = dict(leaves(load(RECIPES / f"{name}.yaml")))
    assert {path: found.get(path) for path in expected} == expected


@pytest.mark.parametrize("context", ["", "It is the capital."])
def test_recipe_5_writes_the_prompt_that_its_notebook_writes(context: str) -> None:
    (dataset,) = load(RECIPES / "5-llama2-7b-dolly.yaml")["datasets"]
    row = {"instruction": "Where is it?", "context": context, "response": "In Paris."}
    text = "".join(Sandbox().from_string(dataset[name]).render(row) for name in ("promptTemplate", "responseTemplate"))
    blurb = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    parts = [
        blurb,
        "### Instruction:\nWhere is it?",
        f"Input:\n{context}" if context else None,
        "### Response:\nIn Paris.",
        "### End",
    ]
    assert text == "\n\n".join(part for part in parts if part)
