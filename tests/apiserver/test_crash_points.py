"""The operator is killed before and after every one of its API writes, and nothing is lost or made twice.

The writes are found by a recording run; each is then a point at which one more run is cut. Pods are played by the test.
"""

from __future__ import annotations

import collections
import json
import random
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import pytest

from cluster.api import Api
from finetune_trainer.progress import Reason
from tests.apiserver import players
from tests.apiserver.api import JSON, Space, wait_for
from tests.apiserver.cases import SHARED, spec
from tests.apiserver.conftest import ACCOUNT, Operator, make_space, quiet_for
from tests.apiserver.proxy import Answer, Call, CutError, Done, Proxy, Rule
from tests.unit.operator.builders import word

SETTINGS = {"FINETUNE_RETRY_BACKOFF_SECONDS": "2"}
"""Long enough for a wait to be written, which otherwise is over before in some runs."""

UID = re.compile(r"\b(demo)-[0-9a-f]{8}\b")
POD = re.compile(r"-[bcdfghjklmnpqrstvwxz2456789]{5}\b")
"""What Kubernetes adds to a pod's name."""

TIMES = frozenset(
    {"startTime", "completionTime", "lastTransitionTime", "runningSince", "waitingSince", "activeSeconds", "eta"}
)
CHILDREN = ("jobs", "pods", "configmaps", "services", "persistentvolumeclaims")
SAMPLE = 2
"""Trials of each run in `make test`."""

LEASED_SAMPLE, LEASED_TRIALS = 1, 12
"""Of the run under a Lease: after each kill the next operator waits 15 s for it."""

RENEWALS = 2
"""Of a Lease, that are points; there is one every two seconds."""

RUNS_FOR_A_POINT = 2
PATIENCE_SECONDS = 15.0
"""For a point that may come after the run's end: an Event, a Lease's renewal."""

Play = Callable[[Space], None]


class Moment(StrEnum):
    """When the operator is killed."""

    BEFORE = "before"
    AFTER = "after"


# --- runs ------------------------------------------------------------------------------------------------------------


def pending(space: Space, stage: str, attempt: int) -> str:
    """The Job of an attempt, told before any pod of it runs: each run then has the same writes and Events."""
    job = players.next_job(space, "demo", stage, attempt)
    wait_for(lambda: told(space, job), f"{job} told")
    return job


def running(space: Space, stage: str, attempt: int, pods: int = 1) -> str:
    """The Job of an attempt, all pods of which run and are known to."""
    job = pending(space, stage, attempt)
    for index in range(pods):
        players.run(space, job, index=index)
    wait_for(lambda: told(space, job) == "Running", f"{job} told as running")
    return job


def told(space: Space, job: str) -> str | None:
    """What the status says of a stage's Job."""
    stages = space.status("demo").get("stages") or ()
    return next((one["state"] for one in stages if one.get("job") == job), None)


def play_every_stage(space: Space) -> None:
    for stage in ("prepare", "train", "merge", "quantize-0"):
        players.succeed(space, running(space, stage, 1))


def play_a_retry(space: Space) -> None:
    players.end(space, running(space, "prepare", 1), 1, "Traceback: boom")
    players.succeed(space, running(space, "prepare", 2))
    players.succeed(space, running(space, "train", 2))


def play_a_gang_that_loses_a_pod(space: Space) -> None:
    """One of two pods is taken away while the other runs: the operator itself must delete the Job."""
    players.succeed(space, running(space, "prepare", 1))
    job = running(space, "train", 1, pods=2)
    taken = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "Needed."}
    players.patch_pod(space, players.pod_of(space, job, 1), {"conditions": [taken], "phase": "Failed"})
    job = running(space, "train", 2, pods=2)
    part = word("train", 2, manifest_digest=None, training=None, artifact=None)
    players.end(space, job, 0, part.to_json(), index=1)
    players.succeed(space, job)


def play_what_cannot_be_mended(space: Space) -> None:
    last = word("prepare", 1, Reason.INVALID_DATASET, "line 3: no JSON.")
    players.end(space, running(space, "prepare", 1), 11, last.to_json())


def play_an_image_that_is_not_there(space: Space) -> None:
    pod = players.pod_of(space, pending(space, "prepare", 1))
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    players.patch_pod(space, pod, {"containerStatuses": players.container(waiting)})


