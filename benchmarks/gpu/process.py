"""python -m benchmarks.gpu.process RUN: one training in a process of its own; RUN and its figures are JSON.

Light: what must be set up before torch or transformers are imported is set up here.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import asdict, dataclass, field
from typing import Any

OURS, TRL, UNSLOTH = "ours", "TRL + PEFT", "Unsloth"


@dataclass(frozen=True)
class Run:
    """What a process is told: a work on a shape of random weights, or the task in a folder."""

    by: str
    device: str
    seed: int
    steps: int
    work: str = ""
    shape: str = ""
    task: str = ""
    """Folder of a task (`task.py`)."""
    spec: dict[str, Any] = field(default_factory=dict)
    """Put over the spec of our job."""
    warm_up: int = 1
    """The first of the steps, which are not timed."""
    profile: str = ""
    """File that a profile is written to, of one step more than `steps`."""


@dataclass(frozen=True)
class Figures:
    """What a process found."""

    device: str
    """The GPU's name, or `cpu`."""
    parameters: int
    """Of the base without its embeddings, with its head."""
    step_tokens: int
    """Padding left out."""
    step_seconds: list[float]
    """Of the timed steps, from the end of one to the end of the next, the device waited for."""
    first_loss: float
    last_loss: float
    peak_bytes: int
    """The most that tensors held while steps were taken; 0 on CPU."""
    reserved_bytes: int
    held_out_loss: float | None = None
    """After the last step; of a task."""


def main() -> None:
    """Train, and print the figures, or why there are none."""
    run = Run(**json.loads(sys.argv[1]))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if run.by == OURS:
        from finetune_trainer.models.loading import set_up_torch  # noqa: PLC0415 - of our process alone

        set_up_torch()
    if run.by == UNSLOTH:
        import unsloth  # type: ignore[import-not-found]  # noqa: F401, PLC0415 - wants to be the first
    try:
        from benchmarks.gpu.training import train  # noqa: PLC0415 - slow; after the above

        found: dict[str, Any] = asdict(train(run))
    except Exception as error:  # noqa: BLE001 - whatever it is, it loses this row only
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
