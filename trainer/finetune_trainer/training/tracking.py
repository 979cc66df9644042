"""Who follows a training: `report/training.jsonl`, and W&B, MLflow and TensorBoard where the job asks for them.

Each follower has a thread of its own, so that none makes a training wait. One that fails is told once in the log,
opened anew with the next line, and never ends a training. A run that goes on tells its lines from the first one: files
are written anew, and servers are told what they do not have.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import shutil
import sys
import threading
import time
import uuid
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from finetune_trainer.config import (
    MLFLOW_CREDENTIALS,
    MLFLOW_SLOT,
    WANDB_KEY_FILE,
    WANDB_SLOT,
    MLflow,
    Tracking,
    Wandb,
)
from finetune_trainer.runtime import fence, manifest
from finetune_trainer.runtime.distributed import leads
from finetune_trainer.runtime.errors import Interrupted
from finetune_trainer.runtime.wording import first_line
from finetune_trainer.runtime.work import read_credential
from finetune_trainer.training.course import EVAL_LOSS, Line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from finetune_trainer.runtime.context import Context

    Guard = Callable[[], AbstractContextManager[None]]
    """Entered around what a tracker does; it may raise."""

log = logging.getLogger(__name__)

LINES_NAME = "training.jsonl"
TENSORBOARD = "TensorBoard"
WRITTEN_HERE = (LINES_NAME, TENSORBOARD)
"""Trackers that are files of the work folder and wait for nobody."""
RUN_ID_NAME = "run-id"
WANDB_FOLDER = "wandb"
"""As its client names it, in report/."""
EXPERIMENT = "finetune"
RUN_TAG = "finetune.run"
"""MLflow's tag that a run is found again by: its server chooses the run's own id."""
CLOSE_SECONDS = 60.0
"""How long a finished training waits for its last lines to arrive."""
LEAVE_SECONDS = 5.0
"""How long one that was asked to leave does: its checkpoint is saved, its grace period is short."""
REQUEST_SECONDS = 15
"""For a server to answer."""
START_SECONDS = 120
"""For W&B's own process, on a machine that may be busy with loading a model."""
UNASKED = ("wandb", "torchao")
"""What libraries would import because it is installed."""
WANDB_TELLS_NOTHING_ELSE = {
    "console": "off",
    "silent": True,
    "disable_code": True,
    "disable_git": True,
    "save_code": False,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}
ENDS = {"FINISHED": 0, "FAILED": 1, "KILLED": 1}
"""How a run ends, in MLflow's words, and the exit code that W&B shows."""


class Tracker(Protocol):
    """One place where the run is shown. Any exception means: not now."""

    def add(self, lines: Sequence[Line]) -> None:
        """Show more lines."""

    def end(self, end: str, figures: Line) -> None:
        """Close, with the figures of what was made."""


class Follower:
    """A tracker in a thread of its own: it may be slow, away, or come back."""

    def __init__(self, name: str, open_tracker: Callable[[], Tracker], guard: Guard = nullcontext) -> None:
        """`open_tracker` is called in the thread, again after each failure. What a tracker does, it does guarded."""
        self._name, self._open, self._guard = name, open_tracker, guard
        self._tracker: Tracker | None = None
        self._lines: list[Line] = []
        self._shown = 0
        self._told = False
        self._wake: queue.SimpleQueue[tuple[str, Line] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._follow, name=f"tracking {name}", daemon=True)
        self._thread.start()

    def add(self, lines: Sequence[Line]) -> None:
        """Show more lines when there is time."""
        self._lines.extend(lines)
        self._wake.put(None)

    def close(self, end: str, figures: Line, seconds: float) -> None:
        """Show what is left; at most so many seconds are waited for it."""
        self._wake.put((end, figures))
        self._thread.join(seconds)
        if self._shown < len(self._lines):
            log.warning("%s lacks %d lines of %d", self._name, len(self._lines) - self._shown, len(self._lines))

    def _follow(self) -> None:
        last = None
        while last is None:
            last = self._wake.get()
            while last is None and not self._wake.empty():
                last = self._wake.get()
            try:
                with self._guard():
                    self._show()
                    if last is not None and self._tracker is not None:
                        self._tracker.end(*last)
            except Exception as error:  # noqa: BLE001 - whatever a client raises, the training goes on
                self._tell(error)

    def _show(self) -> None:
        if self._tracker is None:
            self._tracker, self._shown = self._open(), 0
        lines = self._lines[self._shown :]
        self._tracker.add(lines)
        self._shown += len(lines)

    def _tell(self, error: Exception) -> None:
        self._tracker = None
        if not self._told:
            told = "%s does not follow: %s. The training goes on; it is tried again."
            log.warning(told, self._name, first_line(error))
        self._told = True


