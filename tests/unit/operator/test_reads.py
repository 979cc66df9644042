"""What a pass reads and writes. A stand-in answers for the API server, which does not tell what it was asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, cast

import pytest

from finetune_operator.api import JSON
from finetune_operator.kube import Kube, KubeError, NotFoundError
from finetune_operator.metrics import Metrics
from finetune_operator.progress import ProgressReader
from finetune_operator.queue import Key
from finetune_operator.reconcile import NEW_SECONDS, TELL_SECONDS, World, observe, reconcile
from tests.unit.operator.builders import SETTINGS, START, job_body

KEY = Key("default", "demo")


@dataclass
class StandIn:
    """Has this FineTuneJob and no children; notes what is read and written."""

    body: JSON
    read_of: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    told: list[JSON] = field(default_factory=list)
    refused: frozenset[str] = frozenset()

    async def read(self, kind: str, *_: str) -> JSON:
        self.read_of.append(kind)
        if kind != "FineTuneJob":
            raise NotFoundError(404, "not there")
        return self.body

    async def children(self, kind: str, *_: str) -> list[JSON]:
        self.read_of.append(kind)
        return []

    async def create(self, manifest: JSON) -> JSON:
        if manifest["kind"] in self.refused:
            raise KubeError(500, "refused by a test")
        self.made.append(manifest["kind"])
        return manifest

    async def apply_status(self, *written: Any) -> None:
        self.told.append(written[-1])


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
    facts = await observe(KEY, world(kube, START + timedelta(seconds=seconds)))
    assert facts is not None
    assert (facts.jobs, facts.pods) == ((), ())
    assert kube.read_of == read


async def test_what_the_watch_of_a_stand_in_brought_is_not_asked_for_again_and_holds_once() -> None:
    kube = StandIn(job_body(status=None))
    at = world(kube, START)
    at.heard[KEY] = kube.body
    assert await observe(KEY, at) is not None
    assert kube.read_of == []
    await observe(KEY, at)
    assert kube.read_of == ["FineTuneJob"]


async def test_what_a_stand_in_is_told_first_of_a_job_comes_with_the_second_pass_which_reads_the_children() -> None:
    kube = StandIn(job_body(status=None))
    at = world(kube, START)
    assert await reconcile(KEY, at) == TELL_SECONDS
    assert sorted(kube.made) == ["ConfigMap", "Job", "PersistentVolumeClaim"]
    assert kube.made[-1] == "Job", "its pods would wait long for what they mount"
    assert kube.told == []
    await reconcile(KEY, at)
    assert kube.read_of == ["FineTuneJob", "FineTuneJob", "Job", "Pod"]
    assert [status["phase"] for status in kube.told] == ["Pending"]


@pytest.mark.parametrize("kind", ["PersistentVolumeClaim", "ConfigMap", "Job"])
async def test_a_child_that_a_stand_in_refuses_is_told_at_once(kind: str) -> None:
    kube = StandIn(job_body(status=None), refused=frozenset({kind}))
    with pytest.raises(KubeError):
        await reconcile(KEY, world(kube, START))
    assert len(kube.told) == 1
    assert "Job" not in kube.made
