"""The files of tokenized rows that prepare leaves and every later stage reads: `train.parquet` and `eval.parquet`.

input_ids, loss_mask          of a row; of a pair: the prompt and the better answer
rejected_ids, rejected_mask   of a pair: the prompt and the worse answer
dataset                       index of the row's dataset in the config
lengths                       where rows are packed: of the rows that share the sequence
"""

from __future__ import annotations

import json
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from finetune_trainer.runtime.work import write_report

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import pyarrow as pa
    from numpy.typing import NDArray

    from finetune_trainer.data.pack import Window
    from finetune_trainer.data.render import Tokens
    from finetune_trainer.runtime.context import Context

TRAIN, EVAL = "train", "eval"
INPUT_IDS, LOSS_MASK = "input_ids", "loss_mask"
REJECTED_IDS, REJECTED_MASK = "rejected_ids", "rejected_mask"
DATASET, LENGTHS = "dataset", "lengths"
PREVIEW_NAME = "preview.jsonl"
PREVIEW_ROWS = 5
GROUP_ROWS = 512


class TokenizedRow(NamedTuple):
    """A row of a file."""

    tokens: Tokens
    rejected: Tokens | None
    """Of a pair: the worse answer."""
    dataset: int


def build_schema(*, pairs: bool = False, packed: bool = False) -> pa.Schema:
    """The columns of a file."""
    import pyarrow as pa  # noqa: PLC0415 - slow

    ids, mask = pa.list_(pa.int32()), pa.list_(pa.bool_())
    columns = [(INPUT_IDS, ids), (LOSS_MASK, mask)]
    columns += [(REJECTED_IDS, ids), (REJECTED_MASK, mask)] if pairs else []
    columns += [(DATASET, pa.int8())]
    columns += [(LENGTHS, pa.list_(pa.int32()))] if packed else []
    return pa.schema(columns)


class RowWriter:
    """Writes rows to a parquet file, in row groups of bounded size; the same rows give the same bytes."""

    def __init__(self, path: Path, *, pairs: bool) -> None:
        """`path` must not exist yet."""
        from pyarrow import parquet  # noqa: PLC0415 - slow

        self._schema = build_schema(pairs=pairs)
        self._pairs = pairs
        self._writer = parquet.ParquetWriter(path, self._schema, compression="zstd")
        self._rows: list[TokenizedRow] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self._flush()
        self._writer.close()

    def write(self, row: TokenizedRow) -> None:
        """Add a row."""
        self._rows.append(row)
        if len(self._rows) >= GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa  # noqa: PLC0415 - slow

        if not self._rows:
            return
        tokens = [[row.tokens for row in self._rows]]
        tokens += [[row.rejected for row in self._rows if row.rejected is not None]] if self._pairs else []
        columns = []
        for side in tokens:
            columns += [_list_array([each.input_ids for each in side]), _list_array([each.loss_mask for each in side])]
        columns.append(pa.array([row.dataset for row in self._rows], type=pa.int8()))
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))
        self._rows.clear()


def _list_array(rows: Sequence[NDArray[Any]]) -> pa.ListArray:
    import pyarrow as pa  # noqa: PLC0415 - slow

    return pa.ListArray.from_arrays(_offsets([len(row) for row in rows]), pa.array(np.concatenate(rows)))


def _offsets(lengths: Sequence[int] | NDArray[np.integer]) -> pa.Array:
    import pyarrow as pa  # noqa: PLC0415 - slow

    return pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def copy_chosen(source: Path, chosen: NDArray[np.bool_], target: Path, context: Context) -> None:
    """Copy the chosen rows of a file, row group by row group."""
    from pyarrow import parquet  # noqa: PLC0415 - slow

    with (
        parquet.ParquetFile(source) as file,
        parquet.ParquetWriter(target, file.schema_arrow, compression="zstd") as writer,
    ):
        for rows in _chosen_groups(source, chosen):
            context.raise_if_stopping()
            if rows.num_rows:
                writer.write_table(rows)
            context.report.advance(rows.num_rows)


def copy_packed(
    source: Path, chosen: NDArray[np.bool_], windows: Sequence[Window], target: Path, context: Context
) -> None:
    """Copy the chosen rows of a file, packed as the windows say; a window is in memory at a time."""
    import pyarrow as pa  # noqa: PLC0415 - slow
    from pyarrow import parquet  # noqa: PLC0415 - slow

    groups = _chosen_groups(source, chosen)
    held = build_schema().empty_table()
    with parquet.ParquetWriter(target, build_schema(packed=True), compression="zstd") as writer:
        for window in windows:
            while held.num_rows < window.rows:
                context.raise_if_stopping()
                held = pa.concat_tables([held, next(groups)])
            writer.write_table(_packed(held.slice(0, window.rows), window), row_group_size=GROUP_ROWS)
            held = held.slice(window.rows)
            context.report.advance(window.rows)


