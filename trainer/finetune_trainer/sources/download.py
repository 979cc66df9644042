"""Remote files brought into a folder: verified, resumable, never outside it.

    <slot>/pin.json            what was listed when the download began: later attempts go on with the same
    <slot>/partial/<identity>  bytes so far of one file
    <slot>/files/<name>        complete and verified
    <slot>/done/<name's hash>  says which file's identity lies there

A file's bytes are hashed as they come in. A part left by an earlier attempt is hashed again before it is continued by
a Range; it is thrown away where nothing could prove the whole in the end (a machine that lost its power may have
left zeros in it). A library would not do: huggingface_hub 2.4 names its partial files at random and begins anew after
a kill, oras 0.2 neither resumes nor verifies.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from pydantic import ValidationError

from finetune_trainer.config import Model
from finetune_trainer.runtime import fence, manifest
from finetune_trainer.runtime.errors import InvalidConfig, Unavailable, VerificationFailed
from finetune_trainer.runtime.work import require_space
from finetune_trainer.sources.base import Listing, RemoteFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from finetune_trainer.runtime.context import Context
    from finetune_trainer.sources.base import Remote

PARALLEL_FILES = 4
RETRY_PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0)
"""Before each further try of a file that did not get a byte further."""
CHUNK_BYTES = 4 << 20
PIN_FILE = "pin.json"
NAME_BYTES, PATH_BYTES = 255, 1024


class Pin(Model):
    """What was listed of which source."""

    source: str
    listing: Listing


class Stopped(Exception):  # noqa: N818 - no error: another file's failure is told
    """Another file failed: this one is left as it is."""


def download_files(remote: Remote, files: Sequence[RemoteFile], folder: Path, context: Context) -> Path:
    """Bring the files below `folder`; the folder that holds them and nothing else.

    InvalidConfig (a name that leaves the folder), VolumeFull, VerificationFailed, Interrupted, and what the remote
    raises.
    """
    check_names([file.name for file in files], remote.where)
    store = Store(folder)
    store.prune(files)
    missing = [file for file in files if not store.has(file)]
    require_space(folder, sum(file.size - store.bytes_of_part(file) for file in missing), remote.where)
    total = sum(file.size for file in files)
    context.report.begin(f"downloading {remote.where}", total, "bytes")
    context.report.advance(total - sum(file.size for file in missing))
    abandoned = threading.Event()
    with ThreadPoolExecutor(PARALLEL_FILES, thread_name_prefix="download") as pool:
        jobs = [pool.submit(Download(remote, file, store, context, abandoned).run) for file in missing]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            abandoned.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return store.files


def check_names(names: Sequence[str], where: str) -> None:
    """Refuse names that would leave the folder, cannot be files, or stand in each other's way. InvalidConfig."""
    for name in names:
        parts = name.split("/")
        if any(part in {"", ".", ".."} or len(part.encode()) > NAME_BYTES for part in parts) or (
            len(name.encode()) > PATH_BYTES or "\\" in name or not name.isprintable()
        ):
            msg = f"{where} has a file named {name!r}, which cannot lie in a folder of the job. "
            raise InvalidConfig(msg + "Rename it there, or use another source.")
    folders = {parent.as_posix() for name in names for parent in PurePosixPath(name).parents}
    if clashing := sorted(name for index, name in enumerate(names) if name in folders or name in names[:index]):
        msg = f"{where} has two files in one place: '{clashing[0]}'. Rename one of them, or use another source."
        raise InvalidConfig(msg)


