"""The prepare stage as a user runs it: from a config and claims to proven folders, or to a clear refusal."""

import json
import os
import re
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune_trainer import fetch
from finetune_trainer.config import REMOTE_CODE_VARIABLE
from finetune_trainer.data import tokenized
from finetune_trainer.models.folder import load_tokenizer
from finetune_trainer.progress import ExitCode, Reason, exit_code
from finetune_trainer.runtime import manifest, work
from tests.tiny import make_config, make_instructions, make_jsonl, make_tiny_model, make_tokenizer
from tests.unit.trainer.conftest import Desk

NOWHERE = "http://127.0.0.1:9"
"""Where nobody answers."""


def rows_of(desk: Desk, split: str) -> set[tuple[int, ...]]:
    return {tuple(row) for row in tokenized.read_rows(desk.work / "data", split)["input_ids"].to_pylist()}


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_it_leaves_a_model_rows_a_preview_and_its_word(desk: Desk, config: dict[str, Any]) -> None:
    code, word = desk.run("prepare", config)
    assert code == ExitCode.COMPLETED
    assert word is not None
    assert word.succeeded
    assert word.resolved is not None
    assert word.data is not None
    assert (word.data.train_rows, word.data.eval_rows, word.data.dropped_rows) == (38, 2, 0)
    assert word.resolved.total_steps == 3
    assert word.manifest_digest == manifest.verify(desk.work / "data").digest
    assert word.resolved.model_digest == manifest.verify(desk.work / "model").digest
    preview = [json.loads(line) for line in (desk.work / "report" / "preview.jsonl").read_text().splitlines()]
    assert len(preview) == 5
    assert preview[0]["learned"].startswith("It is")
    assert len(preview[0]["inputIds"]) == len(preview[0]["lossMask"]) == preview[0]["tokens"]


def test_the_same_config_gives_the_same_bytes(desk: Desk, config: dict[str, Any], tmp_path: Path) -> None:
    _, first = desk.run("prepare", config)
    (desk.root / "work").rename(tmp_path / "elsewhere")
    _, again = desk.run("prepare", config, "--attempt", "5")
    assert first is not None
    assert again is not None
    assert first.manifest_digest == again.manifest_digest


