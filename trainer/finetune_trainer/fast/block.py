"""A block of a Llama, forward, and backward by hand: attention and a gated MLP, each on top of the residual stream.

What is kept for the backward pass is a choice; what is not kept is computed again from the block's input. The product
behind SwiGLU, a quarter of the block, never is: nothing needs its result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch

from finetune_trainer.fast import ops
from finetune_trainer.fast.attention import Attended, Causal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from finetune_trainer.fast.attention import Rows
    from finetune_trainer.fast.linear import Keep, Linears


class Plan(IntEnum):
    """What a block keeps for its backward pass besides its input."""

    INPUT = 0
    ATTENTION = 1
    """And what attention gave: products, norms and SwiGLU are computed again."""
    PRODUCTS = 2
    """And all that takes a product: norms and SwiGLU are computed again."""


@dataclass(frozen=True)
class Norm:
    """An RMS norm, which does not train."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True)
class Batch:
    """What all blocks are told of a micro-batch."""

    rows: Rows
    cosines: Tensor
    """[period, width of a head]: token i has the angles of row i % period."""
    sines: Tensor


@dataclass(frozen=True)
class Heads:
    """Query, key and value of all tokens, [tokens, heads x width]; rotated."""

    query: Tensor
    key: Tensor
    value: Tensor
    raw: Tensor
    """As the product gave them, side by side; the same memory where heads have no norms."""
    factors: tuple[Tensor, ...] = ()
    """Of the norms of query and key."""


@dataclass
class Looked:
    """Of attention's forward pass."""

    normed: Tensor
    """[tokens, inputs + room], as `wide`."""
    factors: Tensor
    heads: Heads
    attended: Attended
    wide: Tensor
    """What attention gave, with extra columns."""


@dataclass(frozen=True)
class Attention:
    """Norm, attention and its output."""

    norm: Norm
    inputs: Linears
    """Query, key, value."""
    out: Linears
    head_norms: tuple[Norm, ...]
    """Of each head of query and of key; of most models none."""
    widths: list[int]
    """Of query, key and value."""
    head_width: int
    scale: float
    """Of the products of query and key."""

    def look(
        self, x: Tensor, batch: Batch, seeds: Sequence[int], heads: Heads | None, attended: Attended | None
    ) -> Looked:
        """All but the output's product. `heads`, `attended`: where they were kept."""
        normed = _empty(x, self.inputs.inputs + self.inputs.room)
        factors = ops.normalize(x, self.norm.weight, self.norm.epsilon, normed[:, : self.inputs.inputs])
        self.inputs.extend(normed, seeds[:3])
        if heads is None:
            raw = self.inputs.multiply(normed, _empty(x, self.inputs.outputs))
            heads = self._turn(raw, batch)
        if attended is None:
            attended = self._causal(batch).forward(heads.query, heads.key, heads.value)
        wide = _empty(x, self.out.inputs + self.out.room)
        wide[:, : self.out.inputs].copy_(attended.out)
        self.out.extend(wide, seeds[3:4])
        return Looked(normed, factors, heads, attended, wide)

    def finish(self, x: Tensor, looked: Looked) -> Tensor:
        """The residual stream after attention."""
        return self.out.multiply_add(looked.wide, x)

    def backward(  # noqa: PLR0913 - what the forward pass had
        self, gradient: Tensor, x: Tensor, looked: Looked, batch: Batch, seeds: Sequence[int], below: Tensor, keep: Keep
    ) -> None:
        """Into `below` the gradient of x, from that of the residual stream after it [tokens, outputs + room]."""
        heads = looked.heads
        above = self.out.backward(gradient, seeds[3:4])
        self.out.learn(gradient, looked.wide, seeds[3:4], keep)
        parts = self._causal(batch).backward(above, heads.query, heads.key, heads.value, looked.attended)
        joined = _empty(x, self.inputs.outputs + self.inputs.room)
        self._turn_back(parts, heads, joined[:, : self.inputs.outputs], batch)
        normed = self.inputs.backward(joined, seeds[:3])
        self.inputs.learn(joined, looked.normed, seeds[:3], keep)
        residual = gradient[:, : self.out.outputs]
        ops.normalize_backward(normed, x, self.norm.weight, looked.factors, below, residual)

    def _causal(self, batch: Batch) -> Causal:
        return Causal(batch.rows, self.head_width, self.scale)

    def _turn(self, raw: Tensor, batch: Batch) -> Heads:
        query, key, value = torch.split(raw, self.widths, 1)
        if not self.head_norms:
            turning = raw[:, : sum(self.widths[:2])]
            ops.rotate(turning, batch.cosines, batch.sines, turning)
            return Heads(query, key, value, raw)
        both = _empty(raw, sum(self.widths[:2]))
        normed = torch.split(both, self.widths[:2], 1)
        factors = tuple(
            ops.normalize(each, norm.weight, norm.epsilon, out)
            for each, norm, out in zip((query, key), self.head_norms, normed, strict=True)
        )
        ops.rotate(both, batch.cosines, batch.sines, both)
        return Heads(normed[0], normed[1], value, raw, factors)

    def _turn_back(self, gradients: Sequence[Tensor], heads: Heads, out: Tensor, batch: Batch) -> None:
        """The gradients of what the product gave, side by side, from those of query, key and value."""
        *turned, straight = torch.split(out, self.widths, 1)
        straight.copy_(gradients[2])
        for gradient, part in zip(gradients, turned, strict=False):
            ops.rotate(gradient, batch.cosines, batch.sines, part, back=True)
        raw = torch.split(heads.raw, self.widths, 1)
        for part, each, norm, factors in zip(turned, raw, self.head_norms, heads.factors, strict=False):
            ops.normalize_backward(part, each, norm.weight, factors, part)


