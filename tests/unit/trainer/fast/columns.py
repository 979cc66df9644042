"""Tensors as the fast path lays them out: columns of a wider buffer, of which nothing else may be read or written."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from hypothesis import settings

if TYPE_CHECKING:
    from torch import Tensor

FEW = settings(max_examples=12, derandomize=True, deadline=None)
BESIDE = 3
"""Columns on either side."""


def random_columns(tokens: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal values [tokens, width], between columns of NaN."""
    view = blank_columns(tokens, width, dtype)
    return view.copy_(torch.randn(tokens, width, dtype=dtype))


def blank_columns(tokens: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """NaN to be written over, between columns of NaN."""
    return torch.full((tokens, width + 2 * BESIDE), math.nan, dtype=dtype)[:, BESIDE:-BESIDE]


def assert_kept_inside(*views: Tensor) -> None:
    """No column beside a view was written."""
    for view in views:
        buffer = view._base
        assert buffer is not None
        assert buffer[:, :BESIDE].isnan().all()
        assert buffer[:, -BESIDE:].isnan().all()
