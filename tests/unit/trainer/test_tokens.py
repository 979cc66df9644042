"""The tokenizer as the job wants it, and control tokens that a base model never learned."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_trainer.config import BaseModelSource, JobConfig
from finetune_trainer.data.files import Place
from finetune_trainer.data.render import Rendered, Renderer
from finetune_trainer.data.rows import ChatRow
from finetune_trainer.data.tokens import check_trained, find_untrained, shape_tokenizer
from finetune_trainer.models.folder import load_tokenizer
from finetune_trainer.runtime.errors import InvalidConfig, InvalidModel
from tests.tiny import EOS, make_config, make_tiny_model, make_tokenizer

TURNS = (
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "V"},
    {"role": "assistant", "content": "B"},
)


def source(**fields: Any) -> BaseModelSource:
    return BaseModelSource.model_validate({"volume": {"claimName": "models", "path": "tiny"}, **fields})


def shaped(folder: Path, **fields: Any) -> tuple[Any, tuple[int, ...]]:
    make_tokenizer(folder, chat_template=False)
    tokenizer = load_tokenizer(folder)
    return tokenizer, shape_tokenizer(tokenizer, source(**fields))


def test_new_tokens_get_new_ids_and_known_ones_keep_theirs(tmp_path: Path) -> None:
    tokenizer, added = shaped(tmp_path, tokens={"add": ["<new>", EOS, "<newer>"], "eos": "<new>", "pad": "<|pad|>"})
    size = len(load_tokenizer(tmp_path))
    assert added == (size, 1, size + 1)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<new>", "<|pad|>")
    assert tokenizer.encode("a<new>b") == [*tokenizer.encode("a"), size, *tokenizer.encode("b")]


def test_new_tokens_are_control_tokens_where_the_template_writes_them(tmp_path: Path) -> None:
    jinja = "{% for m in messages %}{{ '<turn>' + m['content'] }}{% endfor %}"
    tokenizer, (turn, word) = shaped(tmp_path, tokens={"add": ["<turn>", "<word>"]}, chatTemplate={"jinja": jinja})
    row = ChatRow(({"role": "user", "content": "<turn> <word>"}, {"role": "assistant", "content": "ok"}))
    renderer = Renderer(tokenizer)
    rendered = renderer.render(row, Place("d", "f", 1))
    assert isinstance(rendered, Rendered)
    ids = next(renderer.tokenize([rendered])).input_ids.tolist()
    assert ids.count(turn) == 2
    assert ids.count(word) == 1


def test_without_a_padding_token_it_is_the_end_token(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["pad_token"]
    path.write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    shape_tokenizer(tokenizer, source())
    assert tokenizer.pad_token == tokenizer.eos_token
    assert tokenizer.padding_side == "right"


def test_what_is_saved_is_what_was_shaped(tmp_path: Path) -> None:
    tokenizer, added = shaped(
        tmp_path / "model", tokens={"add": ["<|im_start|>", "<new>"]}, chatTemplate={"preset": "chatml"}
    )
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.chat_template == tokenizer.chat_template
    assert tuple(again.convert_tokens_to_ids(["<|im_start|>", "<new>"])) == added
    assert (again.eos_token, again.pad_token) == (EOS, "<|pad|>")


PRESETS = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n",
    "llama3": "<|im_start|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nV<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nB<|eot_id|>",
    "llama2": "<|im_start|>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A <|im_end|>"
    "<|im_start|>[INST] V [/INST] B <|im_end|>",
    "zephyr": "<|system|>\nS<|im_end|>\n<|user|>\nU<|im_end|>\n<|assistant|>\nA<|im_end|>\n<|user|>\nV<|im_end|>\n"
    "<|assistant|>\nB<|im_end|>\n",
    "alpaca": "S\n\n### Instruction:\nU\n\n### Response:\nA<|im_end|>\n\n### Instruction:\nV\n\n"
    "### Response:\nB<|im_end|>\n\n",
}
"""Each preset's text of the same conversation, with this tokenizer's tokens for beginning and end."""
NEEDED = {"llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_writes_a_conversation_and_its_answers_count(tmp_path: Path, preset: str) -> None:
    tokens = {"tokens": {"add": NEEDED[preset]}} if preset in NEEDED else {}
    tokenizer, _ = shaped(tmp_path, chatTemplate={"preset": preset}, **tokens)
    assert tokenizer.apply_chat_template(list(TURNS), tokenize=False) == PRESETS[preset]
    renderer = Renderer(tokenizer)
    rendered = renderer.render(ChatRow(TURNS), Place("d", "f", 1))
    assert isinstance(rendered, Rendered)
    found = next(renderer.tokenize([rendered]))
    end, space = tokenizer.eos_token, " " if preset == "llama2" else ""
    learned = tokenizer.decode(found.input_ids[found.loss_mask])
    assert learned.replace(" ", "") == f"A{space}{end}B{space}{end}".replace(" ", "")


BAD = [
    ("an unknown end", {"tokens": {"eos": "</s>"}},
     "model.tokens.eos is '</s>', which the tokenizer does not know. .*model.tokens.add"),
    ("an unknown pad", {"tokens": {"pad": "<pad>"}}, "model.tokens.pad is '<pad>'"),
    ("a preset whose tokens are unknown", {"chatTemplate": {"preset": "llama3"}},
     r'preset llama3 writes "<|start_header_id|>".*does not know. Set model.tokens.add: \["'.replace("|", r"\|")),
    ("a template that is none", {"chatTemplate": {"jinja": "{% for m in messages %}"}}, "jinja cannot render .*endfor"),
    ("a template that fails", {"chatTemplate": {"jinja": "{{ messages[7]['role'] }}"}}, "jinja cannot render"),
    ("a template without answers", {"chatTemplate": {"jinja": "{{ messages[0]['role'] }}"}}, "leaves out the ass"),
    ("a template that never ends", {"chatTemplate": {"jinja":
     "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"}}, "runs for more than 2 s"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "words"), [pytest.param(*case[1:], id=case[0]) for case in BAD])
def test_what_the_tokenizer_cannot_do_is_refused(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        shaped(tmp_path, **fields)


# Tokens that were never trained


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model whose end token was never learned, in the embeddings as in Llama-3's."""
    folder = make_tiny_model(tmp_path_factory.mktemp("base") / "base")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][1] = 1e-20
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_rows_that_are_all_but_zero_are_found(base: Path) -> None:
    assert find_untrained(base, [0, 1, 5]) == [1]


