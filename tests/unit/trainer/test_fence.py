"""A trainer of an older attempt commits nothing once a newer one has started."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from finetune_trainer import fence, manifest
from finetune_trainer.checkpoint import Checkpoints
from finetune_trainer.errors import Interrupted
from finetune_trainer.manifest import Result, Target
from finetune_trainer.progress import Stage, TrainFacts

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
