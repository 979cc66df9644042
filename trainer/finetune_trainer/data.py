"""Datasets turned into the two files that every later stage reads: `train.parquet` and `eval.parquet`.

Rows go by once: read, rendered, tokenized in batches, written aside. What is kept in memory is a digest and a few
numbers a row, so that a million rows fit. Then it is decided which rows are held out, and the rows go to their files.

Identical rows (the same tokens) are one group, and a group is on one side only: what is measured on was never
trained on. Pieces of one split text are one group as well.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from finetune_trainer.errors import InvalidDataset
from finetune_trainer.progress import DataFacts
from finetune_trainer.render import Rendered, Renderer, Tokens
from finetune_trainer.rows import DatasetReader

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    import pyarrow as pa
    from numpy.typing import NDArray
    from pyarrow.parquet import ParquetFile

    from finetune_trainer.config import Dataset, Evaluation, JobConfig
    from finetune_trainer.context import Context

TRAIN, EVAL = "train", "eval"
INPUT_IDS, LOSS_MASK = "input_ids", "loss_mask"
REJECTED_IDS, REJECTED_MASK = "rejected_ids", "rejected_mask"
DATASET, LENGTHS = "dataset", "lengths"
PREVIEW_NAME = "preview.jsonl"
PREVIEW_ROWS = 5
BATCH_ROWS = 512
BATCH_CHARACTERS = 4_000_000
DIGEST_BYTES = 16
DEFAULT_PERCENT, DEFAULT_MAX_ROWS, DEFAULT_SEED = 5.0, 500, 42


@dataclass
class Kept:
    """What is remembered of the rows in a file aside: a digest and three numbers a row."""

    digests: bytearray = field(default_factory=bytearray)
    lengths: array[int] = field(default_factory=lambda: array("i"))
    loss_tokens: array[int] = field(default_factory=lambda: array("i"))
    too_long: int = 0
    nothing_to_learn: int = 0

    def __len__(self) -> int:
        """Rows kept."""
        return len(self.lengths)

    def keys(self) -> NDArray[np.void]:
        """The digest of each row: equal for rows of one group."""
        return np.frombuffer(bytes(self.digests), dtype=f"V{DIGEST_BYTES}")

    @property
    def dropped(self) -> int:
        """Rows that are not used."""
        return self.too_long + self.nothing_to_learn


@dataclass(frozen=True)
class PreparedData:
    """What came of the datasets."""

    facts: DataFacts
    remarks: tuple[str, ...]
    """Sentences on what a user may not expect."""


def prepare_data(config: JobConfig, context: Context, tokenizer: Any, max_length: int, folder: Path) -> PreparedData:  # noqa: ANN401 - any of transformers' tokenizers
    """Write `train.parquet` and `eval.parquet` into the folder. InvalidDataset and what finding the files raises."""
    renderer, evaluation = Renderer(tokenizer), config.evaluation
    aside = folder / "rows.parquet"
    rows = _tokenize(_readers(config.datasets, "", context), renderer, max_length, aside, context)
    _require_rows(rows, max_length)
    others, others_aside = None, folder / "others.parquet"
    if evaluation is not None and evaluation.datasets is not None:
        readers = _readers(evaluation.datasets, "evaluation ", context)
        others = _tokenize(readers, renderer, max_length, others_aside, context)
        _require_rows(others, max_length, "evaluation.datasets: ")
    held_out = np.zeros(len(rows), dtype=np.bool_) if others is not None else _hold_out(rows, evaluation)
    context.report.begin("writing the rows", len(rows), "rows")
    _filter(aside, ~held_out, folder / f"{TRAIN}.parquet", context)
    leaked = 0
    if others is None:
        _filter(aside, held_out, folder / f"{EVAL}.parquet", context)
    else:
        chosen, leaked = _choose_unseen(others, rows, evaluation)
        _filter(others_aside, chosen, folder / f"{EVAL}.parquet", context)
        others_aside.unlink()
    aside.unlink()
    eval_rows = int(held_out.sum()) if others is None else int(chosen.sum())
    dropped = rows.dropped + (others.dropped + leaked if others is not None else 0)
    return PreparedData(
        _facts(rows, ~held_out, eval_rows, dropped), _remarks(rows, others, leaked, eval_rows, evaluation)
    )


def _readers(datasets: Sequence[Dataset], prefix: str, context: Context) -> list[DatasetReader]:
    return [
        DatasetReader(dataset, prefix + (dataset.name or str(index)), context.sources)
        for index, dataset in enumerate(datasets)
    ]


def check_first_rows(config: JobConfig, context: Context) -> None:
    """Find every dataset and read its first row: most mistakes show there, before a model is fetched for nothing."""
    others = config.evaluation.datasets if config.evaluation and config.evaluation.datasets else ()
    for reader in [*_readers(config.datasets, "", context), *_readers(others, "evaluation ", context)]:
        next(iter(reader))


# Tokenizing


def _tokenize(
    readers: Sequence[DatasetReader], renderer: Renderer, max_length: int, path: Path, context: Context
) -> Kept:
    """Tokenize all rows of the datasets into a file aside."""
    kept = Kept()
    context.report.begin("reading and tokenizing the rows", sum(reader.size_bytes for reader in readers), "bytes")
    with RowWriter(path) as writer:
        for reader in readers:
            for batch in _batches(reader, renderer, kept, context):
                for tokens in renderer.tokenize(batch):
                    for piece, digest in _pieces(tokens, max_length, kept):
                        kept.digests += digest
                        kept.lengths.append(len(piece.input_ids))
                        kept.loss_tokens.append(int(piece.loss_mask.sum()))
                        writer.write(piece)
    return kept


def _batches(reader: DatasetReader, renderer: Renderer, kept: Kept, context: Context) -> Iterator[list[Rendered]]:
    """Rendered rows in batches of bounded size; rows with nothing to learn are counted and left out."""
    batch: list[Rendered] = []
    characters = size = 0
    for place, row, line_bytes in reader:
        size += line_bytes
        rendered = renderer.render(row, place)
        if rendered is None:
            kept.nothing_to_learn += 1
            continue
        batch.append(rendered)
        characters += len(rendered.text)
        if len(batch) >= BATCH_ROWS or characters >= BATCH_CHARACTERS:
            context.raise_if_stopping()
            yield batch
            context.report.advance(size)
            batch, characters, size = [], 0, 0
    yield batch
    context.report.advance(size)


def _pieces(tokens: Tokens, max_length: int, kept: Kept) -> Iterator[tuple[Tokens, bytes]]:
    """The row if it fits; the pieces of a text that does not; else nothing, counted. With the digest of the group."""
    ids, mask = tokens.input_ids, tokens.loss_mask
    digest = hashlib.blake2b(ids.tobytes() + mask.tobytes(), digest_size=DIGEST_BYTES).digest()
    if not mask.any():
        kept.nothing_to_learn += 1
    elif len(ids) <= max_length:
        yield tokens, digest
    elif not tokens.splits:
        kept.too_long += 1
    else:
        for start in range(0, len(ids), max_length):
            piece = mask[start : start + max_length].copy()
            piece[0] = False
            if piece.any():
                yield Tokens(ids[start : start + max_length], piece, splits=False), digest


def _require_rows(kept: Kept, max_length: int, prefix: str = "") -> None:
    if len(kept):
        return
    reasons = []
    if kept.too_long:
        reasons.append(f"{kept.too_long:,} are longer than training.maxLength ({max_length:,} tokens)")
    if kept.nothing_to_learn:
        reasons.append(f"{kept.nothing_to_learn:,} have no answer to learn from")
    msg = f"{prefix}no row is left of {kept.dropped:,}: {' and '.join(reasons)}. "
    raise InvalidDataset(msg + "Raise training.maxLength, or give rows with shorter prompts and with answers.")


# Choosing


def _groups(kept: Kept) -> tuple[NDArray[np.void], NDArray[np.intp], NDArray[np.intp]]:
    """Each different digest once, the group of each row, and the rows of each group."""
    unique, inverse, counts = np.unique(kept.keys(), return_inverse=True, return_counts=True)
    return unique, inverse.reshape(-1), counts


def _shuffled(unique: NDArray[np.void], seed: int) -> list[int]:
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


def _hold_out(kept: Kept, evaluation: Evaluation | None) -> NDArray[np.bool_]:
    """Which rows are held out: the share asked for, at most maxRows, at least one where there is a choice."""
    percent, max_rows, seed = _settings(evaluation)
    unique, inverse, counts = _groups(kept)
    wanted = min(round(len(kept) * percent / 100) or 1, max_rows) if percent else 0
    order = _shuffled(unique, seed)
    taken = _take_rows(order[:-1], counts, wanted)  # the last group stays: something must be trained on
    chosen = np.zeros(len(unique), dtype=np.bool_)
    chosen[taken] = True
    return chosen[inverse]


def _choose_unseen(others: Kept, rows: Kept, evaluation: Evaluation | None) -> tuple[NDArray[np.bool_], int]:
    """Which rows of the evaluation datasets are used, and how many were left out because they are trained on."""
    _, max_rows, seed = _settings(evaluation)
    unique, inverse, counts = _groups(others)
    seen = np.isin(unique.view(f"S{DIGEST_BYTES}"), np.unique(rows.keys()).view(f"S{DIGEST_BYTES}"))
    leaked = int(counts[seen].sum())
    chosen = np.zeros(len(unique), dtype=np.bool_)
    chosen[_take_rows((group for group in _shuffled(unique, seed) if not seen[group]), counts, max_rows)] = True
    if not chosen.any():
        msg = f"evaluation.datasets: no row is left: {leaked:,} of {len(others):,} are trained on as well. "
        raise InvalidDataset(msg + "Give rows that are not trained on, or use evaluation.percent.")
    return chosen[inverse], leaked


def _settings(evaluation: Evaluation | None) -> tuple[float, int, int]:
    """Percent, maxRows and seed, with their defaults."""
    if evaluation is None:
        return DEFAULT_PERCENT, DEFAULT_MAX_ROWS, DEFAULT_SEED
    percent = DEFAULT_PERCENT if evaluation.percent is None else evaluation.percent
    return (
        percent,
        evaluation.max_rows or DEFAULT_MAX_ROWS,
        DEFAULT_SEED if evaluation.seed is None else evaluation.seed,
    )


# Telling


def _facts(kept: Kept, trained: NDArray[np.bool_], eval_rows: int, dropped: int) -> DataFacts:
    lengths = np.asarray(kept.lengths, dtype=np.int64)[trained]
    p50, p95, p99 = (int(np.percentile(lengths, share, method="nearest")) for share in (50, 95, 99))
    return DataFacts(
        train_rows=len(lengths),
        eval_rows=eval_rows,
        dropped_rows=dropped,
        train_tokens=int(lengths.sum()),
        loss_tokens=int(np.asarray(kept.loss_tokens, dtype=np.int64)[trained].sum()),
        length_p50=p50,
        length_p95=p95,
        length_p99=p99,
        length_max=int(lengths.max()),
    )


def _remarks(
    rows: Kept, others: Kept | None, leaked: int, eval_rows: int, evaluation: Evaluation | None
) -> tuple[str, ...]:
    """What a user may not expect, in sentences."""
    long = rows.too_long + (others.too_long if others else 0)
    empty = rows.nothing_to_learn + (others.nothing_to_learn if others else 0)
    remarks = []
    if long:
        remarks.append(f"{long:,} rows longer than training.maxLength were dropped.")
    if empty:
        remarks.append(f"{empty:,} rows without an answer to learn from were dropped.")
    if leaked:
        remarks.append(f"{leaked:,} evaluation rows are in the training data as well and were dropped from evaluation.")
    if not eval_rows and _settings(evaluation)[0]:
        remarks.append("Nothing is held out: all rows are one group (identical, or pieces of one text).")
    return tuple(remarks)


# Files


def schema() -> pa.Schema:
    """`input_ids` (int32) and `loss_mask` (bool), lists of one length a row."""
    import pyarrow as pa  # noqa: PLC0415 - slow

    return pa.schema([(INPUT_IDS, pa.list_(pa.int32())), (LOSS_MASK, pa.list_(pa.bool_()))])


class RowWriter:
    """Writes rows to a parquet file, in row groups of bounded size; the same rows give the same bytes."""

    def __init__(self, path: Path) -> None:
        """`path` must not exist yet."""
        import pyarrow as pa  # noqa: PLC0415 - slow
        from pyarrow import parquet  # noqa: PLC0415 - slow

        self._pa = pa
        self._schema = schema()
        self._writer = parquet.ParquetWriter(path, self._schema, compression="zstd")
        self._rows: list[Tokens] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self._flush()
        self._writer.close()

    def write(self, row: Tokens) -> None:
        """Add a row."""
        self._rows.append(row)
        if len(self._rows) >= BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        offsets = np.concatenate([[0], np.cumsum([len(row.input_ids) for row in self._rows])]).astype(np.int32)
        columns = [
            self._pa.ListArray.from_arrays(offsets, self._pa.array(np.concatenate(arrays)))
            for arrays in ([row.input_ids for row in self._rows], [row.loss_mask for row in self._rows])
        ]
        self._writer.write_table(self._pa.Table.from_arrays(columns, schema=self._schema))
        self._rows.clear()


def _filter(source: Path, chosen: NDArray[np.bool_], target: Path, context: Context) -> None:
    """Copy the chosen rows of a file, batch by batch."""
    import pyarrow as pa  # noqa: PLC0415 - slow
    from pyarrow import parquet  # noqa: PLC0415 - slow

    start = 0
    with parquet.ParquetFile(source) as file, parquet.ParquetWriter(target, schema(), compression="zstd") as writer:
        for batch in _row_groups(file):
            context.raise_if_stopping()
            wanted = batch.filter(pa.array(chosen[start : start + batch.num_rows]))
            start += batch.num_rows
            if wanted.num_rows:
                writer.write_table(wanted)
            context.report.advance(wanted.num_rows)


def _row_groups(file: ParquetFile) -> Iterator[pa.Table]:
    for index in range(file.num_row_groups):
        yield file.read_row_group(index)


def read_rows(folder: Path, split: str) -> pa.Table:
    """The rows of `train` or `eval`: columns `input_ids` and `loss_mask`. The table is empty if nothing is held out."""
    from pyarrow import parquet  # noqa: PLC0415 - slow

    return parquet.read_table(folder / f"{split}.parquet")


def write_preview(folder: Path, tokenizer: Any, path: Path) -> None:  # noqa: ANN401 - any of transformers' tokenizers
    """Five rows as they are trained on: the text, what of it counts in the loss, token ids and loss mask."""
    from pyarrow import parquet  # noqa: PLC0415 - slow

    with parquet.ParquetFile(folder / f"{TRAIN}.parquet") as file:
        rows = next(file.iter_batches(batch_size=PREVIEW_ROWS)).to_pylist()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("w", encoding="utf-8") as out:
        for row in rows:
            learned = [token for token, counts in zip(row[INPUT_IDS], row[LOSS_MASK], strict=True) if counts]
            record = {
                "text": tokenizer.decode(row[INPUT_IDS]),
                "learned": tokenizer.decode(learned),
                "tokens": len(row[INPUT_IDS]),
                "lossTokens": len(learned),
                "inputIds": row[INPUT_IDS],
                "lossMask": [int(counts) for counts in row[LOSS_MASK]],
            }
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
    aside.chmod(0o644)
    aside.replace(path)
