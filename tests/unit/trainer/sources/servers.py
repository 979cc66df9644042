"""Real servers on this machine, and a relay before them that counts bytes and holds them back."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx2

from cluster import build
from finetune_trainer.sources.s3 import Credentials, sign

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

USER, PASSWORD = "fox", "s3cret"
BCRYPT = "$2b$04$abcdefghijklmnopqrstuuLZYjhNQAOdpbzt4WxWlUHjv1wsyH5DG"
"""Of the password."""
START_SECONDS, POLL_SECONDS = 60.0, 0.02
PART_BYTES = 5 << 20
"""Least size of a part of an S3 upload."""
UP, BACK = "up", "back"
"""Ways through a relay."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_until(happened: Callable[[], bool], seconds: float = START_SECONDS) -> None:
    """Look again and again, at short intervals, until it happened."""
    pause = threading.Event()
    for _ in range(int(seconds / POLL_SECONDS)):
        if happened():
            return
        pause.wait(POLL_SECONDS)
    raise TimeoutError


def _answers(client: httpx2.Client, port: int) -> bool:
    try:
        client.get(f"http://127.0.0.1:{port}/", timeout=5)
    except httpx2.TransportError:
        return False
    return True


@contextmanager
def running(command: list[str], port: int, log: Path, **environment: str) -> Iterator[None]:
    """Start a server and wait until it answers; stop it in the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment)
    try:
        client = httpx2.Client(trust_env=False)
        wait_until(lambda: _answers(client, port) or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield
    finally:
        process.terminate()
        process.wait()


class Relay:
    """Passes bytes to a server and back, counts both, and can hold or cut either after so many."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._target, self._host = port, host
        self._listener = socket.create_server((host, 0))
        self.port: int = self._listener.getsockname()[1]
        self._passed = {UP: 0, BACK: 0}
        self._limited = BACK
        self.cut_after: int | None = None
        self.hold_after: int | None = None
        self.holding = threading.Event()
        self._released = threading.Event()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"{self._host}:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    @property
    def given(self) -> int:
        """Bytes that came back."""
        return self._passed[BACK]

    @property
    def taken(self) -> int:
        """Bytes that went to the server."""
        return self._passed[UP]

    def reset(self, *, cut_after: int | None = None, hold_after: int | None = None, limited: str = BACK) -> None:
        """Count anew, and let go of what is held; `limited`: the way, up or back, that the limits are for."""
        with self._lock:
            self._released.set()
            self._released = threading.Event()
            self._passed, self._limited = {UP: 0, BACK: 0}, limited
            self.cut_after, self.hold_after = cut_after, hold_after
            self.holding.clear()

    def close(self) -> None:
        self._released.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # the thread that accepts: closing alone would leave it listening
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:  # the server is gone: so it is for whoever asks here
                client.close()
                continue
            threading.Thread(target=self._pass_on, args=(client, server), daemon=True).start()
            threading.Thread(target=self._pass_back, args=(server, client), daemon=True).start()

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        try:
            if self._carry(client, server, UP):
                server.shutdown(socket.SHUT_WR)
            else:
                _end(client, server)
        except OSError:
            server.close()

    def _pass_back(self, server: socket.socket, client: socket.socket) -> None:
        try:
            self._carry(server, client, BACK)
        except OSError:
            pass
        finally:
            _end(client, server)

    def _carry(self, source: socket.socket, target: socket.socket, way: str) -> bool:
        """Pass bytes until the source ends, True, or a limit is reached, False."""
        while data := source.recv(65536):
            target.sendall(data[: self._allowed(len(data), way)])
            if (wait := self._wait_at_limit(way)) is not None:
                wait()
                return False
        return True

    def _wait_at_limit(self, way: str) -> Callable[[], object] | None:
        """What comes before the end of a connection that has reached its limit; `reset` happens before or after."""
        with self._lock:
            if way != self._limited:
                return None
            if self.cut_after is not None and self._passed[way] >= self.cut_after:
                self.cut_after = None
                return lambda: None
            if self.hold_after is not None and self._passed[way] >= self.hold_after:
                self.holding.set()
                return self._released.wait
            return None

    def _allowed(self, count: int, way: str) -> int:
        """How many of so many bytes may pass; they count as passed."""
        with self._lock:
            limits = [limit - self._passed[way] for limit in (self.cut_after, self.hold_after) if limit is not None]
            allowed = max(0, min([count, *limits])) if way == self._limited else count
            self._passed[way] += allowed
            return allowed


def _end(*ends: socket.socket) -> None:
    for end in ends:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)  # the other thread is still reading: closing would not be seen
        end.close()


@dataclass
class Bucket:
    """A bucket of a real S3 server."""

    endpoint: str
    name: str
    credentials = Credentials("us-east-1", USER, PASSWORD)

    def source(self, key: str, **fields: Any) -> dict[str, Any]:
        reference = {"credentialsSecretRef": {"name": "s3"}}
        return {"s3": {"uri": f"s3://{self.name}/{key}", "endpoint": self.endpoint, **reference, **fields}}

    def call(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> httpx2.Response:
        url = f"{self.endpoint}/{self.name}{path}"
        hashed = {"x-amz-content-sha256": hashlib.sha256(body).hexdigest()}
        signed = sign(method, url, self.credentials, datetime.now(UTC), {**hashed, **(headers or {})})
        response = httpx2.request(method, url, content=body, headers=signed, timeout=30, trust_env=False)
        assert response.is_success, response.text
        return response

    def create(self) -> Bucket:
        self.call("PUT", "")
        return self

    def put(self, key: str, body: bytes, **headers: str) -> None:
        self.call(
            "PUT",
            "/" + quote(key, safe="-._~/"),
            body,
            {name.replace("_", "-"): value for name, value in headers.items()},
        )

    def put_in_parts(self, key: str, body: bytes) -> None:
        """Upload as every S3 client does with large files."""
        started = self.call("POST", f"/{key}?uploads=").text
        upload = started.partition("<UploadId>")[2].partition("</UploadId>")[0]
        parts = [body[start : start + PART_BYTES] for start in range(0, len(body), PART_BYTES)]
        listed = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>"
            f"{self.call('PUT', f'/{key}?partNumber={number}&uploadId={upload}', part).headers['ETag']}</ETag></Part>"
            for number, part in enumerate(parts, start=1)
        )
        end = f"<CompleteMultipartUpload>{listed}</CompleteMultipartUpload>".encode()
        self.call("POST", f"/{key}?uploadId={upload}", end)


