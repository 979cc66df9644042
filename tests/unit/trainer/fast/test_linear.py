"""Layers that share their input, beside PEFT's own, each with its own product and adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from finetune_trainer.fast import ops
from finetune_trainer.fast.linear import MULTIPLE, Layer, Linears, Scratch, WideLinears
from finetune_trainer.fast.narrow import Adapters, NarrowLinears
from finetune_trainer.models import float8
from finetune_trainer.models.loading import import_peft
from tests.unit.trainer.fast.columns import FEW
from tests.unit.trainer.fast.packed import narrow_linear, pack_linear

peft = import_peft()
SCALE = 2.0
FP8_ERROR = 0.05
"""Of a product whose factors are rounded to 4 bits: each by 2.6% of its size, a sum of many by not more."""
DTYPES = {torch.float32: 2e-4, torch.float64: 1e-10}


@dataclass(frozen=True)
class Sketch:
    """A layer to be made."""

    outputs: int
    rank: int = 0
    biased: bool = False
    dropout: float = 0.0


class Kept(torch.nn.Module):
    """Dropout of known places, where PEFT has its own."""

    def __init__(self, seed: int, rate: float) -> None:
        super().__init__()
        self.seed, self.rate = seed, rate

    def forward(self, x: Tensor) -> Tensor:
        factors = torch.empty_like(x)
        ops.drop(torch.ones_like(x), factors, self.seed, self.rate)
        return x * factors


def make_peft(
    sketches: list[Sketch],
    inputs: int,
    dtype: torch.dtype = torch.float64,
    *,
    packed: bool = False,
    narrow: bool = False,
) -> list[Any]:
    """PEFT's layers, adapters of random values, and dropout of the places that a layer's number chooses."""
    base: Any = torch.nn.ModuleDict()
    for number, sketch in enumerate(sketches):
        layer = torch.nn.Linear(inputs, sketch.outputs, bias=sketch.biased, dtype=dtype)
        if packed or narrow:
            layer = (pack_linear if packed else narrow_linear)(layer.weight.data, layer.bias)
        base[f"layer{number}"] = layer
    base.is_loaded_in_4bit = packed
    ranks = {f"layer{number}": sketch.rank for number, sketch in enumerate(sketches) if sketch.rank}
    if ranks:
        scales = {name: SCALE * rank for name, rank in ranks.items()}
        peft.get_peft_model(base, peft.LoraConfig(target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=scales))
    for number, (module, sketch) in enumerate(zip(base.values(), sketches, strict=True)):
        if sketch.rank:
            module.lora_dropout["default"] = Kept(number, sketch.dropout)
            for each in (module.lora_A, module.lora_B):
                each.default.weight.data = torch.randn_like(each.default.weight, dtype=dtype)
    return list(base.values())


def take(module: Any) -> Layer:
    if not hasattr(module, "lora_A"):
        return Layer(module)
    first, second = module.lora_A.default.weight, module.lora_B.default.weight
    return Layer(module.get_base_layer(), first, second, module.lora_dropout["default"].rate)


def join(modules: list[Any], scratch: Scratch | None = None) -> Linears:
    return WideLinears([take(each) for each in modules], SCALE, scratch or Scratch())


def join_narrow(modules: list[Any]) -> NarrowLinears:
    linears = NarrowLinears([take(each) for each in modules], SCALE, Scratch())
    if linears.ranks:
        Adapters([linears], torch.float32).refresh()
    return linears


def multiply(linears: Linears, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the input with its extra columns."""
    wide = x.new_full((len(x), linears.inputs + linears.room), torch.nan)
    wide[:, : linears.inputs] = x
    linears.extend(wide, range(len(linears.layers)))
    return linears.multiply(wide, x.new_empty(len(x), linears.outputs)), wide


