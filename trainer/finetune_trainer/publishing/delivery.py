"""A parcel brought to its place: what is there already is not sent again, what others see comes last.

prepare   what an earlier publishing left, and this one has not, is taken away
send      every file but the marker, four at a time, each proven at the other end
commit    the marker, behind the fence: the place is complete from then on, or is not
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, TypeVar

from finetune_trainer.publishing.base import Feed, Watch
from finetune_trainer.runtime.errors import Unavailable
from finetune_trainer.sources.base import Changed

if TYPE_CHECKING:
    from collections.abc import Callable

    from finetune_trainer.publishing.base import Outgoing, Parcel, Sink
    from finetune_trainer.runtime.context import Context

    T = TypeVar("T")

log = logging.getLogger(__name__)

PARALLEL_FILES = 4
RETRY_PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0)
"""Before each further try of what did not get a byte further."""


def deliver(sink: Sink, parcel: Parcel, context: Context) -> str:
    """Bring everything there; the address with what pins it.

    AccessDenied, NotFound, InvalidConfig, VerificationFailed, Interrupted; anything else is worth another try, which
    goes on from what is there.
    """
    context.report.begin(f"publishing to {sink.where}", parcel.size_bytes, "bytes")
    watch = Watch(context)
    _tried(lambda: sink.prepare(parcel), watch)
    _send_all(sink, parcel, watch)
    watch.look()
    with context.committing():
        address = _tried(lambda: sink.commit(parcel), watch)
    context.report.update(done=parcel.size_bytes)
    return address


def _send_all(sink: Sink, parcel: Parcel, watch: Watch) -> None:
    with ThreadPoolExecutor(PARALLEL_FILES, thread_name_prefix="publish") as pool:
        jobs = [pool.submit(_send, sink, file, watch) for file in parcel.files]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            watch.abandoned.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _send(sink: Sink, file: Outgoing, watch: Watch) -> None:
    """One file, unless it is there."""
    with Feed(file, watch) as feed:

        def once() -> None:
            if sink.has(file, feed):
                log.info("%s: %s is there already", sink.where, file.name)
            else:
                sink.send(file, feed)

        _tried(once, watch, lambda: feed.reached)
        feed.finish()


def _tried(action: Callable[[], T], watch: Watch, reached: Callable[[], int] = lambda: 0) -> T:
    """Do it, again while the other side breaks off or changes: for ever where it gets further, else a few times."""
    pauses = iter(RETRY_PAUSES_SECONDS)
    while True:
        watch.look()
        before = reached()
        try:
            return action()
        except (Unavailable, Changed) as error:
            if reached() > before:
                pauses = iter(RETRY_PAUSES_SECONDS)
            if (pause := next(pauses, None)) is None:
                raise
            log.warning("%s Trying again.", error)
            watch.context.stopping.wait(pause)
