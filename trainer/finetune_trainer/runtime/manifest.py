"""The proof of an artifact: a folder that is complete or absent.

A stage builds its files in `.<name>.partial-<attempt>` beside the place they go to. `publish` makes them durable,
writes `manifest.json` (sizes, SHA-256, what the files were made from, what the stage found) and renames the folder
into place. The manifest holds no time and no attempt, so that the same files with the same facts have the same digest.
`verify` reads everything again and names the first file that is not what the manifest says.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from finetune_trainer.config import Model
from finetune_trainer.progress import (
    Artifact,
    DataFacts,
    Estimate,
    LastWord,
    Measured,
    Published,
    Reason,
    Resolved,
    Stage,
    TrainFacts,
)
from finetune_trainer.runtime import fence
from finetune_trainer.runtime.errors import NotFound, VerificationFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

MANIFEST_VERSION = 1
MANIFEST_NAME = "manifest.json"
CHUNK_BYTES = 4 << 20
READERS = 4
"""Files that are hashed side by side: a core with SHA extensions does 1.8 GB/s, page caches and fast volumes more."""


class FileEntry(Model):
    """One file of an artifact."""

    path: str = Field(description="Relative to the artifact's folder, with slashes.")
    size: int = Field(description="Bytes.")
    sha256: str


class CalibrationFacts(Model):
    """The rows that a quantizer looked at: of the training set, never held-out ones."""

    rows: int = Field(description="How many.")
    of_rows: int = Field(description="All training rows, from which they were drawn at random.")
    seed: int = Field(description="Of the draw: the same rows for the same data.")
    max_length: int = Field(description="Tokens at which longer rows were cut.")
    tokens: int = Field(description="In all.")


class Made(Model):
    """What a stage says of its artifact; size and digest are added when it is told."""

    name: str = Field(description="adapter, merged, or the name of the quantized form.")
    type: str = Field(description="Adapter, Merged or Quantized.")
    measured: Measured | None = None
    base: str | None = Field(default=None, description="merged: the weights merged into, Dequantized or Original.")
    calibration: CalibrationFacts | None = Field(default=None, description="GPTQ, AWQ.")


class Result(Model):
    """What a stage found: the payload of its last word. No times in it: they would change the digest."""

    message: str = Field(description="A sentence for people.")
    resolved: Resolved | None = None
    data: DataFacts | None = None
    estimate: Estimate | None = None
    training: TrainFacts | None = None
    artifact: Made | None = None
    published: Published | None = None


class Manifest(Model):
    """What is in a folder, what it was made from, and what was found."""

    version: int = MANIFEST_VERSION
    stage: Stage
    config_digest: str = Field(description="Digest of the settings that the artifact depends on.")
    inputs: dict[str, str] = Field(description="Digests of the manifests of the artifacts it was made from.")
    files: tuple[FileEntry, ...] = Field(description="Sorted by path; all but the manifest itself.")
    result: Result

    @property
    def size_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(entry.size for entry in self.files)

    def to_bytes(self) -> bytes:
        """The manifest's file: the same bytes for the same record."""
        return (self.model_dump_json(by_alias=True, exclude_none=True, indent=1) + "\n").encode()

    @property
    def digest(self) -> str:
        """`sha256:...` of the manifest's file: the proof of the artifact."""
        return digest_of_bytes(self.to_bytes())


@dataclass(frozen=True)
class Target:
    """An artifact to be made: where it goes and what it is made from."""

    stage: Stage
    folder: Path
    path: str
    """The folder, relative to the work folder."""
    config_digest: str
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """The work folder."""
        return self.folder.parents[len(PurePath(self.path).parts) - 1]

    def with_inputs(self, **inputs: str) -> Target:
        """The same target, made from these artifacts' digests."""
        return replace(self, inputs=inputs)

    def matches(self, manifest: Manifest) -> bool:
        """Whether the manifest is of this very target: same settings, same inputs."""
        return self.has_settings_of(manifest) and dict(self.inputs) == manifest.inputs

    def has_settings_of(self, manifest: Manifest) -> bool:
        """Whether the manifest is of the same settings, whatever it was made from."""
        return (self.stage, self.config_digest) == (manifest.stage, manifest.config_digest)


