"""What all unit tests share: examples that take the time they take, and an environment that each finds as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings

# A machine under load is slow, and no example is there to test its speed (200 ms are the default's limit).
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Commands that run in this process set variables for libraries (no network, threads), which are theirs alone."""
    with mock.patch.dict(os.environ):
        yield
