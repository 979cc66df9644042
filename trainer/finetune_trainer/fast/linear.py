"""Linear layers with LoRA that share their input, as one product: the adapter is extra columns of it.

With x the input, W the frozen weights, A and B the adapter and s its scale, the rows [x | s x Aᵀ] times [W | B] are the
layer's output at once, and the gradients [g | s g B] times [W; A] those of its input. Layers with the same input
(query, key and value) lie one below the other, with B in blocks along the diagonal.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from finetune_trainer.fast import ops

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from torch import Tensor

Keep: TypeAlias = "Callable[[torch.nn.Parameter, Tensor], None]"
"""Takes a parameter and its gradient of a micro-batch, in fp32, alone in its memory."""
MULTIPLE = 64
"""Extra columns come in so many: what tensor cores take at once."""


@dataclass(frozen=True)
class Layer:
    """A linear layer, and its adapter if it has one."""

    base: Any
    """torch's Linear, Linear4bit of bitsandbytes, or Float8Linear: weight [outputs, inputs]."""
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

    @property
    def form(self) -> ops.Form:
        """How its weights are held."""
        return ops.form_of(self.base)


class Scratch:
    """Buffers that hold the weights of one layer after another, and the count of forward passes."""

    def __init__(self) -> None:
        self.turn = 0
        """Adapters change between two forward passes: what was placed in an earlier one is stale."""
        self._buffers: dict[Hashable, Tensor] = {}
        self._holds: dict[Hashable, tuple[Linears, str, int]] = {}

    def take(self, owner: Linears, numel: int, dtype: torch.dtype, kind: str = "") -> tuple[Tensor, bool]:
        """A buffer for `owner`, of zeros at first, and whether it still holds what `owner` put there this turn.

        Layers share it that are laid out alike: what is 0 beside the adapters of one is 0 beside those of all. `kind`:
        what of its own it puts there, if not always the same.
        """
        holds = (owner, kind, self.turn)
        if owner.layout not in self._buffers:
            self._buffers[owner.layout] = torch.zeros(numel, dtype=dtype, device=owner.device)
        held = self._holds.get(owner.layout) == holds
        self._holds[owner.layout] = holds
        return self._buffers[owner.layout], held


