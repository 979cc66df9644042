"""Artifacts committed to a hub: a stand-in, which speaks the calls that huggingface_hub makes to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from finetune_trainer.progress import ExitCode, Reason
from tests.unit.trainer.publishing.conftest import CARD, LARGE_BYTES, Shop
from tests.unit.trainer.sources.servers import UP, Answer, Relay, Site
from tests.unit.trainer.sources.standins import COMMIT, StandInWritableHub, refused

if TYPE_CHECKING:
    from collections.abc import Iterator

GIVEN = {".gitattributes": b"*.safetensors filter=lfs"}
"""What a new repository has."""


@pytest.fixture
def hub(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInWritableHub]:
    shop.give_secret("token", "hf_secret\n")
    hub = StandInWritableHub(dict(GIVEN), token="hf_secret", made=False)  # noqa: S106 - the stand-in's
    relay = Relay(hub.site.port)
    hub.relay = relay  # type: ignore[attr-defined]
    monkeypatch.setenv("HF_ENDPOINT", relay.url)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _seconds: None)
    yield hub
    relay.close()
    hub.site.close()


@pytest.fixture
def relay(hub: StandInWritableHub) -> Relay:
    found: Relay = hub.relay  # type: ignore[attr-defined]
    return found


def an_entry(artifact: str = "Merged", **fields: Any) -> dict[str, Any]:
    place = {"repo": "owner/tiny", "tokenSecretRef": {"name": "hub", "key": "token"}, **fields}
    return {"name": "out", "artifact": artifact, "huggingFace": place}


def head(hub: StandInWritableHub, branch: str = "main") -> dict[str, bytes]:
    return hub.commits[hub.branches[branch]]


def test_stand_in_hub_a_repository_is_made_private_and_gets_all_in_one_commit(
    hub: StandInWritableHub, shop: Shop, relay: Relay
) -> None:
    code, word = shop.publish(an_entry())
    assert code == ExitCode.COMPLETED, word.message
    assert head(hub) == GIVEN | shop.expected("merged", "out")
    assert hub.private
    assert len(hub.commits) == 2
    assert word.published is not None
    assert word.published.uri == f"{relay.url}/owner/tiny/tree/{hub.branches['main']}"


def test_stand_in_hub_a_branch_is_made_and_the_others_stay(hub: StandInWritableHub, shop: Shop) -> None:
    assert shop.publish(an_entry("Adapter", revision="adapter"))[0] == ExitCode.COMPLETED
    assert head(hub, "adapter") == GIVEN | shop.expected("adapter", "out")
    assert hub.branches["main"] == COMMIT


def test_stand_in_hub_where_the_proof_was_lost_nothing_is_sent_or_committed_again(
    hub: StandInWritableHub, shop: Shop, relay: Relay
) -> None:
    _, first = shop.publish(an_entry())
    shop.forget()
    relay.reset()
    commits = len(hub.commits)
    code, second = shop.publish(an_entry())
    assert (code, second, len(hub.commits)) == (ExitCode.COMPLETED, first, commits)
    assert relay.taken < 10_000


def test_stand_in_hub_an_upload_that_breaks_is_taken_up(hub: StandInWritableHub, shop: Shop, relay: Relay) -> None:
    relay.reset(cut_after=LARGE_BYTES // 2, limited=UP)
    code, word = shop.publish(an_entry())
    assert code == ExitCode.COMPLETED, word.message
    assert head(hub) == GIVEN | shop.expected("merged", "out")


def test_stand_in_hub_a_commit_whose_answer_was_lost_is_not_made_twice(
    hub: StandInWritableHub, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, answers = hub._commit, iter([False])

    def lose(*change: Any) -> Any:
        said = commit(*change)
        if next(answers, True):
            return said
        said.status = 503
        return said

    monkeypatch.setattr(hub, "_commit", lose)
    code, word = shop.publish(an_entry())
    assert code == ExitCode.COMPLETED, word.message
    assert len(hub.commits) == 2


def test_stand_in_hub_what_an_earlier_publishing_left_is_deleted_and_nothing_else(
    hub: StandInWritableHub, shop: Shop
) -> None:
    shop.publish(an_entry())
    head(hub)["notes.txt"] = b"mine"
    shop.forget()
    assert shop.publish(an_entry("Adapter"))[0] == ExitCode.COMPLETED
    assert head(hub) == {**GIVEN, **shop.expected("adapter", "out"), "notes.txt": b"mine"}


def test_stand_in_hub_a_public_repository_is_refused_unless_that_is_meant(hub: StandInWritableHub, shop: Shop) -> None:
    hub.made, hub.private = True, False
    _, word = shop.publish(an_entry("Adapter"))
    assert word.reason is Reason.ACCESS_DENIED
    assert "output.publish[0].huggingFace.private" in word.message
    assert len(hub.commits) == 1
    assert shop.publish(an_entry("Adapter", private=False))[0] == ExitCode.COMPLETED


def test_stand_in_hub_a_token_that_may_not_write_is_told_by_its_secret(hub: StandInWritableHub, shop: Shop) -> None:
    hub.made = True
    hub.token = "hf_another"  # noqa: S105 - the stand-in's
    _, word = shop.publish(an_entry("Adapter"))
    assert word.reason is Reason.ACCESS_DENIED
    assert "output.publish[0].huggingFace.tokenSecretRef" in word.message


def test_stand_in_hub_a_quota_that_is_used_up_is_told_in_its_words(hub: StandInWritableHub, shop: Shop) -> None:
    hub.full = True
    _, word = shop.publish(an_entry())
    assert word.reason is Reason.ACCESS_DENIED
    assert "Private storage limit reached" in word.message


def test_stand_in_hub_a_file_that_the_hub_leaves_out_is_missed(hub: StandInWritableHub, shop: Shop) -> None:
    hub.ignored = (CARD,)
    _, word = shop.publish(an_entry("Adapter"))
    assert word.reason is Reason.VERIFICATION_FAILED
    assert CARD in word.message


def test_stand_in_hub_a_token_that_is_not_there_is_asked_for(hub: StandInWritableHub, shop: Shop) -> None:
    shop.give_secret("token", "")
    _, word = shop.publish(an_entry("Adapter"))
    assert word.reason is Reason.NOT_FOUND
    assert not hub.made


def test_stand_in_proxy_a_page_of_its_own_is_told_with_the_address(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(lambda _path, _headers: Answer(b"<html>Log in</html>"))
    shop.give_secret("token", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    _, word = shop.publish(an_entry("Adapter"))
    assert word.reason is Reason.UNKNOWN
    assert f"{site.url} does not answer as a hub does" in word.message
    assert "HF_ENDPOINT" in word.message
    assert "volume" not in word.message  # which is no way to publish
    site.close()


def test_stand_in_hub_a_page_in_place_of_an_answer_is_no_refusal_of_the_file(
    hub: StandInWritableHub, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, answers = hub._batch, iter([Answer(b"<html>Bad gateway</html>")])
    monkeypatch.setattr(hub, "_batch", lambda objects, host: next(answers, None) or batch(objects, host))
    code, word = shop.publish(an_entry())
    assert code == ExitCode.COMPLETED, word.message


def test_stand_in_hub_a_commit_that_is_refused_is_told_in_its_words(
    hub: StandInWritableHub, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refused(400, "")
    said.headers["X-Error-Message"] = "Invalid metadata in README.md"
    monkeypatch.setattr(hub, "_commit", lambda *_change: said)
    _, word = shop.publish(an_entry("Adapter"))
    assert "the hub answers 400" in word.message
    assert "Invalid metadata in README.md" in word.message
