"""Short rows in one sequence, kept apart: which rows share one, and where that is possible. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from finetune_trainer.config import ObjectiveType, Packing
from finetune_trainer.runtime.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from finetune_trainer.config import JobConfig

SHORTEST_PACKED_RUN_STEPS = 100
"""Packing makes fewer, larger steps: a run that would have fewer than these keeps its many small ones."""

WINDOW_TOKENS = 1 << 24
"""Rows of about so many tokens are packed at a time: 80 MB, and no sequence worth saving is lost at the seams."""

KEEPS_ROWS_APART = frozenset(
    {
        "CohereForCausalLM",
        "GPTBigCodeForCausalLM",
        "GPTNeoXForCausalLM",
        "GemmaForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "GraniteForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "Olmo2ForCausalLM",
        "PhiForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "SmolLM3ForCausalLM",
        "Starcoder2ForCausalLM",
        "GPT2LMHeadModel",
    }
)
"""Classes whose attention sees positions that begin anew as another row (transformers 5.23), each of them tested:
the logits of a packed row are those of the row alone. State-space models, ALiBi and the like carry on over the seam."""


def resolve_packing(config: JobConfig, architecture: str, steps: int) -> bool:
    """Whether rows are packed. `steps`: optimizer steps that a packed run has. InvalidConfig if it cannot be On."""
    check_packing(config, architecture)
    asked = (config.training.packing if config.training else None) or Packing.AUTO
    return asked is Packing.ON or (
        asked is Packing.AUTO
        and architecture in KEEPS_ROWS_APART
        and config.objective_type is ObjectiveType.SFT
        and not _in_file_order(config)
        and steps >= SHORTEST_PACKED_RUN_STEPS
    )


def check_packing(config: JobConfig, architecture: str) -> None:
    """InvalidConfig, with the way out, where packing is On and rows cannot be packed."""
    if config.training is None or config.training.packing is not Packing.ON:
        return
    if architecture not in KEEPS_ROWS_APART:
        msg = f"training.packing On: {architecture} is not known to keep the rows of a sequence apart. "
        raise InvalidConfig(msg + "Set packing to Off, or leave it unset.")
    if _in_file_order(config):
        msg = "training.packing On puts short rows together, wherever they are, but training.shuffle is false. "
        raise InvalidConfig(msg + "Set packing to Off, or leave shuffle unset.")


def _in_file_order(config: JobConfig) -> bool:
    return config.training is not None and config.training.shuffle is False


@dataclass(frozen=True)
class Window:
    """Rows that are packed together, which are in memory at a time."""

    rows: int
    sequences: list[list[int]]
    """Of each sequence its rows, counted within the window."""


def pack_windows(lengths: NDArray[np.integer], capacity: int, datasets: NDArray[np.integer] | None) -> list[Window]:
    """All rows, packed window by window. `datasets`: of each row, where rows of different ones may not be mixed."""
    places = np.cumsum(lengths) // WINDOW_TOKENS
    changes = places[1:] != places[:-1]
    if datasets is not None:
        changes |= datasets[1:] != datasets[:-1]
    parts = np.split(np.asarray(lengths), np.flatnonzero(changes) + 1) if len(lengths) else []
    return [Window(len(part), pack_rows(part.tolist(), capacity)) for part in parts]


def pack_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest row first, each into the fullest sequence that has room (indexes of rows).

    Deterministic; sequences come in the order of their first rows. The algorithm is that of TRL's "bfd" (Ding et al.
    2024, arXiv:2404.10830), which loads all rows, cuts long ones, and knows no other columns (1.16). Rows may not be
    longer than `capacity`.
    """
    sequences: list[list[int]] = []
    with_room: dict[int, list[list[int]]] = {}
    rooms = 0
    """Bit n is set where a sequence has room for just n tokens."""
    for row in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = int(lengths[row])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            sequence = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, sequence = capacity, []
            sequences.append(sequence)
        sequence.append(row)
        if left := room - length:
            with_room.setdefault(left, []).append(sequence)
            rooms |= 1 << left
    return sorted(map(sorted, sequences))
