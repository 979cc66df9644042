"""Passes of shapes that come again, recorded as CUDA graphs: one launch in place of thousands.

With a small model or a small micro-batch, a GPU would wait for Python most of the time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from torch import Tensor

log = logging.getLogger(__name__)

T = TypeVar("T")

Outcome: TypeAlias = "tuple[Tensor, list[Tensor]]"
"""A loss, and gradients of all that trains."""
Take: TypeAlias = "Callable[[Mapping[str, Any]], Outcome]"
"""What comes of inputs."""
MOST = 32
"""Shapes that are recorded, the first that come again: to record a pass takes longer than to take it."""
CHANCES = 3
"""Times that recordings may be in the way, until there are none any more."""


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Any]
    """Those that it reads, on the GPU in places of their own."""


class Recorder:
    """Takes passes; those whose shapes were seen before from a recording, whose bits are the same."""

    def __init__(self, trained: Sequence[Tensor], *, on: bool) -> None:
        """`trained`: what passes give gradients of. `on`: whether anything is recorded."""
        self._trained, self._on = trained, on
        self._seen: set[Hashable] = set()
        self._recorded: dict[Hashable, _Recorded] = {}
        self._chances = CHANCES
        self._pool: Any = None
        self._results: list[Tensor] = []
        """Where all recordings leave loss and gradients."""

    def take(self, take: Take, inputs: Mapping[str, Any]) -> Outcome:
        """Loss and gradients of inputs, tensors and plain values; valid until the next pass."""
        if not self._on:
            return take(inputs)
        key = (_shape_of(inputs), tuple(each.data_ptr() for each in self._trained))  # where a recording reads them
        if key not in self._recorded and key in self._seen and len(self._recorded) < MOST:
            self._record(take, key, inputs)
        if key in self._recorded:
            return self._replay(key, inputs)
        self._seen.add(key)
        return self.beside(partial(take, inputs))

    def beside(self, work: Callable[[], T]) -> T:
        """What other work on the GPU gives; where its memory does not suffice, begun anew without the recordings.

        They keep their memory from one pass to the next, which torch's allocator does not take back from them.
        """
        try:
            return work()
        except torch.OutOfMemoryError:
            if not self._recorded:
                raise
            log.info("recorded passes are let go: the GPU has too little memory beside them")
        self._let_go()
        self._chances -= 1
        self._on = self._chances > 0
        return work()

    def _record(self, take: Take, key: Hashable, inputs: Mapping[str, Any]) -> None:
        if not self._recorded:
            log.info("passes whose shapes come again are recorded as CUDA graphs")
        own = {name: each.clone() if isinstance(each, torch.Tensor) else each for name, each in inputs.items()}
        if not self._results:
            self._results = [own["count"].new_empty((), dtype=torch.float32), *map(torch.empty_like, self._trained)]
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                loss, gradients = take(own)
                torch._foreach_copy_(self._results, [loss, *gradients])
                del loss, gradients
        except RuntimeError as error:
            log.warning("passes are not recorded: %s", error)
            self._on = False
            self._let_go()
            return
        self._recorded[key] = _Recorded(graph, own)

    def _replay(self, key: Hashable, inputs: Mapping[str, Any]) -> Outcome:
        recorded = self._recorded[key]
        for name, each in recorded.inputs.items():
            if isinstance(each, torch.Tensor):
                each.copy_(inputs[name])
        recorded.graph.replay()
        return self._results[0].clone(), self._results[1:]

    def _let_go(self) -> None:
        self._recorded.clear()
        self._pool, self._results = None, []
        torch.cuda.empty_cache()


def _shape_of(inputs: Mapping[str, Any]) -> Hashable:
    return tuple((name, tuple(each.shape) if isinstance(each, torch.Tensor) else each) for name, each in inputs.items())
