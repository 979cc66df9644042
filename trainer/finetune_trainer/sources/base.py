"""What every remote source gives: a list of files with what proves them, and each file's bytes from any offset."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, Protocol

from finetune_trainer.config import Model
from finetune_trainer.runtime.errors import NotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    Choose = Callable[[Sequence["RemoteFile"]], Sequence["RemoteFile"]]
    """Of the files that are there, those to be fetched."""


RepoType = Literal["model", "dataset"]


class Changed(NotFound):
    """A file that was listed is not there any more, or is another one: worth another listing."""


class Algorithm(StrEnum):
    """How a file is proven."""

    SHA256 = "sha256"
    MD5 = "md5"
    GIT = "git"
    """SHA-1 of git's blob: a header with the size, then the bytes."""
    MD5_OF_PARTS = "md5-of-parts"
    """S3's ETag of an object that came in parts: MD5 of the parts' MD5s, a dash, how many they were."""


class Hasher(Protocol):
    """What hashlib's objects do."""

    def update(self, data: bytes, /) -> None:
        """Take the next bytes."""

    def hexdigest(self) -> str:
        """The hash of all bytes so far."""


class PartsHasher:
    """S3's hash of an object in parts of one size, but the last."""

    def __init__(self, part_bytes: int) -> None:
        self._part_bytes, self._left = part_bytes, part_bytes
        self._part, self._finished = _md5(), list[bytes]()

    def update(self, data: bytes, /) -> None:
        """Take the next bytes."""
        view = memoryview(data)
        while view:
            if not self._left:
                self._finished.append(self._part.digest())
                self._part, self._left = _md5(), self._part_bytes
            taken, view = view[: self._left], view[self._left :]
            self._part.update(taken)
            self._left -= len(taken)

    def hexdigest(self) -> str:
        """The ETag, without its quotes."""
        digests = [*self._finished, self._part.digest()]
        whole = _md5()
        whole.update(b"".join(digests))
        return f"{whole.hexdigest()}-{len(digests)}"


def _md5() -> hashlib._Hash:
    return hashlib.md5(usedforsecurity=False)


class Digest(Model):
    """What a file's bytes must hash to, in hex."""

    algorithm: Algorithm
    value: str
    part_bytes: int = 0
    """MD5_OF_PARTS: size of all parts but the last."""

    def hasher(self, size: int) -> Hasher:
        """A hash to feed the file's `size` bytes to."""
        if self.algorithm is Algorithm.GIT:
            return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        if self.algorithm is Algorithm.MD5_OF_PARTS:
            return PartsHasher(self.part_bytes)
        return hashlib.new(self.algorithm.value, usedforsecurity=False)


class RemoteFile(Model):
    """One file of a source, as it was listed."""

    name: str
    """Below the source's root, with slashes. As the server gave it: hostile until `download` has checked it."""
    size: int
    digest: Digest | None = None
    address: str = ""
    """Where the remote finds it, in its own words."""
    version: str = ""
    """Changes with the content, where there is no digest: an ETag."""

    @property
    def identity(self) -> str:
        """Equal for equal bytes under the same name."""
        proof = self.digest.value if self.digest else self.version
        return hashlib.sha256(f"{self.name}\0{self.size}\0{proof}".encode()).hexdigest()[:40]


class Listing(Model):
    """The files of a source at one moment."""

    revision: str | None
    """Commit or digest; None where a source has none."""
    files: tuple[RemoteFile, ...]


@dataclass(frozen=True)
class Body:
    """Bytes of a file as they come in."""

    start: int
    """Offset of the first of them: 0 where the server does not give parts of a file."""
    chunks: Iterator[bytes]


class Remote(Protocol):
    """A place that files come from. Refusals are told in the tree of `errors`; Unavailable is worth another try."""

    where: str
    """Field and name, the beginning of every message: "model: 'owner/name'"."""

    def look_up(self, choose: Choose) -> Listing:
        """The files chosen, each with what proves it."""

    def open(self, file: RemoteFile, start: int) -> AbstractContextManager[Body]:
        """The bytes of a file from an offset on. Changed if it is not what was listed."""
