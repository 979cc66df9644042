"""The fence: a trainer of an older attempt commits nothing once a newer attempt has started.

A pod on a node that lost its network goes on working while its successor runs on another node. Both see one work
folder. The folder names the live attempt; whoever commits holds a lock, looks, and renames. A lock that a file system
does not offer (some network file systems) leaves the look alone, which narrows the gap to the rename itself.

Two processes of one attempt are no attempt and its successor: the second waits until the first has ended.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from finetune_trainer.runtime.errors import Interrupted, NotFound, translate

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator
    from pathlib import Path

log = logging.getLogger(__name__)

LIVE_NAME = ".live-attempt"
LOCK_NAME = ".commit-lock"
PATIENCE_SECONDS = 300.0
"""For another process of the same attempt to end: one that was asked to leave may still be saving."""
LOOK_EVERY_SECONDS = 0.5


def enter(root: Path, attempt: int) -> None:
    """Make this the live attempt of the work folder: the first that is written there.

    Interrupted if a newer one has started already; NotFound, AccessDenied, VolumeFull.
    """
    try:
        _enter(root, attempt)
    except (FileExistsError, NotADirectoryError):
        msg = (
            f"--work {root} is not a folder, or lies below what is none. Give a folder; it is made if it is not there."
        )
        raise NotFound(msg) from None
    except OSError as error:
        raise translate(error) or error from None


def _enter(root: Path, attempt: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    with _lock(root):
        refuse_if_fenced(root, attempt)
        aside = root / f"{LIVE_NAME}.{attempt}"
        aside.write_text(f"{attempt}\n", encoding="ascii")
        _sync(aside)
        aside.rename(root / LIVE_NAME)
        _sync(root)


@contextmanager
def committing(root: Path, attempt: int) -> Iterator[None]:
    """Hold the fence around a rename. Interrupted if a newer attempt has started. No fence where no attempt entered."""
    if not (root / LIVE_NAME).exists():
        yield
        return
    with _lock(root):
        refuse_if_fenced(root, attempt)
        yield


def explained(root: Path, attempt: int, error: BaseException) -> BaseException:
    """The error; of an attempt that a newer one cleaned up after, and so took its files from, that it did so."""
    try:
        refuse_if_fenced(root, attempt)
    except Interrupted as overtaken:
        log.warning("overtaken, and met %s: %s", type(error).__name__, error)
        return overtaken
    except OSError:  # the work folder itself is gone: the error tells more
        return error
    return error


def live_attempt(root: Path) -> int:
    """The newest attempt that ever started here; 0 if none did."""
    try:
        return int((root / LIVE_NAME).read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        return 0


def refuse_if_fenced(root: Path, attempt: int) -> None:
    """Interrupted if a newer attempt has started."""
    if (live := live_attempt(root)) > attempt:
        msg = (
            f"Attempt {live} of this job has started since: attempt {attempt} leaves {root} as it is. "
            f"On a workstation, pass --attempt {live} or higher."
        )
        raise Interrupted(msg)


@contextmanager
def _lock(root: Path) -> Iterator[None]:
    handle = os.open(root / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            log.warning("no lock on %s (%s): two attempts at once are told apart by their numbers alone", root, error)
        yield
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# One process an attempt


@contextmanager
def alone(folder: Path, attempt: int, stopping: threading.Event) -> Iterator[None]:
    """Be the one process of the attempt that makes this folder while the body runs. Interrupted if it cannot be.

    The lock is the kernel's: it ends with the process, however that ends. Where a file system has no locks, nobody is
    kept out.
    """
    path = folder.parent / f".{folder.name}.running-{attempt}"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _acquired(path, folder, attempt, stopping)
    try:
        yield
    finally:
        if handle is not None:
            path.unlink(missing_ok=True)
            os.close(handle)


def _acquired(path: Path, folder: Path, attempt: int, stopping: threading.Event) -> int | None:
    """The lock, once it is free; None where there are no locks. Interrupted if it stays with another process."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    told = False
    while True:
        try:
            return _lock_file(path)
        except BlockingIOError:
            if not told:
                log.warning("another process of attempt %d is at work on %s: waiting for its end", attempt, folder)
            told = True
        except OSError as error:
            log.warning("no lock on %s (%s): another process of attempt %d is not noticed", path, error, attempt)
            return None
        if time.monotonic() >= deadline or stopping.wait(LOOK_EVERY_SECONDS):
            msg = (
                f"Another process of attempt {attempt} is at work on {folder}: this one leaves it as it is. "
                f"Let it end first, or pass --attempt {attempt + 1}, which takes over from it."
            )
            raise Interrupted(msg)


def _lock_file(path: Path) -> int:
    """The file, locked. Whoever had it before may have removed it meanwhile: then it is made anew. BlockingIOError."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise
        if os.fstat(handle).st_nlink:
            return handle
        os.close(handle)
