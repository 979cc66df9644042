"""An artifact is complete or absent, and proven."""

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_trainer.progress import Stage
from finetune_trainer.runtime import manifest
from finetune_trainer.runtime.errors import NotFound, VerificationFailed
from finetune_trainer.runtime.manifest import Made, Result, Target, publish, verify

RESULT = Result(message="done", artifact=Made(name="merged", type="Merged"))


def build(folder: Path) -> Result:
    (folder / "sub").mkdir()
    (folder / "weights").write_bytes(b"w" * 1000)
    (folder / "weights").chmod(0o600)
    (folder / "sub" / "config.json").write_text("{}")
    return RESULT


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target(Stage.MERGE, tmp_path / "merged", "merged", "sha256:config", {"model": "sha256:m"})


def test_equal_work_has_equal_digests_whatever_the_attempt(target: Target) -> None:
    assert publish(target, 1, build).digest == publish(target, 7, build).digest


def test_the_digest_is_that_of_the_file(target: Target) -> None:
    made = publish(target, 1, build)
    assert made.digest == "sha256:" + manifest.sha256_of_file(target.folder / "manifest.json")
    assert verify(target.folder) == made


def test_files_are_readable_by_others(target: Target) -> None:
    publish(target, 1, build)
    modes = {
        path.relative_to(target.folder).as_posix(): path.stat().st_mode & 0o777 for path in target.folder.rglob("*")
    }
    assert modes == {"weights": 0o644, "sub": 0o755, "sub/config.json": 0o644, "manifest.json": 0o644}


def test_a_build_that_fails_leaves_the_old_artifact_and_nothing_else(target: Target) -> None:
    made = publish(target, 1, build)

    def fail(folder: Path) -> Result:
        (folder / "half").write_text("x")
        raise OSError("disk broke")

    with pytest.raises(OSError, match="disk broke"):
        publish(target, 2, fail)
    assert verify(target.folder) == made
    assert [path.name for path in target.folder.parent.glob("*merged*")] == ["merged"]


def test_leftovers_of_older_attempts_go_and_those_of_a_newer_one_stay(target: Target) -> None:
    for name in (".merged.partial-1", ".merged.old-2", ".merged.partial-9", ".other.partial-1"):
        (target.folder.parent / name).mkdir()
    publish(target, 3, build)
    there = sorted(path.name for path in target.folder.parent.iterdir() if path.is_dir())
    assert there == [".merged.partial-9", ".other.partial-1", "merged"]


def flip(path: Path) -> None:
    path.write_bytes(b"v" + path.read_bytes()[1:])


DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("a flipped byte", lambda folder: flip(folder / "weights"), "weights is not what was written"),
    ("a cut file", lambda folder: (folder / "weights").write_bytes(b"w"), "weights has 1 bytes"),
    ("a missing file", lambda folder: (folder / "sub" / "config.json").unlink(), "sub/config.json is missing"),
    ("a file nobody vouches for", lambda folder: (folder / "model.safetensors").touch(), "model.safetensors is not in"),
    ("a manifest that is no manifest", lambda folder: (folder / "manifest.json").write_text("{}"), "damaged"),
    ("an edited manifest", lambda folder: (folder / "manifest.json").open("a").write(" "), "was changed"),
]


@pytest.mark.parametrize(("damage", "words"), [pytest.param(d, w, id=i) for i, d, w in DAMAGES])
def test_verification_names_the_file(target: Target, damage: Callable[[Path], object], words: str) -> None:
    publish(target, 1, build)
    damage(target.folder)
    with pytest.raises(VerificationFailed, match=words):
        verify(target.folder)


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files of several sizes, none among them, each read in some pieces."""
    monkeypatch.setattr(manifest, "CHUNK_BYTES", 100)
    paths = [tmp_path / str(number) for number in range(9)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 70 * number)
    return paths


def test_files_are_hashed_in_their_order_and_every_byte_is_counted(many: list[Path]) -> None:
    told: list[tuple[int, int]] = []
    digests = manifest.sha256_of_files(many, lambda done, total: told.append((done, total)))
    assert digests == [hashlib.sha256(path.read_bytes()).hexdigest() for path in many]
    assert told == sorted(told)
    assert told[-1] == (70 * 36, 70 * 36)


def test_files_are_hashed_side_by_side(many: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    others = threading.Barrier(manifest.READERS)

    def meet(path: Path, *_: object) -> str:
        others.wait(60)
        return path.name

    monkeypatch.setattr(manifest, "sha256_of_file", meet)
    assert manifest.sha256_of_files(many[: manifest.READERS]) == [path.name for path in many[: manifest.READERS]]


def test_the_first_error_ends_the_hashing_of_all_files(many: list[Path]) -> None:
    told: list[int] = []

    def stop(done: int, _: int) -> None:
        told.append(done)
        raise InterruptedError(done)

    with pytest.raises(InterruptedError, match=str(70)):
        manifest.sha256_of_files(many[1:2], stop)
    told.clear()
    with pytest.raises(InterruptedError) as caught:
        manifest.sha256_of_files(many, stop)
    assert told == list(caught.value.args)
    many[4].unlink()
    many[4].mkdir()
    with pytest.raises(IsADirectoryError):
        manifest.sha256_of_files(many)


def test_an_artifact_without_manifest_is_absent(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="has not ended yet"):
        verify(tmp_path)


def test_the_last_word_tells_size_and_digest(target: Target) -> None:
    made = publish(target, 1, build)
    word = manifest.last_word(made, target, 4)
    assert word.artifact is not None
    assert (word.attempt, word.artifact.size_bytes, word.artifact.digest) == (4, 1002, made.digest)
    assert word.succeeded
