"""The merged model is the one that was trained, and a merge that went wrong is found out."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_trainer import merge
from finetune_trainer.config import Merge, MergeBase
from finetune_trainer.evaluate import IGNORED, Comparison, TokenRow, compare, load_adapted, measure_loss
from finetune_trainer.models import loading, streaming
from finetune_trainer.models.finished import end_tokens
from finetune_trainer.models.loading import import_peft, load_base, load_dequantized, load_finished, set_up_torch
from finetune_trainer.models.recording import record
from finetune_trainer.models.sharding import build_empty
from finetune_trainer.progress import Measured, Resolved, ResolvedDpo, ResolvedLora, ResolvedMerge, Stage
from finetune_trainer.runtime import manifest
from finetune_trainer.runtime.context import Context
from finetune_trainer.runtime.errors import GateFailed, VerificationFailed
from finetune_trainer.runtime.manifest import Made, Result, Target
from finetune_trainer.runtime.report import Report
from finetune_trainer.runtime.work import WorkFolder
from finetune_trainer.training.adapters import build_lora
from tests.tiny import make_tiny_gptq, make_tiny_model
from tests.unit.trainer.runs import CPU, LINEAR, SETTINGS, Run, make_rows, replace_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

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

    def merging(self, rows: Sequence[TokenRow] = ROWS, **asked: Any) -> merge.Merging:
        """What the stage merges with these settings; `asked`: fields of the config's merge."""
        return merge.Merging(self.context, self.resolved, rows, Merge(**asked))

    def merge(self, rows: Sequence[TokenRow] = ROWS, **asked: Any) -> Result:
        """Merge into `merged/` of the work folder, as the stage does."""
        aside = self.work.root / "aside"
        for folder in (self.work.merged, aside):
            folder.mkdir()
        return merge.merge(self.merging(rows, **asked), self.work.merged, aside)

    def again(self) -> Bench:
        """The same, not merged yet."""
        for folder in (self.work.merged, self.work.root / "aside"):
            shutil.rmtree(folder)
        return self

    def measure(self, **asked: Any) -> Measured:
        """The figures of `merge`."""
        made = self.merge(**asked).artifact
        assert made is not None
        assert made.measured is not None
        return made.measured

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
    pytest.param({"base_format": "FP8", "merge": {"base": "Dequantized"}}, id="LoRA FP8, widened"),
    pytest.param(
        {
            "base_format": "FP8",
            "merge": {"base": "Dequantized"},
            "lora": {"target_modules": ("c_attn",)},
            "options": {"architecture": "GPT2"},
        },
        id="Conv1D in FP8, widened",
    ),
    pytest.param({"base_format": "GPTQ", "merge": {"base": "Dequantized"}, "make": make_tiny_gptq}, id="GPTQ, widened"),
]


@pytest.mark.parametrize("changes", METHODS)
def test_the_merged_model_is_the_adapter_on_the_base_as_it_was_trained(changes: dict[str, Any], tmp_path: Path) -> None:
    changes = {**changes, "merge": {**changes.get("merge", {}), "max_shard_size": "100KB"}}
    bench = make_bench(tmp_path, **changes)
    kl = bench.measure().kl_divergence
    assert kl is not None
    assert kl < merge.MAX_KL / 4
    if bench.resolved.base_format != "GPTQ":
        assert_same_as_whole(bench, tmp_path / "whole")
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
        pytest.param(make_tiny_model, "FP8", id="FP8, the base's own files"),
        pytest.param(make_tiny_gptq, "GPTQ", id="GPTQ, merge.original"),
    ],
)
def test_into_the_original_weights_the_distance_from_what_was_trained_is_told_and_fails_nothing(
    make: Any, held: str, tmp_path: Path
) -> None:
    bench = make_bench(tmp_path, make, base_format=held)
    asked: dict[str, Any] = {}
    if held == "GPTQ":
        make_tiny_model(bench.work.original, dtype="float16")
        asked = {"original": {"volume": {"claimName": "models", "path": "original"}}}
    found = bench.merge(**asked)
    assert f"nats a token from the adapter on the {held} weights that it was trained on" in found.message
    assert found.artifact is not None
    assert found.artifact.measured is not None
    trained = merge.load_reference(bench.merging(), MergeBase.DEQUANTIZED)
    told = compare(trained, load_finished(bench.work.merged, CPU, torch.float32), ROWS)
    assert told.kl > 1e-6
    assert found.artifact.measured.kl_divergence == pytest.approx(told.kl, rel=1e-5)
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
    put = loading.put_adapter

    def broken(base: Any, adapter: Path) -> Any:
        adapted = put(base, adapter)
        breaking(adapted)
        return adapted

    monkeypatch.setattr("finetune_trainer.models.streaming.put_adapter", broken)
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
def test_the_limit_stands_between_rounding_and_a_broken_merge(kl: float, same: bool) -> None:
    assert merge.is_same(Comparison(reference_loss=1.0, loss=1.0, kl=kl, top1=1.0)) is same


