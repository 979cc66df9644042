"""Datasets as prepare leaves them: every row where it belongs, and told about."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from finetune_trainer import ingest
from finetune_trainer.config import JobConfig
from finetune_trainer.data import tokenized
from finetune_trainer.data.render import Renderer
from finetune_trainer.evaluate import read_pair_rows, read_token_rows
from finetune_trainer.ingest import PreparedData
from finetune_trainer.models.folder import load_tokenizer
from finetune_trainer.progress import Stage
from finetune_trainer.runtime.context import Context
from finetune_trainer.runtime.errors import InvalidConfig, TrainerError
from finetune_trainer.runtime.report import Report
from finetune_trainer.runtime.work import WorkFolder
from finetune_trainer.training.collate import build_order
from tests.tiny import EOS, make_config, make_instructions, make_jsonl, make_tokenizer
from tests.unit.trainer.runs import SETTINGS, replace_settings

PAIRS = [
    {"prompt": f"Is {n} even? ", "chosen": "It is." if n % 2 == 0 else "No.", "rejected": "Maybe so."}
    for n in range(40)
]
NOBODY_PACKS = lambda _: False  # noqa: E731 - a name for the tests
EVERYBODY_PACKS = lambda _: True  # noqa: E731 - a name for the tests


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder, chat_template=False)
    return load_tokenizer(folder)


class Bench:
    """Rows on their way through ingest, without the rest of prepare."""

    def __init__(self, root: Path, tokenizer: Any) -> None:
        self.folder, self.tokenizer = root, tokenizer
        report = Report(Stage.PREPARE, 1, bar=False)
        self.context = Context(WorkFolder(root), root, root, 1, report)

    def prepare(
        self, *tables: list[Any], packs: Any = NOBODY_PACKS, max_length: int = 64, **fields: Any
    ) -> PreparedData:
        """Prepare tables of rows as the datasets d0, d1, ...; `datasets`: their settings."""
        settings = fields.pop("datasets", [{} for _ in tables])
        fetched = {}
        for index, rows in enumerate(tables):
            fetched[f"dataset-{index}"] = make_jsonl(self.folder / f"d{index}.jsonl", rows)
        others = (fields.get("evaluation") or {}).get("datasets", ())
        for index, each in enumerate(others):
            fetched[f"evaluation-{index}"] = self.folder / each["volume"]["path"]
        datasets = [
            {**make_config(rows=f"d{i}.jsonl")["datasets"][0], "name": f"d{i}", **s} for i, s in enumerate(settings)
        ]
        config = JobConfig.model_validate({**make_config(), "datasets": datasets, **fields})
        opened = ingest.open_datasets(config, fetched)
        ingest.first_rows(opened, config)
        renderer = Renderer(self.tokenizer)
        return ingest.prepare_data(config, opened, renderer, max_length, packs, self.folder, self.context)

    def read(self, split: str = "train") -> pa.Table:
        return tokenized.read_rows(self.folder, split)

    def texts(self, split: str = "train") -> list[str]:
        return [self.tokenizer.decode(row) for row in self.read(split)["input_ids"].to_pylist()]


@pytest.fixture
def bench(tmp_path: Path, tokenizer: Any) -> Bench:
    return Bench(tmp_path, tokenizer)


WHOLE: dict[str, Any] = {"evaluation": {"percent": 0}}
LONG = {"instruction": "q", "output": "word " * 300}


def test_rows_know_their_dataset_and_are_told_of(bench: Bench) -> None:
    prepared = bench.prepare(make_instructions(30), [*make_instructions(60)[30:], LONG], max_length=100)
    first, second = prepared.facts.datasets
    assert (first.name, first.train_rows + first.eval_rows, first.dropped_rows) == ("d0", 30, 0)
    assert (second.name, second.train_rows + second.eval_rows, second.dropped_rows) == ("d1", 30, 1)
    assert first.train_tokens + second.train_tokens == prepared.facts.train_tokens
    of = bench.read()["dataset"].to_numpy()
    assert (of == 0).sum() == first.train_rows
    facts = prepared.facts
    assert facts.length_p50 <= facts.length_p95 <= facts.length_p99 <= facts.length_max <= 100


@pytest.mark.parametrize(
    ("long_rows", "rows", "dropped", "truncated", "said"),
    [
        pytest.param(None, 10, 1, 0, "1 rows longer than training.maxLength were dropped", id="answers are dropped"),
        pytest.param("Drop", 10, 1, 0, "were dropped", id="Drop"),
        pytest.param("Truncate", 11, 0, 1, "1 rows were cut at training.maxLength: they lost their end", id="Truncate"),
        pytest.param("Split", 14, 0, 0, "", id="Split"),
    ],
)
def test_what_becomes_of_a_long_row(
    bench: Bench, long_rows: str | None, rows: int, dropped: int, truncated: int, said: str
) -> None:
    training = {"longRows": long_rows} if long_rows else {}
    prepared = bench.prepare([LONG, *make_instructions(10)], max_length=400, training=training, **WHOLE)
    facts = prepared.facts
    assert facts.length_max <= 400
    assert (facts.train_rows, facts.dropped_rows, facts.truncated_rows) == (rows, dropped, truncated)
    assert said in " ".join(prepared.remarks)


def test_a_row_that_was_cut_has_no_end_token(bench: Bench) -> None:
    bench.prepare([LONG], max_length=40, training={"longRows": "Truncate"}, **WHOLE)
    assert len(bench.read()["input_ids"][0]) == 40
    assert EOS not in bench.texts()[0]


def test_a_row_whose_answer_is_cut_off_whole_is_dropped(bench: Bench) -> None:
    asked = {"instruction": "q " * 100, "output": "a"}
    prepared = bench.prepare([asked, *make_instructions(3)], max_length=60, training={"longRows": "Truncate"}, **WHOLE)
    assert (prepared.facts.train_rows, prepared.facts.dropped_rows, prepared.facts.truncated_rows) == (3, 1, 0)


def test_a_long_text_is_split_and_its_pieces_stay_together(bench: Bench) -> None:
    texts = [{"text": f"{chr(97 + n)} " * 100} for n in range(20)]
    prepared = bench.prepare(texts, max_length=50, evaluation={"percent": 30})
    assert prepared.facts.eval_rows > 1
    letters = [{text.split()[0] for text in bench.texts(split)} for split in ("train", "eval")]
    assert letters[0] & letters[1] <= {EOS}
    assert not any(mask[0] for mask in bench.read()["loss_mask"].to_pylist())


def test_nothing_held_out_is_told_with_its_reason(bench: Bench) -> None:
    prepared = bench.prepare(make_instructions(3) * 10, evaluation={"percent": 5})
    assert prepared.facts.eval_rows == 0
    assert "no group is small enough to be held out. Raise evaluation.percent" in " ".join(prepared.remarks)


def test_max_rows_are_chosen_by_the_seed(bench: Bench) -> None:
    chosen = []
    for seed in (1, 1, 2):
        bench.prepare(make_instructions(50), datasets=[{"maxRows": 9}], training={"seed": seed}, **WHOLE)
        chosen.append(sorted(bench.texts()))
    assert len(chosen[0]) == 9
    assert chosen[0] == chosen[1] != chosen[2]


def test_pairs_keep_both_answers_and_a_prompts_pairs_stay_together(bench: Bench) -> None:
    again = [{**pair, "rejected": "Who knows."} for pair in PAIRS]
    prepared = bench.prepare(PAIRS + again, objective={"type": "DPO"}, evaluation={"percent": 25})
    assert prepared.facts.train_rows + prepared.facts.eval_rows == 80
    asked = []
    for split in ("train", "eval"):
        pairs = read_pair_rows(bench.folder, split)
        for pair in pairs:
            prompt = bench.tokenizer.decode(pair.prompt)
            assert bench.tokenizer.decode(pair.rejected.input_ids).startswith(prompt)
            assert bench.tokenizer.decode(pair.rejected.labels[pair.rejected.labels >= 0]).endswith("." + EOS)  # type: ignore[index,operator]
        asked.append({bench.tokenizer.decode(pair.prompt) for pair in pairs})
    assert not asked[0] & asked[1]


def test_long_pairs_are_dropped_or_cut_on_both_sides(bench: Bench) -> None:
    long = {"prompt": "q ", "chosen": "a", "rejected": "b " * 90}
    prepared = bench.prepare([long, *PAIRS], objective={"type": "DPO"}, **WHOLE)
    assert (prepared.facts.train_rows, prepared.facts.dropped_rows) == (40, 1)
    training = {"longRows": "Truncate"}
    prepared = bench.prepare([long, *PAIRS], objective={"type": "DPO"}, training=training, **WHOLE)
    assert (prepared.facts.train_rows, prepared.facts.truncated_rows, prepared.facts.length_max) == (41, 1, 64)


# Packing


def test_packed_sequences_hold_every_row_once(bench: Bench) -> None:
    prepared = bench.prepare(make_instructions(200), packs=EVERYBODY_PACKS, max_length=200)
    packed = bench.read()
    assert prepared.facts.packed_rows == len(packed) < prepared.facts.train_rows
    bench.prepare(make_instructions(200), packs=NOBODY_PACKS, max_length=200)
    alone = [(tuple(row["input_ids"]), tuple(row["loss_mask"])) for row in bench.read().to_pylist()]
    assert sorted(rows_of(packed)) == sorted(alone)
    assert all(len(ids) <= 200 for ids in packed["input_ids"].to_pylist())


def rows_of(table: pa.Table) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    found = []
    for sequence in table.to_pylist():
        start = 0
        for length in sequence["lengths"]:
            part = slice(start, start := start + length)
            found.append((tuple(sequence["input_ids"][part]), tuple(sequence["loss_mask"][part])))
        assert start == len(sequence["input_ids"])
    return found


def test_evaluation_is_never_packed(bench: Bench) -> None:
    prepared = bench.prepare(make_instructions(100), packs=EVERYBODY_PACKS, max_length=200, evaluation={"percent": 30})
    assert "lengths" not in bench.read("eval").column_names
    assert len(bench.read("eval")) == prepared.facts.eval_rows == 30


def test_weighted_datasets_share_no_sequence(bench: Bench) -> None:
    weights = [{"weight": 1}, {"weight": 3}]
    tables = make_instructions(40), make_instructions(90)[40:]
    bench.prepare(*tables, datasets=weights, packs=EVERYBODY_PACKS, max_length=300, **WHOLE)
    assert len(bench.read()) < 90
    for sequence, dataset in zip(bench.texts(), bench.read()["dataset"].to_pylist(), strict=True):
        numbers = {int(number) for number in re.findall(r"What is (\d+) plus", sequence)}
        assert all((number >= 40) == bool(dataset) for number in numbers)


def test_windows_are_packed_one_after_the_other(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_trainer.data.pack.WINDOW_TOKENS", 1000)
    bench.prepare(make_instructions(1500), packs=EVERYBODY_PACKS, max_length=200, **WHOLE)
    found = rows_of(bench.read())
    assert len(set(found)) == len(found) == 1500


def test_weights_are_drawn_from_what_was_prepared(bench: Bench) -> None:
    weights = [{"weight": 1}, {"weight": 1}]
    bench.prepare(make_instructions(90), make_instructions(100)[90:], datasets=weights, **WHOLE)
    rows = bench.read()
    order = list(build_order(rows, replace_settings(SETTINGS, dataset_weights=(0.5, 0.5))))
    assert np.bincount(rows["dataset"].to_numpy()[order]).tolist() == [50, 50]


# What is told


def test_the_preview_shows_rows_of_a_sequence_apart(bench: Bench) -> None:
    bench.prepare(make_instructions(50), packs=EVERYBODY_PACKS, max_length=200, **WHOLE)
    records = preview(bench)
    assert len(records) == 5
    assert [record["sequence"] for record in records[:2]] == [0, 0]
    for record in records:
        assert record["text"].count("### Instruction") == 1
        assert record["learned"].startswith("It is")
        assert len(record["inputIds"]) == len(record["lossMask"]) == record["tokens"]


def test_the_preview_shows_both_answers(bench: Bench) -> None:
    bench.prepare(PAIRS, objective={"type": "DPO"}, **WHOLE)
    record = preview(bench)[0]
    assert record["learned"] in {f"It is.{EOS}", f"No.{EOS}"}
    assert record["rejected"]["learned"] == f"Maybe so.{EOS}"


def preview(bench: Bench) -> list[dict[str, Any]]:
    path = bench.folder / "preview.jsonl"
    tokenized.write_preview(bench.folder, bench.tokenizer, path)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_that_spell_control_tokens_are_told_of(bench: Bench) -> None:
    rows = [{"text": f"{n} a{EOS}b"} for n in range(5)]
    assert "5 rows spell special tokens" in " ".join(bench.prepare(rows, **WHOLE).remarks)
    taken = bench.prepare(rows, datasets=[{"specialTokens": True}], **WHOLE)
    assert not taken.remarks
    assert bench.texts()[0].count(EOS) == 2


REFUSED = [
    ("a dataset of which nothing is left", [make_instructions(3), [LONG]], {},
     "dataset 'd1': no row is left of 1: 1 are longer than training.maxLength"),
    ("answers that are empty", [[{"instruction": "q", "output": " "}]], {}, "1 have no answer to learn from"),
    ("a long row that fails", [[*make_instructions(3), LONG]], {"training": {"longRows": "Fail"}},
     r"dataset 'd0', file d0.jsonl, line 4: [\d,]+ tokens, training.maxLength is 64 .*Raise maxLength"),
    ("pairs for SFT", [PAIRS], {}, "line 1: the row is Preference, but objective.type is SFT. Set objective.type"),
    ("texts for DPO", [[{"text": "t"}]], {"objective": {"type": "DPO"}}, "has no two answers to compare. Give prompt"),
    ("special tokens of rows that are no Text", [make_instructions(3)], {"datasets": [{"specialTokens": True}]},
     "dataset 'd0': specialTokens is for format Text, the rows are Instruction. Drop it."),
    ("pairs to be split", [PAIRS], {"objective": {"type": "DPO"}, "training": {"longRows": "Split"}},
     "longRows Split is for texts"),
]  # fmt: skip


@pytest.mark.parametrize(("tables", "fields", "words"), [pytest.param(*case[1:], id=case[0]) for case in REFUSED])
def test_rows_that_cannot_be_used_are_refused(
    bench: Bench, tables: list[list[Any]], fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(TrainerError, match=words):
        bench.prepare(*tables, **fields)


# Memory


def test_rows_in_memory_cost_about_their_bytes(tmp_path: Path) -> None:
    rows, length = 3000, 1000
    ids = pa.array(np.arange(rows * length, dtype=np.int32) % 50_000)
    mask = pa.array(np.arange(rows * length) % 2 == 0)
    offsets = pa.array(np.arange(0, rows * length + 1, length, dtype=np.int32))
    columns = [pa.ListArray.from_arrays(offsets, values) for values in (ids, mask)]
    table = pa.Table.from_arrays([*columns, pa.array(np.zeros(rows, dtype=np.int8))], schema=tokenized.build_schema())
    parquet.write_table(table, tmp_path / "train.parquet", row_group_size=tokenized.GROUP_ROWS)
    before = pa.total_allocated_bytes()
    read = read_token_rows(tmp_path, "train")
    assert sum(len(row.input_ids) for row in read) == rows * length
    assert pa.total_allocated_bytes() - before < 1.2 * rows * length * (4 + 1 / 8)


def test_a_row_is_read_as_it_was_written(bench: Bench) -> None:
    bench.prepare(make_instructions(5), **WHOLE)
    rows = read_token_rows(bench.folder, "train")
    assert len(rows) == len(rows[:]) == 5
    assert [list(row.input_ids) for row in rows] == bench.read()["input_ids"].to_pylist()
    counted = [[token >= 0 for token in row.labels] for row in rows]
    assert counted == bench.read()["loss_mask"].to_pylist()
    with pytest.raises(IndexError):
        rows[5]
    with pytest.raises(InvalidConfig):
        bench.prepare(PAIRS, objective={"type": "DPO"}, training={"longRows": "Split"})