def learn(linears: Linears, above: Tensor, wide: Tensor) -> tuple[Tensor, dict[Any, Tensor]]:
    """The gradient of the input, and those of adapters."""
    gradient = above.new_full((len(above), linears.outputs + linears.room), torch.nan)
    gradient[:, : linears.outputs] = above
    found: dict[Any, Tensor] = {}
    seeds = range(len(linears.layers))
    below = linears.backward(gradient, seeds)
    linears.learn(gradient, wide, seeds, found.__setitem__)
    return below, found


def assert_like_peft(modules: list[Any], linears: Linears, x: Tensor) -> None:
    """Output, output on a residual stream, and all gradients."""
    tolerance = DTYPES[x.dtype]
    leaf = x.clone().requires_grad_()
    expected = torch.cat([module(leaf) for module in modules], 1)
    above = torch.randn_like(expected)
    adapters = linears.trained
    below, *wanted = torch.autograd.grad(expected, [leaf, *adapters], above)

    out, wide = multiply(linears, x)
    beside = torch.randn_like(out)
    found, gradients = learn(linears, above, wide)
    for got, want in [
        (out, expected),
        (linears.multiply_add(wide, beside), beside + expected),
        (found, below),
        *((gradients[adapter], want) for adapter, want in zip(adapters, wanted, strict=True)),
    ]:
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * 10)
    assert len(gradients) == len(adapters)


SKETCHES = st.lists(
    st.builds(
        Sketch, st.integers(1, 9), st.sampled_from([0, 1, 3, MULTIPLE + 1]), st.booleans(), st.sampled_from([0.0, 0.4])
    ),
    min_size=1,
    max_size=3,
)


@FEW
@given(SKETCHES, st.integers(1, 9), st.integers(1, 6), st.sampled_from(list(DTYPES)))
def test_layers_with_and_without_adapters_and_biases(
    sketches: list[Sketch], inputs: int, tokens: int, dtype: torch.dtype
) -> None:
    modules = make_peft(sketches, inputs, dtype)
    assert_like_peft(modules, join(modules), torch.randn(tokens, inputs, dtype=dtype))


THREE = [Sketch(6, rank=2, biased=True, dropout=0.4), Sketch(3), Sketch(4, rank=5)]


def held(form: ops.Form) -> dict[str, bool]:
    return {"packed": form is ops.Form.PACKED, "narrow": form is ops.Form.NARROW}


@pytest.mark.parametrize("form", [ops.Form.PACKED, ops.Form.NARROW])
@pytest.mark.parametrize("sketches", [THREE, [Sketch(5)], [Sketch(5, rank=3)]], ids=["three", "plain", "one"])
def test_layers_of_4_and_of_8_bits(sketches: list[Sketch], form: ops.Form) -> None:
    modules = make_peft(sketches, 64, torch.float32, **held(form))
    assert_like_peft(modules, join(modules), torch.randn(7, 64))


WIDE = [Sketch(48, rank=4, biased=True, dropout=0.4), Sketch(32), Sketch(16, rank=5)]


@pytest.mark.parametrize("form", list(ops.Form))
@pytest.mark.parametrize("sketches", [WIDE, [Sketch(16)], [Sketch(32, rank=3)]], ids=["three", "plain", "one"])
def test_products_in_fp8_are_those_of_peft_but_for_rounding(sketches: list[Sketch], form: ops.Form) -> None:
    torch.manual_seed(0)
    modules, x = make_peft(sketches, 256, torch.float32, **held(form)), torch.randn(40, 256)
    for module in modules:
        if module.bias is not None:
            module.bias.data += 1000.0
    linears, leaf = join_narrow(modules), x.clone().requires_grad_()
    expected = torch.cat([module(leaf) for module in modules], 1)
    above = torch.randn_like(expected)
    below, *wanted = torch.autograd.grad(expected, [leaf, *linears.trained], above)

    out, wide = multiply(linears, x)
    found, gradients = learn(linears, above, wide)
    on_top = linears.multiply_add(wide, torch.ones_like(out))
    biases = torch.cat([module(torch.zeros_like(x[:1]))[0] for module in modules]).detach()
    pairs = [(out - biases, expected - biases), (on_top - biases - 1, expected - biases), (found, below)]
    for got, want in [*pairs, *((gradients[each], want) for each, want in zip(linears.trained, wanted, strict=True))]:
        error = ((got - want).norm() / want.norm()).item()
        assert error < FP8_ERROR
    assert ((out - expected).norm() / expected.norm()).item() > 0


