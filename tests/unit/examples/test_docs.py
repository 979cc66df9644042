"""What the docs say of the contract is what the contract says."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_operator.api import Phase
from finetune_trainer.config import (
    FORMATS,
    TARGET_FIELDS,
    Columns,
    DatasetFormat,
    Merge,
    MergeBase,
    MethodType,
    PublishedArtifact,
    Quantize,
    QuantizeMethod,
)
from finetune_trainer.progress import ExitCode

ROOT = Path(__file__).parents[3]
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", ExitCode)
def test_every_exit_code_is_told(code: ExitCode) -> None:
    assert f"| {code.value} | {code.reason} | {code.meaning} |" in PAGE


def test_no_exit_code_is_told_that_is_none() -> None:
    table = PAGE.partition("| exit code |")[2]
    assert table.count("\n| ") == len(ExitCode)


@pytest.mark.parametrize("method", FORMATS)
def test_every_method_is_told_with_the_formats_it_takes(method: MethodType) -> None:
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {method} ")]
    assert all(held in line for held in FORMATS[method])


def test_every_format_of_rows_is_told() -> None:
    for each in DatasetFormat:
        assert each in PAGE


def test_every_column_that_can_be_renamed_is_told() -> None:
    for column in Columns.model_fields:
        assert f"`{column}`" in PAGE


def test_every_gate_is_told() -> None:
    fields = [*Merge.model_fields.values(), *Quantize.model_fields.values()]
    gates = [str(field.alias) for field in fields if (field.description or "").startswith("Gate")]
    assert len(gates) > 2
    assert [gate for gate in gates if f".{gate}`" not in RESULTS] == []


@pytest.mark.parametrize("word", [*MergeBase, *QuantizeMethod, *PublishedArtifact, *TARGET_FIELDS])
def test_every_choice_of_what_comes_out_is_told(word: str) -> None:
    assert word in RESULTS


def test_every_phase_is_told() -> None:
    assert f"Phases: {', '.join(Phase)}." in (ROOT / "README.md").read_text(encoding="utf-8")
