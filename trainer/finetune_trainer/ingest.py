"""Datasets turned into the files of `data`: read, rendered, tokenized, held out, packed.

Rows go by once: read, rendered, tokenized in batches, written aside. What is kept in memory is a digest and a few
numbers a row, so that a million rows fit. Then it is decided which rows are held out and which share a sequence, and
the rows go to their files.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from finetune_trainer.config import DEFAULT_SEED, LongRows, ObjectiveType
from finetune_trainer.data.holdout import as_digests, choose_unseen, digest_of, hold_out, settings_of
from finetune_trainer.data.pack import pack_windows
from finetune_trainer.data.render import Rendered, RenderedPair, Renderer, Tokens
from finetune_trainer.data.rows import DatasetReader, PreferenceRow
from finetune_trainer.data.tokenized import EVAL, TRAIN, RowWriter, TokenizedRow, copy_chosen, copy_packed
from finetune_trainer.progress import DataFacts, DatasetFacts
from finetune_trainer.runtime.errors import InvalidConfig, InvalidDataset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from finetune_trainer.config import Dataset, Evaluation, JobConfig
    from finetune_trainer.data.files import Place
    from finetune_trainer.data.pack import Window
    from finetune_trainer.data.rows import Row
    from finetune_trainer.runtime.context import Context

BATCH_ROWS = 512
BATCH_CHARACTERS = 4_000_000


@dataclass
class Counts:
    """Rows of a dataset that did not stay as they were."""

    too_long: int = 0
    nothing_to_learn: int = 0
    truncated: int = 0

    @property
    def dropped(self) -> int:
        """Rows that are not used."""
        return self.too_long + self.nothing_to_learn


@dataclass
class Kept:
    """What is remembered of the rows in a file aside: a digest and a few numbers a row."""

    names: tuple[str, ...]
    counts: tuple[Counts, ...]
    digests: bytearray = field(default_factory=bytearray)
    lengths: array[int] = field(default_factory=lambda: array("i"))
    loss_tokens: array[int] = field(default_factory=lambda: array("i"))
    datasets: array[int] = field(default_factory=lambda: array("b"))
    highest_token: int = -1

    def __len__(self) -> int:
        """Rows kept."""
        return len(self.lengths)

    def add(self, row: TokenizedRow, digest: bytes) -> None:
        """Remember a row. The length of a pair is that of its longer answer, its loss tokens those of the better."""
        self.digests += digest
        self.lengths.append(max(len(row.tokens.input_ids), 0 if row.rejected is None else len(row.rejected.input_ids)))
        self.loss_tokens.append(int(row.tokens.loss_mask.sum()))
        self.datasets.append(row.dataset)
        sides = (row.tokens,) if row.rejected is None else (row.tokens, row.rejected)
        self.highest_token = max(self.highest_token, *(int(side.input_ids.max()) for side in sides))

    def of_dataset(self, chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        """How many of the chosen rows each dataset has."""
        return np.bincount(np.asarray(self.datasets)[chosen], minlength=len(self.names))


@dataclass(frozen=True)
class Datasets:
    """The datasets of a job, opened."""

    train: tuple[DatasetReader, ...]
    evaluation: tuple[DatasetReader, ...]

    @property
    def all(self) -> tuple[DatasetReader, ...]:
        """Both."""
        return self.train + self.evaluation


@dataclass(frozen=True)
class PreparedData:
    """What came of the datasets."""

    facts: DataFacts
    remarks: tuple[str, ...]
    """Sentences on what a user may not expect."""
    highest_token: int = -1
    """The highest id in the rows: the model must have embeddings for it."""


def named_datasets(config: JobConfig) -> dict[str, tuple[str, Dataset]]:
    """Name and settings of each dataset, by the slot of its source."""
    others = (config.evaluation.datasets or ()) if config.evaluation else ()
    slots = {f"dataset-{index}": (each.name or str(index), each) for index, each in enumerate(config.datasets)}
    named = enumerate(others)
    return slots | {f"evaluation-{index}": (f"evaluation {each.name or index}", each) for index, each in named}


def open_datasets(config: JobConfig, fetched: Mapping[str, Path]) -> Datasets:
    """The datasets at the paths that their slots were fetched to. InvalidDataset, InvalidConfig."""
    readers = {slot: DatasetReader(each, name, fetched[slot]) for slot, (name, each) in named_datasets(config).items()}
    train = tuple(reader for slot, reader in readers.items() if slot.startswith("dataset-"))
    return Datasets(train, tuple(reader for reader in readers.values() if reader not in train))


def first_rows(datasets: Datasets, config: JobConfig) -> list[Row]:
    """The first row of each dataset: most mistakes show there, before a model is fetched for nothing."""
    rows = []
    for reader in datasets.all:
        place, row, _ = next(iter(reader))
        _check_objective(row, place, config.objective_type)
        rows.append(row)
    return rows


def _check_objective(row: Row, place: Place, objective: ObjectiveType) -> None:
    if isinstance(row, PreferenceRow) and objective is not ObjectiveType.DPO:
        remedy = "Set objective.type to DPO; or take format PromptCompletion with columns: {completion: chosen}."
        place.refuse(f"the row is Preference, but objective.type is {objective}", remedy)
    if not isinstance(row, PreferenceRow) and objective is ObjectiveType.DPO:
        remedy = "Give prompt, chosen and rejected (format Preference), or set objective.type to SFT."
        place.refuse("objective.type is DPO, but the row has no two answers to compare", remedy)


def prepare_data(  # noqa: PLR0913 - what rows depend on
    config: JobConfig,
    datasets: Datasets,
    renderer: Renderer,
    max_length: int,
    packs: Callable[[int], bool],
    folder: Path,
    context: Context,
) -> PreparedData:
    """Write `train.parquet` and `eval.parquet` into the folder. `packs`: whether so many sequences are to be packed.

    InvalidDataset at the first mistake, or where no row is left.
    """
    tokenizing = Tokenizing(config, renderer, max_length, context)
    aside, others_aside = folder / "rows.parquet", folder / "others.parquet"
    rows = tokenizing.run(datasets.train, aside)
    others = tokenizing.run(datasets.evaluation, others_aside) if datasets.evaluation else None
    evaluation, digests, leaked = config.evaluation, as_digests(bytes(rows.digests)), 0
    held_out = np.zeros(len(rows), dtype=np.bool_) if others is not None else hold_out(digests, evaluation)
    context.report.begin("writing the rows", len(rows), "rows")
    windows = _write_train(config, rows, ~held_out, aside, folder / f"{TRAIN}.parquet", max_length, packs, context)
    measured, chosen, source = rows, held_out, aside
    if others is not None:
        chosen, leaked = choose_unseen(as_digests(bytes(others.digests)), digests, evaluation)
        measured, source = others, others_aside
    copy_chosen(source, chosen, folder / f"{EVAL}.parquet", context)
    aside.unlink()
    others_aside.unlink(missing_ok=True)
    facts = _facts(rows, ~held_out, measured, chosen, leaked, windows)
    highest = max(rows.highest_token, -1 if others is None else others.highest_token)
    return PreparedData(facts, _remarks(rows, others, leaked, facts, evaluation, renderer), highest)


def _write_train(  # noqa: PLR0913 - what the file of rows depends on
    config: JobConfig,
    rows: Kept,
    trained: NDArray[np.bool_],
    source: Path,
    target: Path,
    max_length: int,
    packs: Callable[[int], bool],
    context: Context,
) -> list[Window] | None:
    """The rows to train on, packed if that is wanted: then how."""
    weighted = any(dataset.weight is not None for dataset in config.datasets)
    if config.objective_type is ObjectiveType.SFT:
        lengths, of = np.asarray(rows.lengths)[trained], np.asarray(rows.datasets)[trained]
        windows = pack_windows(lengths, max_length, of if weighted else None)
        if packs(sum(len(window.sequences) for window in windows)):
            copy_packed(source, trained, windows, target, context)
            return windows
    copy_chosen(source, trained, target, context)
    return None


# Tokenizing


class Tokenizing:
    """How rows become tokens that fit."""

    def __init__(self, config: JobConfig, renderer: Renderer, max_length: int, context: Context) -> None:
        """InvalidConfig for settings that do not go together."""
        training = config.training
        self._renderer, self._max_length, self._context = renderer, max_length, context
        self._long_rows = training.long_rows if training else None
        self._seed = DEFAULT_SEED if training is None or training.seed is None else training.seed
        self._objective = config.objective_type
        if self._pairs and self._long_rows is LongRows.SPLIT:
            msg = "training.longRows Split is for texts; answers that are compared stay whole. Set Drop or Truncate."
            raise InvalidConfig(msg)

    @property
    def _pairs(self) -> bool:
        return self._objective is ObjectiveType.DPO

    def run(self, readers: Sequence[DatasetReader], path: Path) -> Kept:
        """Tokenize all rows of the datasets into a file aside. InvalidDataset where one of them has no row left."""
        kept = Kept(tuple(reader.name for reader in readers), tuple(Counts() for _ in readers))
        chosen = [self._choose(reader, index) for index, reader in enumerate(readers)]
        size = sum(reader.size_bytes for reader in readers)
        self._context.report.begin("reading and tokenizing the rows", size, "bytes")
        with RowWriter(path, pairs=self._pairs) as writer:
            for index, reader in enumerate(readers):
                before = len(kept)
                for batch in self._batches(reader, chosen[index], kept.counts[index]):
                    for rendered, place, tokens in self._tokenized(batch):
                        for row, digest in self._fitting(tokens, place, kept.counts[index], index, rendered):
                            writer.write(row)
                            kept.add(row, digest)
                _require_rows(len(kept) - before, kept.counts[index], reader.name, self._max_length)
        return kept

    def _choose(self, reader: DatasetReader, index: int) -> set[int] | None:
        """Places of the rows that maxRows leaves, chosen by the seed; None: all."""
        limit = reader.dataset.max_rows
        if limit is None:
            return None
        self._context.report.begin(f"counting the rows of {reader.name}", reader.size_bytes, "bytes")
        total = 0
        for _, _, size in reader.records():
            total += 1
            self._context.raise_if_stopping()
            self._context.report.advance(size)
        if total <= limit:
            return None
        return set(np.random.default_rng((self._seed, index)).choice(total, limit, replace=False).tolist())

    def _batches(
        self, reader: DatasetReader, chosen: set[int] | None, counts: Counts
    ) -> Iterator[list[tuple[Rendered | RenderedPair, Place]]]:
        """Rendered rows in batches of bounded size; rows with nothing to learn are counted and left out."""
        batch: list[tuple[Rendered | RenderedPair, Place]] = []
        characters = size = 0
        for number, (place, row, row_bytes) in enumerate(reader):
            size += row_bytes
            if chosen is not None and number not in chosen:
                continue
            _check_objective(row, place, self._objective)
            rendered = self._renderer.render(row, place)
            if rendered is None:
                counts.nothing_to_learn += 1
                continue
            batch.append((rendered, place))
            characters += sum(len(each.text) for each in _sides(rendered))
            if len(batch) >= BATCH_ROWS or characters >= BATCH_CHARACTERS:
                self._context.raise_if_stopping()
                yield batch
                self._context.report.advance(size)
                batch, characters, size = [], 0, 0
        yield batch
        self._context.report.advance(size)

    def _tokenized(
        self, batch: Sequence[tuple[Rendered | RenderedPair, Place]]
    ) -> Iterator[tuple[Rendered | RenderedPair, Place, list[Tokens]]]:
        """The rows with their tokens: one side, of a pair two."""
        tokens = self._renderer.tokenize([side for rendered, _ in batch for side in _sides(rendered)])
        for rendered, place in batch:
            yield rendered, place, [next(tokens) for _ in _sides(rendered)]

    def _fitting(
        self, sides: list[Tokens], place: Place, counts: Counts, dataset: int, rendered: Rendered | RenderedPair
    ) -> Iterator[tuple[TokenizedRow, bytes]]:
        """The row if it fits, or what `longRows` makes of it; else nothing, counted. With the digest of its group."""
        digest = _group_of(sides)
        longest = max(len(side.input_ids) for side in sides)
        long_rows = self._long_rows or (LongRows.SPLIT if _splits(rendered) else LongRows.DROP)
        if not all(side.loss_mask.any() for side in sides):
            counts.nothing_to_learn += 1
        elif longest <= self._max_length:
            yield _as_row(sides, dataset), digest
        elif long_rows is LongRows.FAIL:
            remedy = "Raise maxLength, shorten the row, or set longRows to Drop or Truncate."
            place.refuse(f"{longest:,} tokens, training.maxLength is {self._max_length:,} and longRows is Fail", remedy)
        elif long_rows is LongRows.SPLIT:
            for piece in _pieces(sides[0], self._max_length):
                yield _as_row([piece], dataset), digest
        else:
            cut = [Tokens(side.input_ids[: self._max_length], side.loss_mask[: self._max_length]) for side in sides]
            if long_rows is LongRows.TRUNCATE and all(side.loss_mask.any() for side in cut):
                counts.truncated += 1
                yield _as_row(cut, dataset), digest
            else:
                counts.too_long += 1


def _sides(rendered: Rendered | RenderedPair) -> tuple[Rendered, ...]:
    return (rendered.chosen, rendered.rejected) if isinstance(rendered, RenderedPair) else (rendered,)


def _splits(rendered: Rendered | RenderedPair) -> bool:
    return isinstance(rendered, Rendered) and rendered.splits


def _as_row(sides: Sequence[Tokens], dataset: int) -> TokenizedRow:
    return TokenizedRow(sides[0], sides[1] if len(sides) > 1 else None, dataset)


def _group_of(sides: Sequence[Tokens]) -> bytes:
    """The digest of a row; of a pair that of its prompt, whose other answers must not be on the other side."""
    ids, mask = sides[0].input_ids, sides[0].loss_mask
    if len(sides) == 1:
        return digest_of(ids.tobytes(), mask.tobytes())
    return digest_of(ids[: int(mask.argmax())].tobytes())


def _pieces(tokens: Tokens, max_length: int) -> Iterator[Tokens]:
    """A row in pieces that fit; the first token of each has nothing before it, and does not count."""
    for start in range(0, len(tokens.input_ids), max_length):
        mask = tokens.loss_mask[start : start + max_length].copy()
        mask[0] = False
        if mask.any():
            yield Tokens(tokens.input_ids[start : start + max_length], mask)


def _require_rows(rows: int, counts: Counts, name: str, max_length: int) -> None:
    if rows:
        return
    reasons = []
    if counts.too_long:
        reasons.append(f"{counts.too_long:,} are longer than training.maxLength ({max_length:,} tokens)")
    if counts.nothing_to_learn:
        reasons.append(f"{counts.nothing_to_learn:,} have no answer to learn from (or, of a pair, twice the same)")
    msg = f"dataset '{name}': no row is left of {counts.dropped:,}: {' and '.join(reasons)}. "
    raise InvalidDataset(msg + "Raise training.maxLength, or give rows with shorter prompts and with answers.")


# Telling


def _facts(  # noqa: PLR0913 - what is told of the rows
    rows: Kept,
    trained: NDArray[np.bool_],
    measured: Kept,
    held_out: NDArray[np.bool_],
    leaked: int,
    windows: list[Window] | None,
) -> DataFacts:
    lengths = np.asarray(rows.lengths, dtype=np.int64)
    p50, p95, p99 = (int(np.percentile(lengths[trained], share, method="nearest")) for share in (50, 95, 99))
    others = () if measured is rows else (measured,)
    counts = [each for kept in (rows, *others) for each in kept.counts]
    return DataFacts(
        train_rows=int(trained.sum()),
        eval_rows=int(held_out.sum()),
        dropped_rows=sum(each.dropped for each in counts) + leaked,
        truncated_rows=sum(each.truncated for each in counts),
        train_tokens=int(lengths[trained].sum()),
        loss_tokens=int(np.asarray(rows.loss_tokens, dtype=np.int64)[trained].sum()),
        length_p50=p50,
        length_p95=p95,
        length_p99=p99,
        length_max=int(lengths[trained].max()),
        packed_rows=None if windows is None else sum(len(window.sequences) for window in windows),
        datasets=(
            *_facts_of(rows, trained, held_out if measured is rows else np.zeros(len(rows), dtype=np.bool_)),
            *(each for kept in others for each in _facts_of(kept, np.zeros(len(kept), dtype=np.bool_), held_out)),
        ),
    )


def _facts_of(kept: Kept, trained: NDArray[np.bool_], held_out: NDArray[np.bool_]) -> Iterator[DatasetFacts]:
    """The facts of each dataset."""
    of, lengths = np.asarray(kept.datasets), np.asarray(kept.lengths, dtype=np.int64)
    train_rows, eval_rows = kept.of_dataset(trained), kept.of_dataset(held_out)
    for index, (name, counts) in enumerate(zip(kept.names, kept.counts, strict=True)):
        yield DatasetFacts(
            name=name,
            train_rows=int(train_rows[index]),
            eval_rows=int(eval_rows[index]),
            dropped_rows=counts.dropped,
            truncated_rows=counts.truncated,
            train_tokens=int(lengths[trained & (of == index)].sum()),
        )


def _remarks(  # noqa: PLR0913 - what may be told
    rows: Kept,
    others: Kept | None,
    leaked: int,
    facts: DataFacts,
    evaluation: Evaluation | None,
    renderer: Renderer,
) -> tuple[str, ...]:
    """What a user may not expect, in sentences."""
    counts = [*rows.counts, *(others.counts if others is not None else ())]
    long, empty = sum(each.too_long for each in counts), sum(each.nothing_to_learn for each in counts)
    remarks = []
    if long:
        remarks.append(f"{long:,} rows longer than training.maxLength were dropped.")
    if facts.truncated_rows:
        remarks.append(
            f"{facts.truncated_rows:,} rows were cut at training.maxLength: they lost their end token, so nothing is "
            "learned from them of when to stop."
        )
    if empty:
        remarks.append(f"{empty:,} rows without an answer to learn from were dropped.")
    if leaked:
        remarks.append(f"{leaked:,} evaluation rows are in the training data as well and were dropped from evaluation.")
    if renderer.spelling_rows:
        remarks.append(
            f"{renderer.spelling_rows:,} rows spell special tokens in their text, which stay plain text "
            "(of format Text, datasets[].specialTokens takes them for such)."
        )
    if not facts.eval_rows and settings_of(evaluation)[0]:
        remarks.append(
            "Nothing is held out: rows of one group (identical ones, pieces of one text, pairs of one prompt) stay "
            "together, and no group is small enough to be held out. Raise evaluation.percent, or give "
            "evaluation.datasets."
        )
    return tuple(remarks)
