"""Artifacts pushed to a real registry, and fetched again as a source would."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import pytest

from finetune_trainer.config import OciSource
from finetune_trainer.progress import ExitCode, Reason
from finetune_trainer.publishing.oci import OciSink
from finetune_trainer.sources.oci import Oci
from tests.unit.trainer.publishing.conftest import LARGE_BYTES, MERGED, Shop
from tests.unit.trainer.sources.servers import PASSWORD, UP, USER, Registry, Relay

if TYPE_CHECKING:
    from finetune_trainer.publishing.base import Parcel

SMALL_BYTES = 100_000


def an_entry(reference: str, artifact: str = "Merged", **fields: Any) -> dict[str, Any]:
    return {"name": "out", "artifact": artifact, "oci": {"reference": reference, "plainHttp": True, **fields}}


def pulled(reference: str, login: tuple[str, str] | None = None) -> tuple[str, dict[str, bytes]]:
    """What somebody gets who pulls it."""
    remote = Oci(OciSource.model_validate({"reference": reference, "plainHttp": True}), "model", login)
    listing, found = remote.look_up(list), {}
    for file in listing.files:
        with remote.open(file, 0) as body:
            found[file.name] = b"".join(body.chunks)
    return str(listing.revision), found


def test_an_artifact_has_a_layer_for_each_file_and_is_told_by_its_digest(shop: Shop, registry: Registry) -> None:
    reference = registry.reference("team/whole:v1")
    code, word = shop.publish(an_entry(reference))
    assert code == ExitCode.COMPLETED, word.message
    digest, there = pulled(reference)
    assert there == shop.expected("merged", "out")
    assert word.published is not None
    assert word.published.uri == f"oci://{reference}@{digest}"


def test_the_manifest_says_what_it_is_and_under_which_licence(shop: Shop, registry: Registry) -> None:
    shop.publish(an_entry(registry.reference("team/told:v1"), "Adapter"))
    accepted = {"Accept": "application/vnd.oci.image.manifest.v1+json"}
    document = json.loads(registry._ask("GET", "/v2/team/told/manifests/v1", headers=accepted).content)
    assert document["artifactType"] == "application/vnd.finetune.model.v1"
    assert document["annotations"]["org.opencontainers.image.licenses"] == "apache-2.0"
    assert document["annotations"]["org.opencontainers.image.description"] == "QLoRA adapter for base"


def test_where_the_proof_was_lost_nothing_is_pushed_again(
    shop: Shop, registry: Registry, registry_relay: Relay
) -> None:
    entry = an_entry(registry.reference("team/again:v1", registry_relay.port))
    _, first = shop.publish(entry)
    shop.forget()
    registry_relay.reset()
    code, second = shop.publish(entry)
    assert (code, second) == (ExitCode.COMPLETED, first)
    assert registry_relay.taken < SMALL_BYTES


def test_a_push_that_breaks_is_taken_up_and_blobs_that_are_there_stay(
    shop: Shop, registry: Registry, registry_relay: Relay
) -> None:
    entry = an_entry(registry.reference("team/cut:v1", registry_relay.port))
    registry_relay.reset(cut_after=LARGE_BYTES // 2, limited=UP)
    code, word = shop.publish(entry)
    assert code == ExitCode.COMPLETED, word.message
    assert pulled(registry.reference("team/cut:v1"))[1] == shop.expected("merged", "out")
    assert registry_relay.taken < sum(map(len, MERGED.values())) + LARGE_BYTES // 2 + SMALL_BYTES


def test_a_tag_that_meant_something_else_means_this_one(shop: Shop, registry: Registry) -> None:
    reference = registry.reference("team/moved:v1")
    registry.push("team/moved", "v1", {"old.txt": b"old"})
    assert shop.publish(an_entry(reference, "Adapter"))[0] == ExitCode.COMPLETED
    assert pulled(reference)[1] == shop.expected("adapter", "out")


def test_simulated_a_file_that_a_registry_took_and_does_not_have_is_told(
    shop: Shop, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OciSink, "_push_blob", lambda *_: None)
    code, word = shop.publish(an_entry(registry.reference("team/lost:v1"), "Adapter"))
    assert code == ExitCode.VERIFICATION_FAILED
    assert "the registry took" in word.message
    assert "does not have it" in word.message


def test_a_tag_that_somebody_else_sets_meanwhile_is_told(
    shop: Shop, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    tagged = OciSink._verify

    def verify(sink: OciSink, digest: str, parcel: Parcel) -> None:
        registry.push("team/shared", "v1", {"other.txt": b"other"})
        tagged(sink, digest, parcel)

    monkeypatch.setattr(OciSink, "_verify", verify)
    code, word = shop.publish(an_entry(registry.reference("team/shared:v1"), "Adapter"))
    assert code == ExitCode.VERIFICATION_FAILED
    assert "somebody else sets it too" in word.message


def give_login(shop: Shop, registry: Registry, password: str) -> dict[str, Any]:
    auth = base64.b64encode(f"{USER}:{password}".encode()).decode()
    shop.give_secret(
        ".dockerconfigjson", json.dumps({"auths": {registry.reference("x").split("/")[0]: {"auth": auth}}})
    )
    return {"credentialsSecretRef": {"name": "registry"}}


def test_a_closed_registry_is_written_with_the_secret(shop: Shop, closed_registry: Registry) -> None:
    reference = closed_registry.reference("team/closed:v1")
    secret = give_login(shop, closed_registry, PASSWORD)
    assert shop.publish(an_entry(reference, "Adapter", **secret))[0] == ExitCode.COMPLETED
    assert pulled(reference, (USER, PASSWORD))[1] == shop.expected("adapter", "out")


def test_white_space_around_a_password_is_not_part_of_it(shop: Shop, closed_registry: Registry) -> None:
    reference = closed_registry.reference("team/spaced:v1")
    secret = give_login(shop, closed_registry, f"{PASSWORD}\n")
    code, word = shop.publish(an_entry(reference, "Adapter", **secret))
    assert code == ExitCode.COMPLETED, word.message


@pytest.mark.parametrize("known", [True, False], ids=["wrong password", "no secret"])
def test_a_closed_registry_names_the_secret(shop: Shop, closed_registry: Registry, known: bool) -> None:
    secret = give_login(shop, closed_registry, "wrong") if known else {}
    _, word = shop.publish(an_entry(closed_registry.reference("team/closed:v2"), "Adapter", **secret))
    assert word.reason is Reason.ACCESS_DENIED
    assert "write" in word.message
    assert "output.publish[0].oci.credentialsSecretRef" in word.message
