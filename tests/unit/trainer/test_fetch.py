"""Models in the work folder: what prepare makes of any source, of an adapter, and of a model to merge into."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from finetune_trainer.config import REMOTE_CODE_VARIABLE
from finetune_trainer.fetch import REVISION_FILE
from finetune_trainer.models.folder import describe_config
from finetune_trainer.progress import ExitCode
from finetune_trainer.runtime import manifest
from tests.tiny import make_config
from tests.unit.trainer.sources.standins import COMMIT, StandInHub

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.unit.trainer.conftest import Desk

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class FoxConfig(LlamaConfig):
    model_type = "fox"
class FoxForCausalLM(LlamaForCausalLM):
    config_class = FoxConfig
"""
CLASSES = {"AutoConfig": "modeling_fox.FoxConfig", "AutoModelForCausalLM": "modeling_fox.FoxForCausalLM"}


@pytest.fixture
def hub(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    hub = StandInHub({path.name: path.read_bytes() for path in tiny_model.iterdir()})
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    yield hub
    hub.site.close()


@pytest.fixture
def adapter(desk: Desk, tiny_model: Path) -> Path:
    """A LoRA adapter of the tiny model, as PEFT saves it."""
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - slow
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    folder = desk.models / "adapter"
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(str(folder))
    return folder


@pytest.fixture
def model_with_code(desk: Desk) -> Path:
    folder = desk.models / "fox"
    shutil.copytree(desk.models / "tiny", folder)
    (folder / "modeling_fox.py").write_text(CODE)
    change(folder / "config.json", model_type="fox", architectures=["FoxForCausalLM"], auto_map=CLASSES)
    return folder


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def with_model(**fields: Any) -> dict[str, Any]:
    config = make_config()
    config["model"] |= fields
    return config


def names_in(folder: Path) -> set[str]:
    return {entry.path for entry in manifest.verify(folder).files}


def test_stand_in_hub_the_job_records_the_commit_and_keeps_no_downloads(desk: Desk, hub: StandInHub) -> None:
    config = {**make_config(), "model": {"huggingFace": {"repo": "owner/tiny"}}}
    code, word = desk.run("prepare", config)
    assert hub.asked
    assert code == ExitCode.COMPLETED
    assert word is not None
    assert word.resolved is not None
    assert word.resolved.model_revision == COMMIT
    assert names_in(desk.work / "model") >= {"config.json", "tokenizer.json", "model.safetensors"}
    assert not (desk.work / ".downloads").exists()


def test_stand_in_hub_an_attempt_that_failed_leaves_what_it_fetched(desk: Desk, hub: StandInHub) -> None:
    config = {**make_config(), "model": {"huggingFace": {"repo": "owner/tiny"}}}
    hub.refusal, hub.refuses_files = (404, "EntryNotFound"), True
    assert desk.run("prepare", config)[0] == ExitCode.NOT_FOUND
    hub.refusal = None
    assert desk.run("prepare", config, "--attempt", "2")[0] == ExitCode.COMPLETED


def test_an_adapter_to_go_on_from_lies_in_the_models_folder(desk: Desk, adapter: Path) -> None:
    source = {"volume": {"claimName": "models", "path": adapter.name}}
    assert desk.run("prepare", with_model(adapter=source))[0] == ExitCode.COMPLETED
    assert names_in(desk.work / "model") >= {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}


@pytest.mark.parametrize(
    ("named", "told"),
    [
        pytest.param("owner/other", True, id="another model"),
        pytest.param("mirror/Tiny", False, id="the same of another owner"),
        pytest.param("../model", False, id="a folder"),
    ],
)
def test_stand_in_hub_an_adapter_that_names_another_base_is_taken_with_a_remark(
    desk: Desk, hub: StandInHub, adapter: Path, named: str, told: bool
) -> None:
    change(adapter / "adapter_config.json", base_model_name_or_path=named)
    source = {
        "huggingFace": {"repo": "owner/tiny"},
        "adapter": {"volume": {"claimName": "models", "path": adapter.name}},
    }
    code, word = desk.run("prepare", {**make_config(), "model": source})
    assert (hub.asked != [], code) == (True, ExitCode.COMPLETED)
    assert word is not None
    assert (f"trained on {named}, the model is owner/tiny" in word.message) is told


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param({"peft_type": "IA3"}, "of type IA3", id="no LoRA"),
        pytest.param("adapter_config.json", "adapter_config.json is missing", id="no config"),
        pytest.param("adapter_model.safetensors", "adapter_model.safetensors is missing", id="no weights"),
    ],
)
def test_what_is_no_adapter_is_refused_before_the_model_is_fetched(
    desk: Desk, adapter: Path, spoil: dict[str, str] | str, words: str
) -> None:
    if isinstance(spoil, str):
        (adapter / spoil).unlink()
    else:
        change(adapter / "adapter_config.json", **spoil)
    source = {"volume": {"claimName": "models", "path": adapter.name}}
    code, word = desk.run("prepare", with_model(adapter=source))
    assert word is not None
    assert words in word.message
    assert word.message.startswith("model.adapter: 'adapter' (claim 'models')")
    assert code == ExitCode.INVALID_MODEL


