"""Host memory for what a GPU can do without for a while: what blocks keep for the backward pass, and the embedding.

On a GPU copies have a stream of their own beside the one that computes, and the CPU waits for none. GPU memory is the
computing stream's: what leaves is held until that stream waits for its copy, and what comes back is read after it did.
Host memory is the copies' own, which are made in turn: a place is free for the next tensor as soon as the copy out of
it was asked for. Elsewhere copies are plain ones.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from finetune_trainer.fast import ops

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

PLACE_BYTES = 8 * 2**20
"""Places are of one size, so that rows of any length find them: a tensor lies in as many as it takes."""


@dataclass(frozen=True)
class Sent:
    """A tensor in host memory."""

    like: Tensor
    """On the meta device."""
    places: list[Tensor]


class Host:
    """Takes tensors of a device, and gives them back."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._free: list[Tensor] = []
        self._leaving: list[Tensor] = []
        self._copying = False
        """Whether there are copies that nobody waits for yet."""

    def send(self, tensor: Tensor) -> Sent:
        """Begin to copy a tensor there. It is held until it is settled."""
        tensor = tensor.contiguous()
        pieces = _pieces(tensor)
        places = [self._free.pop() if self._free else self._make_place() for _ in pieces]
        with self._beside():
            for place, piece in zip(places, pieces, strict=True):
                place[: len(piece)].copy_(piece, non_blocking=True)
        self._leaving.append(tensor)
        return Sent(torch.empty_like(tensor, device="meta"), places)

    def fetch(self, sent: Sent) -> Tensor:
        """Begin to copy it back, into a tensor that is not to be read before it is settled."""
        tensor = torch.empty_like(sent.like, device=self._device)
        with self._beside():
            for place, piece in zip(sent.places, _pieces(tensor), strict=True):
                piece.copy_(place[: len(piece)], non_blocking=True)
        self._free += sent.places
        return tensor

    def settle(self) -> None:
        """What is computed from now on waits for all copies so far: what was sent may go, what was fetched is there.

        Without any it waits for nobody: a pass that is recorded can only wait for what is recorded with it.
        """
        if self._stream is not None and self._copying:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._copying = False
        self._leaving.clear()

    def _make_place(self) -> Tensor:
        return torch.empty(PLACE_BYTES, dtype=torch.uint8, pin_memory=self._stream is not None)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Copies within come after all that was computed so far, and beside what is computed next."""
        self._copying = True
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor.view(-1).view(torch.uint8), PLACE_BYTES)


class HostEmbedding(torch.nn.Module):
    """A frozen embedding in host memory: rows are gathered from there to where the ids are.

    The weight is a buffer, as a model is taken to be on the device of its parameters, and stays where it is, wherever
    the model is moved.
    """

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        """`weight` [words, width] is copied; pinned if it comes from a GPU."""
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        held = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=weight.is_cuda)
        self.register_buffer("weight", held.copy_(weight))

    def forward(self, ids: Tensor) -> Tensor:
        """[..., width] of ids [...]."""
        return ops.gather(self.weight, ids)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HostEmbedding:  # noqa: ARG002 - torch's signature
        return self


def move_embedding(causal: Any) -> None:  # noqa: ANN401 - a causal language model of transformers
    """Have the embedding of a causal language model lie in host memory, if it does nothing but look up.

    One that is the head as well, or trains, stays.
    """
    body = causal.model
    embedding = body.embed_tokens
    if embedding.weight is not causal.lm_head.weight and not embedding.weight.requires_grad:
        body.embed_tokens = HostEmbedding(embedding.weight.detach())
