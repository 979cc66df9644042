"""Rows as tokens, and which of them count in the loss.

Text              all tokens; one end token after the text. Longer texts are split.
Instruction,      the answer and its end token. The prompt is the chat template's, or `PLAIN_PROMPT` and the like where
QuestionAnswer    the tokenizer has none.
PromptCompletion  the completion and one end token, word by word; of messages the completion's turns.
Chat              every assistant turn with the token that ends it. Needs a chat template. Where the template marks
                  answers with {% generation %}, its marks are taken.
Preference        each answer with its end, as of the formats above.

`objective.sft.lossOn` says otherwise: all tokens, or the last answer alone.

The whole row is tokenized at once, as it is when the model is used; a token counts if it covers a character of what
is to be learned. Masks are made from positions, never from token ids: the padding token is often the end token. The
first token of a row never counts, since nothing comes before it to predict it from.

Control tokens come from templates alone. Where a row's own text spells one (`<|im_end|>`), it is marked before the
template is rendered, and what was marked is tokenized as plain text; as transformers does for chats
(`sanitize_control_tokens`, 5.23), which gives no masks.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from finetune_trainer.config import LossOn
from finetune_trainer.data.files import Place
from finetune_trainer.data.rows import (
    ChatRow,
    InstructionRow,
    PreferenceRow,
    PromptRow,
    QuestionRow,
    Row,
    SingleRow,
    TemplateRow,
    TextRow,
)
from finetune_trainer.data.templates import RENDER_ERRORS, RowTemplate, bounded
from finetune_trainer.runtime.errors import InvalidDataset
from finetune_trainer.runtime.wording import first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from finetune_trainer.data.rows import Message

T = TypeVar("T")

PLAIN_PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"
PLAIN_PROMPT_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
PLAIN_QUESTION = "Question: {question}\n\nAnswer: "
PLAIN_QUESTION_WITH_CONTEXT = "Context: {context}\n\nQuestion: {question}\n\nAnswer: "
SENTINEL = "\ue000{index}\ue001"
"""Stands for a message's content while its place in the template is looked for: characters of private use."""
LAYOUTS_REMEMBERED = 4096
MARKS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
"""Characters that Unicode keeps free for a program's own use: one that the row lacks marks what must stay text."""
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """A row as text: what is learned, and whether the tokenizer's own tokens go around it."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Character ranges that count in the loss."""
    bare: bool
    """The template wrote every special token already."""
    closes: bool
    """The end token is to be put after the last token, and counts."""
    splits: bool = False
    """May be split where it is too long."""
    plain: tuple[int, ...] = ()
    """Where the row's own text spells a control token, which it is not."""


@dataclass(frozen=True)
class RenderedPair:
    """Two answers, each with the prompt."""

    chosen: Rendered
    rejected: Rendered


@dataclass(frozen=True)
class Tokens:
    """A row as the trainer reads it."""

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]


@dataclass(frozen=True)
class Turn:
    """What is learned of an assistant's message."""

    message: int
    start: int
    end: int


