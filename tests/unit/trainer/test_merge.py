"""The merged model is the one that was trained, and a merge that went wrong is found out."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_trainer import merge
from finetune_trainer.evaluate import Comparison, compare, load_adapted
from finetune_trainer.models.finished import end_tokens
from finetune_trainer.models.loading import import_peft, load_base, load_dequantized, load_finished, set_up_torch
from finetune_trainer.progress import Resolved, ResolvedLora, ResolvedMerge, Stage
from finetune_trainer.runtime.context import Context
from finetune_trainer.runtime.errors import VerificationFailed
from finetune_trainer.runtime.report import Report
from finetune_trainer.runtime.work import WorkFolder
from finetune_trainer.training.adapters import build_lora
from tests.tiny import make_tiny_gptq, make_tiny_model
from tests.unit.trainer.runs import CPU, LINEAR, SETTINGS, make_rows, replace_settings

ROWS = make_rows(20)
NEW_TOKENS = (320, 321)


@dataclass
class Bench:
    """A work folder with a base, an adapter that changes it a lot, and the tokenizer."""

    work: WorkFolder
    resolved: Resolved

    @property
    def context(self) -> Context:
        return Context(self.work, self.work.root, self.work.root, 1, Report(Stage.MERGE, 1, bar=False))

    def merge(self, base: Path | None = None, name: str = "merged") -> Comparison:
        folder = self.work.root / name
        folder.mkdir()
        found = merge.merge(base or self.work.model, folder, ROWS, self.resolved, self.context, CPU)
        assert found is not None
        return found

    def trained(self) -> Any:
        """The adapter on the base as it is trained on."""
        return load_adapted(self.work.model, self.work.adapter, self.resolved, CPU, torch.float32)


def make_bench(root: Path, make: Any = make_tiny_model, options: dict[str, Any] | None = None, **changes: Any) -> Bench:
    """`changes`: of the settings; `lora`: of the adapter's."""
    set_up_torch()
    work = WorkFolder(root)
    make(work.model, **(options or {}))
    lora = ResolvedLora(**{"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": LINEAR, **changes.pop("lora", {})})
    merging = ResolvedMerge(
        **{"base": "Original", "dtype": "BF16", "max_shard_size": "5GB", **changes.pop("merge", {})}
    )
    resolved = replace_settings(SETTINGS, **{"base_format": "FP32", "lora": lora, "merge": merging, **changes})
    AutoTokenizer.from_pretrained(work.model).save_pretrained(work.tokenizer)
    bench = Bench(work, resolved)
    _write_adapter(bench)
    return bench


def _write_adapter(bench: Bench) -> None:
    """An adapter none of whose parts is as it began."""
    base = load_base(bench.work.model, bench.resolved, CPU, torch.float32)
    adapted = import_peft().get_peft_model(base, build_lora(bench.resolved, base))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in adapted.named_parameters():
            if tensor.requires_grad:
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.add_((0.2 if "lora_" in name else 0.02) * noise.to(tensor.dtype))
    adapted.save_pretrained(bench.work.adapter)


