"""The order in which rows are trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.data import Sampler

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class RowOrder(Sampler[int]):
    """The order of rows: a function of seed and epoch alone, so that a resume needs no history.

    Rows of one optimizer step are sorted by length: the sum of their gradients is the same, with less padding.
    """

    def __init__(self, lengths: Sequence[int], seed: int, global_batch: int) -> None:
        """`lengths` in tokens."""
        self._lengths, self._seed, self._global_batch = lengths, seed, global_batch
        self.epoch = 0

    def __len__(self) -> int:
        """Rows."""
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        """Indices of rows."""
        generator = torch.Generator().manual_seed((self._seed << 20) + self.epoch)
        shuffled = torch.randperm(len(self), generator=generator).tolist()
        for start in range(0, len(self), self._global_batch):
            yield from sorted(shuffled[start : start + self._global_batch], key=self._lengths.__getitem__)
