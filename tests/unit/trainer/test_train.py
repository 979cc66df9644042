"""What the train stage promises besides exact resume: true losses, true gradients, a watch on the numbers."""

from __future__ import annotations

import json
import math
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from finetune_trainer.data.order import RowOrder
from finetune_trainer.evaluate import IGNORED, TokenRow, batches, compare, measure_loss, pad
from finetune_trainer.models.folder import load_tokenizer
from finetune_trainer.models.loading import (
    import_peft,
    keep_weights_on_cpu,
    load_base,
    load_finished,
    set_up_torch,
    usable_cores,
)
from finetune_trainer.progress import ExitCode
from finetune_trainer.runtime.errors import NonFiniteLoss
from finetune_trainer.training import samples
from finetune_trainer.training.adapters import build_lora
from finetune_trainer.training.collate import Collator, as_dataset
from tests.tiny import make_tiny_model
from tests.unit.trainer.runs import CPU, SETTINGS, Run, make_rows, make_table, replace_settings

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.trainer.conftest import Desk

EOS = 1
NO_DROPOUT = replace_settings(SETTINGS, lora={"dropout": 0.0})


def test_measuring_before_training_changes_no_gradient(tiny_model: Path) -> None:
    """bitsandbytes repacks 4-bit weights at the first evaluation on some CPUs: gradients are wrong from then on."""
    from peft import get_peft_model  # noqa: PLC0415 - slow

    gradients = []
    for measures in (False, True):
        torch.manual_seed(0)
        base = load_base(tiny_model, SETTINGS, CPU, torch.float32)
        if measures:
            measure_loss(base, make_rows())
        lora = build_lora(NO_DROPOUT, base)
        assert lora is not None
        model = get_peft_model(base, lora)
        ids, mask, labels = pad(make_rows(3))
        model.train()(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        gradients.append([tensor.grad for tensor in model.parameters() if tensor.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_four_bit_layers_are_never_repacked(tiny_model: Path) -> None:
    base = load_base(tiny_model, SETTINGS, CPU, torch.float32)
    layers = [module for module in base.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    assert layers
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    keep_weights_on_cpu(base)
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


class Poison(TrainerCallback):
    """Makes a weight not a number before a step."""

    def __init__(self, model: Any, step: int) -> None:
        self.model, self.step = model, step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - Trainer's
        if state.global_step == self.step:
            next(tensor for tensor in self.model.parameters() if tensor.requires_grad).data.fill_(math.nan)


def test_a_loss_that_is_no_number_stops_the_run_before_it_moves_a_weight(tiny_model: Path, tmp_path: Path) -> None:
    run = Run(tiny_model, tmp_path)
    run.attempt = 1
    trainer, _ = run.build()
    trainer.add_callback(Poison(trainer.model, 4))
    with pytest.raises(NonFiniteLoss, match=r"The loss is nan at step 5. Lower training.learningRate; the checkpoint"):
        trainer.train()
    assert run.checkpoints.newest_good() == tmp_path / "checkpoints" / "step-00000004"


@pytest.mark.parametrize("held_out", [10, 0], ids=["measured before", "nothing held out"])
@pytest.mark.parametrize(
    ("value", "held"), [(math.nan, "FP32"), (math.inf, "FP32"), (math.nan, "FP8"), (math.inf, "FP8")]
)
def test_a_base_with_lost_numbers_is_named_before_a_step_is_taken(
    desk: Desk, config: dict[str, Any], value: float, held: str, held_out: int
) -> None:
    path, name = desk.models / "tiny" / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(path)
    tensors[name][3, 5] = value
    save_file(tensors, path, metadata={"format": "pt"})
    config |= {"training": {"globalBatchSize": 8, "maxSteps": 3}, "evaluation": {"percent": held_out}}
    config["method"] = {"type": "LoRA", "baseWeights": {"format": held}}
    assert desk.run("prepare", config)[0] == 0
    code, word = desk.run("train", config)
    assert code == ExitCode.INVALID_MODEL
    assert word is not None
    assert f"model/model.safetensors: the weight {name} has values that are NaN or infinite" in word.message
    assert not list((desk.work / "checkpoints").glob("step-*"))


def test_a_loss_that_is_lost_with_good_weights_is_no_fault_of_the_model(tiny_model: Path, tmp_path: Path) -> None:
    run = Run(tiny_model, tmp_path)
    run.attempt = 1
    shutil.copytree(tiny_model, tmp_path / "model")
    trainer, _ = run.build()
    trainer.add_callback(Poison(trainer.model, 0))
    with pytest.raises(NonFiniteLoss, match="The loss is nan at step 1"):
        trainer.train()


def test_a_loss_of_exactly_zero_is_no_training(tiny_model: Path, tmp_path: Path) -> None:
    run = Run(tiny_model, tmp_path)
    run.attempt = 1
    trainer, loop = run.build()
    trainer.step_loss = torch.tensor(0.0)
    with pytest.raises(NonFiniteLoss, match=r"The loss is 0.0 at step 1"):
        loop._watch(1)


def test_gradients_that_are_not_finite_stop_the_run(tiny_model: Path, tmp_path: Path) -> None:
    run = Run(tiny_model, tmp_path)
    run.attempt = 1
    trainer, loop = run.build()
    trainer.step_loss = torch.tensor(1.0)
    trainer.step_gradient_norm = math.inf
    with pytest.raises(NonFiniteLoss, match="The gradients are not finite at step 1"):
        loop._watch(1)


def test_an_end_token_counts_also_where_the_model_pads_with_it() -> None:
    rows = [TokenRow([5, 6, 7, EOS], [IGNORED, 6, 7, EOS]), TokenRow([8, 9, EOS], [IGNORED, 9, EOS])]
    dataset = as_dataset(make_table(rows))
    batch = Collator(SETTINGS)([dataset[index] for index in range(2)])
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, EOS], [IGNORED, 9, EOS, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert pad(rows)[2].tolist() == batch["labels"].tolist()


def test_rows_of_a_step_stand_together_in_every_epoch_anew() -> None:
    order = RowOrder(list(range(10, 20)), seed=3, global_batch=4)
    first = list(order)
    order.epoch = 1
    second = list(order)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first[:4] == sorted(first[:4])
    again = RowOrder(list(range(10, 20)), seed=3, global_batch=4)
    assert list(again) == first


def test_batches_hold_no_more_tokens_than_allowed() -> None:
    rows = make_rows(30)
    found = list(batches(rows, max_tokens=40))
    assert sorted(len(row.input_ids) for batch in found for row in batch) == sorted(len(row.input_ids) for row in rows)
    assert all(len(batch) * max(len(row.input_ids) for row in batch) <= 40 for batch in found)


def test_the_measured_loss_is_the_mean_over_all_tokens_that_count(tiny_model: Path) -> None:
    base, rows = load_base(tiny_model, SETTINGS, CPU, torch.float32), make_rows()
    total, count = 0.0, 0
    for row in rows:
        logits = base(torch.tensor([row.input_ids])).logits[0, :-1].double()
        labels = torch.tensor(row.labels[1:])
        total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
        count += int((labels != IGNORED).sum())
    assert measure_loss(base, rows) == pytest.approx(total / count, abs=1e-6)
    same = compare(base, base, rows)
    assert (same.kl, same.top1, same.loss) == (0.0, 1.0, same.reference_loss)


def test_a_comparison_is_of_the_tokens_that_count_from_the_references_side(tiny_model: Path, tmp_path: Path) -> None:
    base = load_base(tiny_model, SETTINGS, CPU, torch.float32)
    other = load_finished(make_tiny_model(tmp_path / "other", seed=1), CPU, torch.float32)
    divergences, agreements, rows = [], [], make_rows()
    for row in rows:
        ids, counts = torch.tensor([row.input_ids]), torch.tensor(row.labels[1:]) != IGNORED
        p, q = (model(ids).logits[0, :-1][counts].double().log_softmax(-1) for model in (base, other))
        divergences += (p.exp() * (p - q)).sum(-1).tolist()
        agreements += (p.argmax(-1) == q.argmax(-1)).tolist()
    found = compare(base, other, rows)
    assert found.kl == pytest.approx(sum(divergences) / len(divergences), rel=1e-4)
    assert found.top1 == pytest.approx(sum(agreements) / len(agreements))
    assert found.loss == pytest.approx(measure_loss(other, rows), abs=1e-9)


def test_a_measurement_is_the_same_each_time_and_leaves_training_as_it_was(tiny_model: Path) -> None:
    base = load_base(tiny_model, SETTINGS, CPU, torch.float32)
    model = import_peft().get_peft_model(base, build_lora(SETTINGS, base))  # with dropout
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor, std=0.2)
    rows = make_rows()
    model.train()
    assert measure_loss(model, rows) == measure_loss(model, rows)
    assert model.training


def test_answers_are_greedy_and_none_depends_on_another(tiny_model: Path) -> None:
    base, tokenizer = load_base(tiny_model, SETTINGS, CPU, torch.float32), load_tokenizer(tiny_model)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [5]]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(8):
                ids.append(int(base(torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip())
    assert samples.generate(base, tokenizer, prompts, lambda *_: None, 8) == expected
    assert samples.generate(base, tokenizer, [], lambda *_: None, 8) == []


def test_the_stage_tells_losses_and_leaves_samples_and_an_adapter(desk: Desk, config: dict[str, Any]) -> None:
    config["training"] = {"globalBatchSize": 8, "maxSteps": 6, "learningRate": 0.01}
    assert desk.run("prepare", config)[0] == 0
    code, word = desk.run("train", config)
    assert code == 0
    assert word is not None
    assert word.artifact is not None
    assert word.artifact.measured is not None
    measured = word.artifact.measured
    assert measured.eval_loss is not None
    assert measured.eval_loss_base is not None
    assert measured.eval_loss < measured.eval_loss_base
    sample = json.loads((desk.work / "report" / "samples.json").read_text())[0]
    assert sample.keys() == {"prompt", "before", "after", "expected"}
    assert sample["before"] != sample["after"]
    settings = json.loads((desk.work / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "../model"
    assert (desk.work / "adapter" / "tokenizer.json").exists()
    assert (desk.work / "adapter" / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o644
    again, same = desk.run("train", config)
    assert again == 0
    assert same is not None
    assert same.manifest_digest == word.manifest_digest


def test_cores_are_those_of_the_control_group(tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    quota.write_text("100000 100000\n")
    assert usable_cores(quota) == 1
    quota.write_text("max 100000\n")
    assert usable_cores(quota) == usable_cores(tmp_path / "absent")


@pytest.fixture(autouse=True)
def _torch_set_up() -> None:
    set_up_torch()


def test_a_text_that_is_learned_whole_is_sampled_from_its_beginning() -> None:
    ids = list(range(3, 33))
    whole, asked = TokenRow(ids, [IGNORED, *ids[1:]]), TokenRow(ids, [IGNORED] * 12 + ids[12:])
    assert [len(prompt) for prompt in samples.choose_prompts([whole, asked])] == [10, 12]
    assert samples.choose_answers([whole, asked]) == [ids[10:], ids[12:]]
