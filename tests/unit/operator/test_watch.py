"""A look at all jobs there are. A stand-in gives the pages: the API server cannot be made to lose a watch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from finetune_operator.api import JSON, Label
from finetune_operator.kube import GoneError, Kube, KubeError
from finetune_operator.metrics import Jobs
from finetune_operator.queue import Key
from finetune_operator.watch import ChildWatch, Ended, Resync
from tests.unit.operator.builders import SPEC, UID, job_body, pod_body

FINISHED = {"phase": "Failed", "conditions": [{"type": "Finished", "status": "True"}]}


@dataclass
class StandIn:
    """Gives these pages, or breaks off after them."""

    pages_there: list[list[JSON]]
    breaks: bool = False
    jobs: Jobs = field(default_factory=lambda: Jobs(clock=lambda: 0.0))
    ended: Ended = field(default_factory=Ended)

    async def pages(self, *_: Any) -> AsyncIterator[JSON]:
        for items in self.pages_there:
            yield {"items": items}
        if self.breaks:
            raise KubeError(503, "busy")

    async def look(self, on_key: Callable[[Key], None] = lambda _: None) -> None:
        await Resync(cast("Kube", self), None, 1, on_key, self.jobs, self.ended, beat=lambda: None)._look()


def key(name: str) -> Key:
    return Key("default", name)


async def test_a_resync_of_a_stand_in_queues_what_has_not_ended() -> None:
    there = StandIn([[job_body(name="a")], [job_body(name="b", status=FINISHED), job_body(name="c")]])
    queued: list[Key] = []
    await there.look(queued.append)
    assert queued == [key("a"), key("c")]


async def test_a_job_whose_deletion_no_watch_told_of_is_counted_until_the_next_list_of_a_stand_in() -> None:
    there = StandIn([[job_body(name="a")], [job_body(name="b", status=FINISHED)]])
    for name in ("a", "b", "gone"):
        there.jobs.see(key(name), job_body(name=name))
    await there.look()
    assert there.jobs.known() == {key("a"), key("b")}


async def test_a_job_first_seen_while_a_stand_in_lists_is_not_forgotten() -> None:
    there = StandIn([[job_body(name="a")]])
    await there.look(lambda _: there.jobs.see(key("new"), job_body(name="new")))
    assert there.jobs.known() == {key("new")}


async def test_a_list_of_a_stand_in_that_breaks_off_forgets_nothing() -> None:
    there = StandIn([[job_body(name="a")]], breaks=True)
    there.jobs.see(key("b"), job_body(name="b"))
    with pytest.raises(KubeError):
        await there.look()
    assert there.jobs.known() == {key("b")}


# --- children of what has ended --------------------------------------------------------------------------------------


def heard(ended: Ended, uid: str = UID) -> list[Key]:
    """The keys queued when a pod is heard of."""
    body = pod_body(uid=uid)
    body["metadata"] |= {"namespace": "default", "labels": body["metadata"]["labels"] | {Label.JOB_NAME: "demo"}}
    queued: list[Key] = []
    ChildWatch(cast("Kube", None), "Pod", None, queued.append, ended, beat=lambda: None)._hear(body)
    return queued


def test_a_pod_of_a_job_that_has_ended_calls_for_no_pass() -> None:
    ended = Ended()
    assert heard(ended) == [key("demo")]
    assert ended.see(job_body(status=FINISHED))
    assert heard(ended) == []


def test_a_pod_of_a_namesake_of_a_job_that_has_ended_calls_for_a_pass() -> None:
    ended = Ended()
    ended.see(job_body(status=FINISHED))
    assert heard(ended, "another-uid") == [key("demo")]


def test_a_job_whose_end_was_taken_back_or_that_is_gone_has_not_ended() -> None:
    ended = Ended()
    ended.see(job_body(status=FINISHED))
    assert not ended.see(job_body())
    assert heard(ended) == [key("demo")]
    ended.see(job_body(status=FINISHED))
    ended.forget([key("demo")])
    assert heard(ended) == [key("demo")]


def test_a_job_that_has_a_time_to_live_after_its_end_is_looked_at_again() -> None:
    assert not Ended().see(job_body(SPEC | {"runPolicy": {"ttlSecondsAfterFinished": 1}}, FINISHED))


async def test_an_ended_job_of_whose_deletion_no_watch_told_is_forgotten_with_the_next_list_of_a_stand_in() -> None:
    there = StandIn([[]])
    there.jobs.see(key("demo"), job_body(status=FINISHED))
    there.ended.see(job_body(status=FINISHED))
    await there.look()
    assert heard(there.ended) == [key("demo")]


@pytest.mark.parametrize("ends", [None, GoneError(410, "too old")], ids=["without a word", "as too old"])
async def test_a_watch_that_a_stand_in_ends_at_once_is_taken_up_again_after_a_pause(ends: GoneError | None) -> None:
    calls: list[int] = []

    class Short:
        async def watch(self, *_: Any, **__: Any) -> AsyncIterator[JSON]:
            calls.append(1)
            await asyncio.sleep(0)
            if ends is not None:
                raise ends
            none: tuple[JSON, ...] = ()
            for event in none:
                yield event

    watch = ChildWatch(cast("Kube", Short()), "Pod", None, lambda _: None, Ended(), lambda: None, version="1")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await watch.run()
    assert len(calls) == 1
