"""Saves that are killed or run out of room at random moments: no bad checkpoint is taken, no good one is lost.

The files are small and without meaning, so that hundreds of trials take minutes; what a real training makes of its
checkpoints is tested in test_resume.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from finetune_trainer.progress import Stage, TrainFacts
from finetune_trainer.runtime import manifest
from finetune_trainer.runtime.errors import VolumeFull
from finetune_trainer.runtime.manifest import Target
from finetune_trainer.training.checkpoint import Checkpoints, step_of

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[3]
KEEP = 2


@dataclass
class Saver:
    """A training that does nothing but save: a step a save, with a loss that is a function of the step."""

    root: Path
    attempt: int
    size: int = 200_000

    @property
    def checkpoints(self) -> Checkpoints:
        run = Target(Stage.TRAIN, self.root / "adapter", "adapter", "sha256:0")
        return Checkpoints(self.root, run, self.attempt, KEEP)

    def steps(self) -> Iterator[int]:
        """Go on from the newest good checkpoint, for ever; each step as soon as it is safe."""
        newest = self.checkpoints.newest_good()
        step = 0 if newest is None else step_of(newest)
        while True:
            step += 1
            facts = TrainFacts(steps=step, epochs=1, trainable_parameters=1, total_parameters=1)
            self.checkpoints.save(step, partial(self.write, step), facts, ranking(step))
            yield step

    def write(self, step: int, folder: Path) -> None:
        for name in ("weights", "optimizer", "course"):
            (folder / name).write_bytes(content(step, name, self.size))

    def check(self, saved: int) -> None:
        """All that was told safe is: nothing newer is lost, the best is there, and every byte is as written."""
        newest = self.checkpoints.newest_good()
        assert saved == 0 or newest is not None
        if newest is None:
            return
        step = step_of(newest)
        assert step in (saved, saved + 1), "killed after a save, before it was told"
        self.check_content(newest)
        best = self.checkpoints.good(next(each for each in ranking(step) if each <= step))
        assert best is not None, "the best is lost"
        self.check_content(best)
        names = {path.name for path in self.checkpoints.folder.iterdir()}
        assert not [name for name in names if name.startswith((".", "damaged-"))]
        assert len(names) <= KEEP + 2, "the best, and one that was to be dropped when it was killed"

    def check_content(self, folder: Path) -> None:
        manifest.verify(folder)
        for name in ("weights", "optimizer", "course"):
            assert (folder / name).read_bytes() == content(step_of(folder), name, self.size)


def content(step: int, name: str, size: int) -> bytes:
    return (hashlib.sha256(f"{step}/{name}".encode()).digest() * (size // 32 + 1))[:size]


def ranking(step: int) -> list[int]:
    """Steps up to this one, the best first: losses that look random, and are the same in every process."""
    return sorted(range(1, step + 1), key=lambda each: hashlib.sha256(str(each).encode()).digest())


def told(lines: str) -> int:
    """The last step that a child told safe; a half line is none."""
    whole = [line for line in lines.splitlines(keepends=True) if line.endswith("\n")]
    return int(whole[-1]) if whole else 0


@pytest.mark.chaos
@pytest.mark.timeout(0)
def test_killed_while_it_saves_nothing_good_is_lost(tmp_path: Path, rng: random.Random, full_trials: bool) -> None:
    saved = 0
    for attempt in range(1, 201 if full_trials else 11):
        saved = max(saved, kill_a_child(tmp_path, attempt, rng))
        newest = Saver(tmp_path, attempt).checkpoints.newest_good()
        saved = max(saved, 0 if newest is None else min(step_of(newest), saved + 1))
        Saver(tmp_path, attempt).check(saved)
    assert saved > 0


def kill_a_child(folder: Path, attempt: int, rng: random.Random) -> int:
    """Let a process save until it has told a few steps, then kill it within the next; the last step it told."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.trainer.test_chaos", "save", str(folder), str(attempt)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'trainer'}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    for _ in range(rng.randint(1, 4)):
        first = child.stdout.readline()
        assert first
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(timeout=rng.uniform(0, 0.01))
    child.send_signal(signal.SIGKILL)
    child.wait()
    rest = child.stdout.read()
    child.stdout.close()
    return told(first + rest)


@pytest.mark.chaos
@pytest.mark.timeout(0)
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting small volumes needs root")
def test_on_a_volume_that_fills_nothing_good_is_lost(tmp_path: Path, rng: random.Random, full_trials: bool) -> None:
    trials = 200 if full_trials else 10
    command = [sys.executable, "-m", "tests.unit.trainer.test_chaos", "fill", str(tmp_path), str(trials)]
    found = subprocess.run(
        ["unshare", "--mount", *command, str(rng.random())],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'trainer'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == {"full": trials}


@pytest.mark.chaos
@pytest.mark.timeout(0)
def test_where_a_file_grows_too_large_nothing_good_is_lost(
    tmp_path: Path, rng: random.Random, full_trials: bool
) -> None:
    """The error of a full disk that needs no volume of its own: a limit on the size of files."""
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for trial in range(200 if full_trials else 10):
            saver = Saver(tmp_path / str(trial), 1, size=20_000)
            steps, good = saver.steps(), rng.randint(0, 4)
            saved = [next(steps) for _ in range(good)]
            resource.setrlimit(resource.RLIMIT_FSIZE, (rng.randint(1, 19_999), hard))
            with pytest.raises(VolumeFull, match="No room for the checkpoint"):
                next(steps)
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            saver.check(saved[-1] if saved else 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


# What children do


def save(root: Path, attempt: int) -> None:
    for step in Saver(root, attempt).steps():
        print(step, flush=True)


def fill(root: Path, trials: int, seed: str) -> None:
    """Save on volumes of random sizes until they are full, some with more room afterwards; all of it checked."""
    rng, full = random.Random(seed), 0
    for trial in range(trials):
        volume = root / str(trial)
        volume.mkdir()
        size = rng.randint(100_000, 1_500_000)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(volume)], check=True)
        full += until_full(Saver(volume, 1, size=rng.randint(10_000, 120_000)), rng, size)
        subprocess.run(["umount", str(volume)], check=True)
    print(json.dumps({"full": full}))


def until_full(saver: Saver, rng: random.Random, size: int) -> int:
    """Fill the volume by something else as well, at a random step: kept checkpoints alone may fit for ever."""
    saved, bystander = 0, rng.randint(1, 6)
    try:
        for step in saver.steps():
            saved = step
            if step >= bystander:
                with contextlib.suppress(OSError), (saver.root / "something else").open("ab") as file:
                    file.write(bytes(rng.randint(1, size)))
    except VolumeFull:
        saver.check(saved)
        subprocess.run(["mount", "-o", f"remount,size={8 * size}", str(saver.root)], check=True)
        assert next(Saver(saver.root, 2, size=saver.size).steps()) == saved + 1
        return 1
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "save":
        save(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        fill(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