def test_what_rounding_alone_changed_beyond_the_limit_is_told_and_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "MAX_KL", 1e-8)
    bench = make_bench(tmp_path)
    found = bench.merge()
    assert found.artifact is not None
    assert found.artifact.measured is not None
    rounding = found.artifact.measured.kl_divergence
    assert rounding is not None
    assert rounding > merge.MAX_KL
    assert f"Rounding to BF16 alone took it {rounding:.1e} nats a token" in found.message
    assert "merge.dtype FP32 rounds nothing" in found.message
    assert {path.name for path in bench.work.merged.glob("*.safetensors")} == {"model.safetensors"}
    assert load_file(bench.work.merged / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("loss", "trained", "same"),
    [
        pytest.param(2.003, 2.0, True, id="computed in fewer bits"),
        pytest.param(2.2, 2.0, False, id="worse"),
        pytest.param(1.8, 2.0, False, id="better is another one too"),
        pytest.param(float("nan"), 2.0, False, id="no number at all"),
        pytest.param(9.0, None, True, id="training measured none"),
        pytest.param(float("nan"), None, False, id="no number, training measured none"),
    ],
)
def test_an_adapter_is_the_one_that_was_trained_if_it_is_worth_the_same(
    loss: float, trained: float | None, same: bool
) -> None:
    if same:
        merge.verify_trained(loss, trained)
    else:
        with pytest.raises(VerificationFailed, match=f"held-out loss {loss:.4f} nats a token"):
            merge.verify_trained(loss, trained)


PAIRS = ResolvedDpo(beta=0.1, loss_type="Sigmoid", label_smoothing=0.0)


@pytest.mark.parametrize(
    ("changes", "measured", "known"),
    [
        pytest.param({}, Measured(eval_loss=1.5), 1.5, id="of tokens"),
        pytest.param({"dpo": PAIRS}, Measured(eval_loss=0.5), None, id="of pairs"),
        pytest.param({}, None, None, id="nothing was held out"),
    ],
)
def test_what_training_measured_is_read_where_it_is_a_loss_of_tokens(
    changes: dict[str, Any], measured: Measured | None, known: float | None, tmp_path: Path
) -> None:
    context = Run(tmp_path, tmp_path, replace_settings(SETTINGS, **changes)).context()
    adapter = Target(Stage.TRAIN, context.work.adapter, "adapter", "sha256:0")
    made = Made(name="adapter", type="Adapter", measured=measured)
    manifest.publish(adapter, 1, lambda _: Result(message="Trained.", artifact=made))
    assert merge.read_trained_loss(context) == known


# Into which weights


def _written_by(model: Any, count: int = 12) -> list[TokenRow]:
    """Rows that the model itself writes, greedily: no other model is as sure of them."""
    rows = []
    for prompt in make_rows(count, seed=5):
        ids = list(prompt.input_ids[:3])
        with torch.no_grad():
            for _ in range(16):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        rows.append(TokenRow(ids, [IGNORED] * 3 + ids[3:]))
    return rows


@pytest.mark.parametrize("better", [MergeBase.DEQUANTIZED, MergeBase.ORIGINAL])
def test_auto_takes_the_weights_in_which_the_adapter_has_the_lower_loss_and_tells_both(
    better: MergeBase, tmp_path: Path
) -> None:
    bench = make_bench(tmp_path, base_format="NF4", merge={"base": "Auto"})
    rows = _written_by(merge.load_reference(bench.merging(), better))
    found = bench.merge(rows)
    assert found.artifact is not None
    measured = found.artifact.measured
    assert measured is not None
    losses = {
        base: measure_loss(merge.load_reference(bench.merging(), base), rows)
        for base in (MergeBase.DEQUANTIZED, MergeBase.ORIGINAL)
    }
    assert min(losses, key=losses.__getitem__) is better
    assert measured.eval_loss_dequantized == pytest.approx(losses[MergeBase.DEQUANTIZED], rel=1e-5)
    assert measured.eval_loss_original == pytest.approx(losses[MergeBase.ORIGINAL], rel=1e-5)
    assert measured.eval_loss == pytest.approx(losses[better], abs=1e-3)
    assert f"Merged into the {better.lower()} weights" in found.message
    assert f"{losses[MergeBase.DEQUANTIZED]:.4f} in the dequantized weights" in found.message
    assert f"{losses[MergeBase.ORIGINAL]:.4f} in the original ones" in found.message
    merged = load_finished(bench.work.merged, CPU, torch.float32)
    assert compare(merge.load_reference(bench.merging(), better), merged, rows).kl < merge.MAX_KL / 4


