"""What the chart makes of its values, object by object."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_operator.api import Spec
from finetune_operator.settings import PREFIX, Settings

from .conftest import CHART, ROOT, Helm, HelmError, Manifest

DIGEST = "sha256:" + "0" * 64

EVERY_OPTION: dict[str, object] = {
    "image.repository": "registry.example:5000/team/operator",
    "image.tag": "1.2.3",
    "image.pullPolicy": "Always",
    "imagePullSecrets": [{"name": "registry"}],
    "replicas": 3,
    "operator.watchNamespace": "team-a",
    "trainer.image.repository": "registry.example:5000/team/trainer",
    "trainer.image.digest": DIGEST,
    "trainer.image.pullPolicy": "Never",
    "trainer.env": {"HF_ENDPOINT": "https://mirror.example"},
    "trainer.allowRemoteCode": True,
    "trainer.endpoints": ["https://minio.example:9000/team", "https://s3.us-east-1.amazonaws.com"],
    "trainer.resources": {"requests": {"cpu": 2, "memory": "8Gi"}, "limits": {"nvidia.com/gpu": "1"}},
    "trainer.volume": {"size": "5Gi", "storageClassName": "fast", "accessMode": "ReadWriteMany"},
    "operator.startDeadlineSeconds": 60,
    "operator.progressIntervalSeconds": 2.5,
    "operator.retryBackoffSeconds": 0.5,
    "operator.workers": 8,
    "operator.resyncSeconds": 86400,
    "operator.requestTimeoutSeconds": 10,
    "operator.logLevel": "DEBUG",
    "operator.logFormat": "text",
    "serviceAccount": {"create": True, "name": "tuner-account", "annotations": {"cloud.example/role": "tuner"}},
    "fullnameOverride": "tuner-of-models",
    "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "512Mi"}},
    "nodeSelector": {"pool": "system"},
    "tolerations": [{"key": "dedicated", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {"podAntiAffinity": {}},
    "priorityClassName": "system-cluster-critical",
}


def one(manifests: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    found = [m for m in manifests if m["kind"] == kind and name in (None, m["metadata"]["name"])]
    assert len(found) == 1, f"{len(found)} of {kind} {name}"
    return found[0]


def pod_of(manifests: list[Manifest]) -> dict[str, Any]:
    spec: dict[str, Any] = one(manifests, "Deployment")["spec"]["template"]["spec"]
    return spec


def environment(manifests: list[Manifest]) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in pod_of(manifests)["containers"][0]["env"]}


def settings_of(manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The operator's settings as it would read them in the pod."""
    for name, value in environment(manifests).items():
        monkeypatch.setenv(name, value)
    return Settings.from_environment()


def chart_metadata() -> dict[str, str]:
    metadata: dict[str, str] = yaml.safe_load((CHART / "Chart.yaml").read_text())
    return metadata


def test_it_lints(helm: Helm) -> None:
    report = helm.run("lint", "--strict", str(CHART))
    assert "0 chart(s) failed" in report
    assert "WARNING" not in report


def test_it_has_the_version_of_the_project() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert chart_metadata()["appVersion"] == version
    assert chart_metadata()["version"] == version


def test_defaults_make_these_objects_and_no_other(helm: Helm) -> None:
    objects = {(m["kind"], m["metadata"]["name"]) for m in helm.template()}
    assert objects == {
        ("CustomResourceDefinition", "finetunejobs.finetune.dev"),
        ("ServiceAccount", "tuner-finetune-operator"),
        ("ClusterRole", "tuner-finetune-operator"),
        ("ClusterRoleBinding", "tuner-finetune-operator"),
        ("Role", "tuner-finetune-operator-lease"),
        ("RoleBinding", "tuner-finetune-operator-lease"),
        ("ClusterRole", "tuner-finetune-operator-edit"),
        ("ClusterRole", "tuner-finetune-operator-view"),
        ("Deployment", "tuner-finetune-operator"),
        ("PodDisruptionBudget", "tuner-finetune-operator"),
    }


def test_the_operator_reads_the_charts_defaults_as_its_own(helm: Helm, monkeypatch: pytest.MonkeyPatch) -> None:
    image = f"finetune-trainer:{chart_metadata()['appVersion']}"
    own = Settings(trainer_image=image, lease="tuning/tuner-finetune-operator")
    assert settings_of(helm.template(), monkeypatch) == own


def test_the_chart_writes_every_setting_of_the_operator_and_no_other(helm: Helm) -> None:
    assert set(environment(helm.template())) == {PREFIX + name.upper() for name in Settings.model_fields}


