"""How a stage ends: the last word for the operator, a sentence for people."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from finetune_trainer.progress import (
    LAST_WORD_LIMIT_BYTES,
    MESSAGE_LIMIT_CHARACTERS,
    DataFacts,
    LastWord,
    Reason,
    TrainFacts,
)

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)

SHORT_MESSAGE_CHARACTERS = 300
DROPPED_IN_ORDER = ("progress", "training", "estimate", "resolved", "data", "artifact")
"""What gives way, first to last, when a last word is too long; all but the progress stands in the manifest as well."""


def write_last_word(word: LastWord, path: Path | None) -> None:
    """Write the last word, at most 4096 bytes of JSON. A file that cannot be written is told in the log only."""
    if path is None:
        return
    try:
        path.write_bytes(fitted(word))
    except OSError as error:
        log.warning("cannot write the last word to %s: %s", path, error)


def fitted(word: LastWord) -> bytes:
    """The last word as JSON within its limit: whole, or with a shorter message, or without some of its facts."""
    for candidate in _smaller_and_smaller(word):
        if len(data := candidate.to_json().encode()) <= LAST_WORD_LIMIT_BYTES:
            return data
    msg = "a last word without facts is larger than its limit"
    raise AssertionError(msg)


def _smaller_and_smaller(word: LastWord) -> list[LastWord]:
    candidates = [word, word.model_copy(update=_without_lists(word))]
    candidates.append(candidates[-1].model_copy(update={"message": shortened(word.message, SHORT_MESSAGE_CHARACTERS)}))
    for name in DROPPED_IN_ORDER:
        candidates.append(candidates[-1].model_copy(update={name: None}))
    return candidates


def _without_lists(word: LastWord) -> dict[str, TrainFacts | DataFacts]:
    """The facts without what is listed layer by layer and dataset by dataset."""
    smaller: dict[str, TrainFacts | DataFacts] = {}
    if word.training is not None:
        smaller["training"] = word.training.model_copy(update={"layers": ()})
    if word.data is not None:
        smaller["data"] = word.data.model_copy(update={"datasets": ()})
    return smaller


def shortened(message: str, limit: int = MESSAGE_LIMIT_CHARACTERS) -> str:
    """The message, or its beginning and its end: both carry the sense, what and the way out.

    Halves of surrogate pairs, which JSON can quote and UTF-8 cannot write, stand escaped.
    """
    message = message.encode(errors="backslashreplace").decode()
    if len(message) <= limit:
        return message
    end = limit // 3
    return message[: limit - end - 3] + "..." + message[-end:]


def say(message: str, reason: Reason) -> None:
    """One line for people on stderr."""
    prefix = "" if reason is Reason.COMPLETED else f"{reason}: "
    print(f"{prefix}{message}", file=sys.stderr, flush=True)  # noqa: T201 - the command's outcome