@dataclass
class Opened:
    """Of the MLP's forward pass."""

    normed: Tensor
    """[tokens, inputs + room]."""
    factors: Tensor
    whole: Tensor
    """Gate and up, with room for the extra columns of their gradients, which take their place."""


@dataclass(frozen=True)
class Mlp:
    """Norm and SwiGLU."""

    norm: Norm
    both: Linears
    """Gate, up."""
    down: Linears

    def open(self, x: Tensor, seeds: Sequence[int], whole: Tensor | None) -> Opened:
        """Up to gate and up. `whole`: where they were kept."""
        normed = _empty(x, self.both.inputs + self.both.room)
        factors = ops.normalize(x, self.norm.weight, self.norm.epsilon, normed[:, : self.both.inputs])
        self.both.extend(normed, seeds[4:6])
        if whole is None:
            whole = _empty(x, self.both.outputs + self.both.room)
            self.both.multiply(normed, whole[:, : self.both.outputs])
        return Opened(normed, factors, whole)

    def finish(self, x: Tensor, opened: Opened, seeds: Sequence[int]) -> Tensor:
        """The residual stream after the MLP."""
        inner = _empty(x, self.down.inputs + self.down.room)
        ops.gate(opened.whole[:, : self.both.outputs], inner[:, : self.down.inputs])
        self.down.extend(inner, seeds[6:])
        return self.down.multiply_add(inner, x)

    def backward(  # noqa: PLR0913 - what the forward pass had
        self, gradient: Tensor, x: Tensor, opened: Opened, seeds: Sequence[int], below: Tensor, keep: Keep
    ) -> None:
        """Into `below` the gradient of x, from that of the residual stream after it [tokens, outputs + room]."""
        both, inner = opened.whole[:, : self.both.outputs], _empty(x, self.down.inputs + self.down.room)
        above = self.down.backward(gradient, seeds[6:])
        ops.gate_backward(above, both, inner[:, : self.down.inputs])
        self.down.extend(inner, seeds[6:])
        self.down.learn(gradient, inner, seeds[6:], keep)
        normed = self.both.backward(opened.whole, seeds[4:6])
        self.both.learn(opened.whole, opened.normed, seeds[4:6], keep)
        residual = gradient[:, : self.down.outputs]
        ops.normalize_backward(normed, x, self.norm.weight, opened.factors, below, residual)


@dataclass
class Kept:
    """Of a block's forward pass; what its plan does not keep is None."""

    x: Tensor
    seeds: Sequence[int]
    """Of dropout, for query, key, value, output, gate, up and down."""
    attended: Attended | None = None
    heads: Heads | None = None
    middle: Tensor | None = None
    """The residual stream between attention and MLP."""
    whole: Tensor | None = None

    def moved(self, move: Callable[[Any], Any]) -> Kept:
        """The same with its input and what attention gave elsewhere, as `fast.host` moves them."""
        attended = self.attended and replace(self.attended, out=move(self.attended.out))
        return replace(self, x=move(self.x), attended=attended)


@dataclass(frozen=True)
class Block:
    """Attention and MLP."""

    attention: Attention
    mlp: Mlp

    def forward(self, x: Tensor, batch: Batch, seeds: Sequence[int], plan: Plan) -> tuple[Tensor, Kept]:
        """The residual stream after the block, [tokens, width] as before it, and what its backward pass begins with."""
        looked = self.attention.look(x, batch, seeds, None, None)
        middle = self.attention.finish(x, looked)
        opened = self.mlp.open(middle, seeds, None)
        kept = Kept(x, seeds)
        if plan >= Plan.ATTENTION:
            kept.attended = looked.attended
        if plan >= Plan.PRODUCTS:
            kept.heads, kept.middle, kept.whole = looked.heads, middle, opened.whole
        return self.mlp.finish(middle, opened, seeds), kept

    def backward(self, gradient: Tensor, kept: Kept, batch: Batch, keep: Keep, room: int) -> Tensor:
        """The gradient before the block [tokens, width + room] from that after it [tokens, width + room of `down`].

        `room`: what the block below wants.
        """
        x, seeds = kept.x, kept.seeds
        looked = self.attention.look(x, batch, seeds, kept.heads, kept.attended)
        middle = self.attention.finish(x, looked) if kept.middle is None else kept.middle
        opened = self.mlp.open(middle, seeds, kept.whole)
        width, out = x.shape[1], self.attention.out
        between = _empty(x, width + out.room)
        self.mlp.backward(gradient, middle, opened, seeds, between[:, :width], keep)
        del opened, middle
        below = _empty(x, width + room)
        self.attention.backward(between, x, looked, batch, seeds, below[:, :width], keep)
        return below


def _empty(like: Tensor, width: int) -> Tensor:
    return like.new_empty(len(like), width)
