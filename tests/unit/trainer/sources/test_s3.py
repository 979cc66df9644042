"""Objects of a real S3 server (versitygw), which checks every signature itself."""

from __future__ import annotations

import base64
import hashlib
import signal
from typing import TYPE_CHECKING, Any

import pytest

from finetune_trainer.runtime.errors import (
    AccessDenied,
    InvalidConfig,
    NotFound,
    TrainerError,
    Unavailable,
    VerificationFailed,
)
from finetune_trainer.sources import s3
from finetune_trainer.sources.base import Algorithm, Digest
from tests.unit.trainer.sources.conftest import JUNK, TINY_MODEL, Errands, contents
from tests.unit.trainer.sources.servers import PART_BYTES, Answer, Bucket, Relay, Site, wait_until

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

WEIGHTS = "model.safetensors"
LARGE = bytes(range(256)) * (3 << 12)
"""3 MiB."""


def put_model(bucket: Bucket, files: Mapping[str, bytes] = TINY_MODEL) -> None:
    for name, body in {**files, **JUNK}.items():
        bucket.put(f"models/tiny/{name}", body)


def test_a_model_is_what_lies_below_the_key_and_nothing_else(bucket: Bucket, errands: Errands) -> None:
    put_model(bucket)
    fetched = errands.fetch("model", bucket.source("models/tiny"))
    assert contents(fetched.path) == TINY_MODEL
    assert fetched.revision is not None
    assert fetched.revision.startswith("sha256:")
    assert fetched.revision == errands.fetch("model", bucket.source("models/tiny")).revision


def test_one_object_is_one_file(bucket: Bucket, errands: Errands) -> None:
    bucket.put("data/train.jsonl", b'{"text": "a"}\n')
    bucket.put("data/train.jsonl.old", b"x")
    fetched = errands.fetch("dataset-0", bucket.source("data/train.jsonl"))
    assert fetched.path.name == "train.jsonl"
    assert fetched.path.read_bytes() == b'{"text": "a"}\n'


def test_keys_that_need_escaping_are_signed_right(bucket: Bucket, errands: Errands) -> None:
    bucket.put("more data/a+b é=~(').jsonl", b"{}\n")
    fetched = errands.fetch("dataset-0", bucket.source("more data"))
    assert fetched.path.name == "a+b é=~(').jsonl"


