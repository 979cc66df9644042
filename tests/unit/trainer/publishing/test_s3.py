"""Artifacts put into a real S3 server (versitygw), through a relay that cuts and holds."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from xml.etree import ElementTree as ET

import pytest

from finetune_trainer.progress import ExitCode, Reason
from finetune_trainer.publishing import delivery, s3
from finetune_trainer.runtime import manifest
from finetune_trainer.runtime.errors import Interrupted
from finetune_trainer.sources.s3 import S3
from tests.unit.trainer.publishing.conftest import CARD, LARGE_BYTES, MARKER, MERGED, WEIGHTS, Shop
from tests.unit.trainer.sources.servers import PART_BYTES, PASSWORD, UP, USER, Answer, Bucket, Relay, Site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from finetune_trainer.publishing.base import Outgoing
    from finetune_trainer.sources.base import Body, RemoteFile

SMALL_BYTES = 100_000
"""Questions, their signatures and a commit, but no file of a model."""


def an_entry(bucket: Bucket, artifact: str = "Merged", key: str = "models/fox", **fields: Any) -> dict[str, Any]:
    return {"name": "out", "artifact": artifact, **bucket.source(key), **fields}


def keys_below(bucket: Bucket, key: str = "models/fox/") -> list[str]:
    tree = ET.fromstring(bucket.call("GET", f"?list-type=2&prefix={quote(key, safe='')}").content)  # noqa: S314 - our own server
    return [entry.findtext("{*}Key", "").removeprefix(key) for entry in tree.iterfind("{*}Contents")]


def contents_of(bucket: Bucket, key: str = "models/fox/") -> dict[str, bytes]:
    return {name: bucket.call("GET", f"/{key}{name}").content for name in keys_below(bucket, key)}


def open_uploads(bucket: Bucket) -> int:
    return bucket.call("GET", "?uploads=").text.count("<UploadId>")


def test_what_is_published_is_the_artifact_with_card_licence_and_a_manifest_of_all(
    bucket: Bucket, shop: Shop, tmp_path: Path
) -> None:
    code, word = shop.publish(an_entry(bucket))
    assert code == ExitCode.COMPLETED, word.message
    there = contents_of(bucket)
    assert there == shop.expected("merged", "out")
    for name, body in there.items():
        (tmp_path / "fetched").mkdir(exist_ok=True)
        (tmp_path / "fetched" / name).write_bytes(body)
    found = manifest.verify(tmp_path / "fetched")
    assert found.inputs == {"merged": manifest.read(shop.work.merged).digest}
    assert word.published is not None
    assert (word.published.uri, word.published.artifact) == (f"s3://{bucket.name}/models/fox/", "merged")
    assert word.published.digest == found.digest
    assert word.published.size_bytes == sum(map(len, there.values()))


def test_an_adapter_goes_out_with_the_licence_of_the_base(bucket: Bucket, shop: Shop) -> None:
    assert shop.publish(an_entry(bucket, "Adapter"))[0] == ExitCode.COMPLETED
    assert contents_of(bucket) == shop.expected("adapter", "out")


def test_a_quantized_form_is_the_one_that_is_named(bucket: Bucket, shop: Shop) -> None:
    assert shop.publish(an_entry(bucket, "Quantized", quantizeName="gptq4"))[0] == ExitCode.COMPLETED
    assert contents_of(bucket) == shop.expected("quantized/gptq4", "out")


def test_a_second_run_says_the_same_and_asks_nobody(bucket: Bucket, shop: Shop, s3_relay: Relay) -> None:
    _, first = shop.publish(an_entry(bucket))
    s3_relay.reset()
    code, second = shop.publish(an_entry(bucket))
    assert (code, second) == (ExitCode.COMPLETED, first)
    assert s3_relay.taken == 0


def test_where_the_proof_was_lost_nothing_is_sent_again(bucket: Bucket, shop: Shop, s3_relay: Relay) -> None:
    _, first = shop.publish(an_entry(bucket))
    shop.forget()
    s3_relay.reset()
    code, second = shop.publish(an_entry(bucket))
    assert (code, second) == (ExitCode.COMPLETED, first)
    assert s3_relay.taken < SMALL_BYTES


def test_a_connection_that_breaks_costs_a_part(bucket: Bucket, shop: Shop, s3_relay: Relay) -> None:
    s3_relay.reset(cut_after=PART_BYTES + (PART_BYTES // 2), limited=UP)
    code, word = shop.publish(an_entry(bucket))
    assert code == ExitCode.COMPLETED, word.message
    assert contents_of(bucket) == shop.expected("merged", "out")
    assert s3_relay.taken < sum(map(len, MERGED.values())) + PART_BYTES + SMALL_BYTES
    assert open_uploads(bucket) == 0


def test_a_service_that_stays_away_is_worth_another_try_and_leaves_no_marker(
    bucket: Bucket, shop: Shop, s3_relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_relay.reset(cut_after=LARGE_BYTES // 2, limited=UP)
    monkeypatch.setattr("finetune_trainer.publishing.delivery.RETRY_PAUSES_SECONDS", ())
    code, word = shop.publish(an_entry(bucket))
    assert (code, word.reason) == (ExitCode.UNKNOWN, Reason.UNKNOWN)
    assert "output.publish[0].s3.endpoint" in word.message
    assert MARKER not in keys_below(bucket)
    s3_relay.reset()
    assert shop.publish(an_entry(bucket), "--attempt", "2")[0] == ExitCode.COMPLETED
    assert s3_relay.taken < sum(map(len, MERGED.values())), "parts that were there were not sent again"
    assert contents_of(bucket) == shop.expected("merged", "out")


def test_an_object_that_was_changed_there_is_put_right(bucket: Bucket, shop: Shop) -> None:
    shop.publish(an_entry(bucket))
    bucket.put(f"models/fox/{WEIGHTS}", MERGED[WEIGHTS][::-1])
    shop.forget()
    assert shop.publish(an_entry(bucket))[0] == ExitCode.COMPLETED
    assert contents_of(bucket) == shop.expected("merged", "out")


@pytest.fixture
def hashless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that tells no hash of what it holds, as one that encrypts with a key of its owner."""
    monkeypatch.setattr(S3, "_digest", lambda *_: None)


