"""The operator as a process against a real API server and the real Job controller and garbage collector.

No kubelet: pods are played by the test, and say their last words as the trainer would.
"""

from __future__ import annotations

import http.server
import json
import os
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator

import pytest

from finetune_operator.api import API_VERSION, KIND, Label
from finetune_trainer.progress import PROGRESS_PORT, Progress, Stage
from tests.apiserver import players
from tests.apiserver.api import JSON, Space, wait_for
from tests.apiserver.cases import spec
from tests.apiserver.conftest import Operator, quiet_for
from tests.unit.operator.builders import word

NewOperator = Callable[..., Operator]
LINE = ("prepare", "train", "merge", "quantize-0")
SPEC = spec(parallelism={"gpusPerNode": 0}, quantize=[{"name": "gptq4", "method": "GPTQ"}])
MEMORY_LIMIT_MIB = 80


def version(space: Space, name: str) -> str:
    found: str = space.read("finetunejobs", name)["metadata"]["resourceVersion"]
    return found


def status_writes(space: Space, name: str) -> list[JSON]:
    """Every version of the resource since it was made, out of etcd's history."""
    listed = space.api.call(
        "GET", f"{space.path('finetunejobs')}?watch=true&resourceVersion=1&timeoutSeconds=2"
    ).decode()
    events = [json.loads(line) for line in listed.splitlines()]
    return [e["object"] for e in events if e["type"] != "ERROR" and e["object"]["metadata"]["name"] == name]


def get(operator: Operator, path: str) -> int:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{operator.port}{path}", timeout=5) as answer:
            return int(answer.status)
    except OSError:
        return 0


# --- the line --------------------------------------------------------------------------------------------------------


def test_played_pods_take_a_job_through_the_whole_line(operator: Operator, space: Space) -> None:
    space.submit("demo", SPEC)
    phases = []
    for attempt, stage in enumerate(LINE, start=1):
        job = players.next_job(space, "demo", stage, attempt)
        players.run(space, job)
        phases.append(space.wait_status("demo", reason="Running")["phase"])
        players.succeed(space, job)
    status = space.wait_status("demo", phase="Succeeded")
    assert phases == ["Preparing", "Training", "Merging", "Quantizing"]
    assert space.names("jobs") == sorted(f"demo-{stage}-{n}" for n, stage in enumerate(LINE, start=1))
    assert [artifact["name"] for artifact in status["artifacts"]] == ["train", "merge", "quantize-0"]
    uid = space.read("finetunejobs", "demo")["metadata"]["uid"]
    assert space.names("persistentvolumeclaims") == [f"demo-{uid[:8]}"]
    config = space.read("configmaps", "demo-config")
    assert (config["immutable"], json.loads(config["data"]["job.json"])) == (True, SPEC)
    reasons = {event["reason"] for event in space.all("events") if event["involvedObject"]["kind"] == KIND}
    assert reasons == {"Pending", "Preparing", "Training", "Merging", "Quantizing", "Succeeded"}
    writes = status_writes(space, "demo")
    print(f"{len(writes) - 1} status writes for a job of {len(LINE)} stages")
    assert len(writes) - 1 <= 4 * len(LINE) + 2
    assert operator.running.poll() is None


def test_a_finished_job_and_an_idle_operator_write_nothing(new_operator: NewOperator, space: Space) -> None:
    operator = new_operator(FINETUNE_RESYNC_SECONDS="0.5")
    space.submit("demo", spec(merge={"policy": "Never"}))
    for attempt, stage in enumerate(("prepare", "train"), start=1):
        players.succeed(space, players.next_job(space, "demo", stage, attempt))
    space.wait_status("demo", phase="Succeeded")
    assert quiet_for(2, lambda: version(space, "demo"))
    operator.restart()
    wait_for(lambda: get(operator, "/readyz") == 200, "the operator watching again")
    assert quiet_for(2, lambda: version(space, "demo"))


def test_a_running_job_of_played_pods_is_written_only_when_something_changes(operator: Operator, space: Space) -> None:
    space.submit("demo", SPEC)
    players.run(space, players.next_job(space, "demo", "prepare", 1))
    space.wait_status("demo", phase="Preparing")
    assert quiet_for(3, lambda: version(space, "demo"))
    assert operator.running.poll() is None


def test_a_pod_asked_of_played_pods_passes_pod_security_and_holds_no_token(operator: Operator, space: Space) -> None:
    space.submit("demo", SPEC)
    pod = players.pod_of(space, players.next_job(space, "demo", "prepare", 1))  # admitted under `restricted`
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert [volume["name"] for volume in pod["spec"]["volumes"]] == ["work", "config", "tmp", "source-0", "source-1"]
    assert operator.running.poll() is None


# --- progress --------------------------------------------------------------------------------------------------------


