"""What the API server itself says of a FineTuneJob."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from cluster.api import Api
from finetune_operator.api import API_VERSION, KIND
from finetune_operator.crd import NAME
from tests.apiserver.api import RefusedError, Space, wait_for
from tests.apiserver.cases import BAD, FINE, GOOD, HUB, JSON, spec

Kubectl = Callable[..., subprocess.CompletedProcess[str]]


def test_the_definition_is_established_and_structural(api: Api) -> None:
    crd = api.get(f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{NAME}")
    assert crd is not None
    conditions = {c["type"]: c["status"] for c in crd["status"]["conditions"]}
    assert conditions == {"NamesAccepted": "True", "Established": "True"}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_spec_is_refused_with_its_own_message(shared_space: Space, case: str) -> None:
    bad, message = BAD[case]
    with pytest.raises(RefusedError) as refusal:
        shared_space.submit("bad", bad)
    assert message in str(refusal.value)


def test_kubectl_apply_says_so_too(kubectl: Kubectl, space: Space) -> None:
    bad, message = BAD["two sources"]
    body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "bad"}, "spec": bad}
    answer = kubectl("apply", "-n", space.namespace, "-f", "-", stdin=json.dumps(body))
    assert answer.returncode != 0
    assert message in answer.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [("a" * 41, "metadata.name: at most 40 characters"), ("a.b", "no dots")],
)
def test_a_name_that_leaves_no_room_for_stages_is_refused(space: Space, name: str, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        space.submit(name, GOOD)


@pytest.mark.parametrize("case", FINE)
def test_recipes_and_what_comes_close_are_taken(space: Space, case: str) -> None:
    assert space.submit("fine", FINE[case])


def test_a_name_of_forty_characters_is_taken(space: Space) -> None:
    assert space.submit("a" * 40, GOOD)


CHANGES: dict[str, Any] = {
    "model": {"volume": {"claimName": "models", "path": "other"}},
    "datasets": [{"volume": {"claimName": "datasets", "path": "other.jsonl"}}],
    "training": {"maxSteps": 7},
    "output": {"volume": {"existing": {"claimName": "other"}}},
    "pod": {"nodeSelector": {"a": "b"}},
    "managedBy": "other.dev/operator",
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_changed_field_is_refused_with_its_name_and_a_way_out(space: Space, field: str) -> None:
    space.submit("fixed", GOOD)
    with pytest.raises(RefusedError, match=f"spec.{field} cannot be changed: delete the FineTuneJob"):
        space.merge("finetunejobs", "fixed", {"spec": {field: CHANGES[field]}})


def test_a_field_cannot_be_taken_away(space: Space) -> None:
    space.submit("fixed", spec(training={"maxSteps": 7}))
    with pytest.raises(RefusedError, match="training cannot be changed"):
        space.merge("finetunejobs", "fixed", {"spec": {"training": None}})


@pytest.mark.parametrize("policy", [{"maxRetries": 9}, {"stopAfter": "Prepare"}, {"activeDeadlineSeconds": 9}])
@pytest.mark.parametrize("before", [{}, {"runPolicy": {"maxRetries": 1, "ttlSecondsAfterFinished": 9}}])
def test_the_policy_of_a_run_cannot_be_changed(space: Space, before: JSON, policy: JSON) -> None:
    space.submit("fixed", spec(**before))
    with pytest.raises(RefusedError, match=f"spec.runPolicy.{next(iter(policy))} cannot be changed"):
        space.merge("finetunejobs", "fixed", {"spec": {"runPolicy": policy}})


@pytest.mark.parametrize("policy", [None, {"maxRetries": 1}, {"ttlSecondsAfterFinished": 9}])
def test_a_running_job_can_be_suspended_resumed_given_a_ttl_and_cancelled(space: Space, policy: JSON | None) -> None:
    space.submit("steered", spec(**({"runPolicy": policy} if policy else {})))
    for change in (
        {"suspend": True},
        {"suspend": False},
        {"suspend": None},
        {"runPolicy": {"ttlSecondsAfterFinished": 60}},
        {"runPolicy": {"ttlSecondsAfterFinished": None}},
        {"cancel": False},
        {"cancel": True},
    ):
        space.merge("finetunejobs", "steered", {"spec": change})
    for back in (False, None):
        with pytest.raises(RefusedError, match=r"spec\.cancel cannot be taken back"):
            space.merge("finetunejobs", "steered", {"spec": {"cancel": back}})


def test_labels_can_be_changed(space: Space) -> None:
    space.submit("fixed", GOOD)
    changed = space.merge("finetunejobs", "fixed", {"metadata": {"labels": {"team": "a"}}})
    assert changed["metadata"]["labels"] == {"team": "a"}


def test_only_what_depends_on_nothing_has_a_default(space: Space) -> None:
    stored: JSON = space.submit("short", spec(model={"huggingFace": HUB}))["spec"]
    assert stored == spec(model={"huggingFace": HUB | {"revision": "main"}})


def test_quantities_may_be_numbers(space: Space) -> None:
    stored = space.submit("numbers", spec(pod={"resources": {"requests": {"cpu": 2, "memory": "4Gi"}}}))["spec"]
    assert stored["pod"]["resources"]["requests"] == {"cpu": 2, "memory": "4Gi"}


def test_explain_tells_what_a_person_needs(kubectl: Kubectl, space: Space) -> None:
    said = wait_for(lambda: kubectl("explain", "ftj.spec.method", "-n", space.namespace).stdout, "the schema told")
    said = " ".join(said.split())
    for words in ("What is trained and how the base is held.", "lora", "enum: QLoRA, LoRA, Full", "Default QLoRA."):
        assert words in said


def test_the_example_is_taken(kubectl: Kubectl, space: Space) -> None:
    answer = kubectl("apply", "--validate=strict", "-n", space.namespace, "-f", "examples/quickstart.yaml")
    assert "quickstart created" in answer.stdout
    table = kubectl("get", "ftj", "-o", "wide", "-n", space.namespace).stdout.split("\n")[0].split()
    assert table == ["NAME", "PHASE", "PROGRESS", "LOSS", "ETA", "REASON", "ATTEMPT", "TOKENS/S", "AGE"]
