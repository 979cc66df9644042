"""Rows as TRL's trainers take them: the dataset, its order, and a micro-batch as the tensors that a model takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from finetune_trainer.data.order import RowOrder, share_out
from finetune_trainer.data.tokenized import DATASET, INPUT_IDS, LENGTHS, LOSS_MASK
from finetune_trainer.evaluate import IGNORED, TokenRow, pad

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pyarrow as pa
    from numpy.typing import NDArray

    from finetune_trainer.progress import Resolved


def as_dataset(rows: pa.Table) -> Any:  # noqa: ANN401 - datasets.Dataset
    """The rows of `data.read_rows` as the dataset that TRL insists on, in arrow's buffers; arrays when asked for."""
    from datasets import Dataset  # noqa: PLC0415 - slow

    # Without a fingerprint of its own all rows would be pickled to make one.
    return Dataset(rows, fingerprint="rows").with_format("numpy")


def build_order(rows: pa.Table, resolved: Resolved) -> RowOrder:
    """The order of the rows of `data.read_rows`."""
    import pyarrow.compute as pc  # noqa: PLC0415 - slow

    lengths = pc.list_value_length(rows.column(INPUT_IDS)).to_numpy()
    seed, batch, weights = resolved.seed, resolved.global_batch_size, resolved.dataset_weights
    if not weights:
        return RowOrder(lengths, seed, batch, shuffle=resolved.shuffle)
    datasets = rows.column(DATASET).to_numpy()
    counts = pc.list_value_length(rows.column(LENGTHS)).to_numpy() if resolved.packing else np.ones(len(rows))
    sequences = np.bincount(datasets, minlength=len(weights)).tolist()
    quotas = share_out(sequences, np.bincount(datasets, counts, len(weights)).tolist(), weights)
    return RowOrder(lengths, seed, batch, shuffle=resolved.shuffle, datasets=datasets, quotas=quotas)


class Collator:
    """Rows of `as_dataset` to `input_ids`, `labels` and what keeps rows apart.

    Not packed  `attention_mask`; padded on the right.
    Packed      `position_ids` that begin at 0 with each row, and no attention mask: transformers (5.23) takes a new
                beginning for another row, only without a mask. Padding is one more row, which nothing looks at.
    FlashAttention2 finds beginnings in a batch of one alone (`_is_packed_sequence`): there the sequences of a
    micro-batch lie behind each other in one, and their limits are told, or each layer would look for them.
    """

    def __init__(self, resolved: Resolved, *, in_one_row: bool = False) -> None:
        """`in_one_row`: packed sequences lie behind each other whatever the kernel of attention is."""
        self._packed = resolved.packing
        self._flat = resolved.packing and (in_one_row or resolved.attention == "FlashAttention2")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Tensors [rows, longest], or [1, all tokens]."""
        if not self._packed:
            ids, mask, labels = pad([TokenRow(row[INPUT_IDS], _labels(row)) for row in rows])
            return {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return _flattened(rows) if self._flat else _packed(rows)


def _labels(row: Mapping[str, Any]) -> NDArray[np.int64]:
    labels: NDArray[np.int64] = np.where(row[LOSS_MASK], row[INPUT_IDS], IGNORED)
    return labels


def _positions(lengths: Sequence[int]) -> NDArray[np.int64]:
    """0, 1, 2, ..., anew for each row."""
    return np.concatenate([np.arange(length) for length in lengths])


def _packed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ids, _, labels = pad([TokenRow(row[INPUT_IDS], _labels(row)) for row in rows])
    filled = [[*row[LENGTHS], ids.shape[1] - len(row[INPUT_IDS])] for row in rows]
    positions = torch.from_numpy(np.stack([_positions(lengths) for lengths in filled]))
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def _flattened(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    lengths = np.concatenate([row[LENGTHS] for row in rows])
    limits = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    longest = int(lengths.max())
    return {
        "input_ids": torch.from_numpy(np.concatenate([row[INPUT_IDS] for row in rows]).astype(np.int64))[None],
        "labels": torch.from_numpy(np.concatenate([_labels(row) for row in rows]).astype(np.int64))[None],
        "position_ids": torch.from_numpy(_positions(list(lengths)))[None],
        "cu_seq_lens_q": limits,
        "cu_seq_lens_k": limits,
        "max_length_q": longest,
        "max_length_k": longest,
    }
