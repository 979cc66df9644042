"""What a stage runs on, and with which libraries. Loads none of them: what was not needed is not asked."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

from finetune_trainer.models.loading import usable_cores
from finetune_trainer.reporting.record import Machine

if TYPE_CHECKING:
    from collections.abc import Iterator

LIBRARIES = (
    "finetune-operator",
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "safetensors",
    "gptqmodel",
    "gguf",
    "galore-torch",
    "liger-kernel",
)
"""Distributions whose version may change a result."""


def describe_machine() -> Machine:
    """The machine of this process; GPUs where torch is in use."""
    cuda = _cuda()
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        cores=usable_cores(),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        gpus=tuple(cuda.get_device_name(index) for index in range(cuda.device_count())) if cuda else (),
    )


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that are installed."""
    return {"python": platform.python_version(), **dict(_installed())}


def _installed() -> Iterator[tuple[str, str]]:
    for name in LIBRARIES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue


def peak_memory_bytes() -> int:
    """Most memory that the process, or one of those that it started and that have ended, held so far."""
    return 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def peak_gpu_memory_bytes() -> int | None:
    """Most memory of its GPU that the process held so far; None where it used none."""
    cuda = _cuda()
    return int(cuda.max_memory_allocated()) if cuda and cuda.is_initialized() else None


def _cuda() -> Any:  # noqa: ANN401 - torch.cuda
    """Torch's, if this process loaded it: prepare does not, and a report is no reason to."""
    torch = sys.modules.get("torch")
    return None if torch is None else torch.cuda
