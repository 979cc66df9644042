"""How devices share the work: what Auto means, and what cannot be sharded is refused by name before a GPU is held."""

from typing import Any

import pytest

from finetune_trainer.runtime.errors import InvalidConfig
from finetune_trainer.runtime.parsing import parse_config
from finetune_trainer.settings.devices import resolve_parallelism
from tests.tiny import make_config

TWO = {"gpusPerNode": 2}
FSDP = {**TWO, "strategy": "FSDP"}
FULL = {"type": "Full"}


@pytest.mark.parametrize(
    ("fields", "strategy", "sharding"),
    [
        pytest.param({"parallelism": {"gpusPerNode": 1}}, "Single", None, id="one device"),
        pytest.param(
            {"parallelism": {"gpusPerNode": 1, "strategy": "FSDP"}}, "Single", None, id="nobody to share with"
        ),
        pytest.param({"parallelism": TWO}, "DDP", None, id="adapters"),
        pytest.param({"parallelism": TWO, "method": FULL}, "FSDP", "Full", id="all weights"),
        pytest.param(
            {"parallelism": {**TWO, "fsdp": {"sharding": "GradOp"}}}, "FSDP", "GradOp", id="settings of FSDP ask for it"
        ),
        pytest.param({"parallelism": {"gpusPerNode": 0, "numNodes": 2}}, "DDP", None, id="two pods without a GPU"),
    ],
)
def test_a_strategy_that_is_left_open_follows_from_the_method(
    fields: dict[str, Any], strategy: str, sharding: str | None
) -> None:
    found = resolve_parallelism(parse_config(make_config(**fields)))
    assert (found.strategy, found.sharding) == (strategy, sharding)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"method": {"lora": {"useDora": True}}}, "method.lora.useDora"),
        ({"method": {"lora": {"modulesToSave": ["lm_head"]}}}, "method.lora.modulesToSave"),
        ({"method": {"lora": {"targetParameters": ["mlp.experts.down_proj"]}}}, "method.lora.targetParameters"),
        ({"method": {"computeDtype": "FP16"}}, "method.computeDtype FP16"),
        ({"method": FULL, "training": {"optimizer": "PagedAdamW8bit"}}, "training.optimizer PagedAdamW8bit"),
        ({"method": FULL, "training": {"optimizer": "Adafactor"}}, "training.optimizer Adafactor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_needs_whole_weights_is_not_sharded(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidConfig, match=r"Set parallelism\.strategy to DDP") as refused:
        resolve_parallelism(parse_config(make_config(parallelism=FSDP, **fields)))
    assert named in str(refused.value)


def test_an_adapters_optimizer_is_anyones() -> None:
    fields: dict[str, Any] = {"training": {"optimizer": "PagedAdamW8bit"}}
    assert resolve_parallelism(parse_config(make_config(parallelism=FSDP, **fields))).strategy == "FSDP"


def test_added_tokens_of_an_adapter_are_not_sharded() -> None:
    config = make_config(parallelism=FSDP)
    config["model"]["tokens"] = {"add": ["<|new|>"]}
    with pytest.raises(InvalidConfig, match=r"model\.tokens\.add"):
        resolve_parallelism(parse_config(config))
