"""A publishing that is broken off at random bytes ends complete, once, and byte for byte the same.

Each trial breaks off a few attempts, each in one of three ways: the connection is cut, the process is asked to leave,
or it is killed; the last attempt is left in peace.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from finetune_trainer.progress import ExitCode
from tests.unit.trainer.conftest import Desk
from tests.unit.trainer.publishing import test_oci, test_s3
from tests.unit.trainer.publishing.conftest import MARKER, MERGED, Shop, make_job, stock
from tests.unit.trainer.sources.servers import PART_BYTES, UP, Bucket, Registry, Relay, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[4]
TOTAL_BYTES = sum(map(len, MERGED.values()))
MIRRORED = {name: body[::-1] if name.endswith(".safetensors") else body for name, body in MERGED.items()}
SMALL_BYTES = 100_000
CHILD = """\
import sys
from finetune_trainer.__main__ import main
from finetune_trainer.publishing import s3
s3.PART_BYTES = int(sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""
CUT, ASK, KILL = "cut the connection", "ask it to leave", "kill it"


@dataclass
class Trial:
    """One artifact on its way to one place, and whoever stands in the way."""

    shop: Shop
    relay: Relay
    entry: dict[str, Any]
    rng: random.Random
    told: list[str] = field(default_factory=list)

    def run(self) -> None:
        for attempt in range(1, self.rng.randint(2, 4)):
            how, place = self.rng.choice([CUT, ASK, KILL]), self.rng.randint(1, TOTAL_BYTES)
            self.told.append(f"attempt {attempt}: {how} at byte {place:,}")
            code = self._broken_off(how, place, str(attempt))
            assert code in {ExitCode.COMPLETED, ExitCode.INTERRUPTED, -signal.SIGKILL}, (code, self.told)
        self.relay.reset()
        code, first = self.shop.publish(self.entry, "--attempt", "4")
        assert code == ExitCode.COMPLETED, (first.message, self.told)
        self.shop.forget()
        self.relay.reset()
        assert self.shop.publish(self.entry, "--attempt", "4") == (ExitCode.COMPLETED, first), self.told
        assert self.relay.taken < SMALL_BYTES, self.told

    def _broken_off(self, how: str, place: int, attempt: str) -> int:
        if how == CUT:
            self.relay.reset(cut_after=place, limited=UP)
            return self.shop.publish(self.entry, "--attempt", attempt)[0]
        self.relay.reset(hold_after=place, limited=UP)
        return self._asked(attempt) if how == ASK else self._killed(attempt)

    def _asked(self, attempt: str) -> int:
        with self._when_held(lambda: os.kill(os.getpid(), signal.SIGTERM)):
            return self.shop.publish(self.entry, "--attempt", attempt)[0]

    def _killed(self, attempt: str) -> int:
        with self.child(attempt) as child:
            wait_until(lambda: self.relay.holding.is_set() or child.poll() is not None)
            child.kill()
            code = child.wait()
        self.relay.reset()
        return code

    @contextmanager
    def child(self, attempt: str) -> Iterator[subprocess.Popen[bytes]]:
        """The attempt in a process of its own, which is not left behind."""
        desk = self.shop.desk
        (desk.root / "job.json").write_text(json.dumps(make_job(self.entry)))
        folders = [
            "--config",
            str(desk.root / "job.json"),
            "--work",
            str(desk.work),
            "--secrets",
            f"{desk.root}/secrets",
        ]
        command = [sys.executable, "-c", CHILD, str(PART_BYTES), "publish", *folders, "--attempt", attempt]
        path = f"{ROOT}:{ROOT / 'trainer'}"
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.DEVNULL)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    @contextmanager
    def _when_held(self, action: Callable[[], object]) -> Iterator[None]:
        """Do it as soon as the relay holds, and let go; if it never does, nothing."""
        ended = threading.Event()

        def watch() -> None:
            wait_until(lambda: self.relay.holding.is_set() or ended.is_set())
            if self.relay.holding.is_set():
                action()
                self.relay.reset()

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


@pytest.mark.chaos
@pytest.mark.timeout(0)
def test_broken_off_at_random_bytes_a_bucket_ends_with_all_of_it_once(
    bucket: Bucket, shop: Shop, s3_relay: Relay, rng: random.Random, full_trials: bool
) -> None:
    for number in range(40 if full_trials else 2):
        key = f"trial-{number}"
        Trial(shop, s3_relay, test_s3.an_entry(bucket, key=key), rng).run()
        assert test_s3.contents_of(bucket, f"{key}/") == shop.expected("merged", "out")
        assert test_s3.open_uploads(bucket) == 0
        start_over(shop)


