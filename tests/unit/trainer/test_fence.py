"""A trainer of an older attempt commits nothing once a newer one has started."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import shutil
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from finetune_trainer.progress import ExitCode, Stage, TrainFacts
from finetune_trainer.runtime import fence, manifest
from finetune_trainer.runtime.errors import Interrupted
from finetune_trainer.runtime.manifest import Result, Target
from finetune_trainer.runtime.report import Report
from finetune_trainer.training.checkpoint import Checkpoints
from tests.tiny import make_config, make_instructions, make_jsonl
from tests.unit.trainer.conftest import Desk

if TYPE_CHECKING:
    from pathlib import Path


def write(folder: Path) -> Result:
    (folder / "file").write_text("text")
    return Result(message="made")


FACTS = TrainFacts(steps=1, epochs=1, trainable_parameters=1, total_parameters=1)


def fill(folder: Path) -> None:
    write(folder)


def test_an_older_attempt_publishes_no_artifact(tmp_path: Path) -> None:
    target = Target(Stage.QUANTIZE, tmp_path / "quantized" / "one", "quantized/one", "sha256:0")
    fence.enter(tmp_path, 1)

    def overtaken(folder: Path) -> Result:
        fence.enter(tmp_path, 2)
        return write(folder)

    with pytest.raises(Interrupted, match="Attempt 2 of this job has started"):
        manifest.publish(target, 1, overtaken)
    assert not target.folder.exists()
    assert manifest.publish(target, 2, write) == manifest.read(target.folder)


def test_an_older_attempt_saves_no_checkpoint(tmp_path: Path) -> None:
    run = Target(Stage.TRAIN, tmp_path / "adapter", "adapter", "sha256:0")
    old = Checkpoints(tmp_path, run, attempt=1, keep=2)
    fence.enter(tmp_path, 1)
    old.save(1, fill, FACTS)
    fence.enter(tmp_path, 2)
    with pytest.raises(Interrupted):
        old.save(2, fill, FACTS)
    new = replace(old, attempt=2)
    assert new.newest_good() == tmp_path / "checkpoints" / "step-00000001"
    new.save(2, fill, FACTS)


def test_an_older_attempt_does_not_even_start(tmp_path: Path) -> None:
    fence.enter(tmp_path, 3)
    fence.enter(tmp_path, 3)
    with pytest.raises(Interrupted, match="--attempt 3 or higher"):
        fence.enter(tmp_path, 2)
    assert fence.live_attempt(tmp_path) == 3


# Whatever a stage is doing when it is overtaken

CONFIG = make_config(
    training={"globalBatchSize": 8, "maxSteps": 3, "learningRate": 0.01, "checkpoint": {"everySteps": 1, "keep": 1}},
    tracking={"tensorboard": True},
)


@pytest.fixture(scope="module")
def desks(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Desk]:
    """Work folders as each stage finds them, to be copied."""
    found = {}
    desk = Desk(tmp_path_factory.mktemp("desks") / "prepare")
    shutil.copytree(tiny_model, desk.models / "tiny")
    make_jsonl(desk.datasets / "rows.jsonl", make_instructions(40))
    for stage, after in (("prepare", "train"), ("train", "merge"), ("merge", None)):
        found[stage] = desk
        if after is not None:
            desk = Desk(shutil.copytree(desk.root, desk.root.with_name(after)))
            assert desk.run(stage, CONFIG)[0] == 0
    return found


@pytest.fixture
def desk_of(desks: dict[str, Desk], tmp_path: Path) -> Any:
    return lambda stage: Desk(shutil.copytree(desks[stage].root, tmp_path / stage))


@pytest.mark.parametrize(
    ("stage", "activity"),
    [
        ("prepare", "copying"),
        ("prepare", "proving model/"),
        ("prepare", "reading the model's config"),
        ("train", "loading the base model"),
        ("train", "measuring the base model"),
        ("train", "training"),
        ("train", "writing answers after"),
        ("train", "saving what was trained"),
        ("merge", "merging the adapter"),
        ("merge", "comparing with the adapter"),
    ],
)
def test_an_overtaken_stage_changes_nothing_any_more(
    desk_of: Any, monkeypatch: pytest.MonkeyPatch, stage: str, activity: str
) -> None:
    desk: Desk = desk_of(stage)
    seen: list[dict[str, str]] = []
    begin = Report.begin

    def overtaken(report: Report, now: str, *rest: Any, **named: Any) -> None:
        if now.startswith(activity) and not seen:
            fence.enter(desk.work, 2)
            seen.append(snapshot(desk.work))
        begin(report, now, *rest, **named)

    monkeypatch.setattr(Report, "begin", overtaken)
    code, word = desk.run(stage, CONFIG)
    assert seen, f"{stage} was never {activity}"
    assert code == ExitCode.INTERRUPTED, word
    assert word is not None
    assert word.message.startswith("Attempt 2 of this job has started since")
    assert snapshot(desk.work) == seen[0]


def snapshot(work: Path) -> dict[str, str]:
    """Every file that another process would take for something; not what lies aside."""
    return {
        path.relative_to(work).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in manifest.files_in(work)
        if not any(".partial-1" in part or ".running-" in part for part in path.relative_to(work).parts)
    }


def test_an_attempt_whose_files_a_newer_one_cleaned_up_says_so(
    desk_of: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    desk: Desk = desk_of("merge")

    def cleaned_up(merging: Any, base: Any, folder: Path) -> None:  # noqa: ARG001 - as write_merged
        fence.enter(desk.work, 2)
        manifest.clean(desk.work / "merged", 2)
        (folder / "model.safetensors").write_bytes(b"")

    monkeypatch.setattr("finetune_trainer.merge.write_merged", cleaned_up)
    code, word = desk.run("merge", CONFIG)
    assert code == ExitCode.INTERRUPTED
    assert word is not None
    assert word.message.startswith("Attempt 2 of this job has started since")
    assert "FileNotFoundError" in capsys.readouterr().err, "what it met stands in the log"


# One process an attempt


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fence, "PATIENCE_SECONDS", 0.0)


@pytest.mark.usefixtures("no_patience")
def test_a_second_trainer_of_the_same_attempt_says_that_there_is_one(desk_of: Any) -> None:
    desk: Desk = desk_of("merge")
    with fence.alone(desk.work / "merged", 1, threading.Event()):
        before = snapshot(desk.work)
        code, word = desk.run("merge", CONFIG)
        assert code == ExitCode.INTERRUPTED
        assert word is not None
        assert "Another process of attempt 1 is at work on" in word.message
        assert "--attempt 2" in word.message
        assert snapshot(desk.work) == before
        assert desk.run("merge", CONFIG, "--attempt", "2")[0] == ExitCode.COMPLETED
    assert not list(desk.work.glob(".*running*"))


def test_a_trainer_whose_predecessor_ends_in_time_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inside, leave = threading.Event(), threading.Event()

    def predecessor() -> None:
        with fence.alone(tmp_path / "adapter", 1, threading.Event()):
            inside.set()
            leave.wait()

    former = threading.Thread(target=predecessor)
    former.start()
    inside.wait()

    def leaves_when_waited_for(record: logging.LogRecord) -> bool:
        if "waiting for its end" in record.getMessage():
            leave.set()
        return True

    caplog.handler.addFilter(leaves_when_waited_for)
    with fence.alone(tmp_path / "adapter", 1, threading.Event()):
        assert leave.is_set()
    former.join()


def test_whoever_waits_leaves_when_asked(tmp_path: Path) -> None:
    asked = threading.Event()
    asked.set()
    with (
        fence.alone(tmp_path / "adapter", 1, threading.Event()),
        pytest.raises(Interrupted, match="Another process"),
        fence.alone(tmp_path / "adapter", 1, asked),
    ):
        pass


@pytest.mark.usefixtures("no_patience")
def test_other_attempts_and_other_artifacts_are_nobodys_business(tmp_path: Path) -> None:
    never = threading.Event()
    with (
        fence.alone(tmp_path / "quantized" / "a", 1, never),
        fence.alone(tmp_path / "quantized" / "b", 1, never),
        fence.alone(tmp_path / "quantized" / "a", 2, never),
    ):
        pass


@pytest.mark.usefixtures("no_patience")
def test_a_lock_that_its_holder_removed_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened before the former holder removed it, locked after: a third process would lock another file."""
    path, flock = tmp_path / ".adapter.running-1", fcntl.flock
    tried: list[int] = []

    def removed_meanwhile(handle: int, how: int) -> None:
        flock(handle, how)
        tried.append(handle)
        if len(tried) == 1:
            path.unlink()

    monkeypatch.setattr("fcntl.flock", removed_meanwhile)
    with fence.alone(tmp_path / "adapter", 1, threading.Event()):
        assert path.exists()
    assert len(tried) == 2


def test_without_locks_nobody_is_kept_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with fence.alone(tmp_path / "a", 1, threading.Event()), fence.alone(tmp_path / "a", 1, threading.Event()):
        assert "no lock on" in caplog.text