CPU = {"gpusPerNode": 0}
RUNS: dict[str, tuple[JSON, Play]] = {
    "every stage": (spec(parallelism=CPU, quantize=[{"name": "gptq4", "method": "GPTQ"}]), play_every_stage),
    "a retry": (spec(parallelism=CPU, merge={"policy": "Never"}), play_a_retry),
    "a gang": (
        spec(parallelism=CPU | {"numNodes": 2}, output=SHARED, merge={"policy": "Never"}),
        play_a_gang_that_loses_a_pod,
    ),
    "a wrong dataset": (spec(parallelism=CPU), play_what_cannot_be_mended),
    "a wrong image": (spec(parallelism=CPU), play_an_image_that_is_not_there),
}


# --- points ----------------------------------------------------------------------------------------------------------


def label(call: Call) -> str:
    """What a write is about, the same in each run."""
    part = f"/{call.part}" if call.part else ""
    return f"{call.method} {call.plural}{part} {anonymous(call.name)}"


def anonymous(text: str) -> str:
    """Without what is random in names: the job's uid, the end of a pod's name."""
    return POD.sub("", UID.sub(r"\1-UID", text))


@dataclass(frozen=True)
class Point:
    """One write of a run."""

    label: str
    count: int
    """Which of those that have the same label."""
    moment: Moment

    def __str__(self) -> str:
        return f"{self.moment} {self.label} ({self.count})"


def points(writes: list[Done]) -> list[Point]:
    """Before and after each write of a recorded run."""
    counts: collections.Counter[str] = collections.Counter()
    found = []
    for done in writes:
        counts[label(done.call)] += 1
        if done.call.plural != "leases" or counts[label(done.call)] <= RENEWALS:
            found += [Point(label(done.call), counts[label(done.call)], moment) for moment in Moment]
    return found


@dataclass
class Kill(Rule):
    """Kills the operator at a point, once, and starts it again."""

    point: Point
    operator: Operator
    seen: collections.Counter[str] = field(default_factory=collections.Counter)
    hit: threading.Event = field(default_factory=threading.Event)

    async def before(self, call: Call) -> Answer | None:
        if call.writes:
            self.seen[label(call)] += 1
            self._kill(call, Moment.BEFORE)
        return None

    async def after(self, call: Call, _: Answer) -> None:
        if call.writes:
            self._kill(call, Moment.AFTER)

    def _kill(self, call: Call, moment: Moment) -> None:
        here = Point(label(call), self.seen[label(call)], moment)
        if here != self.point or self.hit.is_set():
            return
        self.operator.restart()
        self.hit.set()
        raise CutError


# --- what is compared ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a run leaves, without its times and ids."""

    status: JSON
    children: dict[str, list[str]]
    created: collections.Counter[str]
    """How often each child and each Event was made."""

    @property
    def events(self) -> set[str]:
        return {name for name in self.created if name.startswith("events ")}


def outcome(space: Space, writes: list[Done]) -> Outcome:
    ours = [done.call for done in writes if done.call.namespace == space.namespace and done.status == 201]
    return Outcome(
        status=normal(space.status("demo")),
        children={plural: sorted(map(anonymous, names(space, plural))) for plural in CHILDREN},
        created=collections.Counter(label(call).removeprefix("POST ") for call in ours),
    )


def names(space: Space, plural: str) -> list[str]:
    """Pods by their Jobs: the names of pods are random."""
    items = [item for item in space.all(plural) if item["metadata"]["name"] != "kube-root-ca.crt"]
    labels = [item["metadata"].get("labels", {}).get("batch.kubernetes.io/job-name") for item in items]
    return sorted(
        job if plural == "pods" else item["metadata"]["name"] for item, job in zip(items, labels, strict=True)
    )


def normal(found: JSON) -> JSON:
    """A status without times and ids."""

    def walk(value: object) -> object:
        if isinstance(value, dict):
            return {key: walk(inner) for key, inner in value.items() if key not in TIMES}
        if isinstance(value, list):
            return [walk(inner) for inner in value]
        return anonymous(value) if isinstance(value, str) else value

    walked = json.loads(json.dumps(walk(found)))
    return dict(walked)


# --- trials ----------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """One operator behind a proxy, which serves all trials of a test."""

    api: Api
    proxy: Proxy
    operator: Operator

    def finish(self, spec: JSON, play: Play) -> tuple[Space, list[Done]]:
        """One whole run, in a namespace of its own."""
        space = make_space(self.api)
        before = len(self.proxy.writes)
        space.submit("demo", spec)
        play(space)
        wait_for(lambda: finished(space), "the end of the job")
        return space, self.proxy.writes[before:]

    def wait_until_quiet(self) -> None:
        wait_for(lambda: quiet_for(1, lambda: str(self._writes())), "no more writes")

    def _writes(self) -> int:
        return sum(done.call.plural != "leases" for done in self.proxy.writes)


