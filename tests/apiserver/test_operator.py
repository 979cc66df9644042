"""The operator as a process against a real API server and the real Job controller and garbage collector.

No kubelet: pods are played by the test, and say their last words as the trainer would.
"""

from __future__ import annotations

import json
import re

import pytest

from finetune_operator.api import API_VERSION, KIND, Label
from finetune_trainer.progress import ExitCode, Progress, Reason, Stage
from tests.apiserver import players
from tests.apiserver.api import Space, wait_for
from tests.apiserver.cases import WHOLE
from tests.apiserver.conftest import Operator, quiet_for
from tests.apiserver.webhook import broken_webhook
from tests.unit.operator.builders import word

LINE = {
    "prepare": "Preparing",
    "train": "Training",
    "merge": "Merging",
    "quantize-0": "Quantizing",
    "publish-0": "Publishing",
}
"""Every stage, and the phase while it runs."""
SPEC = WHOLE

pytestmark = pytest.mark.usefixtures("operator")


# --- the line --------------------------------------------------------------------------------------------------------


def test_played_pods_take_a_job_through_the_whole_line(space: Space) -> None:
    made = space.submit("demo", SPEC)
    for stage, phase in LINE.items():
        job = players.next_job(space, "demo", stage, 1)
        players.run(space, job)
        space.wait_status("demo", phase=phase, reason="Running")
        players.succeed(space, job)
    status = space.wait_status("demo", phase="Succeeded")
    assert space.names("jobs") == sorted(f"demo-{stage}-1" for stage in LINE)
    assert status["attemptCount"] == 1
    assert [artifact["name"] for artifact in status["artifacts"]] == ["train", "merge", "quantize-0"]
    places = {each["name"]: [one["uri"] for one in each.get("published", ())] for each in status["artifacts"]}
    assert places == {"train": [], "merge": ["s3://models/demo"], "quantize-0": []}
    uid = space.read("finetunejobs", "demo")["metadata"]["uid"]
    assert space.names("persistentvolumeclaims") == [f"demo-{uid[:8]}"]
    config = space.read("configmaps", "demo-config")
    assert (config["immutable"], json.loads(config["data"]["job.json"])) == (True, SPEC)
    wait_for(lambda: "Succeeded" in reasons_told(space), "the Event of the end, which comes after the status")
    assert reasons_told(space) - {"Pending"} == {*LINE.values(), "Succeeded"}, "a pod that runs at once never waited"
    writes = space.history("demo", made["metadata"]["resourceVersion"])
    print(f"{len(writes)} status writes for a job of {len(LINE)} stages")
    assert len(LINE) < len(writes) <= 3 * len(LINE) + 2


def reasons_told(space: Space) -> set[str]:
    """Of the Events of FineTuneJobs."""
    return {event["reason"] for event in space.all("events") if event["involvedObject"]["kind"] == KIND}


def test_a_running_job_of_played_pods_is_written_only_when_something_changes(space: Space) -> None:
    space.submit("demo", SPEC)
    players.run(space, players.next_job(space, "demo", "prepare", 1))
    space.wait_status("demo", phase="Preparing")
    assert quiet_for(3, lambda: space.version("demo"))


def test_a_pod_asked_of_played_pods_passes_pod_security_and_holds_no_token(space: Space) -> None:
    space.submit("demo", SPEC)
    pod = players.pod_of(space, players.next_job(space, "demo", "prepare", 1))  # admitted under `restricted`
    assert pod["spec"]["automountServiceAccountToken"] is False
    volumes = [volume["name"] for volume in pod["spec"]["volumes"]]
    assert volumes == ["work", "config", "tmp", "source-0", "source-1", "secret-publish-0"]


# --- progress --------------------------------------------------------------------------------------------------------


def test_played_pods_progress_reaches_the_status(space: Space, teller: tuple[str, list[Progress]]) -> None:
    address, told = teller
    space.submit("demo", SPEC)
    players.succeed(space, players.next_job(space, "demo", "prepare", 1))
    told.append(Progress(stage=Stage.TRAIN, attempt=1, activity="training", done=128, total=300, loss=1.20441))
    players.run(space, players.next_job(space, "demo", "train", 1), address)
    status = space.wait_status("demo", progress="128/300 (42%)")
    assert status["training"]["loss"] == "1.204"
    told.append(told[0].model_copy(update={"done": 200, "eta_seconds": 600.0}))
    assert space.wait_status("demo", progress="200/300 (66%)")["training"]["eta"] == "10m"


def test_the_only_figure_of_played_pods_training_can_be_taken_back(
    space: Space, teller: tuple[str, list[Progress]]
) -> None:
    address, told = teller
    space.submit("demo", SPEC)
    players.succeed(space, players.next_job(space, "demo", "prepare", 1))
    measuring = Progress(stage=Stage.TRAIN, attempt=1, activity="measuring", done=13, total=16, unit="rows")
    told.append(measuring.model_copy(update={"eta_seconds": 9.0}))
    players.run(space, players.next_job(space, "demo", "train", 1), address)
    assert space.wait_status("demo", progress="13/16 (81%)")["training"] == {"eta": "9s"}
    told.append(measuring.model_copy(update={"done": 16}))
    assert "training" not in space.wait_status("demo", progress="16/16 (100%)")