@pytest.fixture
def teller() -> Iterator[tuple[str, list[Progress]]]:
    """A pod's /progress on an address of its own; the list's last entry is told."""
    told: list[Progress] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = told[-1].to_json().encode()
            self.send_response(200 if self.path == "/progress" else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            return

    address = f"127.{os.getpid() % 200 + 20}.7.9"
    server = http.server.ThreadingHTTPServer((address, PROGRESS_PORT), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield address, told
    server.shutdown()
    server.server_close()


def test_played_pods_progress_reaches_the_status(
    operator: Operator, space: Space, teller: tuple[str, list[Progress]]
) -> None:
    address, told = teller
    space.submit("demo", SPEC)
    players.succeed(space, players.next_job(space, "demo", "prepare", 1))
    told.append(Progress(stage=Stage.TRAIN, attempt=2, activity="training", done=128, total=300, loss=1.20441))
    players.run(space, players.next_job(space, "demo", "train", 2), address)
    status = space.wait_status("demo", progress="128/300 (42%)")
    assert status["training"]["loss"] == "1.204"
    told.append(told[0].model_copy(update={"done": 200, "eta_seconds": 600.0}))
    assert space.wait_status("demo", progress="200/300 (66%)")["training"]["eta"] == "10m"
    assert operator.running.poll() is None


# --- restarts --------------------------------------------------------------------------------------------------------


def test_an_operator_killed_in_every_stage_of_played_pods_changes_nothing(operator: Operator, space: Space) -> None:
    space.submit("demo", SPEC)
    uids: dict[str, str] = {}
    for attempt, stage in enumerate(LINE, start=1):
        job = players.next_job(space, "demo", stage, attempt)
        operator.kill()  # often before the status of this attempt is written
        uids[job] = space.read("jobs", job)["metadata"]["uid"]
        operator.start()
        players.run(space, job)
        space.wait_status("demo", reason="Running", attemptCount=attempt)
        operator.kill()
        players.succeed(space, job)
        operator.start()
    status = space.wait_status("demo", phase="Succeeded")
    assert {name: space.read("jobs", name)["metadata"]["uid"] for name in space.names("jobs")} == uids
    assert len(uids) == len(LINE)
    assert [stage["manifestDigest"] for stage in status["stages"]] == [f"{stage}-digest" for stage in LINE]
    assert status["retries"] == 0


def test_a_status_lost_with_played_pods_is_told_again(operator: Operator, space: Space) -> None:
    space.submit("demo", SPEC)
    players.succeed(space, players.next_job(space, "demo", "prepare", 1))
    players.next_job(space, "demo", "train", 2)
    operator.kill()
    space.call(
        "PATCH", space.path("finetunejobs", "demo") + "/status", {"status": None}, "application/merge-patch+json"
    )
    operator.start()
    status = space.wait_status("demo", attemptCount=2)
    assert status["stages"][0]["manifestDigest"] == "prepare-digest"
    assert space.names("jobs") == ["demo-prepare-1", "demo-train-2"]


# --- mishaps ---------------------------------------------------------------------------------------------------------


def test_a_lost_word_of_played_pods_runs_the_stage_again(operator: Operator, space: Space) -> None:
    space.submit("demo", SPEC)
    players.end(space, players.next_job(space, "demo", "prepare", 1), 0, "no JSON at all")
    players.succeed(space, players.next_job(space, "demo", "prepare", 2))
    players.next_job(space, "demo", "train", 3)
    status = space.wait_status("demo", attemptCount=3)
    assert (status["attempts"][0]["reason"], status["retries"]) == ("LostWord", 0)
    assert operator.running.poll() is None


def test_played_pods_that_crash_are_retried_so_often_and_no_more(operator: Operator, space: Space) -> None:
    space.submit("demo", SPEC | {"runPolicy": {"maxRetries": 2}})
    for attempt in (1, 2, 3):
        players.end(space, players.next_job(space, "demo", "prepare", attempt), 1, "Traceback: boom")
    status = space.wait_status("demo", phase="Failed")
    assert (status["reason"], status["retries"], len(space.names("jobs"))) == ("Unknown", 2, 3)
    assert "boom" in status["message"]
    assert operator.running.poll() is None


def test_what_played_pods_cannot_mend_ends_at_once(operator: Operator, space: Space) -> None:
    space.submit("demo", SPEC)
    last = word("prepare", 1).model_copy(update={"reason": "InvalidDataset", "message": "line 3: no JSON."})
    players.end(space, players.next_job(space, "demo", "prepare", 1), 11, last.to_json())
    status = space.wait_status("demo", phase="Failed")
    assert (status["reason"], status["message"]) == ("InvalidDataset", "line 3: no JSON.")
    assert space.names("jobs") == ["demo-prepare-1"]
    assert operator.running.poll() is None


def test_a_deleted_stage_job_of_played_pods_is_run_again(operator: Operator, space: Space) -> None:
    space.submit("demo", SPEC)
    job = players.next_job(space, "demo", "prepare", 1)
    players.pod_of(space, job)
    space.wait_status("demo", attemptCount=1)
    space.delete("jobs", job)
    players.next_job(space, "demo", "prepare", 2)
    assert space.wait_status("demo", attemptCount=2)["attempts"][0]["reason"] == "JobDeleted"
    assert operator.running.poll() is None


def test_an_image_played_as_not_pulled_is_told_at_once_and_ends_the_job(operator: Operator, space: Space) -> None:
    space.submit("demo", SPEC)
    pod = players.pod_of(space, players.next_job(space, "demo", "prepare", 1))
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    players.patch_pod(space, pod, {"containerStatuses": players.container(waiting)})
    status = space.wait_status("demo", reason="ImagePullFailed")
    assert status["phase"] == "Pending"
    status = space.wait_status("demo", phase="Failed")
    assert (status["reason"], space.names("jobs")) == ("ImagePullFailed", [])
    assert operator.running.poll() is None


def test_a_quota_that_refuses_the_pod_is_told(operator: Operator, space: Space) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}}
    space.call("POST", f"/api/v1/namespaces/{space.namespace}/resourcequotas", quota)
    path = f"/api/v1/namespaces/{space.namespace}/resourcequotas/none"
    wait_for(lambda: (space.api.get(path) or {}).get("status", {}).get("hard"), "the quota in force")
    space.submit("demo", SPEC)
    assert "exceeded quota" in space.wait_status("demo", reason="QuotaExceeded")["message"]
    assert operator.running.poll() is None