def finished(space: Space) -> bool:
    conditions = space.status("demo").get("conditions") or ()
    return any(one["type"] == "Finished" and one["status"] == "True" for one in conditions)


@pytest.fixture
def bench(request: pytest.FixtureRequest, api: Api, operator_kubeconfig: Path, tmp_path: Path) -> Iterator[Bench]:
    with Proxy(operator_kubeconfig) as proxy:
        kubeconfig = proxy.write_kubeconfig(tmp_path / "kubeconfig")
        operator = Operator(kubeconfig, "", tmp_path / "operator.log", SETTINGS | getattr(request, "param", {}))
        operator.start()
        yield Bench(api, proxy, operator)
        proxy.rule = Rule()
        assert operator.stop() == 0
    log = operator.log.read_text()
    print(log[-4000:])
    assert "Traceback (most recent call last)" not in log


@pytest.mark.chaos
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", RUNS)
def test_killed_before_or_after_any_write_a_run_of_played_pods_ends_the_same(
    bench: Bench, name: str, rng: random.Random, full_trials: bool
) -> None:
    wanted, recorded = record(bench, name)
    rng.shuffle(recorded)
    cut_at(bench, name, wanted, recorded, len(recorded) if full_trials else SAMPLE)
    print(f"{name}: {len(recorded)} points found")


@pytest.mark.chaos
@pytest.mark.timeout(0)
@pytest.mark.parametrize("bench", [{"FINETUNE_LEASE": f"default/{ACCOUNT}"}], indirect=True, ids=["leader"])
def test_a_leader_killed_at_a_write_changes_nothing_in_the_end_of_played_pods(
    bench: Bench, rng: random.Random, full_trials: bool
) -> None:
    wanted, recorded = record(bench, "a retry")
    rng.shuffle(recorded)
    cut_at(bench, "a retry", wanted, recorded, LEASED_TRIALS if full_trials else LEASED_SAMPLE)


def cut_at(bench: Bench, name: str, wanted: Outcome, recorded: list[Point], trials: int) -> None:
    """One run for each point, up to this many; all outcomes are looked at once more when the last one is over.

    How often the status is written hangs on what comes at the same moment: a tenth of the points may never come again.
    """
    cut: dict[Point, Space] = {}
    for point in recorded:
        if len(cut) < trials and (space := trial(bench, name, point, wanted)):
            cut[point] = space
    wait_for(lambda: bench.operator.get("/readyz") == 200, "the operator watching")
    bench.wait_until_quiet()
    for point, space in cut.items():
        compare(outcome(space, bench.proxy.writes), wanted, point)
    print(f"{name}: {len(cut)} points tried")
    assert len(cut) >= 0.9 * trials


def record(bench: Bench, name: str) -> tuple[Outcome, list[Point]]:
    """What an undisturbed run leaves, and all points of it."""
    bench.proxy.rule = Rule()
    before = len(bench.proxy.writes)
    space, _ = bench.finish(*RUNS[name])
    bench.wait_until_quiet()
    writes = bench.proxy.writes[before:]
    wanted = outcome(space, writes)
    assert set(wanted.created.values()) == {1}
    return wanted, points(writes)


def trial(bench: Bench, name: str, point: Point, wanted: Outcome) -> Space | None:
    """One run that is cut once; None if none of a few runs comes by the point."""
    for _ in range(RUNS_FOR_A_POINT):
        bench.proxy.rule = kill = Kill(point, bench.operator)
        space, _ = bench.finish(*RUNS[name])
        if kill.hit.wait(PATIENCE_SECONDS):
            print(f"{name}: killed {point}", flush=True)
            compare(outcome(space, bench.proxy.writes), wanted, point)
            return space
    print(f"{name}: not seen again: {point}", flush=True)
    return None


def compare(found: Outcome, wanted: Outcome, point: Point) -> None:
    assert found.status == wanted.status, point
    assert found.children == wanted.children, point
    assert set(found.created.values()) == {1}, (point, found.created)
    assert found.created.keys() - found.events == wanted.created.keys() - wanted.events, point
    assert found.events <= wanted.events, point
