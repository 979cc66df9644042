"""A job's folders, real servers started once a session, and a relay before each of them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cluster import build
from finetune_trainer.config import BaseModelSource, DatasetSource, Source
from finetune_trainer.progress import Stage
from finetune_trainer.runtime.context import Context
from finetune_trainer.runtime.report import Report
from finetune_trainer.runtime.work import WorkFolder
from finetune_trainer.sources import Fetched, download, fetch_source
from tests.unit.trainer.sources.servers import PASSWORD, USER, Bucket, Registry, Relay, registry_server, s3_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from finetune_trainer.sources.base import RemoteFile

KINDS: dict[str, type[Source]] = {"model": BaseModelSource, "dataset-0": DatasetSource, "adapter": Source}
FIELDS = {"model": "model", "dataset-0": "datasets[0]", "adapter": "model.adapter"}
TINY_MODEL = {
    "config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "model-00001-of-00002.safetensors": bytes(range(256)) * 4000,
    "model-00002-of-00002.safetensors": bytes(reversed(range(256))) * 4000,
    "model.safetensors.index.json": b'{"weight_map": {}}',
}
JUNK = {"pytorch_model.bin": b"pickle", "modeling.py": b"import os", "onnx/model.onnx": b"o", ".gitattributes": b"*"}


@dataclass
class Errands:
    """Fetches sources into a job's work folder."""

    root: Path

    def __post_init__(self) -> None:
        (self.root / "work").mkdir()
        self.context = self.build_context()

    def build_context(self) -> Context:
        """A context as each attempt has its own."""
        report = Report(Stage.PREPARE, 1, bar=False)
        return Context(WorkFolder(self.root / "work"), self.root / "sources", self.root / "secrets", 1, report)

    def fetch(self, slot: str, source: dict[str, Any]) -> Fetched:
        return fetch_source(slot, FIELDS[slot], KINDS[slot].model_validate(source), self.context)

    def fetch_in_a_process(self, slot: str, source: dict[str, Any]) -> subprocess.Popen[bytes]:
        """The same in a process that can be killed."""
        module = "tests.unit.trainer.sources.conftest"
        return subprocess.Popen([sys.executable, "-m", module, str(self.root), slot, json.dumps(source)])

    def give_secret(self, slot: str, name: str, text: str) -> None:
        folder = self.root / "secrets" / slot
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    def parts(self, slot: str) -> dict[str, int]:
        """Names and sizes of the files that are half there; one that is finished meanwhile is none."""
        sizes = {}
        for path in self.slot(slot).glob("partial/*"):
            with contextlib.suppress(FileNotFoundError):
                sizes[path.name] = path.stat().st_size
        return {name: size for name, size in sizes.items() if size}

    def pinned(self, slot: str) -> tuple[RemoteFile, ...]:
        """What was listed when the download began."""
        return download.Pin.model_validate_json((self.slot(slot) / download.PIN_FILE).read_bytes()).listing.files

    def leave_part(self, slot: str, file: RemoteFile, body: bytes) -> None:
        """As if the file had only come so far when the attempt ended."""
        store = download.Store(self.slot(slot))
        (store.files / file.name).unlink()
        store.part(file).write_bytes(body)

    def slot(self, slot: str) -> Path:
        return self.root / "work" / ".downloads" / slot


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def errands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Errands:
    monkeypatch.setattr(download, "RETRY_PAUSES_SECONDS", (0.0, 0.0))
    for variable in ("HF_ENDPOINT", "HF_TOKEN", "MODELSCOPE_ENDPOINT", "MODELSCOPE_DOMAIN"):
        monkeypatch.delenv(variable, raising=False)
    return Errands(tmp_path)


@pytest.fixture(scope="session")
def s3_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    build.build_servers()
    with s3_server(tmp_path_factory.mktemp("s3")) as port:
        yield port


@pytest.fixture
def s3_relay(s3_port: int) -> Iterator[Relay]:
    relay = Relay(s3_port)
    yield relay
    relay.close()


@pytest.fixture
def bucket(s3_port: int, s3_relay: Relay, errands: Errands, request: pytest.FixtureRequest) -> Bucket:
    """A bucket of the test's own, asked through the relay, and its credentials in the job's secrets."""
    for slot in KINDS:
        errands.give_secret(slot, "AWS_ACCESS_KEY_ID", USER)
        errands.give_secret(slot, "AWS_SECRET_ACCESS_KEY", PASSWORD)
    number = abs(hash(request.node.nodeid)) % 10**12
    Bucket(f"http://127.0.0.1:{s3_port}", f"test-{number}").create()
    return Bucket(s3_relay.url, f"test-{number}")


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    build.build_servers()
    with registry_server(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture(scope="session")
def closed_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """It asks for user and password."""
    build.build_servers()
    with registry_server(tmp_path_factory.mktemp("closed"), login=True) as registry:
        yield registry


@pytest.fixture
def registry_relay(registry: Registry) -> Iterator[Relay]:
    relay = Relay(registry.port)
    yield relay
    relay.close()


if __name__ == "__main__":
    root, slot, source = sys.argv[1:]
    report = Report(Stage.PREPARE, 1, bar=False)
    context = Context(WorkFolder(Path(root) / "work"), Path(root), Path(root) / "secrets", 1, report)
    fetch_source(slot, FIELDS[slot], KINDS[slot].model_validate(json.loads(source)), context)
