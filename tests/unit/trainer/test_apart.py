"""A piece of work in a process of its own: heard while it goes on, stopped with the stage, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from finetune_trainer.progress import Stage
from finetune_trainer.runtime.apart import call_apart
from finetune_trainer.runtime.context import Context
from finetune_trainer.runtime.errors import Interrupted, TrainerError, VerificationFailed
from finetune_trainer.runtime.report import Report
from finetune_trainer.runtime.work import WorkFolder

DEADLINE_SECONDS = 120.0


def make_context(root: Path) -> Context:
    return Context(WorkFolder(root), root, root, 3, Report(Stage.QUANTIZE, 3, bar=False), name="small")


def tell_who(context: Context) -> tuple[int, str | None, int]:
    return os.getpid(), context.name, context.report.current.attempt


def refuse(_: Context) -> None:
    msg = "the figures are wrong"
    raise VerificationFailed(msg)


def stumble(_: Context) -> None:
    msg = "nobody expected this"
    raise KeyError(msg)


def die(_: Context) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def work_until(stop: Path, context: Context) -> str:
    """Counts until a file is there."""
    context.report.begin("counting", 10, "rows")
    context.report.update(done=4)
    (stop.parent / "pid").write_text(str(os.getpid()))
    wait_for(stop.exists)
    return "counted"


def wait_for(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().split(") ")[1][0] != "Z"


def test_it_works_in_another_process_with_the_same_context(tmp_path: Path) -> None:
    process, name, attempt = call_apart(tell_who, make_context(tmp_path))
    assert process != os.getpid()
    assert (name, attempt) == ("small", 3)


def test_an_error_of_the_tree_comes_back_as_itself(tmp_path: Path) -> None:
    with pytest.raises(VerificationFailed, match="the figures are wrong"):
        call_apart(refuse, make_context(tmp_path))


def test_a_bug_comes_back_as_a_bug(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'nobody expected this'"):
        call_apart(stumble, make_context(tmp_path))


def test_a_killed_process_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match=r"was killed \(SIGKILL\), as the kernel does"):
        call_apart(die, make_context(tmp_path))


def test_its_progress_is_the_stages(tmp_path: Path) -> None:
    context, found = make_context(tmp_path), []
    stop = tmp_path / "stop"
    working = threading.Thread(target=lambda: found.append(call_apart(partial(work_until, stop), context)))
    working.start()
    wait_for(lambda: context.report.current.done == 4)
    progress = context.report.current
    stop.touch()
    working.join(DEADLINE_SECONDS)
    assert (progress.activity, progress.total, progress.unit) == ("counting", 10, "rows")
    assert found == ["counted"]


def test_a_wish_to_leave_ends_it(tmp_path: Path) -> None:
    context = make_context(tmp_path)

    def ask() -> None:
        wait_for(lambda: context.report.current.activity == "counting")
        context.stopping.set()

    asking = threading.Thread(target=ask)
    asking.start()
    with pytest.raises(Interrupted, match="while counting"):
        call_apart(partial(work_until, tmp_path / "never"), context)
    asking.join(DEADLINE_SECONDS)
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_it_ends_with_a_stage_that_was_killed(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from functools import partial; from tests.unit.trainer import test_apart as t; "
        f"root = Path({str(tmp_path)!r}); t.call_apart(partial(t.work_until, root / 'never'), t.make_context(root))"
    )
    stage = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[3])
    told = tmp_path / "pid"
    wait_for(lambda: told.exists() and told.read_text())
    stage.kill()
    stage.wait()
    wait_for(lambda: not is_alive(int(told.read_text())))
