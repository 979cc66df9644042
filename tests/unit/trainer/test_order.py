"""The order of rows: each epoch its own, the same for the same seed, with every dataset's share."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.data.order import FILLER, RowOrder, Share, share_out
from finetune_trainer.training.collate import as_dataset, build_order
from tests.unit.trainer.runs import SETTINGS, replace_settings

LENGTHS = [5, 9, 2, 7, 1, 8, 3, 6, 4, 10]
DATASETS = np.array([0] * 8 + [1] * 2)


def epoch(order: RowOrder, number: int) -> list[int]:
    order.epoch = number
    return list(order)


def test_an_epoch_is_every_row_once_in_an_order_of_its_own() -> None:
    order = RowOrder(LENGTHS, 7, 4)
    first, second = epoch(order, 0), epoch(order, 1)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    later = RowOrder(LENGTHS, 7, 4, datasets=DATASETS, quotas=(4, 6))
    resumed = RowOrder(LENGTHS, 7, 4, datasets=DATASETS, quotas=(4, 6))
    epoch(later, 0)
    assert epoch(later, 3) == epoch(resumed, 3)
    assert epoch(RowOrder(LENGTHS, 8, 4), 3) != epoch(RowOrder(LENGTHS, 7, 4), 3)


def test_rows_of_a_step_are_sorted_by_length() -> None:
    rows = epoch(RowOrder(LENGTHS, 7, 4), 0)
    for start in range(0, 10, 4):
        lengths = [LENGTHS[row] for row in rows[start : start + 4]]
        assert lengths == sorted(lengths)


def test_without_shuffling_rows_stay_in_the_order_of_the_files() -> None:
    assert epoch(RowOrder(LENGTHS, 7, 4, shuffle=False), 2) == list(range(10))


def test_weighted_epochs_cover_a_large_dataset_and_repeat_a_small_one_evenly() -> None:
    order = RowOrder(LENGTHS, 7, 4, datasets=DATASETS, quotas=(4, 6))
    epochs = [epoch(order, number) for number in range(4)]
    assert [Counter(DATASETS[rows].tolist()) for rows in epochs] == [{0: 4, 1: 6}] * 4
    drawn = Counter(row for rows in epochs for row in rows)
    assert {drawn[row] for row in range(8)} == {2}
    assert {drawn[row] for row in (8, 9)} == {12}
    assert set(epochs[0] + epochs[1]) == set(range(10))


def test_weighted_and_not_shuffled_each_dataset_goes_on_where_it_was() -> None:
    order = RowOrder(LENGTHS, 7, 4, shuffle=False, datasets=DATASETS, quotas=(5, 1))
    assert [epoch(order, number) for number in range(2)] == [[0, 1, 2, 3, 4, 8], [5, 6, 7, 0, 1, 9]]


@pytest.mark.parametrize(
    ("sequences", "rows", "weights", "quotas"),
    [
        pytest.param([8, 2], [8, 2], [0.5, 0.5], (5, 5), id="as long as all rows, shared by weight"),
        pytest.param([90, 10], [90, 10], [1, 3], (25, 75), id="weights are relative"),
        pytest.param([50, 50], [50, 500], [1, 1], (91, 9), id="rows are shared, not the sequences they are packed in"),
        pytest.param([10, 0], [10, 0], [1, 9], (10, 0), id="a dataset without rows is left out"),
        pytest.param([1, 1, 1], [1, 1, 1], [1, 1, 1], (1, 1, 1), id="nothing is lost by rounding"),
    ],
)
def test_how_an_epoch_is_shared(
    sequences: list[int], rows: list[int], weights: list[float], quotas: tuple[int, ...]
) -> None:
    assert share_out(sequences, rows, weights) == quotas


@given(
    parts=st.lists(st.tuples(st.integers(1, 50), st.floats(0.001, 1000, allow_subnormal=False)), min_size=1, max_size=6)
)
def test_an_epoch_is_as_long_as_the_rows_in_all(parts: list[tuple[int, float]]) -> None:
    sizes, weights = [size for size, _ in parts], [weight for _, weight in parts]
    assert sum(share_out(sizes, sizes, weights)) == sum(sizes)


def make_table() -> pa.Table:
    rows = [{"input_ids": [1] * n, "loss_mask": [True] * n, "dataset": int(n > 8), "lengths": [n]} for n in LENGTHS]
    return pa.Table.from_pylist(rows)


def test_the_order_is_built_from_what_prepare_left() -> None:
    plain = build_order(make_table(), replace_settings(SETTINGS, dataset_weights=()))
    assert sorted(plain) == list(range(10))
    weighted = build_order(make_table(), replace_settings(SETTINGS, dataset_weights=(0.2, 0.8)))
    assert Counter(LENGTHS[row] > 8 for row in weighted) == {True: 8, False: 2}


def test_the_rows_of_packed_sequences_are_shared_not_the_sequences() -> None:
    lengths = [[1, 1, 1, 1] if index < 5 else [4] for index in range(10)]
    rows = [{"input_ids": [1] * 4, "dataset": int(len(each) == 1), "lengths": each} for each in lengths]
    order = build_order(
        pa.Table.from_pylist(rows), replace_settings(SETTINGS, dataset_weights=(0.5, 0.5), packing=True)
    )
    assert Counter(rows[row]["dataset"] for row in order) == {0: 2, 1: 8}


def test_rows_are_arrays_when_they_are_asked_for() -> None:
    row = as_dataset(make_table())[1]
    assert row["input_ids"].tolist() == [1] * 9
    assert row["loss_mask"].dtype == np.bool_


@given(
    rows=st.integers(1, 60), micro_batch=st.integers(1, 4), accumulation=st.integers(1, 4), world_size=st.integers(1, 5)
)
def test_any_number_of_ranks_takes_the_same_rows_in_each_step(
    rows: int, micro_batch: int, accumulation: int, world_size: int
) -> None:
    batch = micro_batch * accumulation * world_size
    order = RowOrder(list(range(1, rows + 1)), 7, batch)
    shares = [list(Share(order, micro_batch, batch, rank, world_size)) for rank in range(world_size)]
    assert {len(share) for share in shares} == {len(Share(order, micro_batch, batch, 0, world_size))}
    alone = list(order)
    for step in range(0, len(shares[0]), accumulation):
        taken = [row for share in shares for part in share[step : step + accumulation] for row in part]
        wanted = alone[step // accumulation * batch :][:batch]
        assert sorted(row for row in taken if row != FILLER) == sorted(wanted)