# --- mishaps ---------------------------------------------------------------------------------------------------------


def test_a_lost_word_of_played_pods_runs_the_stage_again(space: Space) -> None:
    space.submit("demo", SPEC)
    players.end(space, players.next_job(space, "demo", "prepare", 1), 0, "no JSON at all")
    players.succeed(space, players.next_job(space, "demo", "prepare", 2))
    players.next_job(space, "demo", "train", 2)
    status = space.wait_status("demo", attemptCount=2)
    assert (status["attempts"][0]["reason"], status["retries"]) == ("LostWord", 0)


def test_played_pods_that_crash_are_retried_so_often_and_no_more(space: Space) -> None:
    space.submit("demo", SPEC | {"runPolicy": {"maxRetries": 2}})
    for attempt in (1, 2, 3):
        players.end(space, players.next_job(space, "demo", "prepare", attempt), 1, "Traceback: boom")
    status = space.wait_status("demo", phase="Failed")
    assert (status["reason"], status["retries"], len(space.names("jobs"))) == ("Unknown", 2, 3)
    assert "boom" in status["message"]


def test_what_played_pods_cannot_mend_ends_at_once(space: Space) -> None:
    space.submit("demo", SPEC)
    last = word("prepare", 1).model_copy(update={"reason": Reason.INVALID_DATASET, "message": "line 3: no JSON."})
    players.end(space, players.next_job(space, "demo", "prepare", 1), 11, last.to_json())
    status = space.wait_status("demo", phase="Failed")
    assert (status["reason"], status["message"]) == ("InvalidDataset", "line 3: no JSON.")
    assert space.names("jobs") == ["demo-prepare-1"]


def test_a_gate_that_fires_in_a_played_pod_publishes_nothing(space: Space) -> None:
    space.submit("demo", SPEC)
    for stage in ("prepare", "train", "merge"):
        players.succeed(space, players.next_job(space, "demo", stage, 1))
    figures = "gptq4: the perplexity rose by 16.57%, maxPerplexityIncreasePercent is 5."
    last = word("quantize-0", 1, Reason.GATE_FAILED, figures).to_json()
    players.end(space, players.next_job(space, "demo", "quantize-0", 1), ExitCode.GATE_FAILED.value, last)
    status = space.wait_status("demo", phase="Failed")
    assert (status["reason"], status["message"], status["retries"]) == ("GateFailed", figures, 0)
    assert space.names("jobs") == sorted(f"demo-{stage}-1" for stage in LINE if stage != "publish-0")
    assert not any("published" in artifact for artifact in status["artifacts"])


def test_a_deleted_stage_job_of_played_pods_is_run_again(space: Space) -> None:
    space.submit("demo", SPEC)
    job = players.next_job(space, "demo", "prepare", 1)
    players.pod_of(space, job)
    space.wait_status("demo", attemptCount=1)
    space.delete("jobs", job)
    players.next_job(space, "demo", "prepare", 2)
    assert space.wait_status("demo", attemptCount=2)["attempts"][0]["reason"] == "JobDeleted"


def test_an_image_played_as_not_pulled_is_told_at_once_and_ends_the_job(space: Space) -> None:
    made = space.submit("demo", SPEC)
    pod = players.pod_of(space, players.next_job(space, "demo", "prepare", 1))
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    players.patch_pod(space, pod, {"containerStatuses": players.container(waiting)})
    status = space.wait_status("demo", phase="Failed")
    assert (status["reason"], space.names("jobs")) == ("ImagePullFailed", [])
    told = [each["status"] for each in space.history("demo", made["metadata"]["resourceVersion"])]
    assert ("Pending", "ImagePullFailed") in [(each["phase"], each["reason"]) for each in told]


def test_a_quota_that_refuses_the_pod_is_told(space: Space) -> None:
    limit(space, pods="0")
    space.submit("demo", SPEC)
    assert "exceeded quota" in space.wait_status("demo", reason="QuotaExceeded")["message"]


def limit(space: Space, **hard: str) -> None:
    """A quota, once it is in force."""
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "limit"}, "spec": {"hard": hard}}
    path = f"/api/v1/namespaces/{space.namespace}/resourcequotas"
    space.call("POST", path, quota)
    wait_for(lambda: (space.api.get(f"{path}/limit") or {}).get("status", {}).get("hard"), "the quota in force")


def test_a_stage_job_that_a_quota_refuses_is_told_and_made_when_there_is_room(space: Space) -> None:
    limit(space, **{"count/jobs.batch": "0"})
    space.submit("demo", SPEC)
    status = space.wait_status("demo", reason="QuotaExceeded")
    assert "Job demo-prepare-1 cannot be created: jobs.batch" in status["message"]
    assert (status["phase"], status["attemptCount"]) == ("Pending", 0)
    assert quiet_for(3, lambda: space.version("demo"))
    space.call("DELETE", f"/api/v1/namespaces/{space.namespace}/resourcequotas/limit")
    players.run(space, players.next_job(space, "demo", "prepare", 1))
    assert space.wait_status("demo", reason="Running")["phase"] == "Preparing"


