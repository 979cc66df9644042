"""DPO: its settings, its reference, its figures, and a resume as exact as SFT's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from finetune_trainer.arguments import DPO_LOSSES
from finetune_trainer.config import DpoLossType
from finetune_trainer.dpo import collate
from finetune_trainer.errors import InvalidConfig
from finetune_trainer.evaluate import IGNORED, TokenRow
from finetune_trainer.loading import load_base
from finetune_trainer.model import ModelFacts, load_tokenizer
from finetune_trainer.parsing import parse_config
from finetune_trainer.progress import ResolvedDpo
from finetune_trainer.resolve import check_early, resolve_dpo
from finetune_trainer.trainers import build_trainer
from tests.tiny import make_config
from tests.unit.trainer.runs import CPU, SETTINGS, make_pair_table, make_pairs, replace_settings, same_bits, weights

if TYPE_CHECKING:
    from pathlib import Path

    from finetune_trainer.progress import Resolved

FACTS = ModelFacts("LlamaForCausalLM", 1000, 512, {"model.layers.0.self_attn.q_proj": 64})


def dpo(training: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    return make_config(objective={"type": "DPO", "dpo": settings}, training=training or {})


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


DPO = replace_settings(
    SETTINGS, objective="DPO", dpo=ResolvedDpo(beta=0.2, loss_type="Sigmoid", label_smoothing=0.0), total_steps=4
)
WHOLE = replace_settings(DPO, method="Full", base_format="FP32", lora=None, learning_rate=0.001)


def build(model: Path, scratch: Path, settings: Resolved = DPO) -> Any:
    bases = [load_base(model, settings, CPU, torch.float32) for _ in range(1 if settings.lora else 2)]
    table = make_pair_table(make_pairs())
    return build_trainer(bases[0], load_tokenizer(model), table, settings, torch.float32, scratch, *bases[1:])


def logprobs(model: Any, row: TokenRow) -> float:
    """Of the tokens that count, given those before them."""
    with torch.no_grad():
        logits = model(torch.tensor([row.input_ids])).logits[0, :-1].double()
    targets = torch.tensor(row.labels[1:])
    return -float(torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"))


def test_every_loss_is_one_of_trl() -> None:
    assert set(DPO_LOSSES) == set(DpoLossType)


@pytest.mark.parametrize("loss", DpoLossType)
def test_every_loss_moves_the_adapter(loss: DpoLossType, tiny_model: Path, tmp_path: Path) -> None:
    settings = replace_settings(DPO, dpo={"loss_type": loss.value, "label_smoothing": 0.1}, total_steps=2)
    trainer = build(tiny_model, tmp_path, settings)
    before = weights(trainer.model)
    trainer.train()
    assert math.isfinite(trainer.measure(make_pairs(4)).loss)
    assert not same_bits(before, weights(trainer.model))


@pytest.mark.parametrize("settings", [DPO, WHOLE], ids=["adapter", "all weights"])
def test_the_reference_is_what_training_began_with(settings: Resolved, tiny_model: Path, tmp_path: Path) -> None:
    trainer, pairs = build(tiny_model, tmp_path, settings), make_pairs()
    untouched = load_base(tiny_model, settings, CPU, torch.float32)
    begun = trainer.measure(pairs)
    assert (begun.loss, begun.preference_accuracy, begun.reward_margin) == (pytest.approx(math.log(2)), 0.0, 0.0)
    trainer.train()
    margins = [
        0.2
        * (
            (logprobs(trainer.model.eval(), pair.chosen) - logprobs(untouched, pair.chosen))
            - (logprobs(trainer.model.eval(), pair.rejected) - logprobs(untouched, pair.rejected))
        )
        for pair in pairs
    ]
    measured = trainer.measure(pairs)
    assert measured.reward_margin == pytest.approx(sum(margins) / len(pairs), rel=1e-4)
    assert measured.preference_accuracy == sum(margin > 0 for margin in margins) / len(pairs) > 0.5
    losses = [math.log1p(math.exp(-margin)) for margin in margins]
    assert measured.loss == pytest.approx(sum(losses) / len(pairs), rel=1e-5)
    assert trainer.measure(pairs) == measured


def test_answers_of_several_turns_keep_the_places_that_count() -> None:
    pair = make_pairs(1)[0]
    holes = [IGNORED if place == 4 else label for place, label in enumerate(pair.chosen.labels)]
    batch = collate([type(pair)(TokenRow(pair.chosen.input_ids, holes), pair.rejected)])
    assert batch["completion_mask"][0, :6].tolist() == [0, 0, 0, 1, 0, 1]
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["completion_mask"][1].sum() == len(pair.rejected.input_ids) - 3


def test_dropout_is_off_in_model_and_reference(tiny_model: Path, tmp_path: Path) -> None:
    assert DPO.lora is not None
    assert DPO.lora.dropout
    layers = [module for module in build(tiny_model, tmp_path).model.modules() if isinstance(module, torch.nn.Dropout)]
    assert layers
    assert all(layer.p == 0 for layer in layers)
