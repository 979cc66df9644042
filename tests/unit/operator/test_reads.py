"""What a pass reads. A stand-in answers for the API server, which does not tell what it was asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, cast

import pytest

from finetune_operator.api import JSON
from finetune_operator.kube import Kube
from finetune_operator.metrics import Metrics
from finetune_operator.progress import ProgressReader
from finetune_operator.queue import Key
from finetune_operator.reconcile import NEW_SECONDS, World, observe
from tests.unit.operator.builders import SETTINGS, START, job_body


@dataclass
class StandIn:
    """Has this FineTuneJob and no children; notes what is read."""

    body: JSON
    read_of: list[str] = field(default_factory=list)

    async def read(self, kind: str, *_: str) -> JSON:
        self.read_of.append(kind)
        return self.body

    async def children(self, kind: str, *_: str) -> list[JSON]:
        self.read_of.append(kind)
        return []


def world(kube: StandIn, now: datetime) -> World:
    return World(cast("Kube", kube), cast("ProgressReader", None), SETTINGS, Metrics(), clock=lambda: now)


@pytest.mark.parametrize(
    ("status", "seconds", "read"),
    [
        pytest.param(None, 1, ["FineTuneJob"], id="a new job has no children"),
        pytest.param(None, NEW_SECONDS, ["FineTuneJob", "Job", "Pod"], id="an older one may have lost its status"),
        pytest.param({"phase": "Pending"}, 1, ["FineTuneJob", "Job", "Pod"], id="one that was told of has begun"),
    ],
)
async def test_a_pass_asks_a_stand_in_for_the_children_that_there_can_be(
    status: Any, seconds: int, read: list[str]
) -> None:
    kube = StandIn(job_body(status=status))
    facts = await observe(Key("default", "demo"), world(kube, START + timedelta(seconds=seconds)))
    assert facts is not None
    assert (facts.jobs, facts.pods) == ((), ())
    assert kube.read_of == read