def test_a_finished_stage_says_the_same_word_and_does_nothing(
    desk: Desk, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first = desk.run("prepare", config)
    monkeypatch.setattr("finetune_trainer.prepare.run", lambda *_: pytest.fail("it ran again"))
    code, again = desk.run("prepare", config, "--attempt", "2")
    assert first is not None
    assert (code, again) == (ExitCode.COMPLETED, first.model_copy(update={"attempt": 2}))


@pytest.mark.parametrize(
    "name", ["data/train.parquet", "model/model.safetensors", "model/manifest.json", "data/manifest.json"]
)
def test_a_damaged_artifact_of_its_own_is_made_anew(desk: Desk, config: dict[str, Any], name: str) -> None:
    _, first = desk.run("prepare", config)
    (desk.work / name).write_bytes(b"damaged")
    code, again = desk.run("prepare", config)
    assert (code, again) == (ExitCode.COMPLETED, first)
    manifest.verify(desk.work / "data")
    manifest.verify(desk.work / "model")


def test_the_model_is_fetched_again_where_it_is_gone_and_the_rows_stay(desk: Desk, config: dict[str, Any]) -> None:
    _, first = desk.run("prepare", config)
    (desk.work / "model").rename(desk.root / "gone")
    assert desk.run("prepare", config) == (ExitCode.COMPLETED, first)


def test_another_config_never_touches_what_is_there(desk: Desk, config: dict[str, Any]) -> None:
    _, first = desk.run("prepare", config)
    code, word = desk.run("prepare", {**config, "training": {"seed": 1}})
    assert code == ExitCode.INVALID_CONFIG
    assert word is not None
    assert "was made from another config" in word.message
    assert "Use another --work" in word.message
    assert first is not None
    assert manifest.verify(desk.work / "data").digest == first.manifest_digest


def test_identical_rows_never_land_on_both_sides(desk: Desk) -> None:
    make_jsonl(desk.datasets / "rows.jsonl", make_instructions(20) * 5)
    config = make_config(evaluation={"percent": 30})
    _, word = desk.run("prepare", config)
    assert word is not None
    assert word.data is not None
    assert (word.data.train_rows, word.data.eval_rows) == (70, 30)
    assert not rows_of(desk, "train") & rows_of(desk, "eval")


@pytest.mark.parametrize(
    ("count", "evaluation", "held_out"),
    [
        pytest.param(40, {"percent": 50, "maxRows": 3}, 3, id="at most maxRows"),
        pytest.param(40, {"percent": 0}, 0, id="none if asked for none"),
        pytest.param(3, None, 1, id="at least one"),
        pytest.param(1, None, 0, id="never the only row"),
    ],
)
def test_the_share_held_out(desk: Desk, count: int, evaluation: dict[str, Any] | None, held_out: int) -> None:
    make_jsonl(desk.datasets / "rows.jsonl", make_instructions(count))
    _, word = desk.run("prepare", {**make_config(), **({"evaluation": evaluation} if evaluation else {})})
    assert word is not None
    assert word.data is not None
    assert (word.data.train_rows, word.data.eval_rows) == (count - held_out, held_out)


def test_the_seed_chooses_what_is_held_out(desk: Desk) -> None:
    chosen = []
    for seed in (1, 2):
        desk.run("prepare", make_config(evaluation={"percent": 25, "seed": seed}))
        chosen.append(rows_of(desk, "eval"))
        desk.work.rename(desk.root / f"work-{seed}")
    assert chosen[0] != chosen[1]


def test_evaluation_rows_that_are_trained_on_are_dropped_and_said(desk: Desk) -> None:
    make_jsonl(desk.datasets / "eval.jsonl", [*make_instructions(60)[35:], *make_instructions(36)[:1]])
    evaluation = {"datasets": [{"volume": {"claimName": "datasets", "path": "eval.jsonl"}}], "maxRows": 15}
    _, word = desk.run("prepare", make_config(evaluation=evaluation))
    assert word is not None
    assert word.data is not None
    assert (word.data.train_rows, word.data.eval_rows, word.data.dropped_rows) == (40, 15, 6)
    assert "6 evaluation rows are in the training data as well" in word.message
    assert not rows_of(desk, "train") & rows_of(desk, "eval")


def test_long_answers_are_dropped_and_long_texts_are_split(desk: Desk) -> None:
    long = {"instruction": "q", "output": "word " * 300}
    make_jsonl(desk.datasets / "rows.jsonl", [long, *make_instructions(10), {"instruction": "q", "output": ""}])
    make_jsonl(desk.datasets / "texts.jsonl", [{"text": "word " * 300}])
    config = make_config(training={"maxLength": 200}, evaluation={"percent": 0})
    config["datasets"].append({"volume": {"claimName": "datasets", "path": "texts.jsonl"}})
    _, word = desk.run("prepare", config)
    assert word is not None
    assert word.data is not None
    assert word.data.dropped_rows == 2
    assert word.data.length_max == 200
    assert word.data.train_rows > 12
    assert "1 rows longer than training.maxLength were dropped" in word.message


def test_a_long_run_is_packed_and_its_steps_are_counted_from_sequences(desk: Desk) -> None:
    make_jsonl(desk.datasets / "rows.jsonl", make_instructions(900))
    training = {"globalBatchSize": 1, "maxLength": 256}
    _, word = desk.run("prepare", make_config(training=training))
    assert word is not None
    assert word.resolved is not None
    assert word.data is not None
    assert word.resolved.packing
    assert word.data.packed_rows is not None
    assert 100 <= word.resolved.total_steps == word.data.packed_rows < word.data.train_rows
    assert f"sequences, of {word.data.packed_rows:,} that the rows are packed into" in word.message
    desk.work.rename(desk.root / "packed")
    _, word = desk.run("prepare", make_config(training={**training, "packing": "Off"}))
    assert word is not None
    assert word.resolved is not None
    assert not word.resolved.packing
    assert word.resolved.total_steps == 855


def test_the_tokenizer_is_left_as_the_job_wants_it(desk: Desk) -> None:
    tokens = {"add": ["<new>"], "pad": "<new>"}
    model = {**make_config()["model"], "tokens": tokens, "chatTemplate": {"preset": "chatml"}}
    code, word = desk.run("prepare", make_config() | {"model": model})
    assert code == ExitCode.COMPLETED
    assert word is not None
    assert word.resolved is not None
    tokenizer = load_tokenizer(desk.work / "data" / "tokenizer")
    assert word.resolved.added_tokens == (tokenizer.convert_tokens_to_ids("<new>"),)
    assert tokenizer.pad_token_id == word.resolved.added_tokens[0]
    assert "generation" in tokenizer.chat_template
    manifest.verify(desk.work / "data")


REFUSED: list[tuple[str, Callable[[Desk], dict[str, Any]], Reason, str]] = [
    ("nothing left", lambda _: make_config(training={"maxLength": 8}), Reason.INVALID_DATASET, "no row is left of 40"),
    ("missing file", lambda _: make_config(rows="row.jsonl"), Reason.NOT_FOUND, "has rows.jsonl"),
    ("missing model", lambda _: make_config(model="tinny"), Reason.NOT_FOUND,
     r"model: claim 'models' has no 'tinny'.*tiny/"),
    ("wrong layer", lambda _: make_config(method={"lora": {"targetModules": ["qq"]}}),
     Reason.INVALID_CONFIG, "q_proj, k_proj"),
    ("longer than the model", lambda _: make_config(training={"maxLength": 513}),
     Reason.INVALID_CONFIG, "limit is 512"),
    ("typo", lambda _: make_config(training={"lerningRate": 1}), Reason.INVALID_CONFIG,
     r"training.lerningRate is no field. Did you mean learningRate\?"),
    ("two sources", lambda _: make_config() | {"model": {}}, Reason.INVALID_CONFIG, "exactly one source is needed"),
    ("out of bounds", lambda _: make_config(training={"seed": -1}), Reason.INVALID_CONFIG,
     "training.seed cannot be -1: input"),
    ("a part of a dataset", lambda _: make_config() | {"datasets": [{**make_config()["datasets"][0], "weight": 0}]},
     Reason.INVALID_CONFIG, r"^datasets\[0\].weight cannot be 0: input should be greater than 0\.$"),
    ("long texts that fail", lambda _: make_config(training={"maxLength": 16, "longRows": "Fail"}),
     Reason.INVALID_DATASET, r"line 1: \d+ tokens, training.maxLength is 16 and longRows is Fail. Raise maxLength"),
    ("packing in the files' order", lambda _: make_config(training={"packing": "On", "shuffle": False}),
     Reason.INVALID_CONFIG, "training.packing On .*training.shuffle is false. Set packing to Off"),
    ("DPO without pairs", lambda _: make_config(objective={"type": "DPO"}),
     Reason.INVALID_DATASET, "line 1: objective.type is DPO, but the row has no two answers"),
    ("an unknown end token", lambda _: make_config() | {"model": {**make_config()["model"], "tokens": {"eos": "</s>"}}},
     Reason.INVALID_CONFIG, "model.tokens.eos is '</s>', which the tokenizer does not know"),
    ("no datasets", lambda _: {"model": make_config()["model"]}, Reason.INVALID_CONFIG,
     "datasets is needed and not set"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "reason", "words"), [pytest.param(*case[1:], id=case[0]) for case in REFUSED])
def test_a_refusal_is_a_sentence_with_its_exit_code(
    desk: Desk, make: Callable[[Desk], dict[str, Any]], reason: Reason, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, word = desk.run("prepare", make(desk))
    assert word is not None
    assert (word.reason, code) == (reason, exit_code(reason))
    assert re.search(words, word.message)
    assert not (desk.work / "data").exists()
    assert "Traceback" not in capsys.readouterr().err


def test_chat_tokens_that_were_never_learned_are_told_before_the_rows_are_read(
    desk: Desk, config: dict[str, Any]
) -> None:
    path = desk.models / "tiny" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][1] = 0
    save_file(tensors, path, metadata={"format": "pt"})
    code, word = desk.run("prepare", config)
    assert word is not None
    assert code == ExitCode.INVALID_MODEL
    assert "writes <|im_end|>, which this base model never learned" in word.message
    model = {**config["model"], "tokens": {"add": ["<|im_end|>"]}}
    desk.work.rename(desk.root / "refused")
    assert desk.run("prepare", {**config, "model": model})[0] == ExitCode.COMPLETED


def test_a_mistake_in_a_first_row_is_told_before_the_model_is_fetched(desk: Desk, config: dict[str, Any]) -> None:
    make_jsonl(desk.datasets / "rows.jsonl", [{"instruction": "q", "answer": "a"}])
    assert desk.run("prepare", config)[0] == ExitCode.INVALID_DATASET
    assert visible(desk.work) == []


# Where it is going to be published

HUB = {"huggingFace": {"repo": "acme/fox", "tokenSecretRef": {"name": "hub", "key": "token"}}}
BUCKET = {"s3": {"uri": "s3://models/fox", "endpoint": NOWHERE, "credentialsSecretRef": {"name": "s3"}}}
TAG = {"oci": {"reference": "127.0.0.1:9/fox:v1", "credentialsSecretRef": {"name": "registry"}}}
KEYS = {"AWS_ACCESS_KEY_ID": "fox", "AWS_SECRET_ACCESS_KEY": "s3cr3t\n"}
LOGIN = '{"auths": {"127.0.0.1:9": {"username": "fox", "password": "s3cr3t"}}}'


def publishing(desk: Desk, config: dict[str, Any], place: dict[str, Any], secret: dict[str, str]) -> dict[str, Any]:
    """The config with a place to publish to, second in the list, and what is in its Secret."""
    folder = desk.root / "secrets" / "publish-1"
    folder.mkdir(parents=True)
    for name, text in secret.items():
        (folder / name).write_text(text)
    entries = [{"name": "open", "artifact": "Adapter", "oci": {"reference": "127.0.0.1:9/open:v1"}}]
    return {**config, "output": {"publish": [*entries, {"name": "out", "artifact": "Adapter", **place}]}}


@pytest.mark.parametrize(
    ("place", "secret", "reason", "words"),
    [
        (HUB, {}, Reason.NOT_FOUND, "huggingFace.tokenSecretRef: the secret is empty or not mounted"),
        (HUB, {"token": " \n"}, Reason.NOT_FOUND, "huggingFace.tokenSecretRef: the secret is empty"),
        (HUB, {"token": "hf\nhf"}, Reason.INVALID_CONFIG, "huggingFace.tokenSecretRef: token is not one line"),
        (BUCKET, {}, Reason.NOT_FOUND, "s3.credentialsSecretRef: the secret is empty or not mounted"),
        (BUCKET, {"AWS_ACCESS_KEY_ID": "a"}, Reason.INVALID_CONFIG, "the Secret has no AWS_SECRET_ACCESS_KEY"),
        (TAG, {".dockerconfigjson": "fox"}, Reason.INVALID_CONFIG, ".dockerconfigjson is not of that form"),
        (TAG, {".dockerconfigjson": LOGIN.replace(":9", ":8")}, Reason.INVALID_CONFIG, "is for 127.0.0.1:8, not"),
    ],
)
def test_credentials_to_publish_with_that_cannot_be_are_told_before_anything_is_fetched(
    desk: Desk, config: dict[str, Any], place: dict[str, Any], secret: dict[str, str], reason: Reason, words: str
) -> None:
    code, word = desk.run("prepare", publishing(desk, config, place, secret))
    assert word is not None
    assert (word.reason, code) == (reason, exit_code(reason))
    assert word.message.startswith("output.publish[1].")
    assert words in word.message
    assert visible(desk.work) == []


@pytest.mark.parametrize(
    ("place", "secret"), [(HUB, {"token": "hf_fox"}), (BUCKET, KEYS), (TAG, {".dockerconfigjson": LOGIN})]
)
def test_of_the_places_to_publish_to_nobody_is_asked(
    desk: Desk, config: dict[str, Any], place: dict[str, Any], secret: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    code, word = desk.run("prepare", publishing(desk, config, place, secret))
    assert code == ExitCode.COMPLETED, word


def test_where_code_that_the_model_brings_may_run_no_credentials_to_publish_with_are_looked_for(
    desk: Desk, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor mounted: tests/unit/operator/test_manifests.py."""
    monkeypatch.setenv(REMOTE_CODE_VARIABLE, "1")
    trusting = config | {"model": config["model"] | {"trustRemoteCode": True}}
    code, word = desk.run("prepare", publishing(desk, trusting, BUCKET, {}))
    assert code == ExitCode.COMPLETED, word


# Models


def edit(name: str, **changes: Any) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**value, **changes}))

    return apply


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def with_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def as_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def without(name: str) -> Callable[[Path], object]:
    """Lose a tensor of the weights."""

    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        del tensors[name]
        save_file(tensors, path, metadata={"format": "pt"})

    return apply


def in_whole_numbers(folder: Path) -> None:
    """Quantized layers, of which the config does not speak."""
    path = folder / "model.safetensors"
    tensors = {name: each.to(torch.int8) if "proj" in name else each for name, each in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def fewer_embeddings(folder: Path) -> None:
    """A whole model of 40 tokens, with the tokenizer of another one."""
    path = folder / "model.safetensors"
    save_file(
        {name: each[:40] if "embed" in name else each for name, each in load_file(path).items()},
        path,
        metadata={"format": "pt"},
    )
    edit(CONFIG, vocab_size=40)(folder)


CONFIG = "config.json"
MODELS: list[tuple[str, Callable[[Path], object], str]] = [
    ("no config", lambda f: (f / CONFIG).unlink(), "is no model: config.json is missing .*Give a folder"),
    ("an adapter", as_adapter, "is an adapter, not a model"),
    ("broken config", lambda f: (f / CONFIG).write_text("{"), "config.json is not JSON"),
    ("no tokenizer", lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
    ("broken tokenizer", lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer cannot be read"),
    ("no weights", lambda f: (f / "model.safetensors").unlink(), "has no weights: model.safetensors is missing"),
    ("pickles", as_pickle, r"only as pickles \(pytorch_model.bin\).*Save the model as safetensors"),
    ("a missing shard", with_index, r"names model-00002-of-00002.safetensors, which is missing \(1 of 2"),
    ("a cut file", cut, r"model.safetensors has [\d,]+ bytes, its header says [\d,]+: it was cut off"),
    ("no safetensors", lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 10**12)),
     "no whole safetensors"),
    ("LFS pointer", lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/" + "x" * 99),
     "Git LFS pointer"),
    ("code of its own", edit(CONFIG, auto_map={"AutoModel": "x.Y"}), "needs Python code of its own .auto_map"),
    ("quantized", edit(CONFIG, quantization_config={"quant_method": "awq"}), r"quantized already \(awq"),
    ("vision", edit(CONFIG, vision_config={}), "is a vision or audio model"),
    ("encoder", edit(CONFIG, architectures=["BertForMaskedLM"], model_type="bert"), "is an encoder"),
    ("classifier", edit(CONFIG, architectures=["LlamaForSequenceClassification"]), "is a classifier"),
    ("encoder-decoder", edit(CONFIG, is_encoder_decoder=True), "is an encoder-decoder"),
    ("a bad number", edit(CONFIG, hidden_size="128"), r"understood by .*hidden_size.*expected int.*Correct"),
    ("whole numbers", in_whole_numbers, r"proj.weight is of type I8, and config.json names no quantization. Give"),
    ("a tokenizer of more tokens", fewer_embeddings,
     r"writes '.+' as token [\d,]+, but the model has embeddings for 40 tokens only"),
    ("unknown type", edit(CONFIG, model_type="llamma"), "'llamma'.* not understood by transformers"),
    ("no type", edit(CONFIG, model_type=None), "has no model_type"),
    ("another model's config", edit(CONFIG, hidden_size=32), "are of different models"),
    ("more blocks than its config asks for", edit(CONFIG, num_hidden_layers=1),
     "weights have model.layers.1, which config.json does not ask for: nobody would use them.*of different models"),
    ("a missing weight", without("model.layers.1.mlp.up_proj.weight"),
     r"has no model.layers.1.mlp.up_proj.weight \(1 of the weights .* missing\).*Copy the model again"),
    ("a missing head", edit(CONFIG, tie_word_embeddings=False), "has no lm_head.weight"),
    ("no end token", edit("tokenizer_config.json", eos_token=None), "has no end token"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "words"), [pytest.param(*case[1:], id=case[0]) for case in MODELS])
def test_a_folder_that_is_no_model_is_refused_for_its_own_reason(
    desk: Desk, config: dict[str, Any], spoil: Callable[[Path], object], words: str
) -> None:
    spoil(desk.models / "tiny")
    code, word = desk.run("prepare", config)
    assert word is not None
    assert (code, word.reason) == (ExitCode.INVALID_MODEL, Reason.INVALID_MODEL)
    assert re.search(words, word.message), word.message


def test_weights_that_the_model_does_not_know_are_named(
    desk: Desk, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = desk.models / "tiny" / "model.safetensors"
    save_file({**load_file(path), "value_head.weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    assert desk.run("prepare", config)[0] == ExitCode.COMPLETED
    told = capsys.readouterr().err
    assert "does not know: value_head.weight" in told
    assert "LOAD REPORT" not in told


def test_a_model_in_shards_keeps_its_values(desk: Desk, config: dict[str, Any]) -> None:
    make_tiny_model(desk.models / "shards", max_shard_size="50KB")
    make_tokenizer(desk.models / "shards")
    code, _ = desk.run("prepare", {**config, "model": {"volume": {"claimName": "models", "path": "shards"}}})
    assert code == ExitCode.COMPLETED
    source, copied = (
        {path.name: path.read_bytes() for path in folder.glob("*.safe*")}
        for folder in (desk.models / "shards", desk.work / "model")
    )
    assert source == copied
    assert len(source) > 2


# The volume


def test_a_full_volume_is_seen_before_the_copy(
    desk: Desk, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "SPARE_BYTES", 1 << 60)
    code, word = desk.run("prepare", config)
    assert code == ExitCode.VOLUME_FULL
    assert word is not None
    assert "GiB" in word.message
    assert "Make the job's claim larger" in word.message
    assert not (desk.work / "model").exists()


def test_a_volume_that_fills_up_leaves_nothing_half_done(
    desk: Desk, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "train.parquet")

    monkeypatch.setattr(tokenized.RowWriter, "write", full)
    code, _ = desk.run("prepare", config)
    assert code == ExitCode.VOLUME_FULL
    assert visible(desk.work) == ["model"]
    assert not list(desk.work.glob(".*partial*"))
    monkeypatch.undo()
    assert desk.run("prepare", config, "--attempt", "2")[0] == ExitCode.COMPLETED


def test_asked_to_leave_it_leaves_in_order(desk: Desk, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(fetch, "require_space", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    code, word = desk.run("prepare", config)
    assert code == ExitCode.INTERRUPTED
    assert word is not None
    assert word.message == "Asked to leave while copying the model; the next attempt starts the stage again."
    assert visible(desk.work) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_bf16_weights_stay_bf16(desk: Desk, config: dict[str, Any]) -> None:
    desk.run("prepare", config)
    with safe_open(desk.work / "model" / "model.safetensors", "pt") as file:
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.bfloat16"}  # noqa: SIM118
