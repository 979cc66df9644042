"""What goes out, and what every place gives that takes it."""

from __future__ import annotations

import io
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from pydantic import ValidationError

from finetune_trainer.runtime import fence
from finetune_trainer.runtime.errors import Interrupted
from finetune_trainer.runtime.manifest import MANIFEST_NAME, FileEntry, Manifest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from finetune_trainer.runtime.context import Context
    from finetune_trainer.sources.base import Hasher, Remote, RemoteFile

CHUNK_BYTES = 1 << 20
LOOK_EVERY_BYTES = 16 << 20
"""Of what leaves: how often a look is taken whether a newer attempt has begun, which is a file read."""


@dataclass(frozen=True)
class Outgoing:
    """One file to be put at a place."""

    path: Path
    entry: FileEntry

    @property
    def name(self) -> str:
        """Below the root of the place, with slashes."""
        return self.entry.path


@dataclass(frozen=True)
class Parcel:
    """Everything that goes to one place."""

    title: str
    """What it is, in a few words: the title of a commit, the description of an artifact."""
    files: tuple[Outgoing, ...]
    marker: Outgoing
    """manifest.json, which names all the others with their SHA-256: a place that has it, has all of them."""
    licence: str | None = None
    """As the hub calls it."""

    @property
    def everything(self) -> tuple[Outgoing, ...]:
        """All files, the marker last."""
        return (*self.files, self.marker)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(each.entry.size for each in self.everything)


class Sink(Protocol):
    """A place that files go to. Refusals are told in the tree of `errors`; Unavailable is worth another try."""

    where: str
    """Field and name, the beginning of every message: "output.publish[0]: 'owner/name'"."""

    def prepare(self, parcel: Parcel) -> None:
        """See what is there; take away what an earlier publishing left and this one does not have."""

    def has(self, file: Outgoing, feed: Feed) -> bool:
        """Whether these very bytes are there, by a digest of the other side."""

    def send(self, file: Outgoing, feed: Feed) -> None:
        """Send a file, proven at the other end as far as that can be before `commit`. VerificationFailed."""

    def commit(self, parcel: Parcel) -> str:
        """Let others see it, and look whether all of it is there; the address with what pins it. VerificationFailed."""


@dataclass
class Watch:
    """Looks, while bytes leave, whether they still are to; counts them."""

    context: Context
    abandoned: threading.Event = field(default_factory=threading.Event)
    """Set where another file failed: this one is left as it is."""

    def look(self) -> None:
        """Interrupted if the process was asked to leave."""
        self.context.raise_if_stopping()
        if self.abandoned.is_set():
            msg = "Another file could not be sent."
            raise Interrupted(msg)

    def look_at_fence(self) -> None:
        """Interrupted if a newer attempt has begun."""
        fence.refuse_if_fenced(self.context.work.root, self.context.attempt)


class Feed(io.BufferedReader):
    """A file on its way out. Reading further than ever before is progress; an end of the work is heard between reads.

    A file for whoever wants one: huggingface_hub reads it, and goes back in it to try again.
    """

    def __init__(self, file: Outgoing, watch: Watch) -> None:
        super().__init__(io.FileIO(file.path))
        self._size, self._watch = file.entry.size, watch
        self._reached = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes, to be sent."""
        self._watch.look()
        data = super().read(size)
        self.reach(self.tell())
        return data

    def chunks(self) -> Iterator[bytes]:
        """The whole file, to be sent."""
        self.seek(0)
        while data := self.read(CHUNK_BYTES):
            yield data

    def slices(self, start: int, part: bytes) -> Iterator[bytes]:
        """Bytes that were taken from the file, to be sent."""
        for offset in range(0, len(part), CHUNK_BYTES):
            self._watch.look()
            yield part[offset : offset + CHUNK_BYTES]
            self.reach(start + min(offset + CHUNK_BYTES, len(part)))

    def take(self, start: int, length: int) -> bytes:
        """Bytes to be looked at: they are sent by `slices`, or are there already."""
        self.beat()
        self.seek(start)
        return super().read(length)

    def beat(self) -> None:
        """Tell of work on the file that sends nothing of it, and hear an end of the work."""
        self._watch.look()
        self._watch.context.report.beat()

    def hash(self, hasher: Hasher) -> str:
        """The hash of the whole file."""
        for start in range(0, self._size, CHUNK_BYTES):
            hasher.update(self.take(start, CHUNK_BYTES))
        return hasher.hexdigest()

    @property
    def reached(self) -> int:
        """How many bytes are at the other end, or were at least sent."""
        return self._reached

    def reach(self, place: int) -> None:
        """Bytes up to here have left, or are at the other end already."""
        if place <= self._reached:
            return
        if self._reached // LOOK_EVERY_BYTES != place // LOOK_EVERY_BYTES:
            self._watch.look_at_fence()
        self._watch.context.report.advance(place - self._reached)
        self._reached = place

    def finish(self) -> None:
        """All of it is at the other end."""
        self.reach(self._size)


def accounted_for(remote: Remote, there: Mapping[str, RemoteFile]) -> set[str]:
    """Files there that an earlier publishing's manifest names, with the manifest; none if it is somebody else's."""
    if (marker := there.get(MANIFEST_NAME)) is None:
        return set()
    with remote.open(marker, 0) as body:
        data = b"".join(body.chunks)
    try:
        earlier = {entry.path for entry in Manifest.model_validate_json(data).files}
    except ValidationError:
        return set()
    return (earlier | {MANIFEST_NAME}) & there.keys()
