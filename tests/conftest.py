"""What all suites share: seeds that are printed, and the number of random trials."""

from __future__ import annotations

import os
import random

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full-trials", action="store_true", help="random trials at their full count (make chaos)")
    parser.addoption("--seed", type=int, default=None, help="seed of the random trials; printed, new each run if unset")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "chaos: random trials: a sample in make test, in full in make chaos")
    if config.getoption("--seed") is None:
        config.option.seed = int.from_bytes(os.urandom(4))


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed of the random trials: {config.getoption('--seed')} (repeat with --seed)"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """A generator of its own for each test, from the printed seed and the test's name."""
    return random.Random(f"{request.config.getoption('--seed')}/{request.node.nodeid}")


@pytest.fixture
def full_trials(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full-trials"))
