"""Products of linear layers with LoRA in FP8: rows of activations and of gradients meet weights of a scale a row.

Each row of W [outputs, inputs] has a scale s that brings it to what FP8 holds. Forward the product's rows are scaled
back by it; backward, where the rows of W are what is summed over, the columns of the gradient take it beforehand, so
that the same numbers in FP8 serve both. An adapter goes along as in `linear.py`, in FP8 as well: B in the scales of W,
but for a factor f where it is the larger one, with f (x Aᵀ) to meet it; backward A in a scale of its own, which the
columns g B take. All of it fits: nothing is clipped.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from finetune_trainer.fast import ops
from finetune_trainer.fast.linear import Linears

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from finetune_trainer.fast.linear import Layer, Scratch

FORWARD, BACKWARD = "forward", "backward"
SMALLEST_SHARE = 1 / 64
"""Of the scales of a layer, of the largest: what is left of it loses no bit, and an adapter meets no row of zeros."""


class NarrowLinears(Linears):
    """Products in FP8. Biases are added in 16 bits.

    Weights of 8 bits move into a buffer of their own, and are views of it from then on; others are brought into FP8 in
    one that layers share, as all are for the backward pass.
    """

    def __init__(self, layers: Sequence[Layer], scale: float, scratch: Scratch) -> None:
        super().__init__(layers, scale, scratch)
        columns = ops.padded(self.inputs + self.ranks), ops.padded(self.outputs + self.ranks)
        self._shapes = {FORWARD: (self.outputs, columns[0]), BACKWARD: (self.inputs, columns[1])}
        self.scales = torch.cat([_scales_of(layer) for layer in layers])
        """Of the rows of the weights [outputs], fp32."""
        self._turn = -1
        self._held = self._move_in() if self.layers[0].form is ops.Form.NARROW else None
        self._ones = self.scales.new_ones(self.inputs)
        self._bias = torch.cat([_bias_of(layer) for layer in layers]) if self._biased else None
        self.first = self.factors = self.first_scales = self.scales.new_empty(0)
        """A of all adapters [ranks, inputs] in 16 bits; f, and the scales of A, of each rank; by `Adapters`."""
        self.seconds: list[Tensor] = []
        """B of each adapter in 16 bits."""

    def multiply(self, x: Tensor, out: Tensor) -> Tensor:
        """Rounded once more where there is a bias."""
        weights, there = self._take(FORWARD)
        if not there:
            if self._held is None:
                for layer, rows, _ in self.parts():
                    ops.shrink(layer.base, self.scales[rows], weights[rows, : self.inputs])
                weights[:, self.inputs :].view(torch.uint8).zero_()  # weights of the backward pass were there
            for second, (rows, ranks) in self._seconds():
                columns = slice(self.inputs + ranks.start, self.inputs + ranks.stop)
                ops.place(second, self.scales[rows], self.factors[ranks], weights[rows, columns])
        narrowed = ops.narrow(x[:, : self.inputs + self.ranks], weights.shape[1], tails=self.factors)
        bias = None if self._bias is None else self._bias.to(out.dtype)
        return ops.multiply_in_float8(*narrowed, weights, self.scales, bias, out)

    def multiply_add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Rounded twice."""
        return self.multiply(x, torch.empty_like(residual)).add_(residual)

    def _first(self, like: Tensor) -> Tensor:  # noqa: ARG002 - in the dtype that was told before
        return self.first

    def _extend_back(self, gradient: Tensor) -> None:
        for second, (rows, ranks) in self._seconds():
            extra = gradient[:, self.outputs + ranks.start : self.outputs + ranks.stop]
            torch.addmm(extra, gradient[:, rows], second, beta=0, alpha=self.scale, out=extra)

    def _multiply_back(self, gradient: Tensor, columns: int) -> Tensor:
        weights, there = self._take(BACKWARD)
        if not there:
            for layer, rows, _ in self.parts():
                ops.shrink(layer.base, self.scales[rows], weights[:, rows], turned=True)
            if self.ranks:
                ops.place(self.first.T, None, self.first_scales, weights[:, self.outputs : self.outputs + self.ranks])
        tails = self.first_scales if columns > self.outputs else None
        narrowed = ops.narrow(gradient[:, :columns], weights.shape[1], heads=self.scales, tails=tails)
        out = gradient.new_empty(len(gradient), self.inputs)
        return ops.multiply_in_float8(*narrowed, weights, self._ones, None, out)

    def _take(self, kind: str) -> tuple[Tensor, bool]:
        """Weights in the shape for a pass, and whether they are there with the adapters as they are now."""
        if kind == FORWARD and self._held is not None:
            there, self._turn = self._turn == self._scratch.turn, self._scratch.turn
            return self._held, there
        rows, columns = self._shapes[kind]
        shared = self._shapes.values() if self._held is None else [self._shapes[BACKWARD]]
        numbers, there = self._scratch.take(self, max(map(math.prod, shared)), ops.FLOAT8, kind)
        return numbers[: rows * columns].view(rows, columns), there

    def _move_in(self) -> Tensor:
        buffer = torch.zeros(self._shapes[FORWARD], dtype=ops.FLOAT8, device=self.device)
        for layer, rows, _ in self.parts():
            view, base = buffer[rows, : self.inputs], layer.base
            ops.rescale(base, self.scales[rows] / base.scales, view, ops.Rescale.DIVIDE)
            base.weight.data, base.scales = view, self.scales[rows]
        return buffer

    def _seconds(self) -> list[tuple[Tensor, tuple[slice, slice]]]:
        """B of each adapter, its rows and its columns."""
        places = [(rows, ranks) for layer, rows, ranks in self.parts() if layer.rank]
        return list(zip(self.seconds, places, strict=True))