@pytest.mark.chaos
@pytest.mark.timeout(0)
def test_broken_off_at_random_bytes_a_registry_ends_with_all_of_it_once(
    shop: Shop, registry: Registry, registry_relay: Relay, rng: random.Random, full_trials: bool
) -> None:
    for number in range(40 if full_trials else 2):
        name = f"chaos-{rng.getrandbits(32)}/trial-{number}:v1"
        Trial(shop, registry_relay, test_oci.an_entry(registry.reference(name, registry_relay.port)), rng).run()
        assert test_oci.pulled(registry.reference(name))[1] == shop.expected("merged", "out")
        start_over(shop)


@pytest.mark.chaos
@pytest.mark.timeout(0)
def test_two_jobs_that_publish_to_one_prefix_at_once_leave_the_whole_of_one_or_no_manifest(
    bucket: Bucket, shop: Shop, s3_port: int, s3_relay: Relay, rng: random.Random, full_trials: bool
) -> None:
    """Files of equal names and sizes, other bytes. One is held at a random byte while the other sends as many."""
    rival, aside = (
        Shop(Desk(shop.desk.root / "rival"), stock(shop.desk.root / "rival" / "work", MIRRORED)),
        Relay(s3_port),
    )
    shutil.copytree(shop.desk.root / "secrets", rival.desk.root / "secrets")
    for number in range(40 if full_trials else 6):
        key, held, sent = f"shared-{number}", rng.randint(1, TOTAL_BYTES), rng.randint(1, TOTAL_BYTES)
        s3_relay.reset(hold_after=held, limited=UP)
        aside.reset()
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(shop.publish, test_s3.an_entry(bucket, key=key))]
            wait_until(s3_relay.holding.is_set)
            jobs.append(pool.submit(rival.publish, test_s3.an_entry(Bucket(aside.url, bucket.name), key=key)))
            wait_until(lambda sent=sent, jobs=jobs: aside.taken >= sent or jobs[1].done())  # type: ignore[misc]
            s3_relay.reset()
            ends = [job.result() for job in jobs]
        told = (held, sent, [(code, word.message) for code, word in ends])
        there = test_s3.contents_of(bucket, f"{key}/")
        whole = [
            each.expected("merged", "out") for each, (code, _) in zip((shop, rival), ends, strict=True) if not code
        ]
        assert there in whole or (MARKER not in there and len(whole) < len(ends)), told
        lost = [
            word for code, word in ends if code not in {ExitCode.COMPLETED, ExitCode.UNKNOWN}
        ]  # that is tried again
        assert all("somebody else publishes" in word.message for word in lost), told
        start_over(shop)
        start_over(rival)
    aside.close()


def test_an_attempt_that_comes_back_from_the_dead_while_the_next_one_publishes_changes_nothing(
    bucket: Bucket, shop: Shop, s3_relay: Relay
) -> None:
    trial = Trial(shop, s3_relay, test_s3.an_entry(bucket), random.Random(0))
    s3_relay.reset(hold_after=PART_BYTES * 3 // 2, limited=UP)
    with trial.child("1") as dead:
        wait_until(s3_relay.holding.is_set)
        dead.send_signal(signal.SIGSTOP)
        s3_relay.reset()
        code, word = shop.publish(trial.entry, "--attempt", "2")
        assert code == ExitCode.COMPLETED, word.message
        dead.send_signal(signal.SIGCONT)
        assert dead.wait() == ExitCode.INTERRUPTED
    assert test_s3.contents_of(bucket) == shop.expected("merged", "out")
    assert test_s3.open_uploads(bucket) == 0


def start_over(shop: Shop) -> None:
    """As if nothing had been published and no attempt had been made."""
    shutil.rmtree(shop.work.published("out"), ignore_errors=True)
    (shop.work.root / ".live-attempt").unlink()


def test_an_attempt_that_was_overtaken_commits_nothing(bucket: Bucket, shop: Shop, s3_relay: Relay) -> None:
    entry = test_s3.an_entry(bucket)
    s3_relay.reset(hold_after=TOTAL_BYTES // 2, limited=UP)
    trial = Trial(shop, s3_relay, entry, random.Random(0))
    with trial._when_held(lambda: (shop.work.root / ".live-attempt").write_text("2\n")):
        code, word = shop.publish(entry)
    assert code == ExitCode.INTERRUPTED, word.message
    assert "manifest.json" not in test_s3.keys_below(bucket)


def test_asked_to_leave_it_leaves_and_the_next_attempt_goes_on(bucket: Bucket, shop: Shop, s3_relay: Relay) -> None:
    trial = Trial(shop, s3_relay, test_s3.an_entry(bucket), random.Random(0))
    assert trial._broken_off(ASK, PART_BYTES * 3 // 2, "1") == ExitCode.INTERRUPTED
    s3_relay.reset()
    assert shop.publish(trial.entry, "--attempt", "2")[0] == ExitCode.COMPLETED
    assert s3_relay.taken < TOTAL_BYTES - PART_BYTES + SMALL_BYTES
    assert test_s3.contents_of(bucket) == shop.expected("merged", "out")
