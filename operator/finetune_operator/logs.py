"""Logs for machines (one JSON object a line) or for people, each line with the job it is about."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime

from finetune_operator.queue import Key

_current: ContextVar[str] = ContextVar("finetunejob", default="")


@contextlib.contextmanager
def key_in_logs(key: Key) -> Iterator[None]:
    """Everything logged inside is about this job."""
    token = _current.set(str(key))
    try:
        yield
    finally:
        _current.reset(token)


FIELDS = ("phase", "stage", "attempt", "reason", "retry")
"""What a line may say of its job besides, to be searched by."""


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, finetunejob, those of `FIELDS` that there are, message."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "finetunejob": _current.get() or None,
            **{name: getattr(record, name, None) for name in FIELDS},
            "message": record.getMessage(),
            "exception": self.formatException(record.exc_info) if record.exc_info else None,
        }
        return json.dumps({name: value for name, value in line.items() if value is not None})


class TextFormatter(logging.Formatter):
    """time level job: message."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        key = _current.get()
        return super().format(record) if not key else super().format(record).replace(" | ", f" | {key}: ", 1)


def configure(level: str, style: str) -> None:
    """Log to standard error. kopf's own chatter is shown from WARNING on."""
    handler = logging.StreamHandler(sys.stderr)
    text = TextFormatter("%(asctime)s %(levelname)s | %(message)s")
    handler.setFormatter(JsonFormatter() if style == "json" else text)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    if level != "DEBUG":
        for name in ("kopf", "asyncio", "aiohttp"):
            logging.getLogger(name).setLevel(logging.WARNING)
