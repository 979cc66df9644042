"""Artifacts of a real registry (distribution); its token service and its lies are played by a stand-in."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from finetune_trainer.config import OciSource
from finetune_trainer.runtime.errors import AccessDenied, InvalidConfig, NotFound, TrainerError, VerificationFailed
from finetune_trainer.sources.oci import Oci, read_docker_config, split_reference
from tests.unit.trainer.sources.conftest import JUNK, TINY_MODEL, Errands, contents
from tests.unit.trainer.sources.servers import PASSWORD, USER, Answer, Registry, Relay, Site, wait_until

if TYPE_CHECKING:
    from collections.abc import Mapping

LARGE = bytes(range(256)) * (3 << 12)
"""3 MiB."""
SECRET = {"credentialsSecretRef": {"name": "registry"}}


def source(reference: str, **fields: Any) -> dict[str, Any]:
    return {"oci": {"reference": reference, "plainHttp": True, **fields}}


def docker_config(registry: str, user: str = USER, password: str = PASSWORD) -> str:
    return json.dumps({"auths": {registry: {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}}})


def test_a_model_is_what_the_artifact_names(registry: Registry, errands: Errands) -> None:
    digest = registry.push("team/tiny", "v1", {**TINY_MODEL, **JUNK})
    fetched = errands.fetch("model", source(registry.reference("team/tiny:v1")))
    assert contents(fetched.path) == TINY_MODEL
    assert fetched.revision == digest


def test_a_digest_means_what_it_meant_however_the_tag_moves(registry: Registry, errands: Errands) -> None:
    digest = registry.push("team/rows", "v1", {"train.jsonl": b'{"text": "old"}\n'})
    registry.push("team/rows", "v1", {"train.jsonl": b'{"text": "new"}\n'})
    fetched = errands.fetch("dataset-0", source(registry.reference(f"team/rows:v1@{digest}")))
    assert fetched.path.read_bytes() == b'{"text": "old"}\n'


def test_a_killed_download_goes_on_with_the_artifact_it_began_with(
    registry: Registry, registry_relay: Relay, errands: Errands
) -> None:
    registry.push("team/large", "v1", {"a.jsonl": LARGE, "b.jsonl": b"{}\n"})
    wanted = source(registry.reference("team/large:v1", registry_relay.port))
    registry_relay.reset(hold_after=1 << 20)
    process = errands.fetch_in_a_process("dataset-0", wanted)
    assert registry_relay.holding.wait(60)
    wait_until(lambda: sum(errands.parts("dataset-0").values()) > (1 << 20) - (1 << 16))
    process.kill()
    process.wait()
    here = sum(errands.parts("dataset-0").values())
    registry.push("team/large", "v1", {"a.jsonl": b"{}\n"})
    registry_relay.reset()
    assert contents(errands.fetch("dataset-0", wanted).path)["a.jsonl"] == LARGE
    assert registry_relay.given < len(LARGE) - here + 4096


def test_a_closed_registry_takes_the_credentials_of_the_secret(closed_registry: Registry, errands: Errands) -> None:
    closed_registry.push("team/tiny", "v1", TINY_MODEL)
    reference = closed_registry.reference("team/tiny:v1")
    errands.give_secret("model", ".dockerconfigjson", docker_config(reference.partition("/")[0]))
    assert contents(errands.fetch("model", source(reference, **SECRET)).path) == TINY_MODEL


@pytest.mark.parametrize(
    ("secret", "error", "words"),
    [
        pytest.param(None, AccessDenied, "anybody without credentials", id="none given"),
        pytest.param(("{registry}", USER, "wrong"), AccessDenied, "the credentials read it (401)", id="wrong password"),
        pytest.param(
            ("elsewhere.example", USER, PASSWORD), InvalidConfig, "is for elsewhere.example", id="another one"
        ),
    ],
)
def test_a_closed_registry_names_the_secret(
    closed_registry: Registry,
    errands: Errands,
    secret: tuple[str, str, str] | None,
    error: type[TrainerError],
    words: str,
) -> None:
    reference = closed_registry.reference("team/tiny:v1")
    if secret is not None:
        host = secret[0].format(registry=reference.partition("/")[0])
        errands.give_secret("model", ".dockerconfigjson", docker_config(host, *secret[1:]))
    with pytest.raises(error) as caught:
        errands.fetch("model", source(reference))
    assert words in str(caught.value)
    assert "model.oci.credentialsSecretRef" in str(caught.value)


@pytest.mark.parametrize(
    ("reference", "error", "words"),
    [
        pytest.param("team/nothing:v1", NotFound, "MANIFEST_UNKNOWN", id="repository"),
        pytest.param("team/there:v9", NotFound, "Correct model.oci.reference", id="tag"),
        pytest.param(f"team/there@sha256:{'0' * 64}", NotFound, "Correct model.oci.reference", id="digest"),
        pytest.param("team/image:v1", InvalidConfig, "has no named files", id="a container image"),
        pytest.param("team/packed:v1", InvalidConfig, "holds the folder 'model' as one archive", id="a packed folder"),
        pytest.param("team/hostile:v1", InvalidConfig, "cannot lie in a folder of the job", id="a hostile name"),
        pytest.param("team/twice:v1", InvalidConfig, "has two files in one place: 'a.jsonl'", id="a name twice"),
    ],
)
def test_what_cannot_be_used_is_told_with_its_remedy(
    registry: Registry, errands: Errands, reference: str, error: type[TrainerError], words: str
) -> None:
    registry.push("team/there", "v1", {"config.json": b"{}"})
    registry.push_manifest("team/image", "v1", [])
    registry.push("team/packed", "v1", {"model": b"tar"}, **{"io.deis.oras.content.unpack": "true"})
    registry.push("team/hostile", "v1", {"/etc/rows.jsonl": b"{}\n"})
    layer = {"digest": registry.push_blob("team/twice", b"{}\n"), "size": 3, "mediaType": "text/plain"}
    titled = {**layer, "annotations": {"org.opencontainers.image.title": "a.jsonl"}}
    registry.push_manifest("team/twice", "v1", [titled, titled])
    slot = "dataset-0" if reference.startswith(("team/hostile", "team/twice")) else "model"
    with pytest.raises(error) as caught:
        errands.fetch(slot, source(registry.reference(reference)))
    assert words in str(caught.value)


@pytest.mark.parametrize("plain", [True, False])
def test_a_registry_that_is_not_reached_names_the_field(errands: Errands, *, plain: bool) -> None:
    with pytest.raises(TrainerError) as caught:
        errands.fetch("model", {"oci": {"reference": "127.0.0.1:9/team/tiny:v1", "plainHttp": plain}})
    assert "cannot be reached" in str(caught.value)
    assert "model.oci.reference or .plainHttp" in str(caught.value)


class StandInRegistry:
    """One artifact behind a token service, as the large public registries have it."""

    def __init__(self, blob: bytes, *, realm: str | None = None, token: str = "t0ken") -> None:  # noqa: S107 - made up
        self.token = token
        self.blob, self.logins = blob, list[str | None]()
        layer = {
            "digest": "sha256:" + hashlib.sha256(b'{"a": 1}\n').hexdigest(),
            "size": 9,
            "annotations": {"org.opencontainers.image.title": "rows.jsonl"},
        }
        self.manifest = json.dumps({"layers": [layer]}).encode()
        self.site = Site(self._answer)
        self._realm = realm or f"{self.site.url}/token"

    def _answer(self, path: str, headers: Mapping[str, str]) -> Answer:
        if path.startswith("/token"):
            self.logins.append(headers.get("Authorization"))
            assert "scope=repository%3Ateam%2Frows%3Apull" in path
            return Answer(json.dumps({"token": self.token}).encode())
        if headers.get("Authorization") != f"Bearer {self.token}":
            challenge = f'Bearer realm="{self._realm}",service="stand-in",scope="repository:team/rows:pull"'
            return Answer(status=401, headers={"WWW-Authenticate": challenge})
        return Answer(self.manifest if "/manifests/" in path else self.blob)


def test_stand_in_registry_a_token_that_no_header_can_carry_is_not_repeated(errands: Errands) -> None:
    stand_in = StandInRegistry(b"", token="t0ken\n-two")  # noqa: S106 - made up
    with pytest.raises(TrainerError) as caught:
        errands.fetch("dataset-0", source(f"127.0.0.1:{stand_in.site.port}/team/rows:v1"))
    assert "cannot be sent (LocalProtocolError)" in str(caught.value)
    assert "t0ken" not in str(caught.value)
    assert caught.value.__suppress_context__, "nor in the log, as its cause"
    stand_in.site.close()


def test_stand_in_registry_a_token_is_asked_for_with_the_credentials(errands: Errands) -> None:
    stand_in = StandInRegistry(b'{"a": 1}\n')
    reference = f"127.0.0.1:{stand_in.site.port}/team/rows:v1"
    errands.give_secret("dataset-0", ".dockerconfigjson", docker_config(reference.partition("/")[0]))
    assert errands.fetch("dataset-0", source(reference, **SECRET)).path.read_bytes() == b'{"a": 1}\n'
    assert stand_in.logins == ["Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()]
    stand_in.site.close()


def test_stand_in_registry_a_token_that_expired_is_taken_anew(errands: Errands) -> None:
    stand_in = StandInRegistry(b'{"a": 1}\n')
    reference = f"127.0.0.1:{stand_in.site.port}/team/rows:v1"
    errands.fetch("dataset-0", source(reference))
    errands.leave_part("dataset-0", errands.pinned("dataset-0")[0], b"{")
    assert errands.fetch("dataset-0", source(reference)).path.read_bytes() == b'{"a": 1}\n'
    assert len(stand_in.logins) == 2
    stand_in.site.close()


def test_stand_in_registry_of_two_files_refused_for_one_token_both_go_on_with_one_new_one() -> None:
    stand_in = StandInRegistry(b"")
    reference = f"127.0.0.1:{stand_in.site.port}/team/rows:v1"
    remote = Oci(OciSource.model_validate({"reference": reference, "plainHttp": True}), "model", None)
    remote._authorization = "Bearer old"
    refused = [remote._request("GET", remote.url("blobs/sha256:0"), None, None) for _ in range(2)]
    assert [remote._renew(response) for response in refused] == [True, True]
    assert len(stand_in.logins) == 1
    stand_in.site.close()


def test_stand_in_registry_credentials_go_to_no_service_without_encryption(errands: Errands) -> None:
    stand_in = StandInRegistry(b"", realm="ftp://elsewhere.example/token")
    with pytest.raises(AccessDenied) as caught:
        errands.fetch("dataset-0", source(f"127.0.0.1:{stand_in.site.port}/team/rows:v1"))
    assert "not encrypted" in str(caught.value)
    stand_in.site.close()


def test_stand_in_registry_other_bytes_than_the_digest_says_are_refused(errands: Errands) -> None:
    stand_in = StandInRegistry(b'{"a": 2}\n')
    with pytest.raises(VerificationFailed) as caught:
        errands.fetch("dataset-0", source(f"127.0.0.1:{stand_in.site.port}/team/rows:v1"))
    assert "its hash (sha256) is not the one listed" in str(caught.value)
    stand_in.site.close()


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("ghcr.io/a/b:v1", ("ghcr.io", "a/b", "v1")),
        ("localhost:5000/a", ("localhost:5000", "a", "latest")),
        ("localhost:5000/a:v1@sha256:00", ("localhost:5000", "a", "sha256:00")),
        ("docker.io/library/a@sha256:00", ("docker.io", "library/a", "sha256:00")),
    ],
)
def test_a_reference_has_three_parts(reference: str, parts: tuple[str, str, str]) -> None:
    assert split_reference(reference) == parts


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("{", id="no JSON"),
        pytest.param("[]", id="a list"),
        pytest.param('{"auths": {"ghcr.io": {"auth": "?"}}}', id="no base64"),
        pytest.param('{"auths": {"ghcr.io": {"username": "a"}}}', id="no password"),
    ],
)
def test_a_docker_config_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        read_docker_config(text, "ghcr.io/a/b:v1", "model.oci")
    assert "kubectl create secret docker-registry" in str(caught.value)


def test_a_docker_config_may_name_user_and_password_apart() -> None:
    text = json.dumps({"auths": {"https://index.docker.io/v1/": {"username": "a", "password": "b"}}})
    assert read_docker_config(text, "docker.io/a/b", "model.oci") == ("a", "b")


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        pytest.param(413, AccessDenied, "Raise its limit", id="too large"),
        pytest.param(405, TrainerError, "Correct model.oci.reference", id="not allowed"),
    ],
)
def test_stand_in_registry_refusals_say_what_to_do(
    errands: Errands, status: int, error: type[TrainerError], words: str
) -> None:
    site = Site(lambda _path, _headers: Answer(b"", status))
    with pytest.raises(error) as caught:
        errands.fetch("model", source(f"127.0.0.1:{site.port}/team/tiny:v1"))
    assert f"{status}" in str(caught.value)
    assert words in str(caught.value)
    site.close()
