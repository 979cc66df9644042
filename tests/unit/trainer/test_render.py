"""What counts in the loss: the answers and their end, nothing else."""

from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.errors import InvalidDataset
from finetune_trainer.model import load_tokenizer
from finetune_trainer.render import Renderer, Tokens
from finetune_trainer.rows import ChatRow, InstructionRow, Place, Row, TextRow
from tests.tiny import CHAT_TEMPLATE, EOS, make_tokenizer

PLACE = Place("d", "f.jsonl", 1)
ASK = InstructionRow("What is it?", "", "It is Paris é.")
TALK = ChatRow(
    (
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Ciao"},
    )
)
# The shapes of templates in the field, each a trap for finding the answers.
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'].strip() + ' <|im_end|>' }}"
    "{% else %}{{ '<|im_start|>[INST] ' + m['content'].strip() + ' [/INST]' }}{% endif %}{% endfor %}"
)
THINKING = (  # as Qwen3: the last answer alone gets an empty thought
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if loop.last and m['role'] == 'assistant' %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
REWRITING = CHAT_TEMPLATE.replace("message['content']", "message['content'].replace('Ciao', 'Ciao!')")


def tokenizer_with(folder: Path, template: str | None = CHAT_TEMPLATE) -> Any:
    make_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    return tokenizer


def tokens_of(tokenizer: Any, row: Row) -> Tokens | None:
    renderer = Renderer(tokenizer)
    rendered = renderer.render(row, PLACE)
    return None if rendered is None else next(renderer.tokenize([rendered]))


def learned(tokenizer: Any, row: Row) -> str:
    tokens = tokens_of(tokenizer, row)
    assert tokens is not None
    return str(tokenizer.decode(tokens.input_ids[tokens.loss_mask]))


@pytest.mark.parametrize(
    ("template", "row", "expected"),
    [
        pytest.param(CHAT_TEMPLATE, ASK, "It is Paris é." + EOS, id="an answer in the chat template"),
        pytest.param(None, ASK, "It is Paris é." + EOS, id="an answer in the plain prompt"),
        pytest.param(CHAT_TEMPLATE, TALK, f"Hello{EOS}Ciao{EOS}", id="every assistant turn with its end"),
        pytest.param(LLAMA2, TALK, f"Hello {EOS}Ciao {EOS}", id="a template that strips and spaces"),
        pytest.param(THINKING, TALK, f"Hello{EOS}Ciao{EOS}", id="a template that treats the last turn apart"),
        pytest.param(PLAIN, TALK, f"HelloCiao{EOS}", id="a template without end tokens gets one at the end"),
        pytest.param(REWRITING, TALK, f"Hello{EOS}Ciao{EOS}", id="a template that rewrites contents"),
        pytest.param(CHAT_TEMPLATE, TextRow("abc def"), "bc def" + EOS, id="all of a text but its first token"),
        pytest.param(CHAT_TEMPLATE, TextRow("abc" + EOS + EOS), "bc" + EOS, id="one end token, however many there are"),
    ],
)
def test_the_answers_and_their_end_count(tmp_path: Path, template: str | None, row: Row, expected: str) -> None:
    assert learned(tokenizer_with(tmp_path, template), row) == expected


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None, LLAMA2, PLAIN])
def test_a_row_ends_with_one_end_token_that_counts(tmp_path: Path, template: str | None) -> None:
    tokenizer = tokenizer_with(tmp_path, template)
    tokens = tokens_of(tokenizer, ASK)
    assert tokens is not None
    assert tokens.input_ids[-1] == tokenizer.eos_token_id
    assert tokens.input_ids[-2] != tokenizer.eos_token_id
    assert tokens.loss_mask[-1]


def test_the_end_token_counts_where_it_is_the_padding_token_too(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path)
    tokenizer.pad_token = tokenizer.eos_token
    assert learned(tokenizer, ASK).endswith(EOS)


def test_there_is_no_second_bos(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing  # noqa: PLC0415 - slow

    tokenizer = tokenizer_with(tmp_path)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{bos} $A", None, [(bos, tokenizer.bos_token_id)])
    for row in (TextRow(bos + "abc"), TextRow("abc"), ASK):
        tokens = tokens_of(tokenizer, row)
        assert tokens is not None
        assert tokens.input_ids[0] == tokenizer.bos_token_id
        assert tokens.input_ids[1] != tokenizer.bos_token_id


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(TextRow("  \n"), id="an empty text"),
        pytest.param(InstructionRow("q", "", " "), id="an empty answer"),
        pytest.param(ChatRow(({"role": "user", "content": "Hi"},)), id="a question without answer"),
        pytest.param(ChatRow(({"role": "assistant", "content": ""},)), id="an empty turn"),
    ],
)
def test_rows_with_nothing_to_learn_are_left_out(tmp_path: Path, row: Row) -> None:
    assert tokens_of(tokenizer_with(tmp_path), row) is None


def test_what_comes_after_the_last_answer_is_left_out(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path)
    tokens = tokens_of(tokenizer, ChatRow((*TALK.messages, {"role": "user", "content": "Wait"})))
    assert tokens is not None
    assert "Wait" not in tokenizer.decode(tokens.input_ids)


def test_chat_needs_a_chat_template(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidDataset, match=r"line 1: the row is Chat, but .* no chat template. Use an instruct model"
    ):
        tokens_of(tokenizer_with(tmp_path, None), TALK)


def test_a_template_that_refuses_a_row_is_quoted(tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidDataset, match=r"line 1: .*template refuses the row .*roles must alternate"):
        tokens_of(tokenizer_with(tmp_path, template), TALK)
