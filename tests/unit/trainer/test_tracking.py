"""Who follows a training sees each step once, over all attempts, and never holds the training up."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from finetune_trainer.config import MLflow, Tracking, Wandb
from finetune_trainer.progress import Stage
from finetune_trainer.runtime import manifest
from finetune_trainer.runtime.context import Context
from finetune_trainer.runtime.errors import Interrupted, InvalidConfig
from finetune_trainer.runtime.report import Report
from finetune_trainer.runtime.work import WorkFolder
from finetune_trainer.training.tracking import LINES_NAME, Follower, LinesFile, following, run_id
from tests.unit.trainer.runs import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from finetune_trainer.training.course import Line

ROOT = Path(__file__).parents[3]
SECONDS = 120.0


def line(step: int) -> list[Line]:
    """A log line, and after every other step a measurement."""
    told: list[Line] = [{"step": step, "epoch": step / 4, "loss": 1.0 / step}]
    return told if step % 2 else [*told, {"step": step, "epoch": step / 4, "eval_loss": 2.0 / step}]


def lines(*steps: int) -> list[Line]:
    return [each for step in steps for each in line(step)]


@pytest.fixture
def context(tmp_path: Path) -> Context:
    work = WorkFolder(tmp_path / "support-bot-1a2b3c4d")
    target = manifest.Target(Stage.PREPARE, work.data, "data", "sha256:0")

    def settled(_folder: Path) -> manifest.Result:
        return manifest.Result(message="prepared", resolved=SETTINGS)

    manifest.publish(target, 1, settled)
    return Context(work, tmp_path, tmp_path / "secrets", 1, Report(Stage.TRAIN, 1, bar=False))


def follow(tracking: Tracking, context: Context, told: Sequence[Line], end: type[Exception] | None = None) -> None:
    """An attempt that tells these lines, the first of them those of the checkpoint that it goes on from."""
    figures: Line = {}
    try:
        with following(tracking, context, figures) as followers:
            followers.add(told[:2])
            for each in told[2:]:
                followers.add([each])
            if end is not None:
                raise end
            figures["final/eval_loss"] = 0.5
    except Interrupted:
        assert end is Interrupted


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine under load is slow, and what is tested is not its speed."""
    monkeypatch.setattr("finetune_trainer.training.tracking.LEAVE_SECONDS", SECONDS)
    monkeypatch.setattr("finetune_trainer.training.tracking.CLOSE_SECONDS", SECONDS)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", f"{SECONDS:.0f}")  # which one test would else set for the next


# Followers


@dataclass
class Recorder:
    """What a tracker was told; it fails while `away`."""

    away: threading.Event
    seen: list[Line]
    told: threading.Event
    ends: list[tuple[str, Line]]

    def add(self, lines: Sequence[Line]) -> None:
        if self.away.is_set():
            self.told.set()
            msg = "connection refused"
            raise ConnectionError(msg)
        self.seen.extend(lines)
        self.told.set()

    def end(self, end: str, figures: Line) -> None:
        self.ends.append((end, figures))


@pytest.fixture
def recorder() -> Recorder:
    return Recorder(threading.Event(), [], threading.Event(), [])


