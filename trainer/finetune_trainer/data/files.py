"""Files of rows, read one row at a time: jsonl (also gzipped), json, csv, tsv, parquet, plain text.

    jsonl, ndjson   one JSON object a line; also .jsonl.gz
    json            an array of objects, an object with one such array, or what is jsonl in truth
    csv, tsv        a header with the names of the fields, then a row each; every field is text
    parquet         a row each
    txt             one row a line, its field is `text`; for texts of several lines take jsonl

Empty lines are skipped. No file is ever in memory as a whole, whatever its size or what it unpacks to: a row has at
most `ROW_LIMIT` characters, and a line no more bytes. A name that stands twice in one object is a mistake.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

import ijson

from finetune_trainer.runtime.errors import InvalidDataset
from finetune_trainer.runtime.wording import first_line, first_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Record = dict[str, Any]
ROW_LIMIT = 8 << 20
"""Characters of a row's texts, and bytes of a line: a million tokens, the most that training.maxLength takes, fit."""
ROW_LIMIT_REMEDY = "Divide its text into several rows, or leave it out."
PARQUET_BATCH_ROWS = 256
JSON_REMEDY = "Give an array of objects, an object with one such array, or jsonl: one JSON object a line."
JSON_ERRORS = (ijson.JSONError, ValueError, RecursionError, OverflowError)
IGNORED_NAMES = frozenset({"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"})
"""What the datasets library leaves beside the rows."""


@dataclass(frozen=True)
class Place:
    """Where a row is, for messages."""

    dataset: str
    file: str
    number: int
    """Counted from 1; of lines the empty ones too."""
    unit: str = "line"
    """line or row."""

    def __str__(self) -> str:
        """`dataset 'dolly', file train.jsonl, line 1204`."""
        return f"dataset '{self.dataset}', file {self.file}, {self.unit} {self.number}"

    def refuse(self, problem: str, remedy: str, cause: BaseException | None = None) -> NoReturn:
        """InvalidDataset at this place."""
        msg = f"{self}: {problem}. {remedy}"
        raise InvalidDataset(msg) from cause


class Object(dict[str, Any]):
    """A JSON object that knows a name which stands twice in it: parsers keep the last value without a word."""

    repeated: str | None = None

    def __setitem__(self, name: str, value: object) -> None:
        if name in self:
            self.repeated = name
        super().__setitem__(name, value)

    @classmethod
    def of(cls, pairs: list[tuple[str, Any]]) -> Record:
        """A plain object, which is faster, where no name stands twice."""
        if len(plain := dict(pairs)) == len(pairs):
            return plain
        made = cls()
        for name, value in pairs:
            made[name] = value
        return made


def find_files(path: Path, dataset: str) -> list[Path]:
    """The files of rows at a path: itself, or those of one kind in a folder and below, by name. InvalidDataset."""
    if path.is_file():
        _kind_of(path, dataset)
        return [path]
    found = [child for child in sorted(path.rglob("*")) if child.is_file() and not is_hidden(_below(path, child))]
    kinds: dict[str, list[Path]] = {}
    for child in found:
        if (kind := _suffix(child)) in READERS and child.name not in IGNORED_NAMES:
            kinds.setdefault(kind, []).append(child)
    if len(kinds) > 1:
        kinds.pop(".txt", None)  # a licence or a note beside the rows
    where = f"dataset '{dataset}': folder {path.name}"
    if not kinds:
        there = first_of(_below(path, child) for child in found) or "nothing"
        msg = f"{where} has no file of rows (has {there}). "
        if any(child.suffix == ".arrow" for child in found):
            msg += "It was made by save_to_disk: write the rows with to_parquet or to_json instead. "
        raise InvalidDataset(msg + f"Give {_listed_kinds()}.")
    if len(kinds) > 1:
        counts = " and ".join(f"{len(files)} {kind}" for kind, files in sorted(kinds.items()))
        msg = f"{where} has files of different kinds ({counts}). Name one file, or a folder with files of one kind."
        raise InvalidDataset(msg)
    return next(iter(kinds.values()))


def read_records(path: Path, dataset: str) -> Iterator[tuple[Place, Record, int]]:
    """The rows of a file with their places, and the bytes of the file that each took. InvalidDataset."""
    for place, record, size in READERS[_kind_of(path, dataset)](path, dataset):
        _check(record, place)
        yield place, record, size