class Followers:
    """All who follow one run."""

    def __init__(self, followers: Sequence[Follower]) -> None:
        """On ranks other than 0 there are none."""
        self._followers = followers

    def add(self, lines: Sequence[Line]) -> None:
        """Tell lines: first those of the run so far, then each new one."""
        for follower in self._followers:
            follower.add(lines)

    def close(self, end: str, figures: Line, seconds: float) -> None:
        """Tell how it ended."""
        for follower in self._followers:
            follower.close(end, figures, seconds)


@contextmanager
def unasked() -> Iterator[None]:
    """Let libraries that are imported in the body take others for not installed, which they would import for nothing.

    TRL (1.16) takes W&B, for 2 s, transformers (5.23) torchao, for 1 s: no base of ours is quantized by it.
    """
    hidden = [name for name in UNASKED if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # how Python notes that there is no such module
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextmanager
def following(tracking: Tracking | None, context: Context, figures: Line) -> Iterator[Followers]:
    """Let the run be followed while the body runs, which fills `figures` with those of what it made."""
    followers = Followers(build_followers(tracking or Tracking(), context) if leads() else [])
    try:
        yield followers
    except Interrupted:
        followers.close("KILLED", {}, LEAVE_SECONDS)
        raise
    except BaseException:
        followers.close("FAILED", {}, LEAVE_SECONDS)
        raise
    followers.close("FINISHED", figures, CLOSE_SECONDS)


def build_followers(tracking: Tracking, context: Context) -> list[Follower]:
    """The job's own file, and whom it asks for."""
    report, settings = context.work.report, _settings(context)
    opens: dict[str, Callable[[], Tracker]] = {LINES_NAME: lambda: LinesFile(report / LINES_NAME)}
    if tracking.tensorboard:
        opens[TENSORBOARD] = lambda: TensorBoard(report / "tensorboard", settings)
    if (wandb := tracking.wandb) is not None:
        opens["W&B"] = lambda: WandbRun(wandb, context, settings)
    if (mlflow := tracking.mlflow) is not None:
        opens["MLflow"] = lambda: MLflowRun(mlflow, context, settings)
    return [Follower(name, open_tracker, partial(_guard, name, context)) for name, open_tracker in opens.items()]


def _guard(name: str, context: Context) -> AbstractContextManager[None]:
    """Interrupted if a newer attempt has started. Files are written behind the lock, which no server may hold."""
    if name in WRITTEN_HERE:
        return context.committing()
    fence.refuse_if_fenced(context.work.root, context.attempt)
    return nullcontext()


def _settings(context: Context) -> dict[str, Any]:
    """The run's settings, as the resource names them; blocks joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in context.prepared.model_dump(mode="json", by_alias=True, exclude_none=True).items():
        inner = value.items() if isinstance(value, dict) else ()
        flat |= {f"{name}.{key}": each for key, each in inner} or {name: value}
    return flat


def run_id(context: Context) -> str:
    """What the run is known by, the same over all its attempts."""
    path = context.work.checkpoints / RUN_ID_NAME
    if path.is_file():
        return path.read_text(encoding="ascii").strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{RUN_ID_NAME}.partial-{context.attempt}-{threading.get_ident()}")
    aside.write_text(uuid.uuid4().hex[:12] + "\n", encoding="ascii")
    manifest.sync(aside)
    try:
        path.hardlink_to(aside)  # the first of two threads wins
    except FileExistsError:
        pass
    finally:
        aside.unlink()
    return path.read_text(encoding="ascii").strip()


class LinesFile:
    """`report/training.jsonl`: the lines as they are."""

    def __init__(self, path: Path) -> None:
        """Begin the file anew."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        path.write_text("", encoding="utf-8")
        path.chmod(0o644)

    def add(self, lines: Sequence[Line]) -> None:
        """Append."""
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def end(self, end: str, figures: Line) -> None:
        """Nothing is open."""


class TensorBoard:
    """Event files for TensorBoard: a chart a figure, the settings as a table."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Begin the files anew: those of an earlier attempt hold steps that are taken again."""
        from tensorboardX import SummaryWriter  # noqa: PLC0415 - only for who asks for it

        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))
        rows = "\n".join(f"|{name}|{value}|" for name, value in settings.items())
        self._writer.add_text("settings", f"|setting|value|\n|-|-|\n{rows}")

    def add(self, lines: Sequence[Line]) -> None:
        """Append, to be read at once."""
        for line in lines:
            for name, value in _figures(line).items():
                self._writer.add_scalar(name, value, int(line["step"]))
        self._writer.flush()

    def end(self, end: str, figures: Line) -> None:  # noqa: ARG002 - a Tracker's signature
        """Add the figures of what was made."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value)
        self._writer.close()


class WandbRun:
    """A run of Weights & Biases: on its server where there is a key, else under `report/wandb`, to be synced later."""

    def __init__(self, wandb: Wandb, context: Context, settings: dict[str, Any]) -> None:
        """A server that does not answer leaves the run on the volume as well."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # to its makers
        import wandb as client  # noqa: PLC0415 - only for who asks for it

        self._client, self._wandb, self._context, self._settings = client, wandb, context, settings
        key = read_credential(context.secrets, WANDB_SLOT, WANDB_KEY_FILE, "tracking.wandb.apiKeySecretRef")
        self._run = self._offline() if key is None else self._online(key)
        self._first = self._run.starting_step

    def _online(self, key: str) -> Any:  # noqa: ANN401 - a wandb run
        try:
            return self._init({"api_key": key, "init_timeout": REQUEST_SECONDS}, mode="online", resume="allow")
        except (self._client.Error, TimeoutError) as error:
            reason, folder = first_line(error), self._context.work.report / WANDB_FOLDER
            log.warning("W&B does not answer (%s): the run is in %s, for `wandb sync`", reason, folder)
            return self._offline()

    def _offline(self) -> Any:  # noqa: ANN401 - a wandb run
        shutil.rmtree(self._context.work.report / WANDB_FOLDER, ignore_errors=True)  # all of it is told again
        return self._init({"init_timeout": START_SECONDS}, mode="offline")

    def _init(self, settings: dict[str, Any], **how: Any) -> Any:  # noqa: ANN401 - wandb's own arguments, its run
        """Begin the run. If that fails, W&B's process knows the run and would not begin it again: it is ended too."""
        own_server = {"base_url": self._wandb.base_url} if self._wandb.base_url else {}
        report = self._context.work.report
        report.mkdir(parents=True, exist_ok=True)
        try:
            return self._client.init(
                project=self._wandb.project,
                entity=self._wandb.entity,
                id=run_id(self._context),
                name=self._context.work.root.name,
                config=self._settings,
                dir=report,
                settings=self._client.Settings(
                    x_service_wait=START_SECONDS, **settings, **own_server, **WANDB_TELLS_NOTHING_ELSE
                ),
                **how,
            )
        except BaseException:
            self._client.teardown()
            raise

    def add(self, lines: Sequence[Line]) -> None:
        """Tell what the server does not have; of one step all at once."""
        for line in lines:
            if line["step"] >= self._first:
                self._run.log(_figures(line), step=int(line["step"]))

    def end(self, end: str, figures: Line) -> None:
        """Put the figures of what was made into the summary."""
        self._run.summary.update(figures)
        self._run.finish(exit_code=ENDS[end])
        self._client.teardown()  # W&B's own process may still be writing: a pod that ended now would cut it off