class Adapters:
    """The adapters of all layers in 16 bits, and by what they fit into FP8."""

    def __init__(self, linears: Sequence[NarrowLinears], dtype: torch.dtype) -> None:
        """`dtype`: of 16 bits."""
        self._adapted: list[Layer] = []
        self._firsts: list[Tensor] = []
        self._seconds: list[Tensor] = []
        smallest, owners = [], []
        for each in linears:
            each.first = each.scales.new_empty(each.ranks, each.inputs, dtype=dtype)
            for layer, rows, ranks in each.parts():
                if layer.first is not None and layer.second is not None:
                    self._firsts.append(each.first[ranks])
                    each.seconds.append(torch.empty_like(layer.second, dtype=dtype))
                    owners += [len(self._adapted)] * layer.rank
                    self._adapted.append(layer)
                    smallest.append(each.scales[rows].min())
            self._seconds += each.seconds
        self._highest = torch.stack(smallest) * ops.FLOAT8_LARGEST
        """Of each adapter, what B may have at most without a factor."""
        self._owners = torch.tensor(owners, device=self._highest.device)
        self._factors, self._scales = self._highest.new_empty(2, len(owners))
        done = 0
        for each in linears:
            own = slice(done, done + each.ranks)
            each.factors, each.first_scales = self._factors[own], self._scales[own]
            done += each.ranks

    def refresh(self) -> None:
        """Take the adapters as they are now."""
        trained = [each.first for each in self._adapted] + [each.second for each in self._adapted]
        sources = [each.detach() for each in trained if each is not None]
        torch._foreach_copy_(self._firsts + self._seconds, sources)
        peaks = torch._foreach_norm(sources, torch.inf)  # noqa: SLF001 - torch has no other name
        of_first, of_second = torch.stack(list(peaks)).float().chunk(2)
        scales = of_first.clamp(min=ops.TINIEST) / ops.FLOAT8_LARGEST
        torch.index_select(scales, 0, self._owners, out=self._scales)
        torch.index_select((of_second / self._highest).clamp(min=1), 0, self._owners, out=self._factors)


def _scales_of(layer: Layer) -> Tensor:
    """A scale a row [outputs], fp32: its largest number becomes the largest of FP8, or less in a row of small ones.

    Of weights in FP8 those that they have, but for such rows, whose scales grow by powers of 2.
    """
    peaks = ops.peaks(layer.base)
    largest = peaks.max()
    scales = torch.where(largest > 0, peaks.clamp(min=largest * SMALLEST_SHARE), 1.0) / ops.FLOAT8_LARGEST
    if layer.form is not ops.Form.NARROW:
        return scales
    held = layer.base.scales
    return torch.where(peaks > 0, held * torch.exp2((scales / held).log2().ceil().clamp(min=0)), scales)


def _bias_of(layer: Layer) -> Tensor:
    bias: Tensor | None = layer.base.bias
    return torch.zeros(layer.outputs, device=layer.base.weight.device) if bias is None else bias.detach()
