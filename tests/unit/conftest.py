"""What all unit tests share: examples that take the time they take, and a process that each finds as it was."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings

# A machine under load is slow, and no example is there to test its speed (200 ms are the default's limit).
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@contextmanager
def as_before() -> Iterator[None]:
    """Without what the trainer's commands set in the process that they run in: variables of libraries, no subnormals.

    The latter a library's import does too (-ffast-math); hypothesis cannot work with it.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(autouse=True, scope="module")
def own_process_of_a_file() -> Iterator[None]:
    """With what its fixtures ran."""
    with as_before():
        yield


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    with as_before():
        yield