class MLflowRun:
    """A run of an MLflow tracking server."""

    def __init__(self, mlflow: MLflow, context: Context, settings: dict[str, Any]) -> None:
        """Find the run of an earlier attempt, or make it."""
        os.environ.update(read_mlflow_credentials(context.secrets))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_SECONDS))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        from mlflow import MlflowClient  # noqa: PLC0415 - only for who asks for it

        self._client = MlflowClient(tracking_uri=mlflow.uri)
        self._run = self._find_or_make(mlflow.experiment or EXPERIMENT, context, settings)
        self._known = {name: self._last_step(name) for name in ("loss", EVAL_LOSS)}

    def _find_or_make(self, experiment: str, context: Context, settings: dict[str, Any]) -> str:
        found = self._client.get_experiment_by_name(experiment)
        where = self._client.create_experiment(experiment) if found is None else found.experiment_id
        identity = run_id(context)
        runs = self._client.search_runs([where], f"tags.`{RUN_TAG}` = '{identity}'", max_results=1)
        if runs:
            self._client.update_run(runs[0].info.run_id, status="RUNNING")
            return str(runs[0].info.run_id)
        run = self._client.create_run(where, tags={RUN_TAG: identity}, run_name=context.work.root.name)
        for name, value in settings.items():
            self._client.log_param(run.info.run_id, name, value)
        return str(run.info.run_id)

    def _last_step(self, name: str) -> int:
        return max((metric.step for metric in self._client.get_metric_history(self._run, name)), default=-1)

    def add(self, lines: Sequence[Line]) -> None:
        """Tell what the server does not have, in few requests."""
        from mlflow.entities import Metric  # noqa: PLC0415 - only for who asks for it

        now = time.time_ns() // 1_000_000
        metrics = [
            Metric(name, value, now, int(line["step"]))
            for line in lines
            if line["step"] > self._known[EVAL_LOSS if EVAL_LOSS in line else "loss"]
            for name, value in _figures(line).items()
        ]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self._run, metrics=metrics[start : start + 1000])

    def end(self, end: str, figures: Line) -> None:
        """Log the figures of what was made."""
        for name, value in figures.items():
            self._client.log_metric(self._run, name, value)
        self._client.set_terminated(self._run, status=end)


def read_mlflow_credentials(secrets: Path) -> dict[str, str]:
    """The server's credentials, by the variables in which its client looks for them."""
    field = "tracking.mlflow.credentialsSecretRef"
    found = {name: read_credential(secrets, MLFLOW_SLOT, name, field) for name in MLFLOW_CREDENTIALS}
    return {name: text for name, text in found.items() if text is not None}


def _figures(line: Line) -> Line:
    """The figures of a line without its step."""
    return {name: value for name, value in line.items() if name != "step"}