def test_the_operator_reads_what_was_set(helm: Helm, monkeypatch: pytest.MonkeyPatch) -> None:
    read = settings_of(helm.template(EVERY_OPTION), monkeypatch).model_dump()
    assert read == {
        "trainer_image": f"registry.example:5000/team/trainer@{DIGEST}",
        "image_pull_policy": "Never",
        "trainer_env": {"HF_ENDPOINT": "https://mirror.example"},
        "allow_remote_code": True,
        "endpoints": ("https://minio.example:9000/team", "https://s3.us-east-1.amazonaws.com"),
        "default_resources": {"requests": {"cpu": "2", "memory": "8Gi"}, "limits": {"nvidia.com/gpu": "1"}},
        "default_volume_size": "5Gi",
        "default_storage_class": "fast",
        "default_access_mode": "ReadWriteMany",
        "watch_namespace": "team-a",
        "lease": "tuning/tuner-of-models",
        "retry_backoff_seconds": 0.5,
        "workers": 8,
        "progress_interval_seconds": 2.5,
        "start_deadline_seconds": 60,
        "resync_seconds": 86400,
        "request_timeout_seconds": 10,
        "health_port": 8081,
        "log_level": "DEBUG",
        "log_format": "text",
    }


def test_options_of_the_pod_reach_it(helm: Helm) -> None:
    pod = pod_of(helm.template(EVERY_OPTION))
    container = pod["containers"][0]
    assert container["image"] == "registry.example:5000/team/operator:1.2.3"
    assert container["imagePullPolicy"] == "Always"
    assert container["resources"] == EVERY_OPTION["resources"]
    assert pod["serviceAccountName"] == "tuner-account"
    for name in ("imagePullSecrets", "nodeSelector", "tolerations", "affinity", "priorityClassName"):
        assert pod[name] == EVERY_OPTION[name], name


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ({}, "finetune-operator:{version}"),
        ({"tag": "main"}, "finetune-operator:main"),
        ({"digest": DIGEST}, f"finetune-operator@{DIGEST}"),
        ({"tag": "main", "digest": DIGEST}, f"finetune-operator@{DIGEST}"),
    ],
)
def test_an_image_is_named_by_digest_else_tag_else_version(helm: Helm, image: dict[str, str], expected: str) -> None:
    manifests = helm.template({f"image.{name}": value for name, value in image.items()})
    assert pod_of(manifests)["containers"][0]["image"] == expected.format(version=chart_metadata()["appVersion"])


def test_every_value_is_in_the_schema_and_every_option_in_the_values() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert schema["properties"].keys() - {"global"} == values.keys()
    for name, value in values.items():
        node = resolve(schema, schema["properties"][name])
        if node.get("additionalProperties") is False and value:
            assert node["properties"].keys() == value.keys(), name


def resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in node:
        return node
    found: dict[str, Any] = schema["$defs"][node["$ref"].removeprefix("#/$defs/")]
    return found


def test_the_pod_is_restricted(helm: Helm) -> None:
    pod = pod_of(helm.template())
    container = pod["containers"][0]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    assert container["resources"]["limits"]["memory"] == "256Mi"


def test_probes_ask_the_port_that_the_operator_serves(helm: Helm, monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = helm.template()
    container = pod_of(manifests)["containers"][0]
    port = settings_of(manifests, monkeypatch).health_port
    assert container["ports"] == [{"name": "health", "containerPort": port}]
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "health"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "health"}


def test_two_replicas_of_which_one_may_go_at_a_time(helm: Helm) -> None:
    manifests = helm.template()
    spec = one(manifests, "Deployment")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (2, {"type": "RollingUpdate"})
    budget = one(manifests, "PodDisruptionBudget")["spec"]
    assert budget == {"maxUnavailable": 1, "selector": spec["selector"]}


@pytest.mark.parametrize("replicas", [0, 1])
def test_a_budget_protects_nothing_of_one(helm: Helm, replicas: int) -> None:
    manifests = helm.template({"replicas": replicas})
    assert one(manifests, "Deployment")["spec"]["replicas"] == replicas
    assert not [m for m in manifests if m["kind"] == "PodDisruptionBudget"]


def test_replicas_keep_apart_unless_told_otherwise(helm: Helm) -> None:
    spec = one(helm.template(), "Deployment")["spec"]
    (preferred,) = spec["template"]["spec"]["affinity"]["podAntiAffinity"][
        "preferredDuringSchedulingIgnoredDuringExecution"
    ]
    assert preferred["podAffinityTerm"]["topologyKey"] == "kubernetes.io/hostname"
    assert preferred["podAffinityTerm"]["labelSelector"] == spec["selector"]


def test_the_lease_is_in_the_releases_own_namespace_and_the_right_to_it_reaches_no_other(helm: Helm) -> None:
    manifests = helm.template({"operator.watchNamespace": "team-a"})
    name = "tuner-finetune-operator"
    assert environment(manifests)["FINETUNE_LEASE"] == f"tuning/{name}"
    role, binding = one(manifests, "Role", f"{name}-lease"), one(manifests, "RoleBinding", f"{name}-lease")
    assert role["metadata"]["namespace"] == binding["metadata"]["namespace"] == "tuning"
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"] == one(manifests, "RoleBinding", name)["subjects"]
    rights = {verb: rule.get("resourceNames") for rule in role["rules"] for verb in rule["verbs"]}
    assert rights == {"get": [name], "update": [name], "create": None}
    assert {resource for rule in role["rules"] for resource in rule["resources"]} == {"leases"}


