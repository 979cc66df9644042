"""The order in which rows are trained on. What is drawn here is a row, or a sequence of rows packed together."""

from __future__ import annotations

import math
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Sampler

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

FILLER = -1
"""In the place of a row's index."""


class RowOrder(Sampler[int]):
    """The order of rows: a function of seed and epoch alone, so that a resume needs no history.

    Unweighted, an epoch is every row once. Weighted, an epoch draws `quotas[i]` rows of dataset i, which go round the
    dataset from epoch to epoch: a large dataset is covered in several epochs, of a small one every row comes equally
    often, give or take one. Rows of one optimizer step are sorted by length: the sum of their gradients is the same,
    with less padding. Without shuffling rows stay in the order of the files.
    """

    def __init__(  # noqa: PLR0913 - what an order depends on
        self,
        lengths: Sequence[int] | NDArray[np.integer],
        seed: int,
        global_batch: int,
        *,
        shuffle: bool = True,
        datasets: NDArray[np.integer] | None = None,
        quotas: Sequence[int] = (),
    ) -> None:
        """`lengths` in tokens; `datasets`: the dataset of each row, needed with `quotas`."""
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._seed, self._global_batch, self._shuffle = seed, global_batch, shuffle
        self._quotas = tuple(quotas)
        self._members = [] if datasets is None else [np.flatnonzero(datasets == i) for i in range(len(self._quotas))]
        self.epoch = 0

    def __len__(self) -> int:
        """Rows of an epoch."""
        return sum(self._quotas) if self._quotas else len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        """Indices of rows."""
        drawn = self._drawn() if self._quotas else np.arange(len(self._lengths))
        if not self._shuffle:
            yield from map(int, drawn)
            return
        np.random.default_rng((self._seed, self.epoch)).shuffle(drawn)
        for start in range(0, len(drawn), self._global_batch):
            step = drawn[start : start + self._global_batch]
            yield from map(int, step[np.argsort(self._lengths[step], kind="stable")])

    def _drawn(self) -> NDArray[np.intp]:
        """What this epoch draws of each dataset, dataset after dataset."""
        return np.concatenate([self._turn(dataset, quota) for dataset, quota in enumerate(self._quotas)])

    def _turn(self, dataset: int, quota: int) -> NDArray[np.intp]:
        """The next `quota` rows on the way round the dataset; each round has an order of its own."""
        members = self._members[dataset]
        if not quota:
            return members[:0]
        start, end = self.epoch * quota, (self.epoch + 1) * quota
        first, last = start // len(members), math.ceil(end / len(members))
        rounds = np.concatenate([self._round(dataset, number) for number in range(first, last)])
        return rounds[start - first * len(members) : end - first * len(members)]

    def _round(self, dataset: int, number: int) -> NDArray[np.intp]:
        members = self._members[dataset]
        if not self._shuffle:
            return members
        return np.random.default_rng((self._seed, number, dataset + 1)).permutation(members)


class Share(Sampler[list[int]]):
    """The micro-batches of one rank. Those of all ranks together are the same for any number of ranks.

    Every rank has as many of them, since all must take part in every exchange: where rows run out at the end of an
    epoch, a rank that has none left takes FILLER, a row of which nothing counts.
    """

    def __init__(self, order: RowOrder, micro_batch: int, global_batch: int, rank: int, world_size: int) -> None:
        """Rows a micro-batch and rows a step over all ranks."""
        self._order, self._micro_batch, self._global_batch = order, micro_batch, global_batch
        self._rank, self._world_size = rank, world_size

    def __len__(self) -> int:
        """Micro-batches of an epoch."""
        whole, rest = divmod(len(self._order), self._global_batch)
        return whole * self._rounds(self._global_batch) + self._rounds(rest)

    def __iter__(self) -> Iterator[list[int]]:
        """Indices of rows, a list a micro-batch."""
        rows = iter(self._order)
        while step := list(islice(rows, self._global_batch)):
            cut = [step[start : start + self._micro_batch] for start in range(0, len(step), self._micro_batch)]
            own = cut[self._rank :: self._world_size]
            yield from own
            yield from [[FILLER]] * (self._rounds(len(step)) - len(own))

    def _rounds(self, rows: int) -> int:
        return math.ceil(rows / (self._micro_batch * self._world_size))


def share_out(sequences: Sequence[int], rows: Sequence[float], weights: Sequence[float]) -> tuple[int, ...]:
    """Sequences of each dataset that an epoch draws: as many in all as there are, their rows shared as weights say.

    `sequences` and `rows` of each dataset; they differ where rows are packed. A dataset without rows is left out.
    """
    shares = [weight * count / of if of else 0.0 for weight, count, of in zip(weights, sequences, rows, strict=True)]
    exact = [sum(sequences) * share / sum(shares) for share in shares]
    quotas = [math.floor(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (quotas[i] - exact[i], i))
    for index in by_remainder[: sum(sequences) - sum(quotas)]:
        quotas[index] += 1
    return tuple(quotas)