@pytest.mark.usefixtures("hashless")
def test_simulated_of_a_service_that_tells_no_hash_the_bytes_are_read_again(
    bucket: Bucket, shop: Shop, s3_relay: Relay
) -> None:
    _, first = shop.publish(an_entry(bucket))
    shop.forget()
    s3_relay.reset()
    assert shop.publish(an_entry(bucket)) == (ExitCode.COMPLETED, first)
    assert s3_relay.given > LARGE_BYTES
    assert s3_relay.taken < SMALL_BYTES
    bucket.put(f"models/fox/{WEIGHTS}", MERGED[WEIGHTS][::-1])
    shop.forget()
    assert shop.publish(an_entry(bucket))[0] == ExitCode.COMPLETED
    assert contents_of(bucket) == shop.expected("merged", "out")


@pytest.mark.usefixtures("hashless")
def test_simulated_asked_to_leave_while_it_reads_again_it_leaves(
    bucket: Bucket, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.publish(an_entry(bucket))
    shop.forget()
    opened, read = S3.open, 0

    def counted(chunks: Iterator[bytes]) -> Iterator[bytes]:
        nonlocal read
        for chunk in chunks:
            if not read:
                os.kill(os.getpid(), signal.SIGTERM)
            read += len(chunk)
            yield chunk

    @contextmanager
    def counting(remote: S3, file: RemoteFile, start: int) -> Iterator[Body]:
        with opened(remote, file, start) as body:
            yield replace(body, chunks=counted(body.chunks)) if file.name == WEIGHTS else body

    monkeypatch.setattr(S3, "open", counting)
    assert shop.publish(an_entry(bucket), "--attempt", "2")[0] == ExitCode.INTERRUPTED
    assert read < LARGE_BYTES


def once_put(monkeypatch: pytest.MonkeyPatch, name: str, action: Callable[[], object]) -> None:
    """Somebody else does something right after a file was put there."""
    put = s3.S3Sink._put

    def watched(sink: s3.S3Sink, file: Outgoing, chunks: Iterator[bytes]) -> None:
        put(sink, file, chunks)
        if file.name == name:
            action()

    monkeypatch.setattr(s3.S3Sink, "_put", watched)


def test_an_object_that_is_not_what_was_sent_is_found_out(
    bucket: Bucket, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = MERGED["config.json"][::-1]
    once_put(monkeypatch, "config.json", lambda: bucket.put("models/fox/config.json", other))
    code, word = shop.publish(an_entry(bucket))
    assert code == ExitCode.VERIFICATION_FAILED
    assert "config.json there is not, or no longer, the one of this publishing" in word.message
    assert MARKER not in keys_below(bucket)


def test_an_object_that_vanishes_while_others_are_sent_is_missed(
    bucket: Bucket, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    once_put(monkeypatch, MARKER, lambda: bucket.call("DELETE", "/models/fox/config.json"))
    code, word = shop.publish(an_entry(bucket))
    assert code == ExitCode.VERIFICATION_FAILED
    assert "config.json there is not, or no longer, the one of this publishing: somebody else publishes" in word.message
    assert MARKER not in keys_below(bucket)


def around_sending(
    monkeypatch: pytest.MonkeyPatch,
    before: Callable[[], object] = lambda: None,
    after: Callable[[], object] = lambda: None,
) -> None:
    """Somebody else does something before any file is sent, or once all are."""
    send_all = delivery._send_all

    def watched(*given: Any) -> None:
        before()
        send_all(*given)
        after()

    monkeypatch.setattr(delivery, "_send_all", watched)


def test_a_manifest_that_is_taken_away_while_it_is_read_is_none(
    bucket: Bucket, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.publish(an_entry(bucket))
    shop.forget()
    below = S3.below

    def listed(remote: S3) -> list[RemoteFile]:
        there = below(remote)
        bucket.call("DELETE", f"/models/fox/{MARKER}")
        return there

    monkeypatch.setattr(S3, "below", listed)
    code, word = shop.publish(an_entry(bucket))
    assert code == ExitCode.COMPLETED, word.message
    assert contents_of(bucket) == shop.expected("merged", "out")


TOO = "somebody else publishes to this place too. Give each entry of each job a prefix of its own"


@pytest.mark.parametrize("changed", ["config.json", WEIGHTS])
@pytest.mark.parametrize("when", ["before the manifest", "with the manifest"])
def test_an_object_of_the_same_size_that_somebody_else_puts_in_between_is_found_out(
    bucket: Bucket, shop: Shop, monkeypatch: pytest.MonkeyPatch, changed: str, when: str
) -> None:
    def overwrite() -> None:
        bucket.put(f"models/fox/{changed}", MERGED[changed][::-1])

    if when == "before the manifest":
        around_sending(monkeypatch, after=overwrite)
        once_put(monkeypatch, MARKER, lambda: pytest.fail("a mixture got a manifest"))
    else:
        once_put(monkeypatch, MARKER, overwrite)
    code, word = shop.publish(an_entry(bucket))
    assert (code, word.reason) == (ExitCode.VERIFICATION_FAILED, Reason.VERIFICATION_FAILED)
    assert f"{changed} there is not, or no longer, the one of this publishing: {TOO}" in word.message
    assert MARKER not in keys_below(bucket)


def test_where_another_publishing_puts_its_manifest_last_that_one_stays(
    bucket: Bucket, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    once_put(monkeypatch, MARKER, lambda: bucket.put(f"models/fox/{MARKER}", b"{}"))
    code, word = shop.publish(an_entry(bucket))
    assert code == ExitCode.VERIFICATION_FAILED
    assert f"{MARKER} there is not, or no longer, the one of this publishing: {TOO}" in word.message
    assert contents_of(bucket)[MARKER] == b"{}"


def test_another_publishing_that_is_done_before_anything_is_sent_stays_whole(
    bucket: Bucket, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    around_sending(monkeypatch, before=lambda: bucket.put(f"models/fox/{MARKER}", b"{}"))
    code, word = shop.publish(an_entry(bucket))
    assert code == ExitCode.VERIFICATION_FAILED
    assert TOO in word.message
    assert contents_of(bucket) == {MARKER: b"{}"}


def test_a_manifest_that_comes_while_a_file_is_sent_does_not_vouch_for_it(
    bucket: Bucket, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    once_put(monkeypatch, "config.json", lambda: bucket.put(f"models/fox/{MARKER}", b"{}"))
    code, word = shop.publish(an_entry(bucket))
    assert code == ExitCode.VERIFICATION_FAILED
    assert TOO in word.message
    assert MARKER not in keys_below(bucket)


@pytest.mark.parametrize("taken", [CARD, MARKER, WEIGHTS])
def test_files_of_somebody_else_are_not_overwritten(bucket: Bucket, shop: Shop, taken: str) -> None:
    theirs = {taken: b"mine", "notes.txt": b"mine too"}
    for name, body in theirs.items():
        bucket.put(f"models/fox/{name}", body)
    code, word = shop.publish(an_entry(bucket))
    assert (code, word.reason) == (ExitCode.INVALID_CONFIG, Reason.INVALID_CONFIG)
    assert f"has files of somebody else's that would be overwritten: {taken}." in word.message
    assert "a prefix of its own" in word.message
    assert contents_of(bucket) == theirs


def broken_off(*_: object) -> str:
    raise Interrupted


def test_what_a_publishing_left_that_was_broken_off_is_its_own_for_another_artifact_too(
    bucket: Bucket, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no manifest yet, and the files in the way have other bytes."""
    with monkeypatch.context() as patched:
        patched.setattr(s3.S3Sink, "commit", broken_off)
        assert shop.publish(an_entry(bucket))[0] == ExitCode.INTERRUPTED
    assert MARKER not in keys_below(bucket)
    assert shop.publish(an_entry(bucket, "Quantized", quantizeName="gptq4"))[0] == ExitCode.COMPLETED
    assert contents_of(bucket) == shop.expected("quantized/gptq4", "out")


def test_another_artifact_that_is_broken_off_has_no_marker(
    bucket: Bucket, shop: Shop, s3_relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the marker of what was there before would vouch for a mixture of both."""
    shop.publish(an_entry(bucket, "Quantized", quantizeName="gptq4"))
    shop.forget()
    s3_relay.reset(cut_after=LARGE_BYTES // 2, limited=UP)
    monkeypatch.setattr("finetune_trainer.publishing.delivery.RETRY_PAUSES_SECONDS", ())
    assert shop.publish(an_entry(bucket))[0] != ExitCode.COMPLETED
    assert MARKER not in keys_below(bucket)


def test_what_an_earlier_publishing_left_is_taken_away_and_nothing_else(bucket: Bucket, shop: Shop) -> None:
    shop.publish(an_entry(bucket))
    bucket.put("models/fox/notes.txt", b"mine")
    shop.forget()
    assert shop.publish(an_entry(bucket, "Adapter"))[0] == ExitCode.COMPLETED
    assert contents_of(bucket) == {**shop.expected("adapter", "out"), "notes.txt": b"mine"}


def test_of_an_artifact_with_a_damaged_file_nothing_is_published(bucket: Bucket, shop: Shop) -> None:
    path = shop.work.merged / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    code, word = shop.publish(an_entry(bucket))
    assert (code, word.reason) == (ExitCode.VERIFICATION_FAILED, Reason.VERIFICATION_FAILED)
    assert WEIGHTS in word.message
    assert keys_below(bucket) == []


def test_a_volume_without_room_for_what_is_written_for_it_is_told(
    bucket: Bucket, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainer.publish.OUTER_MANIFEST", "/dev/full")
    code, word = shop.publish(an_entry(bucket))
    assert (code, word.reason) == (ExitCode.VOLUME_FULL, Reason.VOLUME_FULL)
    assert keys_below(bucket) == []


def test_a_file_that_changes_while_it_is_sent_is_not_published(
    bucket: Bucket, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shop.work.merged / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    monkeypatch.setattr("finetune_trainer.__main__._verify_inputs", lambda *_: None)
    code, word = shop.publish(an_entry(bucket))
    assert code == ExitCode.VERIFICATION_FAILED
    assert WEIGHTS in word.message
    assert MARKER not in keys_below(bucket)
    assert open_uploads(bucket) == 0


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        pytest.param({"uri": "s3://no-such-bucket/fox"}, Reason.NOT_FOUND, "no bucket 'no-such-bucket'", id="bucket"),
        pytest.param({"region": "eu-west-1"}, Reason.INVALID_CONFIG, "output.publish[0].s3.region", id="region"),
    ],
)
def test_a_place_that_cannot_be_is_told_by_its_field(
    bucket: Bucket, shop: Shop, change: dict[str, Any], reason: Reason, words: str
) -> None:
    _, word = shop.publish({"name": "out", "artifact": "Adapter", **bucket.source("models/fox", **change)})
    assert word.reason is reason
    assert words in word.message


def test_keys_that_are_wrong_are_told_by_their_secret(bucket: Bucket, shop: Shop) -> None:
    shop.give_secret("AWS_SECRET_ACCESS_KEY", "wrong")
    _, word = shop.publish(an_entry(bucket, "Adapter"))
    assert word.reason is Reason.ACCESS_DENIED
    assert "output.publish[0].s3.credentialsSecretRef" in word.message


def test_keys_with_white_space_around_them_are_the_keys(bucket: Bucket, shop: Shop) -> None:
    shop.give_secret("AWS_ACCESS_KEY_ID", f" {USER}\r\n")
    shop.give_secret("AWS_SECRET_ACCESS_KEY", f"\n{PASSWORD}\n\n")
    code, word = shop.publish(an_entry(bucket, "Adapter"))
    assert code == ExitCode.COMPLETED, word.message


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"])
@pytest.mark.parametrize("text", ["two\nlines", "f\N{FOX FACE}x", "nil\0"])
def test_keys_that_no_request_can_carry_are_told_by_their_secret_and_not_repeated(
    bucket: Bucket, shop: Shop, name: str, text: str
) -> None:
    shop.give_secret(name, text)
    _, word = shop.publish(an_entry(bucket, "Adapter"))
    assert word.reason is Reason.INVALID_CONFIG
    assert f"output.publish[0].s3.credentialsSecretRef: {name} is not one line of ASCII" in word.message
    assert not any(part in word.message for part in (text, repr(text), "Signature", "Credential="))


def test_keys_that_are_not_there_are_asked_for(bucket: Bucket, shop: Shop) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        shop.give_secret(name, "")
    _, word = shop.publish(an_entry(bucket, "Adapter"))
    assert word.reason is Reason.NOT_FOUND
    assert "output.publish[0].s3.credentialsSecretRef" in word.message
    assert f"{shop.desk.root}/secrets/publish-0" in word.message


def test_stand_in_service_keys_that_may_not_delete_are_told_all_that_they_need(shop: Shop) -> None:
    site = Site(lambda _path, _headers: Answer(b"<Error><Code>AccessDenied</Code></Error>", 403))
    give_keys(shop)
    _, word = shop.publish(an_entry(Bucket(site.url, "out")))
    assert word.reason is Reason.ACCESS_DENIED
    assert "list, read, write and delete below it" in word.message
    site.close()


def give_keys(shop: Shop) -> None:
    shop.give_secret("AWS_ACCESS_KEY_ID", USER)
    shop.give_secret("AWS_SECRET_ACCESS_KEY", PASSWORD)
