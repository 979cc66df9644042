"""A model's blocks as memory sees them: which layers share an input, and how wide everything is. Pure.

Read from the names and shapes of the linear layers: layers of one module stand together, the last of them takes what
the module made of the others' results (o_proj, down_proj). What else a block does between them is code, which shapes do
not show, so only architectures that were looked at are known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from finetune_trainer.models.folder import ModelFacts

T = TypeVar("T")

KNOWN = frozenset(
    f"{family}ForCausalLM"
    for family in ("Llama", "Mistral", "Ministral3", "Qwen2", "Qwen3", "SmolLM3", "Granite", "Arcee")
)
"""Architectures whose blocks keep what `activations` counts: `tests/unit/trainer/test_estimate.py` holds each of them
against autograd. Of others (Gemma, Phi, GPT-2 and its kin, experts, recurrent layers) the count would be wrong."""

GATED_ROWS = 2
"""Gate and up projection give twice as many columns as the down projection takes; without a gate it is once."""


@dataclass(frozen=True)
class Layer:
    """One linear layer."""

    name: str
    columns: int
    rows: int

    @property
    def numel(self) -> int:
        """Numbers in its weight."""
        return self.columns * self.rows


@dataclass(frozen=True)
class Module:
    """Linear layers that stand together: of attention, or of an MLP."""

    name: str
    first: tuple[Layer, ...]
    """Those that take the module's input."""
    last: Layer
    """The one that takes what was made of their results."""

    @property
    def attends(self) -> bool:
        """Whether it is attention."""
        return "att" in self.name.rpartition(".")[2].lower()

    @property
    def gated(self) -> bool:
        """Of an MLP: whether one half of the inner values is multiplied with the other."""
        return sum(layer.rows for layer in self.first) >= GATED_ROWS * self.last.columns

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All of them."""
        return (*self.first, self.last)


@dataclass(frozen=True)
class Norm:
    """A layer that normalizes."""

    width: int
    """Of what it normalizes of a token, over all heads."""
    groups: int = 1
    """How many parts of that it normalizes apart: each head, or all at once."""

    @property
    def within(self) -> bool:
        """Whether it stands within attention, where values are as products give them."""
        return self.groups > 1


@dataclass(frozen=True)
class Block:
    """One of the transformer's blocks."""

    name: str
    modules: tuple[Module, ...]
    norms: tuple[Norm, ...]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Its linear layers."""
        return tuple(layer for module in self.modules for layer in module.layers)


def layers_of(model: ModelFacts) -> tuple[Layer, ...]:
    """All linear layers but the output head."""
    return tuple(
        Layer(name, columns, model.linear_rows.get(name, columns)) for name, columns in model.linear_layers.items()
    )


def blocks_of(model: ModelFacts) -> tuple[Block, ...]:
    """The blocks in their order; what stands outside of them is left out."""
    layers = _by_block({layer.name: layer for layer in layers_of(model)})
    norms = _by_block(model.norms)
    return tuple(
        Block(
            name,
            tuple(_modules(list(own.values()))),
            tuple(_build_norm(full, width, own) for full, width in norms.get(name, {}).items()),
        )
        for name, own in layers.items()
    )


def _by_block(named: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """What stands in blocks, by the name of its block: `model.layers.3` of `model.layers.3.mlp.up_proj`."""
    found: dict[str, dict[str, T]] = {}
    for full, each in named.items():
        if (block := re.match(r"(.*?\.\d+)\.", full)) is not None:
            found.setdefault(block[1], {})[full] = each
    return found


def _modules(layers: list[Layer]) -> Iterator[Module]:
    """Layers by the module that they stand in."""
    for name, found in groupby(layers, key=lambda layer: layer.name.rpartition(".")[0]):
        *first, last = found
        yield Module(name, tuple(first), last)


def _build_norm(name: str, width: int, layers: Mapping[str, Layer]) -> Norm:
    """One within the heads (Qwen3's q_norm) normalizes what the projection of its name gives, head by head."""
    projection = layers.get(name.removesuffix("_norm") + "_proj")
    whole = width if projection is None else projection.rows
    return Norm(whole, whole // width)
