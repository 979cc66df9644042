"""The fence: a trainer of an older attempt commits nothing once a newer attempt has started.

A pod on a node that lost its network goes on working while its successor runs on another node. Both see one work
folder. The folder names the live attempt; whoever commits holds a lock, looks, and renames. A lock that a file system
does not offer (some network file systems) leaves the look alone, which narrows the gap to the rename itself.
"""

from __future__ import annotations

import fcntl
import logging
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from finetune_trainer.errors import Interrupted, NotFound

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

log = logging.getLogger(__name__)

LIVE_NAME = ".live-attempt"
LOCK_NAME = ".commit-lock"


def enter(root: Path, attempt: int) -> None:
    """Make this the live attempt of the work folder. Interrupted if a newer one has started already; NotFound."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        msg = (
            f"--work {root} is not a folder, or lies below what is none. Give a folder; it is made if it is not there."
        )
        raise NotFound(msg) from None
    with _lock(root):
        _refuse_if_fenced(root, attempt)
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
        _refuse_if_fenced(root, attempt)
        yield


def live_attempt(root: Path) -> int:
    """The newest attempt that ever started here; 0 if none did."""
    try:
        return int((root / LIVE_NAME).read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        return 0


def _refuse_if_fenced(root: Path, attempt: int) -> None:
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
