"""A piece of a stage in a process of its own: nothing that was imported, patched or held before is in its reach.

The process tells how far it is, and that is told on here; it is killed when the stage is asked to leave, and ends by
itself when nobody listens any more.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar, cast

from finetune_trainer.progress import Progress
from finetune_trainer.runtime.context import Context
from finetune_trainer.runtime.errors import TrainerError, translate
from finetune_trainer.runtime.report import Report, beating_with_bars
from finetune_trainer.runtime.wording import end_of_process

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

log = logging.getLogger(__name__)

Found = TypeVar("Found")

TELL_EVERY_SECONDS = 0.5
LOOK_EVERY_SECONDS = 0.2
NOT_SENT = ("report", "stopping")
"""Of a context: what is bound to its process."""


@dataclass(frozen=True)
class _Answer:
    """What the piece of work returned."""

    value: Any


@dataclass(frozen=True)
class _Failure:
    """What it ended for: an error of the tree, or None for one that nobody expected."""

    known: type[TrainerError] | None
    text: str

    def to_error(self) -> Exception:
        return RuntimeError(self.text) if self.known is None else self.known(self.text)


def call_apart(work: Callable[[Context], Found], context: Context) -> Found:
    """What `work` returns, computed in a fresh process with a context of its own. `work` and its answer are pickled.

    Raises what it raises, if that is a TrainerError, and RuntimeError with its text otherwise; Interrupted if the
    stage is asked to leave meanwhile; TrainerError if the process was killed.
    """
    spawning = multiprocessing.get_context("spawn")
    ours, theirs = spawning.Pipe(duplex=False)
    now = context.report.current
    parts = {each.name: getattr(context, each.name) for each in fields(context) if each.name not in NOT_SENT}
    process = spawning.Process(target=_run, args=(work, parts, now, theirs), name="apart", daemon=True)
    process.start()
    theirs.close()
    try:
        found = _follow(ours, process, context)
    finally:
        process.kill()
        process.join()
        ours.close()
    if isinstance(found, _Failure):
        raise found.to_error()
    return cast("Found", found.value)


def _follow(words: Connection, process: BaseProcess, context: Context) -> _Answer | _Failure:
    """Tell on how far the process is, until it has an answer."""
    pulse = 0
    while True:
        context.raise_if_stopping()
        if not words.poll(LOOK_EVERY_SECONDS):
            continue
        try:
            word = words.recv()
        except EOFError:
            process.join()
            how = end_of_process(process.exitcode or 0)
            told = f"The process that was {context.report.current.activity} {how}. The log says more."
            return _Failure(TrainerError, told)
        if not isinstance(word, Progress):
            return cast("_Answer | _Failure", word)
        if word.pulse != pulse:
            pulse = word.pulse
            _tell_on(word, context.report)


def _tell_on(word: Progress, report: Report) -> None:
    if word.activity != report.current.activity:
        report.begin(word.activity, word.total, word.unit)
    report.update(done=word.done)


# In the process


def _run(work: Callable[[Context], Any], parts: dict[str, Any], now: Progress, words: Connection) -> None:
    """Do the work and say what came of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both; the stage decides
    report, speaking, done = Report(now.stage, now.attempt, bar=False), threading.Lock(), threading.Event()
    context = Context(**parts, report=report)

    def say(word: Progress | _Answer | _Failure) -> None:
        with speaking:
            words.send(word)

    def tell() -> None:
        while not done.wait(TELL_EVERY_SECONDS):
            try:
                say(report.current)
            except OSError:  # nobody listens: the stage is gone
                os._exit(1)

    threading.Thread(target=tell, name="telling", daemon=True).start()
    found = _attempt(work, context)
    done.set()
    say(found)


def _attempt(work: Callable[[Context], Any], context: Context) -> _Answer | _Failure:
    try:
        with context.naming_rank(), beating_with_bars(context.report):
            return _Answer(work(context))
    except Exception as error:
        if (known := translate(error)) is not None:
            return _Failure(type(known), str(known))
        log.exception("A bug in a piece of work")
        return _Failure(None, f"{type(error).__name__}: {error} (the log has the whole traceback)")
