"""Datasets read from their files, row by row: every mistake is told with dataset, file, line, field and remedy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from finetune_trainer.config import Columns, Dataset, DatasetFormat
from finetune_trainer.errors import InvalidDataset
from finetune_trainer.work import resolve_volume

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ROLES = ("system", "user", "assistant", "tool")
USUAL_INPUTS = ("input", "context")
USUAL_OUTPUTS = ("output", "response")
FIELDS_SHOWN = 12


@dataclass(frozen=True)
class Place:
    """Where a row is, for messages."""

    dataset: str
    file: str
    line: int
    """Counted from 1, empty lines too."""

    def __str__(self) -> str:
        """`dataset 'dolly', file train.jsonl, line 1204`."""
        return f"dataset '{self.dataset}', file {self.file}, line {self.line}"

    def refuse(self, problem: str, remedy: str, cause: BaseException | None = None) -> NoReturn:
        """InvalidDataset at this place."""
        msg = f"{self}: {problem}. {remedy}"
        raise InvalidDataset(msg) from cause


@dataclass(frozen=True)
class TextRow:
    """A whole text, all of it to learn."""

    text: str


@dataclass(frozen=True)
class InstructionRow:
    """What is asked, and the answer to learn."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class ChatRow:
    """A conversation whose assistant turns are to learn."""

    messages: tuple[dict[str, str], ...]


Row = TextRow | InstructionRow | ChatRow


class DatasetReader:
    """One dataset of a job: its files, its format, its rows."""

    def __init__(self, dataset: Dataset, name: str, sources: Path) -> None:
        """Find the files. NotFound, AccessDenied, InvalidConfig (a path out of the claim) or InvalidDataset."""
        self.name = name
        self.files = _find_files(resolve_volume(sources, dataset.volume, f"dataset '{name}'"), name)
        self.size_bytes = sum(path.stat().st_size for path in self.files)
        self._columns = dataset.columns or Columns()
        self._format = dataset.format or DatasetFormat.AUTO

    def __iter__(self) -> Iterator[tuple[Place, Row, int]]:
        """Each row with its place and the bytes of its line. InvalidDataset at the first mistake."""
        parse: Callable[[dict[str, Any], Place], Row] | None = None
        for path in self.files:
            for place, value, size in read_lines(path, self.name):
                if parse is None:
                    parse = self._parser(value, place)
                yield place, parse(value, place), size
        if parse is None:
            names = ", ".join(path.name for path in self.files)
            msg = (
                f"dataset '{self.name}' has no rows ({names} is empty). Give a jsonl file with one JSON object a line."
            )
            raise InvalidDataset(msg)

    def _parser(self, first: dict[str, Any], place: Place) -> Callable[[dict[str, Any], Place], Row]:
        """How rows are read: fixed by the first one."""
        chosen = self._format if self._format is not DatasetFormat.AUTO else _guess(first, self._columns, place)
        columns = self._columns
        match chosen:
            case DatasetFormat.TEXT:
                return lambda row, place: TextRow(_string(row, columns.text or "text", "text", place))
            case DatasetFormat.INSTRUCTION:
                return lambda row, place: _instruction(row, columns, place)
            case _:
                return lambda row, place: _chat(row, columns.messages or "messages", place)


def _find_files(path: Path, name: str) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(child for child in path.glob("*.jsonl") if child.is_file())
    if not files:
        there = sorted(child.name for child in path.iterdir())[:FIELDS_SHOWN]
        msg = f"dataset '{name}': folder {path.name} has no *.jsonl file (has {', '.join(there) or 'nothing'}). "
        raise InvalidDataset(
            msg + "Name the file in volume.path, or convert the rows to jsonl: one JSON object a line."
        )
    return files


def read_lines(path: Path, dataset: str) -> Iterator[tuple[Place, dict[str, Any], int]]:
    """The objects of a jsonl file, with place and bytes of the line; empty lines are skipped. InvalidDataset."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = Place(dataset, path.name, number)
            text = _decoded(line, place)
            if not text.strip():
                continue
            yield place, _object(text, place), len(line)


def _decoded(line: bytes, place: Place) -> str:
    try:
        return line.decode("utf-8-sig" if place.line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        remedy = "Save the file as UTF-8, uncompressed."
        return place.refuse(f"byte {error.start + 1} is not UTF-8", remedy, error)


def _object(text: str, place: Place) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or type(error).__name__
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        remedy = "Each line must be one JSON object."
        if text.lstrip().startswith("["):
            remedy = "The file looks like one JSON array: write its items one a line instead."
        return place.refuse(f"not JSON ({reason}{column})", remedy, error)
    if not isinstance(value, dict):
        return place.refuse(
            f"a JSON {_kind(value)}, not an object", "Each line must be one JSON object with named fields."
        )
    return value


def _guess(row: dict[str, Any], columns: Columns, place: Place) -> DatasetFormat:
    """The format that the first row's fields speak for."""
    if (columns.messages or "messages") in row:
        return DatasetFormat.CHAT
    outputs = (columns.output,) if columns.output else USUAL_OUTPUTS
    if (columns.instruction or "instruction") in row or any(name in row for name in outputs):
        return DatasetFormat.INSTRUCTION
    if (columns.text or "text") in row:
        return DatasetFormat.TEXT
    remedy = (
        "Set format and columns, e.g. format: Instruction, columns: {instruction: prompt, output: completion}; "
        "known by themselves are text; instruction and output; messages."
    )
    return place.refuse(f"the format cannot be told from the fields ({_listed(row)})", remedy)


