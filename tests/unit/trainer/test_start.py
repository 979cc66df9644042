"""How long an attempt took to its first step: the reckoning, and where it is told."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from finetune_trainer.fast.build import CACHE_VARIABLE, MANAGER_VARIABLE
from finetune_trainer.launch import Node
from finetune_trainer.progress import Stage
from finetune_trainer.reporting.record import JobReport
from finetune_trainer.runtime.context import Context
from finetune_trainer.runtime.report import Mark, Report
from finetune_trainer.runtime.work import WorkFolder
from finetune_trainer.training.start import BEGAN_VARIABLE, FIRST_STEP, process_began, reckon, tell_start

if TYPE_CHECKING:
    from tests.unit.trainer.conftest import Desk

ROOT = Path(__file__).parents[3]
TICK_SECONDS = 0.01
"""The kernel counts starts of processes in these."""
MARKS = (Mark("starting", 11.0), Mark("importing", 12.0), Mark("loading", 20.0), Mark("training", 23.5))


def parts(*marks: Mark, began: float = 10.0, ended: float = 24.0) -> list[tuple[str, float]]:
    found = reckon(1, began, marks, ended)
    assert found.seconds == pytest.approx(sum(part.seconds for part in found.parts)) == ended - began
    return [(part.activity, part.seconds) for part in found.parts]


def test_each_activity_lasts_until_the_next_one_and_the_first_since_the_process_began() -> None:
    assert parts(*MARKS) == [("starting", 2.0), ("importing", 8.0), ("loading", 3.5), (FIRST_STEP, 0.5)]


def test_what_was_gone_about_twice_is_one_part() -> None:
    marks = (*MARKS[:3], Mark("importing", 21.0), MARKS[3])
    assert parts(*marks) == [("starting", 2.0), ("importing", 10.5), ("loading", 1.0), (FIRST_STEP, 0.5)]


def test_without_an_activity_all_of_it_is_the_first_step() -> None:
    assert parts(MARKS[0]) == [(FIRST_STEP, 14.0)]


def test_the_interpreters_own_start_and_its_imports_count() -> None:
    code = "import time; time.sleep(0.5); from finetune_trainer.training import start; print(start.process_began())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "trainer")}
    before = time.monotonic()
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    began, ended = float(found.stdout), time.monotonic()
    assert before - TICK_SECONDS <= began < ended - 0.5


def test_a_rank_began_with_the_parent_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    began = process_began()
    monkeypatch.setenv(BEGAN_VARIABLE, Node(0, 1, 2, "localhost", 29500).environment(1)[BEGAN_VARIABLE])
    monkeypatch.setattr("finetune_trainer.training.start.time.monotonic", lambda: 1e9)
    assert process_began() == pytest.approx(began, abs=0.01)


def test_an_account_that_cannot_be_written_ends_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "report").touch()
    tell_start(Context(WorkFolder(tmp_path), tmp_path, tmp_path, 1, Report(Stage.TRAIN, 1, bar=False)))
    assert "report/start.json could not be written" in caplog.text


def test_the_log_and_the_report_tell_the_start(
    desk: Desk, config: dict[str, Any], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (CACHE_VARIABLE, MANAGER_VARIABLE):
        monkeypatch.setenv(name, "")  # to be put back as it was
        monkeypatch.delenv(name)
    config["training"] = {"globalBatchSize": 8, "maxSteps": 2}
    assert desk.run("prepare", config)[0] == 0
    assert desk.run("train", config)[0] == 0
    told = [line for line in capfd.readouterr().err.splitlines() if "after the start of the process" in line]
    assert len(told) == 1
    assert os.environ[CACHE_VARIABLE] == str(desk.work / ".kernels")
    report = JobReport.model_validate_json((desk.work / "report" / "report.json").read_bytes())
    assert report.start is not None
    assert report.start.attempt == 1
    names = [part.activity for part in report.start.parts]
    assert names[:4] == ["starting", "verifying model/", "verifying data/", "importing libraries"]
    assert {"loading the base model", "setting up the trainer"} < set(names)
    assert names[-1] == FIRST_STEP
    assert all(f"{part.activity} {part.seconds:.1f}" in told[0] for part in report.start.parts)
    page = (desk.work / "report" / "index.html").read_text()
    assert "Start of the training" in page
    assert "loading the base model" in page
