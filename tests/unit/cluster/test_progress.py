"""How far the building of a cluster is told to be."""

from __future__ import annotations

import io
import re

import pytest

from cluster.progress import Progress


@pytest.mark.parametrize(
    ("total", "line"),
    [
        pytest.param(2, r"build 1/2: etcd \(\d+\.\d s\)\n", id="a step of several is counted"),
        pytest.param(1, r"build: etcd \(\d+\.\d s\)\n", id="the only one is not"),
    ],
)
def test_a_step_that_ended_is_a_line_with_its_seconds(total: int, line: str) -> None:
    told = io.StringIO()
    with Progress("build", total, told).step("etcd"):
        pass
    assert re.fullmatch(line, told.getvalue())
