"""S3: the objects of a bucket, on AWS or any service that speaks its protocol.

A few calls, signed by Signature Version 4 (https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html).
Not by boto3: it wants python-dateutil below 3, the operator's client of Kubernetes one from 3 on. An object is pinned
by its ETag, and proven by its SHA-256 where the service keeps one, else by the MD5 that its ETag is.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote, unquote_plus, urlsplit
from xml.etree import ElementTree as ET

from finetune_trainer.config import DEFAULT_REGION, S3_CREDENTIALS
from finetune_trainer.runtime.errors import AccessDenied, InvalidConfig, NotFound, TrainerError, Unavailable
from finetune_trainer.runtime.wording import first_of
from finetune_trainer.sources import http
from finetune_trainer.sources.base import Algorithm, Body, Changed, Digest, Listing, RemoteFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import httpx2

    from finetune_trainer.config import S3Source
    from finetune_trainer.sources.base import Choose

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
MD5_ETAG, PARTS_ETAG = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{32}-\d+")
REFUSED_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "XAdminUserNotFound"}
"""The last is versitygw's word for a key that nobody has."""
ACTIONS = {"read": "list and read it", "write": "list, read, write and delete below it"}
OTHER_REGION = {
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "TemporaryRedirect",
    "IllegalLocationConstraintException",
}


@dataclass(frozen=True)
class Credentials:
    """An access key with its region, and the token that goes with a temporary one."""

    region: str
    key_id: str
    secret: str = dataclass_field(repr=False)
    token: str | None = dataclass_field(default=None, repr=False)


def read_credentials(secrets: Mapping[str, str | None], region: str | None, field: str) -> Credentials | None:
    """The credentials out of a Secret's keys; None if it has none of them. InvalidConfig if half is missing."""
    key_id, secret, token = (secrets.get(name) for name in S3_CREDENTIALS)
    if key_id is None and secret is None:
        return None
    if key_id is None or secret is None:
        missing = S3_CREDENTIALS[0] if key_id is None else S3_CREDENTIALS[1]
        msg = f"{field}.credentialsSecretRef: the Secret has no {missing}. Add it; both keys are needed."
        raise InvalidConfig(msg)
    return Credentials(region or DEFAULT_REGION, key_id, secret, token)


