"""Settings that were left open come out the same for the same facts; what does not fit is refused by name."""

from operator import attrgetter
from typing import Any

import pytest

from finetune_trainer.models.folder import ModelFacts
from finetune_trainer.progress import DataFacts, Resolved
from finetune_trainer.runtime.errors import InvalidConfig
from finetune_trainer.runtime.parsing import parse_config
from finetune_trainer.settings.resolve import SourceFacts, resolve
from tests.tiny import make_config

SMOLLM2 = {"model.layers.0.self_attn.q_proj": 576, "model.layers.0.mlp.down_proj": 1536}


def settle(
    rows: int = 800, layers: dict[str, int] | None = None, limit: int | None = 8192, held_out: int = 10, **fields: Any
) -> Resolved:
    data = DataFacts(
        train_rows=rows, eval_rows=held_out, dropped_rows=0, train_tokens=1, loss_tokens=1,
        length_p50=1, length_p95=1, length_p99=1, length_max=1,
    )  # fmt: skip
    facts = ModelFacts("LlamaForCausalLM", 1000, limit, SMOLLM2 if layers is None else layers)
    config = parse_config(make_config(**fields))
    return resolve(config, SourceFacts("sha256:m", None, "sha256:d"), facts, data)


GPU = {"parallelism": {"gpusPerNode": 1}}
QUANTIZE = [{"name": "q", "method": "GPTQ"}]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param({}, {"total_steps": 50, "warmup_steps": 5, "eval_steps": 5, "checkpoint_steps": 5}, id="defaults"),
        pytest.param({"rows": 16_000}, {"total_steps": 1000, "warmup_steps": 30}, id="3% warm-up from 1,000 steps"),
        pytest.param({"rows": 15_984}, {"total_steps": 999, "warmup_steps": 100}, id="10% warm-up below"),
        pytest.param({"rows": 17}, {"total_steps": 2}, id="the last step of an epoch takes what is left"),
        pytest.param({"rows": 1}, {"total_steps": 1, "warmup_steps": 0, "eval_steps": 1}, id="one row is one step"),
        pytest.param({"training": {"numTrainEpochs": 0.1}, "rows": 17}, {"total_steps": 1}, id="part of an epoch"),
        pytest.param(
            {"training": {"maxSteps": 75}}, {"total_steps": 75, "num_train_epochs": 1.5}, id="steps instead of epochs"
        ),
        pytest.param({"training": {"globalBatchSize": 6}}, {"micro_batch_size": 3}, id="micro-batch: largest divisor"),
        pytest.param(
            {"training": {"globalBatchSize": 7}},
            {"micro_batch_size": 1, "gradient_accumulation_steps": 7},
            id="a prime batch goes row by row",
        ),
        pytest.param({}, {"compute_dtype": "FP32", "gradient_checkpointing": "Off"}, id="CPU"),
        pytest.param(GPU, {"compute_dtype": "BF16", "gradient_checkpointing": "Full"}, id="GPU"),
        pytest.param({"limit": 512}, {"max_length": 512}, id="the model's limit"),
        pytest.param(
            {"training": {"eval": {"everySteps": 20}, "checkpoint": {"everyPercent": 25, "keep": 5}}},
            {"eval_steps": 20, "checkpoint_steps": 13, "checkpoint_keep": 5},
            id="steps and percent of the run",
        ),
        pytest.param(
            {"training": {"numTrainEpochs": 3, "checkpoint": {"everyEpoch": True}}, "rows": 100},
            {"total_steps": 21, "checkpoint_steps": 7},
            id="an epoch's steps",
        ),
        pytest.param(
            {"training": {"maxSteps": 3, "checkpoint": {"everyEpoch": True}}},
            {"checkpoint_steps": 3},
            id="an epoch that the run does not reach the end of",
        ),
        pytest.param(
            {"training": {"earlyStopping": {"patience": 2}}, "rows": 160},
            {"early_stopping.patience": 2, "early_stopping.threshold": 0.0},
            id="early stopping counts any gain",
        ),
        pytest.param({"limit": None}, {"max_length": 2048}, id="a model without limit"),
        pytest.param({"method": {"lora": {"r": 8}}}, {"lora.r": 8, "lora.alpha": 16}, id="alpha is twice r"),
        pytest.param({}, {"lora.target_modules": ("q_proj", "down_proj")}, id="all linear layers by name"),
        pytest.param(
            {"method": {"lora": {"targetModules": ["self_attn.q_proj"]}}},
            {"lora.target_modules": ("self_attn.q_proj",)},
            id="a longer end of a name",
        ),
    ],
)
def test_open_settings_are_fixed(given: dict[str, Any], expected: dict[str, Any]) -> None:
    resolved = settle(**given)
    assert {name: attrgetter(name)(resolved) for name in expected} == expected


@pytest.mark.parametrize(
    ("columns", "size"), [({"a": 4096}, 128), (SMOLLM2, 64), ({"a": 96}, 32)], ids=["128", "SmolLM2", "32"]
)
def test_the_group_size_divides_every_layer(columns: dict[str, int], size: int) -> None:
    assert settle(layers=columns, quantize=QUANTIZE).quantize[0].group_size == size


@pytest.mark.parametrize(
    ("given", "words"),
    [
        pytest.param(
            {"quantize": [{"name": "q", "method": "GPTQ", "groupSize": 128}]},
            r"quantize 'q': groupSize 128 .*576, 1536 columns\). Use 64 or 32",
            id="group size",
        ),
        pytest.param({"layers": {"a": 100}, "quantize": QUANTIZE}, "none of the group sizes", id="no group size fits"),
        pytest.param({"layers": {}}, "no linear layers", id="nothing to adapt"),
        pytest.param(
            {"method": {"lora": {"targetModules": ["qproj"]}}},
            "no linear layer 'qproj'.*q_proj, down_proj",
            id="modules",
        ),
        pytest.param({"training": {"maxLength": 9000}}, "training.maxLength is 9,000.*8,192", id="length"),
        pytest.param(
            {"training": {"earlyStopping": {"patience": 2}}, "held_out": 0},
            r"training.earlyStopping needs a held-out loss, but no row was held out. Raise evaluation.percent",
            id="early stopping on nothing",
        ),
        pytest.param({"training": {"restoreBest": True}, "held_out": 0}, "training.restoreBest", id="best of nothing"),
        pytest.param({"training": {"eval": {"everySteps": 2}}, "held_out": 0}, "training.eval", id="measuring nothing"),
        pytest.param({"training": {"warmupSteps": 50}}, "training.warmupSteps is 50.*50 steps", id="warm-up"),
        pytest.param({"training": {"perDeviceTrainBatchSize": 3}}, "to a multiple of 3", id="micro-batch"),
        pytest.param({"method": {"computeDtype": "FP16"}}, "FP16 needs a GPU", id="half precision on CPU"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_way_out(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        settle(**given)


def test_an_interval_longer_than_the_run_is_the_whole_run_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    training = {"eval": {"everySteps": 100}, "checkpoint": {"everySteps": 51}}
    resolved = settle(training=training)
    assert (resolved.eval_steps, resolved.checkpoint_steps) == (50, 50)
    assert "training.eval.everySteps is 100, the whole run has 50 steps" in caplog.text
    assert "training.checkpoint.everySteps is 51" in caplog.text