def digest_of_bytes(data: bytes) -> str:
    """`sha256:...` of the bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_of(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """`sha256:...` of a JSON value, however its keys are ordered."""
    return digest_of_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def last_word(manifest: Manifest, target: Target, attempt: int) -> LastWord:
    """What a stage says that ended with this manifest, now or in an attempt long ago."""
    result = manifest.result
    return LastWord(
        stage=manifest.stage,
        attempt=attempt,
        reason=Reason.COMPLETED,
        message=result.message,
        manifest_digest=manifest.digest,
        resolved=result.resolved,
        data=result.data,
        estimate=result.estimate,
        training=result.training,
        artifact=artifact_of(manifest, target.path),
        published=result.published,
    )


def artifact_of(manifest: Manifest, path: str) -> Artifact | None:
    """The artifact that the manifest proves, in a folder below the work folder; None of rows."""
    if (made := manifest.result.artifact) is None:
        return None
    return Artifact(
        name=made.name,
        type=made.type,
        path=path,
        size_bytes=manifest.size_bytes,
        digest=manifest.digest,
        measured=made.measured,
    )


# Reading


def read(folder: Path) -> Manifest:
    """The manifest of an artifact. NotFound if there is none, VerificationFailed if it cannot be read."""
    path = folder / MANIFEST_NAME
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        msg = f"{path} is not there: the stage that makes {folder.name}/ has not ended yet, or its files were deleted."
        raise NotFound(msg) from None
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        msg = f"{path} is damaged or of another version of the trainer. Delete {folder} and run the stage again."
        raise VerificationFailed(msg) from error
    if manifest.to_bytes() != data:
        msg = f"{path} was changed after it was written. Delete {folder} and run the stage again."
        raise VerificationFailed(msg)
    return manifest


def settings_in(data: Path) -> Resolved:
    """The settings that prepare fixed, in its folder's manifest. VerificationFailed if there are none."""
    if (found := read(data).result.resolved) is None:
        msg = f"{data} holds no settings. Delete it and run prepare again."
        raise VerificationFailed(msg)
    return found


def verify(folder: Path, progress: Callable[[int, int], None] | None = None) -> Manifest:
    """Read every file of an artifact again; `progress(bytes done, bytes in all)`. VerificationFailed names the file."""
    manifest = read(folder)
    remedy = f"Delete {folder} and run the stage again."
    _refuse_strangers(folder, manifest, remedy)
    paths = [folder / entry.path for entry in manifest.files]
    for path, entry in zip(paths, manifest.files, strict=True):
        if not path.is_file():
            msg = f"{path} is missing. {remedy}"
            raise VerificationFailed(msg)
        if (size := path.stat().st_size) != entry.size:
            msg = f"{path} has {size} bytes, its manifest says {entry.size}. {remedy}"
            raise VerificationFailed(msg)
    for path, entry, sha256 in zip(paths, manifest.files, sha256_of_files(paths, progress), strict=True):
        if sha256 != entry.sha256:
            msg = f"{path} is not what was written: its SHA-256 differs from the manifest's. {remedy}"
            raise VerificationFailed(msg)
    return manifest


def _refuse_strangers(folder: Path, manifest: Manifest, remedy: str) -> None:
    """A file that nobody vouches for could be loaded in place of one that is proven."""
    known = {entry.path for entry in manifest.files} | {MANIFEST_NAME}
    for path in files_in(folder):
        name = path.relative_to(folder).as_posix()
        if name not in known and not path.name.startswith("."):
            msg = f"{path} is not in the manifest of {folder.name}/: something else wrote there. {remedy}"
            raise VerificationFailed(msg)


