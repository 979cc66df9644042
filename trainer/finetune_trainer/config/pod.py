"""What of a pod the trainer itself has to know."""

from __future__ import annotations

from pydantic import Field

from finetune_trainer.config.base import Model

GPU_MEMORY_PATTERN = r"^[0-9]{1,6}(\.[0-9]{1,3})?(Mi|Gi|M|G)$"
UNITS = {"Mi": 2**20, "Gi": 2**30, "M": 10**6, "G": 10**9}


class Pod(Model):
    """What a stage runs on."""

    gpu_memory: str | None = Field(
        default=None,
        max_length=16,
        pattern=GPU_MEMORY_PATTERN,
        description="Memory of one GPU as nvidia-smi tells it, e.g. 24Gi or 81559Mi. What training needs is held "
        "against it before a GPU is taken; micro-batch and checkpointing that are unset are chosen to fill it. "
        "Default: not known.",
    )

    @property
    def gpu_memory_bytes(self) -> int | None:
        """The same in bytes."""
        if self.gpu_memory is None:
            return None
        unit = self.gpu_memory.lstrip("0123456789.")
        return int(float(self.gpu_memory.removesuffix(unit)) * UNITS[unit])