def _check(record: Record, place: Place) -> None:
    """Refuse a row that is too large, or in which a name stands twice in one object."""
    characters, inside = 0, [record]
    while inside:
        value: Any = inside.pop()
        if isinstance(value, dict):
            if isinstance(value, Object) and value.repeated is not None:
                place.refuse(f"'{value.repeated}' stands twice in one object", "Leave one of the two out.")
            inside += value.values()
        elif isinstance(value, list):
            inside += value
        elif isinstance(value, str):
            characters += len(value)
    if characters > ROW_LIMIT:
        place.refuse(f"the row has {characters:,} characters, at most {ROW_LIMIT:,} are read", ROW_LIMIT_REMEDY)


def is_hidden(name: str) -> bool:
    """Whether a file's path, relative to where one looks, holds a name that begins with a dot or an underscore."""
    return any(part.startswith((".", "_")) for part in name.split("/"))


def _below(folder: Path, child: Path) -> str:
    return child.relative_to(folder).as_posix()


def _suffix(path: Path) -> str:
    """The file's kind: its last suffix, with the one before it where the last is .gz."""
    return "".join(path.suffixes[-2:] if path.suffix.lower() == ".gz" else path.suffixes[-1:]).lower()


def _kind_of(path: Path, dataset: str) -> str:
    kind = _suffix(path)
    if kind not in READERS:
        msg = f"dataset '{dataset}', file {path.name}: files of the kind '{kind or 'without suffix'}' are not read. "
        raise InvalidDataset(msg + f"Convert it to {_listed_kinds()}.")
    return kind


def _listed_kinds() -> str:
    *others, last = READERS
    return f"{', '.join(others)} or {last}"


# Lines


def _read_jsonl(path: Path, dataset: str) -> Iterator[tuple[Place, Record, int]]:
    for place, text, size in _lines(path, dataset):
        yield place, _object(text, place), size


def _read_text(path: Path, dataset: str) -> Iterator[tuple[Place, Record, int]]:
    for place, text, size in _lines(path, dataset):
        yield place, {"text": text.rstrip("\r\n")}, size


def _lines(path: Path, dataset: str) -> Iterator[tuple[Place, str, int]]:
    """Lines that are not empty, as text. Of a gzipped file the bytes are those of the compressed one."""
    zipped = path.suffix.lower() == ".gz"
    with path.open("rb") as raw:
        lines: IO[bytes] = gzip.GzipFile(fileobj=raw) if zipped else raw  # type: ignore[assignment]
        number, before = 0, 0
        while line := _next_line(lines, Place(dataset, path.name, number + 1)):
            number += 1
            place = Place(dataset, path.name, number)
            text = _decoded(line, place)
            now = raw.tell() if zipped else before + len(line)
            if text.strip():
                yield place, text, now - before
                before = now
            elif not zipped:
                before = now


