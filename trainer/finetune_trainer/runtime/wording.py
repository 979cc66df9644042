"""What is put into sentences: lists of names, of long ones the begin; what an error, or the end of a process, says."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

NAMES_SHOWN = 12


def first_of(names: Iterable[str], at_most: int = NAMES_SHOWN) -> str:
    """`a, b, c`; of more names than `at_most` the first ones, then an ellipsis. Empty where there is none."""
    there = list(names)
    return ", ".join(there[:at_most]) + (", ..." if len(there) > at_most else "")


def what_is_there(names: Collection[str]) -> str:
    """`has a, b, c` in alphabetical order, or `it is empty`."""
    return f"has {first_of(sorted(names))}" if names else "it is empty"


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def end_of_process(code: int) -> str:
    """How a process ended that said nothing itself, by its exit code: negative is the signal that killed it."""
    if code >= 0:
        return f"ended with exit code {code} and without a word"
    memory = ", as the kernel does with a process when memory runs out" if -code == signal.SIGKILL else ""
    return f"was killed ({signal.Signals(-code).name}){memory}"
