"""Checkpoints: whole or absent, verified before use, and enough to go on exactly where a run was left.

    checkpoints/step-00000012/
      ...                    what finetune_trainer.training.state writes
      manifest.json          sizes and SHA-256, and what run it belongs to

A save goes aside, is made durable, and is renamed under the fence. The last good checkpoint outlives a full volume, and
the best one those that come after it.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import PurePath
from typing import TYPE_CHECKING

from finetune_trainer.runtime import fence, manifest
from finetune_trainer.runtime.distributed import lead, leads, together
from finetune_trainer.runtime.errors import NO_SPACE_ERRNOS, InvalidConfig, TrainerError, VolumeFull, translate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from finetune_trainer.progress import TrainFacts
    from finetune_trainer.runtime.manifest import Target

log = logging.getLogger(__name__)

NAME_PATTERN = re.compile(r"step-(\d{8})")
DAMAGED_PATTERN = re.compile(r"damaged-step-(\d{8})-(\d+)")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run: of these settings on these rows and this model."""

    root: Path
    """The work folder."""
    run: Target
    """What the run is to make: checkpoints of any other run are refused."""
    attempt: int
    keep: int
    progress: Callable[[int, int], None] | None = None
    """Of reading and hashing: bytes done, bytes in all."""

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self.root / "checkpoints"

    def save(self, step: int, write: Callable[[Path], None], facts: TrainFacts, best_first: Sequence[int] = ()) -> Path:
        """Let `write` fill a checkpoint of this step, then drop the oldest beyond `keep`, but not the best.

        `facts`: the run so far, for the manifest. `best_first`: steps that were measured, the lowest loss first; the
        first that has a checkpoint is kept besides. A step is saved once. All ranks write, rank 0 commits.
        VolumeFull if there is no room: the partial checkpoint is removed and those before it stay.
        """
        target = self._target(step)
        partial = self._partial(target.folder)
        lead(lambda: self._begin(partial))
        try:
            together(lambda: write(partial))
            result = manifest.Result(message=f"checkpoint of step {step}", training=facts)
            lead(lambda: self._finish(partial, target, result, best_first))
        except BaseException as error:
            if not leads():
                raise
            written = size_of(partial)
            shutil.rmtree(partial, ignore_errors=True)
            if is_volume_full(error):
                raise self._volume_full(step, written) from error
            raise
        return target.folder

    def _begin(self, partial: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()

    def _finish(self, partial: Path, target: Target, result: manifest.Result, best_first: Sequence[int]) -> None:
        manifest.seal(partial, target, result, self.progress)
        with self._committing():
            partial.rename(target.folder)
            manifest.sync(self.folder)
            dropped = self._put_away_old(best_first)
        for path in dropped:
            shutil.rmtree(path, ignore_errors=True)

    def _committing(self) -> AbstractContextManager[None]:
        return fence.committing(self.root, self.attempt)

    def newest_good(self) -> Path | None:
        """The newest checkpoint of this run whose every byte is as written. Damaged ones are set aside and told.

        InvalidConfig if the newest one belongs to another run.
        """
        return lead(self._newest_good)

    def _newest_good(self) -> Path | None:
        self._clean_leftovers()
        return next((path for path in reversed(self._all()) if self._is_good(path)), None)

    def good(self, step: int) -> Path | None:
        """The checkpoint of this step, if it is there and every byte is as written; set aside and told if damaged."""
        path = self._target(step).folder
        return path if lead(lambda: path.exists() and self._is_good(path)) else None

    def _is_good(self, path: Path) -> bool:
        try:
            found = manifest.verify(path, self.progress)
        except TrainerError as error:
            self._set_aside(path, error)
            return False
        if not self._target(step_of(path)).matches(found):
            msg = (
                f"{path} is of a run with other settings, rows or another model. "
                f"Use another --work folder for this config, or delete {self.folder} to train from the start."
            )
            raise InvalidConfig(msg)
        return True

    def _target(self, step: int) -> Target:
        name = f"step-{step:08d}"
        return replace(self.run, folder=self.folder / name, path=str(PurePath("checkpoints", name)))

    def _all(self) -> list[Path]:
        """Oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if NAME_PATTERN.fullmatch(path.name))

    def _put_away_old(self, best_first: Sequence[int]) -> list[Path]:
        """Rename those to be dropped. Killed on the way, half a checkpoint would look like a damaged one."""
        saved = {step_of(path): path for path in self._all()}
        best = next((step for step in best_first if step in saved), None)
        old = [saved[step] for step in sorted(saved)[: -self.keep] if step != best]
        return [path.rename(self._partial(path)) for path in old]

    def _partial(self, folder: Path) -> Path:
        return self.folder / f".{folder.name}.partial-{self.attempt}"

    def _set_aside(self, path: Path, error: TrainerError) -> None:
        """Keep it for whoever wants to know why, in the place of the one kept before."""
        aside = path.with_name(f"damaged-{path.name}-{self.attempt}")
        with self._committing():
            log.warning("checkpoint %s is damaged and set aside as %s: %s", path.name, aside.name, error)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        damaged = [path for path in self.folder.iterdir() if DAMAGED_PATTERN.fullmatch(path.name)]
        for older in sorted(damaged, key=_attempt_and_step)[:-1]:
            shutil.rmtree(older, ignore_errors=True)

    def _clean_leftovers(self) -> None:
        pattern = re.compile(r"\.step-\d{8}\.partial-(\d+)")
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if (match := pattern.fullmatch(path.name)) and int(match[1]) <= self.attempt:
                shutil.rmtree(path, ignore_errors=True)

    def _volume_full(self, step: int, written: int) -> VolumeFull:
        """The last checkpoint's size tells what one needs; of the first, what was written before it failed."""
        before = self._all()
        needed = max(written, size_of(before[-1]) if before else 0)
        kept = f"The checkpoint of step {step_of(before[-1])} is kept. " if before else ""
        return VolumeFull(
            f"No room for the checkpoint of step {step}: it needs at least {needed:,} bytes, "
            f"{free_bytes(self.folder):,} are free. {kept}"
            "Make the job's claim larger, or lower training.checkpoint.keep; then retry."
        )


def step_of(path: Path) -> int:
    """The optimizer step a checkpoint's folder is named after."""
    match = NAME_PATTERN.fullmatch(path.name)
    if match is None:
        msg = f"{path} is no checkpoint"
        raise ValueError(msg)
    return int(match[1])


def saved_at(path: Path) -> datetime:
    """When a checkpoint was complete."""
    return datetime.fromtimestamp((path / manifest.MANIFEST_NAME).stat().st_mtime, UTC)


def _attempt_and_step(damaged: Path) -> tuple[int, int]:
    match = DAMAGED_PATTERN.fullmatch(damaged.name)
    return (int(match[2]), int(match[1])) if match else (0, 0)


def is_volume_full(error: BaseException) -> bool:
    """Whether a library's error means that the volume is full."""
    if isinstance(error, OSError) and error.errno in {*NO_SPACE_ERRNOS, errno.EFBIG}:
        return True
    return isinstance(error, Exception) and isinstance(translate(error), VolumeFull)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in manifest.files_in(folder))


def free_bytes(folder: Path) -> int:
    """Bytes an unprivileged process may still write there."""
    facts = os.statvfs(folder)
    return facts.f_bavail * facts.f_frsize
