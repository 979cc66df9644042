"""Files on their way to the disk: hostile names, full disks, requests to leave, parts that were left."""

from __future__ import annotations

import hashlib
import os
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from finetune_trainer.runtime import fence
from finetune_trainer.runtime.errors import (
    Interrupted,
    InvalidConfig,
    TrainerError,
    Unavailable,
    VerificationFailed,
    VolumeFull,
)
from finetune_trainer.sources.base import Algorithm, Body, Digest, Listing, PartsHasher, RemoteFile
from finetune_trainer.sources.download import check_names, download_files
from tests.unit.trainer.sources.conftest import Errands, contents

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from finetune_trainer.sources.base import Choose

CHUNK = 1000
BODY = bytes(range(200)) * 50
"""Ten chunks."""


class Shelf:
    """Files in memory, given in chunks; counts what is given."""

    where = "datasets[0]: 'shelf'"

    def __init__(self, bodies: dict[str, bytes]) -> None:
        self.bodies = bodies
        self.given = dict.fromkeys(bodies, 0)
        self.breaks_after: int | None = None
        self.gives_ranges = True
        self.before_chunk: Callable[[str], None] = lambda _name: None

    def files(self, *, proven: bool = True) -> list[RemoteFile]:
        return [
            RemoteFile(
                name=name,
                size=len(body),
                digest=Digest(algorithm=Algorithm.SHA256, value=hashlib.sha256(body).hexdigest()) if proven else None,
            )
            for name, body in self.bodies.items()
        ]

    def look_up(self, choose: Choose) -> Listing:
        return Listing(revision=None, files=tuple(choose(self.files())))

    @contextmanager
    def open(self, file: RemoteFile, start: int) -> Iterator[Body]:
        first = start if self.gives_ranges else 0
        yield Body(first, self._chunks(file.name, first))

    def _chunks(self, name: str, first: int) -> Iterator[bytes]:
        body = self.bodies[name]
        for place in range(first, len(body), CHUNK):
            if self.breaks_after is not None and self.given[name] >= self.breaks_after:
                msg = "broke off"
                raise Unavailable(msg)
            self.before_chunk(name)
            self.given[name] += len(body[place : place + CHUNK])
            yield body[place : place + CHUNK]


def bring(shelf: Shelf, errands: Errands, *, proven: bool = True) -> dict[str, bytes]:
    return contents(download_files(shelf, shelf.files(proven=proven), errands.slot("dataset-0"), errands.context))


def test_files_lie_under_their_names_and_progress_counts_their_bytes(errands: Errands) -> None:
    shelf = Shelf({"a.jsonl": BODY, "deep/b.jsonl": BODY, "empty.jsonl": b""})
    assert bring(shelf, errands) == shelf.bodies
    assert errands.context.report.current.done == errands.context.report.current.total == 2 * len(BODY)


def test_what_is_there_is_not_fetched_again(errands: Errands) -> None:
    shelf = Shelf({"a.jsonl": BODY})
    bring(shelf, errands)
    bring(shelf, errands)
    assert shelf.given == {"a.jsonl": len(BODY)}


def test_what_is_not_listed_any_more_is_removed(errands: Errands) -> None:
    bring(Shelf({"a.jsonl": BODY, "deep/b.jsonl": BODY}), errands)
    assert set(bring(Shelf({"a.jsonl": BODY}), errands)) == {"a.jsonl"}


def test_a_part_is_continued_at_its_end(errands: Errands) -> None:
    shelf = Shelf({"a.jsonl": BODY})
    shelf.breaks_after = 3 * CHUNK
    with pytest.raises(TrainerError, match="broke off"):
        bring(shelf, errands)
    shelf.breaks_after = None
    assert bring(shelf, errands) == shelf.bodies
    assert shelf.given["a.jsonl"] == len(BODY)
    assert errands.context.report.current.done == len(BODY)


def test_a_part_that_went_bad_costs_its_bytes_and_no_more(errands: Errands) -> None:
    shelf = Shelf({"a.jsonl": BODY})
    bring(shelf, errands)
    errands.leave_part("dataset-0", shelf.files()[0], BODY[:CHUNK][::-1])
    assert bring(shelf, errands) == shelf.bodies


def test_a_part_that_nothing_can_prove_is_thrown_away(errands: Errands) -> None:
    shelf = Shelf({"a.jsonl": BODY})
    bring(shelf, errands, proven=False)
    errands.leave_part("dataset-0", shelf.files(proven=False)[0], bytes(CHUNK))
    assert bring(shelf, errands, proven=False) == shelf.bodies


def test_a_server_without_ranges_begins_again(errands: Errands) -> None:
    shelf = Shelf({"a.jsonl": BODY})
    bring(shelf, errands)
    errands.leave_part("dataset-0", shelf.files()[0], BODY[:CHUNK])
    shelf.gives_ranges = False
    assert bring(shelf, errands) == shelf.bodies
    assert errands.context.report.current.done == len(BODY)


def test_a_file_longer_than_listed_is_refused_as_soon_as_it_is(errands: Errands) -> None:
    shelf = Shelf({"a.jsonl": BODY})
    files = shelf.files()
    shelf.bodies["a.jsonl"] = BODY * 2
    with pytest.raises(VerificationFailed, match="longer than the 10,000 bytes listed"):
        download_files(shelf, files, errands.slot("dataset-0"), errands.context)
    assert shelf.given["a.jsonl"] <= len(BODY) + CHUNK