def test_a_tracker_that_is_away_is_told_once_and_gets_all_lines_when_it_is_back(
    recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    opened = []
    follower = Follower("a server", lambda: opened.append(1) or recorder)  # type: ignore[func-returns-value]
    recorder.away.set()
    for step in (1, 2):
        recorder.told.clear()
        follower.add([{"step": step, "loss": 1.0}])
        assert recorder.told.wait(SECONDS)
    recorder.away.clear()
    follower.add([{"step": 3, "loss": 1.0}])
    follower.close("FINISHED", {"final/eval_loss": 0.5}, SECONDS)
    assert [each["step"] for each in recorder.seen] == [1, 2, 3]
    assert len(opened) == 3
    assert recorder.ends == [("FINISHED", {"final/eval_loss": 0.5})]
    assert caplog.text.count("a server does not follow: connection refused") == 1


def test_a_tracker_that_hangs_holds_nobody_up_and_what_it_lacks_is_told(caplog: pytest.LogCaptureFixture) -> None:
    hangs, let_go = threading.Event(), threading.Event()

    def hang() -> Recorder:
        hangs.set()
        let_go.wait(SECONDS)
        raise ConnectionError

    follower = Follower("a server", hang)
    follower.add([{"step": 1, "loss": 1.0}])
    assert hangs.wait(SECONDS)
    follower.add([{"step": 2, "loss": 1.0}])
    follower.close("KILLED", {}, 0.0)
    let_go.set()
    assert "a server lacks 2 lines of 2" in caplog.text


@pytest.mark.parametrize(("error", "end"), [(None, "FINISHED"), (Interrupted, "KILLED"), (ValueError, "FAILED")])
def test_how_a_run_ended_is_told(
    context: Context, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, error: type[Exception] | None, end: str
) -> None:
    from finetune_trainer.training import tracking  # noqa: PLC0415 - its functions are replaced

    monkeypatch.setattr(tracking, "build_followers", lambda *_: [Follower("a server", lambda: recorder)])
    with pytest.raises(ValueError) if error is ValueError else threading.Lock():  # noqa: PT011 - raised here
        follow(Tracking(), context, lines(1, 2), error)
    assert recorder.ends == [(end, {"final/eval_loss": 0.5} if error is None else {})]


# The job's own file


def test_the_jobs_own_file_holds_each_line_once_over_attempts(context: Context) -> None:
    follow(Tracking(), context, lines(1, 2, 3, 4), Interrupted)
    path = context.work.report / LINES_NAME
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed while it wrote
    follow(Tracking(), context, lines(1, 2, 3, 4, 5))
    assert [json.loads(each) for each in path.read_text().splitlines()] == lines(1, 2, 3, 4, 5)
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_full_volume_ends_no_training(caplog: pytest.LogCaptureFixture) -> None:
    follower = Follower(LINES_NAME, lambda: LinesFile(Path("/dev/full")))
    follower.add(lines(1))
    follower.close("FINISHED", {}, SECONDS)
    assert "No space left on device" in caplog.text


# TensorBoard


def events(folder: Path) -> Iterator[Any]:
    """The events of TensorBoard's files: length, its checksum, data, its checksum."""
    from tensorboardX.proto.event_pb2 import Event  # noqa: PLC0415 - slow

    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_tensorboard_shows_each_step_once_over_attempts(context: Context) -> None:
    folder = context.work.report / "tensorboard"
    follow(Tracking(tensorboard=True), context, lines(1, 2, 3, 4), Interrupted)
    follow(Tracking(tensorboard=True), context, lines(1, 2, 3))
    shown = [(value.tag, event.step, value.simple_value) for event in events(folder) for value in event.summary.value]
    assert [step for tag, step, _ in shown if tag == "loss"] == [1, 2, 3]
    assert [(step, value) for tag, step, value in shown if tag == "eval_loss"] == [(2, 1.0)]
    assert [value for tag, _, value in shown if tag == "final/eval_loss"] == [0.5]
    texts = [value.tensor.string_val for event in events(folder) for value in event.summary.value]
    assert any(b"|learningRate|0.01|" in text for strings in texts for text in strings)


# W&B: no server of it can be had here


def records(folder: Path) -> Iterator[Any]:
    """The records of a W&B run on disk: LevelDB's log format, blocks of 32 KiB behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2  # noqa: PLC0415 - slow

    (path,) = folder.glob("offline-run-*/run-*.wandb")
    data, place, held = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        held += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(held)  # type: ignore[attr-defined]  # made at import
            held = b""


def shown_by_wandb(folder: Path) -> tuple[list[tuple[int, list[str]]], str, dict[str, Any]]:
    """Steps with the names of their figures, the run's id and its settings."""
    history: list[tuple[int, list[str]]] = []
    identity, settings = "", dict[str, Any]()
    for record in records(folder):
        if record.HasField("history"):
            names = [item.key or ".".join(item.nested_key) for item in record.history.item]
            history.append((record.history.step.num, sorted(name for name in names if not name.startswith("_"))))
        if record.HasField("run"):
            identity = record.run.run_id
            settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    return history, identity, settings


def test_wandb_without_a_key_is_a_run_on_the_volume_with_each_step_once_over_attempts(context: Context) -> None:
    tracking = Tracking(wandb=Wandb(project="bots"))
    follow(tracking, context, lines(1, 2, 3, 4), Interrupted)
    _, first, _ = shown_by_wandb(context.work.report / "wandb")
    follow(tracking, context, lines(1, 2, 3))
    history, identity, settings = shown_by_wandb(context.work.report / "wandb")
    assert history == [(1, ["epoch", "loss"]), (2, ["epoch", "eval_loss", "loss"]), (3, ["epoch", "loss"])]
    assert identity == first == run_id(context)
    assert settings["learningRate"] == 0.01
    assert settings["lora.r"] == 4


def test_wandb_whose_server_does_not_answer_leaves_the_run_on_the_volume(
    context: Context, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainer.training.tracking.REQUEST_SECONDS", 2)
    key = context.secrets / "wandb" / "key"
    key.parent.mkdir(parents=True)
    key.write_text("0" * 40)
    with closed_port() as address:
        follow(Tracking(wandb=Wandb(project="bots", base_url=address)), context, lines(1, 2))
    history, _, _ = shown_by_wandb(context.work.report / "wandb")
    assert [step for step, _ in history] == [1, 2]
    assert "W&B does not answer" in caplog.text
    assert "0" * 40 not in caplog.text


def test_wandb_whose_process_answered_too_late_begins_anew(
    context: Context, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wandb.sdk import wandb_init  # noqa: PLC0415 - slow

    waits = [vars(wandb_init)["wait_with_progress"]]

    def give_up(*_: object, **__: object) -> None:
        monkeypatch.setattr(wandb_init, "wait_with_progress", waits.pop())
        raise TimeoutError

    monkeypatch.setattr(wandb_init, "wait_with_progress", give_up)
    with following(Tracking(wandb=Wandb(project="bots")), context, {}) as followers:
        followers.add(lines(1))
        wait_for(lambda: "W&B does not follow: TimeoutError" in caplog.text)
        followers.add(lines(2))
    history, _, _ = shown_by_wandb(context.work.report / "wandb")
    assert [step for step, _ in history] == [1, 2]
    assert "lacks" not in caplog.text


def wait_for(seen: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not seen():
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)


class closed_port:  # noqa: N801 - a context manager
    """The address of a port that is held, and on which nobody listens."""

    def __enter__(self) -> str:
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self.socket.close()


# MLflow


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real tracking server on this machine, with SQLite and local artifacts."""
    folder = tmp_path_factory.mktemp("mlflow")
    with closed_port() as address:
        port = address.rpartition(":")[2]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", "1"]
    stores = ["--backend-store-uri", f"sqlite:///{folder}/runs.db", "--artifacts-destination", str(folder / "files")]
    settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    server = subprocess.Popen(
        [*command, *stores], env={**os.environ, **settings}, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert server.stderr is not None
    log = []
    for told in server.stderr:
        log.append(told)
        if "Application startup complete" in told:
            break
    else:
        pytest.fail("".join(log))
    threading.Thread(target=server.stderr.read, daemon=True).start()
    yield f"http://127.0.0.1:{port}"
    os.killpg(server.pid, 15)
    server.wait()


def test_mlflow_shows_each_step_once_over_attempts_in_one_run(mlflow_server: str, context: Context) -> None:
    from mlflow import MlflowClient  # noqa: PLC0415 - slow

    tracking = Tracking(mlflow=MLflow(uri=mlflow_server, experiment="bots"))
    client = MlflowClient(tracking_uri=mlflow_server)

    def runs() -> list[Any]:
        experiment = client.get_experiment_by_name("bots")
        assert experiment is not None
        return list(client.search_runs([experiment.experiment_id]))

    follow(tracking, context, lines(1, 2, 3, 4), Interrupted)
    assert [run.info.status for run in runs()] == ["KILLED"]
    follow(tracking, context, lines(1, 2, 3, 4, 5))
    (run,) = runs()
    history = {
        name: [metric.step for metric in client.get_metric_history(run.info.run_id, name)]
        for name in ("loss", "eval_loss")
    }
    assert history == {"loss": [1, 2, 3, 4, 5], "eval_loss": [2, 4]}
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "support-bot-1a2b3c4d"
    assert run.data.metrics["final/eval_loss"] == 0.5
    assert (run.data.params["learningRate"], run.data.params["lora.r"]) == ("0.01", "4")


def test_an_mlflow_server_that_is_away_ends_no_training(
    context: Context, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainer.training.tracking.REQUEST_SECONDS", 1)
    with closed_port() as address:
        follow(Tracking(mlflow=MLflow(uri=address)), context, lines(1, 2))
    assert "MLflow does not follow" in caplog.text
    assert "MLflow lacks 3 lines of 3" in caplog.text
    assert (context.work.report / LINES_NAME).read_text().count("\n") == 3


def test_mlflows_credentials_come_from_files(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_trainer.training.tracking import read_mlflow_credentials  # noqa: PLC0415 - beside its use

    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN", raising=False)
    token = context.secrets / "mlflow" / "MLFLOW_TRACKING_TOKEN"
    token.parent.mkdir(parents=True)
    token.write_text("secret\n")
    assert read_mlflow_credentials(context.secrets) == {"MLFLOW_TRACKING_TOKEN": "secret"}
    token.write_text("sec\nret")
    with pytest.raises(
        InvalidConfig, match=r"tracking\.mlflow\.credentialsSecretRef: MLFLOW_TRACKING_TOKEN is not one"
    ):
        read_mlflow_credentials(context.secrets)


# None of them


def test_what_nobody_asked_for_is_not_imported() -> None:
    code = """
import sys
from finetune_trainer import train
from finetune_trainer.training.tracking import unasked
with unasked():
    from finetune_trainer.training import dpo, loop, sft, trainers
from finetune_trainer.models.loading import import_peft
print(sorted(name for name in ("wandb", "mlflow", "tensorboardX", "torchao", "gptqmodel") if name in sys.modules))
from peft.tuners.lora.torchao import is_torchao_available
import_peft()
print(is_torchao_available())
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'trainer'}"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["[]", "False"]


def test_two_threads_find_the_same_run(context: Context) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(run_id(context))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert not list(context.work.checkpoints.glob(".*"))
