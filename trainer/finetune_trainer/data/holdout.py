"""Which rows are held out, so that what is measured on was never trained on. Pure.

Rows of one group (identical ones, pieces of one text, pairs of one prompt) are on one side only.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from finetune_trainer.config import DEFAULT_SEED
from finetune_trainer.runtime.errors import InvalidDataset

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from finetune_trainer.config import Evaluation

    Digests = NDArray[np.void]
    Choice = NDArray[np.bool_]

DIGEST_BYTES = 16
DEFAULT_PERCENT, DEFAULT_MAX_ROWS = 5.0, 500


def digest_of(*parts: bytes) -> bytes:
    """What rows of one group have in common."""
    return hashlib.blake2b(b"".join(parts), digest_size=DIGEST_BYTES).digest()


def as_digests(joined: bytes) -> Digests:
    """The digests of rows, one after the other, as an array."""
    return np.frombuffer(joined, dtype=f"V{DIGEST_BYTES}")


def hold_out(digests: Digests, evaluation: Evaluation | None) -> Choice:
    """Which rows are held out: the share asked for, at most maxRows, at least one where there is a choice."""
    percent, max_rows, seed = settings_of(evaluation)
    unique, inverse, counts = _groups(digests)
    wanted = min(round(len(digests) * percent / 100) or 1, max_rows) if percent else 0
    order = _shuffled(unique, seed)
    taken = _take_rows(order[:-1], counts, wanted)  # the last group stays: something must be trained on
    chosen = np.zeros(len(unique), dtype=np.bool_)
    chosen[taken] = True
    return chosen[inverse]


def choose_unseen(others: Digests, trained: Digests, evaluation: Evaluation | None) -> tuple[Choice, int]:
    """Which rows of the evaluation datasets are used, and how many were left out because they are trained on."""
    _, max_rows, seed = settings_of(evaluation)
    unique, inverse, counts = _groups(others)
    seen = np.isin(unique.view(f"S{DIGEST_BYTES}"), np.unique(trained).view(f"S{DIGEST_BYTES}"))
    leaked = int(counts[seen].sum())
    chosen = np.zeros(len(unique), dtype=np.bool_)
    chosen[_take_rows((group for group in _shuffled(unique, seed) if not seen[group]), counts, max_rows)] = True
    if not chosen.any():
        msg = f"evaluation.datasets: no row is left: {leaked:,} of {len(others):,} are trained on as well. "
        raise InvalidDataset(msg + "Give rows that are not trained on, or use evaluation.percent.")
    return chosen[inverse], leaked


def settings_of(evaluation: Evaluation | None) -> tuple[float, int, int]:
    """Percent, maxRows and seed, with their defaults."""
    if evaluation is None:
        return DEFAULT_PERCENT, DEFAULT_MAX_ROWS, DEFAULT_SEED
    return (
        DEFAULT_PERCENT if evaluation.percent is None else evaluation.percent,
        evaluation.max_rows or DEFAULT_MAX_ROWS,
        DEFAULT_SEED if evaluation.seed is None else evaluation.seed,
    )


def _groups(digests: Digests) -> tuple[Digests, NDArray[np.intp], NDArray[np.intp]]:
    """Each different digest once, the group of each row, and the number of rows of each group."""
    unique, inverse, counts = np.unique(digests, return_inverse=True, return_counts=True)
    return unique, inverse.reshape(-1), counts


def _shuffled(unique: Digests, seed: int) -> list[int]:
    """The groups in an order that depends on the seed and on their content, not on their place in the files."""
    salt = str(seed).encode()
    keys = [hashlib.blake2b(digest.tobytes(), key=salt, digest_size=8).digest() for digest in unique]
    return sorted(range(len(keys)), key=keys.__getitem__)


def _take_rows(order: Iterable[int], counts: NDArray[np.intp], at_most: int) -> list[int]:
    """Groups in order while they fit; one that does not is passed over."""
    taken: list[int] = []
    left = at_most
    for group in order:
        if counts[group] <= left:
            taken.append(group)
            left -= int(counts[group])
        if not left:
            break
    return taken