def test_weights_stay_what_they_are_where_they_move() -> None:
    modules = make_peft(THREE, 8)
    before = [module.state_dict() for module in modules]
    before = [{name: value.clone() for name, value in each.items()} for each in before]
    join(modules)
    for module, values in zip(modules, before, strict=True):
        assert all(torch.equal(value, values[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("narrow", [False, True])
def test_rows_of_zeros_and_adapters_larger_than_the_weights_are_multiplied_in_fp8(narrow: bool) -> None:
    """Rows of zeros, of tiny numbers, and a layer of nothing but zeros, with adapters a hundred times as large."""
    torch.manual_seed(0)
    modules, x = (
        make_peft([Sketch(16, rank=4), Sketch(16, rank=4)], 128, torch.float32, narrow=narrow),
        torch.randn(9, 128),
    )
    for number, module in enumerate(modules):
        base = module.get_base_layer()
        weight = torch.zeros(16, 128) if number else torch.randn(16, 128)
        weight[:8] *= torch.tensor([0.0, 1e-3, 1e-6, 1e-20])[:, None].repeat(2, 1)
        base.weight.data = weight
        if narrow:
            base.weight.data, base.scales = float8.narrow(weight)
        module.lora_B.default.weight.data *= 100
    linears, leaf = join_narrow(modules), x.clone().requires_grad_()
    expected = torch.cat([module(leaf) for module in modules], 1)
    above = torch.randn_like(expected)
    (below,) = torch.autograd.grad(expected, [leaf], above)
    out, _ = multiply(linears, x)
    found, _ = learn(linears, above, torch.zeros(9, linears.inputs + linears.room))
    for got, want in [(out, expected), (found, below)]:
        assert ((got - want).norm() / want.norm()).item() < FP8_ERROR


def test_weights_in_fp8_stay_what_they_are_where_they_move() -> None:
    modules = make_peft(WIDE, 256, torch.float32, narrow=True)
    modules[1].weight.data[:3] = 0
    bases = [getattr(module, "base_layer", module) for module in modules]
    before = [float8.widen(base.weight, base.scales, torch.float32) for base in bases]
    join_narrow(modules)
    for base, weight in zip(bases, before, strict=True):
        assert torch.equal(float8.widen(base.weight, base.scales, torch.float32), weight)


@pytest.mark.parametrize("packed", [False, True])
def test_adapters_that_changed_are_seen_at_the_next_turn(packed: bool) -> None:
    scratch = Scratch()
    modules = make_peft(THREE, 64, torch.float32, packed=packed)
    linears, x = join(modules, scratch), torch.randn(3, 64)
    assert_like_peft(modules, linears, x)
    for adapter in linears.trained:
        adapter.data = torch.randn_like(adapter)
    scratch.turn += 1
    assert_like_peft(modules, linears, x)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(THREE, id="laid out the same"),
        pytest.param([Sketch(6, biased=True), Sketch(3, rank=2), Sketch(4, rank=5)], id="an adapter elsewhere"),
        pytest.param([Sketch(6, rank=2), Sketch(3, biased=True), Sketch(4, rank=5)], id="a bias elsewhere"),
        pytest.param([Sketch(13, biased=True)], id="a bias and no adapter"),
    ],
)
def test_a_buffer_that_another_layer_took_is_filled_again(other: list[Sketch]) -> None:
    scratch, x = Scratch(), torch.randn(3, 64)
    every = [make_peft(sketches, 64, torch.float32, packed=True) for sketches in (THREE, other)]
    joined = [join(modules, scratch) for modules in every]
    for _ in range(2):
        for modules, linears in zip(every, joined, strict=True):
            assert_like_peft(modules, linears, x)