def test_the_pods_labels_are_those_that_the_deployment_selects(helm: Helm) -> None:
    spec = one(helm.template(), "Deployment")["spec"]
    assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize(("namespace", "scope"), [("", "ClusterRole"), ("team-a", "Role")])
def test_the_right_reaches_as_far_as_the_watch(helm: Helm, namespace: str, scope: str) -> None:
    manifests = helm.template({"operator.watchNamespace": namespace, "userRoles.create": False})
    name = "tuner-finetune-operator"
    role, binding = one(manifests, scope, name), one(manifests, f"{scope}Binding", name)
    assert role["metadata"].get("namespace", "") == binding["metadata"].get("namespace", "") == namespace
    assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) == (scope, role["metadata"]["name"])
    account = one(manifests, "ServiceAccount")["metadata"]
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": account["name"], "namespace": account["namespace"]}
    ]
    roles = {(m["kind"], m["metadata"]["name"]) for m in manifests if m["kind"] in {"Role", "ClusterRole"}}
    assert roles == {(scope, name), ("Role", f"{name}-lease")}


def test_no_rule_has_a_wildcard_or_gives_what_the_operator_must_not_have(helm: Helm) -> None:
    role = one(helm.template(), "ClusterRole", "tuner-finetune-operator")
    for rule in role["rules"]:
        assert "*" not in rule["apiGroups"] + rule["resources"] + rule["verbs"]
        assert "rbac.authorization.k8s.io" not in rule["apiGroups"]
        assert not {"secrets", "pods/exec", "serviceaccounts/token"} & set(rule["resources"])


@pytest.mark.parametrize(("role", "into"), [("edit", {"admin", "edit"}), ("view", {"view"})])
def test_users_get_jobs_through_the_clusters_own_roles(helm: Helm, role: str, into: set[str]) -> None:
    found = one(helm.template(), "ClusterRole", f"tuner-finetune-operator-{role}")
    prefix = "rbac.authorization.k8s.io/aggregate-to-"
    assert {name.removeprefix(prefix) for name in found["metadata"]["labels"] if name.startswith(prefix)} == into
    verbs = set(found["rules"][0]["verbs"])
    reading = {"get", "list", "watch"}
    assert verbs == (
        reading if role == "view" else reading | {"create", "update", "patch", "delete", "deletecollection"}
    )


def test_an_account_that_exists_is_used(helm: Helm) -> None:
    manifests = helm.template({"serviceAccount.create": False, "serviceAccount.name": "mine"})
    assert pod_of(manifests)["serviceAccountName"] == "mine"
    assert not [m for m in manifests if m["kind"] == "ServiceAccount"]


def test_no_account_at_all_is_refused(helm: Helm) -> None:
    with pytest.raises(HelmError, match=r"serviceAccount\.name is needed where serviceAccount\.create is false"):
        helm.template({"serviceAccount.create": False})


def test_a_release_named_like_the_chart_does_not_stutter(helm: Helm) -> None:
    rendered = helm.run("template", "finetune-operator", str(CHART), "--show-only", "templates/deployment.yaml")
    assert yaml.safe_load(rendered)["metadata"]["name"] == "finetune-operator"


def test_it_can_be_a_dependency_of_another_chart(helm: Helm, tmp_path: Path) -> None:
    (tmp_path / "charts").mkdir()
    (tmp_path / "charts" / "finetune-operator").symlink_to(CHART)
    (tmp_path / "Chart.yaml").write_text("{apiVersion: v2, name: platform, version: 0.1.0}")
    manifests = helm.template({"global.registry": "registry.example"}, chart=tmp_path)
    assert one(manifests, "Deployment")["metadata"]["name"] == "tuner-finetune-operator"


def test_the_notes_say_what_to_do_next(helm: Helm) -> None:
    rendered = helm.run("install", "tuner", str(CHART), "--namespace", "tuning", "--dry-run=client")
    assert "kubectl -n tuning rollout status deployment/tuner-finetune-operator" in rendered
    job = yaml.safe_load(rendered.split("<<'EOF'\n")[1].split("\nEOF\n")[0])
    assert Spec.model_validate(job["spec"]).model.hugging_face


def test_an_old_cluster_is_refused(helm: Helm) -> None:
    with pytest.raises(HelmError, match=r"requires kubeVersion: >=1\.30"):
        helm.template({}, "--kube-version", "1.29.9")


def test_a_vendors_build_of_a_cluster_is_not(helm: Helm) -> None:
    assert helm.template({}, "--kube-version", "v1.30.2-gke.1587003")