@contextmanager
def s3_server(folder: Path) -> Iterator[int]:
    """The port of a versitygw whose buckets are folders."""
    data, port = folder / "buckets", free_port()
    data.mkdir()
    command = [str(build.command("versitygw")), "--access", USER, "--secret", PASSWORD, "--port", f"127.0.0.1:{port}"]
    with running([*command, "posix", str(data)], port, folder / "versitygw.log"):
        yield port


@dataclass
class Registry:
    """A real OCI registry."""

    port: int
    login: tuple[str, str] | None = None

    def reference(self, name: str, port: int | None = None) -> str:
        return f"127.0.0.1:{port or self.port}/{name}"

    def push(self, repository: str, tag: str, files: Mapping[str, bytes], **annotations: str) -> str:
        """What `oras push` does; the digest of the manifest."""
        layers = [
            {
                "mediaType": "application/vnd.oci.image.layer.v1.tar",
                "digest": self.push_blob(repository, body),
                "size": len(body),
                "annotations": {"org.opencontainers.image.title": name, **annotations},
            }
            for name, body in files.items()
        ]
        return self.push_manifest(repository, tag, layers)

    def push_manifest(self, repository: str, tag: str, layers: list[dict[str, Any]]) -> str:
        kind = "application/vnd.oci.image.manifest.v1+json"
        empty = {
            "mediaType": "application/vnd.oci.empty.v1+json",
            "digest": self.push_blob(repository, b"{}"),
            "size": 2,
        }
        document = {"schemaVersion": 2, "mediaType": kind, "config": empty, "layers": layers}
        body = json.dumps(document).encode()
        self._ask("PUT", f"/v2/{repository}/manifests/{tag}", body, {"Content-Type": kind})
        return "sha256:" + hashlib.sha256(body).hexdigest()

    def push_blob(self, repository: str, body: bytes) -> str:
        digest = "sha256:" + hashlib.sha256(body).hexdigest()
        place = self._ask("POST", f"/v2/{repository}/blobs/uploads/").headers["Location"]
        place += ("&" if "?" in place else "?") + f"digest={digest}"
        self._ask("PUT", place, body, {"Content-Type": "application/octet-stream"})
        return digest

    def _ask(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> httpx2.Response:
        url = path if "://" in path else f"http://127.0.0.1:{self.port}{path}"
        response = httpx2.request(
            method, url, content=body, headers=headers, auth=self.login, timeout=30, trust_env=False
        )
        assert response.is_success, response.text
        return response


@contextmanager
def registry_server(folder: Path, *, login: bool = False) -> Iterator[Registry]:
    """A registry of the distribution project; `login`: it asks for user and password."""
    port = free_port()
    config: dict[str, Any] = {
        "version": 0.1,
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(folder / "registry")}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    if login:
        (folder / "htpasswd").write_text(f"{USER}:{BCRYPT}\n")
        config["auth"] = {"htpasswd": {"realm": "tests", "path": str(folder / "htpasswd")}}
    (folder / "registry.json").write_text(json.dumps(config))
    command = [str(build.command("registry")), "serve", str(folder / "registry.json")]
    with running(command, port, folder / "registry.log", OTEL_TRACES_EXPORTER="none"):
        yield Registry(port, (USER, PASSWORD) if login else None)


@dataclass
class Answer:
    """What a stand-in says: a status, headers, a body of which parts may be asked."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Site:
    """A small HTTP server that answers as `answer` says, gives ranges, and keeps what it was asked.

    `take`: what it says to a POST or PUT, whose whole body came.
    """

    def __init__(
        self,
        answer: Callable[[str, Mapping[str, str]], Answer],
        take: Callable[[str, Mapping[str, str], bytes], Answer] | None = None,
    ) -> None:
        self.asked: list[str] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked.append(self.path)
                said = answer(self.path, self.headers)  # type: ignore[arg-type]
                body, status = said.body, said.status
                start = self.headers.get("Range", "").removeprefix("bytes=").removesuffix("-")
                if status == HTTPStatus.OK and start:
                    said.headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
                    body, status = body[int(start) :], HTTPStatus.PARTIAL_CONTENT
                self._say(said, status, body)

            def do_POST(self) -> None:
                site.asked.append(self.path)
                length = int(self.headers.get("Content-Length", "0"))
                body = self.rfile.read(length)
                if take is None or len(body) < length:
                    self.close_connection = True
                    return
                said = take(self.path, self.headers, body)  # type: ignore[arg-type]
                self._say(said, said.status, said.body)

            do_PUT = do_POST  # noqa: N815 - the name http.server calls

            def _say(self, said: Answer, status: int, body: bytes) -> None:
                self.send_response(status)
                for name, value in {**said.headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815 - the name http.server calls

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name http.server gives it
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