def sha256_of_files(paths: Sequence[Path], progress: Callable[[int, int], None] | None = None) -> list[str]:
    """SHA-256 in hex of each file, several at a time; `progress(bytes read so far, bytes in all)`, one call at a time.

    The first error, of a file or of `progress`, ends the reading of all of them.
    """
    total, done, turn = sum(path.stat().st_size for path in paths), 0, threading.Lock()
    errors: list[BaseException] = []

    def count(read: int) -> None:
        nonlocal done
        with turn:
            if errors:
                raise errors[0]
            done += read
            if progress is not None:
                progress(done, total)

    def digest(path: Path) -> str:
        try:
            return sha256_of_file(path, count)
        except BaseException as error:
            errors.append(error)
            raise

    with ThreadPoolExecutor(READERS) as pool:
        digests = [pool.submit(digest, path) for path in paths]
    if errors:
        raise errors[0]
    return [each.result() for each in digests]


def sha256_of_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 in hex; `progress(bytes just read)`."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest()


def files_in(folder: Path) -> list[Path]:
    """All files below a folder, sorted by path."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


# Writing


def publish(
    target: Target,
    attempt: int,
    build: Callable[[Path], Result],
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Let `build` fill a folder aside, prove it, rename it into place: complete or absent, whatever happens.

    What older attempts left aside is removed. An artifact already in place is replaced as a whole.
    If `build` raises, its half-done folder is removed and an artifact already in place stays.
    """
    parent, name = target.folder.parent, target.folder.name
    parent.mkdir(parents=True, exist_ok=True)
    clean(target.folder, attempt)
    partial = parent / f".{name}.partial-{attempt}"
    partial.mkdir()
    try:
        result = build(partial)
        manifest = seal(partial, target, result, progress)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    with fence.committing(target.root, attempt):
        _move_into_place(partial, target.folder, attempt)
    return manifest


def seal(folder: Path, target: Target, result: Result, progress: Callable[[int, int], None] | None = None) -> Manifest:
    """Write the manifest of what is in the folder, set modes, make all of it durable."""
    paths = files_in(folder)
    entries = [
        FileEntry(path=path.relative_to(folder).as_posix(), size=path.stat().st_size, sha256=sha256)
        for path, sha256 in zip(paths, sha256_of_files(paths, progress), strict=True)
    ]
    manifest = Manifest(
        stage=target.stage,
        config_digest=target.config_digest,
        inputs=dict(sorted(target.inputs.items())),
        files=tuple(entries),
        result=result,
    )
    (folder / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    total = manifest.size_bytes
    make_durable(folder, None if progress is None else lambda: progress(total, total))
    return manifest


def make_durable(folder: Path, progress: Callable[[], None] | None = None) -> None:
    """Modes that other users can read (safetensors writes 0600), and every file and folder on the disk.

    `progress` is called after each file.
    """
    for path in files_in(folder):
        path.chmod(0o644)
        sync(path)
        if progress is not None:
            progress()
    for path in [*sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True), folder]:
        path.chmod(0o755)
        sync(path)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clean(folder: Path, attempt: int) -> None:
    """Remove what this and older attempts left aside of an artifact."""
    for path in leftovers(folder, attempt):
        shutil.rmtree(path, ignore_errors=True)


def leftovers(folder: Path, attempt: int) -> Iterator[Path]:
    """Half-done folders of this and older attempts."""
    pattern = re.compile(re.escape(f".{folder.name}.") + r"(?:partial|old)-(\d+)")
    if not folder.parent.is_dir():
        return
    for path in folder.parent.iterdir():
        if (match := pattern.fullmatch(path.name)) and int(match[1]) <= attempt:
            yield path


def _move_into_place(partial: Path, folder: Path, attempt: int) -> None:
    aside = folder.parent / f".{folder.name}.old-{attempt}"
    if folder.exists():
        folder.rename(aside)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)