METHODS = [
    pytest.param({}, id="LoRA on fp32"),
    pytest.param({"base_format": "BF16", "lora": {"use_rslora": True}}, id="rsLoRA on bf16"),
    pytest.param({"lora": {"use_dora": True}}, id="DoRA"),
    pytest.param({"lora": {"bias": "All"}, "options": {"architecture": "Qwen2"}}, id="biases, Qwen2"),
    pytest.param({"lora": {"modules_to_save": ("embed_tokens",)}}, id="tied embeddings saved whole"),
    pytest.param(
        {"lora": {"modules_to_save": ("embed_tokens", "lm_head")}, "options": {"architecture": "Qwen2"}},
        id="embeddings and head saved whole",
    ),
    pytest.param({"added_tokens": NEW_TOKENS}, id="new tokens, tied head"),
    pytest.param({"added_tokens": NEW_TOKENS, "options": {"architecture": "Qwen2"}}, id="new tokens, head of its own"),
    pytest.param(
        {
            "lora": {
                "target_modules": ("q_proj",),
                "target_parameters": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
            },
            "options": {"architecture": "Qwen3Moe"},
        },
        id="fused experts",
    ),
    pytest.param(
        {"lora": {"target_modules": ("attn.c_proj", "attn.c_attn")}, "options": {"architecture": "GPTBigCode"}},
        id="GPTBigCode",
    ),
    pytest.param({"lora": {"target_modules": ("c_attn",)}, "options": {"architecture": "GPT2"}}, id="Conv1D, GPT2"),
    pytest.param({"base_format": "NF4", "merge": {"base": "Dequantized"}}, id="QLoRA NF4"),
    pytest.param({"base_format": "FP4", "merge": {"base": "Dequantized"}}, id="QLoRA FP4"),
    pytest.param(
        {"base_format": "NF4", "merge": {"base": "Dequantized"}, "lora": {"use_dora": True}}, id="DoRA on NF4"
    ),
    pytest.param(
        {"base_format": "NF4", "merge": {"base": "Dequantized"}, "added_tokens": NEW_TOKENS}, id="new tokens on NF4"
    ),
    pytest.param({"base_format": "Int8", "merge": {"base": "Dequantized"}}, id="LoRA Int8, widened"),
    pytest.param({"base_format": "GPTQ", "merge": {"base": "Dequantized"}, "make": make_tiny_gptq}, id="GPTQ, widened"),
]


@pytest.mark.parametrize("changes", METHODS)
def test_the_merged_model_is_the_adapter_on_the_base_as_it_was_trained(changes: dict[str, Any], tmp_path: Path) -> None:
    bench = make_bench(tmp_path, **changes)
    assert bench.merge().kl < merge.MAX_KL / 4
    merged = load_finished(tmp_path / "merged", CPU, torch.float32)
    found = compare(bench.trained(), merged, ROWS)
    assert found.kl < merge.MAX_KL / 2
    base = load_base(bench.work.model, bench.resolved, CPU, torch.float32)
    assert compare(base, merged, ROWS).kl > 100 * found.kl, "the adapter changed the model"


@pytest.mark.parametrize(
    ("make", "held"),
    [
        pytest.param(make_tiny_model, "NF4", id="NF4, the base's own files"),
        pytest.param(make_tiny_model, "Int8", id="Int8, the base's own files"),
        pytest.param(make_tiny_gptq, "GPTQ", id="GPTQ, merge.original"),
    ],
)
def test_into_the_original_weights_the_distance_from_what_was_trained_is_told_and_fails_nothing(
    make: Any, held: str, tmp_path: Path
) -> None:
    bench = make_bench(tmp_path, make, base_format=held)
    original = make_tiny_model(bench.work.original, dtype="float16") if held == "GPTQ" else bench.work.model
    assert bench.merge(original).kl < merge.MAX_KL / 4
    told = merge.compare_with_trained(tmp_path / "merged", ROWS, bench.resolved, bench.context, CPU)
    assert told.kl > 1e-6
    assert told.measured().kl_divergence == pytest.approx(told.kl, rel=1e-5)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config")


def _without_adapter(adapted: Any) -> None:
    """What merging into the 4-bit layers does in effect: nearly all that was learned is rounded away."""
    _scaled(adapted, 0.0)


def _at_another_scale(adapted: Any) -> None:
    _scaled(adapted, 2.0)


def _scaled(adapted: Any, factor: float) -> None:
    for name, tensor in adapted.named_parameters():
        if "lora_B" in name:
            tensor.data.mul_(factor)


def _without_the_new_rows(adapted: Any) -> None:
    for name, tensor in adapted.named_parameters():
        if "trainable_tokens" in name:
            tensor.data.zero_()


