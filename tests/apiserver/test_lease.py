"""Two operators on one Lease: one works, the other takes over. No kubelet: pods are played by the test.

Each operator has a way to the API server of its own, which keeps a record of all it asked for.
"""

from __future__ import annotations

import collections
import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.api import Api
from cluster.control_plane import ControlPlane
from finetune_operator.lease import LEASE_SECONDS, RENEW_SECONDS
from tests.apiserver import players
from tests.apiserver.api import JSON, Space, wait_for
from tests.apiserver.cases import spec
from tests.apiserver.conftest import ACCOUNT, Operator, check_log
from tests.apiserver.proxy import Answer, Call, Proxy, Rule

LINE = ("prepare", "train", "merge")
SPEC = spec(parallelism={"gpusPerNode": 0})
LEASE = f"default/{ACCOUNT}"
LEASE_PATH = f"/apis/coordination.k8s.io/v1/namespaces/default/leases/{ACCOUNT}"
TAKEOVER_DEADLINE_SECONDS = 3 * LEASE_SECONDS
IDLE_SECONDS = 8
MEMORY_LIMIT_MIB = 80


class Record(Rule):
    """Everything that was asked for, and when."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, Call]] = []

    async def before(self, call: Call) -> Answer | None:
        self.calls.append((time.monotonic(), call))
        return None

    def work(self, since: float = 0) -> list[tuple[float, Call]]:
        """All but the Lease."""
        return [(when, call) for when, call in self.calls if call.plural != "leases" and when >= since]


@dataclass
class Replica:
    """One of the operators."""

    operator: Operator
    proxy: Proxy
    record: Record

    def ready(self) -> bool:
        return self.operator.get("/readyz") == 200

    def says(self, text: str) -> int:
        """How often its log says something."""
        return self.operator.log.read_text().count(text)

    def leads(self) -> bool:
        """Whether it works: its last word about the Lease."""
        words = [line for line in self.operator.log.read_text().splitlines() if "Leading" in line or "Standing" in line]
        return bool(words) and "Leading" in words[-1]

    def writes(self) -> list[JSON]:
        """Those that the API server did, but for the Lease."""
        done = [done for done in self.proxy.writes if done.call.plural != "leases" and done.status < 300]
        return [{"method": one.call.method, "plural": one.call.plural, "name": one.call.name} for one in done]


NewReplica = Callable[..., Replica]


@pytest.fixture
def new_replica(api: Api, operator_kubeconfig: Path, space: Space, tmp_path: Path) -> Iterator[NewReplica]:
    """Starts operators that share a Lease; in the end all stop in order, and nobody holds it."""
    with contextlib.suppress(OSError):
        api.call("DELETE", LEASE_PATH)
    with contextlib.ExitStack() as stack:
        started: list[Replica] = []

        def start(lease: str = LEASE) -> Replica:
            number = len(started)
            record = Record()
            proxy = stack.enter_context(Proxy(operator_kubeconfig))
            proxy.rule = record
            kubeconfig = proxy.write_kubeconfig(tmp_path / f"kubeconfig-{number}")
            settings = {"FINETUNE_LEASE": lease}
            operator = Operator(kubeconfig, space.namespace, tmp_path / f"operator-{number}.log", settings)
            operator.start()
            started.append(Replica(operator, proxy, record))
            return started[-1]

        yield start
        alive = [replica.operator for replica in started if replica.operator.running.poll() is None]
        assert [operator.stop() for operator in alive] == [0] * len(alive)
        for replica in started:
            check_log(replica.operator)
        left = api.get(LEASE_PATH)
        assert left is None or "holderIdentity" not in left["spec"]


Pair = tuple[Replica, Replica]


@pytest.fixture
def pair(new_replica: NewReplica) -> Pair:
    """One that leads, and one that stands by."""
    leader = new_replica()
    wait_for(leader.ready, "the first operator watching")
    standby = new_replica()
    wait_for(standby.ready, "the second operator ready")
    assert leader.leads()
    assert not standby.leads()
    return leader, standby


def play(space: Space, *stages: str) -> None:
    for stage in stages:
        players.succeed(space, players.next_job(space, "demo", stage, 1))


def made(*replicas: Replica) -> dict[tuple[str, str], int]:
    """How often each object was made, but for Events."""
    writes = [write for replica in replicas for write in replica.writes() if write["method"] == "POST"]
    return collections.Counter((one["plural"], one["name"]) for one in writes if one["plural"] != "events")


def children(space: Space) -> dict[tuple[str, str], int]:
    """Each object of the job, once."""
    names = {plural: space.names(plural) for plural in ("jobs", "configmaps", "persistentvolumeclaims")}
    return {(plural, name): 1 for plural in names for name in names[plural] if name != "kube-root-ca.crt"}


def test_of_two_operators_one_works_and_the_other_asks_for_nothing_but_the_lease(pair: Pair, space: Space) -> None:
    leader, standby = pair
    space.submit("demo", SPEC)
    play(space, *LINE)
    space.wait_status("demo", phase="Succeeded")
    assert made(leader) == children(space)
    assert {(call.method, call.plural) for _, call in standby.record.calls} == {("GET", "leases")}
    assert standby.operator.get("/healthz") == 200


def test_idle_operators_ask_for_nothing_but_the_lease(pair: Pair) -> None:
    leader, standby = pair
    since = wait_for(lambda: calm_since(leader), "the leader idle")
    end = since + IDLE_SECONDS
    wait_for(lambda: time.monotonic() > end, "some time")  # here time itself is what is tested
    for name, replica, asked in (("leader", leader, {"PUT"}), ("standby", standby, {"GET"})):
        calls = [call for when, call in replica.record.calls if since <= when < end]
        assert {(call.method, call.plural) for call in calls} == {(method, "leases") for method in asked}
        memory = replica.operator.memory_mib("Rss")
        assert memory < MEMORY_LIMIT_MIB
        print(f"{name}, idle: {len(calls) / IDLE_SECONDS:.2f} calls/s, all of the Lease; RSS {memory:.1f} MiB")


def calm_since(replica: Replica) -> float | None:
    """A moment since which it has asked for nothing but the Lease, for two seconds."""
    now = time.monotonic()
    return None if replica.record.work(now - 2) else now


def test_a_leader_told_to_stop_is_followed_at_once(pair: Pair, space: Space) -> None:
    leader, standby = pair
    space.submit("demo", SPEC)
    play(space, "prepare")
    told = time.monotonic()
    assert leader.operator.stop() == 0
    play(space, "train", "merge")
    space.wait_status("demo", phase="Succeeded")
    print(f"leader told to stop: {standby.record.work()[0][0] - told:.1f} s to the first call of the next")
    assert leader.says("The Lease is released") == 1
    assert made(leader, standby) == children(space)


def test_a_killed_leader_is_followed_and_no_child_is_made_twice(pair: Pair, space: Space) -> None:
    leader, standby = pair
    space.submit("demo", SPEC)
    play(space, "prepare")
    job = players.next_job(space, "demo", "train", 1)
    leader.operator.kill()
    killed = time.monotonic()
    players.succeed(space, job)
    wait_for(standby.writes, "the next leader's first write", TAKEOVER_DEADLINE_SECONDS)
    first = next(when for when, call in standby.record.work() if call.name.startswith("demo"))
    play(space, "merge")
    space.wait_status("demo", phase="Succeeded")
    print(f"leader killed: {first - killed:.1f} s to the first reconcile of the next")
    assert made(leader, standby) == children(space)
    wait_for(standby.ready, "the new leader watching")


def test_a_leader_that_was_paused_beyond_its_lease_writes_nothing_more_and_stands_by(pair: Pair, space: Space) -> None:
    paused, standby = pair
    space.submit("demo", SPEC)
    play(space, "prepare")
    train = players.next_job(space, "demo", "train", 1)
    wait_for(lambda: calm_since(paused), "all calls answered")
    paused.operator.running.send_signal(signal.SIGSTOP)
    try:
        before = list(paused.proxy.writes)
        players.succeed(space, train)  # which the paused one will hear of when it goes on
        wait_for(standby.leads, "the other one leading", TAKEOVER_DEADLINE_SECONDS)
        merge = players.next_job(space, "demo", "merge", 1)
    finally:
        paused.operator.running.send_signal(signal.SIGCONT)
    wait_for(lambda: paused.says("Standing by") == 1 and paused.ready(), "the paused one standing by")
    players.succeed(space, merge)
    space.wait_status("demo", phase="Succeeded")
    assert paused.proxy.writes == before
    assert paused.says("is lost") == 1
    assert paused.operator.running.poll() is None
    assert made(paused, standby) == children(space)


def test_an_api_server_away_for_longer_than_the_deadline_finds_one_leader_and_no_exit_when_it_is_back(
    pair: Pair, space: Space, control_plane: ControlPlane
) -> None:
    for replica in pair:
        replica.operator.meets_a_new_api_server = True
    leader, standby = pair
    space.submit("demo", SPEC)
    play(space, "prepare")
    control_plane.stop()
    try:
        wait_for(lambda: leader.says("is lost") == 1, "the Lease lost", RENEW_SECONDS * 3)
        wait_for(lambda: leader.says("cannot be had yet") > 0, "the former leader trying for the Lease again")
        lost = time.monotonic()  # and what was asked for at the very last is recorded as well
        assert standby.operator.get("/healthz") == leader.operator.get("/healthz") == 200
    finally:
        back = time.monotonic()
        control_plane.start()
    play(space, "train", "merge")
    space.wait_status("demo", phase="Succeeded", seconds=TAKEOVER_DEADLINE_SECONDS)
    led = [replica for replica in pair if replica.record.work(lost)]
    print(
        f"API server started again: {led[0].record.work(lost)[0][0] - back:.1f} s to the first call of the one leader"
    )
    assert [replica for replica in pair if replica.leads()] == led
    assert [replica.operator.running.poll() for replica in pair] == [None, None]
    assert made(*pair) == children(space)


def test_two_operators_that_do_not_know_of_each_other_make_no_child_twice(
    new_replica: NewReplica, space: Space
) -> None:
    """As after a mistake: two releases that serve one namespace."""
    both = new_replica(lease=""), new_replica(lease="")
    for replica in both:
        wait_for(replica.ready, "the operator watching")
    space.submit("demo", SPEC)
    play(space, *LINE)
    space.wait_status("demo", phase="Succeeded")
    assert made(*both) == children(space)
    assert all(replica.record.work() for replica in both)
