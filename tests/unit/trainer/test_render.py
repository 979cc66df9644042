"""What counts in the loss: the answers and their end, nothing else; and what never becomes a control token."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.config import Dataset, LossOn
from finetune_trainer.data.files import Place
from finetune_trainer.data.render import Rendered, RenderedPair, Renderer, Tokens
from finetune_trainer.data.rows import (
    ChatRow,
    DatasetReader,
    InstructionRow,
    PreferenceRow,
    PromptRow,
    QuestionRow,
    Row,
    TextRow,
)
from finetune_trainer.models.folder import load_tokenizer
from finetune_trainer.runtime.errors import InvalidDataset, TrainerError
from tests.tiny import BOS, CHAT_TEMPLATE, EOS, make_jsonl, make_tokenizer

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


MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
)
TOOLS = (  # as Qwen2.5: tools first, calls as JSON within the turn
    "{% if tools %}{{ 'Tools: ' + tools | tojson + '\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}{{ '<call>' + call['function'] | tojson + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLING = ChatRow(
    (
        {"role": "user", "content": "Add"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two"},
    ),
    tools=({"type": "function", "function": {"name": "add"}},),
)


def tokenizer_with(folder: Path, template: str | None = CHAT_TEMPLATE) -> Any:
    make_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    return tokenizer


def tokens_of(tokenizer: Any, row: Row, loss_on: LossOn = LossOn.AUTO, **kwargs: Any) -> Tokens | None:
    renderer = Renderer(tokenizer, loss_on, kwargs)
    rendered = renderer.render(row, PLACE)
    assert not isinstance(rendered, RenderedPair)
    return None if rendered is None else next(renderer.tokenize([rendered]))


def learned(tokenizer: Any, row: Row, loss_on: LossOn = LossOn.AUTO, **kwargs: Any) -> str:
    tokens = tokens_of(tokenizer, row, loss_on, **kwargs)
    assert tokens is not None
    return str(tokenizer.decode(tokens.input_ids[tokens.loss_mask]))


def whole(tokenizer: Any, row: Row) -> str:
    tokens = tokens_of(tokenizer, row)
    assert tokens is not None
    return str(tokenizer.decode(tokens.input_ids))


@pytest.mark.parametrize(
    ("template", "row", "expected"),
    [
        pytest.param(CHAT_TEMPLATE, ASK, "It is Paris é." + EOS, id="an answer in the chat template"),
        pytest.param(None, ASK, "It is Paris é." + EOS, id="an answer in the plain prompt"),
        pytest.param(None, QuestionRow("q", "c", "It is."), "It is." + EOS, id="an answer to a question"),
        pytest.param(CHAT_TEMPLATE, PromptRow("Say: ", "It is."), "It is." + EOS, id="a completion, word by word"),
        pytest.param(CHAT_TEMPLATE, ChatRow(TALK.messages, given=4), f"Ciao{EOS}", id="nothing of the prompt"),
        pytest.param(MARKED, TALK, f"Hello{EOS}Ciao{EOS}", id="what the template marks, with the end behind the mark"),
        pytest.param(
            MARKED, ChatRow(TALK.messages, given=4), f"Ciao{EOS}", id="of what is marked nothing of the prompt"
        ),
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
        InvalidDataset, match=r"line 1: the row is Chat, but .* no chat template. Set model.chatTemplate"
    ):
        tokens_of(tokenizer_with(tmp_path, None), TALK)


def test_a_template_that_refuses_a_row_is_quoted(tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidDataset, match=r"line 1: .*template refuses the row .*roles must alternate"):
        tokens_of(tokenizer_with(tmp_path, template), TALK)


@pytest.mark.parametrize(
    ("loss_on", "row", "expected"),
    [
        pytest.param(LossOn.ASSISTANT, TALK, f"Hello{EOS}Ciao{EOS}", id="every answer"),
        pytest.param(LossOn.COMPLETION, TALK, f"Ciao{EOS}", id="the last answer"),
        pytest.param(LossOn.COMPLETION, ASK, "It is Paris é." + EOS, id="the only answer"),
        pytest.param(LossOn.ALL_TOKENS, PromptRow("Say: ", "it"), f"ay: it{EOS}", id="the prompt too"),
        pytest.param(LossOn.ALL_TOKENS, TextRow("abc"), "bc" + EOS, id="all of a text"),
    ],
)
def test_what_the_loss_is_on(tmp_path: Path, loss_on: LossOn, row: Row, expected: str) -> None:
    assert learned(tokenizer_with(tmp_path), row, loss_on) == expected


def test_all_tokens_of_a_conversation_may_count(tmp_path: Path) -> None:
    found = learned(tokenizer_with(tmp_path), TALK, LossOn.ALL_TOKENS)
    assert found.startswith(f"system\nBe kind.{EOS}")
    assert found.endswith(f"Ciao{EOS}")


def test_a_text_has_no_answer_apart(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataset, match="lossOn is Completion, but a row of the Text format is all one text"):
        tokens_of(tokenizer_with(tmp_path), TextRow("abc"), LossOn.COMPLETION)


def test_a_call_of_a_tool_is_learned_as_the_template_writes_it(tmp_path: Path) -> None:
    call = '<call>{"name": "add", "arguments": {"a": 1}}</call>'
    tokenizer = tokenizer_with(tmp_path, TOOLS)
    assert learned(tokenizer, CALLING) == f"{call}{EOS}Two{EOS}"
    assert whole(tokenizer, CALLING).startswith("Tools: [{")


def test_values_for_the_template_are_given_by_name(tmp_path: Path) -> None:
    template = "{% if loud %}{{ '!' }}{% endif %}" + CHAT_TEMPLATE
    renderer = Renderer(tokenizer_with(tmp_path, template), template_kwargs={"loud": True})
    rendered = renderer.render(TALK, PLACE)
    assert isinstance(rendered, Rendered)
    assert rendered.text.startswith("!")


def test_of_two_answers_each_counts_with_the_prompt_before_it(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path)
    renderer = Renderer(tokenizer)
    rendered = renderer.render(PreferenceRow(PromptRow("Say ", "yes"), PromptRow("Say ", "no")), PLACE)
    assert isinstance(rendered, RenderedPair)
    chosen, rejected = renderer.tokenize([rendered.chosen, rendered.rejected])
    assert tokenizer.decode(chosen.input_ids[chosen.loss_mask]) == f"yes{EOS}"
    assert tokenizer.decode(rejected.input_ids) == f"Say no{EOS}"
    assert renderer.render(PreferenceRow(PromptRow("Say ", "yes"), PromptRow("Say ", "yes")), PLACE) is None


# Control tokens come from templates alone


SPELLS = f"Write {EOS} and {BOS}user"


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None, LLAMA2, MARKED, REWRITING], ids=range(5))
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(InstructionRow(SPELLS, SPELLS, SPELLS), id="Instruction"),
        pytest.param(QuestionRow(SPELLS, "", SPELLS), id="QuestionAnswer"),
        pytest.param(PromptRow(SPELLS, SPELLS), id="PromptCompletion"),
        pytest.param(TextRow(SPELLS), id="Text"),
        pytest.param(
            ChatRow(({"role": "user", "content": SPELLS}, {"role": "assistant", "content": SPELLS})), id="Chat"
        ),
    ],
)
def test_control_tokens_that_a_row_spells_stay_text(tmp_path: Path, template: str | None, row: Row) -> None:
    if template is None and isinstance(row, ChatRow):
        pytest.skip("chats need a template")
    tokenizer = tokenizer_with(tmp_path, template)
    harmless = _as_tokens(tokenizer, row, lambda text: text.replace("<|", "<"))
    spelled = _as_tokens(tokenizer, row, str)
    for control in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        assert spelled.count(control) == harmless.count(control)
    assert tokenizer.decode(spelled).count(SPELLS) >= 1
    assert learned(tokenizer, row).endswith(EOS)


def _as_tokens(tokenizer: Any, row: Row, change: Any) -> list[int]:
    from finetune_trainer.data.render import _mapped  # noqa: PLC0415 - used here alone

    tokens = tokens_of(tokenizer, _mapped(row, change))
    assert tokens is not None
    return [int(token) for token in tokens.input_ids]


def test_a_text_that_a_template_was_rendered_into_keeps_its_control_tokens(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path)
    text = f"{BOS}user\nHi{EOS}{BOS}assistant\nHello{EOS}"
    rendered, spelled = (_as_tokens(tokenizer, TextRow(text, rendered=each), str) for each in (True, False))
    assert rendered.count(tokenizer.eos_token_id) == 2
    assert spelled.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(spelled) == tokenizer.decode(rendered).removeprefix(BOS)


def test_a_row_may_hold_the_marks_that_are_used_inside(tmp_path: Path) -> None:
    text = f"\ufdd0{EOS}\ufdd1 end"
    assert whole(tokenizer_with(tmp_path), TextRow(text)) == text + EOS


# Templates of a dataset


DOLLY_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{{ instruction }}\n\n"
    "{% if context %}Input:\n{{ context }}\n\n{% endif %}"
    "### Response:\n"
)
DOLLY_RESPONSE = "{{ response }}\n\n### End"


def dolly(instruction: str, context: str, response: str) -> str:
    """Recipe 5's prompt as its notebook makes it."""
    blurb = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    parts = [
        blurb,
        f"### Instruction:\n{instruction}",
        f"Input:\n{context}" if context else None,
        f"### Response:\n{response}",
        "### End",
    ]
    return "\n\n".join(part for part in parts if part)


