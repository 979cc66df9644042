"""The objects the operator makes."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator import names
from finetune_operator.api import JSON
from finetune_operator.manifests import build_claim, build_config_map, build_service, build_stage_job
from finetune_operator.names import Step, line
from finetune_operator.queueing import PRIORITY_LABEL, QUEUE_LABEL
from finetune_operator.settings import Resources
from finetune_trainer.config import CLAIM_VARIABLE, JOB_VARIABLE, REMOTE_CODE_VARIABLE, RENDEZVOUS_VARIABLE
from tests.unit.operator.builders import BUCKET, GANG, SETTINGS, SPEC, WHOLE, a_job

KEYS = ("prepare", "train", "merge", "quantize-0", "publish-0")
GPU = SPEC | {"parallelism": {"gpusPerNode": 4}}
TOKEN = {"name": "hf", "key": "hub-token"}
CREDENTIALS = {"name": "store"}
MANY_SOURCES = SPEC | {
    "model": {
        "huggingFace": {"repo": "a/b", "tokenSecretRef": TOKEN},
        "adapter": {"s3": {"uri": "s3://bucket/adapter/", "credentialsSecretRef": CREDENTIALS}},
    },
    "merge": {"original": {"modelScope": {"repo": "a/b", "tokenSecretRef": TOKEN}}},
    "datasets": [
        {"oci": {"reference": "registry.test/rows:1", "credentialsSecretRef": CREDENTIALS}},
        {"volume": {"claimName": "datasets", "path": "train.jsonl"}},
        {"huggingFace": {"repo": "a/rows"}},
    ],
    "evaluation": {"datasets": [{"huggingFace": {"repo": "a/rows", "tokenSecretRef": TOKEN}}]},
}
ONLINE = {
    "wandb": {"project": "p", "apiKeySecretRef": {"name": "wandb", "key": "api"}},
    "mlflow": {"uri": "https://mlflow.test", "credentialsSecretRef": {"name": "mlflow"}},
}


def step(key: str, spec: JSON = WHOLE) -> Step:
    return next(step for step in line(a_job(spec).valid_spec) if step.key == key)


def pod(key: str, spec: JSON = SPEC, **settings: Any) -> JSON:
    whole = WHOLE | spec | {"output": WHOLE["output"] | spec.get("output", {})}
    job = build_stage_job(a_job(whole), step(key, whole), 3, SETTINGS.model_copy(update=settings))
    found: JSON = job["spec"]["template"]["spec"]
    return found


def container(key: str, spec: JSON = SPEC, **settings: Any) -> JSON:
    found: JSON = pod(key, spec, **settings)["containers"][0]
    return found


def environment(key: str, spec: JSON = SPEC, **settings: Any) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container(key, spec, **settings)["env"]}


def secrets(key: str, spec: JSON) -> dict[str, JSON]:
    """Secrets by the folder in which the trainer finds them."""
    volumes = {volume["name"]: volume.get("secret") for volume in pod(key, spec)["volumes"]}
    found = {path: volumes[name] for path, name in mounts(key, spec).items() if volumes[name]}
    assert all(secret["defaultMode"] == 0o440 for secret in found.values())
    return {path: {k: v for k, v in secret.items() if k != "defaultMode"} for path, secret in found.items()}


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


@pytest.mark.parametrize("key", KEYS)
def test_every_stage_of_a_queued_job_asks_for_the_queue_and_is_made_suspended(key: str) -> None:
    labels = {QUEUE_LABEL: "team-a", PRIORITY_LABEL: "high"}
    job = build_stage_job(a_job(WHOLE, labels=labels | {"mine": "yes"}), step(key), 1, SETTINGS)
    assert labels.items() <= job["metadata"]["labels"].items()
    assert "mine" not in job["metadata"]["labels"]
    assert job["spec"]["suspend"] is True
    assert not labels.keys() & job["spec"]["template"]["metadata"]["labels"].keys(), "Kueue would queue the pod too"


@pytest.mark.parametrize("labels", [{}, {PRIORITY_LABEL: "high"}, {QUEUE_LABEL: ""}])
def test_a_job_without_a_queue_is_left_to_kubernetes(labels: dict[str, str]) -> None:
    job = build_stage_job(a_job(labels=labels), step("train"), 1, SETTINGS)
    assert "suspend" not in job["spec"]
    assert QUEUE_LABEL not in job["metadata"]["labels"], "whether there is one by default is for Kueue to say"


@pytest.mark.parametrize("key", KEYS)
def test_every_pod_is_restricted_and_knows_nothing_of_the_cluster(key: str) -> None:
    spec = pod(key, WHOLE)
    inside = spec["containers"][0]["securityContext"]
    assert (spec["automountServiceAccountToken"], spec["enableServiceLinks"]) == (False, False)
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert (inside["readOnlyRootFilesystem"], inside["allowPrivilegeEscalation"]) == (True, False)
    assert inside["capabilities"] == {"drop": ["ALL"]}


def test_only_prepare_sees_sources() -> None:
    assert mounts("prepare") == {
        "/work": "work",
        "/etc/finetune": "config",
        "/tmp": "tmp",  # noqa: S108
        "/sources/models": "source-0",
        "/sources/datasets": "source-1",
        "/secrets/publish-0": "secret-publish-0",
    }
    assert mounts("train").keys() == {"/work", "/etc/finetune", "/tmp", "/dev/shm"}  # noqa: S108


def test_every_source_has_its_secret_in_the_folder_of_its_slot() -> None:
    token = {"secretName": "hf", "items": [{"key": "hub-token", "path": "token"}]}
    whole = {"secretName": "store"}
    assert secrets("prepare", MANY_SOURCES | {"output": {"publish": []}}) == {
        "/secrets/model": token,
        "/secrets/adapter": whole,
        "/secrets/original": token,
        "/secrets/dataset-0": whole,
        "/secrets/evaluation-0": token,
    }
    assert not any(secrets(key, MANY_SOURCES) for key in ("train", "merge", "quantize-0"))


EVERYWHERE = SPEC | {
    "output": {
        "publish": [
            {"name": "hub", "artifact": "Merged", "huggingFace": {"repo": "a/b", "tokenSecretRef": TOKEN}},
            {"name": "open", "artifact": "Merged", "oci": {"reference": "registry.test/models/demo:1"}},
            {"name": "bucket", "artifact": "Adapter"} | BUCKET,
        ]
    }
}


def test_every_publish_stage_has_the_secret_of_its_own_place_in_the_folder_of_its_slot() -> None:
    spec = MANY_SOURCES | {"output": EVERYWHERE["output"]}
    assert secrets("publish-0", spec) == {
        "/secrets/publish-0": {"secretName": "hf", "items": [{"key": "hub-token", "path": "token"}]}
    }
    assert secrets("publish-1", spec) == {}
    assert secrets("publish-2", spec) == {"/secrets/publish-2": {"secretName": "store"}}
    assert not any("publish" in path for key in ("train", "merge", "quantize-0") for path in secrets(key, spec))


def test_a_secret_of_publishing_that_is_missing_keeps_prepare_from_starting() -> None:
    of_stages = secrets("publish-0", EVERYWHERE) | secrets("publish-2", EVERYWHERE)
    assert secrets("prepare", EVERYWHERE) == of_stages
    assert not any("optional" in secret for secret in of_stages.values())


def test_code_that_a_model_brings_does_not_see_what_may_write_elsewhere() -> None:
    model = {"huggingFace": {"repo": "a/b", "revision": "0" * 40}, "trustRemoteCode": True}
    assert secrets("prepare", EVERYWHERE | {"model": model}) == {}


def test_only_train_sees_the_secrets_of_trackers() -> None:
    tracked = SPEC | {"tracking": ONLINE}
    assert secrets("train", tracked) == {
        "/secrets/wandb": {"secretName": "wandb", "items": [{"key": "api", "path": "key"}]},
        "/secrets/mlflow": {"secretName": "mlflow"},
    }
    assert not any(secrets(key, tracked) for key in ("merge", "quantize-0"))
    assert secrets("prepare", tracked).keys() == secrets("publish-0", tracked).keys() == {"/secrets/publish-0"}


@pytest.mark.parametrize(
    ("tracking", "reached"),
    [
        pytest.param(None, set(), id="nothing but the hub"),
        pytest.param({"wandb": {"project": "p"}, "tensorboard": True}, set(), id="a run written to the volume"),
        pytest.param({"wandb": ONLINE["wandb"]}, {"train"}, id="W&B with a key"),
        pytest.param({"mlflow": {"uri": "http://mlflow.test"}}, {"train"}, id="an open MLflow server"),
    ],
)
def test_the_network_is_reached_to_fetch_to_publish_and_to_track(tracking: JSON | None, reached: set[str]) -> None:
    proxy = {"HTTPS_PROXY": "http://proxy.test:3128"}
    spec = SPEC | ({"tracking": tracking} if tracking else {})
    told = {key: environment(key, spec, trainer_env=proxy) for key in KEYS}
    assert {key for key, variables in told.items() if "HTTPS_PROXY" in variables} == reached | {"prepare", "publish-0"}
    offline = {key for key, variables in told.items() if variables.get("HF_HUB_OFFLINE") == "1"}
    assert offline == {"train", "merge", "quantize-0"}, "the hub is for what is fetched and published"


@pytest.mark.parametrize("key", KEYS)
def test_every_stage_is_told_its_job_and_the_claim_that_it_works_in(key: str) -> None:
    assert environment(key)[JOB_VARIABLE] == "default/demo"
    assert environment(key)[CLAIM_VARIABLE] == "demo-0123abcd"
    assert (
        environment(key, SPEC | {"output": {"volume": {"existing": {"claimName": "mine"}}}})[CLAIM_VARIABLE] == "mine"
    )


@pytest.mark.parametrize("allowed", [False, True])
def test_every_stage_is_told_whether_a_models_code_may_run(allowed: bool) -> None:
    told = {environment(key, allow_remote_code=allowed).get(REMOTE_CODE_VARIABLE) for key in KEYS}
    assert told == ({"1"} if allowed else {None})


def test_a_claim_used_twice_is_one_volume() -> None:
    both = {"volume": {"claimName": "one", "path": "x"}}
    spec = SPEC | {"model": both, "datasets": [both], "output": {"volume": {"existing": {"claimName": "one"}}}}
    assert [v["name"] for v in pod("prepare", spec)["volumes"]] == ["work", "config", "tmp", "secret-publish-0"]
    assert mounts("prepare", spec)["/sources/one"] == mounts("prepare", spec)["/work"] == "work"
    names_of_mounts = [m for m in container("prepare", spec)["volumeMounts"] if m["mountPath"] == "/sources/one"]
    assert names_of_mounts[0]["readOnly"]


def test_sources_are_read_only_down_to_the_volume() -> None:
    volumes = {v["name"]: v for v in pod("prepare")["volumes"]}
    assert volumes["source-0"]["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}
    assert "readOnly" not in volumes["work"]["persistentVolumeClaim"]


@pytest.mark.parametrize(
    ("key", "gpus"), [("prepare", None), ("train", "4"), ("merge", "1"), ("quantize-0", "1"), ("publish-0", None)]
)
def test_training_holds_all_gpus_what_is_made_of_it_one_and_to_send_it_none(key: str, gpus: str | None) -> None:
    resources = container(key, GPU)["resources"]
    assert resources.get("limits", {}).get("nvidia.com/gpu") == gpus
    assert "nvidia.com/gpu" not in resources["requests"]


@pytest.mark.parametrize("key", ["train", "merge", "quantize-0"])
def test_a_job_on_cpu_holds_no_gpu_whatever_the_chart_gives(key: str) -> None:
    chart = Resources(limits={"nvidia.com/gpu": "1", "memory": "8Gi"})
    assert container(key, default_resources=chart)["resources"] == {"limits": {"memory": "8Gi"}}


def test_a_training_of_several_nodes_is_one_job_of_numbered_pods_that_know_where_to_meet() -> None:
    job = build_stage_job(a_job(GANG), step("train", GANG), 3, SETTINGS)
    spec, service = job["spec"], build_service(a_job(GANG))
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert (spec["backoffLimit"], spec["podReplacementPolicy"]) == (0, "Failed")
    template = spec["template"]
    assert template["spec"]["subdomain"] == service["metadata"]["name"] == "train-demo"
    assert environment("train", GANG)[RENDEZVOUS_VARIABLE] == "demo-train-3-0.train-demo:29500"
    ports = {port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
    assert ports == {8080, 29500}
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert (service["spec"]["clusterIP"], service["spec"]["publishNotReadyAddresses"]) == ("None", True)
    assert service["metadata"]["ownerReferences"][0]["uid"] == a_job().uid


@pytest.mark.parametrize("key", ["prepare", "merge"])
def test_the_other_stages_of_several_nodes_are_one_pod(key: str) -> None:
    job = build_stage_job(a_job(GANG), step(key, GANG), 1, SETTINGS)
    assert (job["spec"]["completions"], "completionMode" in job["spec"]) == (1, False)
    assert RENDEZVOUS_VARIABLE not in environment(key, GANG)


def test_a_method_that_trains_the_model_itself_leaves_nothing_to_merge() -> None:
    spec = WHOLE | {"method": {"type": "Full"}}
    assert [its.key for its in line(a_job(spec).valid_spec)] == ["prepare", "train", "quantize-0", "publish-0"]


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
    assert len(names.service(longest)) <= 63
    hostname, _, _ = names.rendezvous(longest, step("train"), 9_999_999).partition(".")
    assert len(hostname.removesuffix("-0") + "-63") <= 63