def test_a_request_to_leave_is_heard_between_two_chunks(errands: Errands) -> None:
    shelf = Shelf({"a.jsonl": BODY})
    shelf.before_chunk = lambda name: errands.context.stopping.set() if shelf.given[name] == 2 * CHUNK else None
    with pytest.raises(Interrupted):
        bring(shelf, errands)
    assert shelf.given == {"a.jsonl": 3 * CHUNK}
    assert sum(errands.parts("dataset-0").values()) == 2 * CHUNK


def test_an_overtaken_attempt_writes_no_further_into_parts_that_its_successor_fills(
    errands: Errands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainer.sources.download.CHUNK_BYTES", 2 * CHUNK)
    shelf, context = Shelf({"a.jsonl": BODY}), errands.context

    def overtake(name: str) -> None:
        if shelf.given[name] == 3 * CHUNK:
            fence.enter(context.work.root, context.attempt + 1)

    shelf.before_chunk = overtake
    with pytest.raises(Interrupted, match="has started since"):
        bring(shelf, errands)
    assert sum(errands.parts("dataset-0").values()) == 3 * CHUNK


def test_an_overtaken_attempt_puts_no_file_into_its_place(errands: Errands) -> None:
    shelf, context = Shelf({"a.jsonl": BODY}), errands.context
    shelf.before_chunk = lambda _: fence.enter(context.work.root, context.attempt + 1)
    with pytest.raises(Interrupted, match="has started since"):
        bring(shelf, errands)
    assert not contents(errands.slot("dataset-0") / "files")


def test_nothing_is_asked_for_after_a_request_to_leave(errands: Errands) -> None:
    shelf = Shelf({"a.jsonl": BODY, "b.jsonl": BODY})
    errands.context.stopping.set()
    with pytest.raises(Interrupted):
        bring(shelf, errands)
    assert shelf.given == {"a.jsonl": 0, "b.jsonl": 0}


def test_the_failure_of_one_file_ends_the_others(errands: Errands) -> None:
    shelf = Shelf({"a.jsonl": BODY, "b.jsonl": BODY})
    files = shelf.files()
    shelf.bodies["a.jsonl"] = BODY[:-1] + b"?"
    with pytest.raises(VerificationFailed, match=r"a\.jsonl is not what it should be"):
        download_files(shelf, files, errands.slot("dataset-0"), errands.context)


@pytest.mark.parametrize(
    "name",
    [
        "../rows.jsonl",
        "a/../../rows.jsonl",
        "/etc/rows.jsonl",
        "a//rows.jsonl",
        "./rows.jsonl",
        "a\\..\\rows.jsonl",
        "rows\x00.jsonl",
        "rows\n.jsonl",
        "",
        "a/",
        "x" * 256,
        "/".join(["x" * 200] * 6),
    ],
)
def test_names_that_leave_their_folder_are_refused_before_anything_is_fetched(errands: Errands, name: str) -> None:
    shelf = Shelf({name: BODY})
    with pytest.raises(InvalidConfig, match="cannot lie in a folder of the job"):
        bring(shelf, errands)
    assert shelf.given == {name: 0}


@pytest.mark.parametrize("names", [["a", "a/b"], ["a", "a"], ["a/b/c", "a/b"]])
def test_two_files_in_one_place_are_refused(names: list[str]) -> None:
    with pytest.raises(InvalidConfig, match="two files in one place"):
        check_names(names, "datasets[0]: 'shelf'")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 80 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_too_small_is_told_before_a_byte_is_fetched(errands: Errands, small_disk: Path) -> None:
    shelf = Shelf({"a.jsonl": bytes(17 << 20)})
    with pytest.raises(VolumeFull, match="Make the job's claim larger"):
        download_files(shelf, shelf.files(), small_disk, errands.context)
    assert shelf.given == {"a.jsonl": 0}


def test_what_is_half_there_needs_no_space_again(errands: Errands, small_disk: Path) -> None:
    shelf = Shelf({"a.jsonl": bytes(14 << 20)})
    shelf.breaks_after = 12 << 20
    with pytest.raises(TrainerError, match="broke off"):
        download_files(shelf, shelf.files(), small_disk, errands.context)
    shelf.breaks_after = None
    assert contents(download_files(shelf, shelf.files(), small_disk, errands.context)) == shelf.bodies


@pytest.mark.parametrize("size", [0, 1, 6, 7, 8, 14, 15])
def test_the_hash_of_parts_does_not_depend_on_how_bytes_come(size: int) -> None:
    body = bytes(range(size))
    whole, single = PartsHasher(7), PartsHasher(7)
    whole.update(body)
    for place in range(size):
        single.update(body[place : place + 1])
    parts = [body[place : place + 7] for place in range(0, size, 7)] or [b""]
    digests = b"".join(hashlib.md5(part).digest() for part in parts)  # noqa: S324 - S3's
    expected = f"{hashlib.md5(digests).hexdigest()}-{len(parts)}"  # noqa: S324 - S3's
    assert whole.hexdigest() == single.hexdigest() == expected
