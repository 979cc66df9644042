"""Passes of shapes that come again, recorded as CUDA graphs: one launch in place of thousands.

With a small model or a small micro-batch, a GPU would wait for Python most of the time.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from torch import Tensor

log = logging.getLogger(__name__)

Outcome: TypeAlias = "tuple[Tensor, list[Tensor]]"
"""A loss, and gradients of all that trains."""
MOST = 32
"""Shapes that are recorded at a time."""
SPARE = 1.1
"""Bytes that must be free for a pass that is not recorded, by those that recorded ones hold."""


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Any]
    """Those that it reads, on the GPU in places of their own."""


class Recorder:
    """Takes passes; those whose shapes were seen before from a recording, whose bits are the same."""

    def __init__(self, take: Callable[[Mapping[str, Any]], Outcome], trained: Sequence[Tensor], *, on: bool) -> None:
        """`take`: a pass, whose inputs are tensors and plain values. `on`: whether anything is recorded."""
        self._take, self._trained, self._on = take, trained, on
        self._seen: set[Hashable] = set()
        self._recorded: OrderedDict[Hashable, _Recorded] = OrderedDict()
        self._pool: Any = None
        self._results: list[Tensor] = []
        """Where all recordings leave loss and gradients."""

    def __call__(self, inputs: Mapping[str, Any]) -> Outcome:
        """Loss and gradients; valid until the next pass."""
        if not self._on:
            return self._take(inputs)
        key = _shape_of(inputs)
        if key not in self._recorded and key in self._seen:
            self._record(key, inputs)
        if key in self._recorded:
            return self._replay(key, inputs)
        self._seen.add(key)
        self.make_way()
        return self._take(inputs)

    def make_way(self) -> None:
        """Where little memory is left beside what recordings hold, they are gone for good."""
        if self._recorded and self._held_bytes() * SPARE > _free_bytes():
            log.info("recorded passes are let go: the GPU has too little memory beside them")
            self._stop()

    def _record(self, key: Hashable, inputs: Mapping[str, Any]) -> None:
        if not self._recorded:
            log.info("passes whose shapes come again are recorded as CUDA graphs")
        own = {name: each.clone() if isinstance(each, torch.Tensor) else each for name, each in inputs.items()}
        if not self._results:
            self._results = [own["count"].new_empty((), dtype=torch.float32), *map(torch.empty_like, self._trained)]
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                loss, gradients = self._take(own)
                torch._foreach_copy_(self._results, [loss, *gradients])
                del loss, gradients
        except RuntimeError as error:
            log.warning("passes are not recorded: %s", error)
            self._stop()
            return
        self._recorded[key] = _Recorded(graph, own)
        if len(self._recorded) > MOST:
            self._recorded.popitem(last=False)

    def _replay(self, key: Hashable, inputs: Mapping[str, Any]) -> Outcome:
        self._recorded.move_to_end(key)
        recorded = self._recorded[key]
        for name, each in recorded.inputs.items():
            if isinstance(each, torch.Tensor):
                each.copy_(inputs[name])
        recorded.graph.replay()
        return self._results[0].clone(), self._results[1:]

    def _stop(self) -> None:
        self._on = False
        self._recorded.clear()
        self._pool, self._results = None, []
        torch.cuda.empty_cache()

    def _held_bytes(self) -> int:
        pool = tuple(self._pool)
        segments: list[dict[str, Any]] = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        return sum(each["total_size"] for each in segments if tuple(each["segment_pool_id"]) == pool)


def _shape_of(inputs: Mapping[str, Any]) -> Hashable:
    return tuple((name, tuple(each.shape) if isinstance(each, torch.Tensor) else each) for name, each in inputs.items())


def _free_bytes() -> int:
    """Of the GPU, and what torch holds for later of its own."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
