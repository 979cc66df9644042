"""Mistakes in datasets are told with dataset, file, line, field and remedy."""

import contextlib
import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from finetune_trainer.config import Dataset
from finetune_trainer.data.files import ROW_LIMIT
from finetune_trainer.data.rows import (
    ChatRow,
    DatasetReader,
    InstructionRow,
    PreferenceRow,
    PromptRow,
    QuestionRow,
    Row,
    TextRow,
)
from finetune_trainer.runtime.errors import TrainerError
from finetune_trainer.runtime.work import resolve_volume
from tests.tiny import make_jsonl

GOOD = {"instruction": "q", "output": "a"}
ASK, TELL = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def read(folder: Path, path: str = "rows.jsonl", **fields: Any) -> list[Row]:
    dataset = Dataset.model_validate({"volume": {"claimName": "claim", "path": path}, **fields})
    assert dataset.volume is not None
    return [
        row for _, row, _ in DatasetReader(dataset, "dolly", resolve_volume(folder, dataset.volume, "dataset 'dolly'"))
    ]


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CALLED = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
BAD_ANSWER = {"role": "assistant", "content": "b"}


def read_text(folder: Path, content: str | bytes, **fields: Any) -> list[Row]:
    path = folder / "claim" / "rows.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read(folder, **fields)


