"""Layers of 4 and of 8 bits, made on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import bitsandbytes
import torch

from finetune_trainer.models import float8

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


def narrow_linear(weight: Tensor, bias: Tensor | None = None) -> float8.Float8Linear:
    """Our linear layer in FP8 of a weight [outputs, inputs]."""
    outputs, inputs = weight.shape
    layer = float8.Float8Linear(inputs, outputs, bias=bias is not None, source_cls=torch.nn.Linear)
    layer.weight.data, layer.scales = float8.narrow(weight)
    if bias is not None:
        layer.bias.data = bias.clone()
    return layer
