"""The config file, read and checked: what is wrong is told in sentences, not as a dump."""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError
from pydantic.alias_generators import to_camel

from finetune_trainer.config import JobConfig
from finetune_trainer.runtime.errors import InvalidConfig, NotFound

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pydantic_core import ErrorDetails

ERRORS_SHOWN = 5


def load_config(path: Path) -> JobConfig:
    """The config in a JSON file. NotFound or InvalidConfig, naming the field and the remedy."""
    try:
        text = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        msg = f"--config {path} is not a file. Give the job's JSON file."
        raise NotFound(msg) from None
    try:
        value = json.loads(text, object_pairs_hook=_unrepeated)
    except (ValueError, RecursionError) as error:
        msg = f"{path} is not JSON: {error}. Correct it there."
        raise InvalidConfig(msg) from error
    return parse_config(value)


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. InvalidConfig where a field stands twice: of the two, parsers keep the last without a word."""
    made, names = dict(pairs), [name for name, _ in pairs]
    if len(made) < len(names):
        twice = next(name for name in made if names.count(name) > 1)
        msg = f"The config names '{twice}' twice in one object. Leave one of the two out."
        raise InvalidConfig(msg)
    return made


def parse_config(value: object) -> JobConfig:
    """The config from a JSON value. InvalidConfig with a sentence for each of the first few mistakes."""
    try:
        return JobConfig.model_validate(value)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        sentences = list(dict.fromkeys(_sentence(problem) for problem in problems if not _follows(problem, problems)))
        more = len(sentences) - ERRORS_SHOWN
        tail = [f"And {more} more."] if more > 0 else []
        raise InvalidConfig(" ".join(sentences[:ERRORS_SHOWN] + tail)) from None


def _follows(problem: ErrorDetails, problems: Sequence[ErrorDetails]) -> bool:
    """Whether a list is told to be too short only because its items are refused."""
    at = problem["loc"]
    inside = (each["loc"] for each in problems if len(each["loc"]) > len(at))
    return problem["type"] == "too_short" and any(loc[: len(at)] == at for loc in inside)


def _sentence(problem: ErrorDetails) -> str:
    where, text = _path(problem["loc"]), problem["msg"].removeprefix("Value error, ")
    given = _shown(problem["input"])
    match problem["type"]:
        case "extra_forbidden":
            return _unknown_field(problem["loc"], where)
        case "missing":
            return f"{where} is needed and not set."
        case "value_error":
            return text + "."
        case "model_type" | "dict_type" if not where:
            return f"The config must be a JSON object with model, datasets, ...; it is {given[:60]}."
        case _:
            return f"{where} cannot be {given[:80]}: {text[0].lower() + text[1:]}."


def _shown(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """As it was given; of an address not what stands before the host, which may be a password."""
    if isinstance(value, str):
        value = re.sub(r".*@", "...@", value, flags=re.DOTALL)
    return json.dumps(value, default=str, ensure_ascii=False)


def _unknown_field(loc: Sequence[str | int], where: str) -> str:
    known = _fields_at(loc[:-1])
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    remedy = f"Did you mean {close[0]}?" if close else f"Fields there: {', '.join(known)}."
    return f"{where} is no field. {remedy}"


def _path(loc: Sequence[str | int]) -> str:
    """`datasets[0].volume.claimName`."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def _fields_at(loc: Sequence[str | int]) -> list[str]:
    """The public names of the fields of the record at a place in the config."""
    record: type[BaseModel] = JobConfig
    for part in loc:
        if isinstance(part, int):
            continue
        field = next((field for name, field in record.model_fields.items() if to_camel(name) == part), None)
        inner = field and _record_in(field.annotation)
        if inner is None:
            return []
        record = inner
    return [to_camel(name) for name in record.model_fields]


def _record_in(annotation: Any) -> type[BaseModel] | None:  # noqa: ANN401 - any type expression
    """The record type inside an optional, a tuple or both."""
    if (
        isinstance(annotation, type)
        and not isinstance(annotation, types.GenericAlias)
        and issubclass(annotation, BaseModel)
    ):
        return annotation
    found = (_record_in(argument) for argument in typing.get_args(annotation) if argument is not Ellipsis)
    return next((each for each in found if each is not None), None)