class Store:
    """The folder of a slot's downloads."""

    def __init__(self, folder: Path) -> None:
        self.files, self._parts, self._marks = folder / "files", folder / "partial", folder / "done"
        for each in (self.files, self._parts, self._marks):
            each.mkdir(parents=True, exist_ok=True)

    def has(self, file: RemoteFile) -> bool:
        """Whether the file lies there, verified."""
        mark, path = self._mark(file), self.files / file.name
        return (
            mark.is_file() and mark.read_text() == file.identity and path.is_file() and path.stat().st_size == file.size
        )

    def part(self, file: RemoteFile) -> Path:
        """Where its bytes are gathered."""
        return self._parts / file.identity

    def bytes_of_part(self, file: RemoteFile) -> int:
        """How many of its bytes an earlier attempt left."""
        part = self.part(file)
        return part.stat().st_size if part.is_file() else 0

    def put(self, file: RemoteFile) -> None:
        """Move a verified part to its place, and remember that it is there."""
        path, mark = self.files / file.name, self._mark(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        manifest.sync(self.part(file))
        mark.unlink(missing_ok=True)
        self.part(file).replace(path)
        mark.write_text(file.identity)

    def prune(self, wanted: Iterable[RemoteFile]) -> None:
        """Remove what an earlier listing had and this one has not."""
        names = {file.name for file in wanted}
        parts = {file.identity for file in wanted}
        for path in manifest.files_in(self.files):
            if path.relative_to(self.files).as_posix() not in names:
                path.unlink()
        for path in sorted((path for path in self.files.rglob("*") if path.is_dir()), reverse=True):
            if not any(path.iterdir()):
                path.rmdir()
        for path in manifest.files_in(self._parts):
            if path.name not in parts:
                path.unlink()

    def _mark(self, file: RemoteFile) -> Path:
        return self._marks / hashlib.sha256(file.name.encode()).hexdigest()


class Download:
    """One file on its way."""

    def __init__(
        self, remote: Remote, file: RemoteFile, store: Store, context: Context, abandoned: threading.Event
    ) -> None:
        self._remote, self._file, self._store = remote, file, store
        self._context, self._abandoned = context, abandoned
        self._part = store.part(file)
        self._size = 0
        self._hash = file.digest.hasher(file.size) if file.digest else None

    def run(self) -> None:
        """Fetch what is missing, prove the whole, put it in its place; from the start again if an old part was bad."""
        resumed = self._take_up()
        self._fill()
        if resumed and not self._is_proven():
            self._start_over()
            self._fill()
        if not self._is_proven():
            self._start_over()
            raise VerificationFailed(self._broken(f"its hash ({self._algorithm}) is not the one listed"))
        with self._context.committing():
            self._store.put(self._file)

    def _take_up(self) -> bool:
        """Hash what an earlier attempt left; whether there is any."""
        if self._hash is None or self._store.bytes_of_part(self._file) > self._file.size:
            self._part.unlink(missing_ok=True)
        if not self._part.is_file():
            self._part.touch()
            return False
        with self._part.open("rb") as part:
            while chunk := part.read(CHUNK_BYTES):
                self._count(chunk)
        return self._size > 0

    def _fill(self) -> None:
        """Fetch the rest, trying again while the other side breaks off."""
        pauses = iter(RETRY_PAUSES_SECONDS)
        while self._size < self._file.size:
            before = self._size
            try:
                self._append()
            except Unavailable:
                if self._size > before:
                    pauses = iter(RETRY_PAUSES_SECONDS)
                if (pause := next(pauses, None)) is None:
                    raise
                self._context.stopping.wait(pause)

    def _append(self) -> None:
        """Write what one answer brings."""
        self._leave_if_asked()
        with self._remote.open(self._file, self._size) as body:
            if body.start != self._size:
                self._start_over()
            if body.start != self._size:
                msg = (
                    f"{self._remote.where}: asked for {self._file.name} from its start, got it from byte {body.start}."
                )
                raise Unavailable(msg)
            with self._part.open("ab") as part:
                for chunk in body.chunks:
                    self._leave_if_asked()
                    self._leave_if_fenced(len(chunk))
                    if self._size + len(chunk) > self._file.size:
                        raise VerificationFailed(
                            self._broken(f"it is longer than the {self._file.size:,} bytes listed")
                        )
                    part.write(chunk)
                    part.flush()  # a kill takes nothing that was counted
                    self._count(chunk)
        if self._size < self._file.size:
            msg = f"{self._remote.where}: {self._file.name} broke off at byte {self._size:,} of {self._file.size:,}. "
            raise Unavailable(msg + "The next attempt goes on from there.")

    def _count(self, chunk: bytes) -> None:
        if self._hash is not None:
            self._hash.update(chunk)
        self._size += len(chunk)
        self._context.report.advance(len(chunk))

    def _start_over(self) -> None:
        self._context.report.advance(-self._size)
        self._part.write_bytes(b"")
        self._size = 0
        self._hash = self._file.digest.hasher(self._file.size) if self._file.digest else None

    def _is_proven(self) -> bool:
        digest = self._file.digest
        return digest is None or (self._hash is not None and self._hash.hexdigest() == digest.value)

    @property
    def _algorithm(self) -> str:
        return self._file.digest.algorithm if self._file.digest else ""

    def _broken(self, how: str) -> str:
        return (
            f"{self._remote.where}: {self._file.name} is not what it should be: {how}. "
            "Try again; if it stays so, the file is damaged where it comes from: put it there again."
        )

    def _leave_if_fenced(self, more: int) -> None:
        """A newer attempt fills the same part: look now and then, as a look is a file read."""
        if self._size // CHUNK_BYTES != (self._size + more) // CHUNK_BYTES:
            fence.refuse_if_fenced(self._context.work.root, self._context.attempt)

    def _leave_if_asked(self) -> None:
        self._context.raise_if_stopping()
        if self._abandoned.is_set():
            raise Stopped


def read_pin(folder: Path, source: Model) -> Listing | None:
    """What an earlier attempt listed of the same source."""
    try:
        pin = Pin.model_validate_json((folder / PIN_FILE).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    return pin.listing if pin.source == source.to_json() else None


def write_pin(folder: Path, source: Model, listing: Listing) -> None:
    """Remember what was listed, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{PIN_FILE}.new"
    aside.write_text(Pin(source=source.to_json(), listing=listing).to_json())
    aside.replace(folder / PIN_FILE)


def discard(folder: Path) -> None:
    """Forget a slot's downloads."""
    shutil.rmtree(folder, ignore_errors=True)