@pytest.mark.parametrize(
    ("losses", "base"),
    [
        pytest.param((1.0, 0.9), "Original", id="lower in the original"),
        pytest.param((0.9, 1.0), "Dequantized", id="lower in the dequantized"),
        pytest.param((1.0, 1.0), "Dequantized", id="equal"),
        pytest.param((1.0, float("nan")), "Dequantized", id="the original computes no numbers"),
    ],
)
def test_the_lower_loss_decides(losses: tuple[float, float], base: str) -> None:
    settings = ResolvedMerge(base="Auto", dtype="BF16", max_shard_size="5GB")
    measured = dict(zip((MergeBase.DEQUANTIZED, MergeBase.ORIGINAL), losses, strict=True))
    assert merge.choose_base(settings, measured) == base
    assert merge.choose_base(settings.model_copy(update={"base": "Original"}), measured) == "Original"


def test_original_weights_that_compute_no_numbers_are_not_taken_and_no_record_has_the_loss(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, make_tiny_gptq, base_format="GPTQ", merge={"base": "Auto"})
    make_tiny_model(bench.work.original, dtype="float16")
    _change_weights(bench.work.original, {"model.norm.weight": float("nan")})
    found = bench.merge(original={"volume": {"claimName": "models", "path": "original"}})
    assert "Merged into the dequantized weights" in found.message
    assert "nan in the original ones" in found.message
    assert found.artifact is not None
    assert found.artifact.measured is not None
    assert found.artifact.measured.eval_loss_original is None


@pytest.mark.parametrize(
    ("held", "base"), [("NF4", MergeBase.DEQUANTIZED), ("Int8", MergeBase.ORIGINAL), ("FP8", MergeBase.ORIGINAL)]
)
def test_auto_without_held_out_rows_goes_by_the_kind_of_the_base_and_says_so(
    held: str, base: MergeBase, tmp_path: Path
) -> None:
    bench = make_bench(tmp_path, base_format=held, merge={"base": "Auto"})
    found = bench.merge([])
    assert f"Merged into the {base.lower()} weights, as merge.base Auto does with an {held} base" in found.message
    assert "nothing was held out" in found.message
    merged = load_finished(bench.work.merged, CPU, torch.float32)
    assert compare(merge.load_reference(bench.merging(), base), merged, ROWS).kl < merge.MAX_KL / 4


# Gates


GATES = [
    pytest.param({"base_format": "NF4", "merge": {"base": "Dequantized"}}, "max_kl_divergence", id="KL, Dequantized"),
    pytest.param({"base_format": "FP32"}, "max_kl_divergence", id="KL, a base that is not quantized"),
    pytest.param({"base_format": "NF4"}, "max_loss_increase", id="loss, Original"),
]


@pytest.mark.parametrize(("changes", "gate"), GATES)
def test_a_gate_fails_what_is_worse_with_figures_and_remedy_and_passes_what_is_not(
    changes: dict[str, Any], gate: str, tmp_path: Path
) -> None:
    bench = make_bench(tmp_path, **changes)
    measured = bench.measure()
    figure = measured.kl_divergence if gate == "max_kl_divergence" else measured.loss_increase
    assert figure is not None
    bench.again().measure(**{gate: figure + 1e-6})
    with pytest.raises(GateFailed) as caught:
        bench.again().measure(**{gate: max(figure / 2, 0.0) if gate == "max_kl_divergence" else figure - 1e-3})
    told = str(caught.value)
    field = {"max_kl_divergence": "merge.maxKLDivergence", "max_loss_increase": "merge.maxLossIncrease"}[gate]
    assert f"{field} allows" in told
    assert f"KL {measured.kl_divergence:.3g}" in told
    assert f"held-out loss {measured.eval_loss:.4f}" in told
    assert "Set merge." in told