def from_row(folder: Path, row: dict[str, Any], **fields: Any) -> Row:
    path = make_jsonl(folder / "rows.jsonl", [row])
    dataset = Dataset.model_validate({"volume": {"claimName": "claim", "path": "rows.jsonl"}, **fields})
    return next(iter(DatasetReader(dataset, "dolly", path)))[1]


@pytest.mark.parametrize("context", ["", "It is the capital."])
def test_recipe_5s_prompt(tmp_path: Path, context: str) -> None:
    tokenizer = tokenizer_with(tmp_path / "tokenizer", None)
    fields = {"instruction": "Where is it?", "context": context, "response": "In Paris.", "category": "open_qa"}
    row = from_row(tmp_path, fields, promptTemplate=DOLLY_PROMPT, responseTemplate=DOLLY_RESPONSE)
    assert whole(tokenizer, row) == dolly("Where is it?", context, "In Paris.") + EOS
    assert learned(tokenizer, row) == f"In Paris.\n\n### End{EOS}"


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"columns": {"answer": "response_j"}}, id="by its format"),
        pytest.param(
            {
                "columns": {"answer": "response_j"},
                "format": "QuestionAnswer",
                "promptTemplate": "Question: {{ question }}\n\nAnswer: ",
            },
            id="by a template, in any tokenizer",
        ),
    ],
)
def test_recipe_4s_prompt(tmp_path: Path, fields: dict[str, Any]) -> None:
    tokenizer = tokenizer_with(tmp_path / "tokenizer", CHAT_TEMPLATE if "promptTemplate" in fields else None)
    row = from_row(tmp_path, {"question": "How?", "response_j": "So.", "response_k": "No."}, **fields)
    assert whole(tokenizer, row) == f"Question: How?\n\nAnswer: So.{EOS}"
    assert learned(tokenizer, row) in {f"So.{EOS}", f" So.{EOS}"}


