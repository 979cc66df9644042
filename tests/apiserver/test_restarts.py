"""Operators that are killed, restarted, left idle or cut off. No kubelet: pods are played by the test."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.control_plane import ControlPlane
from tests.apiserver import players
from tests.apiserver.api import Space, wait_for
from tests.apiserver.cases import WHOLE, spec
from tests.apiserver.conftest import Operator, quiet_for

NewOperator = Callable[..., Operator]
LINE = ("prepare", "train", "merge", "quantize-0", "publish-0")
SPEC = WHOLE
MEMORY_LIMIT_MIB = 80


@pytest.fixture
def own_operator(new_operator: NewOperator) -> Operator:
    return new_operator()


def test_a_finished_job_and_an_idle_operator_write_nothing(new_operator: NewOperator, space: Space) -> None:
    operator = new_operator(FINETUNE_RESYNC_SECONDS="0.5")
    space.submit("demo", spec(merge={"policy": "Never"}))
    for stage in ("prepare", "train"):
        players.succeed(space, players.next_job(space, "demo", stage, 1))
    space.wait_status("demo", phase="Succeeded")
    assert quiet_for(2, lambda: space.version("demo"))
    operator.restart()
    wait_for(lambda: operator.get("/readyz") == 200, "the operator watching again")
    assert quiet_for(2, lambda: space.version("demo"))


def test_an_operator_killed_in_every_stage_of_played_pods_changes_nothing(own_operator: Operator, space: Space) -> None:
    space.submit("demo", SPEC)
    uids: dict[str, str] = {}
    for stage in LINE:
        job = players.next_job(space, "demo", stage, 1)
        own_operator.kill()  # often before the status of this attempt is written
        uids[job] = space.read("jobs", job)["metadata"]["uid"]
        players.run(space, job)
        players.succeed(space, job)
        own_operator.start()
    status = space.wait_status("demo", phase="Succeeded")
    assert {name: space.read("jobs", name)["metadata"]["uid"] for name in space.names("jobs")} == uids
    assert len(uids) == len(LINE)
    assert [stage["manifestDigest"] for stage in status["stages"]] == [f"{stage}-digest" for stage in LINE]
    assert status["retries"] == 0


def test_a_status_lost_with_played_pods_is_told_again(own_operator: Operator, space: Space) -> None:
    space.submit("demo", SPEC)
    players.succeed(space, players.next_job(space, "demo", "prepare", 1))
    players.next_job(space, "demo", "train", 1)
    own_operator.kill()
    space.call(
        "PATCH", space.path("finetunejobs", "demo") + "/status", {"status": None}, "application/merge-patch+json"
    )
    own_operator.start()
    status = space.wait_status("demo", attemptCount=1, phase="Training")
    assert status["stages"][0]["manifestDigest"] == "prepare-digest"
    assert space.names("jobs") == ["demo-prepare-1", "demo-train-1"]


def test_a_foreign_object_that_goes_away_lets_the_job_start(new_operator: NewOperator, space: Space) -> None:
    new_operator(FINETUNE_START_DEADLINE_SECONDS="60")
    space.create("configmaps", {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "demo-config"}})
    space.submit("demo", SPEC)
    space.wait_status("demo", reason="NameConflict")
    space.delete("configmaps", "demo-config")
    players.next_job(space, "demo", "prepare", 1)


def test_an_idle_operator_is_light_ready_and_alive(own_operator: Operator) -> None:
    wait_for(lambda: own_operator.get("/readyz") == 200, "the operator ready")
    assert own_operator.get("/healthz") == 200
    wait_for(lambda: own_operator.memory_mib("Rss") < MEMORY_LIMIT_MIB, "what it took to start released")
    print(f"idle: RSS {own_operator.memory_mib('Rss'):.1f} MiB, PSS {own_operator.memory_mib():.1f} MiB")


def test_an_operator_told_to_stop_leaves_no_task_for_kopf_to_wait_for(new_operator: NewOperator) -> None:
    operator = new_operator(FINETUNE_LOG_LEVEL="DEBUG")
    wait_for(lambda: operator.get("/readyz") == 200, "the operator ready")
    assert operator.stop() == 0
    log = operator.log.read_text()
    assert "Hung tasks stopping is skipped" in log  # what is still at work after 5 s is told as stopped instead
    assert "Hung tasks are" not in log


def test_an_operator_survives_an_api_server_that_goes_away(
    own_operator: Operator, space: Space, control_plane: ControlPlane
) -> None:
    wait_for(lambda: own_operator.get("/readyz") == 200, "the operator ready")
    own_operator.meets_a_new_api_server = True
    control_plane.stop()
    control_plane.start()
    wait_for(lambda: space.api.get(space.path("finetunejobs")), "the CRD in service")
    space.submit("demo", SPEC)
    players.next_job(space, "demo", "prepare", 1)
    assert own_operator.get("/healthz") == 200
