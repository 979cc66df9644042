"""Prompts and responses from a row's fields, by Jinja in its sandbox: bounded in time, memory, loops and length.

A template comes from the user or from a model's repository. In the sandbox it reaches nothing of the process
(`ImmutableSandboxedEnvironment`; there is no loader, so nothing can be included); what is left is to keep it from
running for ever, and from filling the memory (`'%999999999d' % 1`).
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
from contextlib import contextmanager
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune_trainer.runtime.errors import InvalidConfig
from finetune_trainer.runtime.wording import first_line, first_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from jinja2 import Template

    from finetune_trainer.data.files import Place

RENDER_SECONDS = 2.0
"""CPU time that a row's rendering may take; a usual one takes a tenth of a millisecond."""
RENDER_BYTES = 512 << 20
"""Memory that it may take besides what the process has."""
RENDER_CHARACTERS = 10_000_000
RANGE_LIMIT = 10_000
RENDER_ERRORS = (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError)
"""What templates raise besides their own errors: they call Python's functions on whatever a row holds."""


class OutOfBoundsError(TemplateError):
    """A template does not come to an end, or takes the memory of others."""


@contextmanager
def bounded() -> Iterator[None]:
    """OutOfBoundsError once the body has used too much CPU time or memory."""
    with _bounded_time(), _bounded_memory():
        yield


@contextmanager
def _bounded_memory(size: int = RENDER_BYTES) -> Iterator[None]:
    """By the limit of a process's own memory, which Linux alone counts and shows: elsewhere there is none."""
    if sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([_data_bytes(os.getpid()) + size, *limits]), hard))
    try:
        yield
    except MemoryError as error:
        msg = f"it takes more than {size >> 20} MiB of memory"
        raise OutOfBoundsError(msg) from error
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _data_bytes(process: int) -> int:
    """What RLIMIT_DATA counts of this process, the stack besides."""
    return int(os.pread(_statm(process), 256, 0).split()[5]) * resource.getpagesize()


@cache
def _statm(process: int) -> int:
    """Kept open: to open it for each row would take a fifth of a rendering's time."""
    return os.open(f"/proc/{process}/statm", os.O_RDONLY | os.O_CLOEXEC)


@contextmanager
def _bounded_time(seconds: float = RENDER_SECONDS) -> Iterator[None]:
    """Works in the main thread, where prepare renders."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        msg = f"it runs for more than {seconds:g} s"
        raise OutOfBoundsError(msg)

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, whose products and powers are small numbers' alone."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            undefined=StrictUndefined,
            autoescape=False,
        )
        self.globals["range"] = _range
        self.filters["tojson"] = _tojson

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401 - Jinja's signature
        """TypeError for text that is multiplied, and for powers."""
        if operator == "**" or not all(isinstance(side, (int, float)) for side in (left, right)):
            msg = f"'{operator}' is for numbers alone in a template, and '**' is not there"
            raise TypeError(msg)
        return super().call_binop(context, operator, left, right)


def _range(*bounds: int) -> range:
    numbers = range(*bounds)
    if len(numbers) > RANGE_LIMIT:
        msg = f"range() is too long: {len(numbers):,} numbers, at most {RANGE_LIMIT:,}"
        raise ValueError(msg)
    return numbers


def _tojson(value: Any, indent: int | None = None) -> str:  # noqa: ANN401 - any JSON value
    return json.dumps(value, ensure_ascii=False, indent=indent)


class RowTemplate:
    """A template of a dataset: `promptTemplate` or `responseTemplate`."""

    def __init__(self, source: str, field: str, dataset: str) -> None:
        """InvalidConfig where it is no template."""
        self._source, self._field = source, field
        try:
            Sandbox().parse(source)
        except TemplateSyntaxError as error:
            msg = f"dataset '{dataset}': {field}, line {error.lineno}: {error.message}. Correct the template."
            raise InvalidConfig(msg) from error

    @cached_property
    def _template(self) -> Template:
        return Sandbox().from_string(self._source)

    def render(self, record: Mapping[str, Any], place: Place) -> str:
        """The text of a row. InvalidDataset names the place, the template and the field that is missing."""
        try:
            with bounded():
                return self._joined(record)
        except UndefinedError as error:
            names = first_of(f"'{name}'" for name in record)
            remedy = "Correct the template, or write {% if name is defined %} around what rows may lack."
            place.refuse(f"{self._field}: {error.message} (the row has {names})", remedy, error)
        except (*RENDER_ERRORS, RecursionError) as error:
            place.refuse(f"{self._field} cannot be rendered: {first_line(error)}", "Correct it.", error)

    def _joined(self, record: Mapping[str, Any]) -> str:
        pieces, length = [], 0
        for piece in self._template.generate(**_as_variables(record)):
            pieces.append(piece)
            length += len(piece)
            if length > RENDER_CHARACTERS:
                msg = f"it writes more than {RENDER_CHARACTERS:,} characters"
                raise ValueError(msg)
        return "".join(pieces)


def _as_variables(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields by name, and all of them as `row`, for names that are no words of Jinja."""
    return {"row": dict(record), **{str(name): value for name, value in record.items()}}
