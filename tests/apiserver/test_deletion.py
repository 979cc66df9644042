"""A FineTuneJob deleted at any time of its life: all that is its own goes with it, by owner reference alone."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.apiserver import players
from tests.apiserver.api import Space, wait_for
from tests.apiserver.cases import SHARED, WHOLE, spec
from tests.apiserver.conftest import Operator, quiet_for

CPU = {"gpusPerNode": 0}
SPEC = WHOLE
GANG = spec(parallelism=CPU | {"numNodes": 2}, output=SHARED)
LINE = ("prepare", "train", "merge", "quantize-0", "publish-0")
OURS = ("finetunejobs", "jobs", "configmaps", "services")
KEPT = {"kube-root-ca.crt"}
COMPLAINT = re.compile(r"\b(WARNING|ERROR)\b(?!.*: Attempt \d+ of )")
"""Of the operator's own work; that an attempt failed is news of the job."""

pytestmark = pytest.mark.usefixtures("operator")


def pending(space: Space) -> str:
    space.submit("demo", SPEC)
    players.next_job(space, "demo", "prepare", 1)
    return "Pending"


def in_stage(stage: str, phase: str) -> Callable[[Space], str]:
    """The pod of this stage runs."""

    def play(space: Space) -> str:
        space.submit("demo", SPEC)
        for each in LINE[: LINE.index(stage)]:
            players.succeed(space, players.next_job(space, "demo", each, 1))
        players.run(space, players.next_job(space, "demo", stage, 1))
        return phase

    return play


def training_on_two_nodes(space: Space) -> str:
    space.submit("demo", GANG)
    players.succeed(space, players.next_job(space, "demo", "prepare", 1))
    players.run(space, players.next_job(space, "demo", "train", 1), index=1)
    return "Training"


def run_again(space: Space) -> str:
    space.submit("demo", SPEC)
    players.end(space, players.next_job(space, "demo", "prepare", 1), 1, "Traceback: boom")
    players.run(space, players.next_job(space, "demo", "prepare", 2))
    return "Preparing"


def failed(space: Space) -> str:
    space.submit("demo", SPEC | {"runPolicy": {"maxRetries": 0}})
    players.end(space, players.next_job(space, "demo", "prepare", 1), 1, "Traceback: boom")
    return "Failed"


def succeeded(space: Space) -> str:
    space.submit("demo", SPEC)
    for stage in LINE:
        players.succeed(space, players.next_job(space, "demo", stage, 1))
    return "Succeeded"


LIVES = {
    "pending": pending,
    "preparing": in_stage("prepare", "Preparing"),
    "training": in_stage("train", "Training"),
    "training on two nodes": training_on_two_nodes,
    "merging": in_stage("merge", "Merging"),
    "quantizing": in_stage("quantize-0", "Quantizing"),
    "publishing": in_stage("publish-0", "Publishing"),
    "run again": run_again,
    "failed": failed,
    "succeeded": succeeded,
}


def left(space: Space) -> list[str]:
    return [name for plural in (*OURS, "pods") for name in space.names(plural) if name not in KEPT]


@pytest.mark.parametrize("life", LIVES)
def test_a_job_deleted_in_any_phase_of_played_pods_leaves_its_claim_and_nothing_else(
    space: Space, operator: Operator, life: str
) -> None:
    space.wait_status("demo", phase=LIVES[life](space))
    finalizers = {plural: [item["metadata"].get("finalizers") for item in space.all(plural)] for plural in OURS}
    assert not any(any(each) for each in finalizers.values()), finalizers
    space.delete("finetunejobs", "demo")
    wait_for(lambda: not left(space), "all of it gone")
    assert len(space.names("persistentvolumeclaims")) == 1
    assert quiet_for(1, lambda: str(left(space))), "nothing is made any more"
    assert [line for line in operator.log.read_text().splitlines() if COMPLAINT.search(line)] == []
