"""Checkpoints: whole or absent, verified before use, and enough to go on exactly where a run was left.

    checkpoints/step-00000012/
      adapter.safetensors    every trained tensor, in the dtype it trains in
      optimizer.pt scheduler.pt rng_state.pth (scaler.pt)    read with weights_only: no pickle is ever run
      trainer_state.json     the Trainer's own account of steps
      manifest.json          sizes and SHA-256, and what run it belongs to

A save goes aside, is made durable, and is renamed under the fence. The last good checkpoint outlives a full volume.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import random
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from finetune_trainer import fence, manifest
from finetune_trainer.errors import NO_SPACE_ERRNOS, InvalidConfig, TrainerError, VolumeFull, translate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from finetune_trainer.manifest import Target

log = logging.getLogger(__name__)

ADAPTER_NAME = "adapter.safetensors"
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

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self.root / "checkpoints"

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Let `write` fill a checkpoint of this step, then drop the oldest beyond `keep`.

        VolumeFull if there is no room: the partial checkpoint is removed and those before it stay.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self._target(step)
        partial = self.folder / f".{target.folder.name}.partial-{self.attempt}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            write(partial)
            manifest.seal(partial, target, manifest.Result(message=f"checkpoint of step {step}"))
            self._commit(partial, target.folder)
        except BaseException as error:
            written = size_of(partial)
            shutil.rmtree(partial, ignore_errors=True)
            if is_volume_full(error):
                raise self._volume_full(step, written) from error
            raise
        self._drop_old()
        return target.folder

    def newest_good(self) -> Path | None:
        """The newest checkpoint of this run whose every byte is as written. Damaged ones are set aside and told.

        InvalidConfig if the newest one belongs to another run.
        """
        self._clean_leftovers()
        for path in reversed(self._all()):
            try:
                found = manifest.verify(path)
            except TrainerError as error:
                self._set_aside(path, error)
                continue
            if not self._target(step_of(path)).matches(found):
                msg = (
                    f"{path} is of a run with other settings, rows or another model. "
                    f"Use another --work folder for this config, or delete {self.folder} to train from the start."
                )
                raise InvalidConfig(msg)
            return path
        return None

    def _target(self, step: int) -> Target:
        name = f"step-{step:08d}"
        return replace(self.run, folder=self.folder / name, path=str(PurePath("checkpoints", name)))

    def _commit(self, partial: Path, folder: Path) -> None:
        with fence.committing(self.root, self.attempt):
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
        manifest.sync(self.folder)

    def _all(self) -> list[Path]:
        """Oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if NAME_PATTERN.fullmatch(path.name))

    def _drop_old(self) -> None:
        for path in self._all()[: -self.keep]:
            shutil.rmtree(path, ignore_errors=True)

    def _set_aside(self, path: Path, error: TrainerError) -> None:
        aside = path.with_name(f"damaged-{path.name}-{self.attempt}")
        """Keep it for whoever wants to know why, in the place of the one kept before."""
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


# What is in one


def write_state(trainer: Any, folder: Path) -> None:  # noqa: ANN401 - a transformers Trainer
    """Everything that the next step depends on, as the Trainer itself names it where it does."""
    from safetensors.torch import save_file  # noqa: PLC0415 - slow

    save_file({name: tensor.detach().contiguous() for name, tensor in trained(trainer.model)}, folder / ADAPTER_NAME)
    _save(trainer.optimizer.state_dict(), folder / "optimizer.pt")
    _save(trainer.lr_scheduler.state_dict(), folder / "scheduler.pt")
    if trainer.accelerator.scaler is not None:
        _save(trainer.accelerator.scaler.state_dict(), folder / "scaler.pt")
    _save(random_state(), folder / "rng_state.pth")
    trainer.state.save_to_json(str(folder / "trainer_state.json"))


def random_state() -> dict[str, Any]:
    """The state of every generator, as Trainer reads it back (`_load_rng_state`, with weights_only)."""
    import numpy as np  # noqa: PLC0415 - slow
    import torch  # noqa: PLC0415 - slow

    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - the generator that libraries use
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state()
    return state


def _save(value: object, path: Path) -> None:
    """Like torch.save, by way of memory: on a full volume its own writer says "iostream error" (2.13), not ENOSPC."""
    import torch  # noqa: PLC0415 - slow

    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(buffer.getbuffer())


def read_weights(model: Any, folder: Path) -> None:  # noqa: ANN401 - a torch module
    """Put a checkpoint's weights into the model, bit by bit.

    Trainer's own way reloads a bf16 adapter as fp32, and the losses part from there (transformers 5.23): here names,
    shapes and dtypes must agree. InvalidConfig if they do not.
    """
    import torch  # noqa: PLC0415 - slow
    from safetensors.torch import load_file  # noqa: PLC0415 - slow

    saved, wanted = load_file(folder / ADAPTER_NAME), dict(trained(model))
    for name in saved.keys() | wanted.keys():
        here, there = _shape(wanted.get(name)), _shape(saved.get(name))
        if here != there:
            msg = f"{folder}: {name} is {there}, the adapter to be trained has {here}. Delete the checkpoint."
            raise InvalidConfig(msg)
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(saved[name])


def trained(model: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - a torch module
    """Names and tensors of what is trained."""
    return ((name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad)


def _shape(tensor: Any) -> str:  # noqa: ANN401 - a tensor or nothing
    return "absent" if tensor is None else f"{list(tensor.shape)} of {tensor.dtype}"
