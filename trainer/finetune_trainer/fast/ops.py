"""The operations between the products of a layer: by one kernel each on a GPU, by torch's own elsewhere.

Tensors are [tokens, width], and may be columns of a wider buffer. What torch computes here says what the kernels do.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from finetune_trainer.evaluate import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

WIDE_BLOCK = 1024
VOCABULARY_BLOCK = 4096
ATTENTION_BLOCK = 64
"""Queries and keys at once: of nine sizes the fastest at 512, 2,048 and 16,384 tokens (an H100, heads of 128)."""
FLOAT8 = torch.float8_e4m3fn
FLOAT8_LARGEST = 448.0
FLOAT8_MULTIPLE = 128
"""Columns come in so many: tensor cores take 16 at once, and of rows a few longer than that some are slow to read."""
SHRINK_ROWS, SHRINK_COLUMNS = 64, 128
"""Weights that a program takes, here and below as fast as any of those tried (an H100)."""
PACKED_STRAIGHT, PACKED_TURNED = (16, 4), (64, 2)
"""Rows, and quantization blocks of each, that a program takes: turned it writes pieces of columns as long as these rows
are many."""
PLACE_ROWS = 64
TINIEST = 1e-30
"""The largest number of a row of zeros is taken for this: its scale is a number to divide by."""


def gather(weight: Tensor, ids: Tensor) -> Tensor:
    """Rows of `weight` [words, width] for `ids` [...], where these are: [..., width].

    On a GPU the weight may lie in pinned host memory, which the kernel reads itself.
    """
    if _by_kernel(ids):
        kernels, triton = _kernels()
        width = weight.shape[1]
        out = torch.empty(*ids.shape, width, dtype=weight.dtype, device=ids.device)
        kernels.gather[(ids.numel(), triton.cdiv(width, WIDE_BLOCK))](
            weight, ids.contiguous(), out, width, BLOCK=WIDE_BLOCK
        )
        return out
    return functional.embedding(ids, weight)


def normalize(x: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> Tensor:
    """RMS norm of x [tokens, heads x width] over each head's width, into `out`; returns the factors [tokens x heads].

    `weight` [width] (Zhang & Sennrich 2019, arXiv:1910.07467).
    """
    width, tokens = len(weight), len(x)
    heads = x.shape[1] // width
    if _by_kernel(x):
        kernels, triton = _kernels()
        factors = torch.empty(tokens * heads, device=x.device)
        block = triton.next_power_of_2(width)
        kernels.normalize[(tokens * heads,)](
            x, weight, out, factors, heads, x.stride(0), out.stride(0), width, epsilon,
            BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
        return factors
    values = _exact(x).reshape(tokens, heads, width)
    factors = (values.square().mean(-1) + epsilon).rsqrt()
    out.copy_(((values * factors[..., None]).to(out.dtype) * weight).reshape(tokens, -1))
    return factors.flatten()


def normalize_backward(  # noqa: PLR0913 - what the forward pass had
    gradient: Tensor, x: Tensor, weight: Tensor, factors: Tensor, out: Tensor, residual: Tensor | None = None
) -> None:
    """Into `out` the gradient of x from that of its norm, plus `residual`."""
    width, tokens = len(weight), len(x)
    heads = x.shape[1] // width
    if _by_kernel(x):
        kernels, triton = _kernels()
        block = triton.next_power_of_2(width)
        beside = gradient if residual is None else residual
        kernels.normalize_backward[(tokens * heads,)](
            gradient, x, weight, factors, beside, out, heads,
            gradient.stride(0), x.stride(0), beside.stride(0), out.stride(0), width,
            ADDS=residual is not None, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
        return
    factor = factors.reshape(tokens, heads, 1)
    normed = _exact(x).reshape(tokens, heads, width) * factor
    above = _exact(gradient).reshape(tokens, heads, width) * _exact(weight)
    below = factor * (above - normed * (above * normed).mean(-1, keepdim=True))
    out.copy_(below.reshape(tokens, -1) + (0 if residual is None else _exact(residual)))


def rotate(x: Tensor, cosines: Tensor, sines: Tensor, out: Tensor, *, back: bool = False) -> None:
    """Rotary position embedding of x [tokens, heads x width] into `out`, which may be x; `back` turns a gradient back.

    `cosines`, `sines` [period, width], contiguous: token i has the angles of row i % period (Su et al. 2021,
    arXiv:2104.09864, with halves rotated as transformers does).
    """
    period, width = cosines.shape
    heads = x.shape[1] // width
    if _by_kernel(x):
        kernels, triton = _kernels()
        kernels.rotate[(len(x),)](
            x, cosines, sines, out, heads, x.stride(0), out.stride(0), period, HALF=width // 2,
            BLOCK=triton.next_power_of_2(width // 2), HEADS=triton.next_power_of_2(heads), BACK=back, num_warps=8,
        )  # fmt: skip
        return
    values = _exact(x).reshape(-1, period, heads, width)
    cosines, sines = _exact(cosines)[:, None], _exact(sines)[:, None]
    turned = _turn(values * sines, -1) if back else _turn(values, 1) * sines
    out.copy_((values * cosines + turned).reshape(x.shape))


def _turn(values: Tensor, sign: int) -> Tensor:
    low, high = values.chunk(2, -1)
    return torch.cat((-sign * high, sign * low), -1)


def gate(both: Tensor, out: Tensor) -> None:
    """SwiGLU: silu of the left half of `both` [tokens, 2 x width], times the right one (Shazeer 2020, 2002.05202)."""
    width = both.shape[1] // 2
    if _by_kernel(both):
        kernels, triton = _kernels()
        kernels.gate[(len(both), triton.cdiv(width, WIDE_BLOCK))](
            both, out, both.stride(0), out.stride(0), width, BLOCK=WIDE_BLOCK
        )
        return
    left, right = both[:, :width], both[:, width:]
    out.copy_(functional.silu(_exact(left)).to(out.dtype) * right)


def gate_backward(gradient: Tensor, both: Tensor, out: Tensor) -> None:
    """The gradients of both halves in their place; into `out` what `gate` gave, once more."""
    width = both.shape[1] // 2
    if _by_kernel(both):
        kernels, triton = _kernels()
        kernels.gate_backward[(len(both), triton.cdiv(width, WIDE_BLOCK))](
            gradient, both, out, gradient.stride(0), both.stride(0), out.stride(0), width, BLOCK=WIDE_BLOCK
        )
        return
    left, right, above = _exact(both[:, :width]), _exact(both[:, width:]), _exact(gradient)
    share = left.sigmoid()
    opened = (left * share).to(out.dtype)
    out.copy_(opened * right)
    both[:, :width] = above * right * share * (1 + left * (1 - share))
    both[:, width:] = above * opened


@dataclass(frozen=True)
class Beside:
    """An adapter that goes along with the weights of its layer, into the same buffer."""

    first: Tensor
    """A [rank, inputs]."""
    second: Tensor
    """B [outputs, rank]."""
    right: int
    """Column of the buffer from which on B lies."""
    below: int
    """Row from which on A lies, counted from the layer's first."""


