"""What a stage is given besides the config."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from finetune_trainer.runtime import distributed, fence, manifest, memory
from finetune_trainer.runtime.errors import Interrupted, OutOfMemory, TrainerError, translate
from finetune_trainer.runtime.overrides import Overrides

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from finetune_trainer.progress import Resolved
    from finetune_trainer.runtime.manifest import Manifest, Result, Target
    from finetune_trainer.runtime.report import Report
    from finetune_trainer.runtime.work import WorkFolder


TRAINING = "training"
"""The activity of optimizer steps, counted in `done`."""
IMPORTING = "importing libraries"


@dataclass(frozen=True)
class Context:
    """Folders, the report, the wish to stop, and what is to be made."""

    work: WorkFolder
    sources: Path
    secrets: Path
    attempt: int
    report: Report
    target: Target | None = None
    """What the stage is to publish; None for evaluate."""
    name: str | None = None
    """quantize: which entry."""
    stopping: threading.Event = field(default_factory=threading.Event)
    """Set by SIGTERM."""
    overrides: Overrides = field(default_factory=Overrides)
    """train: what this run alone does otherwise."""

    @property
    def goal(self) -> Target:
        """What the stage is to publish; evaluate publishes nothing, and asking for it there is a bug."""
        if self.target is None:
            msg = f"{self.report.current.stage} needs a target"
            raise ValueError(msg)
        return self.target

    def committing(self) -> AbstractContextManager[None]:
        """Hold the fence around what other processes see: Interrupted if a newer attempt has started."""
        return fence.committing(self.work.root, self.attempt)

    @contextmanager
    def naming_rank(self) -> Iterator[None]:
        """Let a GPU that runs out of memory in the body be told with rank and place. OutOfMemory."""
        try:
            yield
        except TrainerError:
            raise
        except Exception as error:
            if not isinstance(translate(error), OutOfMemory):
                raise
            what = f"Rank {distributed.rank()} ran out of GPU memory {self._place} ({memory.needs(str(error))})."
            raise OutOfMemory(what) from error

    @property
    def _place(self) -> str:
        now = self.report.current
        if now.activity != TRAINING:
            return f"while {now.activity}"
        return f"at step {now.done + 1} with micro-batch {self.resolved.micro_batch_size}"

    def publish(self, build: Callable[[Path], Result]) -> Manifest:
        """Put the stage's artifact in its place, complete or not at all. Rank 0 builds it; all know its manifest."""

        def watched(folder: Path) -> Result:
            with self.report.growing(folder):
                return build(folder)

        return distributed.lead(lambda: manifest.publish(self.goal, self.attempt, watched, self.report.bytes_progress))

    @property
    def asked_to_leave(self) -> bool:
        """Whether any rank was: all of them must ask, at the same place, and all get the same answer."""
        return distributed.any_of(self.stopping.is_set())

    def raise_if_stopping(self) -> None:
        """Interrupted if the process was asked to leave: for loops with nothing to save."""
        if self.asked_to_leave:
            msg = f"Asked to leave while {self.report.current.activity}; the next attempt starts the stage again."
            raise Interrupted(msg)

    def polled(self, done: int, _total: int) -> None:
        """Tell how far a measurement is, and break it off if asked to leave."""
        self.raise_if_stopping()
        self.report.update(done=done)

    @property
    def prepared(self) -> Resolved:
        """The settings that prepare fixed: the same for all runs of the job."""
        return manifest.settings_in(self.work.data)

    @property
    def resolved(self) -> Resolved:
        """The settings of this run."""
        return self.overrides.applied(self.prepared)
