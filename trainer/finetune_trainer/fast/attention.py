"""Causal attention with its backward pass called by name, so that a layer can keep what it needs of it.

Forward by cuDNN for whole batches, by torch's FlashAttention for sequences one after another (packing). Backward, cuDNN
(torch 2.13) adds up in no fixed order, and FlashAttention is three times as slow as it where it does (31 ms for 10, an
H100, 16,384 tokens): the backward pass of whole batches is ours (`kernels.py`, 17 ms). Heads of key and value that
several queries share are taken as they are.

Rows that are padded on the right need no mask: no token looks ahead, and a pad's own output counts nowhere.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from finetune_trainer.fast import ops

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Rows:
    """How tokens lie in a batch: rows of one length, or sequences of several one after another."""

    rows: int
    length: int
    """Of each row; of packed sequences all tokens together."""
    limits: Tensor | None = None
    """int32 [sequences + 1], where packed sequences begin and end."""
    longest: int = 0
    """Tokens of the longest packed sequence."""

    @property
    def tokens(self) -> int:
        """In all."""
        return self.rows * self.length


@dataclass(frozen=True)
class Attended:
    """What attention gave, [tokens, heads x width], and what its backward pass wants besides."""

    out: Tensor
    rest: tuple[Any, ...]


@dataclass(frozen=True)
class Causal:
    """Causal attention of query [tokens, heads x width] and of key and value [tokens, key heads x width]."""

    rows: Rows
    width: int
    """Of a head."""
    scale: float
    """Of the products of query and key."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Attended:
        """What comes of them."""
        if not query.is_cuda:
            return Attended(self._plainly(query, key, value), ())
        if self.rows.limits is not None:
            heads = (self._heads(each) for each in (query, key, value))
            out, logs, *state, _ = aten._flash_attention_forward(  # noqa: SLF001 - torch's own
                *heads, *self._limits, 0.0, True, False, scale=self.scale
            )
            return Attended(out.flatten(1), (logs, *state))
        pieces = (self._in_rows(each) for each in (query, key, value))
        out, logs, *_ = aten._scaled_dot_product_cudnn_attention(  # noqa: SLF001 - torch's own
            *pieces, None, True, 0.0, True, False, scale=self.scale
        )
        return Attended(out.transpose(1, 2).reshape(len(query), -1), (logs,))

    def backward(
        self, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Attended
    ) -> tuple[Tensor, ...]:
        """Gradients of query, key and value, shaped as they are, from that of what came of them."""
        if not query.is_cuda:
            with torch.enable_grad():
                leaves = [each.detach().clone().requires_grad_() for each in (query, key, value)]
                return torch.autograd.grad(self._plainly(*leaves), leaves, gradient)
        if self.rows.limits is not None:
            logs, *state = attended.rest
            above, *heads, out = (self._heads(each) for each in (gradient, query, key, value, attended.out))
            with _in_fixed_order():
                found = aten._flash_attention_backward(  # noqa: SLF001 - torch's own
                    above, *heads, out, logs, *self._limits, 0.0, True, *state, scale=self.scale
                )
            return tuple(each.flatten(1) for each in found)
        logs = attended.rest[0]
        return ops.attention_backward(
            gradient, query, key, value, attended.out, logs, length=self.rows.length, width=self.width, scale=self.scale
        )

    @property
    def _limits(self) -> tuple[Any, ...]:
        return self.rows.limits, self.rows.limits, self.rows.longest, self.rows.longest

    def _heads(self, each: Tensor) -> Tensor:
        """[tokens, heads, width]."""
        return torch.unflatten(each, 1, (-1, self.width))

    def _in_rows(self, each: Tensor) -> Tensor:
        """[rows, heads, length, width]."""
        return torch.unflatten(self._heads(each), 0, (self.rows.rows, self.rows.length)).transpose(1, 2)

    def _plainly(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = None
        if self.rows.limits is not None:
            lengths = self.rows.limits.diff()
            number = torch.arange(len(lengths)).repeat_interleave(lengths)
            mask = (number[:, None] == number[None, :]).tril()
        query, key, value = (self._in_rows(each) for each in (query, key, value))
        out = functional.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
        )
        return out.transpose(1, 2).reshape(self.rows.tokens, -1)


@contextmanager
def _in_fixed_order() -> Iterator[None]:
    """FlashAttention adds up in a fixed order only where nothing else is allowed, not where it is warned of."""
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