class S3:
    """The objects that a URI means: one key, or all keys below it."""

    def __init__(
        self, source: S3Source, field: str, credentials: Credentials | None, verb: Literal["read", "write"] = "read"
    ) -> None:
        """`verb`: what the keys must allow, for messages."""
        self.where = f"{field}: '{source.uri}'"
        self._field, self._verb = f"{field}.s3", verb
        self._region = source.region or DEFAULT_REGION
        self._endpoint = source.address
        self._credentials = credentials
        self._bucket, _, self._key = source.uri.removeprefix("s3://").partition("/")
        self._client = http.build_client(follow_redirects=False)  # a redirect would need a signature of its own

    def look_up(self, choose: Choose) -> Listing:
        """The files chosen, each with its ETag and hash. The revision is a hash of all of them."""
        files = tuple(self.described(file) for file in choose(self._list()))
        state = hashlib.sha256("".join(sorted(file.identity for file in files)).encode()).hexdigest()
        return Listing(revision=f"sha256:{state}", files=files)

    @contextmanager
    def open(self, file: RemoteFile, start: int) -> Iterator[Body]:
        """The bytes of an object, if it is still the one that was listed."""
        url = self.url(file.address)
        headers = {"If-Match": f'"{file.version}"'} if file.version else {}
        with self._reaching():
            signed = self._signed("GET", url) | headers
            with http.open_range(self._client, url, start, self._object_refusal, signed) as body:
                yield body

    # What is there

    def _list(self) -> list[RemoteFile]:
        """All objects below the key; else the object of just that key."""
        if below := self.below():
            return below
        exact = [(key, size) for key, size in self._keys(self._key, most=1) if key == self._key]
        if not exact:
            raise NotFound(f"{self.where} is not there{self._what_is_there()}. Correct {self._field}.uri.")
        return [RemoteFile(name=key.rpartition("/")[2], size=size, address=key) for key, size in exact]

    def below(self) -> list[RemoteFile]:
        """All objects below the key."""
        return [
            RemoteFile(name=key.removeprefix(self.root), size=size, address=key)
            for key, size in self._keys(self.root)
            if not key.endswith("/")
        ]

    @property
    def root(self) -> str:
        """What the keys of all objects below the key begin with."""
        return self._key.rstrip("/") + "/"

    def _keys(self, prefix: str, most: int | None = None) -> Iterator[tuple[str, int]]:
        """Keys and sizes that begin with a prefix, in their order."""
        asked = {"list-type": "2", "prefix": prefix, "encoding-type": "url"} | ({"max-keys": str(most)} if most else {})
        page: dict[str, str] = {}
        while True:
            tree = parse(self.ask("GET", self.url("", asked | page)).content, "ListBucketResult", self.where)
            decode = unquote_plus if tree.findtext("{*}EncodingType") == "url" else str
            for entry in tree.iterfind("{*}Contents"):
                yield decode(entry.findtext("{*}Key") or ""), int(entry.findtext("{*}Size") or 0)
            token = tree.findtext("{*}NextContinuationToken")
            if most or tree.findtext("{*}IsTruncated") != "true" or not token:
                return
            page = {"continuation-token": token}

    def _what_is_there(self) -> str:
        folder = self._key.rstrip("/").rpartition("/")[0]
        prefix = f"{folder}/" if folder else ""
        names = {key.removeprefix(prefix).partition("/")[0] for key, _ in self._keys(prefix, most=1000)}
        return f" ('{prefix or self._bucket}' has {first_of(sorted(names)) or 'nothing'})"

    def described(self, file: RemoteFile) -> RemoteFile:
        """The same file with what proves it. Changed if it is not there."""
        url = self.url(file.address)
        found = self.ask("HEAD", url, {"x-amz-checksum-mode": "ENABLED"}, self._object_refusal).headers
        size, etag = int(found.get("Content-Length", file.size)), found.get("ETag", "").strip('"')
        return file.model_copy(update={"size": size, "version": etag, "digest": self._digest(url, found, etag, size)})

    def _digest(self, url: str, found: httpx2.Headers, etag: str, size: int) -> Digest | None:
        checksum = found.get("x-amz-checksum-sha256", "")
        if checksum and "-" not in checksum and found.get("x-amz-checksum-type", "FULL_OBJECT") == "FULL_OBJECT":
            try:
                value = base64.b64decode(checksum, validate=True).hex()
            except binascii.Error:
                return None
            return Digest(algorithm=Algorithm.SHA256, value=value)
        if _is_encrypted_with_a_key(found):
            return None  # their ETags are no hashes of the bytes
        if MD5_ETAG.fullmatch(etag):
            return Digest(algorithm=Algorithm.MD5, value=etag)
        part_bytes = self._first_part(url) if PARTS_ETAG.fullmatch(etag) else 0
        if part_bytes and -(-size // part_bytes) == int(etag.partition("-")[2]):
            return Digest(algorithm=Algorithm.MD5_OF_PARTS, value=etag, part_bytes=part_bytes)
        return None

    def _first_part(self, url: str) -> int:
        """Size of the first part that an object was uploaded in; 0 if the service does not tell."""
        try:
            return int(self.ask("HEAD", f"{url}?partNumber=1").headers.get("Content-Length", "0"))
        except TrainerError:
            return 0

    # Asking

    def url(self, key: str, params: Mapping[str, str] | None = None) -> str:
        """An address whose parts are encoded as signatures want them."""
        path = f"{self._endpoint}/{self._bucket}" + (f"/{quote(key, safe='-._~/')}" if key else "")
        query = "&".join(
            f"{quote(name, safe='-._~')}={quote(value, safe='-._~')}" for name, value in (params or {}).items()
        )
        return f"{path}?{query}" if query else path

    def ask(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        refusal: Refusal | None = None,
        content: bytes | Iterable[bytes] | None = None,
    ) -> httpx2.Response:
        """An answer that is no refusal. A body's SHA-256 and length are among the headers."""
        with self._reaching():
            signed = self._signed(method, url, headers)
            response = self._client.request(method, url, headers=signed, content=content)
        if not response.is_success:
            raise (refusal or self.refusal)(response)
        return response

    def _signed(self, method: str, url: str, headers: Mapping[str, str] | None = None) -> dict[str, str]:
        """The headers, with a signature if there are credentials."""
        if self._credentials is None:
            return dict(headers or {})
        return sign(method, url, self._credentials, datetime.now(UTC), headers or {})

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        remedy = f"Correct {self._field}.endpoint, or check network and proxy."
        with http.reaching(self.where, f"the S3 service at {self._endpoint}", remedy):
            yield

    # Refusals

    def _object_refusal(self, response: httpx2.Response) -> TrainerError:
        if response.status_code in {http.NOT_FOUND, http.PRECONDITION_FAILED}:
            return Changed(f"{self.where}: an object was changed or deleted since it was listed. Run the job again.")
        return self.refusal(response)

    def refusal(self, response: httpx2.Response) -> TrainerError:  # noqa: PLR0911 - a word for each refusal
        """What the service says, with what the user can do."""
        status, (code, region) = response.status_code, error_code(response)
        secret = f"{self._field}.credentialsSecretRef"
        if code == "NoSuchBucket":
            return NotFound(
                f"{self.where}: there is no bucket '{self._bucket}'. Correct {self._field}.uri or .endpoint."
            )
        if code in REFUSED_KEYS:
            return AccessDenied(f"{self.where}: the keys are not accepted ({code}). Correct the Secret of {secret}.")
        if code in OTHER_REGION or region:
            hint = f"Set {self._field}.region: {region}." if region else f"Correct {self._field}.region."
            return InvalidConfig(f"{self.where}: the bucket is not in region '{self._region}'. {hint}")
        if "Quota" in code or status == http.INSUFFICIENT_STORAGE:
            return AccessDenied(
                f"{self.where}: the bucket takes no more ({code or status}). Raise its quota, or free it."
            )
        if code == "RequestTimeTooSkewed":
            return Unavailable(f"{self.where}: the clock of this machine is not the S3 service's ({code}). Set it.")
        if status in {http.UNAUTHORIZED, http.FORBIDDEN}:
            who = "these keys" if self._credentials else "anybody"
            return AccessDenied(
                f"{self.where}: {who} may not {self._verb} it ({code or status}). "
                f"Give keys that may {ACTIONS[self._verb]} in {secret}."
            )
        if http.is_passing(status):
            return Unavailable(f"{self.where}: the S3 service answers {code or status}. It is worth another try later.")
        return TrainerError(
            f"{self.where}: the S3 service at {self._endpoint} answers {code or status}. Correct {self._field}."
        )


if TYPE_CHECKING:
    from collections.abc import Callable

    Refusal = Callable[[httpx2.Response], TrainerError]


def sign(method: str, url: str, credentials: Credentials, now: datetime, headers: Mapping[str, str]) -> dict[str, str]:
    """The headers of a request, signed. `url` is encoded already, its query in any order.

    A request with a body has its hash among the headers, as x-amz-content-sha256.
    """
    parts, stamp = urlsplit(url), now.strftime("%Y%m%dT%H%M%SZ")
    signed = {"x-amz-content-sha256": EMPTY_SHA256} | {name.lower(): value for name, value in headers.items()}
    signed |= {"host": parts.netloc, "x-amz-date": stamp}
    if credentials.token:
        signed["x-amz-security-token"] = credentials.token
    names = sorted(signed)
    query = "&".join(sorted(parts.query.split("&")))
    listed = "".join(f"{name}:{signed[name].strip()}\n" for name in names)
    request = "\n".join([method, parts.path, query, listed, ";".join(names), signed["x-amz-content-sha256"]])
    scope = f"{stamp[:8]}/{credentials.region}/s3/aws4_request"
    text = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(request.encode()).hexdigest()])
    key = f"AWS4{credentials.secret}".encode()
    for step in scope.split("/"):
        key = hmac.digest(key, step.encode(), "sha256")
    authorization = (
        f"AWS4-HMAC-SHA256 Credential={credentials.key_id}/{scope}, SignedHeaders={';'.join(names)}, "
        f"Signature={hmac.digest(key, text.encode(), 'sha256').hex()}"
    )
    return {name: value for name, value in signed.items() if name != "host"} | {"Authorization": authorization}


