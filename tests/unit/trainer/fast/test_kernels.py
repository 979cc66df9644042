"""Each kernel, in Triton's interpreter, beside what torch computes in its place; float32, as the interpreter is no
guide to bf16 (tests/gpu has that).

Triton asks for its interpreter when it is imported, so the kernels run in a process of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeAlias

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetune_trainer.evaluate import IGNORED
from finetune_trainer.fast import ops
from tests.unit.trainer.fast.columns import FEW, assert_kept_inside, blank_columns, random_columns

Interpret: TypeAlias = "Callable[..., None]"
"""Calls a function of this module, with its arguments, where kernels are interpreted."""

TOKENS = st.integers(1, 4)
HEADS = st.integers(1, 3)
SEEDS = st.integers(0, 2**31 - 2)
EPSILON = 1e-2


@pytest.fixture(scope="module")
def interpret() -> Iterator[Interpret]:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(take_kernels).result()
        yield lambda work, *arguments: pool.submit(work, *arguments).result()


# In the process


def take_kernels() -> None:
    from finetune_trainer.fast import kernels  # noqa: PLC0415 - only here are they interpreted

    assert "Interpreted" in type(kernels.normalize).__name__


def on_kernels(use: bool) -> None:
    ops._by_kernel = lambda tensor: use  # noqa: ARG005 - the name is its own


def compare(work: Callable[[], list[Tensor]], tolerance: float = 1e-5) -> None:
    """What `work` gives on kernels and without them, from the same random numbers."""
    found = []
    for use in (False, True):
        on_kernels(use)
        torch.manual_seed(0)
        found.append(work())
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        if got._base is not None:
            assert_kept_inside(got)


def columns(tokens: int, width: int) -> Tensor:
    return random_columns(tokens, width, torch.float32)


def blank(tokens: int, width: int) -> Tensor:
    return blank_columns(tokens, width, torch.float32)


def compare_norm(tokens: int, heads: int, width: int, residual: bool) -> None:
    def work() -> list[Tensor]:
        x, above, beside = (columns(tokens, heads * width) for _ in range(3))
        weight, out, below = torch.rand(width), blank(tokens, heads * width), blank(tokens, heads * width)
        factors = ops.normalize(x, weight, EPSILON, out)
        ops.normalize_backward(above, x, weight, factors, below, beside if residual else None)
        ops.normalize_backward(above, x, weight, factors, above)
        return [out, factors, below, above]

    compare(work)


def compare_gathered(words: int, width: int, rows: int) -> None:
    def work() -> list[Tensor]:
        return [ops.gather(torch.randn(words, width), torch.randint(words, (rows, 3)))]

    compare(work, tolerance=0.0)


def compare_rotation(rows: int, period: int, heads: int, half: int) -> None:
    def work() -> list[Tensor]:
        cosines, sines = torch.randn(period, 2 * half), torch.randn(period, 2 * half)
        x, above = columns(rows * period, heads * 2 * half), columns(rows * period, heads * 2 * half)
        out = blank(*x.shape)
        ops.rotate(x, cosines, sines, out)
        ops.rotate(above, cosines, sines, above, back=True)
        return [out, above]

    compare(work)


def compare_swiglu(tokens: int, width: int) -> None:
    def work() -> list[Tensor]:
        both, above = columns(tokens, 2 * width), columns(tokens, width)
        out, again = blank(tokens, width), blank(tokens, width)
        ops.gate(both, out)
        ops.gate_backward(above, both, again)
        return [out, again, both]

    compare(work)


def compare_surprise(counts: list[bool], words: int, spread: float) -> None:
    def work() -> list[Tensor]:
        logits = columns(len(counts), words).mul_(spread)
        targets = torch.where(torch.tensor(counts), torch.randint(words, (len(counts),)), IGNORED)
        return [ops.surprise(logits, targets), logits]

    compare(work)


def compare_widened(rows: int, columns: int, rank: int, kind: str, nested: bool, size: int) -> None:
    """The layer's rows begin at the third; A lies below the last one, a row apart, and B a column apart."""
    from tests.unit.trainer.fast.packed import pack_linear  # noqa: PLC0415 - slow

    def work() -> list[Tensor]:
        layer = pack_linear(torch.randn(rows, columns), kind=kind, nested=nested, size=size)
        first, second = torch.randn(rank, columns), torch.randn(rows, rank)
        buffer = blank(2 + rows + 1 + rank + 1, columns + 1 + rank + 1).fill_(9.0)
        ops.widen(layer, buffer, 2, ops.Beside(first, second, columns + 1, rows + 1) if rank else None)
        return [buffer]

    compare(work, tolerance=0.0)


def unrounded(*shape: int) -> Tensor:
    """Numbers from 1 to 240 that FP8 holds, and by 64 smaller ones: the interpreter rounds 127 to 64."""
    return torch.randint(56, 120, shape, dtype=torch.uint8).view(ops.FLOAT8).float()


