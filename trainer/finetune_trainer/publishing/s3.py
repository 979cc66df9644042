"""S3: files below a prefix, manifest.json last.

A large file goes in parts, so that a connection, or an attempt, that breaks off costs one part
(https://docs.aws.amazon.com/AmazonS3/latest/userguide/mpuoverview.html). A part that is there is known by its MD5, a
whole object by what the service says of it: its SHA-256, its ETag, or, where that is no hash, its bytes read again.

S3 has no lock, so nothing keeps two publishings from one prefix. Each looks after every object that it put whether the
other's marker has come, and after its marker whether every object is still the one that it proved: one of both finds
out, and no marker stays that vouches for a mixture.
"""

from __future__ import annotations

import base64
import hashlib
import logging
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from finetune_trainer.publishing.base import accounted_for
from finetune_trainer.runtime.errors import InvalidConfig, TrainerError, Unavailable, VerificationFailed
from finetune_trainer.runtime.manifest import MANIFEST_NAME
from finetune_trainer.runtime.wording import first_of
from finetune_trainer.sources.base import Changed, RemoteFile
from finetune_trainer.sources.s3 import S3, error_code, parse

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import httpx2

    from finetune_trainer.config import S3Target
    from finetune_trainer.publishing.base import Feed, Outgoing, Parcel
    from finetune_trainer.sources.s3 import Credentials

log = logging.getLogger(__name__)

PART_BYTES = 64 << 20
PARTS_LIMIT = 10_000
"""S3's own."""
MARK = {"x-amz-meta-published-by": "finetune-operator"}
"""On every object that is sent: a publishing that was broken off leaves no manifest to account for them."""


