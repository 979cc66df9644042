"""Kernels in Triton, for a GPU. Each adds up in a fixed order, without atomics: equal inputs give equal bits.

A row is a token. Computed is in fp32, and rounded where transformers' modules round, so that the results are theirs.
What each computes is written in torch beside its call, in `fast/ops.py`.
"""

# ruff: noqa: N803, ANN001, ANN201, PLR0913, SIM102 - a kernel's arguments are pointers and strides; constants are in
# capitals, and stand alone in a condition
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
"""exp(x) is exp2(x x LOG2_E), which the hardware has."""


@triton.jit
def gather(weight, ids, out, width, BLOCK: tl.constexpr):
    """Rows of a weight, which may lie in pinned host memory, by their numbers."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    place = tl.load(ids + row).to(tl.int64) * width + columns
    tl.store(out + row * width + columns, tl.load(weight + place, mask=inside), mask=inside)


@triton.jit
def normalize(x, weight, out, factors, heads, x_stride, out_stride, width, epsilon, BLOCK: tl.constexpr):
    """RMS norm of a row of one of its heads; `factors` are what each row was multiplied with."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    start = (row % heads) * width + columns
    values = tl.load(x + (row // heads) * x_stride + start, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt_rn(tl.sum(values * values, 0) / width + epsilon)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    normed = (values * factor).to(out.dtype.element_ty).to(tl.float32) * scale
    tl.store(out + (row // heads) * out_stride + start, normed.to(out.dtype.element_ty), mask=inside)
    tl.store(factors + row, factor)


@triton.jit
def normalize_backward(
    gradient, x, weight, factors, residual, out, heads, gradient_stride, x_stride, residual_stride, out_stride, width,
    ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of what went into `normalize`, on top of that of the residual stream."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    token, start = row // heads, (row % heads) * width + columns
    factor = tl.load(factors + row)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    above = tl.load(gradient + token * gradient_stride + start, mask=inside, other=0.0).to(tl.float32) * scale
    normed = tl.load(x + token * x_stride + start, mask=inside, other=0.0).to(tl.float32) * factor
    below = factor * (above - normed * (tl.sum(above * normed, 0) / width))
    if ADDS:
        below += tl.load(residual + token * residual_stride + start, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + start, below.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotate(
    x, cosines, sines, out, heads, x_stride, out_stride, period, HALF: tl.constexpr, BLOCK: tl.constexpr,
    HEADS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Rotary position embedding of the heads of a row; back is the gradient's way. `out` may be `x`."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (head < heads) & (column < HALF)
    angles = (row % period) * 2 * HALF + column
    known = column < HALF
    cos_low = tl.load(cosines + angles, mask=known, other=0.0).to(tl.float32)
    sin_low = tl.load(sines + angles, mask=known, other=0.0).to(tl.float32)
    cos_high = tl.load(cosines + angles + HALF, mask=known, other=0.0).to(tl.float32)
    sin_high = tl.load(sines + angles + HALF, mask=known, other=0.0).to(tl.float32)
    start = head * 2 * HALF + column
    low = tl.load(x + row * x_stride + start, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + row * x_stride + start + HALF, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        new_low = low * cos_low + high * sin_high
        new_high = high * cos_high - low * sin_low
    else:
        new_low = low * cos_low - high * sin_low
        new_high = high * cos_high + low * sin_high
    tl.store(out + row * out_stride + start, new_low.to(out.dtype.element_ty), mask=inside)
    tl.store(out + row * out_stride + start + HALF, new_high.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate(both, out, both_stride, out_stride, width, BLOCK: tl.constexpr):
    """SwiGLU: silu(gate) x up, which lie side by side in a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    left = tl.load(both + row * both_stride + columns, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(both + row * both_stride + width + columns, mask=inside, other=0.0).to(tl.float32)
    opened = (left / (1.0 + tl.exp(-left))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * out_stride + columns, (opened * right).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_backward(gradient, both, out, gradient_stride, both_stride, out_stride, width, BLOCK: tl.constexpr):
    """Gradients of gate and up in their place; `out` is what SwiGLU gave, once more."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    above = tl.load(gradient + row * gradient_stride + columns, mask=inside, other=0.0).to(tl.float32)
    place = both + row * both_stride + columns
    left = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(place + width, mask=inside, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-left))
    opened = (left * share).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * out_stride + columns, (opened * right).to(out.dtype.element_ty), mask=inside)
    tl.store(place + width, (above * opened).to(both.dtype.element_ty), mask=inside)
    slope = above * right * share * (1.0 + left * (1.0 - share))
    tl.store(place, slope.to(both.dtype.element_ty), mask=inside)


@triton.jit
def widen(
    packed, code, scales, scale_code, outer_scales, offset, first, second, out, out_stride, rows, columns, right, below,
    BLOCKS: tl.constexpr, SIZE: tl.constexpr, NESTED: tl.constexpr, OUTER: tl.constexpr, RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
):  # fmt: skip
    """4-bit weights of bitsandbytes to 16 bits: BLOCKS quantization blocks of SIZE weights of a row, for each program.

    An adapter goes along: `second` [rows, RANK] to the columns from `right` on, `first` [RANK, columns] to the rows
    from `below` on, which the last programs do.
    """
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    place = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    known = block * SIZE < columns
    if row < rows:
        number = row * (columns // SIZE) + block
        if NESTED:
            inner = tl.load(scales + number, mask=known, other=0).to(tl.int32)
            scale = tl.load(scale_code + inner) * tl.load(outer_scales + number // OUTER, mask=known, other=0.0)
            scale += tl.load(offset)
        else:
            scale = tl.load(scales + number, mask=known, other=0.0)
        byte = (number * (SIZE // 2))[:, None] + tl.arange(0, SIZE // 2)[None, :]
        pairs = tl.load(packed + byte, mask=known[:, None], other=0).to(tl.int32)
        high = tl.load(code + (pairs >> 4)) * scale[:, None]
        low = tl.load(code + (pairs & 15)) * scale[:, None]
        values = tl.reshape(tl.join(high, low), (BLOCKS, SIZE))
        tl.store(out + row * out_stride + place, values.to(out.dtype.element_ty), mask=known[:, None])
        if RANK > 0:
            if tl.program_id(1) == 0:
                rank = tl.arange(0, RANK_BLOCK)
                beside = tl.load(second + row * RANK + rank, mask=rank < RANK, other=0.0)
                tl.store(out + row * out_stride + right + rank, beside.to(out.dtype.element_ty), mask=rank < RANK)
    elif RANK > 0:
        under = tl.load(first + (row - rows) * columns + place, mask=known[:, None], other=0.0)
        tl.store(out + (row - rows + below) * out_stride + place, under.to(out.dtype.element_ty), mask=known[:, None])


@triton.jit
def narrow(
    x, heads, tails, out, scales, x_stride, columns, most, least, width, highest, tiniest, HEADS: tl.constexpr,
    TAILS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row in 8 bits, its largest number as `highest`; zeros beyond its columns.

    Columns before `most` are multiplied by their factors of `heads` before, those from `least` on by `tails`.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    values = tl.load(x + row * x_stride + place, mask=place < columns, other=0.0).to(tl.float32)
    if HEADS:
        values *= tl.load(heads + place, mask=place < most, other=1.0)
    if TAILS:
        values *= tl.load(tails + place - least, mask=(place >= least) & (place < columns), other=1.0)
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(values), 0), tiniest), highest)
    tl.store(scales + row, scale)
    narrowed = (values * tl.div_rn(1.0, scale)).to(out.dtype.element_ty)
    tl.store(out + row * width + place, narrowed, mask=place < width)


@triton.jit
def rescale(
    x, scales, out, x_stride, out_stride, rows, columns, DIVIDES: tl.constexpr, MULTIPLIES: tl.constexpr,
    TURNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Weights, each row divided by its scale, multiplied by it or as it is; rows become columns if it turns."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    known = (row < rows)[:, None] & (column < columns)[None, :]
    values = tl.load(x + row[:, None] * x_stride + column[None, :], mask=known, other=0.0).to(tl.float32)
    scale = tl.load(scales + row, mask=row < rows, other=1.0)
    if DIVIDES:
        values *= tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), scale)[:, None]
    if MULTIPLIES:
        values *= scale[:, None]
    narrowed = values.to(out.dtype.element_ty)
    if TURNS:
        tl.store(out + column[:, None] * out_stride + row[None, :], tl.trans(narrowed), mask=tl.trans(known))
    else:
        tl.store(out + row[:, None] * out_stride + column[None, :], narrowed, mask=known)


@triton.jit
def shrink_packed(
    packed, code, block_scales, scale_code, outer_scales, offset, scales, out, out_stride, rows, columns,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr, NESTED: tl.constexpr, OUTER: tl.constexpr,
    TURNS: tl.constexpr,
):  # fmt: skip
    """4-bit weights of bitsandbytes in 8 bits, each row divided by its scale; rows become columns if it turns.

    BLOCKS quantization blocks of SIZE weights of each of ROWS rows, for each program.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    known = (row < rows)[:, None] & (block * SIZE < columns)[None, :]
    number = row[:, None] * (columns // SIZE) + block[None, :]
    if NESTED:
        inner = tl.load(block_scales + number, mask=known, other=0).to(tl.int32)
        factor = tl.load(scale_code + inner) * tl.load(outer_scales + number // OUTER, mask=known, other=0.0)
        factor += tl.load(offset)
    else:
        factor = tl.load(block_scales + number, mask=known, other=0.0)
    scale = tl.load(scales + row, mask=row < rows, other=1.0)
    inverse = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), scale)[:, None, None]
    byte = (number * (SIZE // 2))[:, :, None] + tl.arange(0, SIZE // 2)[None, None, :]
    pairs = tl.load(packed + byte, mask=known[:, :, None], other=0).to(tl.int32)
    high = tl.load(code + (pairs >> 4)) * factor[:, :, None] * inverse
    low = tl.load(code + (pairs & 15)) * factor[:, :, None] * inverse
    narrowed = tl.reshape(tl.join(high, low), (ROWS, BLOCKS * SIZE)).to(out.dtype.element_ty)
    column = (tl.program_id(1) * BLOCKS * SIZE + tl.arange(0, BLOCKS * SIZE)).to(tl.int64)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if TURNS:
        tl.store(out + column[:, None] * out_stride + row[None, :], tl.trans(narrowed), mask=tl.trans(inside))
    else:
        tl.store(out + row[:, None] * out_stride + column[None, :], narrowed, mask=inside)


@triton.jit
def place(
    adapter, scales, factors, out, row_stride, column_stride, out_stride, rows, ranks, SCALES: tl.constexpr,
    ROWS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """An adapter in 8 bits beside weights: rows divided by their scales, if any, columns by their factors."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, RANKS)
    known = (row < rows)[:, None] & (column < ranks)[None, :]
    spot = row[:, None] * row_stride + column[None, :] * column_stride
    factor = tl.load(factors + column, mask=column < ranks, other=1.0)
    values = tl.load(adapter + spot, mask=known, other=0.0).to(tl.float32)
    values *= tl.div_rn(tl.full((RANKS,), 1.0, tl.float32), factor)[None, :]
    if SCALES:
        scale = tl.load(scales + row, mask=row < rows, other=1.0)
        values *= tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), scale)[:, None]
    tl.store(out + row[:, None] * out_stride + column[None, :], values.to(out.dtype.element_ty), mask=known)


@triton.jit
def surprise(logits, targets, losses, stride, width, ignored, BLOCK: tl.constexpr):
    """Cross-entropy of a row in nats; its gradient takes the place of the logits. A row that is ignored has none."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    counts = target != ignored
    chosen = tl.load(logits + row * stride + tl.where(counts, target, 0)).to(tl.float32)  # before it is written over
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(logits + row * stride + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, values)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(largest - shift) + tl.exp(values - shift)
        largest = higher
    peak = tl.max(largest, 0)
    amount = tl.sum(total * tl.exp(largest - peak), 0)
    tl.store(losses + row, tl.where(counts, tl.log(amount) + peak - chosen, 0.0))
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        place = logits + row * stride + columns
        values = tl.load(place, mask=columns < width, other=float("-inf")).to(tl.float32)
        slope = tl.exp(values - peak) / amount - tl.where(columns == target, 1.0, 0.0)
        slope = tl.where(counts, slope, 0.0)
        tl.store(place, slope.to(logits.dtype.element_ty), mask=columns < width)


@triton.jit
def drop(x, out, x_stride, out_stride, width, seed, rate, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    """Dropout of a row: the same seed drops the same places. It is added to what is there, or takes its place."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    kept = tl.rand(seed, tl.program_id(0) * width + columns) >= rate
    values = tl.where(kept, values / (1.0 - rate), 0.0)
    place = out + row * out_stride + columns
    if ADDS:
        values += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def attention_sums(
    gradient, attended, sums, gradient_stride, attended_stride, heads, WIDTH: tl.constexpr, HEADS: tl.constexpr
):
    """Of each row and head the product of what attention gave with its gradient."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    columns = head[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (head < heads)[:, None]
    above = tl.load(gradient + row * gradient_stride + columns, mask=inside, other=0.0).to(tl.float32)
    given = tl.load(attended + row * attended_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(sums + row * heads + head, tl.sum(above * given, 1), mask=head < heads)


@triton.jit
def attention_backward_keys(
    query, key, value, gradient, logs, sums, key_gradient, value_gradient, scale, length, group,
    query_stride, key_stride, value_stride, gradient_stride, key_gradient_stride, value_gradient_stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of COLUMNS keys and values of a head: over all queries that see them, of all heads of its group.

    As in FlashAttention 2 (Dao 2023, arXiv:2307.08691), but each sum is one program's, so that its order is fixed.
    """
    start = tl.program_id(0) * COLUMNS
    heads = tl.num_programs(1)
    head = tl.program_id(1)
    first = tl.program_id(2).to(tl.int64) * length
    width = tl.arange(0, WIDTH)
    places = start + tl.arange(0, COLUMNS)
    inside = (places < length)[:, None]
    keys = tl.load(key + (first + places)[:, None] * key_stride + head * WIDTH + width[None, :], mask=inside, other=0.0)
    values = tl.load(
        value + (first + places)[:, None] * value_stride + head * WIDTH + width[None, :], mask=inside, other=0.0
    )
    to_keys = tl.zeros((COLUMNS, WIDTH), tl.float32)
    to_values = tl.zeros((COLUMNS, WIDTH), tl.float32)
    steps = (length - start + ROWS - 1) // ROWS
    for number in range(group * steps):
        looking = head * group + number // steps
        rows = start + (number % steps) * ROWS + tl.arange(0, ROWS)
        known = rows < length
        lines = first + rows
        asked = tl.load(
            query + lines[None, :] * query_stride + looking * WIDTH + width[:, None], mask=known[None, :], other=0.0
        )
        log = tl.load(logs + (tl.program_id(2) * heads * group + looking) * length + rows, mask=known, other=0.0)
        products = tl.dot(keys, asked) * (scale * LOG2_E)
        shares = tl.exp2(products - (log * LOG2_E)[None, :])
        shares = tl.where((places[:, None] <= rows[None, :]) & known[None, :], shares, 0.0)
        above = tl.load(
            gradient + lines[:, None] * gradient_stride + looking * WIDTH + width[None, :],
            mask=known[:, None],
            other=0.0,
        )
        to_values += tl.dot(shares.to(above.dtype), above)
        slopes = tl.dot(values, tl.trans(above))
        total = tl.load(sums + lines * heads * group + looking, mask=known, other=0.0)
        slopes = shares * (slopes - total[None, :])
        to_keys += tl.dot(slopes.to(asked.dtype), tl.trans(asked))
    out = (first + places)[:, None]
    tl.store(
        key_gradient + out * key_gradient_stride + head * WIDTH + width[None, :],
        (to_keys * scale).to(key_gradient.dtype.element_ty), mask=inside,
    )  # fmt: skip
    tl.store(
        value_gradient + out * value_gradient_stride + head * WIDTH + width[None, :],
        to_values.to(value_gradient.dtype.element_ty), mask=inside,
    )  # fmt: skip


@triton.jit
def attention_backward_queries(
    query, key, value, gradient, logs, sums, query_gradient, scale, length, group,
    query_stride, key_stride, value_stride, gradient_stride, query_gradient_stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of ROWS queries of a head, over all keys that they see."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS  # the longest first
    heads = tl.num_programs(1)
    head = tl.program_id(1)
    first = tl.program_id(2).to(tl.int64) * length
    width = tl.arange(0, WIDTH)
    rows = start + tl.arange(0, ROWS)
    known = rows < length
    lines = (first + rows)[:, None]
    asked = tl.load(query + lines * query_stride + head * WIDTH + width[None, :], mask=known[:, None], other=0.0)
    above = tl.load(gradient + lines * gradient_stride + head * WIDTH + width[None, :], mask=known[:, None], other=0.0)
    log = tl.load(logs + (tl.program_id(2) * heads + head) * length + rows, mask=known, other=0.0) * LOG2_E
    total = tl.load(sums + (first + rows) * heads + head, mask=known, other=0.0)
    to_queries = tl.zeros((ROWS, WIDTH), tl.float32)
    for begin in range(0, tl.minimum(start + ROWS, length), COLUMNS):
        places = begin + tl.arange(0, COLUMNS)
        there = places < length
        lies = (first + places)[None, :]
        keys = tl.load(
            key + lies * key_stride + (head // group) * WIDTH + width[:, None], mask=there[None, :], other=0.0
        )
        values = tl.load(
            value + lies * value_stride + (head // group) * WIDTH + width[:, None], mask=there[None, :], other=0.0
        )
        shares = tl.exp2(tl.dot(asked, keys) * (scale * LOG2_E) - log[:, None])
        shares = tl.where((places[None, :] <= rows[:, None]) & there[None, :], shares, 0.0)
        slopes = shares * (tl.dot(above, values) - total[:, None])
        to_queries += tl.dot(slopes.to(keys.dtype), tl.trans(keys))
    tl.store(
        query_gradient + lines * query_gradient_stride + head * WIDTH + width[None, :],
        (to_queries * scale).to(query_gradient.dtype.element_ty), mask=known[:, None],
    )  # fmt: skip
