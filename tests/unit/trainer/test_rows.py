"""Mistakes in datasets are told with dataset, file, line, field and remedy."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.config import Dataset
from finetune_trainer.errors import TrainerError
from finetune_trainer.rows import ChatRow, DatasetReader, InstructionRow, Row, TextRow
from tests.tiny import make_jsonl

GOOD = {"instruction": "q", "output": "a"}


def read(folder: Path, path: str = "rows.jsonl", **fields: Any) -> list[Row]:
    dataset = Dataset.model_validate({"volume": {"claimName": "claim", "path": path}, **fields})
    return [row for _, row, _ in DatasetReader(dataset, "dolly", folder)]


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
            {"messages": [{"role": "user", "content": "q", "name": "x"}]},
            {},
            ChatRow(({"role": "user", "content": "q"},)),
            id="chat",
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
    ("a JSON array file", "[\n", {}, "line 1: not JSON .*looks like one JSON array: write its items one a line"),
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
    ("an unknown role", chat({"role": "bot", "content": "hi"}), {}, 'has the role "bot". roles are system, user'),
    ("a role that is a list", chat({"role": ["user"], "content": "hi"}), {}, "has the role"),
    ("no content", chat({"role": "user"}), {}, r"messages\[0\] has no content. content must be text"),
    ("ShareGPT", chat({"from": "human", "value": "hi"}), {}, r"ShareGPT\). Rename them to role and content"),
    ("too deep", "[" * 100_000, {}, "not JSON"),
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
        pytest.param("sub/x.jsonl", r"folder 'sub' has notes.txt", id="the nearest folder is shown"),
        pytest.param("sub", r"folder sub has no \*.jsonl file \(has notes.txt\)", id="a folder without jsonl"),
        pytest.param("link", "leads out of the claim", id="a link"),
        pytest.param("loop", "cannot be followed|has no 'loop'|leads out", id="a circle of links"),
    ],
)
def test_a_wrong_path_is_told_with_what_is_there(tmp_path: Path, path: str, words: str) -> None:
    claim = tmp_path / "claim"
    make_jsonl(claim / "other.jsonl", [GOOD])
    (claim / "sub").mkdir()
    (claim / "sub" / "notes.txt").touch()
    (tmp_path / "secret").mkdir()
    if path in {"link", "loop"}:
        (claim / path).symlink_to("../secret" if path == "link" else "loop")
    with pytest.raises(TrainerError, match=words):
        read(tmp_path, path)


def test_a_claim_that_is_not_mounted_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="claim 'claim' is not mounted"):
        read(tmp_path)


NAMES = st.sampled_from(["text", "instruction", "output", "messages", "role", "content"])
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


@given(content=st.binary())
def test_any_bytes_are_read_or_refused_in_words(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    with contextlib.suppress(TrainerError):
        read_text(tmp_path_factory.mktemp("rows"), content)
