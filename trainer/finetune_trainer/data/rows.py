"""Datasets read row by row: every mistake is told with dataset, file, line, field and remedy.

Each format reads its own fields, under their usual names or those of `columns`:

    Text              text
    Instruction       instruction, input (or context), output (or response), system
    PromptCompletion  prompt, completion: both texts, taken word by word, or both lists of messages
    Chat              messages (or conversations), tools, system; role and content, or from and value (ShareGPT)
    QuestionAnswer    question, context, answer, system
    Preference        prompt, chosen, rejected: texts, taken word by word, or lists of messages; without a prompt what
                      both answers begin with is the prompt

With a `promptTemplate` a row is what its templates write.
"""

from __future__ import annotations

import json
import os.path
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from finetune_trainer.config import Columns, Dataset, DatasetFormat
from finetune_trainer.data.files import Place, Record, find_files, kind_of, read_records
from finetune_trainer.data.templates import RowTemplate
from finetune_trainer.runtime.errors import InvalidConfig, InvalidDataset
from finetune_trainer.runtime.wording import first_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "output": ("output", "response"),
    "prompt": ("prompt",),
    "completion": ("completion",),
    "question": ("question",),
    "answer": ("answer",),
    "context": ("context",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "messages": ("messages", "conversations"),
    "role": ("role", "from"),
    "content": ("content", "value"),
    "tools": ("tools",),
    "system": ("system",),
}
LIKELY_NAMES = {
    "output": ("answer", "completion", "text"),
    "instruction": ("prompt", "question", "text"),
    "completion": ("response", "output", "answer"),
    "prompt": ("instruction", "question"),
    "answer": ("response", "output", "answers"),
    "question": ("instruction", "prompt"),
    "messages": ("conversation", "dialog", "chat"),
}
"""Names that a field which is missing may have instead, for the remedy."""
ANSWERS = {
    DatasetFormat.INSTRUCTION: "output",
    DatasetFormat.PROMPT_COMPLETION: "completion",
    DatasetFormat.QUESTION_ANSWER: "answer",
}
"""The field that a template's response is, unless it has a template of its own."""
SIGNS: tuple[tuple[DatasetFormat, tuple[str, ...]], ...] = (
    (DatasetFormat.CHAT, ("messages",)),
    (DatasetFormat.PREFERENCE, ("chosen", "rejected")),
    (DatasetFormat.PROMPT_COMPLETION, ("prompt", "completion")),
    (DatasetFormat.QUESTION_ANSWER, ("question", "answer")),
    (DatasetFormat.INSTRUCTION, ("instruction",)),
    (DatasetFormat.INSTRUCTION, ("output",)),
    (DatasetFormat.TEXT, ("text",)),
)
"""What a format is known by, in the order in which it is looked for."""

Message = dict[str, Any]


@dataclass(frozen=True)
class TextRow:
    """A whole text, all of it to learn."""

    text: str
    rendered: bool = False
    """A template was rendered into it: control tokens that it spells are such."""


@dataclass(frozen=True)
class InstructionRow:
    """What is asked, and the answer to learn."""

    instruction: str
    input: str
    output: str
    system: str = ""


@dataclass(frozen=True)
class QuestionRow:
    """A question, maybe about a text, and the answer to learn."""

    question: str
    context: str
    answer: str
    system: str = ""


