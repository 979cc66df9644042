"""A GPU, or a word why nothing is tested; and a table of what each job took."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.gpu.bench import LLAMA_1B, Bench, Outcome, make_texts

if TYPE_CHECKING:
    from collections.abc import Callable

OUTCOMES = pytest.StashKey[list[Outcome]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "tests/gpu" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason="no GPU is seen here: run `pytest tests/gpu` where one is"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for outcome in config.stash.get(OUTCOMES, []):
        terminalreporter.write_line(str(outcome))


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("gpu"))
    bench.make_model("1b", LLAMA_1B)
    make_texts(bench.root / "sources" / "datasets" / "rows.jsonl", range(400), tokens=600)
    return bench


@pytest.fixture
def told(request: pytest.FixtureRequest) -> Callable[[Outcome], Outcome]:
    """Put an outcome into the table."""

    def tell(outcome: Outcome) -> Outcome:
        request.config.stash.setdefault(OUTCOMES, []).append(outcome)
        return outcome

    return tell
