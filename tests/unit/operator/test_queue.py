"""Each key once, never two at work on one, failures ever later."""

from __future__ import annotations

import asyncio

import pytest

from finetune_operator.queue import AWAY_BACKOFF_SECONDS, Key, Queue

A, B, C = Key("ns", "a"), Key("ns", "b"), Key("ns", "c")
PATIENCE_SECONDS = 30
"""For what is due at once: a machine under load is late."""


@pytest.fixture
def queue() -> Queue:
    return Queue(jitter=lambda: 0.0)


async def nothing(queue: Queue, seconds: float = 0.05) -> bool:
    try:
        await asyncio.wait_for(queue.get(), seconds)
    except TimeoutError:
        return True
    return False


async def test_a_key_added_twice_is_handed_out_once(queue: Queue) -> None:
    queue.add(A)
    queue.add(A)
    assert await queue.get() == A
    assert await nothing(queue)


async def test_keys_come_in_the_order_of_their_adding(queue: Queue) -> None:
    for key in (B, A):
        queue.add(key)
    assert [await queue.get(), await queue.get()] == [B, A]


async def test_whoever_takes_any_key_takes_the_one_that_has_waited_longest_new_or_not(queue: Queue) -> None:
    queue.add(B, new=True)
    queue.add(A)
    queue.add(C, new=True)
    queue.add(B)
    assert len(queue) == 3
    assert [await queue.get() for _ in range(3)] == [B, A, C]
    assert await nothing(queue)


async def test_who_takes_new_keys_only_is_given_no_other(queue: Queue) -> None:
    queue.add(A)
    waiting = asyncio.create_task(queue.get(new=True))
    queue.add(B, new=True)
    assert await asyncio.wait_for(waiting, PATIENCE_SECONDS) == B
    assert await queue.get() == A


async def test_a_key_that_waits_and_turns_out_to_be_new_comes_once(queue: Queue) -> None:
    for key in (A, B):
        queue.add(key)
    queue.add(B, new=True)
    assert [await queue.get(new=True), await queue.get()] == [B, A]
    assert await nothing(queue)


async def test_a_key_in_work_is_not_handed_out_again_until_it_is_done(queue: Queue) -> None:
    queue.add(A)
    key = await queue.get()
    queue.add(A)
    assert await nothing(queue)
    queue.done(key)
    assert await asyncio.wait_for(queue.get(), PATIENCE_SECONDS) == A


async def test_a_delayed_key_comes_when_its_time_has_come(queue: Queue) -> None:
    queue.add_after(A, 0.5)
    assert await nothing(queue, 0.02)
    assert await asyncio.wait_for(queue.get(), PATIENCE_SECONDS) == A


async def test_the_earlier_of_two_times_counts(queue: Queue) -> None:
    queue.add_after(A, 60)
    queue.add_after(A, 0.01)
    queue.add_after(A, 60)
    assert await asyncio.wait_for(queue.get(), PATIENCE_SECONDS) == A
    queue.done(A)
    assert await nothing(queue)


async def test_a_key_heard_of_now_is_not_handed_out_again_later(queue: Queue) -> None:
    queue.add_after(A, 0.05)
    queue.add(A)
    queue.done(await queue.get())
    assert await nothing(queue, 0.1)


async def test_failures_wait_ever_longer_until_one_goes_well(queue: Queue) -> None:
    pauses = [queue.backoff(A) for _ in range(12)]
    assert pauses[:3] == [0.5, 1, 2]
    assert pauses[-1] == 120
    queue.forget(A)
    assert queue.backoff(A) == 0.5


async def test_an_api_server_that_is_away_is_tried_again_soon_however_long_it_was_gone(queue: Queue) -> None:
    assert max(queue.backoff(A, AWAY_BACKOFF_SECONDS) for _ in range(12)) == 15


async def test_a_waiting_worker_that_gives_up_loses_no_key(queue: Queue) -> None:
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    waiting.cancel()
    queue.add(A)
    assert await asyncio.wait_for(queue.get(), PATIENCE_SECONDS) == A


async def test_many_workers_share_the_keys_without_sharing_one(queue: Queue) -> None:
    at_work: set[Key] = set()
    seen: list[Key] = []

    async def worker() -> None:
        while True:
            key = await queue.get()
            assert key not in at_work
            at_work.add(key)
            await asyncio.sleep(0)
            seen.append(key)
            at_work.remove(key)
            queue.done(key)

    keys = [Key("ns", str(number)) for number in range(20)]
    tasks = [asyncio.create_task(worker()) for _ in range(4)]
    for _ in range(5):
        for key in keys:
            queue.add(key)
        while len(queue) or at_work:  # noqa: ASYNC110 - turns of the loop, no time
            await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert set(seen) == set(keys)