def widen(layer: Any, buffer: Tensor, start: int, adapter: Beside | None = None) -> None:  # noqa: ANN401 - a Linear4bit of bitsandbytes
    """The 4-bit weights of a layer [outputs, inputs] in 16 bits, bit by bit what bitsandbytes gives.

    They come into the left part of `buffer`, from row `start` on.
    """
    packed, state = layer.weight.data, layer.weight.quant_state
    rows, columns = state.shape
    out = buffer[start:]
    if not _by_kernel(packed):
        from bitsandbytes.functional import dequantize_4bit  # noqa: PLC0415 - slow

        out[:rows, :columns] = dequantize_4bit(packed, state)
        if adapter is not None:
            rank = len(adapter.first)
            out[:rows, adapter.right : adapter.right + rank] = adapter.second
            out[adapter.below : adapter.below + rank, :columns] = adapter.first
        return
    kernels, triton = _kernels()
    blocks, nested = 32, state.nested
    outer = state.state2 if nested else state
    rank = 0 if adapter is None else len(adapter.first)
    first, second = (buffer, buffer) if adapter is None else (adapter.first, adapter.second)
    kernels.widen[(rows + rank, triton.cdiv(columns, blocks * state.blocksize))](
        packed.view(torch.uint8), state.code, state.absmax, outer.code, outer.absmax,
        state.offset if nested else state.absmax, first, second, out, out.stride(0), rows, columns,
        0 if adapter is None else adapter.right, 0 if adapter is None else adapter.below,
        BLOCKS=blocks, SIZE=state.blocksize, NESTED=nested, OUTER=outer.blocksize, RANK=rank,
        RANK_BLOCK=triton.next_power_of_2(max(rank, 1)),
    )  # fmt: skip