@dataclass(frozen=True)
class PromptRow:
    """A prompt and the answer to learn, word by word."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class TemplateRow:
    """Fields that templates make a prompt and an answer of, word by word."""

    record: Record
    prompt: RowTemplate
    response: RowTemplate | str
    """A template, or the answer itself."""
    place: Place


@dataclass(frozen=True)
class ChatRow:
    """A conversation whose assistant turns are to learn."""

    messages: tuple[Message, ...]
    """`role`, `content` and what else a template knows: tool_calls, name, tool_call_id, reasoning_content."""
    tools: tuple[dict[str, Any], ...] = ()
    given: int = 0
    """So many messages at the beginning are the prompt, and never learned."""


@dataclass(frozen=True)
class PreferenceRow:
    """Two answers to one prompt."""

    chosen: PromptRow | TemplateRow | ChatRow
    rejected: PromptRow | TemplateRow | ChatRow


SingleRow = TextRow | InstructionRow | QuestionRow | PromptRow | TemplateRow | ChatRow
Row = SingleRow | PreferenceRow


class DatasetReader:
    """One dataset of a job: its files, its format, its rows."""

    def __init__(self, dataset: Dataset, name: str, path: Path) -> None:
        """Find the files below `path`. InvalidDataset; InvalidConfig where a template is none."""
        self.name, self.dataset = name, dataset
        self.files = find_files(path, name)
        self.size_bytes = sum(file.stat().st_size for file in self.files)
        self._format = dataset.format or DatasetFormat.AUTO
        self._columns = dataset.columns or Columns()
        sources = {"promptTemplate": dataset.prompt_template, "responseTemplate": dataset.response_template}
        self._templates = {
            field: RowTemplate(source, field, name) for field, source in sources.items() if source is not None
        }

    def __iter__(self) -> Iterator[tuple[Place, Row, int]]:
        """Each row with its place and the bytes that it took. InvalidDataset at the first mistake."""
        parse: Callable[[Fields], Row] | None = None
        for place, record, size in self.records():
            fields = Fields(record, self._columns, place)
            if parse is None:
                parse = self._parser(fields)
            yield place, parse(fields), size
        if parse is None:
            names = ", ".join(path.name for path in self.files)
            msg = f"dataset '{self.name}' has no rows ({names} is empty). Give files with rows in them."
            raise InvalidDataset(msg)

    def records(self) -> Iterator[tuple[Place, Record, int]]:
        """Each row as its file has it."""
        for path in self.files:
            yield from read_records(path, self.name)

    def _parser(self, first: Fields) -> Callable[[Fields], Row]:
        """How rows are read: fixed by the first one."""
        known = (
            self._format if self._format is not DatasetFormat.AUTO else _guess(first, templated=bool(self._templates))
        )
        if self._templates:
            return self._template_parser(known)
        if self.dataset.special_tokens is not None and known is not DatasetFormat.TEXT:
            msg = f"dataset '{self.name}': specialTokens is for format Text, the rows are {known}. Drop it."
            raise InvalidConfig(msg)
        if known is None or known is DatasetFormat.TEXT:
            return lambda fields: TextRow(fields.text("text"), rendered=bool(self.dataset.special_tokens))
        return PARSERS[known]

    def _template_parser(self, known: DatasetFormat | None) -> Callable[[Fields], Row]:
        prompt, response = self._templates["promptTemplate"], self._templates.get("responseTemplate")
        if known is DatasetFormat.PREFERENCE:
            if response is not None:
                msg = f"dataset '{self.name}': responseTemplate is not for Preference, whose answers are chosen and "
                raise InvalidConfig(msg + "rejected. Leave it out.")
            return lambda fields: _preference_by_template(fields, prompt)
        if response is not None:
            return lambda fields: TemplateRow(fields.whole_record(), prompt, response, fields.place)
        if known is None or known not in ANSWERS:
            msg = (
                f"dataset '{self.name}': promptTemplate needs a responseTemplate: {known or 'a row of this kind'} has "
            )
            raise InvalidConfig(msg + "no field that is the answer.")
        answer = ANSWERS[known]
        return lambda fields: TemplateRow(fields.whole_record(), prompt, fields.text(answer), fields.place)


@dataclass(frozen=True)
class Fields:
    """A row's fields under the names that formats know them by."""

    record: Record
    columns: Columns
    place: Place

    def name(self, key: str) -> str | None:
        """The field that is meant by a key of `columns`: the one set there, or the first usual one that is there."""
        asked: str | None = getattr(self.columns, key)
        return asked or next((name for name in USUAL_NAMES[key] if name in self.record), None)

    def has(self, key: str) -> bool:
        """Whether the row has such a field."""
        return self.name(key) in self.record

    def value(self, key: str) -> Any:  # noqa: ANN401 - any JSON value
        """The value of a field that must be there."""
        name = self.name(key) or USUAL_NAMES[key][0]
        if name not in self.record:
            self._refuse_missing(name, key)
        return self.record[name]

    def text(self, key: str) -> str:
        """A field that must be there and be text."""
        value, name = self.value(key), self.name(key)
        if not isinstance(value, str):
            remedy = "Write it as text, or leave the row out."
            return self.place.refuse(f"field '{name}' is a {kind_of(value)}, not text", remedy)
        return self.whole(value, f"field '{name}'")

    def text_if_there(self, key: str) -> str:
        """A field that may be missing or null: then it is empty."""
        name = self.name(key)
        return "" if name is None or self.record.get(name) is None else self.text(key)

    def whole_record(self) -> Record:
        """The record, all of whose texts are whole."""
        for name, value in self.record.items():
            if isinstance(value, str):
                self.whole(value, f"field '{name}'")
        return self.record

    def whole(self, text: str, where: str) -> str:
        """JSON can hold half of a surrogate pair, which is no character and cannot be tokenized."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            remedy = "Escape the whole character, or leave it out."
            return self.place.refuse(
                f"{where} holds half a surrogate pair at character {error.start + 1}", remedy, error
            )
        return text

    def _refuse_missing(self, name: str, key: str) -> NoReturn:
        names = (key, *USUAL_NAMES[key], *LIKELY_NAMES.get(key, ()))
        likely = next((each for each in names if each in self.record), None)
        remedy = f"Set columns: {{{key}: {likely or 'NAME'}}}" + ("." if likely else " with the field's real name.")
        self.place.refuse(f"no field '{name}' ({_listed(self.record)})", remedy)


def _guess(first: Fields, *, templated: bool) -> DatasetFormat | None:
    """The format that the first row's fields speak for; with templates there need be none."""
    found = next((known for known, keys in SIGNS if all(first.has(key) for key in keys)), None)
    if templated and (found is DatasetFormat.INSTRUCTION or found is None):
        return next((known for known, key in ANSWERS.items() if first.has(key)), None)
    if found is None and not templated:
        remedy = (
            "Set format and columns, e.g. format: Instruction, columns: {instruction: ask, output: tell}; known by "
            "themselves are text; instruction and output; prompt and completion; question and answer; messages; chosen "
            "and rejected."
        )
        first.place.refuse(f"the format cannot be told from the fields ({_listed(first.record)})", remedy)
    return found


