"""Repositories of ModelScope, against a stand-in that speaks its calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from finetune_trainer.runtime.errors import AccessDenied, NotFound, TrainerError, VerificationFailed
from finetune_trainer.sources import modelscope
from tests.unit.trainer.sources.conftest import JUNK, TINY_MODEL, Errands, contents
from tests.unit.trainer.sources.servers import Relay, wait_until
from tests.unit.trainer.sources.standins import COMMIT, NEXT_COMMIT, StandInModelScope

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL = {"modelScope": {"repo": "owner/tiny"}}
WEIGHTS = "model-00001-of-00002.safetensors"
LARGE = bytes(range(256)) * (3 << 12)
"""3 MiB."""


@pytest.fixture
def hub(errands: Errands, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInModelScope]:  # noqa: ARG001 - clears variables
    hub = StandInModelScope(TINY_MODEL | JUNK)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.site.url)
    yield hub
    hub.site.close()


def test_stand_in_modelscope_a_model_is_what_it_needs_at_the_newest_commit(
    errands: Errands, hub: StandInModelScope
) -> None:
    hub.commits["config.json"] = NEXT_COMMIT  # an older one: each file is asked for at the commit that changed it
    fetched = errands.fetch("model", MODEL)
    assert contents(fetched.path) == TINY_MODEL
    assert fetched.revision == COMMIT
    assert any(f"Revision={NEXT_COMMIT}" in path and "config.json" in path for path in hub.site.asked)


def test_stand_in_modelscope_a_dataset_is_listed_in_pages(errands: Errands, hub: StandInModelScope) -> None:
    hub.kind, hub.files = "datasets", {f"data/train-{number:05}.jsonl": b"{}\n" for number in range(450)}
    fetched = errands.fetch("dataset-0", MODEL)
    assert len(contents(fetched.path)) == 450
    assert len([path for path in hub.site.asked if "PageNumber" in path]) == 3


def test_stand_in_modelscope_a_killed_download_goes_on(errands: Errands, hub: StandInModelScope) -> None:
    hub.files |= {WEIGHTS: LARGE, "model-00002-of-00002.safetensors": b"small"}
    relay = Relay(hub.site.port)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELSCOPE_ENDPOINT", relay.url)
        relay.reset(hold_after=1 << 20)
        process = errands.fetch_in_a_process("model", MODEL)
        assert relay.holding.wait(60)
        wait_until(lambda: sum(errands.parts("model").values()) > 1 << 19)
        process.kill()
        process.wait()
        here = sum(errands.parts("model").values())
        relay.reset()
        assert contents(errands.fetch("model", MODEL).path)[WEIGHTS] == LARGE
    assert relay.given < sum(map(len, hub.files.values())) - here + 8192
    relay.close()


def test_stand_in_modelscope_other_bytes_than_listed_are_refused(errands: Errands, hub: StandInModelScope) -> None:
    hub.lies[WEIGHTS] = TINY_MODEL[WEIGHTS][:-1] + b"?"
    with pytest.raises(VerificationFailed) as caught:
        errands.fetch("model", MODEL)
    assert f"{WEIGHTS} is not what it should be: its hash (sha256)" in str(caught.value)


def test_stand_in_modelscope_the_token_is_header_and_cookie(errands: Errands, hub: StandInModelScope) -> None:
    hub.token = "s3cret"  # noqa: S105 - of the stand-in
    errands.give_secret("model", "token", "other")
    with pytest.raises(AccessDenied) as caught:
        errands.fetch("model", MODEL)
    assert "model.modelScope.tokenSecretRef" in str(caught.value)
    errands.give_secret("model", "token", "s3cret\n")
    assert errands.fetch("model", MODEL).revision == COMMIT


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"repo": "owner/tinny"}, "is not on ModelScope. Correct model.modelScope.repo", id="repo"),
        pytest.param({"revision": "v9"}, "no files at revision 'v9'. Correct model.modelScope.revision", id="revision"),
    ],
)
def test_stand_in_modelscope_what_is_not_there_is_named(
    errands: Errands, hub: StandInModelScope, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(NotFound) as caught:
        errands.fetch("model", {"modelScope": {"repo": "owner/tiny", **change}})
    assert hub.site.asked
    assert words in str(caught.value)


def test_a_modelscope_that_is_not_reached_names_the_variable(errands: Errands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "http://127.0.0.1:9")
    with pytest.raises(TrainerError) as caught:
        errands.fetch("model", MODEL)
    assert "ModelScope at http://127.0.0.1:9 cannot be reached" in str(caught.value)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "https://modelscope.cn"),
        ({"MODELSCOPE_DOMAIN": "www.modelscope.ai"}, "https://www.modelscope.ai"),
        ({"MODELSCOPE_ENDPOINT": "http://mirror/", "MODELSCOPE_DOMAIN": "other"}, "http://mirror"),
    ],
)
def test_the_server_is_that_of_the_environment(
    errands: Errands,  # noqa: ARG001 - clears variables
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    expected: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert modelscope.endpoint() == expected