def _next_line(lines: IO[bytes], place: Place) -> bytes:
    try:
        line = lines.readline(ROW_LIMIT + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        return place.refuse(f"the file is not whole gzip ({error})", "Compress and copy it again.", error)
    if len(line) > ROW_LIMIT:
        place.refuse(f"the line has more than {ROW_LIMIT:,} bytes", ROW_LIMIT_REMEDY)
    return line


def _decoded(line: bytes, place: Place) -> str:
    try:
        return line.decode("utf-8-sig" if place.number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        remedy = "Save the file as UTF-8, uncompressed (or as .jsonl.gz)."
        return place.refuse(f"byte {error.start + 1} is not UTF-8", remedy, error)


def _object(text: str, place: Place) -> Record:
    try:
        text = text.rstrip("\r\n")  # or what is cut off seems to be missing at column 1
        value = json.loads(text, object_pairs_hook=Object.of)
    except (ValueError, RecursionError) as error:
        too_deep = "it is nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"
        reason = getattr(error, "msg", None) or too_deep
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        remedy = "Each line must be one JSON object."
        if text.lstrip().startswith("["):
            remedy = "The file looks like one JSON array: name it .json."
        return place.refuse(f"not JSON ({reason}{column})", remedy, error)
    return _as_record(value, place, "Each line must be one JSON object with named fields.")


def _as_record(value: object, place: Place, remedy: str) -> Record:
    if not isinstance(value, dict):
        return place.refuse(f"a JSON {kind_of(value)}, not an object", remedy)
    return value


# One JSON value


def _read_json(path: Path, dataset: str) -> Iterator[tuple[Place, Record, int]]:
    """The items of the array that the file is, or that its object has, parsed as they come."""
    with path.open("rb") as file:
        prefix = _path_of_the_array(file, Place(dataset, path.name, 1, "row"))
    return _read_jsonl(path, dataset) if prefix is None else _read_items(path, prefix, dataset)


def _read_items(path: Path, prefix: str, dataset: str) -> Iterator[tuple[Place, Record, int]]:
    number = before = 0
    with path.open("rb") as file:
        file.seek(_length_of_mark(file))
        items = ijson.items(file, prefix, use_float=True, map_type=Object)
        while True:
            place = Place(dataset, path.name, number + 1, "row")
            try:
                value = next(items)
            except StopIteration:
                return
            except JSON_ERRORS as error:
                place.refuse(f"not JSON ({first_line(error)})", JSON_REMEDY, error)
            number, now = number + 1, file.tell()
            yield place, _as_record(value, place, JSON_REMEDY), now - before
            before = now


def _path_of_the_array(file: IO[bytes], place: Place) -> str | None:
    """Where the rows are, in ijson's words: `item`, or `data.item` for the only array of an object; None: in lines."""
    file.seek(_length_of_mark(file))
    arrays: list[str] = []
    values = 0
    try:
        for prefix, event, _ in ijson.parse(file, use_float=True, multiple_values=True):
            values += not prefix and event in {"start_map", "start_array", "string", "number", "boolean", "null"}
            if values > 1:
                return None
            if not prefix and event == "start_array":
                return "item"
            if event == "start_array" and "." not in prefix:
                arrays.append(prefix)
    except JSON_ERRORS as error:
        place.refuse(f"not JSON ({first_line(error)})", JSON_REMEDY, error)
    if values and len(arrays) == 1:
        return f"{arrays[0]}.item"
    if not values:
        return None
    what = f"{len(arrays)} arrays ({first_of(arrays)})" if arrays else "no array"
    return place.refuse(f"the file is one value with {what}, so the rows cannot be told", JSON_REMEDY)


def _length_of_mark(file: IO[bytes]) -> int:
    """Bytes of a byte order mark at the beginning."""
    file.seek(0)
    return 3 if file.read(3) == b"\xef\xbb\xbf" else 0


# Tables


def _read_csv(path: Path, dataset: str) -> Iterator[tuple[Place, Record, int]]:
    return _read_delimited(path, dataset, ",")


def _read_tsv(path: Path, dataset: str) -> Iterator[tuple[Place, Record, int]]:
    return _read_delimited(path, dataset, "\t")


def _read_delimited(path: Path, dataset: str, delimiter: str) -> Iterator[tuple[Place, Record, int]]:
    csv.field_size_limit(ROW_LIMIT)
    before = 0
    with path.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(_bounded_lines(file, Place(dataset, path.name, 1)), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            place = Place(dataset, path.name, rows.line_num + 1)
            try:
                cells = next(rows)
            except StopIteration:
                return
            except (csv.Error, UnicodeDecodeError) as error:
                remedy = "Save the file as UTF-8, with texts of several lines or with delimiters in double quotes."
                place.refuse(f"not {path.suffix[1:]} ({error})", remedy, error)
            if not cells:
                continue
            if header is None:
                header = _checked_header(cells, place)
                continue
            if len(cells) != len(header):
                remedy = "Put texts that hold the delimiter or a line break in double quotes."
                place.refuse(f"{len(cells)} cells where the header names {len(header)} fields", remedy)
            now = raw.tell()
            yield place, dict(zip(header, cells, strict=True)), now - before
            before = now


def _bounded_lines(file: IO[str], first: Place) -> Iterator[str]:
    """The lines of a file, up to one that is too long to be read."""
    number = first.number
    while line := file.readline(ROW_LIMIT + 1):
        if len(line) > ROW_LIMIT:
            place = replace(first, number=number)
            place.refuse(f"the line has more than {ROW_LIMIT:,} characters", ROW_LIMIT_REMEDY)
        yield line
        number += 1


def _checked_header(cells: list[str], place: Place) -> list[str]:
    if len(set(cells)) < len(cells) or not all(cell.strip() for cell in cells):
        place.refuse("the header names a field twice or not at all", "Give each column a name of its own.")
    return cells


def _read_parquet(path: Path, dataset: str) -> Iterator[tuple[Place, Record, int]]:
    import pyarrow as pa  # noqa: PLC0415 - slow
    from pyarrow import parquet  # noqa: PLC0415 - slow

    number = 0
    remedy = "Copy the file again, or write it anew with pyarrow or datasets."
    try:
        with parquet.ParquetFile(path) as file:
            share = math.ceil(path.stat().st_size / max(file.metadata.num_rows, 1))
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield Place(dataset, path.name, number, "row"), record, share
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the volume's fault, not the file's
            raise
        place = Place(dataset, path.name, number + 1, "row")
        place.refuse(f"not a whole parquet file ({first_line(error)})", remedy, error)


def kind_of(value: object) -> str:
    """The JSON type of a value, in its own words."""
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), type(value).__name__)


READERS: dict[str, Callable[[Path, str], Iterator[tuple[Place, Record, int]]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