class Renderer:
    """Renders and tokenizes rows with one tokenizer."""

    def __init__(
        self,
        tokenizer: Any,  # noqa: ANN401 - any of transformers' fast tokenizers
        loss_on: LossOn = LossOn.AUTO,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """`tokenizer` must be fast and have an end token; `template_kwargs` are the chat template's."""
        self._tokenizer, self._loss_on, self.template_kwargs = tokenizer, loss_on, dict(template_kwargs or {})
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._eos: int = tokenizer.eos_token_id
        self._bos: int | None = tokenizer.bos_token_id
        special = {str(token) for token in tokenizer.all_special_tokens}
        special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = tuple(sorted(special - {""}, key=len, reverse=True))
        self._special_ids = {tokenizer.convert_tokens_to_ids(token) for token in self._special}
        self._spelled = re.compile("|".join(map(re.escape, self._special)) or r"(?!)")
        self._layout = lru_cache(LAYOUTS_REMEMBERED)(self._plain_layout)
        self._as_text = lru_cache(LAYOUTS_REMEMBERED)(self._encode_as_text)
        self.spelling_rows = 0
        """Rows so far whose own text spells a control token."""

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer brings a chat template."""
        return bool(self._tokenizer.chat_template)

    def uses_template(self, row: Row) -> bool:
        """Whether the row goes through the chat template."""
        one = row.chosen if isinstance(row, PreferenceRow) else row
        return isinstance(one, ChatRow) or (self.has_template and isinstance(one, (InstructionRow, QuestionRow)))

    def render(self, row: Row, place: Place) -> Rendered | RenderedPair | None:
        """The row as text; None if there is nothing in it to learn. InvalidDataset where a template refuses it."""
        row = self._without_ends(row)
        mark = self._choose_mark(row)
        if mark:
            self.spelling_rows += 1
            row = _mapped(row, lambda text: self._spelled.sub(lambda found: found[0][0] + mark + found[0][1:], text))
        if not isinstance(row, PreferenceRow):
            return self._finish(self._render(row, place), mark, place)
        chosen, rejected = (self._finish(self._render(each, place), mark, place) for each in (row.chosen, row.rejected))
        return None if chosen is None or rejected is None or chosen == rejected else RenderedPair(chosen, rejected)

    def _without_ends(self, row: Row) -> Row:
        """A text without the tokens that are put around it anyway, which it may spell already."""
        if not isinstance(row, TextRow) or row.rendered:
            return row
        text, bos, eos = row.text, self._tokenizer.bos_token, str(self._tokenizer.eos_token)
        while bos and text.startswith(bos):
            text = text[len(bos) :]
        while text.endswith(eos):
            text = text[: -len(eos)]
        return replace(row, text=text)

    def _choose_mark(self, row: Row) -> str:
        """A character that the row lacks, if it spells a control token; else nothing."""
        texts = [] if isinstance(row, TextRow) and row.rendered else list(_texts(row))
        if not any(self._spelled.search(text) for text in texts):
            return ""
        return next((mark for mark in MARKS if not any(mark in text for text in texts)), MARKS[0])

    def _finish(self, rendered: Rendered | None, mark: str, place: Place) -> Rendered | None:
        """The rendered row without marks, which are remembered as places; whole characters alone."""
        if rendered is None:
            return None
        try:
            rendered.text.encode()
        except UnicodeEncodeError as error:
            remedy = "Escape the whole character, or leave it out."
            place.refuse("the row holds half a surrogate pair", remedy, error)
        if not mark:
            return rendered
        marks = [found.start() for found in re.finditer(mark, rendered.text)]
        spans = tuple(
            (start - bisect_left(marks, start), end - bisect_left(marks, end)) for start, end in rendered.spans
        )
        plain = tuple(position - 1 - before for before, position in enumerate(marks))
        return replace(rendered, text=rendered.text.replace(mark, ""), spans=spans, plain=plain)

    def _render(self, row: SingleRow, place: Place) -> Rendered | None:
        match row:
            case TextRow():
                return self._render_text(row, place)
            case InstructionRow():
                question = row.instruction + (f"\n\n{row.input}" if row.input else "")
                template = PLAIN_PROMPT_WITH_INPUT if row.input else PLAIN_PROMPT
                plain = template.format(instruction=row.instruction, input=row.input)
                return self._render_exchange(row.system, question, row.output, plain, place)
            case QuestionRow():
                question = (f"{row.context}\n\n" if row.context else "") + row.question
                template = PLAIN_QUESTION_WITH_CONTEXT if row.context else PLAIN_QUESTION
                plain = template.format(question=row.question, context=row.context)
                return self._render_exchange(row.system, question, row.answer, plain, place)
            case PromptRow():
                return self._render_prompt(row.prompt, row.answer)
            case TemplateRow():
                prompt, response = row.prompt.render(row.record, row.place), row.response
                answer = response.render(row.record, row.place) if isinstance(response, RowTemplate) else response
                return self._render_prompt(prompt, answer)
            case ChatRow():
                return self._render_chat(row, place)

    def _render_text(self, row: TextRow, place: Place) -> Rendered | None:
        if self._loss_on in {LossOn.COMPLETION, LossOn.ASSISTANT}:
            problem = f"objective.sft.lossOn is {self._loss_on}, but a row of the Text format is all one text"
            place.refuse(problem, "Leave lossOn unset, or set format and columns so that the answer stands apart.")
        if not row.text.strip():
            return None
        return Rendered(row.text, ((0, len(row.text)),), bare=False, closes=True, splits=True)

    def _render_prompt(self, prompt: str, answer: str) -> Rendered | None:
        if not answer.strip():
            return None
        text = prompt + answer
        start = 0 if self._loss_on is LossOn.ALL_TOKENS else len(prompt)
        return Rendered(text, ((start, len(text)),), bare=False, closes=True)

    def _render_exchange(self, system: str, question: str, answer: str, plain: str, place: Place) -> Rendered | None:
        """A question and its answer, in the chat template where there is one."""
        if not answer.strip():
            return None
        if not self.has_template:
            return self._render_prompt(f"{system}\n\n{plain}" if system else plain, answer)
        begin = ({"role": "system", "content": system},) if system else ()
        turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        return self._render_chat(ChatRow((*begin, *turns)), place)

    # Conversations

    def _render_chat(self, row: ChatRow, place: Place) -> Rendered | None:
        if not self.has_template:
            remedy = "Set model.chatTemplate (a preset or jinja), use an instruct model, or rows of another format."
            place.refuse("the row is Chat, but the model's tokenizer has no chat template", remedy)
        row = replace(row, messages=_until_last_answer(row.messages))
        if len(row.messages) <= row.given:
            return None
        text, marked = self._apply_template(row, place)
        turns = _marked_turns(row, marked) if marked else self._answer_turns(row, text, place)
        turns = [turn for turn in turns if turn.message >= row.given]
        if marked:
            turns = [self._with_end(turn, text) for turn in turns]
        if not turns:
            return None
        # A template that ends answers with no token of its own leaves that to the end token.
        text = text[: turns[-1].end]
        closes = not text.endswith(self._special)
        return Rendered(text, self._chosen_spans(turns, text), bare=True, closes=closes)

    def _with_end(self, turn: Turn, text: str) -> Turn:
        """The turn as its template marked it, with the token that ends it where that was left out."""
        if text[turn.start : turn.end].rstrip().endswith(self._special):
            return turn
        return replace(turn, end=turn.end + self._length_of_end(text[turn.end :]))

    def _chosen_spans(self, turns: Sequence[Turn], text: str) -> tuple[tuple[int, int], ...]:
        if self._loss_on is LossOn.ALL_TOKENS:
            return ((0, len(text)),)
        last = turns[-1].message
        wanted = [turn for turn in turns if self._loss_on is not LossOn.COMPLETION or turn.message == last]
        return tuple((turn.start, turn.end) for turn in wanted)

    def _apply_template(
        self, row: ChatRow, place: Place, *, prompting: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and the character ranges that the template marks as answers."""
        from transformers.utils import chat_template_utils  # noqa: PLC0415 - slow

        render: Any = chat_template_utils.render_jinja_template  # its types are not what it returns
        tools = list(row.tools) or None
        template = self._tokenizer.get_chat_template(None, tools)
        marks = bool(GENERATION.search(template))
        try:
            with bounded():
                texts, ranges = render(
                    conversations=[[dict(message) for message in row.messages]],
                    tools=tools,
                    chat_template=template,
                    return_assistant_tokens_mask=marks,
                    add_generation_prompt=prompting,
                    **{**self._tokenizer.special_tokens_map, **self.template_kwargs},
                )
        except (*RENDER_ERRORS, RecursionError) as error:
            roles = ", ".join(message["role"] for message in row.messages)[:100]
            problem = f"the model's chat template refuses the row (roles {roles}): {first_line(error)}"
            return place.refuse(problem, "Order the messages as the template asks, or leave the row out.", error)
        return str(texts[0]), list(ranges[0]) if marks else []

    def _answer_turns(self, row: ChatRow, text: str, place: Place) -> list[Turn]:
        """Where in the text the assistant's turns are, each from its content to the token that ends it.

        The template is rendered once more with sentinels for contents: what it writes around them is then known.
        Templates that do otherwise for other contents are followed turn by turn, and so are turns that call tools.
        """
        calls = [index for index, message in enumerate(row.messages) if message.get("tool_calls")]
        called = [turn for index in calls if (turn := self._turn_from_prompt(row, index, text, place))]
        pieces = self._pieces_around_contents(row, place.dataset)
        for clean in (str, str.strip):
            contents = [clean(message["content"]) for message in row.messages if message["content"]]
            if pieces is not None and text == _joined(pieces, contents):
                found = self._turns_between(row.messages, pieces, contents)
                break
        else:
            found = self._turns_one_by_one(row, text, place)
        return sorted([*called, *(turn for turn in found if turn.message not in calls)], key=lambda turn: turn.start)

    def _pieces_around_contents(self, row: ChatRow, dataset: str) -> tuple[str, ...] | None:
        """What the template writes before, between and after the contents; None if it cannot be told."""
        if not row.tools and all(message.keys() == {"role", "content"} for message in row.messages):
            return self._layout(tuple((message["role"], bool(message["content"])) for message in row.messages), dataset)
        return self._layout_of(row, dataset)

    def _plain_layout(self, shape: tuple[tuple[str, bool], ...], dataset: str) -> tuple[str, ...] | None:
        """The pieces of a conversation of so many messages with these roles, each with content or empty."""
        messages = tuple({"role": role, "content": "x" if filled else ""} for role, filled in shape)
        return self._layout_of(ChatRow(messages), dataset)

    def _layout_of(self, row: ChatRow, dataset: str) -> tuple[str, ...] | None:
        stands = [SENTINEL.format(index=index) if each["content"] else "" for index, each in enumerate(row.messages)]
        messages = tuple({**message, "content": stand} for message, stand in zip(row.messages, stands, strict=True))
        try:
            rest, _ = self._apply_template(replace(row, messages=messages), Place(dataset, "template", 0))
        except InvalidDataset:
            return None
        pieces = []
        for stand in filter(None, stands):
            before, found, rest = rest.partition(stand)
            if not found:
                return None
            pieces.append(before)
        return (*pieces, rest)

    def _turns_between(self, messages: Sequence[Message], pieces: tuple[str, ...], contents: list[str]) -> list[Turn]:
        turns, position = [], 0
        filled = [index for index, message in enumerate(messages) if message["content"]]
        for index, before, content, after in zip(filled, pieces, contents, pieces[1:], strict=False):
            start = position + len(before)
            position = start + len(content)
            if messages[index]["role"] == "assistant" and content.strip():
                turns.append(Turn(index, start, position + self._length_of_end(after)))
        return turns

    def _length_of_end(self, after: str) -> int:
        """Characters up to the end of the first special token, if nothing but space comes before it."""
        stripped = after.lstrip()
        end = next((token for token in self._special if stripped.startswith(token)), None)
        if end is None:
            return 0
        length = len(after) - len(stripped) + len(end)
        eos = str(self._tokenizer.eos_token)
        return length + len(eos) if end != eos and after.startswith(eos, length) else length

    def _turns_one_by_one(self, row: ChatRow, text: str, place: Place) -> list[Turn]:
        turns: list[Turn] = []
        for index, message in enumerate(row.messages):
            if message["role"] != "assistant":
                continue
            content = message["content"].strip()
            before = self._apply_template(_first(row, index), place)[0] if index else ""
            shared = len(before) if text.startswith(before) else (turns[-1].end if turns else 0)
            start = text.find(content, shared) if content else -1
            if start < 0:
                continue  # the template leaves this answer out, or rewrites it: nothing to learn word by word
            end = start + len(content)
            turns.append(Turn(index, start, end + self._length_of_end(text[end:])))
        return turns

    def _turn_from_prompt(self, row: ChatRow, index: int, text: str, place: Place) -> Turn | None:
        """The turn of a message as what comes after the prompt for it; None where the template tells them otherwise."""
        before = self._apply_template(_first(row, index), place, prompting=True)[0] if index else ""
        whole = self._apply_template(_first(row, index + 1), place)[0].rstrip()
        if not (whole.startswith(before) and text.startswith(whole) and len(whole) > len(before)):
            return None
        return Turn(index, len(before), len(whole))

    # Tokens

    def tokenize(self, batch: Sequence[Rendered]) -> Iterator[Tokens]:
        """The tokens of rendered rows, in their order."""
        encoded: list[Any] = [None] * len(batch)
        for bare in (True, False):
            indexes = [index for index, row in enumerate(batch) if row.bare is bare]
            texts = [batch[index].text for index in indexes]
            if texts:
                found = self._backend.encode_batch(texts, add_special_tokens=not bare)
                for index, encoding in zip(indexes, found, strict=True):
                    encoded[index] = encoding
        for row, encoding in zip(batch, encoded, strict=True):
            yield self._masked(row, encoding)

    def _masked(self, row: Rendered, encoding: Any) -> Tokens:  # noqa: ANN401 - tokenizers.Encoding
        ids: NDArray[np.int32] = np.asarray(encoding.ids, dtype=np.int32)
        offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        mask: NDArray[np.bool_] = np.zeros(len(ids), dtype=np.bool_)
        for start, end in row.spans:
            mask |= (offsets[:, 1] > start) & (offsets[:, 0] < end) & (offsets[:, 1] > offsets[:, 0])
        if row.plain:
            ids, mask = self._spelled_out(row, ids, mask, offsets)
        if self._bos is not None and len(ids) > 1 and ids[0] == ids[1] == self._bos:
            ids, mask = ids[1:], mask[1:]
        if row.closes:
            ids, mask = self._closed(ids, mask)
        if len(mask):
            mask[0] = False
        return Tokens(ids, mask)

    def _spelled_out(
        self, row: Rendered, ids: NDArray[np.int32], mask: NDArray[np.bool_], offsets: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Control tokens that the row's own text spells, as the tokens of that text."""
        all_ids: list[int] = []
        counts: list[bool] = []
        for token, counted, (start, end) in zip(ids.tolist(), mask.tolist(), offsets.tolist(), strict=True):
            first = bisect_left(row.plain, start)
            own = token in self._special_ids and first < len(row.plain) and row.plain[first] < end
            pieces = self._as_text(row.text[start:end]) if own else (token,)
            all_ids += pieces
            counts += [counted] * len(pieces)
        return np.asarray(all_ids, dtype=np.int32), np.asarray(counts, dtype=np.bool_)

    def _encode_as_text(self, text: str) -> tuple[int, ...]:
        self._backend.encode_special_tokens = True
        try:
            return tuple(self._backend.encode(text, add_special_tokens=False).ids)
        finally:
            self._backend.encode_special_tokens = False

    def _closed(self, ids: NDArray[np.int32], mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """One end token at the end, which counts, however many there were."""
        length = len(ids)
        while length and ids[length - 1] == self._eos:
            length -= 1
        return np.append(ids[:length], np.int32(self._eos)), np.append(mask[:length], True)


def _first(row: ChatRow, count: int) -> ChatRow:
    return replace(row, messages=row.messages[:count])


def _until_last_answer(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """A conversation up to its last answer: what comes after is never learned."""
    last = max((index for index, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    return messages[: last + 1]


def _marked_turns(row: ChatRow, ranges: Sequence[tuple[int, int]]) -> list[Turn]:
    """The ranges that a template marked, each with its message; the last one's where they do not match one to one."""
    answers = [index for index, message in enumerate(row.messages) if message["role"] == "assistant"]
    owners = answers if len(answers) == len(ranges) else [len(row.messages) - 1] * len(ranges)
    return [Turn(owner, start, end) for owner, (start, end) in zip(owners, ranges, strict=True) if end > start]


def _joined(pieces: Sequence[str], contents: Sequence[str]) -> str:
    return "".join(piece + content for piece, content in zip(pieces, contents, strict=False)) + pieces[-1]


def _mapped(value: T, change: Callable[[str], str]) -> T:
    """A row, or a part of one, with every text in it changed; names of fields stay."""
    found: Any = value
    if isinstance(value, str):
        found = change(value)
    elif isinstance(value, (list, tuple)):
        found = type(value)(_mapped(each, change) for each in value)
    elif isinstance(value, dict):
        found = {name: _mapped(each, change) for name, each in value.items()}
    elif is_dataclass(value) and not isinstance(value, (type, Place)):
        found = replace(value, **{each.name: _mapped(getattr(value, each.name), change) for each in fields(value)})
    return found  # type: ignore[no-any-return]


def _texts(value: object) -> Iterator[str]:
    """Every text in a row."""
    seen: list[str] = []
    _mapped(value, lambda text: seen.append(text) or text)  # type: ignore[func-returns-value]
    yield from seen
