"""The probe fails when a loop has stopped, and only then."""

from __future__ import annotations

import asyncio

from finetune_operator.handlers import EndlessBackoffs
from finetune_operator.health import KOPF_WATCHER, Health
from finetune_operator.queue import AWAY_BACKOFF_SECONDS


async def test_a_loop_that_gives_no_sign_is_ill_and_silence_of_the_cluster_is_not() -> None:
    now = [0.0]
    health = Health(clock=lambda: now[0])
    beat = health.expect("resync", 10)
    now[0] = 11
    assert health.ailing() == ["resync has given no sign for 11 s"]
    beat()
    assert health.ailing() == []


async def test_a_watcher_that_kopf_has_lost_is_noticed_and_a_standby_needs_none() -> None:
    health = Health()
    health.stand_by()
    assert health.ready
    assert health.ailing() == []  # who stands by has none
    health.watch()
    assert "watcher" in health.ailing()[0]
    watcher = asyncio.create_task(asyncio.sleep(9), name=f"{KOPF_WATCHER}.v1alpha1.finetune.dev")
    assert health.ailing() == []
    watcher.cancel()


def test_backoffs_never_end() -> None:
    pauses = [pause for pause, _ in zip(EndlessBackoffs(), range(500), strict=False)]
    assert len(pauses) == 500
    assert all(0 < pause <= AWAY_BACKOFF_SECONDS * 1.5 for pause in pauses)