def padded(columns: int) -> int:
    """Columns of a matrix in FP8 that has so many and zeros beyond them."""
    return -(-columns // FLOAT8_MULTIPLE) * FLOAT8_MULTIPLE


def narrow(x: Tensor, width: int, heads: Tensor | None = None, tails: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """FP8 of x [rows, columns] (e4m3, Micikevicius et al. 2022, arXiv:2209.05433), and a scale a row [rows], fp32.

    The first columns are multiplied by `heads`, the last by `tails`, one factor a column. The largest number of a row
    becomes FLOAT8_LARGEST. Zeros fill the columns up to `width`.
    """
    rows, columns = x.shape
    heads, tails = (None if each is None or not len(each) else each for each in (heads, tails))
    if _by_kernel(x):
        kernels, triton = _kernels()
        out = torch.empty(rows, width, dtype=FLOAT8, device=x.device)
        scales = torch.empty(rows, device=x.device)
        kernels.narrow[(rows,)](
            x, x if heads is None else heads, x if tails is None else tails, out, scales, x.stride(0), columns,
            0 if heads is None else len(heads), columns if tails is None else columns - len(tails), width,
            FLOAT8_LARGEST, TINIEST, HEADS=heads is not None, TAILS=tails is not None,
            BLOCK=triton.next_power_of_2(width), num_warps=min(max(triton.next_power_of_2(width) // 1024, 4), 32),
        )  # fmt: skip
        return out, scales
    values = _exact(x).float().clone()
    if heads is not None:
        values[:, : len(heads)] *= heads
    if tails is not None:
        values[:, columns - len(tails) :] *= tails
    scales = values.abs().amax(1).clamp(min=TINIEST) / FLOAT8_LARGEST
    out = torch.zeros(rows, width, dtype=FLOAT8, device=x.device)
    out[:, :columns] = (values * (1 / scales)[:, None]).to(FLOAT8)
    return out, scales


class Form(Enum):
    """How weights are held."""

    WIDE = "16 bits, or more"
    NARROW = "FP8, with scales of rows: `models.float8.Float8Linear`"
    PACKED = "4 bits: bitsandbytes' Linear4bit"


def form_of(layer: Any) -> Form:  # noqa: ANN401 - a linear layer of any form
    """How its weights are held."""
    if hasattr(layer.weight, "quant_state"):
        return Form.PACKED
    return Form.NARROW if layer.weight.dtype is FLOAT8 else Form.WIDE


def peaks(layer: Any) -> Tensor:  # noqa: ANN401 - as above
    """The largest number of each row of a layer's weights, fp32."""
    weight, form = layer.weight.data, form_of(layer)
    if form is Form.PACKED:
        from bitsandbytes.functional import dequantize_4bit  # noqa: PLC0415 - slow

        weight = dequantize_4bit(weight, layer.weight.quant_state)
    if form is Form.NARROW:
        weight = weight.to(torch.bfloat16)
    found: Tensor = torch.linalg.vector_norm(weight, torch.inf, 1)
    return found.float() * (layer.scales if form is Form.NARROW else 1)


def shrink(layer: Any, scales: Tensor, out: Tensor, *, turned: bool = False) -> None:  # noqa: ANN401 - as above
    """The weights of a layer [outputs, inputs] in FP8 into `out`, each row divided by its scale; or turned.

    Of weights in FP8 `scales` are theirs.
    """
    weight, form = layer.weight, form_of(layer)
    if form is not Form.PACKED:
        rescale(layer, scales, out, Rescale.DIVIDE if form is Form.WIDE else Rescale.NOTHING, turned=turned)
        return
    if not _by_kernel(out):
        from bitsandbytes.functional import dequantize_4bit  # noqa: PLC0415 - slow

        narrowed = dequantize_4bit(weight.data, weight.quant_state).float() * (1 / scales)[:, None]
        out.copy_((narrowed.T if turned else narrowed).to(out.dtype))
        return
    kernels, triton = _kernels()
    state = weight.quant_state
    outer, (rows, columns) = state.state2 if state.nested else state, state.shape
    tall, blocks = PACKED_TURNED if turned else PACKED_STRAIGHT
    kernels.shrink_packed[(triton.cdiv(rows, tall), triton.cdiv(columns, blocks * state.blocksize))](
        weight.data.view(torch.uint8), state.code, state.absmax, outer.code, outer.absmax,
        state.offset if state.nested else state.absmax, scales, out, out.stride(0), rows, columns,
        ROWS=tall, BLOCKS=blocks, SIZE=state.blocksize, NESTED=state.nested, OUTER=outer.blocksize, TURNS=turned,
        num_warps=8,
    )  # fmt: skip


class Rescale(Enum):
    """What is done with scales of rows."""

    NOTHING = "nothing"
    DIVIDE = "divide"
    MULTIPLY = "multiply"


def rescale(layer: Any, scales: Tensor, out: Tensor, how: Rescale, *, turned: bool = False) -> None:  # noqa: ANN401 - a linear layer, not of 4 bits
    """The weights of a layer [outputs, inputs], each row divided by its scale or multiplied by it, into `out`."""
    weight = layer.weight.data
    if not _by_kernel(out):
        factors = {Rescale.DIVIDE: 1 / scales, Rescale.MULTIPLY: scales}.get(how, torch.ones_like(scales))
        values = (weight.float() * factors[:, None]).to(out.dtype)
        out.copy_(values.T if turned else values)
        return
    kernels, triton = _kernels()
    rows, columns = weight.shape
    kernels.rescale[(triton.cdiv(rows, SHRINK_ROWS), triton.cdiv(columns, SHRINK_COLUMNS))](
        weight, scales, out, weight.stride(0), out.stride(0), rows, columns,
        DIVIDES=how is Rescale.DIVIDE, MULTIPLIES=how is Rescale.MULTIPLY, TURNS=turned, ROWS=SHRINK_ROWS,
        COLUMNS=SHRINK_COLUMNS, num_warps=8,
    )  # fmt: skip


def place(adapter: Tensor, scales: Tensor | None, factors: Tensor, out: Tensor) -> None:
    """`adapter` [rows, ranks] in FP8 into `out`: each row divided by its scale, if any, each column by its factor."""
    if not _by_kernel(out):
        values = adapter.float() * (1 / factors)
        out.copy_((values if scales is None else values * (1 / scales)[:, None]).to(FLOAT8))
        return
    kernels, triton = _kernels()
    rows, ranks = adapter.shape
    kernels.place[(triton.cdiv(rows, PLACE_ROWS),)](
        adapter, factors if scales is None else scales, factors, out, *adapter.stride(), out.stride(0), rows, ranks,
        SCALES=scales is not None, ROWS=PLACE_ROWS, RANKS=triton.next_power_of_2(ranks),
    )  # fmt: skip


def multiply_in_float8(  # noqa: PLR0913 - two matrices with their scales
    x: Tensor, x_scales: Tensor, weights: Tensor, weight_scales: Tensor, bias: Tensor | None, out: Tensor
) -> Tensor:
    """Product of x [tokens, columns] and the transpose of `weights` [rows, columns], both in FP8, into `out`.

    Scales are of rows; `bias` [rows] is added as it is. `out` is [tokens, rows]. Rows come in multiples of 16.
    """
    product: Tensor = torch._scaled_mm(  # noqa: SLF001 - torch.nn.functional.scaled_mm has no `out`
        x, weights.T, x_scales[:, None], weight_scales[None], bias, out_dtype=out.dtype, use_fast_accum=True, out=out
    )
    return product


def surprise(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row in nats [rows], fp32; its gradient takes the place of `logits` [rows, words].

    Rows whose target is IGNORED have neither.
    """
    if _by_kernel(logits):
        kernels, _ = _kernels()
        losses = torch.empty(len(logits), device=logits.device)
        kernels.surprise[(len(logits),)](
            logits, targets, losses, logits.stride(0), logits.shape[1], IGNORED, BLOCK=VOCABULARY_BLOCK, num_warps=8
        )
        return losses
    values = _exact(logits)
    losses = functional.cross_entropy(values, targets, ignore_index=IGNORED, reduction="none")
    counts = targets != IGNORED
    slopes = values.softmax(-1)
    slopes[counts.nonzero()[:, 0], targets[counts]] -= 1
    logits.copy_(slopes * counts[:, None])
    return losses


def drop(x: Tensor, out: Tensor, seed: int, rate: float, *, add: bool = False) -> None:
    """Dropout of x into `out`, or added to it: the same seed and shape drop the same places."""
    if _by_kernel(x):
        kernels, triton = _kernels()
        kernels.drop[(len(x), triton.cdiv(x.shape[1], WIDE_BLOCK))](
            x, out, x.stride(0), out.stride(0), x.shape[1], seed, rate, ADDS=add, BLOCK=WIDE_BLOCK
        )
        return
    kept = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) >= rate
    values = torch.where(kept, x / (1 - rate), 0.0)
    out.copy_(out + values if add else values)


def attention_backward(  # noqa: PLR0913 - what attention takes and gave
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attended: Tensor,
    logs: Tensor,
    *,
    length: int,
    width: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value of causal attention in rows of `length` tokens, on a GPU.

    Shapes are [tokens, heads x width], `width` a power of 2; `logs` [rows, heads, length] of the sums of exponentials.
    The same in torch is autograd's (`attention.py`).
    """
    kernels, triton = _kernels()
    tokens, heads, key_heads = len(query), query.shape[1] // width, key.shape[1] // width
    rows, group = tokens // length, heads // key_heads
    sums = torch.empty(tokens, heads, device=query.device)
    kernels.attention_sums[(tokens,)](
        gradient, attended, sums, gradient.stride(0), attended.stride(0), heads,
        WIDTH=width, HEADS=triton.next_power_of_2(heads),
    )  # fmt: skip
    found = [torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in (query, key, value)]
    shared = (query, key, value, gradient, logs, sums)
    strides = [each.stride(0) for each in (query, key, value, gradient)]
    sizes = {"WIDTH": width, "ROWS": ATTENTION_BLOCK, "COLUMNS": ATTENTION_BLOCK, "num_warps": 4, "num_stages": 2}
    blocks = triton.cdiv(length, ATTENTION_BLOCK)
    kernels.attention_backward_keys[(blocks, key_heads, rows)](
        *shared, found[1], found[2], scale, length, group, *strides, found[1].stride(0), found[2].stride(0), **sizes
    )
    kernels.attention_backward_queries[(blocks, heads, rows)](
        *shared, found[0], scale, length, group, *strides, found[0].stride(0), **sizes
    )
    return found[0], found[1], found[2]


def _by_kernel(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _kernels() -> tuple[Any, Any]:
    """Triton is there on Linux only, and slow to import."""
    import triton  # noqa: PLC0415 - slow

    from finetune_trainer.fast import kernels  # noqa: PLC0415 - brings triton

    return kernels, triton


def _exact(values: Tensor) -> Tensor:
    """At least fp32; float64 stays."""
    return values if values.dtype is torch.float64 else values.float()


def _warps(block: int) -> int:
    return 4 if block <= 2048 else 8  # noqa: PLR2004 - 16 values a thread at most