def test_a_template_writes_control_tokens_and_fields_do_not(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path / "tokenizer")
    template = "<|im_start|>user\n{{ ask }}<|im_end|>"
    row = from_row(tmp_path, {"ask": SPELLS, "tell": "ok"}, promptTemplate=template, responseTemplate="{{ tell }}")
    tokens = _as_tokens(tokenizer, row, str)
    assert tokens.count(tokenizer.bos_token_id) == 1
    assert tokens.count(tokenizer.eos_token_id) == 2
    assert SPELLS in tokenizer.decode(tokens)


def test_compared_answers_have_a_templates_prompt(tmp_path: Path) -> None:
    fields = {"q": "How?", "chosen": "So.", "rejected": "No."}
    row = from_row(tmp_path, fields, promptTemplate="Question: {{ q }}\nAnswer: ")
    rendered = Renderer(tokenizer_with(tmp_path / "tokenizer")).render(row, PLACE)
    assert isinstance(rendered, RenderedPair)
    assert rendered.rejected.text == "Question: How?\nAnswer: No."


LOOPS = "{% for i in row %}{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
DOUBLES = "{% set all = namespace(x=text) %}{% for i in range(40) %}{% set all.x = all.x ~ all.x %}{% endfor %}"
HOSTILE = [
    ("a missing field", "{{ contxt }}", r"'contxt' is undefined \(the row has 'text'\). Correct the template"),
    ("a missing part of a field", "{{ text.summary }}", "has no attribute 'summary'"),
    ("a look into the process", "{{ text.__class__.__mro__ }}", "__class__.*unsafe|unsafe|undefined"),
    ("a change of the row", "{{ row.clear() }}", "unsafe|not safely callable"),
    ("another file", "{% include '/etc/passwd' %}", "no loader|cannot be rendered"),
    ("a long loop", "{% for i in range(1000000000) %}x{% endfor %}", "range.. is too long: 1,000,000,000"),
    ("loops in loops", LOOPS, "runs for more than 2 s"),
    ("a long text", "{% for i in range(9999) %}{{ text | center(9999) }}{% endfor %}", "more than 10,000,000 char"),
    ("a product", "{{ 'a' * 1000000000 }}", r"'\*' is for numbers alone"),
    ("a wide filter", "{{ text | center(1000000000) }}", "it takes more than 512 MiB of memory"),
    ("a wide word", "{{ '%999999999d' % 1 }}", "it takes more than 512 MiB of memory"),
    ("a wide form", "{{ '{:>999999999}'.format(1) }}", "it takes more than 512 MiB of memory"),
    ("a text that doubles", DOUBLES, "it takes more than 512 MiB of memory"),
    ("a power", "{{ 9 ** 999999999 }}", r"'\*\*' is not there"),
    ("no end", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ("a division by zero", "{{ 1 / 0 }}", "division by zero"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "words"), [pytest.param(*case[1:], id=case[0]) for case in HOSTILE])
def test_a_template_that_cannot_be_rendered_is_told_with_its_row(tmp_path: Path, template: str, words: str) -> None:
    row = from_row(tmp_path, {"text": "t"}, promptTemplate=template, responseTemplate="x")
    renderer = Renderer(tokenizer_with(tmp_path / "tokenizer"))
    with pytest.raises(InvalidDataset, match=f"dataset 'dolly', file rows.jsonl, line 1: promptTemplate.*({words})"):
        renderer.render(row, PLACE)


def test_a_models_template_that_takes_all_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataset, match=r"template refuses the row .*it takes more than 512 MiB of memory"):
        tokens_of(tokenizer_with(tmp_path, "{{ 'a'.center(1000000000) }}"), TALK)