def test_the_model_to_merge_into_lies_beside_the_base(desk: Desk) -> None:
    shutil.copytree(desk.models / "tiny", desk.models / "full")
    original = {"volume": {"claimName": "models", "path": "full"}}
    config = {**make_config(), "merge": {"original": original}}
    assert desk.run("prepare", config)[0] == ExitCode.COMPLETED
    assert names_in(desk.work / "original") >= {"config.json", "model.safetensors", REVISION_FILE}


def test_the_model_to_merge_into_must_not_be_quantized(desk: Desk) -> None:
    shutil.copytree(desk.models / "tiny", desk.models / "full")
    change(desk.models / "full" / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    original = {"volume": {"claimName": "models", "path": "full"}}
    code, word = desk.run("prepare", {**make_config(), "merge": {"original": original}})
    assert word is not None
    assert "merge.original: 'full' (claim 'models') is quantized already" in word.message
    assert code == ExitCode.INVALID_MODEL


def test_a_models_own_code_is_run_where_both_consent(
    desk: Desk, model_with_code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REMOTE_CODE_VARIABLE, "1")
    trusting = with_model(trustRemoteCode=True, volume={"claimName": "models", "path": model_with_code.name})
    code, word = desk.run("prepare", trusting)
    assert code == ExitCode.COMPLETED, word
    assert "modeling_fox.py" in names_in(desk.work / "model")
    assert describe_config(desk.work / "model").own_code


@pytest.mark.parametrize(
    ("trusting", "consent", "code", "words"),
    [
        pytest.param(False, "1", ExitCode.INVALID_MODEL, "or set model.trustRemoteCode", id="the user does not"),
        pytest.param(True, "", ExitCode.INVALID_CONFIG, "the administrator has not consented", id="nor the admin"),
    ],
)
def test_a_models_own_code_is_not_run_against_anybodys_will(
    desk: Desk,
    model_with_code: Path,
    monkeypatch: pytest.MonkeyPatch,
    consent: str,
    code: ExitCode,
    words: str,
    *,
    trusting: bool,
) -> None:
    monkeypatch.setenv(REMOTE_CODE_VARIABLE, consent)
    (model_with_code / "modeling_fox.py").write_text("raise SystemExit('ran')")
    source = {"claimName": "models", "path": model_with_code.name}
    ended, word = desk.run("prepare", with_model(trustRemoteCode=trusting, volume=source))
    assert word is not None
    assert words in word.message
    assert ended == code


def test_code_of_another_repository_is_not_fetched_while_a_model_loads(
    desk: Desk, model_with_code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REMOTE_CODE_VARIABLE, "1")
    change(model_with_code / "config.json", auto_map={"AutoConfig": "other/repo--modeling.FoxConfig"})
    source = {"claimName": "models", "path": model_with_code.name}
    code, word = desk.run("prepare", with_model(trustRemoteCode=True, volume=source))
    assert word is not None
    assert "needs Python code of another repository" in word.message
    assert code == ExitCode.INVALID_MODEL
