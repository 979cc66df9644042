"""Linear layers with LoRA that share their input, as one product: the adapter is extra columns of it.

With x the input, W the frozen weights, A and B the adapter and s its scale, the rows [x | s x Aᵀ] times [W | B] are the
layer's output at once, and the gradients [g | s g B] times [W; A] those of its input. So W lies in the corner of a
buffer that has B in columns beside it and A in rows below. Layers with the same input (query, key and value) lie one
below the other, with B in blocks along the diagonal. A bias is one more column, which meets a 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from finetune_trainer.fast import ops

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

Keep: TypeAlias = "Callable[[torch.nn.Parameter, Tensor], None]"
"""Takes a parameter and its gradient of a micro-batch, in fp32, alone in its memory."""
Layout: TypeAlias = "tuple[int, tuple[tuple[int, int, bool], ...]]"
"""Inputs, and of each layer its outputs, its rank and whether it has a bias."""
MULTIPLE = 64
"""Extra columns come in so many: what tensor cores take at once."""


@dataclass(frozen=True)
class Layer:
    """A linear layer, and its adapter if it has one."""

    base: Any
    """torch's Linear, or Linear4bit of bitsandbytes: weight [outputs, inputs]."""
    first: torch.nn.Parameter | None = None
    """A [rank, inputs]."""
    second: torch.nn.Parameter | None = None
    """B [outputs, rank]."""
    dropout: float = 0.0

    @property
    def rank(self) -> int:
        """Of the adapter; 0 without one."""
        return 0 if self.first is None else len(self.first)

    @property
    def outputs(self) -> int:
        """Width of what it gives."""
        return int(self.base.out_features)


class Scratch:
    """Buffers that hold the weights of one layer after another, and the count of forward passes."""

    def __init__(self) -> None:
        self.turn = 0
        """Adapters change between two forward passes: what was placed in an earlier one is stale."""
        self._buffers: dict[Layout, Tensor] = {}
        self._owners: dict[Layout, Linears] = {}

    def take(self, owner: Linears, like: Tensor) -> tuple[Tensor, bool]:
        """A buffer for `owner`, of zeros at first, and whether it still holds what `owner` put there.

        Layers share it that are laid out alike: what is 0 beside the adapters of one is 0 beside those of all.
        """
        if owner.layout not in self._buffers:
            self._buffers[owner.layout] = like.new_zeros(owner.shape)
        held = self._owners.get(owner.layout) is owner
        self._owners[owner.layout] = owner
        return self._buffers[owner.layout], held


