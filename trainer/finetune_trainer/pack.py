"""Short rows in one sequence, kept apart: which rows share one, and where that is possible. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune_trainer.config import ObjectiveType, Packing
from finetune_trainer.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune_trainer.config import JobConfig

SHORTEST_PACKED_RUN_STEPS = 100
"""Packing makes fewer, larger steps: a run that would have fewer than these keeps its many small ones."""

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
    training = config.training
    asked = (training.packing if training else None) or Packing.AUTO
    in_file_order = training is not None and training.shuffle is False
    if asked is Packing.ON:
        check_packing(architecture, in_file_order=in_file_order)
        return True
    return (
        asked is Packing.AUTO
        and architecture in KEEPS_ROWS_APART
        and config.objective_type is ObjectiveType.SFT
        and not in_file_order
        and steps >= SHORTEST_PACKED_RUN_STEPS
    )


def check_packing(architecture: str, *, in_file_order: bool) -> None:
    """InvalidConfig, with the way out, where rows cannot be packed."""
    if architecture not in KEEPS_ROWS_APART:
        msg = f"training.packing On: {architecture} is not known to keep the rows of a sequence apart. "
        raise InvalidConfig(msg + "Set packing to Off, or leave it unset.")
    if in_file_order:
        msg = "training.packing On puts short rows together, wherever they are, but training.shuffle is false. "
        raise InvalidConfig(msg + "Set packing to Off, or leave shuffle unset.")


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
