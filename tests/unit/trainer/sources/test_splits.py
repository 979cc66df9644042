"""Which files of a dataset's repository are a split."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_trainer.config import HuggingFaceDataset
from finetune_trainer.runtime.errors import InvalidConfig, InvalidDataset, NotFound, TrainerError
from finetune_trainer.sources.splits import split_names

CARD = """---
license: apache-2.0
configs:
- config_name: en
  data_files:
  - split: train
    path: "en/train-*.parquet"
  - split: test
    path: ["en/test.parquet"]
- config_name: fr
  data_dir: fr
- config_name: de
  data_files: de/*.jsonl
---
# Rows
"""
FILES = [
    "README.md",
    "en/train-0.parquet",
    "en/train-1.parquet",
    "en/test.parquet",
    "fr/train.csv",
    "fr/test.csv",
    "de/a.jsonl",
    "de/.hidden.jsonl",
    "de/deep/b.jsonl",
]


def pick(names: list[str], card: str = "", repo: str = "owner/rows", **fields: Any) -> list[str]:
    source = HuggingFaceDataset(repo=repo, **fields)
    return split_names(source, names, card.encode(), "datasets[0]: 'owner/rows'", "datasets[0]")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({"config": "en"}, ["en/train-0.parquet", "en/train-1.parquet"], id="a split of patterns"),
        pytest.param({"config": "en", "split": "test"}, ["en/test.parquet"], id="another split"),
        pytest.param({"config": "fr"}, ["fr/train.csv"], id="a folder, by the usual names"),
        pytest.param({"config": "de"}, ["de/a.jsonl"], id="one pattern is the train split, hidden files are not meant"),
        pytest.param({"files": ("de/**",)}, ["de/a.jsonl", "de/deep/b.jsonl"], id="files in place of both"),
        pytest.param({"files": ("de/.hidden.jsonl",)}, ["de/.hidden.jsonl"], id="a hidden file by its name"),
    ],
)
def test_the_card_says_what_a_configuration_is(fields: dict[str, Any], expected: list[str]) -> None:
    assert pick(FILES, CARD, **fields) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        pytest.param(["README.md", "databricks-dolly-15k.jsonl"], ["databricks-dolly-15k.jsonl"], id="one file"),
        pytest.param(["a_train.jsonl", "a_eval.jsonl"], ["a_train.jsonl"], id="the split in the file's name"),
        pytest.param(
            ["train/a.csv", "train/b.csv", "test/a.csv"], ["train/a.csv", "train/b.csv"], id="in the folder's"
        ),
        pytest.param(
            ["data/train-00000-of-00002-ab.parquet", "data/train-00001-of-00002-cd.parquet", "data/x.parquet"],
            ["data/train-00000-of-00002-ab.parquet", "data/train-00001-of-00002-cd.parquet"],
            id="as the hub names shards",
        ),
        pytest.param(["a.parquet", "b.parquet", "dataset_infos.json"], ["a.parquet", "b.parquet"], id="all of them"),
        pytest.param(["rows.py", "train.jsonl"], ["train.jsonl"], id="rows beside a loading script"),
    ],
)
def test_without_a_card_the_usual_names_say_it(names: list[str], expected: list[str]) -> None:
    assert pick(names) == expected


def test_the_hubs_own_copy_has_a_folder_a_configuration() -> None:
    names = ["en/train/0000.parquet", "en/test/0000.parquet", "fr/train/0000.parquet"]
    assert pick(names, revision="refs/convert/parquet", config="en") == ["en/train/0000.parquet"]
    with pytest.raises(InvalidConfig, match="several configurations \\(en, fr\\)"):
        pick(names, revision="refs/convert/parquet")


def test_a_configuration_marked_as_default_is_taken() -> None:
    marked = "- config_name: b\n  data_files: b.csv\n  default: true\n"
    card = f"---\nconfigs:\n- config_name: a\n  data_files: a.csv\n{marked}---"
    assert pick(["a.csv", "b.csv"], card) == ["b.csv"]


@pytest.mark.parametrize(
    ("names", "card", "fields", "error", "words"),
    [
        pytest.param(FILES, CARD, {}, InvalidConfig, "Set datasets[0].huggingFace.config to one of them", id="which"),
        pytest.param(
            FILES, CARD, {"config": "it"}, InvalidConfig, "no configuration 'it' (has de, en, fr)", id="config"
        ),
        pytest.param(FILES, CARD, {"config": "de", "split": "test"}, InvalidConfig, "(has train)", id="split"),
        pytest.param(["a.csv"], "", {"config": "en"}, InvalidConfig, "has no folder 'en' (has a.csv)", id="no configs"),
        pytest.param(["test.csv"], "", {}, InvalidConfig, "no split 'train' (has test)", id="only a test split"),
        pytest.param(FILES, CARD, {"files": ("*.csv",)}, NotFound, "no file '*.csv'", id="files"),
        pytest.param(["rows.py"], "", {}, InvalidDataset, "only a loading script (rows.py)", id="a script alone"),
        pytest.param(["README.md", "a.png"], "", {}, InvalidConfig, "no split 'train' (has none)", id="no rows at all"),
        pytest.param(
            ["train.arrow"],
            "---\nconfigs:\n- data_files: train.arrow\n---",
            {},
            InvalidDataset,
            "split 'train' has no .jsonl",
            id="files of another kind",
        ),
        pytest.param(["a.csv"], "---\nconfigs: [{\n---", {}, InvalidDataset, "is not YAML", id="a broken card"),
        pytest.param(
            ["a.csv"],
            "---\nconfigs:\n- data_files: [{split: x}]\n---",
            {},
            InvalidDataset,
            "cannot be read",
            id="odd card",
        ),
    ],
)
def test_what_cannot_be_picked_is_told_with_what_there_is(
    names: list[str], card: str, fields: dict[str, Any], error: type[TrainerError], words: str
) -> None:
    with pytest.raises(error) as caught:
        pick(names, card, **fields)
    assert words in str(caught.value)
