"""AWQ's whole numbers packed a group of columns at a time: gptqmodel (7.6) rounds them column by column, in Python."""

from __future__ import annotations

import importlib
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def pack_layer(layer: Any, linear: torch.nn.Linear, scales: torch.Tensor, zeros: torch.Tensor) -> None:  # noqa: ANN401 - gptqmodel's AwqTorchLinear
    """Put the weights of `linear` into the buffers of `layer`, with the bits that its own `pack` puts there.

    `scales`, `zeros` (rows, groups), of the groups of columns of each row.
    """
    import torch  # noqa: PLC0415 - slow

    packing: Any = importlib.import_module("gptqmodel.quantization.awq.utils.packing_utils")
    held = (torch.float16, torch.bfloat16)
    scales, zeros = scales.t().contiguous(), zeros.t().contiguous()
    dtype = scales.dtype if scales.dtype in held else torch.float16
    widths, offsets = scales.to(dtype), zeros * scales
    layer.register_buffer("scales", widths)
    if linear.bias is None:
        layer.bias = None
    else:
        bias = linear.bias.detach().clone()
        layer.register_buffer("bias", bias.to(bias.dtype if bias.dtype in held else dtype))
    packed = []
    for group, weights in enumerate(torch.split(linear.weight.detach(), layer.group_size, dim=1)):
        codes = torch.round((weights.t() + offsets[group]) / widths[group]).to(torch.int32)
        packed.append(packing.pack_awq(codes.contiguous(), zeros[group, None].to(torch.int32), layer.bits))
    for name, parts in zip(("qweight", "qzeros"), zip(*packed, strict=True), strict=True):
        layer.register_buffer(name, torch.cat(parts))


def pack_in_groups(layers: Any) -> None:  # noqa: ANN401 - a class of gptqmodel
    """Let gptqmodel's `AwqTorchLinear` pack so. Once or more often."""
    theirs = layers.pack

    @wraps(getattr(theirs, "__wrapped__", theirs))
    def pack(
        layer: Any,  # noqa: ANN401 - theirs
        linear: torch.nn.Linear,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        g_idx: None = None,  # noqa: ARG001 - as gptqmodel calls it
    ) -> None:
        pack_layer(layer, linear, scales, zeros)

    layers.pack = pack
