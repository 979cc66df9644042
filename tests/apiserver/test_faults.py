"""What an API server and a network may do to the operator, done to it by a proxy. Pods are played by the test."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from cluster.control_plane import ControlPlane
from finetune_operator.api import Label
from tests.apiserver import players
from tests.apiserver.api import RefusedError, Space, wait_for
from tests.apiserver.cases import spec
from tests.apiserver.conftest import Operator, quiet_for
from tests.apiserver.proxy import Answer, Call, CutError, Proxy, Rule
from tests.unit.operator.builders import word

LINE = ("prepare", "train", "merge")
WATCHED = {"finetunejobs", "jobs", "pods"}
SPEC = spec(parallelism={"gpusPerNode": 0})
GONE_SECONDS, LONG_GONE_SECONDS = 6, 75
"""The longer one is more than the 54 s after which kopf's own list of pauses ends."""

RUN_SECONDS = 240
TRIALS, ALL_TRIALS = 1, 20
SHARE = 0.1
"""Of the calls that go wrong."""


@dataclass
class Behind:
    """An operator of one namespace, behind a proxy."""

    space: Space
    proxy: Proxy
    operator: Operator

    def wait_until_it_watches(self) -> None:
        wait_for(lambda: self.operator.get("/readyz") == 200, "the operator ready")
        wait_for(lambda: all(map(self.proxy.watched, WATCHED)), "all watches open")

    def quiet(self, seconds: float = 3) -> bool:
        return quiet_for(seconds, lambda: str(len(self.proxy.writes)))

    def created(self, plural: str) -> list[str]:
        """Names of what was made, as often as it was made."""
        calls = (done.call for done in self.proxy.writes if done.status == 201)
        return sorted(call.name for call in calls if call.plural == plural and call.namespace == self.space.namespace)


@pytest.fixture
def start(operator_kubeconfig: Path, space: Space, tmp_path: Path) -> Iterator[Callable[..., Behind]]:
    """Starts the operator behind a proxy."""
    with Proxy(operator_kubeconfig) as proxy:
        operator = Operator(proxy.write_kubeconfig(tmp_path / "kubeconfig"), space.namespace, tmp_path / "operator.log")

        def begin(rule: Rule | None = None, **settings: str) -> Behind:
            operator.settings = settings
            proxy.rule = rule or Rule()
            operator.start()
            return Behind(space, proxy, operator)

        yield begin
        proxy.rule = Rule()
        assert operator.stop() == 0
    log = operator.log.read_text()
    print(log[-4000:])
    assert "Traceback (most recent call last)" not in log


def played(space: Space, done: Callable[[], bool], seconds: float = RUN_SECONDS) -> None:
    """Every pod there is succeeds, until it is done."""

    def probe() -> bool:
        for pod in space.all("pods"):
            gone = "deletionTimestamp" in pod["metadata"]
            if pod["status"].get("phase") == "Pending" and not gone:
                labels = pod["metadata"]["labels"]
                last = word(labels[Label.STAGE], int(labels[Label.ATTEMPT]))
                with contextlib.suppress(RefusedError):  # it went away just now
                    players.end_pod(space, pod, 0, last.to_json())
        return done()

    wait_for(probe, "the end of the job", seconds)


def succeeded(space: Space, name: str = "demo") -> bool:
    return space.status(name).get("phase") == "Succeeded"


# --- gone, forgetful, silent -----------------------------------------------------------------------------------------


@pytest.mark.chaos
def test_after_an_api_server_was_gone_all_is_done_and_quiet_soon_with_played_pods(
    start: Callable[..., Behind], full_trials: bool
) -> None:
    behind = start(NoConfigMap())
    space, proxy = behind.space, behind.proxy
    proxy.rule = Rule()
    behind.wait_until_it_watches()
    space.submit("demo", SPEC)
    players.run(space, players.next_job(space, "demo", "prepare", 1))
    space.wait_status("demo", reason="Running")
    proxy.rule = broken = NoConfigMap()
    space.submit("halfway", SPEC)
    wait_for(lambda: broken.hit, "a job of which only the claim is made")
    proxy.close()
    players.succeed(space, "demo-prepare-1")
    space.submit("late", SPEC)
    assert not wait_gone(behind, LONG_GONE_SECONDS if full_trials else GONE_SECONDS)
    proxy.rule = Rule()
    proxy.open()
    back = time.monotonic()
    for name, stage in (("demo", "train"), ("late", "prepare"), ("halfway", "prepare")):
        players.next_job(space, name, stage, 1)
    wait_for(lambda: behind.quiet(3), "no more writes")
    print(f"quiet {time.monotonic() - back - 3:.1f} s after the API server was back")
    assert behind.operator.get("/healthz") == 200


class NoConfigMap(Rule):
    """Cuts the first creation of a ConfigMap."""

    hit = False

    async def before(self, call: Call) -> Answer | None:
        if call.plural == "configmaps":
            self.hit = True
            raise CutError
        return None


