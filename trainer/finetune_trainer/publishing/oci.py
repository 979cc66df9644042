"""OCI: an artifact of a registry, one layer a file, as `oras pull` unpacks it; its manifest last, by its tag.

By the registry's own calls (https://github.com/opencontainers/distribution-spec). The registry itself checks every
blob against its digest, and the manifest names them all by theirs.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from finetune_trainer.runtime.errors import NotFound, VerificationFailed
from finetune_trainer.runtime.manifest import digest_of_bytes
from finetune_trainer.sources.oci import MANIFESTS, TITLE, Oci, split_reference

if TYPE_CHECKING:
    from finetune_trainer.config import OciTarget
    from finetune_trainer.publishing.base import Feed, Outgoing, Parcel

ARTIFACT_TYPE = "application/vnd.finetune.model.v1"
FILE_TYPE = "application/octet-stream"
EMPTY_TYPE, EMPTY = "application/vnd.oci.empty.v1+json", b"{}"
"""The config of an artifact that needs none."""
DESCRIPTION, LICENCES = "org.opencontainers.image.description", "org.opencontainers.image.licenses"


class OciSink:
    """A tag in a repository."""

    def __init__(self, target: OciTarget, field: str, credentials: tuple[str, str] | None) -> None:
        self._repository = Oci(target, field, credentials, "write")
        self.where = self._repository.where
        self._registry, self._name, self._tag = split_reference(target.reference)

    def prepare(self, parcel: Parcel) -> None:
        """Nothing is taken away: a tag that is set anew leaves its old manifest behind, without a name."""

    def has(self, file: Outgoing, feed: Feed) -> bool:  # noqa: ARG002 - the digest is known
        """By the SHA-256, which is the blob's name."""
        return self._has_blob(_digest(file), file.entry.size)

    def send(self, file: Outgoing, feed: Feed) -> None:
        """As a blob in one piece, which the registry keeps only if it has the digest."""
        self._push_blob(_digest(file), file.entry.size, feed)
        if not self._has_blob(_digest(file), file.entry.size):
            msg = f"{self.where}: the registry took {file.name} and does not have it. Run publish again."
            raise VerificationFailed(msg)

    def commit(self, parcel: Parcel) -> str:
        """Set the tag, unless it is there, and look whether it means these files."""
        for digest, data in (
            (_digest(parcel.marker), parcel.marker.path.read_bytes()),
            (digest_of_bytes(EMPTY), EMPTY),
        ):
            if not self._has_blob(digest, len(data)):
                self._push_blob(digest, len(data), data)
        body = build_manifest(parcel)
        if self._tagged() != digest_of_bytes(body):
            url = self._repository.url(f"manifests/{self._tag}")
            self._repository.ask("PUT", url, {"Content-Type": MANIFESTS[0]}, body)
        self._verify(digest_of_bytes(body), parcel)
        return f"oci://{self._registry}/{self._name}:{self._tag}@{digest_of_bytes(body)}"

    def _has_blob(self, digest: str, size: int) -> bool:
        try:
            answer = self._repository.ask("HEAD", self._repository.url(f"blobs/{digest}"))
        except NotFound:
            return False
        return int(answer.headers.get("Content-Length", size)) == size

    def _push_blob(self, digest: str, size: int, data: Feed | bytes) -> None:
        begun = self._repository.ask("POST", self._repository.url("blobs/uploads/"), {"Content-Length": "0"})
        place = self._repository.url(begun.headers.get("Location", ""))
        place += ("&" if "?" in place else "?") + f"digest={digest}"
        headers = {"Content-Type": FILE_TYPE, "Content-Length": str(size)}
        self._repository.ask("PUT", place, headers, data if isinstance(data, bytes) else data.chunks())

    def _tagged(self) -> str | None:
        """Digest of the manifest that the tag means now; None if there is no such tag."""
        try:
            url = self._repository.url(f"manifests/{self._tag}")
            return digest_of_bytes(self._repository.ask("GET", url, {"Accept": ", ".join(MANIFESTS)}).content)
        except NotFound:
            return None

    def _verify(self, digest: str, parcel: Parcel) -> None:
        """As somebody who pulls it would see it."""
        found = self._repository.look_up(list)
        there = {file.name: file.digest and file.digest.value for file in found.files}
        if found.revision == digest and there == {file.name: file.entry.sha256 for file in parcel.everything}:
            return
        msg = f"{self.where}: the tag does not mean what was pushed: somebody else sets it too. Use a tag of your own."
        raise VerificationFailed(msg)


def build_manifest(parcel: Parcel) -> bytes:
    """The artifact's manifest: no time in it, the same files are the same artifact."""
    annotations = {DESCRIPTION: parcel.title} | ({LICENCES: parcel.licence} if parcel.licence else {})
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFESTS[0],
        "artifactType": ARTIFACT_TYPE,
        "config": _descriptor(EMPTY_TYPE, hashlib.sha256(EMPTY).hexdigest(), len(EMPTY)),
        "layers": [
            _descriptor(FILE_TYPE, file.entry.sha256, file.entry.size) | {"annotations": {TITLE: file.name}}
            for file in parcel.everything
        ],
        "annotations": annotations,
    }
    return json.dumps(document, indent=1, sort_keys=True).encode()


def _descriptor(media_type: str, sha256: str, size: int) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": f"sha256:{sha256}", "size": size}


def _digest(file: Outgoing) -> str:
    return f"sha256:{file.entry.sha256}"