def test_memory_is_bounded_only_while_a_template_is_rendered(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    row = from_row(tmp_path, {"text": "t"}, promptTemplate="{{ text }}", responseTemplate="x")
    Renderer(tokenizer_with(tmp_path / "tokenizer")).render(row, PLACE)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_a_models_template_that_never_ends_is_refused(tmp_path: Path) -> None:
    template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(InvalidDataset, match=r"template refuses the row .*it runs for more than 2 s"):
        tokens_of(tokenizer_with(tmp_path, template), TALK)


# Any row


TEXTS = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from([EOS, BOS, "<|pad|>", "a" + EOS, " \n"])
TURNS = st.lists(
    st.builds(lambda role, text: {"role": role, "content": text}, st.sampled_from(["user", "assistant"]), TEXTS),
    min_size=1,
    max_size=4,
)
ROWS = st.one_of(
    st.builds(lambda text: {"text": text}, TEXTS),
    st.builds(lambda *texts: dict(zip(("instruction", "input", "output"), texts, strict=True)), TEXTS, TEXTS, TEXTS),
    st.builds(lambda *texts: dict(zip(("prompt", "completion"), texts, strict=True)), TEXTS, TEXTS),
    st.builds(lambda *texts: dict(zip(("question", "answer"), texts, strict=True)), TEXTS, TEXTS),
    st.builds(lambda turns: {"messages": turns}, TURNS),
    st.builds(lambda *texts: dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)), TEXTS, TEXTS, TEXTS),
    st.builds(lambda chosen, rejected: {"chosen": chosen, "rejected": rejected}, TURNS, TURNS),
)


@given(row=ROWS, template=st.sampled_from([CHAT_TEMPLATE, None, LLAMA2, MARKED, PLAIN, THINKING]))
def test_of_any_row_what_is_learned_is_in_it(
    tmp_path_factory: pytest.TempPathFactory, row: dict[str, Any], template: str | None
) -> None:
    folder = tmp_path_factory.mktemp("any")
    tokenizer = tokenizer_with(folder / "tokenizer", template)
    renderer = Renderer(tokenizer)
    try:
        rendered = renderer.render(from_row(folder, row), PLACE)
    except TrainerError:
        return
    if rendered is None:
        return
    sides = (rendered.chosen, rendered.rejected) if isinstance(rendered, RenderedPair) else (rendered,)
    told = json.dumps(row, ensure_ascii=False)
    for side, tokens in zip(sides, renderer.tokenize(sides), strict=True):
        assert len(tokens.input_ids) == len(tokens.loss_mask)
        assert not tokens.loss_mask[:1].any()
        assert tokenizer.decode(tokens.input_ids).startswith(side.text[:1])
        for start, end in side.spans:
            content = side.text[start:end].replace(EOS, "").strip()
            assert json.dumps(content, ensure_ascii=False)[1:-1] in told.replace(EOS, "")
