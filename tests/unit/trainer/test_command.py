"""The command's own behaviour: help, last words, the report, what it imports."""

import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer import __main__ as command
from finetune_trainer.progress import (
    LAST_WORD_LIMIT_BYTES,
    MESSAGE_LIMIT_CHARACTERS,
    DataFacts,
    ExitCode,
    LastWord,
    Progress,
    Reason,
    Stage,
)
from finetune_trainer.runtime.farewell import fitted, shortened
from finetune_trainer.runtime.report import Report, build_server, describe, reporting
from tests.unit.trainer.conftest import Desk


def test_help_helps(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["quantize", "--help"])
    said = capsys.readouterr().out
    assert all(option in said for option in ("--config", "--work", "--sources", "--name", "--termination-log"))


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, contextlib, finetune_trainer.__main__ as m\n"
        "with contextlib.suppress(SystemExit): m.main(['--help'])\n"
        "print({'torch', 'transformers', 'trl', 'pyarrow', 'tqdm', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


def test_prepare_imports_torch_only_when_it_is_needed_and_trl_never() -> None:
    code = "import sys, finetune_trainer.prepare; print({'torch', 'transformers', 'trl', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_bug_is_told_with_type_text_and_place(
    desk: Desk, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def surprise(*_: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("finetune_trainer.prepare.fetch_models", surprise)
    code, word = desk.run("prepare", config)
    assert code == ExitCode.UNKNOWN
    assert word is not None
    assert word.reason is Reason.UNKNOWN
    assert "KeyError: 'surprise'" in word.message
    assert "test_command.py" in word.message
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        pytest.param(None, ExitCode.NOT_FOUND, "is not a file. Give the job's JSON file", id="missing"),
        pytest.param("{", ExitCode.INVALID_CONFIG, "is not JSON", id="no JSON"),
        pytest.param("[]", ExitCode.INVALID_CONFIG, "must be a JSON object", id="a list"),
        pytest.param(
            '{"training": {"maxSteps": 1, "maxSteps": 2}}',
            ExitCode.INVALID_CONFIG,
            "The config names 'maxSteps' twice in one object. Leave one of the two out.",
            id="a field twice",
        ),
        pytest.param(
            '{"training": {"maxSteps": true, "learningRate": false}}',
            ExitCode.INVALID_CONFIG,
            "training.learningRate cannot be false: input should be a number. training.maxSteps cannot be true",
            id="truth values for numbers",
        ),
        pytest.param("{}", ExitCode.INVALID_CONFIG, "model is needed and not set. datasets is needed", id="empty"),
        pytest.param(
            '{"merge": {"dtype": "\\ud800"}}',
            ExitCode.INVALID_CONFIG,
            'cannot be "\\ud800"',
            id="half a surrogate pair",
        ),
    ],
)
def test_a_config_that_is_none_is_told(
    tmp_path: Path, content: str | None, code: ExitCode, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "job.json").write_text(content)
    assert command.main(["prepare", "--config", str(tmp_path / "job.json"), "--work", str(tmp_path / "w")]) == code
    assert words in capsys.readouterr().err