def _packed(rows: pa.Table, window: Window) -> pa.Table:
    """The window's rows as its sequences."""
    import pyarrow as pa  # noqa: PLC0415 - slow
    import pyarrow.compute as pc  # noqa: PLC0415 - slow

    taken = rows.take([row for sequence in window.sequences for row in sequence]).combine_chunks()
    lengths = pc.list_value_length(taken.column(INPUT_IDS)).to_numpy()
    counts = np.array([len(sequence) for sequence in window.sequences])
    firsts = np.cumsum(counts) - counts
    offsets = _offsets(np.add.reduceat(lengths, firsts))
    columns = [
        *(pa.ListArray.from_arrays(offsets, taken.column(name).chunk(0).flatten()) for name in (INPUT_IDS, LOSS_MASK)),
        taken.column(DATASET).take(firsts).combine_chunks(),
        pa.ListArray.from_arrays(_offsets(counts), pa.array(lengths, type=pa.int32())),
    ]
    return pa.Table.from_arrays(columns, schema=build_schema(packed=True))


def _chosen_groups(source: Path, chosen: NDArray[np.bool_]) -> Iterator[pa.Table]:
    """The chosen rows of a file, a row group at a time."""
    import pyarrow as pa  # noqa: PLC0415 - slow
    from pyarrow import parquet  # noqa: PLC0415 - slow

    start = 0
    with parquet.ParquetFile(source) as file:
        for index in range(file.num_row_groups):
            group = file.read_row_group(index)
            yield group.filter(pa.array(chosen[start : start + group.num_rows]))
            start += group.num_rows


def read_rows(folder: Path, split: str) -> pa.Table:
    """The rows of `train` or `eval`, with the columns above. The table is empty if nothing is held out."""
    from pyarrow import parquet  # noqa: PLC0415 - slow

    return parquet.read_table(folder / f"{split}.parquet", pre_buffer=False)  # a buffer would stay as long as the rows


def write_preview(folder: Path, tokenizer: Any, path: Path) -> None:  # noqa: ANN401 - any of transformers' tokenizers
    """Five rows as they are trained on: the text, what of it counts in the loss, token ids and loss mask."""
    from pyarrow import parquet  # noqa: PLC0415 - slow

    with parquet.ParquetFile(folder / f"{TRAIN}.parquet") as file:
        rows = next(file.iter_batches(batch_size=PREVIEW_ROWS)).to_pylist()
    records = [record for index, row in enumerate(rows) for record in _previewed(row, index, tokenizer)]
    write_report(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records[:PREVIEW_ROWS]))


def _previewed(row: dict[str, Any], index: int, tokenizer: Any) -> Iterator[dict[str, Any]]:  # noqa: ANN401 - any of transformers' tokenizers
    """A row of a file for people: each row of a packed sequence by itself, of a pair both answers."""
    start = 0
    for length in row.get(LENGTHS) or [len(row[INPUT_IDS])]:
        record = _shown(row[INPUT_IDS][start : start + length], row[LOSS_MASK][start : start + length], tokenizer)
        start += length
        if LENGTHS in row:
            record["sequence"] = index
        if REJECTED_IDS in row:
            record["rejected"] = _shown(row[REJECTED_IDS], row[REJECTED_MASK], tokenizer)
        yield record


def _shown(ids: list[int], mask: list[bool], tokenizer: Any) -> dict[str, Any]:  # noqa: ANN401 - any of transformers' tokenizers
    learned = [token for token, counts in zip(ids, mask, strict=True) if counts]
    return {
        "text": tokenizer.decode(ids),
        "learned": tokenizer.decode(learned),
        "tokens": len(ids),
        "lossTokens": len(learned),
        "inputIds": ids,
        "lossMask": [int(counts) for counts in mask],
        "parts": list(_parts(ids, mask, tokenizer)),
    }


def _parts(ids: list[int], mask: list[bool], tokenizer: Any) -> Iterator[dict[str, Any]]:  # noqa: ANN401 - any of transformers' tokenizers
    """The text in runs of tokens that are learned or not: what of it is which can be seen."""
    for learned, run in groupby(zip(ids, mask, strict=True), key=itemgetter(1)):
        yield {"text": tokenizer.decode([token for token, _ in run]), "learned": bool(learned)}
