"""The chart on a real cluster: what the API server accepts, install, upgrade, uninstall, and who may do what.

Every release here is called `chart-test`, serves its own namespace only, and gives the CRD back to its owner.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.target import CHART, Target, TargetError
from tests.e2e.jobs import eventually, tiny_spec

Manifest = dict[str, Any]

RELEASE = NAMESPACE = "chart-test"
OBJECTS = f"{RELEASE}-finetune-operator"
CRD = "finetunejobs.finetune.dev"
OWNER = ("meta.helm.sh/release-name", "meta.helm.sh/release-namespace")


@dataclass(frozen=True)
class Release:
    """One release of the chart in a namespace of its own, with Pod Security `restricted`."""

    target: Target

    def install(self, *options: str, chart: Path = CHART, **operator: object) -> None:
        """Install or upgrade, and wait until the operator is ready."""
        where = ["--namespace", NAMESPACE, "--wait", "--timeout", "2m"]
        self.target.helm("upgrade", "--install", RELEASE, str(chart), *where, *self.settings(**operator), *options)

    def settings(self, **operator: object) -> list[str]:
        """Helm's options for the images under test and for settings of the operator."""
        values: dict[str, object] = {"operator.watchNamespace": NAMESPACE}
        for place, image in (("image", self.target.operator_image), ("trainer.image", self.target.trainer_image)):
            values[f"{place}.repository"], values[f"{place}.tag"] = image.rsplit(":", 1)
        values |= {f"operator.{name}": value for name, value in operator.items()}
        return [f"--set-json={name}={json.dumps(value)}" for name, value in values.items()]

    def uninstall(self) -> None:
        self.target.helm(
            "uninstall", RELEASE, "--namespace", NAMESPACE, "--wait", "--timeout", "2m", "--ignore-not-found"
        )

    def pods(self) -> list[Manifest]:
        """The operator's pods that are not on their way out."""
        selector = f"app.kubernetes.io/instance={RELEASE}"
        found = json.loads(self.target.kubectl("get", "pods", "-n", NAMESPACE, "-l", selector, "-o", "json"))
        return [pod for pod in found["items"] if "deletionTimestamp" not in pod["metadata"]]

    def make_job(self, name: str) -> Manifest:
        """A job that can never start: its model's claim does not exist."""
        job = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "spec": tiny_spec()}
        self.target.apply(job | {"metadata": {"name": name, "namespace": NAMESPACE}})
        return self.target.get("finetunejob", name, NAMESPACE)


@pytest.fixture(scope="module")
def home(cluster: Target) -> Iterator[Target]:
    """The cluster with the tests' namespace; the CRD is left as it was found."""
    found = find_crd(cluster)
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}})
    yield cluster
    cluster.kubectl("delete", "namespace", NAMESPACE, "--wait")
    left = find_crd(cluster)
    if left is None or owner(left)[OWNER[0]] != RELEASE:
        return
    if found is not None:
        annotations = [f"{name}={value}" for name, value in owner(found).items()]
        cluster.kubectl("annotate", "crd", CRD, "--overwrite", *annotations)
    elif not json.loads(cluster.kubectl("get", "finetunejobs", "-A", "-o", "json"))["items"]:
        cluster.kubectl("delete", "crd", CRD)


@pytest.fixture
def release(home: Target) -> Iterator[Release]:
    """A release that a test installs, gone afterwards with its jobs."""
    made = Release(home)
    yield made
    made.uninstall()
    if find_crd(home):
        home.kubectl("delete", "finetunejobs", "--all", "-n", NAMESPACE, "--wait")


def find_crd(cluster: Target) -> Manifest | None:
    found = cluster.kubectl("get", "crd", CRD, "--ignore-not-found", "-o", "json")
    return json.loads(found) if found else None


def owner(crd: Manifest) -> dict[str, str]:
    """Name and namespace of the release that the CRD belongs to; empty where Helm did not install it."""
    annotations = crd["metadata"].get("annotations") or {}
    return {name: annotations.get(name, "") for name in OWNER}


def columns(crd: Manifest | None) -> list[str]:
    """Titles of what `kubectl get` prints of a job."""
    assert crd is not None
    return [column["name"] for column in crd["spec"]["versions"][0]["additionalPrinterColumns"]]


# --- what is rendered ------------------------------------------------------------------------------------------------