def _instruction(fields: Fields) -> InstructionRow:
    return InstructionRow(
        instruction=fields.text("instruction"),
        input=fields.text_if_there("input"),
        output=fields.text("output"),
        system=fields.text_if_there("system"),
    )


def _question_answer(fields: Fields) -> QuestionRow:
    return QuestionRow(
        question=fields.text("question"),
        context=fields.text_if_there("context"),
        answer=fields.text("answer"),
        system=fields.text_if_there("system"),
    )


def _prompt_completion(fields: Fields) -> PromptRow | ChatRow:
    if not _is_messages(fields.value("prompt")):
        return PromptRow(fields.text("prompt"), fields.text("completion"))
    prompt = _messages(fields, "prompt")
    answer = _answer_messages(fields, "completion")
    return ChatRow((*prompt, *answer), _tools(fields), given=len(prompt))


def _chat(fields: Fields) -> ChatRow:
    messages, system = _messages(fields, "messages"), fields.text_if_there("system")
    if system and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": system}, *messages)
    return ChatRow(messages, _tools(fields))


def _preference_by_template(fields: Fields, prompt: RowTemplate) -> PreferenceRow:
    record = fields.whole_record()
    chosen, rejected = (TemplateRow(record, prompt, fields.text(key), fields.place) for key in ("chosen", "rejected"))
    return PreferenceRow(chosen, rejected)


def _preference(fields: Fields) -> PreferenceRow:
    if any(_is_messages(fields.value(key)) for key in ("chosen", "rejected")) or (
        fields.has("prompt") and _is_messages(fields.value("prompt"))
    ):
        return _preference_of_messages(fields)
    chosen, rejected = fields.text("chosen"), fields.text("rejected")
    if fields.has("prompt"):
        prompt = fields.text("prompt")
    else:
        shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 - characters are meant
        prompt = shared[: max(shared.rfind(" "), shared.rfind("\n")) + 1].rstrip(" ")
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return PreferenceRow(PromptRow(prompt, chosen), PromptRow(prompt, rejected))


def _preference_of_messages(fields: Fields) -> PreferenceRow:
    prompt: tuple[Message, ...] = ()
    chosen, rejected = _answer_messages(fields, "chosen"), _answer_messages(fields, "rejected")
    if fields.has("prompt"):
        value = fields.value("prompt")
        prompt = _messages(fields, "prompt") if _is_messages(value) else (_user(fields.text("prompt")),)
    if len(chosen) > 1 and len(rejected) > 1 and chosen[0] == rejected[0]:  # whole conversations, prompt and all
        shared = next(
            (n for n, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other),
            min(len(chosen), len(rejected)) - 1,
        )
        system = prompt[:1] if prompt and prompt[0]["role"] == "system" and chosen[0]["role"] != "system" else ()
        prompt, chosen, rejected = (*system, *chosen[:shared]), chosen[shared:], rejected[shared:]
    if not prompt:
        remedy = "Give the prompt in a field of its own, or both answers with the messages before them."
        fields.place.refuse("chosen and rejected share no message, so there is no prompt", remedy)
    tools = _tools(fields)
    pair = (ChatRow((*prompt, *answer), tools, given=len(prompt)) for answer in (chosen, rejected))
    return PreferenceRow(*pair)