def compare_narrowed(rows: int, width: int, heads: int, tails: int) -> None:
    def work() -> list[Tensor]:
        x = blank(rows, width)
        x.copy_(unrounded(rows, width))
        x[:, width // 2] = -ops.FLOAT8_LARGEST
        x.mul_(2.0 ** torch.randint(-40, 40, (rows, 1)))
        x[0] = 0
        factors = [2.0 ** -torch.randint(6, (each,)) for each in (heads, tails)]
        for each in factors:
            each[-1:] = 1.0
        if heads > width // 2 or width // 2 >= width - tails:
            factors = [torch.ones_like(each) for each in factors]
        narrowed, scales = ops.narrow(x, ops.padded(width), *factors)
        return [narrowed.float(), scales]

    compare(work, tolerance=0.0)


def compare_shrunk(rows: int, columns: int, turned: bool, form: ops.Form) -> None:
    from tests.unit.trainer.fast.packed import narrow_linear, pack_linear  # noqa: PLC0415 - slow

    make = {ops.Form.PACKED: pack_linear, ops.Form.NARROW: narrow_linear}

    def work() -> list[Tensor]:
        layer = make[form](torch.randn(rows, columns)) if form in make else torch.nn.Linear(columns, rows)
        out = (
            blank(columns, rows) if turned else blank(rows, columns)
        )  # in fp32: of rounding the interpreter is no guide
        ops.shrink(layer, torch.rand(rows) + 0.5, out, turned=turned)
        if form is ops.Form.PACKED:
            return [out]
        wide = torch.empty_like(out)
        ops.rescale(layer, torch.rand(rows), wide, ops.Rescale.MULTIPLY, turned=turned)
        return [out, wide]

    compare(work)


def compare_placed(rows: int, ranks: int, scaled: bool, turned: bool) -> None:
    def work() -> list[Tensor]:
        adapter = unrounded(ranks, rows).T if turned else unrounded(rows, ranks)
        scales, factors = 2.0 ** torch.randint(2, (rows,)), 2.0 ** torch.randint(2, (ranks,))
        narrow = torch.zeros(rows, ranks + 4).to(ops.FLOAT8)
        ops.place(adapter, scales if scaled else None, factors, narrow[:, 1 : 1 + ranks])
        return [narrow.float()]

    compare(work, tolerance=0.0)


def check_attention(rows: int, length: int, key_heads: int, group: int, width: int) -> None:
    """The backward pass beside autograd's of the plain formula."""
    torch.manual_seed(0)
    tokens, scale = rows * length, 0.3
    query, above = columns(tokens, key_heads * group * width), columns(tokens, key_heads * group * width)
    key, value = columns(tokens, key_heads * width), columns(tokens, key_heads * width)
    leaves = [each.double().requires_grad_() for each in (query, key, value)]
    asked, keys, values = (
        each.view(rows, length, -1, width).transpose(1, 2).repeat_interleave(repeats, 1)
        for each, repeats in zip(leaves, (1, group, group), strict=True)
    )
    products = (asked @ keys.transpose(2, 3) * scale).masked_fill(
        torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf
    )
    attended = (products.softmax(-1) @ values).transpose(1, 2).reshape(tokens, -1)
    expected = torch.autograd.grad(attended, leaves, above.double())
    given, logs = attended.detach().float(), products.detach().logsumexp(-1).float()
    found = ops.attention_backward(above, query, key, value, given, logs, length=length, width=width, scale=scale)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def check_dropped(tokens: int, width: int, seed: int, rate: float) -> None:
    """Places that the seed chooses, whatever the values are and wherever they go."""
    on_kernels(use=True)
    ones, x, out, beside = torch.ones(tokens, width), *(columns(tokens, width) for _ in range(3))
    factors = torch.empty(tokens, width)
    ops.drop(ones, factors, seed, rate)
    torch.testing.assert_close(factors[factors != 0], torch.full_like(factors[factors != 0], 1 / (1 - rate)))
    before = beside.clone()
    ops.drop(x, out, seed, rate)
    ops.drop(x, beside, seed, rate, add=True)
    torch.testing.assert_close(out, x * factors)
    torch.testing.assert_close(beside, before + x * factors)
    assert_kept_inside(out, beside)


def check_rate(rate: float) -> None:
    on_kernels(use=True)
    tokens, width = 6, 2500
    first, second = torch.empty(2, tokens, width)
    for seed, out in enumerate((first, second)):
        ops.drop(torch.ones(tokens, width), out, seed, rate)
    kept, other = first != 0, second != 0
    for share, expected, independent in (
        (kept, 1 - rate, kept.numel()),
        (kept & other, (1 - rate) ** 2, kept.numel()),
        (kept[1:] & kept[:-1], (1 - rate) ** 2, kept.numel() / 2),
    ):
        assert abs(share.double().mean().item() - expected) < 4 * math.sqrt(expected * (1 - expected) / independent)


# The tests


@FEW
@given(tokens=TOKENS, heads=HEADS, width=st.integers(1, 40), residual=st.booleans())
def test_norm(interpret: Interpret, tokens: int, heads: int, width: int, residual: bool) -> None:
    interpret(compare_norm, tokens, heads, width, residual)


@FEW
@given(words=st.integers(1, 9), width=st.integers(1, 1100), rows=TOKENS)
def test_rows_of_a_weight(interpret: Interpret, words: int, width: int, rows: int) -> None:
    interpret(compare_gathered, words, width, rows)


@FEW
@given(rows=st.integers(1, 3), period=st.integers(1, 4), heads=HEADS, half=st.integers(1, 20))
def test_rotation(interpret: Interpret, rows: int, period: int, heads: int, half: int) -> None:
    interpret(compare_rotation, rows, period, heads, half)


@FEW
@example(tokens=2, width=2 * ops.WIDE_BLOCK)
@given(tokens=TOKENS, width=st.integers(1, 3 * ops.WIDE_BLOCK))
def test_swiglu(interpret: Interpret, tokens: int, width: int) -> None:
    interpret(compare_swiglu, tokens, width)


@FEW
@example(counts=[True, False], words=2 * ops.VOCABULARY_BLOCK + 5, spread=3.0)
@given(
    counts=st.lists(st.booleans(), min_size=1, max_size=4),
    words=st.integers(1, 3 * ops.VOCABULARY_BLOCK),
    spread=st.sampled_from([0.1, 3.0, 50.0]),
)
def test_surprise(interpret: Interpret, counts: list[bool], words: int, spread: float) -> None:
    interpret(compare_surprise, counts, words, spread)


@pytest.mark.parametrize(
    ("kind", "nested", "size"), [("nf4", True, 64), ("nf4", False, 64), ("fp4", True, 64), ("nf4", True, 128)]
)
@pytest.mark.parametrize(("rows", "blocks", "rank"), [(1, 1, 0), (7, 5, 3), (7, 45, 8)])
def test_weights_of_4_bits_and_their_adapter(
    interpret: Interpret, rows: int, blocks: int, rank: int, kind: str, nested: bool, size: int
) -> None:
    interpret(compare_widened, rows, blocks * size, rank, kind, nested, size)


@FEW
@given(rows=st.integers(1, 3), width=st.integers(1, 300), heads=st.integers(0, 150), tails=st.integers(0, 150))
def test_rows_in_8_bits(interpret: Interpret, rows: int, width: int, heads: int, tails: int) -> None:
    interpret(compare_narrowed, rows, width, min(heads, width // 2), min(tails, width // 2))


@FEW
@example(rows=ops.SHRINK_ROWS + 3, columns=ops.SHRINK_COLUMNS + 64, turned=True, form=ops.Form.WIDE)
@example(rows=ops.PACKED_TURNED[0] + 3, columns=192, turned=True, form=ops.Form.PACKED)
@example(rows=ops.PACKED_STRAIGHT[0] + 3, columns=320, turned=False, form=ops.Form.PACKED)
@given(
    rows=st.integers(1, 70), columns=st.sampled_from([64, 128]), turned=st.booleans(), form=st.sampled_from(ops.Form)
)
def test_weights_in_8_bits(interpret: Interpret, rows: int, columns: int, turned: bool, form: ops.Form) -> None:
    interpret(compare_shrunk, rows, columns, turned, form)


@FEW
@given(rows=st.integers(1, 2 * ops.PLACE_ROWS), ranks=st.integers(1, 9), scaled=st.booleans(), turned=st.booleans())
def test_adapters_in_8_bits(interpret: Interpret, rows: int, ranks: int, scaled: bool, turned: bool) -> None:
    interpret(compare_placed, rows, ranks, scaled, turned)


@settings(FEW, max_examples=6)
@example(rows=1, length=2 * ops.ATTENTION_BLOCK + 5, key_heads=1, group=2, width=16)
@given(
    rows=st.integers(1, 2),
    length=st.integers(1, ops.ATTENTION_BLOCK + 5),
    key_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    width=st.sampled_from([16, 32]),
)
def test_attention(interpret: Interpret, rows: int, length: int, key_heads: int, group: int, width: int) -> None:
    interpret(check_attention, rows, length, key_heads, group, width)


@FEW
@example(tokens=3, width=ops.WIDE_BLOCK + 5, seed=1, rate=0.5)
@given(tokens=TOKENS, width=st.integers(1, 40), seed=SEEDS, rate=st.floats(0.0, 0.9))
def test_dropout(interpret: Interpret, tokens: int, width: int, seed: int, rate: float) -> None:
    interpret(check_dropped, tokens, width, seed, rate)


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_dropout_is_of_its_rate_and_another_with_another_seed_or_token(interpret: Interpret, rate: float) -> None:
    interpret(check_rate, rate)
