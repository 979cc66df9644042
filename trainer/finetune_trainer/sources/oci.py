"""OCI: the files of an artifact in a registry, as `oras push` puts them there.

By the registry's own calls (https://github.com/opencontainers/distribution-spec): oras-py 0.2 neither checks digests
nor goes on after a kill. An artifact is pinned by the digest of its manifest, and every file by its own.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urljoin

import httpx2

from finetune_trainer.runtime.errors import (
    AccessDenied,
    InvalidConfig,
    NotFound,
    TrainerError,
    Unavailable,
    VerificationFailed,
)
from finetune_trainer.sources import http
from finetune_trainer.sources.base import Algorithm, Body, Changed, Digest, Listing, RemoteFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from finetune_trainer.config import OciSource
    from finetune_trainer.sources.base import Choose

MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
TITLE = "org.opencontainers.image.title"
UNPACK = "io.deis.oras.content.unpack"
"""On a folder that `oras push` packed into one archive."""
DOCKER_HUB, DOCKER_HUB_REGISTRY, DOCKER_HUB_KEY = "docker.io", "registry-1.docker.io", "https://index.docker.io/v1/"
ACTIONS = {"read": "pull", "write": "pull,push"}
"""What a token is asked for."""
CHALLENGE = re.compile(r'(\w+)="([^"]*)"')
PUSH = "Push the files one by one from inside their folder (`oras push REFERENCE *`)."


class Oci:
    """One artifact."""

    def __init__(
        self,
        source: OciSource,
        field: str,
        credentials: tuple[str, str] | None,
        verb: Literal["read", "write"] = "read",
    ) -> None:
        """`verb`: what the credentials must allow."""
        self._verb = verb
        self.where = f"{field}: '{source.reference}'"
        self._field, self._credentials = f"{field}.oci", credentials
        self._registry, self._repository, self._reference = split_reference(source.reference)
        self._plain_http = bool(source.plain_http)
        host = DOCKER_HUB_REGISTRY if self._registry == DOCKER_HUB else self._registry
        self._host = f"{'http' if self._plain_http else 'https'}://{host}"
        self._client = http.build_client()
        self._authorization: str | None = None
        self._lock = threading.Lock()

    def look_up(self, choose: Choose) -> Listing:
        """The files chosen of the artifact that the reference means now."""
        document, digest = self._manifest(self._reference)
        if (entries := document.get("manifests")) is not None:
            document, digest = self._manifest(self._only(entries))
        return Listing(revision=digest, files=tuple(choose(self._files(document))))

    @contextmanager
    def open(self, file: RemoteFile, start: int) -> Iterator[Body]:
        """The bytes of a layer."""
        url = self.url(f"blobs/{file.address}")
        with self._reaching(), http.open_range(self._client, url, start, self._blob_refusal, self._headers()) as body:
            yield body

    # What is there

    def _manifest(self, reference: str) -> tuple[dict[str, Any], str]:
        """A manifest and its digest, which is checked: everything else hangs from it."""
        accepted = {"Accept": ", ".join(MANIFESTS)}
        response = self.ask("GET", self.url(f"manifests/{reference}"), accepted)
        digest = "sha256:" + hashlib.sha256(response.content).hexdigest()
        if reference.startswith("sha256:") and digest != reference:
            msg = (
                f"{self.where}: the registry gives a manifest with another digest ({digest}). Push the artifact again."
            )
            raise VerificationFailed(msg)
        try:
            document = json.loads(response.content)
        except ValueError as error:
            msg = f"{self.where}: {self._host} does not answer as a registry does. Correct {self._field}.reference."
            raise InvalidConfig(msg) from error
        return (document if isinstance(document, dict) else {}), digest

    def _only(self, entries: list[dict[str, Any]]) -> str:
        digests = [str(entry.get("digest")) for entry in entries]
        if len(digests) != 1:
            msg = f"{self.where} is an index of {len(digests)} artifacts. Name one by its digest: "
            raise InvalidConfig(msg + ", ".join(digests[:4]) + ".")
        return digests[0]

    def _files(self, document: dict[str, Any]) -> list[RemoteFile]:
        layers = [layer for layer in document.get("layers") or [] if isinstance(layer, dict)]
        titled = [layer for layer in layers if _annotation(layer, TITLE)]
        if not titled:
            msg = f"{self.where} has no named files: it is a container image or empty. {PUSH}"
            raise InvalidConfig(msg)
        if packed := [layer for layer in titled if _annotation(layer, UNPACK) == "true"]:
            name = _annotation(packed[0], TITLE)
            msg = f"{self.where} holds the folder '{name}' as one archive, which is not unpacked. {PUSH}"
            raise InvalidConfig(msg)
        return [self._file(layer) for layer in titled]

    def _file(self, layer: dict[str, Any]) -> RemoteFile:
        name, digest = _annotation(layer, TITLE), str(layer.get("digest"))
        if re.fullmatch(r"sha256:[0-9a-f]{64}", digest) is None:
            msg = f"{self.where}: the file '{name}' has the digest '{digest}', which is no SHA-256. {PUSH}"
            raise InvalidConfig(msg)
        proof = Digest(algorithm=Algorithm.SHA256, value=digest.removeprefix("sha256:"))
        return RemoteFile(name=name, size=int(layer.get("size") or 0), digest=proof, address=digest)

    # Asking

    def url(self, path: str) -> str:
        """An address in the repository; one that the registry names itself stays what it is, if it is whole."""
        return urljoin(f"{self._host}/v2/{self._repository}/", path)

    def ask(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        content: bytes | Iterable[bytes] | None = None,
    ) -> httpx2.Response:
        """An answer that is no refusal; says who we are if the registry asks for it.

        What is sent a piece at a time cannot be sent again here: Unavailable, and another try has what it needs.
        """
        once = not (content is None or isinstance(content, bytes))
        with self._reaching():
            response = self._request(method, url, headers, content)
            if response.status_code == http.UNAUTHORIZED and once and self._renew(response):
                raise Unavailable(f"{self.where}: the registry's token has expired. It is worth another try.")
            if response.status_code == http.UNAUTHORIZED and not once:
                self._authorize(response.headers.get("WWW-Authenticate", ""))
                response = self._request(method, url, headers, content)
        if not response.is_success:
            raise self._refusal(response)
        return response

    def _request(
        self, method: str, url: str, headers: Mapping[str, str] | None, content: bytes | Iterable[bytes] | None
    ) -> httpx2.Response:
        """Where a registry sends uploads to a storage elsewhere, that is not told who we are."""
        known = self._headers() if url.startswith(f"{self._host}/") else {}
        return self._client.request(method, url, headers={**(headers or {}), **known}, content=content)

    def _headers(self) -> dict[str, str]:
        return {"Authorization": self._authorization} if self._authorization else {}

    def _authorize(self, challenge: str) -> None:
        """Answer a registry's challenge: Basic, or a token from the service that it names."""
        scheme, _, rest = challenge.partition(" ")
        basic = self._credentials and "Basic " + base64.b64encode(":".join(self._credentials).encode()).decode()
        if scheme.lower() == "basic":
            self._authorization = basic
            return
        asked = dict(CHALLENGE.findall(rest))
        realm = asked.pop("realm", "")
        if not realm.startswith(("https://", "http://") if self._plain_http else "https://"):
            msg = f"{self.where}: the registry asks to log in at '{realm}', which is not encrypted: not done. "
            raise AccessDenied(msg + "Give the registry a token service with TLS.")
        params = {"service": asked.get("service", ""), "scope": f"repository:{self._repository}:{ACTIONS[self._verb]}"}
        response = self._client.get(realm, params=params, headers={"Authorization": basic} if basic else {})
        if response.status_code != http.OK:
            raise self._refusal(response)
        answer = response.json()
        self._authorization = f"Bearer {answer.get('token') or answer.get('access_token')}"

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        remedy = f"Correct {self._field}.reference or .plainHttp, or check network and proxy."
        with http.reaching(self.where, f"the registry at {self._host}", remedy):
            yield

    # Refusals

    def _blob_refusal(self, response: httpx2.Response) -> TrainerError:
        if response.status_code == http.UNAUTHORIZED and self._renew(response):
            return Unavailable(f"{self.where}: the registry's token has expired. It is worth another try.")
        if response.status_code == http.NOT_FOUND:
            return Changed(f"{self.where}: a file of the artifact is not in the registry any more. Push it again.")
        return self._refusal(response)

    def _renew(self, response: httpx2.Response) -> bool:
        """Take a new token, unless another file's refusal did; tokens live for minutes, downloads for hours."""
        sent = response.request.headers.get("Authorization")
        with self._lock:
            if self._authorization == sent:
                self._authorization = None
                self._authorize(response.headers.get("WWW-Authenticate", ""))
            return self._authorization not in {None, sent}

    def _refusal(self, response: httpx2.Response) -> TrainerError:
        status, secret = response.status_code, f"{self._field}.credentialsSecretRef"
        if status in {http.UNAUTHORIZED, http.FORBIDDEN}:
            who = "the credentials" if self._credentials else "anybody without credentials"
            return AccessDenied(
                f"{self.where}: {self._registry} does not let {who} {self._verb} it ({status}), "
                f"or it is not there{_codes(response)}. "
                f"Correct {self._field}.reference, or the Secret of {secret}."
            )
        if status == http.NOT_FOUND:
            return NotFound(f"{self.where} is not in the registry{_codes(response)}. Correct {self._field}.reference.")
        if status == http.INSUFFICIENT_STORAGE:
            return AccessDenied(f"{self.where}: the registry takes no more ({status}). Raise its quota, or free it.")
        if http.is_passing(status):
            return Unavailable(f"{self.where}: the registry answers {status}. It is worth another try later.")
        if status == http.TOO_LARGE:
            return AccessDenied(
                f"{self.where}: the registry, or a proxy before it, takes no file of this size ({status}). "
                "Raise its limit (nginx: client_max_body_size)."
            )
        return TrainerError(
            f"{self.where}: the registry at {self._host} answers {status}{_codes(response)}. "
            f"Correct {self._field}.reference, or see the registry's log."
        )


