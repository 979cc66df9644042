"""What the process itself does: ask for help, begin anew."""

from __future__ import annotations

import subprocess
import sys

HEAD = """
import asyncio, os
from finetune_operator.__main__ import start_anew
stop = asyncio.Event()
"""
ONCE_MORE = """
print(os.getpid(), flush=True)
if "BEFORE" not in os.environ:
    os.environ["BEFORE"] = "yes"
    start_anew(stop)
"""
TOLD_TO_STOP = """
stop.set()
start_anew(stop)
"""


def run(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def test_help_lists_the_settings() -> None:
    assert "FINETUNE_TRAINER_IMAGE (required)" in run("-m", "finetune_operator", "--help")


def test_a_process_that_begins_anew_is_the_same_command_under_the_same_number() -> None:
    first, second = run("-c", HEAD + ONCE_MORE).split()
    assert first == second


def test_a_process_that_was_told_to_stop_does_not_begin_anew() -> None:
    assert run("-c", HEAD + TOLD_TO_STOP) == ""