PARSERS: dict[DatasetFormat, Callable[[Fields], Row]] = {
    DatasetFormat.INSTRUCTION: _instruction,
    DatasetFormat.PROMPT_COMPLETION: _prompt_completion,
    DatasetFormat.CHAT: _chat,
    DatasetFormat.QUESTION_ANSWER: _question_answer,
    DatasetFormat.PREFERENCE: _preference,
}


# Messages


_MESSAGES_REMEDY = 'Write it as [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'
_ROLES_REMEDY = f"Roles are {', '.join(ROLES)}; or human and gpt, as in ShareGPT."


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _is_messages(value: object) -> bool:
    """Whether a value is, or is the JSON of, a list."""
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip()[:2].replace(" ", "") in {"[{", "["})


def _parsed(value: object) -> object:
    """Lists and objects that stand as JSON in a text, as in a csv file; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _answer_messages(fields: Fields, key: str) -> tuple[Message, ...]:
    """An answer as messages; a text is the assistant's."""
    if _is_messages(fields.value(key)):
        return _messages(fields, key)
    return ({"role": "assistant", "content": fields.text(key)},)


def _messages(fields: Fields, key: str) -> tuple[Message, ...]:
    value, name = _parsed(fields.value(key)), fields.name(key)
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else f"a {kind_of(value)}"
        fields.place.refuse(f"field '{name}' is {what}, not a list of messages", _MESSAGES_REMEDY)
    return tuple(_message(message, f"{name}[{index}]", fields) for index, message in enumerate(value))


def _message(message: object, where: str, fields: Fields) -> Message:
    if not isinstance(message, dict):
        return fields.place.refuse(f"{where} is a {kind_of(message)}, not an object", _MESSAGES_REMEDY)
    inside = Fields({name: value for name, value in message.items() if value is not None}, fields.columns, fields.place)
    found: Message = {"role": _role(inside, where), "content": _content(inside, where)}
    for name in ("name", "tool_call_id", "reasoning_content", "thinking"):
        if isinstance(inside.record.get(name), str):
            found[name] = inside.whole(inside.record[name], f"{where}.{name}")
    if calls := inside.record.get("tool_calls"):
        found["tool_calls"] = _tool_calls(calls, where, fields.place)
    return found


def _role(message: Fields, where: str) -> str:
    if not message.has("role"):
        return message.place.refuse(f"{where} has no role ({_listed(message.record)})", _MESSAGES_REMEDY)
    role = message.value("role")
    known = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else None
    if known not in ROLES:
        return message.place.refuse(f"{where} has the role {json.dumps(role, default=str)[:40]}", _ROLES_REMEDY)
    return str(known)


def _content(message: Fields, where: str) -> str:
    remedy = "content must be text; leave the message out if there is none."
    if not message.has("content"):
        if message.record.get("tool_calls"):
            return ""
        return message.place.refuse(f"{where} has no content", remedy)
    content = message.value("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text") or "") for part in content)
    if not isinstance(content, str):
        return message.place.refuse(f"{where} has content that is a {kind_of(content)}", remedy)
    return message.whole(content, f"{where}.content")


def _tool_calls(calls: object, where: str, place: Place) -> list[dict[str, Any]]:
    """Calls in OpenAI's form; arguments that are JSON in a text become what they say, as templates want them."""
    remedy = 'Write them as [{"type": "function", "function": {"name": "...", "arguments": {...}}}].'
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        return place.refuse(f"{where}.tool_calls is no list of objects", remedy)
    found = []
    for call in calls:
        inner = call.get("function", call)
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            place.refuse(f"{where}.tool_calls has a call without a name", remedy)
        arguments = _parsed(inner.get("arguments", {}))
        if not isinstance(arguments, dict):
            place.refuse(f"{where}.tool_calls: arguments of '{inner['name']}' are no JSON object", remedy)
        function = {"name": inner["name"], "arguments": arguments}
        found.append({"type": "function", "function": function, **({"id": call["id"]} if call.get("id") else {})})
    return found


def _tools(fields: Fields) -> tuple[dict[str, Any], ...]:
    if not fields.has("tools") or not fields.value("tools"):
        return ()
    tools = _parsed(fields.value("tools"))
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        remedy = 'Write them as [{"type": "function", "function": {"name": "...", "parameters": {...}}}].'
        return fields.place.refuse(f"field '{fields.name('tools')}' is no list of tools", remedy)
    return tuple(tools)


def _listed(row: Sequence[Any] | dict[Any, Any]) -> str:
    return "has " + (first_of(f"'{str(name)[:40]}'" for name in row) or "none")
