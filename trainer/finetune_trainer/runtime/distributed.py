"""Several processes of one stage: who is who, deciding together, failing together.

With one process every function here is its argument's own: nothing is asked of anybody. With several, rank 0 reports,
publishes and decides; what it decides is broadcast, and what fails on one rank ends all of them with the same reason.

Talk between ranks goes over gloo and host memory, also on GPUs: it is small, and it waits for no kernel.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from finetune_trainer.runtime.errors import PeerLost, TrainerError, translate
from finetune_trainer.runtime.rendezvous import PATIENCE_SECONDS, Place, Watch, meet, told_lost
from finetune_trainer.runtime.wording import first_line

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")

_alone = False
"""Whether rank 0 works while the others wait: there is nobody to ask then."""

COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""Rank 0 hashes and saves while the others wait; NCCL's own 10 minutes end a large save half way."""
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
LOST_WORDS = ("gloo/transport", "connection closed by peer", "connection reset by peer", "socketaborted")
"""How gloo words that a peer is gone; what is of torch's DistError needs no words."""


# Who is who


def rank() -> int:
    """This process's rank, as torchrun sets it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes in all, as torchrun sets it; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Which of the node's processes this is, and which of its GPUs it uses."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def leads() -> bool:
    """Whether this process is the one that reports, publishes and decides."""
    return rank() == 0


# Being together


@contextmanager
def joined(
    device: str, attempt: int, stopping: threading.Event, leave: Callable[[TrainerError], None]
) -> Iterator[None]:
    """Meet the other ranks, and part from them in order; with one process, nothing.

    `device`: cpu or cuda. `leave(error)` must end the process at once: it is called from another thread when a peer
    is lost and this process does not notice. What the body raises is told to the others. What it raises because a
    peer was lost becomes that peer's own reason, or PeerLost.
    """
    if world_size() == 1:
        yield
        return
    import torch.distributed as dist  # noqa: PLC0415 - slow

    place = Place.from_environment(attempt)
    store = meet(place, stopping)
    _form_group(device, store)
    watch = Watch(place, leave)
    try:
        yield
    except BaseException as error:
        lost = _explained(error, watch)
        watch.stop()
        if lost is None:
            raise
        raise lost from error
    watch.stop()
    barrier()
    dist.destroy_process_group()


def _form_group(device: str, store: Any) -> None:  # noqa: ANN401 - a TCPStore
    import torch  # noqa: PLC0415 - slow
    import torch.distributed as dist  # noqa: PLC0415 - slow

    if device == "cuda":
        torch.cuda.set_device(local_rank())
    dist.init_process_group(
        BACKENDS[device],
        store=dist.PrefixStore("group", store),  # type: ignore[attr-defined]
        rank=rank(),
        world_size=world_size(),
        timeout=COLLECTIVE_TIMEOUT,
    )


def _explained(error: BaseException, watch: Watch) -> TrainerError | None:
    """Why the body failed, if it was another rank's fault; else the others are told of it."""
    if is_lost_peer(error):
        return watch.heard(PATIENCE_SECONDS) or PeerLost(told_lost(first_line(error)))
    known = translate(error)
    watch.tell(known, str(known) if known else f"{type(error).__name__}: {error}")
    return None


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because a peer is gone."""
    from torch.distributed import DistError  # noqa: PLC0415 - slow

    if isinstance(error, DistError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in LOST_WORDS)


# Deciding together. All ranks must call these, in the same order.


def barrier() -> None:
    """Wait for all."""
    any_of(flag=False)


def any_of(flag: bool) -> bool:
    """Whether any rank says so: all of them know the same."""
    return total([float(flag)])[0] > 0


def total(values: Sequence[float]) -> list[float]:
    """Sums over the ranks, in float64; the same on all of them."""
    if world_size() == 1 or _alone:
        return list(values)
    import torch  # noqa: PLC0415 - slow
    import torch.distributed as dist  # noqa: PLC0415 - slow

    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    found: list[float] = sums.tolist()
    return found


def lead(work: Callable[[], T]) -> T:
    """What rank 0's `work` returns or raises, on all ranks. The others only wait: within it rank 0 is alone."""
    if world_size() == 1 or _alone:
        return work()
    import torch  # noqa: PLC0415 - slow
    import torch.distributed as dist  # noqa: PLC0415 - slow

    outcome: list[tuple[T | None, TrainerError | None]] = [(None, None)]
    if leads():
        with _by_itself():
            outcome = [_tried(work)]
    dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
    value, error = outcome[0]
    if error is not None:
        raise error
    return value  # type: ignore[return-value]  # what rank 0 found


@contextmanager
def _by_itself() -> Iterator[None]:
    global _alone  # noqa: PLW0603 - of the process, as its rank is
    _alone = True
    try:
        yield
    finally:
        _alone = False


def together(work: Callable[[], T]) -> T:
    """What each rank's own `work` returns; if any raises, all raise the first such rank's error.

    The work of one rank must not wait for another's: whoever failed would be waited for.
    """
    if world_size() == 1:
        return work()
    import torch.distributed as dist  # noqa: PLC0415 - slow

    value, error = _tried(work)
    errors: list[TrainerError | None] = [None] * world_size()
    dist.all_gather_object(errors, error)
    if (first := next((each for each in errors if each is not None), None)) is not None:
        raise first
    return value  # type: ignore[return-value]  # the work was done


def _tried(work: Callable[[], T]) -> tuple[T | None, TrainerError | None]:
    """The outcome in a form that travels: errors as those of our tree, which are a class and a sentence."""
    try:
        return work(), None
    except Exception as error:
        if (known := translate(error)) is None:
            raise
        return None, type(known)(str(known))