def _is_encrypted_with_a_key(headers: httpx2.Headers) -> bool:
    kind = headers.get("x-amz-server-side-encryption", "")
    return kind.startswith("aws:kms") or "x-amz-server-side-encryption-customer-algorithm" in headers


def parse(content: bytes, kind: str, where: str) -> ET.Element:
    """What a service answers, an element of that kind. InvalidConfig if it is another, or no XML."""
    remedy = "Correct the endpoint, or check the proxy."
    try:
        found = ET.fromstring(content)  # noqa: S314 - expat bounds what entities may grow to since 2.4
    except ET.ParseError as error:
        msg = f"{where}: the service does not answer as S3 does ({error}). {remedy}"
        raise InvalidConfig(msg) from error
    if found.tag.rpartition("}")[2] != kind:  # a page that a proxy shows reads like an empty bucket
        msg = f"{where}: the service does not answer as S3 does (<{found.tag}> is no {kind}). {remedy}"
        raise InvalidConfig(msg)
    return found


def error_code(response: httpx2.Response) -> tuple[str, str]:
    """S3's own word for a refusal, and the region that the bucket is in, where they are told."""
    region = response.headers.get("x-amz-bucket-region", "")
    try:
        tree = ET.fromstring(response.content)  # noqa: S314 - as above
    except ET.ParseError:
        return "", region
    return tree.findtext("{*}Code") or tree.findtext("Code") or "", tree.findtext("{*}Region") or region