def part_bytes(size: int) -> int:
    """Size of a file's parts: the usual one, or what makes the number of parts S3 allows."""
    return max(PART_BYTES, -(-size // PARTS_LIMIT))


class S3Sink:
    """A prefix in a bucket."""

    def __init__(self, target: S3Target, field: str, credentials: Credentials | None) -> None:
        self._bucket = S3(target, field, credentials, "write")
        self._uri = target.uri.rstrip("/") + "/"
        self.where = self._bucket.where
        self._etags: dict[str, str] = {}
        """What the objects that were sent in parts must have, by their parts' MD5."""
        self._proven: dict[str, str] = {}
        """What the objects had when they were proven, by the names of their files."""
        self._marker: Outgoing
        """This publishing's own."""

    def prepare(self, parcel: Parcel) -> None:
        """Take away what an earlier publishing left; its marker too, unless it is the same one. InvalidConfig."""
        self._marker = parcel.marker
        there = {file.name: file for file in self._bucket.below()}
        ours, names = accounted_for(self._bucket, there), {file.name for file in parcel.everything}
        self._refuse_taken(file for file in parcel.everything if file.name in there.keys() - ours)
        for name in sorted(ours - names):
            self._delete(there.pop(name).address)
        if MANIFEST_NAME in there and not self._is_proven(parcel.marker, None):
            self._delete(there[MANIFEST_NAME].address)
        if others := sorted(there.keys() - names):
            log.warning("%s has other objects, which stay as they are: %s", self.where, first_of(others))

    def has(self, file: Outgoing, feed: Feed) -> bool:
        """By the SHA-256 or the ETag of the object."""
        return self._is_proven(file, feed)

    def send(self, file: Outgoing, feed: Feed) -> None:
        """In one piece, or in parts, and never beside another publishing's marker."""
        self._give_way()
        if file.entry.size > PART_BYTES:
            self._send_parts(file, feed)
        else:
            self._put(file, feed.chunks())
        if not self.has(file, feed):
            raise self._not_ours(file)
        try:
            self._give_way()
        except VerificationFailed:
            self._delete(self._remote(self._marker).address)  # it came while this was sent: of a mixture now
            raise

    def commit(self, parcel: Parcel) -> str:
        """Put the marker if every object is what was proven, and look whether that is so still."""
        self._refuse_overwritten(parcel.files)
        if not self._is_proven(parcel.marker, None):
            self._put(parcel.marker, iter([parcel.marker.path.read_bytes()]))
            self._is_proven(parcel.marker, None)
        self._refuse_overwritten([parcel.marker])
        try:
            self._refuse_overwritten(parcel.files)
        except VerificationFailed:
            self._delete(self._remote(parcel.marker).address)
            raise
        return self._uri

    # Objects

    def _url(self, file: Outgoing, params: dict[str, str] | None = None) -> str:
        return self._bucket.url(self._bucket.root + file.name, params)

    def _remote(self, file: Outgoing) -> RemoteFile:
        return RemoteFile(name=file.name, size=file.entry.size, address=self._bucket.root + file.name)

    def _is_proven(self, file: Outgoing, feed: Feed | None) -> bool:
        """Whether the object is there and has the file's bytes. `feed`: to hash the file by; small ones need none."""
        found = self._found(file)
        if found is None or not self._has_bytes(found, file, feed):
            return False
        self._proven[file.name] = found.version
        return True

    def _found(self, file: Outgoing) -> RemoteFile | None:
        """The object, if it is there."""
        try:
            return self._bucket.described(self._remote(file))
        except Changed:
            return None

    def _has_bytes(self, found: RemoteFile, file: Outgoing, feed: Feed | None) -> bool:
        if found.size != file.entry.size:
            return False
        if found.digest is None:
            return self._read_back(found, feed) == file.entry.sha256
        if found.digest.value in {file.entry.sha256, self._etags.get(file.name)}:
            return True
        hasher = found.digest.hasher(found.size)
        if feed is not None:
            return feed.hash(hasher) == found.digest.value
        hasher.update(file.path.read_bytes())
        return hasher.hexdigest() == found.digest.value

    def _read_back(self, found: RemoteFile, feed: Feed | None) -> str:
        """The SHA-256 of the object's bytes."""
        digest = hashlib.sha256()
        with self._bucket.open(found, 0) as body:
            for chunk in body.chunks:
                digest.update(chunk)
                if feed is not None:
                    feed.beat()
        return digest.hexdigest()

    def _put(self, file: Outgoing, chunks: Iterator[bytes]) -> None:
        """An object in one piece, of which the service checks the SHA-256."""
        checksum = base64.b64encode(bytes.fromhex(file.entry.sha256)).decode()
        headers = _of_body(file.entry.size, file.entry.sha256) | {"x-amz-checksum-sha256": checksum} | MARK
        self._bucket.ask("PUT", self._url(file), headers, self._upload_refusal, chunks)

    def _delete(self, key: str) -> None:
        self._bucket.ask("DELETE", self._bucket.url(key))

    # Parts

    def _send_parts(self, file: Outgoing, feed: Feed) -> None:
        """Go on with the newest upload of the file that is not complete, or begin one."""
        upload = next(iter(self._open_uploads(file)), None) or self._begin(file)
        there, etags, whole = self._parts(file, upload), [], hashlib.sha256()
        step = part_bytes(file.entry.size)
        for number, start in enumerate(range(0, file.entry.size, step), start=1):
            part = feed.take(start, step)
            whole.update(part)
            etags.append(hashlib.md5(part, usedforsecurity=False).hexdigest())
            if there.get(number) != etags[-1]:
                there[number] = self._send_part(file, upload, number, part, feed.slices(start, part))
            feed.reach(start + len(part))
        if whole.hexdigest() != file.entry.sha256:
            self._abort(file, upload)
            msg = f"{self.where}: {file.name} was changed while it was sent. Run publish again."
            raise VerificationFailed(msg)
        self._give_way()
        self._complete(file, upload, [there[number] for number in range(1, len(etags) + 1)])
        self._etags[file.name] = _etag_of_parts(etags)
        for left in self._open_uploads(file):
            self._abort(file, left)

    def _send_part(self, file: Outgoing, upload: str, number: int, part: bytes, chunks: Iterator[bytes]) -> str:
        """The ETag of the part."""
        url = self._url(file, {"partNumber": str(number), "uploadId": upload})
        headers = _of_body(len(part), hashlib.sha256(part).hexdigest())
        answer = self._bucket.ask("PUT", url, headers, self._upload_refusal, chunks)
        return str(answer.headers.get("ETag", "")).strip('"')

    def _open_uploads(self, file: Outgoing) -> list[str]:
        """Uploads of the file that were begun and not completed, the newest first."""
        key = self._bucket.root + file.name
        answer = self._bucket.ask("GET", self._bucket.url("", {"uploads": "", "prefix": key}))
        tree = parse(answer.content, "ListMultipartUploadsResult", self.where)
        found = [
            (upload.findtext("{*}Initiated") or "", upload.findtext("{*}UploadId") or "")
            for upload in tree.iterfind("{*}Upload")
            if upload.findtext("{*}Key") == key
        ]
        return [upload for _, upload in sorted(found, reverse=True)]

    def _begin(self, file: Outgoing) -> str:
        answer = self._bucket.ask("POST", self._url(file, {"uploads": ""}), MARK)
        tree = parse(answer.content, "InitiateMultipartUploadResult", self.where)
        if not (upload := tree.findtext("{*}UploadId")):
            msg = f"{self.where}: the service names no upload. Correct the endpoint."
            raise TrainerError(msg)
        return upload

    def _parts(self, file: Outgoing, upload: str) -> dict[int, str]:
        """ETags of the parts that are there, by their numbers."""
        found, after = dict[int, str](), "0"
        while True:
            url = self._url(file, {"uploadId": upload, "part-number-marker": after})
            answer = self._bucket.ask("GET", url, refusal=self._upload_refusal)
            tree = parse(answer.content, "ListPartsResult", self.where)
            for part in tree.iterfind("{*}Part"):
                found[int(part.findtext("{*}PartNumber") or 0)] = (part.findtext("{*}ETag") or "").strip('"')
            after = tree.findtext("{*}NextPartNumberMarker") or ""
            if tree.findtext("{*}IsTruncated") != "true" or not after:
                return found

    def _complete(self, file: Outgoing, upload: str, etags: list[str]) -> None:
        listed = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>&quot;{escape(etag)}&quot;</ETag></Part>"
            for number, etag in enumerate(etags, start=1)
        )
        body = f"<CompleteMultipartUpload>{listed}</CompleteMultipartUpload>".encode()
        headers = _of_body(len(body), hashlib.sha256(body).hexdigest())
        answer = self._bucket.ask("POST", self._url(file, {"uploadId": upload}), headers, self._upload_refusal, body)
        if (code := error_code(answer)[0]) != "":  # S3 says 200 before it knows
            msg = f"{self.where}: the S3 service answers {code} to the end of {file.name}. It is worth another try."
            raise Unavailable(msg)

    def _abort(self, file: Outgoing, upload: str) -> None:
        self._bucket.ask("DELETE", self._url(file, {"uploadId": upload}), refusal=self._upload_refusal)

    # Refusals

    def _refuse_taken(self, files: Iterable[Outgoing]) -> None:
        """InvalidConfig if objects are in the way that no publishing has put there."""
        ((mark, publisher),) = MARK.items()
        heads = {file.name: self._bucket.ask("HEAD", self._url(file)).headers for file in files}
        if taken := [name for name, head in heads.items() if head.get(mark) != publisher]:
            msg = f"{self.where} has files of somebody else's that would be overwritten: {first_of(taken)}. "
            raise InvalidConfig(msg + "Give the entry a prefix of its own, or take them away.")

    def _give_way(self) -> None:
        """VerificationFailed if another publishing's marker is there."""
        found = self._found(self._marker)
        if found is not None and not self._has_bytes(found, self._marker, None):
            raise self._not_ours(self._marker)

    def _refuse_overwritten(self, files: Iterable[Outgoing]) -> None:
        """VerificationFailed if an object is not the one any more that was proven."""
        for file in files:
            found = self._found(file)
            if found is None or found.version != self._proven.get(file.name):
                raise self._not_ours(file)

    def _not_ours(self, file: Outgoing) -> VerificationFailed:
        return VerificationFailed(
            f"{self.where}: {file.name} there is not, or no longer, the one of this publishing: somebody else "
            "publishes to this place too. Give each entry of each job a prefix of its own; then run publish again."
        )

    def _upload_refusal(self, response: httpx2.Response) -> TrainerError:
        code = error_code(response)[0]
        if code in {"NoSuchUpload", "InvalidPart", "RequestTimeout"}:
            return Unavailable(
                f"{self.where}: an upload broke off ({code}): it was too slow, or somebody else publishes to this "
                "place too. It is worth another try."
            )
        if code in {"XAmzContentSHA256Mismatch", "BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch"}:
            return VerificationFailed(
                f"{self.where}: what came there is not what the manifest says ({code}). Run publish again; if it stays "
                "so, the files of the artifact were changed."
            )
        return self._bucket.refusal(response)


def _of_body(size: int, sha256: str) -> dict[str, str]:
    """What is told, and signed, of the body of a request."""
    return {"content-length": str(size), "x-amz-content-sha256": sha256}


def _etag_of_parts(md5s: list[str]) -> str:
    whole = hashlib.md5(b"".join(map(bytes.fromhex, md5s)), usedforsecurity=False)
    return f"{whole.hexdigest()}-{len(md5s)}"
