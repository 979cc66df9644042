"""Models of random weights that no disk ever holds: transformers loads them as if they came from files.

A weight is drawn on its device at the moment at which the loader asks for it, from a seed of its own: the same model
in every process, quantized weight by weight as a checkpoint would be.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

DEVIATION = 0.02


@dataclass(frozen=True)
class DrawnWeight:
    """What stands in a state dict for a weight; the loader (transformers 5.23) slices it once, as it does files."""

    name: str
    shape: torch.Size
    seed: int
    device: torch.device

    def __getitem__(self, _: object) -> torch.Tensor:
        """All of it, in bf16: ones for a norm, else normal."""
        if len(self.shape) == 1:
            return torch.ones(self.shape, dtype=torch.bfloat16, device=self.device)
        own = torch.Generator(self.device).manual_seed(self.seed + zlib.crc32(self.name.encode()))
        weight = torch.randn(self.shape, generator=own, dtype=torch.bfloat16, device=self.device)
        return weight.mul_(DEVIATION)


def load_drawn(seed: int, folder: Path, dtype: torch.dtype, places: Mapping[str, torch.device], **options: Any) -> Any:  # noqa: ANN401 - from_pretrained's options, a Llama
    """The Llama of a folder that holds its config alone; but for the seed as `models.loading.load_placed`."""
    config = LlamaConfig.from_pretrained(folder)
    with torch.device("meta"):
        names = {name: weight.shape for name, weight in LlamaForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        del names["lm_head.weight"]
    weights = {name: DrawnWeight(name, shape, seed, places[""]) for name, shape in names.items()}
    model: Any = LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, device_map=dict(places), **options
    )
    return model.eval()
