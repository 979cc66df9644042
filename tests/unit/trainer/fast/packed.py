"""Layers of 4 bits, made on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import bitsandbytes

if TYPE_CHECKING:
    from torch import Tensor


def pack_linear(
    weight: Tensor, bias: Tensor | None = None, *, kind: str = "nf4", nested: bool = True, size: int = 64
) -> Any:
    """bitsandbytes' Linear4bit of a weight [outputs, inputs]; `nested`: the scales of `size` weights have 8 bits."""
    outputs, inputs = weight.shape
    bnb: Any = bitsandbytes
    layer = bnb.nn.Linear4bit(inputs, outputs, bias=bias is not None, compute_dtype=weight.dtype)
    layer.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type=kind, compress_statistics=nested, blocksize=size
    )
    if bias is not None:
        layer.bias.data = bias.clone()
    return layer.to("cpu")