def split_reference(reference: str) -> tuple[str, str, str]:
    """Registry, repository, and tag or digest; a digest wins over a tag."""
    name, _, digest = reference.partition("@")
    registry, _, path = name.partition("/")
    repository, _, tag = path.partition(":")
    return registry, repository, digest or tag or "latest"


def read_docker_config(text: str, reference: str, field: str) -> tuple[str, str] | None:
    """User and password for the reference's registry out of a .dockerconfigjson; None if it has none. InvalidConfig."""
    registry, _, _ = split_reference(reference)
    keys = [registry, f"https://{registry}", f"https://{registry}/v1/", f"https://{registry}/v2/"]
    try:
        entries = json.loads(text)["auths"]
        entry = next(
            (entries[key] for key in [*keys, DOCKER_HUB_KEY * (registry == DOCKER_HUB)] if key in entries), None
        )
        if entry is None:
            others = ", ".join(entries) or "no registry"
            msg = f"{field}.credentialsSecretRef: the Secret is for {others}, not {registry}. "
            raise InvalidConfig(msg + "Make one with `kubectl create secret docker-registry` for this registry.")
        if "auth" in entry:
            user, _, password = base64.b64decode(entry["auth"].strip(), validate=True).decode().partition(":")
        else:
            user, password = entry["username"], entry["password"]
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
        msg = f"{field}.credentialsSecretRef: .dockerconfigjson is not of that form ({type(error).__name__}: {error}). "
        raise InvalidConfig(msg + "Make the Secret with `kubectl create secret docker-registry`.") from error
    return user.strip(), password.strip()


def _annotation(layer: dict[str, Any], name: str) -> str:
    return str((layer.get("annotations") or {}).get(name) or "")


def _codes(response: httpx2.Response) -> str:
    """The registry's own words for a refusal, in brackets."""
    try:
        codes = [str(error["code"]) for error in response.json()["errors"]]
    except (ValueError, KeyError, TypeError):
        return ""
    return f" ({', '.join(codes)})" if codes else ""