@pytest.mark.parametrize("gate", ["max_kl_divergence", "max_loss_increase"])
def test_what_is_no_number_passes_no_gate(gate: str, tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    nothing = Comparison(reference_loss=1.0, loss=float("nan"), kl=float("nan"), top1=0.0)
    asked: dict[str, Any] = {gate: 1.0}
    with pytest.raises(GateFailed):
        merge.pass_gates(nothing, MergeBase.ORIGINAL, bench.merging(**asked))
    merge.pass_gates(nothing, MergeBase.ORIGINAL, bench.merging())


def test_other_weights_than_the_trained_ones_are_asked_for_their_loss_alone(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, base_format="NF4", merge={"base": "Auto"})
    far = Comparison(reference_loss=1.0, loss=0.9, kl=0.3, top1=0.7)
    both = bench.merging(max_kl_divergence=0.01, max_loss_increase=0.0)
    merge.pass_gates(far, MergeBase.ORIGINAL, both)
    with pytest.raises(GateFailed, match=r"0.3 nats a token \(KL\) away"):
        merge.pass_gates(far, MergeBase.DEQUANTIZED, both)


# A part at a time


def assert_same_as_whole(bench: Bench, aside: Path) -> None:
    """What was merged a part at a time is bit by bit what merging the whole model gives."""
    assert bench.resolved.merge is not None
    aside.mkdir()
    merge.merge_whole(bench.merging(), MergeBase(bench.resolved.merge.base), aside)
    ours, theirs = _read_weights(bench.work.merged), _read_weights(aside)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert sorted(path.name for path in bench.work.merged.iterdir()) == sorted(path.name for path in aside.iterdir())
    for name in ("config.json", "generation_config.json"):
        assert _read_json(bench.work.merged / name) == _read_json(aside / name)
    index, its = (_read_json(folder / "model.safetensors.index.json") for folder in (bench.work.merged, aside))
    assert index["metadata"] == its["metadata"]
    assert index["weight_map"].keys() == ours.keys()
    assert all((bench.work.merged / file).exists() for file in index["weight_map"].values())
    assert max(path.stat().st_size for path in bench.work.merged.glob("*.safetensors")) < 110_000


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_a_model_that_does_not_fall_into_parts_is_merged_whole_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench = make_bench(tmp_path, make_tiny_gptq, base_format="GPTQ", merge={"base": "Dequantized"})
    bench.merge()
    assert "Layers that GPTQ packed are only widened with the whole model at hand" in caplog.text
    weightless = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(streaming.CannotStreamError, match="does not say what its blocks are"):
        streaming.parts_of(weightless)


def test_only_one_part_of_the_model_is_ever_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench(tmp_path, options={"layers": 6})
    seen: list[int] = []
    load = loading.load_placed

    def counted(*args: Any) -> Any:
        model = load(*args)
        seen.append(sum(each.numel() for each in model.parameters() if each.device != streaming.META))
        return model

    monkeypatch.setattr("finetune_trainer.models.streaming.load_placed", counted)
    bench.merge()
    empty = build_empty(bench.work.model)
    assert sum(seen) == sum(each.numel() for each in empty.parameters())
    assert max(seen) < sum(seen) / 4


def test_a_model_whose_body_is_on_disk_answers_with_the_same_bits(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, options={"architecture": "Qwen2"})
    whole, kept = (merge.load_reference(bench.merging(), MergeBase.ORIGINAL) for _ in range(2))
    loss = record(kept, tmp_path / "aside", lambda model: measure_loss(model, ROWS))
    held = [sum(each.numel() for each in model.parameters()) for model in (whole, kept)]
    assert held[1] < held[0] / 4
    found = compare(kept, whole, ROWS)
    assert (found.kl, found.top1, found.reference_loss) == (0.0, 1.0, found.loss)
    assert found.loss == pytest.approx(loss, rel=1e-9)
    assert not list((tmp_path / "aside").iterdir()), "what was read is dropped"


# What is broken


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("model.layers.1.mlp.up_proj.weight", float("nan"), id="a weight that the adapter changes"),
        pytest.param("model.norm.weight", float("inf"), id="a weight that it leaves alone"),
    ],
)
def test_a_weight_that_is_no_number_fails_the_merge(name: str, value: float, tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    _change_weights(bench.work.model, {name: value})
    with pytest.raises(VerificationFailed, match="not finite"):
        bench.merge([])


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
    assert {tensor.dtype for tensor in _read_weights(merged).values()} == {torch.float16}


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
    _change_weights(bench.work.model, {"model.norm.weight": 1e6})
    with pytest.raises(VerificationFailed, match=r"norm.weight are not finite in FP16. Set merge.dtype to BF16"):
        bench.merge()


def _read_json(path: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(path.read_text())
    return settings


def _change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(_read_json(path) | changes))


def _change_weights(folder: Path, first_values: dict[str, float]) -> None:
    """Set the first number of some weights of a model's only file."""
    weights = load_file(folder / "model.safetensors")
    for name, value in first_values.items():
        weights[name].view(-1)[0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
