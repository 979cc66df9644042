"""Models from a hub, against a stand-in that speaks the hub's few calls."""

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer import manifest
from finetune_trainer.progress import ExitCode
from tests.tiny import make_config
from tests.unit.trainer.conftest import Desk

COMMIT = "0123456789abcdef0123456789abcdef01234567"
JUNK = {"pytorch_model.bin": b"pickle", "modeling.py": b"import os", "README.md": b"#"}


@dataclass
class StandInHub:
    """One repository, owner/tiny; what it was asked for, and how it is to answer."""

    files: dict[str, bytes]
    token: str | None = None
    refusal: tuple[int, str] | None = None
    breaks_at: str | None = None
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def answer(  # noqa: PLR0911 - an answer a question
        self, path: str, token: str | None
    ) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(path)
        if self.refusal is not None:
            return self.refusal[0], {"X-Error-Code": self.refusal[1], "X-Error-Message": "no"}, b"{}"
        if self.token is not None and token != f"Bearer {self.token}":
            return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if path.startswith("/api/models/owner/tiny"):
            if "/revision/" in path and path.split("/revision/")[1].split("?", maxsplit=1)[0] not in {"main", COMMIT}:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
            return 200, {}, json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": siblings}).encode()
        name = path.rpartition(f"/owner/tiny/resolve/{COMMIT}/")[2]
        if not path.startswith("/owner/tiny/") or name not in self.files:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if name == self.breaks_at:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        data = self.files[name]
        return 200, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}, data


def build_handler(hub: StandInHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.path, self.headers.get("Authorization"))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815 - the name http.server calls

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name http.server gives it
            pass

    return Handler


@pytest.fixture
def hub(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    hub = StandInHub({path.name: path.read_bytes() for path in tiny_model.iterdir()} | JUNK)
    server = ThreadingHTTPServer(("127.0.0.1", 0), build_handler(hub))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def config() -> dict[str, Any]:
    return {**make_config(), "model": {"huggingFace": {"repo": "owner/tiny"}}}


def test_stand_in_hub_a_model_is_pinned_to_its_commit(desk: Desk, config: dict[str, Any], hub: StandInHub) -> None:
    code, word = desk.run("prepare", config)
    assert code == ExitCode.COMPLETED
    assert word is not None
    assert word.resolved is not None
    assert word.resolved.model_revision == COMMIT
    names = {entry.path for entry in manifest.verify(desk.work / "model").files}
    assert names >= {"config.json", "tokenizer.json", "model.safetensors"}
    assert not names & set(JUNK)
    assert not any(name in path for path in hub.asked for name in JUNK)
    assert not (desk.work / ".download").exists()


def test_stand_in_hub_a_broken_download_goes_on(desk: Desk, config: dict[str, Any], hub: StandInHub) -> None:
    hub.breaks_at = "tokenizer.json"
    assert desk.run("prepare", config)[0] != ExitCode.COMPLETED
    hub.breaks_at = None
    hub.asked.clear()
    assert desk.run("prepare", config, "--attempt", "2")[0] == ExitCode.COMPLETED
    loaded = [path for path in hub.asked if path.endswith("/config.json")]
    assert len(loaded) <= 1  # asked whether it is still the same, not loaded


def test_stand_in_hub_the_token_comes_from_its_file(desk: Desk, config: dict[str, Any], hub: StandInHub) -> None:
    hub.token = "s3cret"  # noqa: S105 - of the stand-in
    code, word = desk.run("prepare", config)
    assert code == ExitCode.ACCESS_DENIED
    assert word is not None
    assert "tokenSecretRef" in word.message
    (desk.root / "secrets").mkdir()
    (desk.root / "secrets" / "model-token").write_text("s3cret\n")
    assert desk.run("prepare", config)[0] == ExitCode.COMPLETED


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        pytest.param({"repo": "owner/tinny"}, ExitCode.NOT_FOUND, "'owner/tinny' is not on the hub", id="repo"),
        pytest.param({"revision": "v9"}, ExitCode.NOT_FOUND, "has no revision 'v9'", id="revision"),
    ],
)
def test_stand_in_hub_what_is_not_there_is_named(
    desk: Desk, config: dict[str, Any], hub: StandInHub, change: dict[str, str], code: ExitCode, words: str
) -> None:
    config["model"]["huggingFace"].update(change)
    ended, word = desk.run("prepare", config)
    assert hub.asked
    assert word is not None
    assert words in word.message
    assert ended == code


def test_stand_in_hub_gated_says_accept_the_terms(desk: Desk, config: dict[str, Any], hub: StandInHub) -> None:
    hub.refusal = (403, "GatedRepo")
    code, word = desk.run("prepare", config)
    assert word is not None
    assert "Accept its terms" in word.message
    assert code == ExitCode.ACCESS_DENIED


def test_stand_in_hub_pickles_are_refused_unread(desk: Desk, config: dict[str, Any], hub: StandInHub) -> None:
    del hub.files["model.safetensors"]
    code, word = desk.run("prepare", config)
    assert word is not None
    assert "has no safetensors files" in word.message
    assert code == ExitCode.INVALID_MODEL
    assert not any("resolve" in path for path in hub.asked)


def test_a_hub_that_is_not_reached_is_no_bug_of_ours(
    desk: Desk, config: dict[str, Any], hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, word = desk.run("prepare", config)
    assert hub.asked == []
    assert word is not None
    assert "the hub at http://127.0.0.1:9 cannot be reached" in word.message
    assert code == ExitCode.UNKNOWN
