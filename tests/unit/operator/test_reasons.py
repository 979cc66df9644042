"""The one table of reasons: nothing is left out of it, and the docs print it."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_operator.reasons import TABLE, Reason, Retry, render
from finetune_trainer.progress import Reason as Said

PAGE = (Path(__file__).parents[3] / "docs" / "failures.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("reason", [*Reason, *Said])
def test_every_reason_has_a_row(reason: Reason | Said) -> None:
    assert reason.value == "Completed" or reason in TABLE


@pytest.mark.parametrize("reason", TABLE)
def test_every_row_says_what_it_means_and_what_to_do(reason: str) -> None:
    row = TABLE[reason]
    assert row.means.endswith(".")
    assert row.remedy.endswith(".")


def test_what_is_nobodys_fault_counts_against_nothing() -> None:
    free = {name for name, row in TABLE.items() if row.retry is Retry.FREE}
    assert {"Preempted", "NodeLost", "Evicted", "Interrupted"} <= free


def test_the_docs_print_the_table() -> None:
    assert render() in PAGE, "python -m finetune_operator.reasons prints what belongs into docs/failures.md"
