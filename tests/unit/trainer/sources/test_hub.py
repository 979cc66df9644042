"""Repositories of a hub, against a stand-in that speaks the hub's few calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from finetune_trainer.config import BaseModelSource
from finetune_trainer.runtime.errors import (
    AccessDenied,
    InvalidConfig,
    InvalidDataset,
    InvalidModel,
    NotFound,
    TrainerError,
    VerificationFailed,
)
from finetune_trainer.sources import fetch_file
from tests.unit.trainer.sources.conftest import JUNK, TINY_MODEL, Errands, contents
from tests.unit.trainer.sources.servers import Relay, wait_until
from tests.unit.trainer.sources.standins import COMMIT, LFS_BYTES, NEXT_COMMIT, StandInHub

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL = {"huggingFace": {"repo": "owner/tiny"}}
ROWS = b'{"text": "a"}\n'
LARGE = bytes(range(256)) * (3 << 12)
"""3 MiB."""
ADAPTER = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b"weights", "README.md": b"#"}


@pytest.fixture
def hub(errands: Errands, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:  # noqa: ARG001 - clears variables
    hub = StandInHub(TINY_MODEL | JUNK)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    yield hub
    hub.site.close()


@pytest.fixture
def dataset_hub(hub: StandInHub) -> StandInHub:
    hub.kind = "datasets"
    hub.files.clear()
    hub.files |= {"train.jsonl": ROWS, "test.jsonl": b"{}\n"}
    return hub


def test_stand_in_hub_a_model_is_what_it_needs_and_no_more(errands: Errands, hub: StandInHub) -> None:
    fetched = errands.fetch("model", MODEL)
    assert contents(fetched.path) == TINY_MODEL
    assert fetched.revision == COMMIT
    assert not any(name in path for path in hub.asked for name in JUNK)


def test_stand_in_hub_one_file_is_fetched_without_the_others(errands: Errands, hub: StandInHub) -> None:
    source, context = BaseModelSource.model_validate(MODEL), errands.build_context()
    path = fetch_file("model", "model", source, "config.json", context)
    assert path.read_bytes() == TINY_MODEL["config.json"]
    assert not any("safetensors" in asked for asked in hub.asked)
    with pytest.raises(NotFound, match=r"has no nothing\.json"):
        fetch_file("model", "model", source, "nothing.json", context)


def test_stand_in_hub_python_files_come_only_where_they_are_trusted(errands: Errands, hub: StandInHub) -> None:
    hub.files["sub/other.py"] = b"import os"
    trusting = {"huggingFace": {"repo": "owner/tiny", "revision": COMMIT}, "trustRemoteCode": True}
    assert set(contents(errands.fetch("model", trusting).path)) == {*TINY_MODEL, "modeling.py"}


def test_stand_in_hub_an_adapter_is_its_two_files(errands: Errands, hub: StandInHub) -> None:
    hub.files |= ADAPTER
    assert set(contents(errands.fetch("adapter", MODEL).path)) == {"adapter_config.json", "adapter_model.safetensors"}


def test_stand_in_hub_a_dataset_is_the_split_that_its_card_names(errands: Errands, dataset_hub: StandInHub) -> None:
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: dev\n    path: data/*.jsonl\n---\n# Rows\n"
    dataset_hub.files |= {"README.md": card.encode(), "data/a.jsonl": ROWS, "data/b.jsonl": ROWS}
    fetched = errands.fetch("dataset-0", {"huggingFace": {"repo": "owner/tiny", "split": "dev"}})
    assert contents(fetched.path) == {"data/a.jsonl": ROWS, "data/b.jsonl": ROWS}


def test_stand_in_hub_one_file_of_rows_is_a_file(errands: Errands, dataset_hub: StandInHub) -> None:
    assert dataset_hub.files
    assert errands.fetch("dataset-0", MODEL).path.read_bytes() == ROWS


def test_stand_in_hub_a_script_alone_is_refused_with_the_hubs_own_copy(
    errands: Errands, dataset_hub: StandInHub
) -> None:
    dataset_hub.files.clear()
    dataset_hub.files["tiny.py"] = b"import datasets"
    with pytest.raises(InvalidDataset) as caught:
        errands.fetch("dataset-0", MODEL)
    assert "Set datasets[0].huggingFace.revision: refs/convert/parquet" in str(caught.value)
    dataset_hub.files |= {"default/train/0000.parquet": b"PAR1", "default/test/0000.parquet": b"PAR1"}
    source = {"huggingFace": {"repo": "owner/tiny", "revision": "refs/convert/parquet"}}
    assert errands.fetch("dataset-0", source).path.name == "0000.parquet"


def test_stand_in_hub_a_killed_download_goes_on_at_the_commit_it_began_with(errands: Errands, hub: StandInHub) -> None:
    hub.files |= {"model-00001-of-00002.safetensors": LARGE, "model-00002-of-00002.safetensors": b"small"}
    relay = Relay(hub.site.port)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", relay.url)
        relay.reset(hold_after=1 << 20)
        process = errands.fetch_in_a_process("model", MODEL)
        assert relay.holding.wait(60)
        wait_until(lambda: sum(errands.parts("model").values()) > 1 << 19)
        process.kill()
        process.wait()
        here = sum(errands.parts("model").values())
        hub.commits[NEXT_COMMIT], hub.head = {"config.json": b"{}", "model.safetensors": b"new"}, NEXT_COMMIT
        relay.reset()
        fetched = errands.fetch("model", MODEL)
    assert fetched.revision == COMMIT
    assert contents(fetched.path)["model-00001-of-00002.safetensors"] == LARGE
    assert relay.given < sum(map(len, hub.files.values())) - here + 8192
    relay.close()


def test_stand_in_hub_a_commit_that_vanished_is_looked_up_again(errands: Errands, hub: StandInHub) -> None:
    errands.fetch("model", MODEL)
    errands.leave_part("model", errands.pinned("model")[0], b"")
    hub.commits = {NEXT_COMMIT: {**TINY_MODEL, "config.json": b'{"new": 1}'}}
    hub.head = NEXT_COMMIT
    fetched = errands.fetch("model", MODEL)
    assert fetched.revision == NEXT_COMMIT
    assert contents(fetched.path)["config.json"] == b'{"new": 1}'


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        pytest.param("config.json", "git", id="a small file by the hash of git"),
        pytest.param("model-00001-of-00002.safetensors", "sha256", id="one in LFS by its SHA-256"),
    ],
)
def test_stand_in_hub_other_bytes_than_listed_are_refused(
    errands: Errands, hub: StandInHub, name: str, algorithm: str
) -> None:
    body = TINY_MODEL[name]
    assert (len(body) > LFS_BYTES) == (algorithm == "sha256")
    hub.lies[name] = body[:-1] + b"?"
    with pytest.raises(VerificationFailed) as caught:
        errands.fetch("model", MODEL)
    assert f"{name} is not what it should be: its hash ({algorithm})" in str(caught.value)
    assert name not in contents(errands.slot("model") / "files")


def test_stand_in_hub_the_token_comes_from_its_file(errands: Errands, hub: StandInHub) -> None:
    hub.token = "s3cret"  # noqa: S105 - of the stand-in
    with pytest.raises(AccessDenied) as caught:
        errands.fetch("model", MODEL)
    assert "model.huggingFace.tokenSecretRef" in str(caught.value)
    errands.give_secret("model", "token", "s3cret\n")
    assert errands.fetch("model", MODEL).revision == COMMIT


def test_stand_in_hub_a_token_that_is_named_and_not_there_is_told(errands: Errands, hub: StandInHub) -> None:
    source = {"huggingFace": {"repo": "owner/tiny", "tokenSecretRef": {"name": "hf", "key": "token"}}}
    with pytest.raises(NotFound) as caught:
        errands.fetch("model", source)
    assert "model.huggingFace.tokenSecretRef: the secret is empty or not mounted" in str(caught.value)
    assert hub.asked == []


def test_stand_in_hub_a_token_that_is_no_text_is_told(errands: Errands, hub: StandInHub) -> None:
    errands.give_secret("model", "token", "")
    (errands.root / "secrets" / "model" / "token").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidConfig, match="is not text: put the token or key"):
        errands.fetch("model", MODEL)
    assert hub.asked == []


def test_stand_in_hub_a_token_of_the_machine_is_never_sent(
    errands: Errands, hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "of-the-machine"  # noqa: S105 - of the stand-in
    monkeypatch.setenv("HF_TOKEN", hub.token)
    with pytest.raises(AccessDenied):
        errands.fetch("model", MODEL)
    assert not any("resolve" in path for path in hub.asked)  # refused at the first question


@pytest.mark.parametrize(
    ("refusal", "error", "words"),
    [
        pytest.param((403, "GatedRepo"), AccessDenied, "Accept its terms on its page", id="gated"),
        pytest.param((401, "GatedRepo"), AccessDenied, "Accept its terms on its page", id="gated, no token"),
        pytest.param((403, ""), AccessDenied, "refuses the token (403)", id="forbidden"),
        pytest.param((500, ""), TrainerError, "worth another try later", id="broken"),
        pytest.param((429, ""), TrainerError, "worth another try later", id="too many"),
    ],
)
@pytest.mark.parametrize("files_alone", [False, True])
def test_stand_in_hub_refusals_say_what_to_do(
    errands: Errands,
    hub: StandInHub,
    refusal: tuple[int, str],
    error: type[TrainerError],
    words: str,
    *,
    files_alone: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub.refusal, hub.refuses_files = refusal, files_alone
    with pytest.raises(error) as caught:
        errands.fetch("model", MODEL)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        pytest.param({"repo": "owner/tinny"}, NotFound, "Correct model.huggingFace.repo", id="repo"),
        pytest.param(
            {"revision": "v9"}, NotFound, "no revision 'v9'. Correct model.huggingFace.revision", id="revision"
        ),
    ],
)
def test_stand_in_hub_what_is_not_there_is_named(
    errands: Errands, hub: StandInHub, change: dict[str, Any], error: type[TrainerError], words: str
) -> None:
    with pytest.raises(error) as caught:
        errands.fetch("model", {"huggingFace": {"repo": "owner/tiny", **change}})
    assert hub.asked
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        pytest.param({"config.json": b"{}", "pytorch_model.bin": b"p"}, "has no safetensors files", id="pickles"),
        pytest.param({"q4.gguf": b"", "q8.gguf": b""}, "has 2 GGUF files", id="GGUF files"),
        pytest.param({"sub/config.json": b"{}"}, "The folder 'sub' has one", id="a model further down"),
        pytest.param({}, "config.json is missing (it is empty)", id="nothing"),
    ],
)
def test_stand_in_hub_what_is_no_model_is_refused_unread(
    errands: Errands, hub: StandInHub, files: dict[str, bytes], words: str
) -> None:
    hub.commits[COMMIT] = files
    with pytest.raises(InvalidModel) as caught:
        errands.fetch("model", MODEL)
    assert words in str(caught.value)
    assert not any("resolve" in path for path in hub.asked)


@pytest.mark.parametrize("files", [{"config.json": b"{}"}, {"adapter_config.json": b"{}", "adapter_model.bin": b"p"}])
def test_stand_in_hub_what_is_no_adapter_is_refused_unread(
    errands: Errands, hub: StandInHub, files: dict[str, bytes]
) -> None:
    hub.commits[COMMIT] = files
    with pytest.raises(InvalidModel) as caught:
        errands.fetch("adapter", MODEL)
    assert "save_pretrained" in str(caught.value)


def test_a_hub_that_is_not_reached_is_no_bug_of_ours(errands: Errands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TrainerError) as caught:
        errands.fetch("model", MODEL)
    assert "the hub at http://127.0.0.1:9 cannot be reached" in str(caught.value)
    assert "HF_ENDPOINT" in str(caught.value)