# --- names -----------------------------------------------------------------------------------------------------------


def test_a_deleted_job_takes_its_children_along_but_not_its_claim(operator: Operator, space: Space) -> None:
    space.submit("demo", SPEC)
    players.run(space, players.next_job(space, "demo", "prepare", 1))
    space.wait_status("demo", phase="Preparing")
    space.delete("finetunejobs", "demo")
    wait_for(lambda: not space.names("jobs") and "demo-config" not in space.names("configmaps"), "the children gone")
    assert len(space.names("persistentvolumeclaims")) == 1
    assert operator.running.poll() is None


def test_a_claim_to_be_deleted_goes_with_its_job(operator: Operator, space: Space) -> None:
    space.submit("demo", SPEC | {"output": {"retentionPolicy": {"whenDeleted": "Delete"}}})
    players.next_job(space, "demo", "prepare", 1)
    claim = space.names("persistentvolumeclaims")[0]
    assert space.read("persistentvolumeclaims", claim)["metadata"]["ownerReferences"][0]["name"] == "demo"
    assert operator.running.poll() is None


def test_a_recreated_namesake_starts_anew_with_played_pods(operator: Operator, space: Space) -> None:
    first = space.submit("demo", SPEC)["metadata"]["uid"]
    players.succeed(space, players.next_job(space, "demo", "prepare", 1))
    players.next_job(space, "demo", "train", 2)
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
    assert operator.running.poll() is None


def test_a_foreign_object_of_our_name_is_neither_adopted_nor_deleted(operator: Operator, space: Space) -> None:
    foreign = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "demo-config"}, "data": {"mine": "yes"}}
    space.create("configmaps", foreign)
    space.submit("demo", SPEC)
    status = space.wait_status("demo", reason="NameConflict")
    assert "ConfigMap demo-config is there already" in status["message"]
    assert space.wait_status("demo", phase="Failed")["reason"] == "NameConflict"
    found = space.read("configmaps", "demo-config")
    assert (found["data"], found["metadata"].get("ownerReferences")) == ({"mine": "yes"}, None)
    assert space.names("jobs") == []
    assert operator.running.poll() is None


def test_a_foreign_object_that_goes_away_lets_the_job_start(new_operator: NewOperator, space: Space) -> None:
    operator = new_operator(FINETUNE_START_DEADLINE_SECONDS="60")
    space.create("configmaps", {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "demo-config"}})
    space.submit("demo", SPEC)
    space.wait_status("demo", reason="NameConflict")
    space.delete("configmaps", "demo-config")
    players.next_job(space, "demo", "prepare", 1)
    assert operator.running.poll() is None


def test_a_stored_spec_of_another_version_is_refused_without_a_crash(
    operator: Operator, space: Space, kubectl: Callable[..., object]
) -> None:
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
    assert operator.running.poll() is None


# --- the process -----------------------------------------------------------------------------------------------------


def test_an_idle_operator_is_light_ready_and_ends_on_a_signal(operator: Operator) -> None:
    wait_for(lambda: get(operator, "/readyz") == 200, "the operator ready")
    assert get(operator, "/healthz") == 200
    time.sleep(1)  # so that what it took to start is released
    memory = operator.memory_mib("Rss")
    print(f"idle: RSS {memory:.1f} MiB, PSS {operator.memory_mib():.1f} MiB")
    assert memory < MEMORY_LIMIT_MIB
    assert operator.stop() == 0


def test_an_operator_survives_an_api_server_that_goes_away(
    operator: Operator, space: Space, control_plane: object
) -> None:
    wait_for(lambda: get(operator, "/readyz") == 200, "the operator ready")
    control_plane.stop()  # type: ignore[attr-defined]
    control_plane.start()  # type: ignore[attr-defined]
    space.submit("demo", SPEC)
    players.next_job(space, "demo", "prepare", 1)
    assert (operator.running.poll(), get(operator, "/healthz")) == (None, 200)