class Linears(ABC):
    """Layers that share their input, multiplied at once."""

    def __init__(self, layers: Sequence[Layer], scale: float, scratch: Scratch) -> None:
        """`scale`: of all adapters. `scratch`: where weights are brought into the form that a product takes."""
        self.layers, self.scale, self._scratch = list(layers), scale, scratch
        self.inputs = int(layers[0].base.in_features)
        self.outputs = sum(layer.outputs for layer in layers)
        self.ranks = sum(layer.rank for layer in layers)
        self._biased = any(layer.base.bias is not None for layer in layers)
        self.room = -(-(self.ranks + self._biased) // MULTIPLE) * MULTIPLE
        """Of the extra columns."""
        each = ((layer.outputs, layer.rank, layer.base.bias is not None) for layer in layers)
        self.layout: Hashable = (self.inputs, tuple(each))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.layers[0].base.weight.device
        return device

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """A and B of each layer that has them."""
        return [each for layer in self.layers for each in (layer.first, layer.second) if each is not None]

    @property
    def drops(self) -> bool:
        """Whether adapters see an input of which a part was dropped."""
        return any(layer.rank and layer.dropout for layer in self.layers)

    def extend(self, x: Tensor, seeds: Sequence[int]) -> None:
        """Fill the extra columns of `x` [tokens, inputs + room]; seeds of dropout, one a layer."""
        if not self.room:
            return
        inputs, first = x[:, : self.inputs], self._first(x)
        extra = x[:, self.inputs : self.inputs + len(first)]
        if not self.drops:
            torch.addmm(extra, inputs, first.T, beta=0, alpha=self.scale, out=extra)
            return
        extra.zero_()
        for (layer, _, ranks), seed in zip(self.parts(), seeds, strict=True):
            if layer.rank:
                seen, out = _dropped(layer, inputs, seed), extra[:, ranks]
                torch.addmm(out, seen, first[ranks].T, beta=0, alpha=self.scale, out=out)

    @abstractmethod
    def multiply(self, x: Tensor, out: Tensor) -> Tensor:
        """Input [tokens, inputs + room], its extra columns filled, times the weights, into `out` [tokens, outputs]."""

    @abstractmethod
    def multiply_add(self, x: Tensor, residual: Tensor) -> Tensor:
        """The same on top of `residual` [tokens, outputs]."""

    def backward(self, gradient: Tensor, seeds: Sequence[int]) -> Tensor:
        """The gradient of the input [tokens, inputs] from that of the output [tokens, outputs + room].

        Fills the extra columns of `gradient`.
        """
        if self.room:
            self._extend_back(gradient)
        if not self.drops:
            return self._multiply_back(gradient, self.outputs + self.ranks)
        below, first = self._multiply_back(gradient, self.outputs), self._first(gradient)
        for (layer, _, ranks), seed in zip(self.parts(), seeds, strict=True):
            if layer.rank:
                columns = slice(self.outputs + ranks.start, self.outputs + ranks.stop)
                ops.drop(torch.mm(gradient[:, columns], first[ranks]), below, seed, layer.dropout, add=True)
        return below

    def learn(self, gradient: Tensor, x: Tensor, seeds: Sequence[int], keep: Keep) -> None:
        """Give `keep` the gradients of the adapters. `gradient` as `backward` left it, `x` with its extra columns."""
        if not self.ranks:
            return
        above, extra, inputs = gradient[:, : self.outputs], gradient[:, self.outputs :], x[:, : self.inputs]
        shared = None if self.drops else _exact_product(extra.T, inputs)
        second = _exact_product(above.T, x[:, self.inputs :])
        for (layer, rows, ranks), seed in zip(self.parts(), seeds, strict=True):
            if layer.first is not None and layer.second is not None:
                if shared is None:
                    first = _exact_product(extra[:, ranks].T, _dropped(layer, inputs, seed))
                else:
                    first = shared[ranks].clone()
                keep(layer.first, first)
                keep(layer.second, second[rows, ranks].clone())

    def parts(self) -> Iterator[tuple[Layer, slice, slice]]:
        """Each layer with its rows of the output and its columns of the room."""
        row = rank = 0
        for layer in self.layers:
            yield layer, slice(row, row + layer.outputs), slice(rank, rank + layer.rank)
            row, rank = row + layer.outputs, rank + layer.rank

    @abstractmethod
    def _first(self, like: Tensor) -> Tensor:
        """A of all adapters [ranks or more, inputs], in the dtype of `like`."""

    @abstractmethod
    def _extend_back(self, gradient: Tensor) -> None:
        """Fill the extra columns of `gradient` [tokens, outputs + room]."""

    @abstractmethod
    def _multiply_back(self, gradient: Tensor, columns: int) -> Tensor:
        """The first columns of `gradient` times the weights, and the adapters below them."""


class WideLinears(Linears):
    """Products in the dtype of the input.

    W lies in the corner of a buffer, with B in columns beside it and A in rows below. A bias is one more column, which
    meets a 1.
    Weights of 16 bits move into a buffer of their own, and are views of it from then on; those of 4 or 8 bits are
    widened into one that layers share.
    """

    def __init__(self, layers: Sequence[Layer], scale: float, scratch: Scratch) -> None:
        super().__init__(layers, scale, scratch)
        self._turn = -1
        self._held = self._move_in() if self.layers[0].form is ops.Form.WIDE else None

    @property
    def shape(self) -> tuple[int, int]:
        """Of the buffer."""
        return self.outputs + self.room, self.inputs + self.room

    def extend(self, x: Tensor, seeds: Sequence[int]) -> None:
        """With a 1 for biases."""
        super().extend(x, seeds)
        if self._biased:
            x[:, self.inputs + self.ranks].fill_(1.0)

    def multiply(self, x: Tensor, out: Tensor) -> Tensor:
        """Rounded once."""
        return torch.mm(x, self._load(x)[: self.outputs].T, out=out)

    def multiply_add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Rounded once."""
        return torch.addmm(residual, x, self._load(x)[: self.outputs].T)

    def _first(self, like: Tensor) -> Tensor:
        return self._load(like)[self.outputs :, : self.inputs]

    def _extend_back(self, gradient: Tensor) -> None:
        beside = self._load(gradient)[: self.outputs, self.inputs :]
        extra = gradient[:, self.outputs :]
        torch.addmm(extra, gradient[:, : self.outputs], beside, beta=0, alpha=self.scale, out=extra)

    def _multiply_back(self, gradient: Tensor, columns: int) -> Tensor:
        rows = gradient.shape[1] if columns > self.outputs else self.outputs
        return torch.mm(gradient[:, :rows], self._load(gradient)[:rows, : self.inputs])

    def _load(self, like: Tensor) -> Tensor:
        """The buffer, adapters as they are now; what is widened in the dtype of `like`."""
        if self._held is not None:
            if self._turn != self._scratch.turn:
                self._place(self._held)
                self._turn = self._scratch.turn
            return self._held
        numbers, there = self._scratch.take(self, self.shape[0] * self.shape[1], like.dtype)
        buffer = numbers.view(self.shape)
        if not there:
            self._widen(buffer)
        return buffer

    def _widen(self, buffer: Tensor) -> None:
        if self.layers[0].form is ops.Form.NARROW:
            for layer, rows, _ in self.parts():
                ops.rescale(layer.base, layer.base.scales, buffer[rows, : self.inputs], ops.Rescale.MULTIPLY)
            self._place(buffer)
            return
        for layer, rows, ranks in self.parts():
            ops.widen(layer.base, buffer, rows.start, self._beside(layer, rows, ranks))
        self._place_biases(buffer)

    def _move_in(self) -> Tensor:
        weight: Tensor = self.layers[0].base.weight
        buffer = weight.new_zeros(self.shape)
        for layer, rows, _ in self.parts():
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
        for layer, rows, ranks in self.parts():
            if layer.first is not None and layer.second is not None:
                below = self.outputs + ranks.start
                buffer[below : below + layer.rank, : self.inputs] = layer.first.detach()
                buffer[rows, self.inputs + ranks.start : self.inputs + ranks.stop] = layer.second.detach()
        self._place_biases(buffer)

    def _place_biases(self, buffer: Tensor) -> None:
        for layer, rows, _ in self.parts():
            if layer.base.bias is not None:
                buffer[rows, self.inputs + self.ranks] = layer.base.bias.detach()


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
