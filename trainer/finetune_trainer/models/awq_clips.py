"""Where AWQ cuts off the largest weights of a group: the limit with the least error of the group's own products.

gptqmodel (7.6) multiplies 512 tokens with each candidate. The same error comes of the tokens' second moments, once for
all candidates and rows: mean over x of (x·d)² = dᵀ E[xxᵀ] d, where d is what rounding changes. On a CPU that search was
two thirds of AWQ's time.
"""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TOKENS = 512
"""Those that are looked at, at equal distances: gptqmodel's. All of them cost little more, and came to a perplexity of
123.8 for 106.9 (SmolLM2-135M, 16 blocks); why is not known."""
CANDIDATES = [1 - step / 20 for step in range(10)]
"""Parts of the largest weight of a group: gptqmodel's."""
ELEMENTS_AT_ONCE = 2**24
"""Weights that are looked at together: a copy or two in fp32 are held of them."""


def find_limits(processor: Any, weights: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 - gptqmodel's AWQProcessor
    """The largest magnitude that each group keeps, of shape (rows, groups, 1), in the weights' dtype.

    `weights` (rows, columns), `inputs` (..., columns).
    """
    import torch  # noqa: PLC0415 - slow

    columns = weights.shape[1]
    size = processor.qcfg.group_size if processor.qcfg.group_size > 0 else columns
    tokens = inputs.reshape(-1, columns)
    moments = _second_moments(tokens[:: max(1, len(tokens) // TOKENS)], size, weights.device)
    limits = []
    for some in torch.split(weights, max(1, ELEMENTS_AT_ONCE // columns)):
        groups = some.float().reshape(len(some), -1, size)
        largest = groups.abs().amax(-1, keepdim=True)
        best, least = largest.clone(), torch.full_like(largest, torch.inf)
        rounded = torch.empty_like(groups)
        for candidate in CANDIDATES:
            limit = largest * candidate
            processor._pseudo_quantize_tensor_into(groups.clamp(-limit, limit), rounded)  # noqa: SLF001 - its rounding
            change = (rounded.sub_(groups)).transpose(0, 1)
            error = (change.bmm(moments) * change).sum(-1).T.unsqueeze(-1)
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better, limit, best)
        limits.append(best)
    return torch.cat(limits).to(weights.dtype)


def _second_moments(tokens: torch.Tensor, size: int, device: torch.device) -> torch.Tensor:
    """E[xxᵀ] of each group of columns, (groups, size, size) in fp32, of tokens (tokens, columns)."""
    parts = tokens.to(device).float().reshape(len(tokens), -1, size).transpose(0, 1)
    return parts.transpose(1, 2).bmm(parts) / max(1, len(tokens))


def clip_by_moments(processors: Any) -> None:  # noqa: ANN401 - a class of gptqmodel
    """Let gptqmodel's `AWQProcessor` find its limits so. Once or more often."""
    theirs = processors._compute_best_clip  # noqa: SLF001 - there is no setting

    @wraps(getattr(theirs, "__wrapped__", theirs))
    def find(processor: Any, weights: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 - theirs
        return find_limits(processor, weights, inputs)

    processors._compute_best_clip = find  # noqa: SLF001