def wait_gone(behind: Behind, seconds: float) -> bool:
    """Whether the operator is found ill while nothing can be reached."""
    return not quiet_for(seconds, lambda: str(behind.operator.get("/healthz")))


def test_watches_whose_past_is_forgotten_begin_anew_and_miss_nothing_of_played_pods(
    start: Callable[..., Behind], control_plane: ControlPlane
) -> None:
    behind = start(FINETUNE_PROGRESS_INTERVAL_SECONDS="600")
    space, proxy = behind.space, behind.proxy
    behind.wait_until_it_watches()
    space.submit("demo", SPEC)
    players.run(space, players.next_job(space, "demo", "prepare", 1))
    space.wait_status("demo", reason="Running")
    proxy.close()
    players.succeed(space, "demo-prepare-1")
    space.submit("late", SPEC)
    forget(control_plane, space)
    proxy.open()
    for name, stage in (("demo", "train"), ("late", "prepare")):
        players.next_job(space, name, stage, 1)
    wait_for(lambda: {call.plural for call in proxy.gone} >= WATCHED, "410 told to each watch")
    assert behind.created("jobs") == ["demo-prepare-1", "demo-train-1", "late-prepare-1"]


def forget(control_plane: ControlPlane, space: Space) -> None:
    """etcd drops all that was before, and the API server begins with empty caches."""
    version = space.call("GET", space.path("pods"))["metadata"]["resourceVersion"]
    url = f"http://127.0.0.1:{control_plane.layout.etcd_port}/v3/kv/compaction"
    body = json.dumps({"revision": version, "physical": True}).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, body, method="POST"), timeout=10) as answer:
        assert answer.status == 200
    control_plane.stop()
    control_plane.start()
    wait_for(lambda: space.api.get(space.path("finetunejobs")), "the CRD in service")


@pytest.mark.parametrize("silent", [("finetunejobs",), ("jobs", "pods")], ids=",".join)
def test_a_watch_that_falls_silent_is_made_good_by_the_resync_with_played_pods(
    start: Callable[..., Behind], silent: tuple[str, ...]
) -> None:
    behind = start(FINETUNE_RESYNC_SECONDS="2", FINETUNE_PROGRESS_INTERVAL_SECONDS="600")
    space = behind.space
    behind.wait_until_it_watches()
    space.submit("demo", SPEC)
    players.run(space, players.next_job(space, "demo", "prepare", 1))
    space.wait_status("demo", reason="Running")
    assert all(behind.proxy.freeze(plural) for plural in silent)
    players.succeed(space, "demo-prepare-1")
    space.submit("late", SPEC)
    players.next_job(space, "demo", "train", 1)
    players.next_job(space, "late", "prepare", 1)
    assert not any(behind.proxy.watched(plural) for plural in silent)


# --- other writers ---------------------------------------------------------------------------------------------------


@dataclass
class Meddler(Rule):
    """Somebody else writes the FineTuneJob each time just before the operator does, so often."""

    space: Space
    times: int = 6
    conflicts: int = 0
    status_writes: int = 0

    async def before(self, call: Call) -> Answer | None:
        if call.part == "status":
            self.status_writes += 1
            if self.times > 0:
                self.times -= 1
                await asyncio.to_thread(self._meddle)
        return None

    async def after(self, call: Call, answer: Answer) -> None:
        self.conflicts += call.part == "status" and answer.status == 409

    def _meddle(self) -> None:
        label = {"metadata": {"labels": {f"somebody/{self.times}": "else"}, "annotations": {"note": str(self.times)}}}
        self.space.merge("finetunejobs", "demo", label)
        path = f"{self.space.path('finetunejobs', 'demo')}/status"
        self.space.call("PATCH", path, {"status": {"message": "Meddled with."}}, "application/merge-patch+json")


def test_others_that_write_at_the_same_time_lose_nothing_and_hold_nothing_up_with_played_pods(
    start: Callable[..., Behind], space: Space
) -> None:
    meddler = Meddler(space)
    behind = start(meddler)
    space.submit("demo", SPEC)
    played(space, lambda: succeeded(space))
    job = space.read("finetunejobs", "demo")
    assert sorted(job["metadata"]["labels"]) == [f"somebody/{number}" for number in range(6)]
    assert job["metadata"]["annotations"]["note"] == "0"
    assert job["status"]["message"].startswith("All stages are complete")
    assert behind.created("jobs") == sorted(f"demo-{stage}-1" for stage in LINE)
    assert meddler.conflicts == 6
    assert behind.quiet()
    print(f"{meddler.status_writes} tries to write the status, of which {meddler.conflicts} met a conflict")


# --- errors ----------------------------------------------------------------------------------------------------------