@pytest.mark.parametrize(
    ("row", "fields", "expected"),
    [
        pytest.param({"text": "t"}, {}, TextRow("t"), id="text"),
        pytest.param({"body": "t"}, {"format": "Text", "columns": {"text": "body"}}, TextRow("t"), id="text renamed"),
        pytest.param(GOOD, {}, InstructionRow("q", "", "a"), id="instruction"),
        pytest.param({**GOOD, "input": None}, {}, InstructionRow("q", "", "a"), id="null input is none"),
        pytest.param(
            {"instruction": "q", "context": "c", "response": "a"}, {}, InstructionRow("q", "c", "a"), id="dolly's names"
        ),
        pytest.param(
            {"ask": "q", "tell": "a"},
            {"columns": {"instruction": "ask", "output": "tell"}},
            InstructionRow("q", "", "a"),
            id="instruction renamed",
        ),
        pytest.param(
            {"messages": [{**ASK, "name": "x", "weight": 1}, TELL]},
            {},
            ChatRow(({**ASK, "name": "x"}, TELL)),
            id="chat",
        ),
        pytest.param(
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            {},
            ChatRow(({"role": "system", "content": "s"}, ASK, TELL)),
            id="chat in ShareGPT's names",
        ),
        pytest.param(
            {"talk": [{"who": "user", "says": "q"}, {"who": "assistant", "says": "a"}]},
            {"format": "Chat", "columns": {"messages": "talk", "role": "who", "content": "says"}},
            ChatRow((ASK, TELL)),
            id="chat renamed",
        ),
        pytest.param({"messages": json.dumps([ASK, TELL])}, {}, ChatRow((ASK, TELL)), id="chat as JSON in a text"),
        pytest.param(
            {"messages": [ASK, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
            {},
            ChatRow((ASK, TELL)),
            id="contents in parts of text",
        ),
        pytest.param(
            {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": [TOOL]},
            {},
            ChatRow((ASK, {"role": "assistant", "content": "", "tool_calls": [CALLED]}), (TOOL,)),
            id="chat with tools, whose arguments are JSON in a text",
        ),
        pytest.param({"prompt": "q", "completion": "a"}, {}, PromptRow("q", "a"), id="prompt and completion"),
        pytest.param(
            {"prompt": [ASK], "completion": [TELL]},
            {},
            ChatRow((ASK, TELL), given=1),
            id="prompt and completion, messages",
        ),
        pytest.param({"question": "q", "answer": "a"}, {}, QuestionRow("q", "", "a"), id="question and answer"),
        pytest.param(
            {"question": "q", "context": "c", "answer": "a", "system": "s"},
            {},
            QuestionRow("q", "c", "a", "s"),
            id="question, context and answer",
        ),
        pytest.param(
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            {},
            PreferenceRow(PromptRow("q", "a"), PromptRow("q", "b")),
            id="preference",
        ),
        pytest.param(
            {"chosen": "Human: q Assistant: a lot", "rejected": "Human: q Assistant: all"},
            {},
            PreferenceRow(PromptRow("Human: q Assistant:", " a lot"), PromptRow("Human: q Assistant:", " all")),
            id="preference: what both begin with is the prompt, in whole words",
        ),
        pytest.param(
            {"chosen": [ASK, TELL], "rejected": [ASK, BAD_ANSWER]},
            {},
            PreferenceRow(ChatRow((ASK, TELL), given=1), ChatRow((ASK, BAD_ANSWER), given=1)),
            id="preference: messages that both begin with",
        ),
        pytest.param(
            {"prompt": "q", "chosen": [ASK, TELL], "rejected": [ASK, BAD_ANSWER]},
            {},
            PreferenceRow(ChatRow((ASK, TELL), given=1), ChatRow((ASK, BAD_ANSWER), given=1)),
            id="preference: a prompt that is told twice",
        ),
        pytest.param(
            {"prompt": [ASK], "chosen": [TELL], "rejected": "b"},
            {},
            PreferenceRow(ChatRow((ASK, TELL), given=1), ChatRow((ASK, BAD_ANSWER), given=1)),
            id="preference: an answer that is text",
        ),
    ],
)
def test_a_row_is_read_by_its_fields(
    tmp_path: Path, row: dict[str, Any], fields: dict[str, Any], expected: Row
) -> None:
    assert read_text(tmp_path, json.dumps(row), **fields) == [expected]


def second(row: object) -> str:
    """A good first row, then this one."""
    return json.dumps(GOOD) + "\n" + (row if isinstance(row, str) else json.dumps(row)) + "\n"


def chat(message: object) -> str:
    return json.dumps({"messages": [message]})


BAD = [
    ("no JSON", second("{'a': 1}"), {},
     r"dataset 'dolly', file rows.jsonl, line 2: not JSON \(.*column 2\). Each line"),
    ("a JSON array file", "[\n", {}, "line 1: not JSON .*looks like one JSON array: name it .json"),
    ("no object", second([1]), {}, "line 2: a JSON list, not an object"),
    ("a wrong column", second({"instruction": "q", "answer": "a"}), {},
     r"line 2: no field 'output' \(has 'instruction', 'answer'\). Set columns: \{output: answer\}\."),
    ("a column that was set and is not there", json.dumps(GOOD), {"columns": {"output": "response"}},
     r"line 1: no field 'response' \(has 'instruction', 'output'\). Set columns: \{output: output\}\."),
    ("a wrong type", second({"instruction": "q", "output": 3}), {}, "line 2: field 'output' is a number, not text"),
    ("null", second({"instruction": "q", "output": None}), {}, "line 2: field 'output' is a null, not text"),
    ("an unknown format", '{"prompt": "q", "x": 1}', {},
     r"line 1: the format cannot be told .*has 'prompt', 'x'\). Set"),
    ("no fields", "{}", {}, r"the format cannot be told from the fields \(has none\)"),
    ("an empty file", "", {}, r"dataset 'dolly' has no rows \(rows.jsonl is empty\)"),
    ("only empty lines", "\n \n", {}, "has no rows"),
    ("no UTF-8", b'{"text": "\xff"}', {}, "line 1: byte 11 is not UTF-8. Save the file as UTF-8, uncompressed"),
    ("a compressed file", b"\x1f\x8b\x08\x00", {}, "byte 2 is not UTF-8. .*uncompressed"),
    ("half a surrogate pair", '{"text": "a\\ud800"}', {},
     "line 1: field 'text' holds half a surrogate pair at character 2"),
    ("messages that are text", '{"messages": "hi"}', {}, r"field 'messages' is a string, not a list .* Write it as \["),
    ("no messages", '{"messages": []}', {}, "field 'messages' is an empty list"),
    ("a message that is text", chat("hi"), {}, r"messages\[0\] is a string, not an object"),
    ("no role", chat({"content": "hi"}), {}, r"messages\[0\] has no role \(has 'content'\)"),
    ("an unknown role", chat({"role": "bot", "content": "hi"}), {}, 'has the role "bot". Roles are system'),
    ("a role that is a list", chat({"role": ["user"], "content": "hi"}), {}, "has the role"),
    ("no content", chat({"role": "user"}), {}, r"messages\[0\] has no content. content must be text"),
    ("an unknown role of ShareGPT", chat({"from": "bing", "value": "hi"}), {}, 'has the role "bing".*human and gpt'),
    ("content that is an image", chat({"role": "user", "content": [{"type": "image"}]}), {},
     "content that is a list. content must be text"),
    ("a call without a name", chat({"role": "assistant", "tool_calls": [{"function": {}}]}), {},
     "tool_calls has a call without a name"),
    ("calls that are no list", chat({"role": "assistant", "tool_calls": 3}), {}, "tool_calls is no list of objects"),
    ("arguments that are no object",
     chat({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}), {},
     "arguments of 'f' are no JSON object"),
    ("tools that are text", json.dumps({"messages": [ASK, TELL], "tools": "add"}), {}, "'tools' is no list of tools"),
    ("no completion", '{"prompt": "q"}', {"format": "PromptCompletion"}, "no field 'completion'.*Set columns"),
    ("a completion of another kind", json.dumps({"prompt": "q", "completion": [TELL]}), {},
     "field 'completion' is a list, not text"),
    ("answers in a list", '{"question": "q", "answer": ["a"]}', {}, "field 'answer' is a list, not text"),
    ("no rejected answer", '{"chosen": "a"}', {"format": "Preference"}, r"no field 'rejected' \(has 'chosen'\)"),
    ("answers without a prompt", json.dumps({"chosen": [TELL], "rejected": [BAD_ANSWER]}), {},
     "share no message, so there is no prompt. Give the prompt in a field"),
    ("a template without an answer", '{"text": "t"}', {"promptTemplate": "{{ text }}"},
     "dataset 'dolly': promptTemplate needs a responseTemplate"),
    ("a template for compared answers", '{"prompt": "q", "chosen": "a", "rejected": "b"}',
     {"promptTemplate": "x", "responseTemplate": "x"}, "responseTemplate is not for Preference"),
    ("no template", "{}", {"promptTemplate": "{% if %}", "responseTemplate": "x"},
     "dataset 'dolly': promptTemplate, line 1: Expected an expression.*Correct the template"),
    ("too deep", "[" * 100_000, {}, "not JSON .it is nested too deeply"),
    ("too many digits", '{"text": ' + "9" * 10_000 + "}", {}, "not JSON .a number has too many digits"),
    ("cut off", '{"text": "x"\n', {}, "line 1: not JSON .*at column 13"),
    ("a field twice", second('{"instruction": "q", "output": "a", "output": "b"}'), {},
     "line 2: 'output' stands twice in one object. Leave one of the two out"),
    ("a field of a message twice", '{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}', {},
     "line 1: 'role' stands twice in one object"),
    ("a line too long", json.dumps({"text": "a" * ROW_LIMIT}), {},
     "line 1: the line has more than 8,388,608 bytes. Divide its text into several rows"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "fields", "words"), [pytest.param(*case[1:], id=case[0]) for case in BAD])
def test_a_mistake_is_told_with_its_place_and_the_way_out(
    tmp_path: Path, content: str | bytes, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(TrainerError, match=words):
        read_text(tmp_path, content, **fields)


def test_a_byte_order_mark_empty_lines_and_windows_ends_are_nothing(tmp_path: Path) -> None:
    assert len(read_text(tmp_path, b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')) == 2


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    make_jsonl(tmp_path / "claim" / "d" / "b.jsonl", [{"text": "2"}])
    make_jsonl(tmp_path / "claim" / "d" / "a.jsonl", [{"text": "1"}])
    make_jsonl(tmp_path / "claim" / "d" / "c.txt", ["no rows"])
    assert read(tmp_path, "d") == [TextRow("1"), TextRow("2")]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        pytest.param("dolly.json", r"has no 'dolly.json' \(folder '\.' has other.jsonl, sub/\). Correct", id="a typo"),
        pytest.param("sub/x.jsonl", r"folder 'sub' has notes.md", id="the nearest folder is shown"),
        pytest.param(
            "sub", r"folder sub has no file of rows \(has notes.md\). Give .jsonl", id="a folder without rows"
        ),
        pytest.param("link", "leads out of the claim", id="a link"),
        pytest.param("loop", "cannot be followed|has no 'loop'|leads out", id="a circle of links"),
    ],
)
def test_a_wrong_path_is_told_with_what_is_there(tmp_path: Path, path: str, words: str) -> None:
    claim = tmp_path / "claim"
    make_jsonl(claim / "other.jsonl", [GOOD])
    (claim / "sub").mkdir()
    (claim / "sub" / "notes.md").touch()
    (tmp_path / "secret").mkdir()
    if path in {"link", "loop"}:
        (claim / path).symlink_to("../secret" if path == "link" else "loop")
    with pytest.raises(TrainerError, match=words):
        read(tmp_path, path)


def test_a_claim_that_is_not_mounted_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="claim 'claim' is not mounted"):
        read(tmp_path)


# Files


TABLE = [{"instruction": f"q{n}", "output": f'a "{n}",\nand more' if n else "é"} for n in range(600)]


def write_csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(GOOD), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(TABLE)


def lines_of(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


KINDS: list[tuple[str, Callable[[Path], object]]] = [
    ("rows.jsonl", lambda path: path.write_text(lines_of(TABLE))),
    ("rows.ndjson", lambda path: path.write_text(lines_of(TABLE))),
    ("rows.jsonl.gz", lambda path: path.write_bytes(gzip.compress(lines_of(TABLE).encode()))),
    ("rows.json", lambda path: path.write_text(json.dumps(TABLE))),
    ("object.json", lambda path: path.write_text(json.dumps({"version": {"list": [1]}, "data": TABLE}, indent=1))),
    ("lines.json", lambda path: path.write_text(lines_of(TABLE))),
    ("rows.csv", write_csv),
    ("rows.tsv", lambda path: write_csv(path, "\t")),
    ("rows.parquet", lambda path: parquet.write_table(pa.Table.from_pylist(TABLE), path)),
]


@pytest.mark.parametrize(("name", "write"), KINDS, ids=[name for name, _ in KINDS])
def test_every_kind_of_file_holds_the_same_rows(tmp_path: Path, name: str, write: Callable[[Path], object]) -> None:
    (tmp_path / "claim").mkdir()
    path = tmp_path / "claim" / name
    write(path)
    assert read(tmp_path, name) == [InstructionRow(row["instruction"], "", row["output"]) for row in TABLE]
    dataset = Dataset.model_validate({"volume": {"claimName": "claim", "path": name}})
    taken = sum(size for _, _, size in DatasetReader(dataset, "dolly", path))
    assert 0 < taken <= path.stat().st_size + len(TABLE)


def test_a_text_file_is_a_row_a_line(tmp_path: Path) -> None:
    make_jsonl(tmp_path / "claim" / "rows.txt", ["one", "", "two "])
    assert read(tmp_path, "rows.txt") == [TextRow("one"), TextRow("two ")]


def test_a_folder_is_read_below_and_beside_its_notes(tmp_path: Path) -> None:
    make_jsonl(tmp_path / "claim" / "d" / "data" / "b.jsonl", [{"text": "1"}])
    make_jsonl(tmp_path / "claim" / "d" / "LICENSE.txt", ["no rows"])
    make_jsonl(tmp_path / "claim" / "d" / ".cache" / "c.jsonl", ["no rows"])
    make_jsonl(tmp_path / "claim" / "d" / "dataset_infos.json", ["{}"])
    assert read(tmp_path, "d") == [TextRow("1")]


MESSAGES = json.dumps([ASK, TELL]).replace('"', '""')


def test_a_cell_may_hold_messages(tmp_path: Path) -> None:
    make_jsonl(tmp_path / "claim" / "rows.csv", ["messages", f'"{MESSAGES}"'])
    assert read(tmp_path, "rows.csv") == [ChatRow((ASK, TELL))]


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def parquet_of(rows: list[Any]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


TOO_LONG = "a" * ROW_LIMIT
"""One character more, and a row is refused."""
BAD_FILES: list[tuple[str, str, bytes, str]] = [
    ("a kind that is not read", "rows.xlsx", b"PK", r"file rows.xlsx: files of the kind '.xlsx' are not read. Convert"),
    ("no kind", "rows", b"{}", "of the kind 'without suffix' are not read"),
    ("a compressed file of another kind", "rows.csv.gz", b"", r"kind '.csv.gz' are not read"),
    ("gzip that is none", "rows.jsonl.gz", b'{"text": "a"}', "rows.jsonl.gz, line 1: the file is not whole gzip"),
    ("gzip that was cut", "rows.jsonl.gz", cut(gzip.compress(lines_of(TABLE).encode())), "is not whole gzip .*again"),
    ("JSON that is cut", "rows.json", b'[{"text": "a"}, {"text"', r"rows.json, row 2: not JSON .*Give an array"),
    ("JSON of texts", "rows.json", b'["a"]', "row 1: a JSON string, not an object"),
    ("JSON that is one text", "rows.json", b'"a"', "one value with no array, so the rows cannot be told"),
    ("JSON with two arrays", "rows.json", b'{"a": [], "b": []}', r"2 arrays \(a, b\), so the rows cannot be told"),
    ("JSON without rows", "rows.json", b"[]", r"has no rows \(rows.json is empty\)"),
    ("CSV with a cell too many", "rows.csv", b"text\na\nb,c\n",
     "rows.csv, line 3: 2 cells where the header names 1 fields. Put texts"),
    ("CSV with a quote too few", "rows.csv", b'text\n"a\n', "line 2: not csv .*double quotes"),
    ("CSV with a field twice", "rows.csv", b"text,text\na,b\n", "line 1: the header names a field twice"),
    ("CSV in Latin-1", "rows.csv", b"text\n\xe9\n", "not csv .*Save the file as UTF-8"),
    ("CSV with semicolons", "rows.csv", b"text;label\na;1\n", r"cannot be told from the fields \(has 'text;label'"),
    ("CSV without rows", "rows.csv", b"text\n", "has no rows"),
    ("JSON with a field twice", "rows.json", b'[{"text": "a"}, {"text": "b", "text": "c"}]',
     "row 2: 'text' stands twice in one object"),
    ("JSON with a row too long", "rows.json", json.dumps([{"text": "a", "more": [TOO_LONG, "b"]}]).encode(),
     "row 1: the row has 8,388,610 characters, at most 8,388,608 are read. Divide its text"),
    ("CSV with a cell too long", "rows.csv", ('text\n"' + f"{'a' * 1023}\n" * (ROW_LIMIT // 1024) + 'b"\n').encode(),
     "line 2: not csv .field larger than field limit"),
    ("CSV with a line too long", "rows.csv", f"text,more\na,{TOO_LONG}\n".encode(),
     "line 2: the line has more than 8,388,608 characters. Divide its text"),
    ("gzip that unpacks to one long line", "rows.jsonl.gz", gzip.compress(TOO_LONG.encode() * 8),
     "rows.jsonl.gz, line 1: the line has more than 8,388,608 bytes"),
    ("parquet with a row too long", "rows.parquet", parquet_of([{"text": "a"}, {"text": TOO_LONG + "b"}]),
     "row 2: the row has 8,388,609 characters"),
    ("parquet that is none", "rows.parquet", b"PAR1", "rows.parquet, row 1: not a whole parquet file"),
    ("an Arrow folder", "d/data.arrow", b"", "has no file of rows .*made by save_to_disk: write .* to_parquet"),
    ("an empty folder", "d/.keep", b"", r"folder d has no file of rows \(has nothing\)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "words"), [pytest.param(*case[1:], id=case[0]) for case in BAD_FILES])
def test_a_file_that_is_none_is_told_with_the_way_out(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / "claim" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(TrainerError, match=words):
        read(tmp_path, name.partition("/")[0])


def test_files_of_two_kinds_are_refused(tmp_path: Path) -> None:
    make_jsonl(tmp_path / "claim" / "d" / "a.jsonl", [GOOD])
    make_jsonl(tmp_path / "claim" / "d" / "b.csv", ["text", "a"])
    with pytest.raises(TrainerError, match=r"different kinds \(1 .csv and 1 .jsonl\). Name one file"):
        read(tmp_path, "d")


# Anything


NAMES = st.sampled_from([
    "text", "instruction", "input", "output", "messages", "conversations", "role", "content", "from", "value", "prompt",
    "completion", "question", "answer", "chosen", "rejected", "tools", "tool_calls", "function", "name", "arguments",
])  # fmt: skip
FLOATS = st.floats(allow_subnormal=False)
"""The quantizer's libraries make this process take subnormal numbers for zero, which hypothesis cannot work with."""
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | st.text() | st.characters(categories=["Cs"]),
    lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner),
    max_leaves=8,
)  # fmt: skip


@given(rows=st.lists(JSON | st.dictionaries(NAMES, JSON)))
def test_any_json_is_read_or_refused_in_words(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    content = "\n".join(json.dumps(row) for row in rows)
    with contextlib.suppress(TrainerError):
        read_text(tmp_path_factory.mktemp("rows"), content)


@given(name=st.sampled_from([name for name, _ in KINDS]), content=st.binary())
def test_any_bytes_are_read_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "claim").mkdir()
    (folder / "claim" / name).write_bytes(content)
    with contextlib.suppress(TrainerError):
        read(folder, name)
