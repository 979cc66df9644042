"""Causal attention with its backward pass called by name, so that a layer can keep what it needs of it.

Forward by cuDNN for whole batches, by torch's FlashAttention for sequences one after another (packing). cuDNN's backward
pass adds up in no fixed order, and FlashAttention's is three times as slow where it does (an H100, 16,384 tokens): that
of whole batches is ours (`kernels.py`). Heads of key and value that several queries share are taken as they are.

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


def attend(query: Tensor, key: Tensor, value: Tensor, rows: Rows, width: int, scale: float) -> Attended:
    """Causal attention of query [tokens, heads x width] and key, value [tokens, key heads x width]."""
    if not query.is_cuda:
        return Attended(_plainly(*_shaped(query, key, value, rows=rows, width=width), rows, scale), ())
    if rows.limits is not None:
        heads = (_heads(each, width) for each in (query, key, value))
        limits = (rows.limits, rows.limits, rows.longest, rows.longest)
        out, logs, *state, _ = aten._flash_attention_forward(*heads, *limits, 0.0, True, False, scale=scale)  # noqa: SLF001, FBT003 - torch's own
        return Attended(out.flatten(1), (logs, *state))
    pieces = _shaped(query, key, value, rows=rows, width=width)
    out, logs, *_ = aten._scaled_dot_product_cudnn_attention(*pieces, None, True, 0.0, True, False, scale=scale)  # noqa: SLF001, FBT003 - torch's own
    return Attended(out.transpose(1, 2).reshape(rows.tokens, -1), (logs,))


def attend_backward(  # noqa: PLR0913 - what attention takes and gave
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attended: Attended,
    rows: Rows,
    width: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, shaped as they are, from that of what attention gave."""
    if not query.is_cuda:
        with torch.enable_grad():
            leaves = [each.detach().clone().requires_grad_() for each in (query, key, value)]
            out = _plainly(*_shaped(*leaves, rows=rows, width=width), rows, scale)
            return torch.autograd.grad(out, leaves, gradient)
    if rows.limits is not None:
        logs, *state = attended.rest
        above, *heads, out = (_heads(each, width) for each in (gradient, query, key, value, attended.out))
        limits = (rows.limits, rows.limits, rows.longest, rows.longest)
        with _in_fixed_order():
            found = aten._flash_attention_backward(above, *heads, out, logs, *limits, 0.0, True, *state, scale=scale)  # noqa: SLF001, FBT003 - torch's own
        first, second, third = (each.flatten(1) for each in found)
        return first, second, third
    return ops.attention_backward(
        gradient, query, key, value, attended.out, attended.rest[0], length=rows.length, width=width, scale=scale
    )


@contextmanager
def _in_fixed_order() -> Iterator[None]:
    """FlashAttention adds up in a fixed order only where nothing else is allowed, not where it is warned of."""
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)


def _heads(each: Tensor, width: int) -> Tensor:
    """[tokens, heads, width]."""
    return each.unflatten(1, (-1, width))


def _shaped(*each: Tensor, rows: Rows, width: int) -> tuple[Tensor, ...]:
    """[rows, heads, length, width]."""
    return tuple(one.unflatten(1, (-1, width)).unflatten(0, (rows.rows, rows.length)).transpose(1, 2) for one in each)


def _plainly(query: Tensor, key: Tensor, value: Tensor, rows: Rows, scale: float) -> Tensor:
    mask = None
    if rows.limits is not None:
        lengths = rows.limits.diff()
        number = torch.arange(len(lengths)).repeat_interleave(lengths)
        mask = (number[:, None] == number[None, :]).tril()
    out = functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2).reshape(rows.tokens, -1)