@pytest.mark.parametrize(
    ("breaking", "changes"),
    [
        pytest.param(_without_adapter, {}, id="the adapter is lost"),
        pytest.param(_at_another_scale, {}, id="the scale is another"),
        pytest.param(_without_the_new_rows, {"added_tokens": tuple(range(280, 322))}, id="new rows are lost"),
    ],
)
def test_a_merge_that_lost_something_is_found_out(
    breaking: Any, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(tmp_path, **changes)
    write = merge.write_merged

    def broken(adapted: Any, *rest: Any) -> None:
        lost = copy.deepcopy(adapted)
        breaking(lost)
        write(lost, *rest)

    monkeypatch.setattr(merge, "write_merged", broken)
    with pytest.raises(VerificationFailed, match="not the one that was trained"):
        bench.merge()


def test_the_reference_is_the_base_that_was_trained_on_and_not_the_original(tiny_model: Path) -> None:
    trained_on = load_base(tiny_model, SETTINGS, CPU, torch.float32)
    dequantized = load_dequantized(tiny_model, SETTINGS, CPU, torch.float32)
    original = load_finished(tiny_model, CPU, torch.float32)
    assert compare(trained_on, dequantized, ROWS).kl == pytest.approx(0.0, abs=1e-9)
    assert compare(trained_on, original, ROWS).kl > 1e-6
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(dequantized.state_dict()[name], original.state_dict()[name])


@pytest.mark.parametrize(
    ("kl", "same"),
    [
        pytest.param(1e-4, True, id="rounding to bf16"),
        pytest.param(0.03, False, id="a requantized layer"),
        pytest.param(float("nan"), False, id="no number at all"),
    ],
)
def test_the_gate_stands_between_rounding_and_a_broken_merge(kl: float, same: bool) -> None:
    found = Comparison(reference_loss=1.0, loss=1.0, kl=kl, top1=1.0)
    if same:
        merge.verify_same(found)
    else:
        with pytest.raises(VerificationFailed):
            merge.verify_same(found)


# What is in the folder


def test_the_folder_is_what_servers_read(tmp_path: Path) -> None:
    """A model like Llama 2, whose generation settings transformers refuses to save once they are changed."""
    bench = make_bench(tmp_path, merge={"dtype": "FP16", "max_shard_size": "100KB"})
    _change_json(bench.work.model / "generation_config.json", eos_token_id=2, temperature=0.6, do_sample=False)
    (bench.work.model / "LICENSE.txt").write_text("as you like")
    tokenizer = AutoTokenizer.from_pretrained(bench.work.model)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(bench.work.tokenizer)
    bench.merge()
    merged = tmp_path / "merged"
    shards = list(merged.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert max(path.stat().st_size for path in shards) < 110_000
    config, generation = (_read_json(merged / name) for name in ("config.json", "generation_config.json"))
    assert config["dtype"] == "float16"
    assert (generation["eos_token_id"], generation["pad_token_id"]) == ([1, 2], 1)
    assert (config["eos_token_id"], config["pad_token_id"]) == (1, 1)
    assert str(tmp_path) not in (merged / "config.json").read_text()
    assert (merged / "LICENSE.txt").read_text() == "as you like"
    read = AutoTokenizer.from_pretrained(merged)
    assert (read.pad_token, read.chat_template) == (tokenizer.eos_token, tokenizer.chat_template)
    assert AutoModelForCausalLM.from_pretrained(merged, dtype="auto").dtype == torch.float16


@pytest.mark.parametrize(
    ("known", "told"),
    [
        pytest.param(None, 5, id="none"),
        pytest.param(5, 5, id="the same"),
        pytest.param(2, [5, 2], id="another"),
        pytest.param([2, 5, 7], [5, 2, 7], id="one of several"),
    ],
)
def test_an_answer_ends_at_the_trained_token_and_at_those_the_base_knew(known: Any, told: Any) -> None:
    assert end_tokens(known, 5) == told


def test_weights_that_fp16_cannot_hold_are_refused_with_the_way_out(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, merge={"dtype": "FP16"})
    adapted = merge.load_reference(bench.work.model, bench.work.adapter, bench.resolved, CPU)
    adapted.get_base_model().model.norm.weight.data[0] = 1e6
    (tmp_path / "out").mkdir()
    assert bench.resolved.merge is not None
    with pytest.raises(VerificationFailed, match=r"norm.weight are not finite in FP16. Set merge.dtype to BF16"):
        merge.write_merged(adapted, tmp_path / "out", bench.work.model, bench.work.tokenizer, bench.resolved.merge)


def _read_json(path: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(path.read_text())
    return settings


def _change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(_read_json(path) | changes))