EVERY_OPTION: Manifest = {
    "imagePullSecrets": [{"name": "registry"}],
    "operator": {"watchNamespace": NAMESPACE, "logLevel": "DEBUG", "logFormat": "text", "workers": 8},
    "trainer": {
        "env": {"HF_ENDPOINT": "https://mirror.example"},
        "resources": {"requests": {"cpu": 2}, "limits": {"nvidia.com/gpu": "1"}},
        "volume": {"size": "5Gi", "storageClassName": "fast", "accessMode": "ReadWriteMany"},
    },
    "serviceAccount": {"name": "tuner", "annotations": {"cloud.example/role": "tuner"}},
    "fullnameOverride": "tuner",
    "resources": {"requests": {"cpu": 1}, "limits": {"memory": "512Mi"}},
    "nodeSelector": {"pool": "system"},
    "tolerations": [{"key": "dedicated", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": []}},
    "priorityClassName": "system-cluster-critical",
}


@pytest.mark.parametrize("values", [{}, EVERY_OPTION], ids=["defaults", "every option"])
def test_the_api_server_accepts_every_object(home: Target, values: Manifest, tmp_path: Path) -> None:
    (tmp_path / "values.json").write_text(json.dumps(values), encoding="utf-8")
    where = ["--namespace", NAMESPACE, "--values", str(tmp_path / "values.json")]
    rendered = home.helm("template", RELEASE, str(CHART), *where)
    accepted = home.kubectl("apply", "--dry-run=server", "--validate=strict", "-o", "name", "-f", "-", stdin=rendered)
    assert len(accepted.split()) == len([manifest for manifest in yaml.safe_load_all(rendered) if manifest])


# --- the life of a release -------------------------------------------------------------------------------------------


def test_an_installed_operator_is_restricted_and_takes_on_jobs(release: Release) -> None:
    release.install("--take-ownership")
    (pod,) = release.pods()
    assert pod["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"]
    assert [status["restartCount"] for status in pod["status"]["containerStatuses"]] == [0]

    release.make_job("taken-on")
    log = ("logs", f"deployment/{OBJECTS}", "-n", NAMESPACE)
    eventually("the operator's log tells of the job", lambda: "taken-on" in release.target.kubectl(*log), 30)
    eventually("the job's phase", lambda: release.target.get("finetunejob", "taken-on", NAMESPACE).get("status"), 30)
    for complaint in ("Forbidden", "forbidden", "Not enough permissions"):
        assert complaint not in release.target.kubectl(*log)


def test_an_upgrade_rolls_out_the_crd_and_the_changed_value_and_keeps_the_jobs(
    release: Release, tmp_path: Path
) -> None:
    older = older_chart(tmp_path)
    release.install("--take-ownership", chart=older, logLevel="INFO")
    (before,) = release.pods()
    job = release.make_job("survivor")
    assert "AGE-OF-OLD" in columns(find_crd(release.target))

    release.install(logLevel="DEBUG")
    (after,) = release.pods()
    assert after["metadata"]["uid"] != before["metadata"]["uid"]
    assert {"name": "FINETUNE_LOG_LEVEL", "value": "DEBUG"} in after["spec"]["containers"][0]["env"]
    assert "AGE-OF-OLD" not in columns(find_crd(release.target))
    kept = release.target.get("finetunejob", "survivor", NAMESPACE)
    assert (kept["metadata"]["uid"], kept["spec"]) == (job["metadata"]["uid"], job["spec"])


def test_an_upgrade_that_changes_nothing_restarts_nothing(release: Release) -> None:
    release.install("--take-ownership")
    (before,) = release.pods()
    release.install()
    (after,) = release.pods()
    assert after["metadata"]["uid"] == before["metadata"]["uid"]


def test_uninstalling_keeps_the_crd_and_the_jobs_and_a_new_install_takes_them_on(release: Release) -> None:
    release.install("--take-ownership")
    job = release.make_job("kept")
    release.uninstall()

    left = "deployments,serviceaccounts,roles,rolebindings,clusterroles,clusterrolebindings"
    assert OBJECTS not in release.target.kubectl("get", left, "-n", NAMESPACE, "-o", "name")
    assert release.target.get("finetunejob", "kept", NAMESPACE)["metadata"]["uid"] == job["metadata"]["uid"]

    release.install()
    assert len(release.pods()) == 1


def test_a_typo_never_reaches_the_cluster(release: Release) -> None:
    with pytest.raises(TargetError, match="additional properties 'logLevle' not allowed"):
        release.install(logLevle="DEBUG")
    assert release.pods() == []


def older_chart(folder: Path) -> Path:
    """The chart as an earlier version might have been: its CRD prints a column that is no more."""
    chart = folder / "older"
    shutil.copytree(CHART, chart)
    file = chart / "files" / f"{CRD}.yaml"
    crd = yaml.safe_load(file.read_text(encoding="utf-8"))
    extra = {"name": "AGE-OF-OLD", "type": "date", "jsonPath": ".metadata.creationTimestamp"}
    crd["spec"]["versions"][0]["additionalPrinterColumns"].append(extra)
    file.write_text(yaml.safe_dump(crd), encoding="utf-8")
    return chart


# --- who may do what -------------------------------------------------------------------------------------------------

VERBS = ("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection")

OPERATOR_MAY = {
    "finetunejobs.finetune.dev": "get list watch",
    "finetunejobs.finetune.dev/status": "patch",
    "jobs.batch": "get list watch create delete",
    "pods": "list watch",
    "configmaps": "get create",
    "persistentvolumeclaims": "get create",
    "services": "get create",
    "events": "list create",
}
OPERATOR_MUST_NOT = [
    "finetunejobs.finetune.dev/finalizers",
    "finetunejobs.finetune.dev/scale",
    "jobs.batch/status",
    "cronjobs.batch",
    "secrets",
    "pods/exec",
    "pods/log",
    "pods/attach",
    "pods/portforward",
    "pods/proxy",
    "pods/eviction",
    "pods/ephemeralcontainers",
    "persistentvolumes",
    "services/proxy",
    "endpoints",
    "serviceaccounts",
    "serviceaccounts/token",
    "namespaces",
    "nodes",
    "nodes/proxy",
    "deployments.apps",
    "daemonsets.apps",
    "statefulsets.apps",
    "leases.coordination.k8s.io",
    "roles.rbac.authorization.k8s.io",
    "rolebindings.rbac.authorization.k8s.io",
    "clusterroles.rbac.authorization.k8s.io",
    "clusterrolebindings.rbac.authorization.k8s.io",
    "customresourcedefinitions.apiextensions.k8s.io",
    "validatingwebhookconfigurations.admissionregistration.k8s.io",
    "mutatingwebhookconfigurations.admissionregistration.k8s.io",
    "certificatesigningrequests.certificates.k8s.io",
    "*.*",
]

Right = tuple[str, str]


def rights(table: dict[str, str]) -> set[Right]:
    return {(resource, verb) for resource, verbs in table.items() for verb in verbs.split()}


def review(user: str, groups: Iterable[str], namespace: str, right: Right) -> Manifest:
    """The question whether somebody may do something; no namespace: in all of them."""
    resource, _, subresource = right[0].partition("/")
    plural, _, group = resource.partition(".")
    asked = {"verb": right[1], "resource": plural, "subresource": subresource, "group": group, "namespace": namespace}
    spec = {"user": user, "groups": [*groups, "system:authenticated"], "resourceAttributes": asked}
    return {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}


def allowed(
    cluster: Target, user: str, asked: Iterable[Right], *, groups: Iterable[str] = (), where: str
) -> set[Right]:
    """Those of the rights that the API server grants."""
    questions = sorted(asked)
    items = [review(user, groups, where, right) for right in questions]
    reviews = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
    answers = cluster.kubectl("create", "-f", "-", "-o", 'jsonpath={.status.allowed}{"\\n"}', stdin=reviews).split()
    assert len(answers) == len(questions)
    return {right for right, answer in zip(questions, answers, strict=True) if answer == "true"}


@pytest.fixture(params=["", NAMESPACE], ids=["every namespace", "one namespace"])
def watched(request: pytest.FixtureRequest, home: Target) -> Iterator[str]:
    """The operator's rights alone, without the operator, for each reach of its watch."""
    role = ("--show-only", "templates/role.yaml", "--set", f"operator.watchNamespace={request.param}")
    rendered = home.helm("template", RELEASE, str(CHART), "--namespace", NAMESPACE, *role)
    home.kubectl("apply", "-f", "-", stdin=rendered)
    yield request.param
    home.kubectl("delete", "-f", "-", stdin=rendered)


def test_the_operator_may_do_its_work_and_nothing_else(home: Target, watched: str) -> None:
    asked = set(product([*OPERATOR_MAY, *OPERATOR_MUST_NOT], VERBS))
    who = f"system:serviceaccount:{NAMESPACE}:{OBJECTS}"
    groups = ["system:serviceaccounts", f"system:serviceaccounts:{NAMESPACE}"]
    may = rights(OPERATOR_MAY)
    assert allowed(home, who, asked, groups=groups, where=NAMESPACE) == may
    assert allowed(home, who, asked, groups=groups, where="kube-system") == (set() if watched else may)


USER_MAY = {
    "admin": {"finetunejobs.finetune.dev": " ".join(VERBS)},
    "edit": {"finetunejobs.finetune.dev": " ".join(VERBS)},
    "view": {"finetunejobs.finetune.dev": "get list watch"},
}


@pytest.mark.parametrize("role", USER_MAY)
def test_users_of_a_namespace_may_use_jobs_as_their_role_says(home: Target, role: str) -> None:
    rendered = home.helm(
        "template", RELEASE, str(CHART), "--namespace", NAMESPACE, "--show-only", "templates/userroles.yaml"
    )
    home.kubectl("apply", "-f", "-", stdin=rendered)
    user = f"chart-test-{role}"
    try:
        home.kubectl("create", "rolebinding", user, "-n", NAMESPACE, f"--clusterrole={role}", f"--user={user}")
        asked = set(product(["finetunejobs.finetune.dev", "finetunejobs.finetune.dev/status"], VERBS))
        may = rights(USER_MAY[role])
        eventually(f"{role} is aggregated", lambda: allowed(home, user, asked, where=NAMESPACE) == may, 15)
        assert allowed(home, user, asked, where="kube-system") == set()
    finally:
        home.kubectl("delete", "-f", "-", stdin=rendered)
        home.kubectl("delete", "rolebinding", user, "-n", NAMESPACE, "--ignore-not-found")