class Linears:
    """Layers that share their input, multiplied at once."""

    def __init__(self, layers: Sequence[Layer], scale: float, scratch: Scratch, *, float8: bool = False) -> None:
        """`scale`: of all adapters. `scratch`: where layers of 4 bits are widened. `float8`: products are in FP8.

        Weights of 16 bits move into a buffer of their own, and are views of it from then on.
        """
        self.layers, self.scale, self._float8 = list(layers), scale, float8
        self.inputs = int(layers[0].base.in_features)
        self.outputs = sum(layer.outputs for layer in layers)
        self._ranks = sum(layer.rank for layer in layers)
        self._biased = any(layer.base.bias is not None for layer in layers)
        self.room = -(-(self._ranks + self._biased) // MULTIPLE) * MULTIPLE
        self.shape = (self.outputs + self.room, self.inputs + self.room)
        """Of the buffer."""
        each = ((layer.outputs, layer.rank, layer.base.bias is not None) for layer in layers)
        self.layout: Layout = (self.inputs, tuple(each))
        self._packed = hasattr(layers[0].base.weight, "quant_state")
        self._scratch, self._turn = scratch, -1
        self._held = None if self._packed else self._move_in()

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """A and B of each layer that has them."""
        return [each for layer in self.layers for each in (layer.first, layer.second) if each is not None]

    @property
    def drops(self) -> bool:
        """Whether adapters see an input of which a part was dropped."""
        return any(layer.rank and layer.dropout for layer in self.layers)

    def load(self, like: Tensor) -> Tensor:
        """The buffer [outputs + room, inputs + room], adapters as they are now; of 4 bits in the dtype of `like`."""
        buffer, current = self._held, self._turn == self._scratch.turn
        self._turn = self._scratch.turn
        if buffer is not None:
            if not current:
                self._place(buffer)
            return buffer
        buffer, there = self._scratch.take(self, like)
        if not (current and there):
            for layer, rows, ranks in self._parts():
                ops.widen(layer.base, buffer, rows.start, self._beside(layer, rows, ranks))
            self._place_biases(buffer)
        return buffer

    def extend(self, buffer: Tensor, x: Tensor, seeds: Sequence[int]) -> None:
        """Fill the extra columns of `x` [tokens, inputs + room]; seeds of dropout, one a layer."""
        if not self.room:
            return
        inputs, extra = x[:, : self.inputs], x[:, self.inputs :]
        below = buffer[self.outputs :, : self.inputs]
        if not self.drops:
            torch.addmm(extra, inputs, below.T, beta=0, alpha=self.scale, out=extra)
        else:
            extra.zero_()
            for (layer, _, ranks), seed in zip(self._parts(), seeds, strict=True):
                if layer.rank:
                    seen, out = _dropped(layer, inputs, seed), extra[:, ranks]
                    torch.addmm(out, seen, below[ranks].T, beta=0, alpha=self.scale, out=out)
        if self._biased:
            extra[:, self._ranks].fill_(1.0)

    def multiply(self, buffer: Tensor, x: Tensor, out: Tensor) -> Tensor:
        """Input [tokens, inputs + room], its extra columns filled, times the weights, into `out` [tokens, outputs]."""
        weights = buffer[: self.outputs]
        if not self._float8:
            return torch.mm(x, weights.T, out=out)
        used = self.inputs + self._ranks
        bias = weights[:, used].contiguous() if self._biased else None
        return ops.multiply_in_float8(x[:, :used], weights[:, :used], bias, out)

    def multiply_add(self, buffer: Tensor, x: Tensor, residual: Tensor) -> Tensor:
        """The same on top of `residual` [tokens, outputs], rounded once, in FP8 twice."""
        if self._float8:
            return self.multiply(buffer, x, torch.empty_like(residual)).add_(residual)
        return torch.addmm(residual, x, buffer[: self.outputs].T)

    def backward(self, buffer: Tensor, gradient: Tensor, seeds: Sequence[int]) -> Tensor:
        """The gradient of the input [tokens, inputs] from that of the output [tokens, outputs + room].

        Fills the extra columns of `gradient`.
        """
        above, extra = gradient[:, : self.outputs], gradient[:, self.outputs :]
        if self.room:
            beside = buffer[: self.outputs, self.inputs :]
            torch.addmm(extra, above, beside, beta=0, alpha=self.scale, out=extra)
        if not self.drops:
            return self._multiply_back(gradient, buffer[:, : self.inputs])
        below = self._multiply_back(above, buffer[: self.outputs, : self.inputs])
        for (layer, _, ranks), seed in zip(self._parts(), seeds, strict=True):
            if layer.rank:
                rows = slice(self.outputs + ranks.start, self.outputs + ranks.stop)
                through = torch.mm(extra[:, ranks], buffer[rows, : self.inputs])
                ops.drop(through, below, seed, layer.dropout, add=True)
        return below

    def learn(self, gradient: Tensor, x: Tensor, seeds: Sequence[int], keep: Keep) -> None:
        """Give `keep` the gradients of the adapters. `gradient` as `backward` left it, `x` with its extra columns."""
        if not self._ranks:
            return
        above, extra, inputs = gradient[:, : self.outputs], gradient[:, self.outputs :], x[:, : self.inputs]
        shared = None if self.drops else _exact_product(extra.T, inputs)
        second = _exact_product(above.T, x[:, self.inputs :])
        for (layer, rows, ranks), seed in zip(self._parts(), seeds, strict=True):
            if layer.first is not None and layer.second is not None:
                if shared is None:
                    first = _exact_product(extra[:, ranks].T, _dropped(layer, inputs, seed))
                else:
                    first = shared[ranks].clone()
                keep(layer.first, first)
                keep(layer.second, second[rows, ranks].clone())

    def _multiply_back(self, gradient: Tensor, weights: Tensor) -> Tensor:
        if not self._float8:
            return torch.mm(gradient, weights)
        used = min(self.outputs + self._ranks, len(weights))
        out = gradient.new_empty(len(gradient), self.inputs)
        return ops.multiply_in_float8(gradient[:, :used], weights[:used].T, None, out)

    def _parts(self) -> Iterator[tuple[Layer, slice, slice]]:
        """Each layer with its rows of the output and its columns of the room."""
        row = rank = 0
        for layer in self.layers:
            yield layer, slice(row, row + layer.outputs), slice(rank, rank + layer.rank)
            row, rank = row + layer.outputs, rank + layer.rank

    def _move_in(self) -> Tensor:
        weight: Tensor = self.layers[0].base.weight
        buffer = weight.new_zeros(self.shape)
        for layer, rows, _ in self._parts():
            view = buffer[rows, : self.inputs]
            layer.base.weight.data = view.copy_(layer.base.weight.data)
        return buffer

    def _beside(self, layer: Layer, rows: slice, ranks: slice) -> ops.Beside | None:
        if layer.first is None or layer.second is None:
            return None
        below = self.outputs + ranks.start - rows.start
        return ops.Beside(layer.first.detach(), layer.second.detach(), self.inputs + ranks.start, below)

    def _place(self, buffer: Tensor) -> None:
        """Adapters and biases into the buffer; what is 0 beside them stays so."""
        for layer, rows, ranks in self._parts():
            if layer.first is not None and layer.second is not None:
                below = self.outputs + ranks.start
                buffer[below : below + layer.rank, : self.inputs] = layer.first.detach()
                buffer[rows, self.inputs + ranks.start : self.inputs + ranks.stop] = layer.second.detach()
        self._place_biases(buffer)

    def _place_biases(self, buffer: Tensor) -> None:
        for layer, rows, _ in self._parts():
            if layer.base.bias is not None:
                buffer[rows, self.inputs + self._ranks] = layer.base.bias.detach()


def _dropped(layer: Layer, inputs: Tensor, seed: int) -> Tensor:
    if not layer.dropout:
        return inputs
    out = torch.empty(inputs.shape, dtype=inputs.dtype, device=inputs.device)
    ops.drop(inputs, out, seed, layer.dropout)
    return out


def _exact_product(left: Tensor, right: Tensor) -> Tensor:
    """In fp32, without rounding to 16 bits in between."""
    if left.is_cuda and left.dtype is not torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right)
