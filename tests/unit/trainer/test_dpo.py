"""DPO: its settings, its reference, its figures, and a resume as exact as SFT's."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_trainer.errors import InvalidConfig
from finetune_trainer.model import ModelFacts
from finetune_trainer.parsing import parse_config
from finetune_trainer.progress import ResolvedDpo
from finetune_trainer.resolve import check_early, resolve_dpo
from tests.tiny import make_config

FACTS = ModelFacts("LlamaForCausalLM", 1000, 512, {"model.layers.0.self_attn.q_proj": 64})


def dpo(
    training: dict[str, Any] | None = None, method: dict[str, Any] | None = None, **settings: Any
) -> dict[str, Any]:
    return make_config(
        objective={"type": "DPO", "dpo": settings}, training=training or {}, **({"method": method} if method else {})
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param({}, ResolvedDpo(beta=0.1, loss_type="Sigmoid", label_smoothing=0.0), id="TRL's"),
        pytest.param(
            {"lossType": "ExoPair"},
            ResolvedDpo(beta=0.1, loss_type="ExoPair", label_smoothing=0.001),
            id="ExoPair needs some smoothing",
        ),
        pytest.param(
            {"lossType": "Robust", "beta": 0.5},
            ResolvedDpo(beta=0.5, loss_type="Robust", label_smoothing=0.1),
            id="Robust without smoothing would be Sigmoid",
        ),
        pytest.param(
            {"lossType": "Aot", "labelSmoothing": 0.2},
            ResolvedDpo(beta=0.1, loss_type="Aot", label_smoothing=0.2),
            id="as set",
        ),
    ],
)
def test_open_settings_are_fixed(settings: dict[str, Any], expected: ResolvedDpo) -> None:
    assert resolve_dpo(parse_config(dpo(**settings))) == expected


@pytest.mark.parametrize(
    ("config", "words"),
    [
        pytest.param(dpo(labelSmoothing=0.1), "labelSmoothing is for lossType .*not Sigmoid: drop it", id="unused"),
        pytest.param(dpo(lossType="Sft"), "objective.dpo.lossType", id="no preference in it"),
        pytest.param(
            dpo({"globalBatchSize": 4, "perDeviceTrainBatchSize": 1}, lossType="AotUnpaired"),
            "compares the pairs of a micro-batch, which has one. Set training.perDeviceTrainBatchSize to 2",
            id="nothing to sort",
        ),
        pytest.param(
            {**dpo(), "method": {"lora": {"dropout": 0.1}}},
            "method.lora.dropout is for objective SFT.*drop it",
            id="dropout",
        ),
        pytest.param(dpo({"packing": "On"}), "training.packing: rows of DPO are not packed", id="packing"),
    ],
)
def test_what_does_not_go_with_dpo_is_refused_with_the_way_out(config: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        check_early(parse_config(config), FACTS)
