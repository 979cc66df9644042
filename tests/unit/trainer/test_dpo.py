"""DPO: its settings, its reference, its figures, and a resume as exact as SFT's."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from finetune_trainer.config import DpoLossType
from finetune_trainer.evaluate import IGNORED, TokenRow
from finetune_trainer.models.folder import ModelFacts, load_tokenizer
from finetune_trainer.models.loading import load_base
from finetune_trainer.progress import Resolved, ResolvedDpo
from finetune_trainer.runtime.errors import InvalidConfig
from finetune_trainer.runtime.parsing import parse_config
from finetune_trainer.settings.resolve import check_early, resolve_dpo
from finetune_trainer.training import state
from finetune_trainer.training.adapters import go_on_from
from finetune_trainer.training.arguments import DPO_LOSSES
from finetune_trainer.training.dpo import collate
from finetune_trainer.training.trainers import build_trainer
from tests.tiny import make_config, make_jsonl
from tests.unit.trainer.gang import Gang
from tests.unit.trainer.runs import (
    CPU,
    LINEAR,
    SETTINGS,
    CrashAfter,
    CrashError,
    Run,
    make_pair_table,
    make_pairs,
    replace_settings,
    same_bits,
    weights,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.unit.trainer.conftest import Desk

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

NOTHING_LEARNED = {"loss": math.log(2), "preference_accuracy": 0.0, "reward_margin": 0.0}


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
    assert asdict(trainer.measure(pairs)) == pytest.approx(NOTHING_LEARNED)
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


@pytest.fixture
def adapted_model(tiny_model: Path, tmp_path: Path) -> Path:
    """A base with an adapter to go on from, on layers, on embeddings and on rows of tokens: none of them zero."""
    folder = shutil.copytree(tiny_model, tmp_path / "adapted")
    lora = LoraConfig(
        r=4,
        target_modules=[*LINEAR, "embed_tokens"],
        modules_to_save=["norm"],
        use_dora=True,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), lora)
    torch.manual_seed(5)
    with torch.no_grad():
        for tensor in dict(state.trained(model)).values():
            tensor.add_(torch.randn_like(tensor) * 0.05)
    model.save_pretrained(str(folder / "adapter"))
    return folder


def test_a_run_that_goes_on_from_an_adapter_has_that_adapter_as_its_reference(
    adapted_model: Path, tmp_path: Path
) -> None:
    base = go_on_from(load_base(adapted_model, DPO, CPU, torch.float32), adapted_model)
    pairs, start = make_pairs(), weights(base)
    trainer: Any = build_trainer(
        base, load_tokenizer(adapted_model), make_pair_table(pairs), DPO, torch.float32, tmp_path / "scratch"
    )
    assert same_bits(start, weights(trainer.model))
    assert asdict(trainer.measure(pairs)) == pytest.approx(NOTHING_LEARNED)
    trainer.train()
    assert start.keys() == weights(trainer.model).keys()
    reference = dict(trainer.model.named_parameters())
    for name, tensor in start.items():
        assert torch.equal(reference[name.replace("default", "ref")], tensor), name
        assert not torch.equal(reference[name], tensor), name


def make_preferences(count: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"What is {n} plus one?\n", "chosen": f"It is {n + 1}.", "rejected": f"Who knows {n}, really?"}
        for n in range(count)
    ]


@pytest.mark.parametrize("method", ["QLoRA", "Full"])
def test_the_stage_tells_how_often_the_better_answer_is_preferred(method: str, desk: Desk) -> None:
    make_jsonl(desk.datasets / "rows.jsonl", make_preferences(48))
    job = dpo({"globalBatchSize": 8, "maxSteps": 8, "learningRate": 0.005}, beta=0.2)
    job |= {"method": {"type": method}, "evaluation": {"percent": 25}}
    assert desk.run("prepare", job)[0] == 0
    code, word = desk.run("train", job)
    assert code == 0
    assert word is not None
    assert word.artifact is not None
    measured = word.artifact.measured
    assert measured is not None
    assert measured.eval_loss_base == pytest.approx(math.log(2), abs=1e-5)
    assert measured.eval_loss is not None
    assert measured.eval_loss < math.log(2)
    assert measured.preference_accuracy == 1.0
    assert measured.perplexity is None


def test_of_an_adapter_that_goes_on_the_reference_is_not_published(desk: Desk, adapted_model: Path) -> None:
    shutil.move(adapted_model / "adapter", desk.models / "start")
    make_jsonl(desk.datasets / "rows.jsonl", make_preferences(16))
    job = dpo({"globalBatchSize": 8, "maxSteps": 2})
    job["model"]["adapter"] = {"volume": {"claimName": "models", "path": "start"}}
    assert desk.run("prepare", job)[0] == 0
    assert desk.run("train", job)[0] == 0
    assert (desk.work / "adapter" / "adapter_model.safetensors").is_file()
    assert not list((desk.work / "adapter").glob("*/"))


@pytest.mark.parametrize("kind", ["adapter", "all weights", "an adapter that goes on"])
def test_after_a_crash_the_weights_are_those_of_an_unbroken_run(
    kind: str, tiny_model: Path, adapted_model: Path, tmp_path: Path
) -> None:
    model = adapted_model if kind == "an adapter that goes on" else tiny_model
    settings = replace_settings(WHOLE if kind == "all weights" else DPO, total_steps=5)
    unbroken = Run(model, tmp_path / "unbroken", settings).go()
    run = Run(model, tmp_path / "broken", settings)
    with pytest.raises(CrashError):
        run.go(CrashAfter(3))
    assert run.checkpoints.newest_good() == tmp_path / "broken" / "checkpoints" / "step-00000002"
    assert same_bits(run.go(), unbroken)


def train_together(model: str, root: str, settings: dict[str, Any], rows: int) -> dict[str, Any]:
    """What each rank does: train; losses, figures and whether weights are spread over the ranks."""
    run = Run(Path(model), Path(root), Resolved.model_validate(settings), rows)
    run.go()
    trainer: Any = run.loop._trainer
    lines = run.loop._course.lines
    return {
        "losses": [line["loss"] for line in lines if "loss" in line],
        "measured": asdict(trainer.measure(make_pairs(7, seed=3))),
        "kinds": {type(value.data).__name__ for value in trainer.model.parameters()},
    }


@pytest.fixture(scope="module")
def gang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gang]:
    gang = Gang(2, tmp_path_factory.mktemp("gang")).start()
    yield gang
    gang.stop()


@pytest.mark.parametrize(
    ("settings", "strategy", "rows"),
    [
        pytest.param(DPO, "DDP", 9, id="adapter; at an epoch's end a process has no pair"),
        pytest.param(WHOLE, "FSDP", 11, id="all weights; at an epoch's end a process has fewer pairs"),
    ],
)
def test_two_processes_train_and_measure_as_one(
    settings: Resolved, strategy: str, rows: int, gang: Gang, tiny_model: Path, tmp_path: Path
) -> None:
    settings = replace_settings(settings, total_steps=6)
    alone: dict[str, Any] = {"settings": settings.model_dump(by_alias=True), "root": str(tmp_path / "one")}
    shared = replace_settings(settings, parallelism={"strategy": strategy, "world_size": 2, "sharding": "Full"})
    together: dict[str, Any] = {"settings": shared.model_dump(by_alias=True), "root": str(tmp_path / "two")}
    one = train_together(str(tiny_model), **alone, rows=rows)
    first, second = gang.call(f"{__name__}:train_together", model=str(tiny_model), **together, rows=rows)
    assert first["losses"] == second["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert first["measured"] == second["measured"] == pytest.approx(one["measured"], rel=1e-4)
    assert ("DTensor" in first["kinds"]) == (strategy == "FSDP")