def test_a_quota_that_the_job_itself_used_up_holds_no_stage_up(space: Space) -> None:
    space.submit("demo", SPEC)
    prepare = players.next_job(space, "demo", "prepare", 1)
    limit(space, persistentvolumeclaims="1")
    players.succeed(space, prepare)
    players.next_job(space, "demo", "train", 1)


def test_a_webhook_that_fails_is_told_and_tried_again_ever_later(space: Space, operator: Operator) -> None:
    with broken_webhook(space):
        space.submit("demo", SPEC)
        status = space.wait_status("demo", reason="CreationRefused")
        assert "failed calling webhook" in status["message"]
        tries = len(re.findall("failed calling webhook", operator.log.read_text()))
        assert quiet_for(5, lambda: space.version("demo"))
        assert 1 <= len(re.findall("failed calling webhook", operator.log.read_text())) - tries <= 6
        assert space.status("demo")["phase"] == "Pending"


def test_a_stage_job_that_the_api_server_finds_invalid_ends_the_job_with_its_word(space: Space) -> None:
    resources = {"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}
    space.submit("demo", SPEC | {"pod": {"resources": resources}})
    status = space.wait_status("demo", phase="Failed")
    assert status["reason"] == "InvalidSpec"
    assert "must be less than or equal to cpu limit" in status["message"]


# --- names -----------------------------------------------------------------------------------------------------------


def test_a_deleted_job_takes_its_children_along_but_not_its_claim(space: Space) -> None:
    space.submit("demo", SPEC)
    players.run(space, players.next_job(space, "demo", "prepare", 1))
    space.wait_status("demo", phase="Preparing")
    space.delete("finetunejobs", "demo")
    wait_for(lambda: not space.names("jobs") and "demo-config" not in space.names("configmaps"), "the children gone")
    assert len(space.names("persistentvolumeclaims")) == 1


def test_a_claim_to_be_deleted_goes_with_its_job(space: Space) -> None:
    space.submit("demo", SPEC | {"output": {"retentionPolicy": {"whenDeleted": "Delete"}}})
    players.next_job(space, "demo", "prepare", 1)
    claim = space.names("persistentvolumeclaims")[0]
    assert space.read("persistentvolumeclaims", claim)["metadata"]["ownerReferences"][0]["name"] == "demo"


def test_a_recreated_namesake_starts_anew_with_played_pods(space: Space) -> None:
    first = space.submit("demo", SPEC)["metadata"]["uid"]
    players.succeed(space, players.next_job(space, "demo", "prepare", 1))
    players.next_job(space, "demo", "train", 1)
    space.delete("finetunejobs", "demo")
    second = space.submit("demo", SPEC)["metadata"]["uid"]

    def ours() -> bool:
        job = space.find("jobs", "demo-prepare-1")
        return job is not None and job["metadata"]["labels"][Label.JOB_UID] == second

    wait_for(ours, "the second job's own prepare")
    status = space.wait_status("demo", attemptCount=1)
    assert status["folder"] == f"demo-{second[:8]}" != f"demo-{first[:8]}"
    assert status["stages"][0].get("manifestDigest") is None
    assert len(space.names("persistentvolumeclaims")) == 2


def test_a_foreign_object_of_our_name_is_neither_adopted_nor_deleted(space: Space) -> None:
    foreign = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "demo-config"}, "data": {"mine": "yes"}}
    space.create("configmaps", foreign)
    space.submit("demo", SPEC)
    status = space.wait_status("demo", reason="NameConflict")
    assert "ConfigMap demo-config is there already" in status["message"]
    assert space.wait_status("demo", phase="Failed")["reason"] == "NameConflict"
    found = space.read("configmaps", "demo-config")
    assert (found["data"], found["metadata"].get("ownerReferences")) == ({"mine": "yes"}, None)
    assert space.names("jobs") == []


def test_a_stored_spec_of_another_version_is_refused_without_a_crash(space: Space) -> None:
    """The schema lets through what only the operator can judge: here a field that the CRD of another version had."""
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/finetunejobs.finetune.dev"
    crd = space.call("GET", path)
    properties = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    properties["future"] = {"type": "string"}
    space.call("PUT", path, crd)

    def stored() -> bool:
        created = space.call(
            "POST",
            space.path("finetunejobs"),
            {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "metadata": {"generateName": "demo-"},
                "spec": SPEC | {"future": "x"},
            },
        )
        names.append(created["metadata"]["name"])
        return "future" in created["spec"]

    names: list[str] = []
    try:
        wait_for(stored, "the newer CRD in service")
        status = space.wait_status(names[-1], phase="Failed")
    finally:
        crd = space.call("GET", path)
        properties = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
        del properties["future"]
        space.call("PUT", path, crd)
    assert status["reason"] == "InvalidSpec"
    assert "spec.future: unknown to this version of the operator" in status["message"]
    conditions = {c["type"]: c["status"] for c in status["conditions"]}
    assert conditions == {"Accepted": "False", "Succeeded": "False", "Finished": "True"}
