"""The scale of each group of weights for GPTQ: the one with the least error, of 80 that are tried side by side.

gptqmodel (7.6) can look for it too, one candidate after another, and waits for the device several times for each: on a
GPU, where a group is small, that is nearly all of the time that GPTQ takes.
"""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

ELEMENTS_AT_ONCE = {"cpu": 2**16, "cuda": 2**23}
"""Weights times candidates that are rounded at once: what stays in a core's cache, and what keeps a GPU busy."""


def find_scales(
    weights: torch.Tensor, levels: int, candidates: int, step: float, power: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each row, both of shape (rows, 1), for whole numbers from 0 to `levels`.

    `weights` (rows, columns) are one group of each row. Candidate i is 1 - i * step of the scale that the largest
    weight of the row just fits in, zero in the middle; the error is the sum of |rounded - weight| ** power.
    """
    import torch  # noqa: PLC0415 - slow

    zero = (levels + 1) / 2
    largest = weights.abs().amax(1)
    widest = 2 * torch.where(largest == 0, torch.ones_like(largest), largest) / levels
    factors = 1 - step * torch.arange(candidates, device=weights.device, dtype=widest.dtype)
    errors = []
    for some in torch.split(factors, max(1, ELEMENTS_AT_ONCE[weights.device.type] // weights.numel())):
        scales = (some[:, None] * widest)[:, :, None]
        rounded = (weights / scales).round_().add_(zero).clamp_(0, levels).sub_(zero).mul_(scales)
        errors.append(rounded.sub_(weights).abs_().pow_(power).sum(-1))
    best = torch.cat(errors).argmin(0)
    return (factors[best] * widest)[:, None], torch.full_like(widest, zero)[:, None]


def search_side_by_side(quantizers: Any) -> None:  # noqa: ANN401 - a class of gptqmodel
    """Let gptqmodel's `Quantizer` do so where it would search the scales of symmetric groups. Once or more often."""
    plain: Callable[..., None] = getattr(quantizers.find_params, "__wrapped__", quantizers.find_params)

    @wraps(plain)
    def find_params(quantizer: Any, x: torch.Tensor, weight: bool = False) -> None:  # noqa: ANN401 - theirs
        power = float(quantizer.qcfg.mse or 0.0)
        if not (weight and quantizer.qcfg.sym and quantizer.perchannel and power) or x.dim() != 2:  # noqa: PLR2004
            plain(quantizer, x, weight=weight)
            return
        quantizer.maxq = quantizer.maxq.to(x.device)
        candidates = int(quantizer.maxshrink * quantizer.grid)
        levels = 2**quantizer.qcfg.bits - 1
        quantizer.scale, quantizer.zero = find_scales(x, levels, candidates, 1 / quantizer.grid, power)

    quantizers.find_params = find_params
