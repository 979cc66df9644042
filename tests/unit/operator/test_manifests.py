"""The objects the operator makes."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator import names
from finetune_operator.api import JSON
from finetune_operator.manifests import build_claim, build_config_map, build_stage_job
from finetune_operator.names import Step, line
from tests.unit.operator.builders import SETTINGS, SPEC, WHOLE, a_job

GPU = SPEC | {"parallelism": {"gpusPerNode": 1}}
HUB = SPEC | {"model": {"huggingFace": {"repo": "a/b", "tokenSecretRef": {"name": "hf", "key": "token"}}}}


def step(key: str) -> Step:
    return next(step for step in line(a_job(WHOLE).valid_spec) if step.key == key)


def pod(key: str, spec: JSON = SPEC, **settings: Any) -> JSON:
    job = build_stage_job(a_job(spec), step(key), 3, SETTINGS.model_copy(update=settings))
    found: JSON = job["spec"]["template"]["spec"]
    return found


def container(key: str, spec: JSON = SPEC, **settings: Any) -> JSON:
    found: JSON = pod(key, spec, **settings)["containers"][0]
    return found


def mounts(key: str, spec: JSON = SPEC) -> dict[str, str]:
    return {mount["mountPath"]: mount["name"] for mount in container(key, spec)["volumeMounts"]}


def test_the_trainer_is_called_with_its_stage_its_folder_and_its_attempt() -> None:
    arguments = " ".join(container("quantize-0", WHOLE)["args"])
    assert arguments == (
        "quantize --config /etc/finetune/job.json --work /work/demo-0123abcd"
        " --attempt 3 --progress-port 8080 --name gptq4"
    )
    assert "--name" not in container("train")["args"]


def test_a_stage_job_runs_once_and_is_never_retried_by_kubernetes() -> None:
    job = build_stage_job(a_job(), step("train"), 3, SETTINGS)
    spec = job["spec"]
    assert job["metadata"]["name"] == "demo-train-3"
    assert (spec["backoffLimit"], spec["completions"], spec["parallelism"]) == (0, 1, 1)
    assert (spec["podReplacementPolicy"], spec["template"]["spec"]["restartPolicy"]) == ("Failed", "Never")
    assert job["metadata"]["ownerReferences"][0]["uid"] == a_job().uid
    assert "blockOwnerDeletion" not in job["metadata"]["ownerReferences"][0]


@pytest.mark.parametrize("key", ["prepare", "train", "merge", "quantize-0"])
def test_every_pod_is_restricted_and_knows_nothing_of_the_cluster(key: str) -> None:
    spec = pod(key, WHOLE)
    inside = spec["containers"][0]["securityContext"]
    assert (spec["automountServiceAccountToken"], spec["enableServiceLinks"]) == (False, False)
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert (inside["readOnlyRootFilesystem"], inside["allowPrivilegeEscalation"]) == (True, False)
    assert inside["capabilities"] == {"drop": ["ALL"]}


def test_only_prepare_sees_sources_and_token_and_reaches_the_hub() -> None:
    mirror = {"HF_ENDPOINT": "https://mirror.test"}
    prepare = {e["name"]: e["value"] for e in container("prepare", trainer_env=mirror)["env"]}
    train = {e["name"]: e["value"] for e in container("train", trainer_env=mirror)["env"]}
    assert (prepare, train) == (mirror | {"HOME": "/tmp"}, {"HF_HUB_OFFLINE": "1", "HOME": "/tmp"})  # noqa: S108
    assert mounts("prepare") == {
        "/work": "work",
        "/etc/finetune": "config",
        "/tmp": "tmp",  # noqa: S108
        "/sources/models": "source-0",
        "/sources/datasets": "source-1",
    }
    assert mounts("train").keys() == {"/work", "/etc/finetune", "/tmp", "/dev/shm"}  # noqa: S108
    assert "/secrets" in mounts("prepare", HUB)
    assert "/secrets" not in mounts("train", HUB)


def test_a_claim_used_twice_is_one_volume() -> None:
    both = {"volume": {"claimName": "one", "path": "x"}}
    spec = SPEC | {"model": both, "datasets": [both], "output": {"volume": {"existing": {"claimName": "one"}}}}
    assert [v["name"] for v in pod("prepare", spec)["volumes"]] == ["work", "config", "tmp"]
    assert mounts("prepare", spec)["/sources/one"] == mounts("prepare", spec)["/work"] == "work"
    names_of_mounts = [m for m in container("prepare", spec)["volumeMounts"] if m["mountPath"] == "/sources/one"]
    assert names_of_mounts[0]["readOnly"]


def test_sources_are_read_only_down_to_the_volume() -> None:
    volumes = {v["name"]: v for v in pod("prepare")["volumes"]}
    assert volumes["source-0"]["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}
    assert "readOnly" not in volumes["work"]["persistentVolumeClaim"]


@pytest.mark.parametrize(("key", "gpus"), [("prepare", None), ("train", "1"), ("merge", "1"), ("quantize-0", "1")])
def test_stages_that_run_the_model_hold_the_gpu(key: str, gpus: str | None) -> None:
    resources = container(key, GPU | {"quantize": WHOLE["quantize"]})["resources"]
    assert resources.get("limits", {}).get("nvidia.com/gpu") == gpus
    assert "nvidia.com/gpu" not in resources["requests"]


def test_the_jobs_resources_replace_the_charts() -> None:
    assert container("train")["resources"] == {"requests": {"cpu": "1", "memory": "4Gi"}}
    wish = {"requests": {"cpu": 2}, "limits": {"memory": "8Gi"}}
    assert container("train", SPEC | {"pod": {"resources": wish}})["resources"] == {
        "requests": {"cpu": "2"},
        "limits": {"memory": "8Gi"},
    }


def test_a_lost_node_is_left_after_30_seconds_unless_the_job_says_otherwise() -> None:
    seconds = {t["key"]: t["tolerationSeconds"] for t in pod("train")["tolerations"]}
    assert seconds == {"node.kubernetes.io/not-ready": 30, "node.kubernetes.io/unreachable": 30}
    own = {"key": "node.kubernetes.io/not-ready", "operator": "Exists", "tolerationSeconds": 5}
    theirs = pod("train", SPEC | {"pod": {"tolerations": [own]}})["tolerations"]
    assert [t["tolerationSeconds"] for t in theirs] == [5, 30]


def test_the_pods_wishes_are_passed_on() -> None:
    wishes = {
        "nodeSelector": {"zone": "a"},
        "priorityClassName": "low",
        "runtimeClassName": "nvidia",
        "imagePullSecrets": [{"name": "registry"}],
    }
    spec = pod("train", SPEC | {"pod": wishes})
    assert {name: spec[name] for name in wishes} == wishes


def test_a_created_claim_outlives_the_job_unless_told_otherwise() -> None:
    kept = build_claim(a_job(), SETTINGS)
    assert kept is not None
    assert kept["metadata"]["name"] == "demo-0123abcd"
    assert "ownerReferences" not in kept["metadata"]
    assert kept["spec"] == {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "50Gi"}}}
    going = build_claim(a_job(SPEC | {"output": {"retentionPolicy": {"whenDeleted": "Delete"}}}), SETTINGS)
    assert going is not None
    assert going["metadata"]["ownerReferences"]


def test_an_existing_claim_is_used_as_it_is() -> None:
    job = a_job(SPEC | {"output": {"volume": {"existing": {"claimName": "mine"}}}})
    assert build_claim(job, SETTINGS) is None
    assert names.claim(job) == "mine"


def test_a_created_claim_takes_the_jobs_wishes() -> None:
    create = {"size": "9Gi", "storageClassName": "fast", "accessModes": ["ReadWriteMany"]}
    claim = build_claim(a_job(SPEC | {"output": {"volume": {"create": create}}}), SETTINGS)
    assert claim is not None
    assert claim["spec"] == {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": "9Gi"}},
        "storageClassName": "fast",
    }


def test_the_configuration_is_the_same_bytes_in_every_pass() -> None:
    assert build_config_map(a_job(WHOLE)) == build_config_map(a_job(dict(reversed(WHOLE.items()))))
    assert build_config_map(a_job())["immutable"]


def test_the_longest_names_fit_a_label() -> None:
    longest = a_job(WHOLE, name="a" * 40)
    assert len(names.stage_job(longest, step("quantize-0"), 9_999_999)) <= 63