@dataclass
class Flaky(Rule):
    """A share of the calls fails: refused by a busy or broken server, cut before they arrive, or cut when done."""

    rng: random.Random
    share: float = SHARE
    failed: list[str] = field(default_factory=list)

    async def before(self, call: Call) -> Answer | None:
        if self.rng.random() >= self.share:
            return None
        how = self.rng.choice([429, 500, 503, 504, 0])
        self.failed.append(f"{how} {call.method} {call.plural}")
        if not how:
            raise CutError
        return Answer.refusal(how)

    async def after(self, call: Call, answer: Answer) -> None:
        if self.rng.random() < self.share:
            self.failed.append(f"{answer.status}, not heard: {call.method} {call.plural}")
            raise CutError


@pytest.mark.chaos
@pytest.mark.timeout(0)
def test_an_api_server_that_fails_at_random_changes_nothing_in_the_end_of_played_pods(
    start: Callable[..., Behind], rng: random.Random, full_trials: bool
) -> None:
    trials = ALL_TRIALS if full_trials else TRIALS
    behind = start()
    for trial in range(trials):
        name = f"demo{trial}"
        behind.proxy.rule = flaky = Flaky(rng)
        behind.space.submit(name, SPEC)
        played(behind.space, partial(succeeded, behind.space, name))
        assert [one["state"] for one in behind.space.status(name)["stages"]] == ["Succeeded"] * len(LINE)
        assert [made for made in behind.created("jobs") if made.startswith(f"{name}-")] == sorted(
            f"{name}-{stage}-1" for stage in LINE
        )
        print(f"trial {trial}: {len(flaky.failed)} calls failed")
        assert flaky.failed
    for plural in ("jobs", "configmaps", "persistentvolumeclaims", "events"):
        assert len(set(behind.created(plural))) == len(behind.created(plural)), plural


# --- namesakes -------------------------------------------------------------------------------------------------------


@dataclass
class Namesake(Rule):
    """Deletes the job just before a write of the operator, and makes another of the same name."""

    space: Space
    countdown: int
    uid: str = ""

    async def before(self, call: Call) -> Answer | None:
        if call.writes and not self.uid:
            self.countdown -= 1
            if self.countdown < 0:
                self.uid = await asyncio.to_thread(self._replace)
        return None

    def _replace(self) -> str:
        self.space.delete("finetunejobs", "demo")
        uid: str = self.space.submit("demo", SPEC)["metadata"]["uid"]
        return uid


@pytest.mark.chaos
@pytest.mark.timeout(0)
def test_a_namesake_made_at_any_moment_owes_the_earlier_job_nothing_with_played_pods(
    start: Callable[..., Behind], rng: random.Random, full_trials: bool
) -> None:
    behind = start()
    moments = range(writes_of_a_run(behind))
    chosen = moments if full_trials else rng.sample(moments, 2)
    replaced = sum(replace_at(behind, moment) for moment in chosen)
    print(f"replaced before {replaced} of {len(moments)} writes")
    assert replaced


def writes_of_a_run(behind: Behind) -> int:
    """So many, about: what changes at the same time is told in one write or in two."""
    before = len(behind.proxy.writes)
    behind.space.submit("demo", SPEC)
    played(behind.space, partial(told_of_its_end, behind.space))
    writes = len(behind.proxy.writes) - before
    take_away(behind.space)
    return writes


def replace_at(behind: Behind, moment: int) -> bool:
    """False if this run had fewer writes."""
    proxy, space = behind.proxy, behind.space
    proxy.rule = namesake = Namesake(space, moment)
    before = len(proxy.writes)
    space.submit("demo", SPEC)
    played(space, partial(told_of_its_end, space))
    if namesake.uid:
        check_namesake(behind, namesake, before, moment)
    take_away(space)
    return bool(namesake.uid)


def told_of_its_end(space: Space) -> bool:
    """Whether the job that there is now has had the last write of a run, the Event of its end."""
    found = space.find("finetunejobs", "demo")
    return found is not None and any(
        event["reason"] == "Succeeded" and event["involvedObject"].get("uid") == found["metadata"]["uid"]
        for event in space.all("events")
    )


def check_namesake(behind: Behind, namesake: Namesake, before: int, moment: int) -> None:
    """It has its own Jobs, once each, and none of them was deleted for the earlier one's sake."""
    proxy, space = behind.proxy, behind.space
    status = space.status("demo")
    ours = [job["metadata"] for job in space.all("jobs") if job["metadata"]["labels"][Label.JOB_UID] == namesake.uid]
    assert sorted(each["name"] for each in ours) == sorted(f"demo-{stage}-1" for stage in LINE), moment
    assert status["folder"] == f"demo-{namesake.uid[:8]}"
    assert (status["attemptCount"], status["retries"]) == (1, 0)
    uids = {each["uid"] for each in ours}
    deleted = [done.call for done in proxy.writes[before:] if done.call.method == "DELETE"]
    assert not [call for call in deleted if json.loads(call.body)["preconditions"]["uid"] in uids], moment


def take_away(space: Space) -> None:
    """All of the job goes."""
    space.delete("finetunejobs", "demo", "Foreground")
    wait_for(lambda: not space.names("jobs") and not space.find("finetunejobs", "demo"), "all of it gone")
