"""Trainings of two pods against the real Job controller. No kubelet: pods are played by the test."""

from __future__ import annotations

from collections.abc import Callable

from finetune_trainer.progress import Reason
from tests.apiserver import players
from tests.apiserver.api import JSON, Space, wait_for
from tests.apiserver.cases import SHARED, VOLUME, spec
from tests.apiserver.conftest import Operator
from tests.unit.operator.builders import word

NewOperator = Callable[..., Operator]
SPEC = spec(parallelism={"gpusPerNode": 0, "numNodes": 2}, output=SHARED, merge={"policy": "Never"})
PEER_LOST = word("train", 1, Reason.PEER_LOST, "Rank 1 lost its connection.").to_json()
DID_ITS_PART = word("train", 1, manifest_digest=None, training=None, artifact=None)


def training(space: Space, attempt: int = 1) -> str:
    """The Job of an attempt, both pods of which run."""
    job = players.next_job(space, "demo", "train", attempt)
    for index in (0, 1):
        players.run(space, job, index=index)
    return job


def succeed(space: Space, job: str, attempt: int = 1) -> None:
    players.end(space, job, 0, DID_ITS_PART.model_copy(update={"attempt": attempt}).to_json(), index=1)
    players.succeed(space, job)


def uids(space: Space, plural: str) -> dict[str, str]:
    return {item["metadata"]["name"]: item["metadata"]["uid"] for item in space.all(plural)}


def test_two_played_pods_are_made_once_however_often_the_operator_is_killed(
    new_operator: NewOperator, space: Space
) -> None:
    operator = new_operator()
    space.submit("demo", SPEC)
    players.succeed(space, players.next_job(space, "demo", "prepare", 1))
    job = players.next_job(space, "demo", "train", 1)
    before: dict[str, dict[str, str]] = {}
    for _ in range(3):
        operator.restart()
        training(space)
        wait_for(lambda: operator.get("/readyz") == 200, "the operator at work, whose predecessor told the same")
        space.wait_status("demo", reason="Running")
        before = before or {plural: uids(space, plural) for plural in ("jobs", "services")}
        assert {plural: uids(space, plural) for plural in before} == before
    succeed(space, job)
    status = space.wait_status("demo", phase="Succeeded")
    assert {plural: uids(space, plural) for plural in before} == before
    assert (list(before["services"]), status["retries"]) == (["train-demo"], 0)


def test_played_pods_know_each_other_by_the_services_name(new_operator: NewOperator, space: Space) -> None:
    new_operator()
    space.submit("demo", SPEC)
    players.succeed(space, players.next_job(space, "demo", "prepare", 1))
    job = players.next_job(space, "demo", "train", 1)
    pods = [players.pod_of(space, job, index)["spec"] for index in (0, 1)]
    service = space.read("services", "train-demo")
    assert [(pod["hostname"], pod["subdomain"]) for pod in pods] == [
        ("demo-train-1-0", "train-demo"),
        ("demo-train-1-1", "train-demo"),
    ]
    assert service["spec"]["clusterIP"] == "None"
    assert all(variable(pod, "FINETUNE_RENDEZVOUS") == "demo-train-1-0.train-demo:29500" for pod in pods)
    assert "JOB_COMPLETION_INDEX" in {entry["name"] for entry in pods[1]["containers"][0]["env"]}


def variable(pod: JSON, name: str) -> str | None:
    return next((entry["value"] for entry in pod["containers"][0]["env"] if entry["name"] == name), None)


def test_when_one_played_pod_fails_all_start_again_under_the_next_number(
    new_operator: NewOperator, space: Space
) -> None:
    new_operator()
    space.submit("demo", SPEC)
    players.succeed(space, players.next_job(space, "demo", "prepare", 1))
    job = training(space)
    for index in (0, 1):
        players.bind(space, players.pod_of(space, job, index))  # else it goes at once when the other one has failed
    space.wait_status("demo", reason="Running")
    players.end(space, job, 21, PEER_LOST, index=1)
    players.end(space, job, 1, "Traceback: boom")
    job = training(space, 2)
    status = space.wait_status("demo", attemptCount=2, reason="Running")
    failed = next(attempt for attempt in status["attempts"] if attempt["stage"] == "train")
    assert (failed["reason"], status["retries"]) == ("Unknown", 1)
    assert "boom" in failed["message"]
    succeed(space, job, 2)
    space.wait_status("demo", phase="Succeeded")


def test_a_foreign_service_of_our_name_is_neither_adopted_nor_changed(new_operator: NewOperator, space: Space) -> None:
    new_operator()
    foreign = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "train-demo"}}
    space.create("services", foreign | {"spec": {"ports": [{"port": 80}]}})
    space.submit("demo", SPEC)
    players.succeed(space, players.next_job(space, "demo", "prepare", 1))
    status = space.wait_status("demo", reason="NameConflict")
    assert "Service train-demo is there already" in status["message"]
    assert space.wait_status("demo", phase="Failed")["reason"] == "NameConflict"
    assert space.read("services", "train-demo")["spec"]["ports"][0]["port"] == 80


def test_the_service_goes_with_its_job(new_operator: NewOperator, space: Space) -> None:
    new_operator()
    space.submit("demo", SPEC)
    players.succeed(space, players.next_job(space, "demo", "prepare", 1))
    players.next_job(space, "demo", "train", 1)
    assert space.names("services") == ["train-demo"]
    space.delete("finetunejobs", "demo")
    wait_for(lambda: not space.names("services"), "the Service gone")


def test_a_claim_that_two_nodes_cannot_share_is_told_before_anything_is_made(
    new_operator: NewOperator, space: Space
) -> None:
    new_operator()
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    body = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "mine"}, "spec": claim}
    space.create("persistentvolumeclaims", body)
    space.submit("demo", SPEC | {"output": {"volume": {"existing": {"claimName": "mine"}}}})
    status = space.wait_status("demo", phase="Failed")
    assert (status["reason"], space.names("jobs")) == ("InvalidSpec", [])
    assert "claim mine is ReadWriteOnce" in status["message"]


def test_what_the_administrator_does_not_allow_is_told_before_anything_is_made(
    new_operator: NewOperator, space: Space
) -> None:
    new_operator(FINETUNE_ENDPOINTS='["https://minio.test"]')
    space.submit("code", spec(model={"volume": VOLUME, "trustRemoteCode": True}))
    space.submit("bucket", spec(datasets=[{"s3": {"uri": "s3://rows/train.jsonl", "endpoint": "https://evil.test"}}]))
    for name, field in {"code": "spec.model.trustRemoteCode", "bucket": "spec.datasets[0].s3.endpoint"}.items():
        status = space.wait_status(name, phase="Failed", reason="NotAllowed")
        assert field in status["message"]
        assert {c["type"]: c["status"] for c in status["conditions"]}["Accepted"] == "False"
    assert space.names("jobs") == []
