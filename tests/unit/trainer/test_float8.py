"""A base in FP8: how its weights are rounded and loaded, their products, adapters on them, and a job to its merge."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from finetune_trainer.models import float8
from finetune_trainer.models.float8 import FLOAT8, Float8Linear, narrow, widen
from finetune_trainer.models.folder import ADAPTER_WEIGHTS
from finetune_trainer.models.loading import load_base, load_dequantized
from finetune_trainer.progress import ExitCode
from finetune_trainer.training.adapters import build_lora
from tests.unit.trainer.runs import CPU, LINEAR, SETTINGS, replace_settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from tests.unit.trainer.conftest import Desk

FP8 = replace_settings(SETTINGS, method="LoRA", base_format="FP8", double_quantization=False)
WIDE = [torch.float32, torch.bfloat16, torch.float16]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Rounding


@pytest.mark.parametrize("dtype", WIDE)
def test_a_weight_is_off_by_a_sixteenth_of_itself_at_most(dtype: torch.dtype) -> None:
    """Values over 12 powers of ten; those that are subnormal in e4m3 are off by at most a 1,024th of the scale."""
    weight = (draw(64, 512) * 10 ** draw(64, 512, seed=1)).to(dtype)
    held, scales = narrow(weight)
    off = (widen(held, scales, torch.float32) - weight.float()).abs()
    normal = weight.float().abs() >= weight.float().abs().amax(1, keepdim=True) / 28672
    assert 0.1 < normal.float().mean() < 0.99, "both kinds are among them"
    assert (off <= weight.float().abs() / 16)[normal].all()
    assert (off <= scales[:, None] / 1024 * 1.000001)[~normal].all(), "but for the rounding of fp32"


@pytest.mark.parametrize("dtype", WIDE)
def test_the_largest_of_a_row_becomes_448_and_a_scale_is_that_of_its_row_alone(dtype: torch.dtype) -> None:
    weight = (draw(8, 32) * 10 ** torch.linspace(-4, 4, 8)[:, None]).to(dtype)
    weight[3] = 0
    held, scales = narrow(weight)
    largest = weight.float().abs().amax(1)
    assert held.dtype is FLOAT8
    assert scales.dtype is torch.float32
    assert torch.equal(scales[largest > 0], (largest * (1 / 448))[largest > 0])
    assert held.float().abs().amax(1).tolist() == [448.0] * 3 + [0.0] + [448.0] * 4
    assert not widen(held, scales, dtype)[3].any()


def test_a_row_with_what_is_no_number_has_none_left() -> None:
    weight = draw(3, 16)
    weight[0, 5], weight[2, 7] = float("nan"), float("-inf")
    found = widen(*narrow(weight), torch.float32)
    assert found.isnan().all(1).tolist() == [True, False, True]
    assert found[1].isfinite().all()


@pytest.mark.parametrize("dtype", WIDE)
def test_widening_rounds_once(dtype: torch.dtype) -> None:
    held, scales = narrow(draw(64, 96))
    assert torch.equal(widen(held, scales, dtype), (held.float() * scales[:, None]).to(dtype))


# Products


def make_layer(dtype: torch.dtype, *, bias: bool = True) -> tuple[Float8Linear, torch.nn.Linear]:
    """A layer in FP8, and the same widened; the bias trains."""
    layer = Float8Linear(48, 32, bias=bias, source_cls=torch.nn.Linear)
    held, scales = narrow(draw(32, 48, seed=2))
    layer.weight.data, layer.scales = held, scales
    wide = torch.nn.Linear(48, 32, bias=bias, dtype=dtype)
    wide.weight.data = (held.float() * scales[:, None]).to(dtype)
    if bias:
        layer.bias.data = wide.bias.data.clone()
    return layer, wide


def run(layer: torch.nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """What it gives, and the gradients of its input and its bias."""
    x = x.clone().requires_grad_()
    given = layer(x)
    given.backward(draw(*given.shape, dtype=given.dtype, seed=3))
    assert x.grad is not None
    bias: Any = layer.bias
    return (given.detach(), x.grad, *(() if bias is None else (bias.grad,)))


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("shape", [(48,), (7, 48), (2, 5, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_and_gradients_are_those_of_the_widened_layer_to_the_bit(
    dtype: torch.dtype, shape: tuple[int, ...], *, bias: bool
) -> None:
    layer, wide = make_layer(dtype, bias=bias)
    found, expected = run(layer, draw(*shape, dtype=dtype)), run(wide, draw(*shape, dtype=dtype))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert layer.weight.grad is None


def test_autocast_rounds_the_input_as_that_of_any_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the weight is widened, which would take twice the memory for an input in fp32."""
    dtypes = []

    def watch(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        dtypes.append(dtype)
        return widen(weight, scales, dtype)

    monkeypatch.setattr(float8, "widen", watch)
    layer, wide = make_layer(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = run(layer, draw(7, 48)), run(wide, draw(7, 48))
    assert found[0].dtype is torch.bfloat16
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert found[1].dtype is expected[1].dtype is torch.float32
    assert dtypes == [torch.bfloat16] * 2


def test_nothing_wide_is_kept_for_the_backward_pass() -> None:
    layer, _ = make_layer(torch.bfloat16)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(draw(7, 48, dtype=torch.bfloat16).requires_grad_())
    assert {tensor.data_ptr() for tensor in kept} == {layer.weight.data_ptr(), layer.scales.data_ptr()}


# The base


@pytest.fixture
def base(tiny_model: Path) -> Any:
    return load_base(tiny_model, FP8, CPU, torch.bfloat16)


def test_linear_layers_are_held_in_fp8_and_all_else_as_it_is_computed(base: Any, tiny_model: Path) -> None:
    files = load_file(tiny_model / "model.safetensors")
    held = {name: layer for name, layer in base.named_modules() if isinstance(layer, Float8Linear)}
    assert {name.rpartition(".")[2] for name in held} == set(LINEAR)
    for name, layer in held.items():
        weight, scales = narrow(files[f"{name}.weight"].bfloat16())
        assert torch.equal(layer.weight.view(torch.uint8), weight.view(torch.uint8))
        assert torch.equal(layer.scales, scales)
    others = [tensor for name, tensor in base.named_parameters() if name.removesuffix(".weight") not in held]
    assert others
    assert {tensor.dtype for tensor in others} == {torch.bfloat16}


def test_never_are_two_layers_wide_while_it_is_loaded(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been narrowed is gone by the time that the next but one is."""
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def watch(weight: Tensor) -> tuple[Tensor, Tensor]:
        alive.append(sum(each() is not None for each in seen))
        seen.append(weakref.ref(weight))
        return narrow(weight)

    monkeypatch.setattr(float8, "narrow", watch)
    load_base(tiny_model, FP8, CPU, torch.bfloat16)
    assert len(alive) == 2 * len(LINEAR)
    assert max(alive) <= 1


def test_the_base_widened_is_what_was_trained_on(base: Any, tiny_model: Path) -> None:
    wide = load_dequantized(tiny_model, FP8, CPU, torch.bfloat16)
    assert not any(isinstance(layer, Float8Linear) for layer in wide.modules())
    assert not hasattr(wide.config, "quantization_config")
    ids = torch.tensor([[5, 17, 33, 250, 9]])
    with torch.no_grad():
        assert torch.equal(base(input_ids=ids).logits, wide(input_ids=ids).logits)


# Adapters


def test_adapters_begin_as_on_any_base_and_are_not_rounded_to_8_bits(base: Any, tiny_model: Path) -> None:
    plain = load_base(tiny_model, replace_settings(FP8, base_format="FP32"), CPU, torch.float32)
    found = []
    for each in (base, plain):
        torch.manual_seed(5)
        settings = build_lora(FP8, each)
        assert settings is not None
        model = get_peft_model(each, settings)
        found.append({name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad})
    ours, theirs = found
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_peft_finds_all_linear_layers(base: Any) -> None:
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert len(adapted) == 2 * len(LINEAR)


# A job

LORA_FP8 = {"type": "LoRA", "baseWeights": {"format": "FP8"}, "lora": {"r": 8, "dropout": 0.05, "useRslora": True}}


@pytest.fixture
def job(config: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    training = {"maxSteps": 6, "maxLength": 64, "globalBatchSize": 8, "learningRate": 0.02}
    return lambda **fields: config | {"method": LORA_FP8, "evaluation": {"percent": 20}, "training": training} | fields


@pytest.mark.parametrize("asked", ["Auto", "Dequantized", "Original"])
def test_a_job_trains_and_merges(asked: str, desk: Desk, job: Callable[..., dict[str, Any]]) -> None:
    words: dict[str, Any] = {}
    for stage in ("prepare", "train", "merge"):
        code, word = desk.run(stage, job(merge={"base": asked}))
        assert code == ExitCode.COMPLETED, word
        words[stage] = word
    resolved = words["prepare"].resolved
    assert (resolved.base_format, resolved.compute_dtype, resolved.fast_path) == ("FP8", "FP32", False)
    adapter = load_file(desk.work / "adapter" / ADAPTER_WEIGHTS)
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert {name.rpartition(".lora_")[2] for name in adapter} == {"A.weight", "B.weight"}
    measured = words["merge"].artifact.measured
    assert measured.kl_divergence < 2e-3
    both = (measured.eval_loss_dequantized, measured.eval_loss_original)
    assert (None not in both) == (asked == "Auto")
    assert asked == "Auto" or f"Merged into the {asked.lower()} weights" in words["merge"].message
    tensors = load_file(desk.work / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert not any("scales" in name for name in tensors)


def test_products_in_fp8_are_for_the_fast_path_of_a_gpu(desk: Desk, job: Callable[..., dict[str, Any]]) -> None:
    given = job(method=LORA_FP8 | {"fp8Products": True}, parallelism={"gpusPerNode": 1})
    code, word = desk.run("prepare", given)
    assert code == ExitCode.COMPLETED
    assert word is not None
    assert word.resolved is not None
    assert (word.resolved.base_format, word.resolved.fast_path, word.resolved.fp8_products) == ("FP8", True, True)