def _instruction(row: dict[str, Any], columns: Columns, place: Place) -> InstructionRow:
    output = columns.output or next((name for name in USUAL_OUTPUTS if name in row), USUAL_OUTPUTS[0])
    extra = columns.input or next((name for name in USUAL_INPUTS if name in row), None)
    return InstructionRow(
        instruction=_string(row, columns.instruction or "instruction", "instruction", place),
        input="" if extra is None or row.get(extra) is None else _string(row, extra, "input", place),
        output=_string(row, output, "output", place),
    )


def _chat(row: dict[str, Any], column: str, place: Place) -> ChatRow:
    if column not in row:
        _refuse_missing(row, column, "messages", place)
    messages = row[column]
    if not isinstance(messages, list) or not messages:
        what = "an empty list" if messages == [] else f"a {_kind(messages)}"
        place.refuse(f"field '{column}' is {what}, not a list of messages", _MESSAGES_REMEDY)
    return ChatRow(tuple(_message(message, f"{column}[{index}]", place) for index, message in enumerate(messages)))


_MESSAGES_REMEDY = 'Write it as [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'


def _message(message: object, where: str, place: Place) -> dict[str, str]:
    if not isinstance(message, dict):
        return place.refuse(f"{where} is a {_kind(message)}, not an object", _MESSAGES_REMEDY)
    if "role" not in message and "from" in message:
        return place.refuse(
            f"{where} has from and value (ShareGPT)", "Rename them to role and content; " + _ROLES_REMEDY
        )
    role = message.get("role")
    if role is None:
        return place.refuse(f"{where} has no role ({_listed(message)})", _MESSAGES_REMEDY)
    if role not in ROLES:
        return place.refuse(f"{where} has the role {json.dumps(role, default=str)[:40]}", _ROLES_REMEDY)
    content = message.get("content")
    if not isinstance(content, str):
        what = "no content" if content is None else f"content that is a {_kind(content)}"
        return place.refuse(f"{where} has {what}", "content must be text; leave the message out if there is none.")
    return {"role": role, "content": _whole(content, f"{where}.content", place)}


_ROLES_REMEDY = f"roles are {', '.join(ROLES)}."


def _string(row: dict[str, Any], column: str, key: str, place: Place) -> str:
    """A field that must be text. `key` is what the field is called in `columns`."""
    if column not in row:
        _refuse_missing(row, column, key, place)
    value = row[column]
    if not isinstance(value, str):
        remedy = "Write it as text, or leave the row out."
        return place.refuse(f"field '{column}' is a {_kind(value)}, not text", remedy)
    return _whole(value, f"field '{column}'", place)


def _whole(text: str, where: str, place: Place) -> str:
    """JSON can hold half of a surrogate pair, which is no character and cannot be tokenized."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        remedy = "Escape the whole character, or leave it out."
        return place.refuse(f"{where} holds half a surrogate pair at character {error.start + 1}", remedy, error)
    return text


def _refuse_missing(row: dict[str, Any], column: str, key: str, place: Place) -> NoReturn:
    usual = {
        "input": USUAL_INPUTS,
        "output": (*USUAL_OUTPUTS, "answer", "completion"),
        "instruction": ("prompt", "question"),
    }
    likely = next((name for name in (key, *usual.get(key, ())) if name in row), "NAME")
    remedy = f"Set columns: {{{key}: {likely}}}" + ("." if likely != "NAME" else " with the field's real name.")
    place.refuse(f"no field '{column}' ({_listed(row)})", remedy)


def _listed(row: dict[Any, Any]) -> str:
    if not row:
        return "has none"
    names = [f"'{str(name)[:40]}'" for name in row][:FIELDS_SHOWN]
    return "has " + ", ".join(names) + (", ..." if len(row) > len(names) else "")


def _kind(value: object) -> str:
    """The JSON type of a value, in its own words."""
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return names.get(type(value), type(value).__name__)
