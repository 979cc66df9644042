"""Rows as tokens, and which of them count in the loss.

Text         all tokens; one end token after the text. Longer texts are split.
Instruction  the answer and its end token. The prompt is the chat template's, or `PLAIN_PROMPT` where the tokenizer
             has none.
Chat         every assistant turn with the token that ends it. Needs a chat template.

The whole row is tokenized at once, as it is when the model is used; a token counts if it covers a character of what
is to be learned. Masks are made from positions, never from token ids: the padding token is often the end token. The
first token of a row never counts, since nothing comes before it to predict it from.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_trainer.errors import InvalidDataset
from finetune_trainer.rows import ChatRow, InstructionRow, Place, Row, TextRow

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

PLAIN_PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"
PLAIN_PROMPT_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
SENTINEL = "\ue000{index}\ue001"
"""Stands for a message's content while its place in the template is looked for: characters of private use."""
LAYOUTS_REMEMBERED = 4096


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


@dataclass(frozen=True)
class Tokens:
    """A row as the trainer reads it."""

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    splits: bool


class Renderer:
    """Renders and tokenizes rows with one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:  # noqa: ANN401 - any of transformers' fast tokenizers
        """`tokenizer` must be fast and have an end token."""
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._eos: int = tokenizer.eos_token_id
        self._bos: int | None = tokenizer.bos_token_id
        special = {str(token) for token in tokenizer.all_special_tokens}
        special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = tuple(sorted(special - {""}, key=len, reverse=True))
        self._layout = lru_cache(LAYOUTS_REMEMBERED)(self._template_layout)

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer brings a chat template."""
        return bool(self._tokenizer.chat_template)

    def render(self, row: Row, place: Place) -> Rendered | None:
        """The row as text; None if there is nothing in it to learn. InvalidDataset where the template refuses it."""
        match row:
            case TextRow():
                if not row.text.strip():
                    return None
                return Rendered(row.text, ((0, len(row.text)),), bare=False, closes=True, splits=True)
            case InstructionRow():
                return self._render_instruction(row, place)
            case ChatRow():
                return self._render_chat(row.messages, place)

    def _render_instruction(self, row: InstructionRow, place: Place) -> Rendered | None:
        if not row.output.strip():
            return None
        if self.has_template:
            question = row.instruction + (f"\n\n{row.input}" if row.input else "")
            return self._render_chat(
                ({"role": "user", "content": question}, {"role": "assistant", "content": row.output}), place
            )
        template = PLAIN_PROMPT_WITH_INPUT if row.input else PLAIN_PROMPT
        prompt = template.format(instruction=row.instruction, input=row.input)
        text = prompt + row.output
        return Rendered(text, ((len(prompt), len(text)),), bare=False, closes=True)

    def _render_chat(self, messages: tuple[dict[str, str], ...], place: Place) -> Rendered | None:
        if not self.has_template:
            place.refuse(
                "the row is Chat, but the model's tokenizer has no chat template",
                "Use an instruct model, or rows of the Instruction or Text format.",
            )
        messages = _until_last_answer(messages)
        if not messages:
            return None
        text = self._apply_template(messages, place)
        spans = self._answer_spans(messages, text, place)
        if not spans:
            return None
        # A template that ends answers with no token of its own leaves that to the end token.
        text = text[: spans[-1][1]]
        return Rendered(text, tuple(spans), bare=True, closes=not text.endswith(self._special))

    def _apply_template(self, messages: Sequence[dict[str, str]], place: Place) -> str:
        from jinja2 import TemplateError  # noqa: PLC0415 - comes with transformers

        try:
            return str(self._tokenizer.apply_chat_template(list(messages), tokenize=False))
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            roles = ", ".join(message["role"] for message in messages)[:100]
            problem = f"the model's chat template refuses the row (roles {roles}): {error}"
            return place.refuse(problem, "Order the messages as the template asks, or leave the row out.", error)

    def _answer_spans(self, messages: tuple[dict[str, str], ...], text: str, place: Place) -> list[tuple[int, int]]:
        """Where in the text the assistant's turns are, each from its content to the token that ends it.

        The template is rendered once more with sentinels for contents: what it writes around them is then known.
        Templates that do otherwise for other contents are followed turn by turn.
        """
        pieces = self._layout(tuple(message["role"] for message in messages), place.dataset)
        for clean in (str, str.strip):
            contents = [clean(message["content"]) for message in messages]
            if pieces is not None and text == _joined(pieces, contents):
                return self._spans_between(messages, pieces, contents)
        return self._spans_turn_by_turn(messages, text, place)

    def _template_layout(self, roles: tuple[str, ...], dataset: str) -> tuple[str, ...] | None:
        """What the template writes before, between and after the contents of messages with these roles."""
        stands = [SENTINEL.format(index=index) for index in range(len(roles))]
        messages = [{"role": role, "content": stand} for role, stand in zip(roles, stands, strict=True)]
        try:
            rest = self._apply_template(messages, Place(dataset, "template", 0))
        except InvalidDataset:
            return None
        pieces = []
        for stand in stands:
            before, found, rest = rest.partition(stand)
            if not found:
                return None
            pieces.append(before)
        return (*pieces, rest)

    def _spans_between(
        self, messages: Sequence[dict[str, str]], pieces: tuple[str, ...], contents: list[str]
    ) -> list[tuple[int, int]]:
        spans, position = [], 0
        for message, before, content, after in zip(messages, pieces, contents, pieces[1:], strict=False):
            start = position + len(before)
            position = start + len(content)
            if message["role"] == "assistant" and content.strip():
                spans.append((start, position + self._length_of_end(after)))
        return spans

    def _length_of_end(self, after: str) -> int:
        """Characters up to the end of the first special token, if nothing but space comes before it."""
        stripped = after.lstrip()
        end = next((token for token in self._special if stripped.startswith(token)), None)
        if end is None:
            return 0
        length = len(after) - len(stripped) + len(end)
        eos = str(self._tokenizer.eos_token)
        return length + len(eos) if end != eos and after.startswith(eos, length) else length

    def _spans_turn_by_turn(self, messages: Sequence[dict[str, str]], text: str, place: Place) -> list[tuple[int, int]]:
        spans: list[tuple[int, int]] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            content = message["content"].strip()
            before = self._apply_template(messages[:index], place) if index else ""
            shared = len(before) if text.startswith(before) else (spans[-1][1] if spans else 0)
            start = text.find(content, shared) if content else -1
            if start < 0:
                continue  # the template leaves this answer out, or rewrites it: nothing to learn word by word
            end = start + len(content)
            spans.append((start, end + self._length_of_end(text[end:])))
        return spans

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
        if self._bos is not None and len(ids) > 1 and ids[0] == ids[1] == self._bos:
            ids, mask = ids[1:], mask[1:]
        if row.closes:
            ids, mask = self._closed(ids, mask)
        if len(mask):
            mask[0] = False
        return Tokens(ids, mask, row.splits)

    def _closed(self, ids: NDArray[np.int32], mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """One end token at the end, which counts, however many there were."""
        length = len(ids)
        while length and ids[length - 1] == self._eos:
            length -= 1
        return np.append(ids[:length], np.int32(self._eos)), np.append(mask[:length], True)


def _until_last_answer(messages: tuple[dict[str, str], ...]) -> tuple[dict[str, str], ...]:
    """A conversation up to its last answer: what comes after is never learned."""
    last = max((index for index, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    return messages[: last + 1]


def _joined(pieces: Sequence[str], contents: Sequence[str]) -> str:
    return "".join(piece + content for piece, content in zip(pieces, contents, strict=False)) + pieces[-1]
