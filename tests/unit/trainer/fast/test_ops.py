"""Each operation beside the plain formula, and each backward pass beside autograd's of it, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from finetune_trainer.evaluate import IGNORED
from finetune_trainer.fast import ops
from tests.unit.trainer.fast.columns import FEW, assert_kept_inside, blank_columns, random_columns
from tests.unit.trainer.fast.packed import pack_linear

TOKENS = st.integers(1, 7)
HEADS = st.integers(1, 4)
WIDTHS = st.integers(1, 20)
EPSILON = 1e-2
"""Large enough to be missed."""


def leaf(values: Tensor) -> Tensor:
    return values.detach().clone().requires_grad_()


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def norm_plainly(x: Tensor, weight: Tensor) -> Tensor:
    heads = x.reshape(len(x), -1, len(weight))
    return (weight * heads / (heads.square().mean(-1, keepdim=True) + EPSILON).sqrt()).flatten(1)


@FEW
@given(TOKENS, HEADS, WIDTHS)
def test_norm(tokens: int, heads: int, width: int) -> None:
    x, weight = random_columns(tokens, heads * width), torch.rand(width, dtype=torch.float64)
    out = blank_columns(tokens, heads * width)
    factors = ops.normalize(x, weight, EPSILON, out)
    assert_same(out, norm_plainly(x, weight))
    assert factors.shape == (tokens * heads,)
    assert_kept_inside(x, out)


@FEW
@given(TOKENS, HEADS, WIDTHS, st.booleans(), st.booleans())
def test_gradient_of_a_norm(tokens: int, heads: int, width: int, residual: bool, in_place: bool) -> None:
    x, weight = random_columns(tokens, heads * width), torch.rand(width, dtype=torch.float64)
    factors = ops.normalize(x, weight, EPSILON, torch.empty_like(x))
    above, beside = random_columns(tokens, heads * width), random_columns(tokens, heads * width)
    wanted = leaf(x)
    (expected,) = torch.autograd.grad(norm_plainly(wanted, weight), wanted, above)
    out = above if in_place else blank_columns(tokens, heads * width)
    ops.normalize_backward(above, x, weight, factors, out, beside if residual else None)
    assert_same(out, expected + beside if residual else expected)
    assert_kept_inside(out)


def rotate_plainly(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """As transformers does, with rows of `cosines` again and again."""
    period, width = cosines.shape
    shaped = x.reshape(-1, period, x.shape[1] // width, width).transpose(1, 2)
    turned: Tensor
    turned, _ = apply_rotary_pos_emb(shaped, shaped, cosines[None], sines[None])
    return turned.transpose(1, 2).reshape(x.shape)


@FEW
@given(st.integers(1, 3), st.integers(1, 5), HEADS, st.integers(1, 9))
def test_rotation_and_its_gradient(rows: int, period: int, heads: int, half: int) -> None:
    cosines, sines = torch.randn(2, period, 2 * half, dtype=torch.float64)
    x, above = random_columns(rows * period, heads * 2 * half), random_columns(rows * period, heads * 2 * half)
    wanted = leaf(x)
    expected = rotate_plainly(wanted, cosines, sines)
    (below,) = torch.autograd.grad(expected, wanted, above)
    out = blank_columns(*x.shape)
    ops.rotate(x, cosines, sines, out)
    assert_same(out, expected)
    ops.rotate(x, cosines, sines, x)
    assert_same(x, expected)
    ops.rotate(above, cosines, sines, above, back=True)
    assert_same(above, below)
    assert_kept_inside(x, above, out)


def test_a_rotation_back_undoes_it() -> None:
    angles = torch.randn(5, 6, dtype=torch.float64).repeat(1, 2)
    x = random_columns(10, 3 * 12)
    there, back = torch.empty_like(x), torch.empty_like(x)
    ops.rotate(x, angles.cos(), angles.sin(), there)
    assert not torch.allclose(x, there)
    ops.rotate(there, angles.cos(), angles.sin(), back, back=True)
    assert_same(x, back)


@FEW
@given(TOKENS, WIDTHS)
def test_swiglu_and_its_gradient(tokens: int, width: int) -> None:
    both, above, out = random_columns(tokens, 2 * width), random_columns(tokens, width), blank_columns(tokens, width)
    wanted = leaf(both)
    left, right = wanted.chunk(2, 1)
    expected = functional.silu(left) * right
    (below,) = torch.autograd.grad(expected, wanted, above)
    ops.gate(both, out)
    assert_same(out, expected)
    again = blank_columns(tokens, width)
    ops.gate_backward(above, both, again)
    assert_same(again, expected)
    assert_same(both, below)
    assert_kept_inside(both, out, again)


@FEW
@given(st.lists(st.booleans(), min_size=1, max_size=8), st.integers(1, 30))
def test_surprise_and_its_gradient(counts: list[bool], words: int) -> None:
    logits = random_columns(len(counts), words)
    targets = torch.where(torch.tensor(counts), torch.randint(words, (len(counts),)), IGNORED)
    wanted = leaf(logits)
    expected = functional.cross_entropy(wanted, targets, ignore_index=IGNORED, reduction="none")
    (below,) = torch.autograd.grad(expected.sum(), wanted)
    found = ops.surprise(logits, targets)
    assert_same(found, expected)
    assert_same(logits, below)
    assert_kept_inside(logits)
    assert not logits[targets == IGNORED].any()


def drop_ones(seed: int, rate: float, tokens: int = 200, width: int = 50) -> Tensor:
    out = blank_columns(tokens, width)
    ops.drop(torch.ones(tokens, width, dtype=torch.float64), out, seed, rate)
    assert_kept_inside(out)
    return out


@FEW
@given(TOKENS, WIDTHS, st.integers(0, 2**31 - 2), st.floats(0.0, 0.9))
def test_the_same_seed_drops_the_same_places(tokens: int, width: int, seed: int, rate: float) -> None:
    x, out = random_columns(tokens, width), blank_columns(tokens, width)
    factors = drop_ones(seed, rate, tokens, width)
    ops.drop(x, out, seed, rate)
    assert_same(out, x * factors)
    beside = random_columns(tokens, width)
    sums = beside + x * factors
    ops.drop(x, beside, seed, rate, add=True)
    assert_same(beside, sums)
    assert_kept_inside(x, out, beside)


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.8])
def test_dropout_keeps_the_expectation(rate: float) -> None:
    factors = drop_ones(11, rate)
    kept = factors != 0
    assert_same(factors[kept], torch.full_like(factors[kept], 1 / (1 - rate)))
    spread = (rate * (1 - rate) / factors.numel()) ** 0.5
    assert abs(kept.double().mean() - (1 - rate)) < 4 * spread


def test_another_seed_drops_other_places() -> None:
    assert (drop_ones(1, 0.5) != drop_ones(2, 0.5)).double().mean() > 0.4


ROUNDING = 2**-4
"""Half a step of e4m3, whose numbers have 3 bits behind the first."""


@FEW
@given(st.integers(1, 5), st.integers(1, 300), st.sampled_from([1e-20, 1.0, 1e20]), st.data())
def test_rows_in_8_bits(rows: int, columns: int, size: float, data: st.DataObject) -> None:
    x = random_columns(rows, columns, torch.float32).mul_(size)
    x[0, columns // 2 :] = 0
    heads, tails = (torch.rand(data.draw(st.integers(0, columns // 2))) + 0.5 for _ in range(2))
    narrowed, scales = ops.narrow(x, ops.padded(columns), heads, tails)
    assert (narrowed.dtype, scales.dtype, scales.shape) == (torch.float8_e4m3fn, torch.float32, (rows,))
    assert narrowed.shape == (rows, -(-columns // ops.FLOAT8_MULTIPLE) * ops.FLOAT8_MULTIPLE)
    assert not narrowed[:, columns:].float().any()
    meant = x * torch.cat([heads, torch.ones(columns - len(heads) - len(tails)), tails])
    back, smallest = narrowed[:, :columns].float() * scales[:, None], scales[:, None] * 2**-10
    assert ((back - meant).abs() <= meant.abs() * ROUNDING + smallest).all()
    assert (narrowed.float().abs().amax(1)[x.any(1)] == ops.FLOAT8_LARGEST).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_stays_none_in_8_bits(value: float) -> None:
    x = torch.ones(2, 5)
    x[0, 3] = value
    narrowed, scales = ops.narrow(x, 128)
    back = narrowed.float() * scales[:, None]
    assert back[0].isnan().any()
    assert torch.equal(back[1, :5], torch.ones(5))


@pytest.mark.parametrize("bias", [None, torch.arange(16.0)])
def test_a_product_in_8_bits_is_that_of_what_they_stand_for(bias: Tensor | None) -> None:
    x, weights = (ops.narrow(random_columns(rows, 70, torch.float32), 128) for rows in (5, 16))
    out = blank_columns(5, 16, torch.float32)
    ops.multiply_in_float8(*x, *weights, bias, out)
    left, right = (narrowed.float() * scales[:, None] for narrowed, scales in (x, weights))
    torch.testing.assert_close(out, left @ right.T + (0 if bias is None else bias))
    assert_kept_inside(out)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_weights_in_8_bits(packed: bool, turned: bool) -> None:
    weight = torch.randn(6, 64)
    layer: Any = pack_linear(weight) if packed else torch.nn.Linear(64, 6)
    weight = layer(torch.eye(64)).T if packed else layer.weight.data
    scales = ops.peaks(layer) / 100
    assert torch.equal(scales, weight.abs().amax(1) / 100)
    buffer = torch.zeros(64, 10) if turned else torch.zeros(6, 70)
    narrow = buffer.to(ops.FLOAT8)
    ops.shrink(layer, scales, narrow[:, :6] if turned else narrow[:, :64], turned=turned)
    found = narrow[:, :6].T if turned else narrow[:, :64]
    error = found.float() - weight / scales[:, None]
    assert (error.abs() <= (weight / scales[:, None]).abs() * ROUNDING + 2**-10).all()
    assert not narrow[:, 6 if turned else 64 :].float().any()


@pytest.mark.parametrize("scales", [None, torch.tensor([1.0, 4.0])])
def test_an_adapter_beside_them(scales: Tensor | None) -> None:
    out = torch.zeros(2, 9).to(ops.FLOAT8)
    ops.place(torch.tensor([[1.0, 6.0], [32.0, -64.0]]), scales, torch.tensor([1.0, 2.0]), out[:, 3:5])
    expected = torch.tensor([[1.0, 3.0], [32.0, -32.0]]) / (1 if scales is None else scales[:, None])
    assert torch.equal(out[:, 3:5].float(), expected)
    assert out.float().count_nonzero() == 4


@pytest.mark.parametrize("rank", [0, 3])
def test_weights_of_4_bits_and_their_adapter(rank: int) -> None:
    layer, start, below = pack_linear(torch.randn(6, 64)), 2, 9
    first, second = torch.randn(rank, 64), torch.randn(6, rank)
    buffer = blank_columns(15, 70, torch.float32)
    expected = buffer.clone()
    expected[start : start + 6, :64] = layer(torch.eye(64)).T
    expected[start : start + 6, 65 : 65 + rank] = second
    expected[start + below : start + below + rank, :64] = first
    ops.widen(layer, buffer, start, ops.Beside(first, second, 65, below) if rank else None)
    assert torch.equal(buffer.nan_to_num(nan=9.0), expected.nan_to_num(nan=9.0))
    assert_kept_inside(buffer)