def test_a_listing_of_many_pages_is_read_to_its_end(
    bucket: Bucket, errands: Errands, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        bucket.put(f"many/{number}.jsonl", b"{}\n")
    build_url = s3.S3.url
    small = lambda self, key, params=None: build_url(self, key, {**params, "max-keys": "2"} if params else None)  # noqa: E731
    monkeypatch.setattr(s3.S3, "url", small)
    assert len(contents(errands.fetch("dataset-0", bucket.source("many")).path)) == 5


def test_a_killed_download_goes_on_where_it_was(bucket: Bucket, errands: Errands, s3_relay: Relay) -> None:
    put_model(bucket, {"config.json": b"{}", "tokenizer.json": b"{}", WEIGHTS: LARGE})
    source = bucket.source("models/tiny")
    s3_relay.reset(hold_after=1 << 20)
    process = errands.fetch_in_a_process("model", source)
    assert s3_relay.holding.wait(60)
    wait_until(lambda: sum(errands.parts("model").values()) > (1 << 20) - (1 << 16))
    process.send_signal(signal.SIGKILL)
    process.wait()
    here = sum(errands.parts("model").values())
    s3_relay.reset()
    fetched = errands.fetch("model", source)
    assert contents(fetched.path)[WEIGHTS] == LARGE
    assert s3_relay.given < len(LARGE) - here + 4096  # the rest, and headers


def test_a_connection_that_breaks_is_taken_up_at_once(bucket: Bucket, errands: Errands, s3_relay: Relay) -> None:
    bucket.put("rows.jsonl", LARGE)
    s3_relay.reset(cut_after=1 << 20)
    assert errands.fetch("dataset-0", bucket.source("rows.jsonl")).path.read_bytes() == LARGE
    assert s3_relay.given < len(LARGE) + (64 << 10) + 8192


def test_an_object_in_parts_is_proven_by_the_hash_of_its_parts(bucket: Bucket, errands: Errands) -> None:
    body = LARGE * 2
    assert len(body) > PART_BYTES
    bucket.put_in_parts("rows.jsonl", body)
    source = bucket.source("rows.jsonl")
    assert errands.fetch("dataset-0", source).path.read_bytes() == body
    file = errands.pinned("dataset-0")[0]
    assert file.digest is not None
    assert file.digest.algorithm is Algorithm.MD5_OF_PARTS
    errands.leave_part("dataset-0", file, body[: 1 << 20] + b"?")
    assert errands.fetch("dataset-0", source).path.read_bytes() == body


def test_a_sha256_of_the_service_is_believed_first(bucket: Bucket, errands: Errands) -> None:
    digest = hashlib.sha256(LARGE).digest()
    bucket.put("rows.jsonl", LARGE, x_amz_checksum_sha256=base64.b64encode(digest).decode())
    errands.fetch("dataset-0", bucket.source("rows.jsonl"))
    assert errands.pinned("dataset-0")[0].digest == Digest(algorithm=Algorithm.SHA256, value=digest.hex())


def test_an_object_that_changed_between_tries_is_never_mixed(bucket: Bucket, errands: Errands, s3_relay: Relay) -> None:
    bucket.put("data/a.jsonl", LARGE)
    bucket.put("data/b.jsonl", b"{}\n")
    source = bucket.source("data")
    s3_relay.reset(hold_after=1 << 20)
    process = errands.fetch_in_a_process("dataset-0", source)
    assert s3_relay.holding.wait(60)
    wait_until(lambda: bool(errands.parts("dataset-0")))
    process.kill()
    process.wait()
    s3_relay.reset()
    bucket.put("data/a.jsonl", LARGE[::-1])
    assert contents(errands.fetch("dataset-0", source).path) == {"a.jsonl": LARGE[::-1], "b.jsonl": b"{}\n"}


def test_a_temporary_key_is_sent_with_its_token(errands: Errands) -> None:
    seen: list[str | None] = []

    def answer(_path: str, headers: Mapping[str, str]) -> Answer:
        seen.append(headers.get("x-amz-security-token"))
        assert "x-amz-security-token" in headers.get("Authorization", "")
        return Answer(b"<Error><Code>AccessDenied</Code></Error>", 403)

    site = Site(answer)
    for name, text in {"ID": "a", "SECRET": "b"}.items():
        errands.give_secret("model", f"AWS_{'ACCESS_KEY_ID' if name == 'ID' else 'SECRET_ACCESS_KEY'}", text)
    errands.give_secret("model", "AWS_SESSION_TOKEN", "t0ken\n")
    with pytest.raises(AccessDenied):
        errands.fetch("model", Bucket(site.url, "bucket").source("key"))
    assert seen == ["t0ken"]
    site.close()


@pytest.mark.parametrize(
    ("key", "change", "error", "words"),
    [
        pytest.param("models/tiny", {"uri": "s3://no-such-bucket/models"}, NotFound, "no bucket", id="bucket"),
        pytest.param("models/tinny", {}, NotFound, "'models/' has tiny). Correct model.s3.uri", id="key"),
        pytest.param("models/tiny", {"region": "eu-west-1"}, InvalidConfig, "model.s3.region: us-east-1", id="region"),
        pytest.param(
            "models/tiny", {"endpoint": "http://127.0.0.1:9"}, TrainerError, "Correct model.s3.endpoint", id="endpoint"
        ),
    ],
)
def test_what_is_not_there_is_named_with_its_field(
    bucket: Bucket, errands: Errands, key: str, change: dict[str, str], error: type[TrainerError], words: str
) -> None:
    put_model(bucket)
    source = bucket.source(key)
    source["s3"].update(change)
    with pytest.raises(error) as caught:
        errands.fetch("model", source)
    assert words in str(caught.value)
    assert str(caught.value).startswith("model: 's3://")


@pytest.mark.parametrize(
    ("secrets", "error", "words"),
    [
        pytest.param({"AWS_SECRET_ACCESS_KEY": "wrong"}, AccessDenied, "SignatureDoesNotMatch", id="a wrong secret"),
        pytest.param({"AWS_ACCESS_KEY_ID": "nobody"}, AccessDenied, "XAdminUserNotFound", id="an unknown key"),
        pytest.param({"AWS_ACCESS_KEY_ID": ""}, InvalidConfig, "no AWS_ACCESS_KEY_ID", id="half a secret"),
        pytest.param(
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, NotFound, "empty or not mounted", id="no secret"
        ),
    ],
)
def test_denied_credentials_name_the_secret(
    bucket: Bucket, errands: Errands, secrets: dict[str, str], error: type[TrainerError], words: str
) -> None:
    for name, text in secrets.items():
        errands.give_secret("model", name, text)
    with pytest.raises(error) as caught:
        errands.fetch("model", bucket.source("models/tiny"))
    assert words in str(caught.value)
    assert "credentialsSecretRef" in str(caught.value)


def test_a_closed_bucket_asks_for_keys(bucket: Bucket, errands: Errands, tmp_path: Path) -> None:
    source: dict[str, Any] = bucket.source("models/tiny")
    del source["s3"]["credentialsSecretRef"]
    for path in (tmp_path / "secrets" / "model").iterdir():
        path.unlink()
    with pytest.raises(AccessDenied) as caught:
        errands.fetch("model", source)
    assert "anybody may not read it" in str(caught.value)


def test_stand_in_service_objects_encrypted_with_a_key_are_known_by_size_alone(errands: Errands) -> None:
    """No key service is at hand: a stand-in gives the headers that AWS gives."""
    listing = b"<ListBucketResult><Contents><Key>rows.jsonl</Key><Size>3</Size></Contents></ListBucketResult>"
    headers = {"ETag": f'"{"0" * 32}"', "x-amz-server-side-encryption": "aws:kms"}

    def answer(path: str, _headers: Mapping[str, str]) -> Answer:
        below = "prefix=rows.jsonl%2F" in path
        if "list-type" in path:
            return Answer(b"<ListBucketResult/>" if below else listing)
        return Answer(b"{}\n", headers=dict(headers))

    site = Site(answer)
    source = {"s3": {"uri": "s3://bucket/rows.jsonl", "endpoint": site.url}}
    assert errands.fetch("dataset-0", source).path.read_bytes() == b"{}\n"
    site.close()


def test_stand_in_service_bytes_that_are_not_those_of_the_etag_are_refused(errands: Errands) -> None:
    """A real server cannot be made to lie: a stand-in gives other bytes than its ETag says."""
    listing = b"<ListBucketResult><Contents><Key>rows.jsonl</Key><Size>3</Size></Contents></ListBucketResult>"

    def answer(path: str, _headers: Mapping[str, str]) -> Answer:
        if "list-type" in path:
            return Answer(b"<ListBucketResult/>" if "%2F&" in path or path.endswith("%2F") else listing)
        return Answer(b"{}?", headers={"ETag": f'"{hashlib.md5(b"{}!").hexdigest()}"'})  # noqa: S324 - S3's

    site = Site(answer)
    with pytest.raises(VerificationFailed) as caught:
        errands.fetch("dataset-0", {"s3": {"uri": "s3://bucket/rows.jsonl", "endpoint": site.url}})
    assert "rows.jsonl is not what it should be" in str(caught.value)
    site.close()


def test_stand_in_proxy_a_page_of_its_own_is_not_an_empty_bucket(errands: Errands) -> None:
    site = Site(lambda _path, _headers: Answer(b"<html>Log in</html>"))
    with pytest.raises(InvalidConfig) as caught:
        errands.fetch("model", {"s3": {"uri": "s3://bucket/models", "endpoint": site.url}})
    assert "does not answer as S3 does (<html> is no ListBucketResult)" in str(caught.value)
    assert "proxy" in str(caught.value)
    site.close()


def test_stand_in_service_a_clock_that_is_wrong_is_not_taken_for_keys_that_are(errands: Errands) -> None:
    site = Site(lambda _path, _headers: Answer(b"<Error><Code>RequestTimeTooSkewed</Code></Error>", 403))
    with pytest.raises(Unavailable) as caught:
        errands.fetch("model", {"s3": {"uri": "s3://bucket/models", "endpoint": site.url}})
    assert "clock" in str(caught.value)
    site.close()