def test_a_work_folder_that_is_a_file_is_told(
    desk: Desk, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    desk.work.write_text("a file")
    code, word = desk.run("prepare", config)
    assert code == ExitCode.NOT_FOUND
    assert word is not None
    assert f"--work {desk.work} is not a folder" in word.message
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("work", ["/sys", "/sys/finetune"], ids=["that is there", "that is to be made"])
def test_a_work_folder_that_nobody_may_write_to_is_told_in_a_sentence(
    tmp_path: Path, config: dict[str, Any], work: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(config))
    assert command.main(["prepare", "--config", str(path), "--work", work]) == ExitCode.ACCESS_DENIED
    told = capsys.readouterr().err
    assert f"No permission for {work}" in told
    assert "Traceback" not in told


def test_later_stages_say_what_is_missing(desk: Desk, config: dict[str, Any]) -> None:
    code, word = desk.run("train", config)
    assert code == ExitCode.NOT_FOUND
    assert word is not None
    assert "run `finetune-trainer prepare`" in word.message


def test_a_stage_verifies_what_it_reads(desk: Desk, config: dict[str, Any]) -> None:
    desk.run("prepare", config)
    path = desk.work / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    code, word = desk.run("train", config)
    assert code == ExitCode.VERIFICATION_FAILED
    assert word is not None
    assert "model.safetensors is not what was written" in word.message


@pytest.mark.parametrize("message", ["x" * 900, "\U0001f600" * 1024], ids=["short", "four bytes a character"])
def test_a_last_word_fits_its_limit(desk: Desk, config: dict[str, Any], message: str) -> None:
    _, word = desk.run("prepare", config)
    assert word is not None
    assert word.resolved is not None
    assert word.resolved.lora is not None
    many = tuple(f"model.layers.{index}.self_attn.q_proj" for index in range(64))
    lora = word.resolved.lora.model_copy(update={"target_modules": many})
    large = word.model_copy(update={"message": message, "resolved": word.resolved.model_copy(update={"lora": lora})})
    data = fitted(large)
    assert len(data) <= LAST_WORD_LIMIT_BYTES
    kept = LastWord.model_validate_json(data)
    assert (kept.succeeded, kept.manifest_digest) == (True, word.manifest_digest)
    assert isinstance(kept.data, DataFacts)


def test_what_is_listed_gives_way_before_the_settings(desk: Desk, config: dict[str, Any]) -> None:
    _, word = desk.run("prepare", config)
    assert word is not None
    assert word.data is not None
    many = tuple(word.data.datasets[0].model_copy(update={"name": f"dataset-{index}"}) for index in range(40))
    large = word.model_copy(update={"data": word.data.model_copy(update={"datasets": many})})
    assert len(large.to_json().encode()) > LAST_WORD_LIMIT_BYTES
    kept = LastWord.model_validate_json(fitted(large))
    assert kept.resolved == word.resolved
    assert kept.data is not None
    assert kept.data.train_rows == word.data.train_rows


def test_a_long_message_keeps_both_ends() -> None:
    message = shortened("What happened. " + "x" * 5000 + " The way out.")
    assert len(message) == MESSAGE_LIMIT_CHARACTERS
    assert message.startswith("What happened.")
    assert message.endswith("The way out.")


def get(server: Any, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.server_address[1]}{path}", timeout=60) as answer:
        return str(answer.read().decode())


def test_the_report_is_served() -> None:
    report = Report(Stage.TRAIN, 2, bar=False)
    server = build_server(report, 0)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        report.begin("training", 100)
        report.update(done=30, loss=1.25, epoch=0.3)
        served = Progress.model_validate_json(get(server, "/progress"))
        assert served.model_copy(update={"still_seconds": report.current.still_seconds}) == report.current
        assert json.loads(get(server, "/progress"))["done"] == 30
        metrics = get(server, "/metrics")
        assert 'finetune_loss{stage="train",unit="steps"} 1.25' in metrics
        assert "finetune_eval_loss" not in metrics
        assert get(server, "/healthz") == "ok\n"
        with pytest.raises(urllib.error.HTTPError):
            get(server, "/secrets")
    finally:
        server.shutdown()
        server.server_close()


def test_a_log_gets_a_line_each_half_minute(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("finetune_trainer.runtime.report.time.monotonic", lambda: now[0])
    report = Report(Stage.PREPARE, 1, bar=False)
    with caplog.at_level("INFO"):
        report.begin("copying", 100, "bytes")
        for second in range(1, 61):
            now[0] = float(second)
            report.update(done=second)
    assert [record.message for record in caplog.records] == [
        "copying (100 bytes)",
        "copying, 30/100 bytes (30%), 30 s so far, about 70 s left",
        "copying, 60/100 bytes (60%), 60 s so far, about 40 s left",
    ]


def test_the_time_left_does_not_grow_while_nothing_more_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are polled at each of their tokens."""
    now = [0.0]
    monkeypatch.setattr("finetune_trainer.runtime.report.time.monotonic", lambda: now[0])
    report, told = Report(Stage.TRAIN, 1, bar=False), []
    report.begin("writing answers before training", 4, "answers")
    for done, second in ((0, 5.0), (1, 10.0), (1, 13.0), (1, 19.0), (2, 20.0)):
        now[0] = second
        report.update(done=done)
        told.append(report.current.eta_seconds)
    assert told == [None, 30.0, 30.0, 30.0, 20.0]


def test_it_tells_for_how_long_nothing_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("finetune_trainer.runtime.report.time.monotonic", lambda: now[0])
    report, told = Report(Stage.TRAIN, 1, bar=False), []
    for move in (report.beat, partial(report.update, loss=1.0), partial(report.begin, "saving")):
        now[0] += 5
        told.append(report.current.still_seconds)
        move()
        told.append(report.current.still_seconds)
    assert told == [5.0, 0.0] * 3


LONG = {
    "prepare": ("copying", "proving model/"),
    "train": (
        "verifying model/",
        "loading the base model",
        "measuring the base model",
        "writing answers before",
        "training",
        "saving what was trained",
    ),
    "merge": ("loading the adapter", "merging the adapter", "loading the merged model", "comparing with the adapter"),
}
"""What takes long with a large model."""


def test_whatever_takes_long_with_a_large_model_is_seen_to_move(
    desk: Desk, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config["training"] = {"globalBatchSize": 8, "maxSteps": 2}
    begin, seen = Report.begin, list[tuple[str, Report, int]]()

    def noted(report: Report, activity: str, *rest: Any, **named: Any) -> None:
        begin(report, activity, *rest, **named)
        seen.append((activity, report, report.current.pulse))

    monkeypatch.setattr(Report, "begin", noted)
    for stage, activities in LONG.items():
        seen.clear()
        assert desk.run(stage, config)[0] == 0
        begin(seen[-1][1], "ended")
        ends = [*(pulse for _, _, pulse in seen[1:]), seen[-1][1].current.pulse]
        beats = {activity: end - pulse - 1 for (activity, _, pulse), end in zip(seen, ends, strict=True)}
        for activity in activities:
            moved = [count for name, count in beats.items() if name.startswith(activity)]
            assert moved and min(moved) > 1, (stage, activity, beats)  # noqa: PT018 - one thing


def test_a_folder_that_grows_is_seen_to_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_trainer.runtime.report.GROWTH_EVERY_SECONDS", 0.01)
    report, moved = Report(Stage.TRAIN, 1, bar=False), threading.Event()
    monkeypatch.setattr(report, "beat", moved.set)
    with report.growing(tmp_path):
        (tmp_path / "part").mkdir()
        (tmp_path / "part" / "weights").write_bytes(b"some")
        assert moved.wait(60)


def test_a_new_activity_keeps_what_was_measured() -> None:
    report = Report(Stage.TRAIN, 1, bar=False)
    report.update(done=5, total=5, loss=2.0)
    with reporting(report, None):
        report.begin("saving", 3, "files")
        report.advance()
    assert (report.current.done, report.current.total, report.current.loss) == (1, 3, 2.0)
    assert describe(report.current, 4.2) == "saving, 1/3 files (33%), loss 2.0000, 4 s so far"