def test_a_head_of_its_own_is_looked_at_too(tmp_path: Path) -> None:
    head = torch.ones(8, 4)
    head[3] = 0
    save_file({"lm_head.weight": head, "model.embed_tokens.weight": torch.ones(8, 4)}, tmp_path / "model.safetensors")
    assert find_untrained(tmp_path, [2, 3]) == [3]


def test_a_template_that_writes_them_is_refused_with_the_way_out(base: Path) -> None:
    config = JobConfig.model_validate(make_config())
    words = r"writes <\|im_end\|>, which this base model never learned .*model.tokens.add: \[\"<\|im_end\|>\"\]"
    with pytest.raises(InvalidModel, match=words):
        check_trained(config, base, load_tokenizer(base), {})


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"method": {"type": "Full"}}, id="all weights train"),
        pytest.param({"method": {"lora": {"modulesToSave": ["embed_tokens", "lm_head"]}}}, id="the embeddings train"),
        pytest.param({"model": {"volume": {"claimName": "m", "path": "t"}, "tokens": {"add": [EOS]}}}, id="they train"),
    ],
)
def test_they_may_be_written_where_they_train(base: Path, fields: dict[str, Any]) -> None:
    check_trained(JobConfig.model_validate({**make_config(), **fields}), base, load_tokenizer(base), {})
