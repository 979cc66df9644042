"""The chart on a real cluster: what the API server accepts, install, upgrade, uninstall, and who may do what.

Every release here is called `chart-test`, serves its own namespace only, and gives the CRD back to its owner. Operators
of other releases rest meanwhile: one that serves every namespace would work on the jobs of these tests too.
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
from tests.e2e.jobs import eventually, in_cluster, tiny_spec

Manifest = dict[str, Any]

RELEASE = NAMESPACE = "chart-test"
OBJECTS = f"{RELEASE}-finetune-operator"
OPERATORS = "app.kubernetes.io/name=finetune-operator"
LEASES = "leases.coordination.k8s.io"
TAKEOVER_DEADLINE_SECONDS = 60
CRD = "finetunejobs.finetune.dev"
OWNER = ("meta.helm.sh/release-name", "meta.helm.sh/release-namespace")


@dataclass(frozen=True)
class Release:
    """One release of the chart in a namespace of its own, with Pod Security `restricted`."""

    target: Target

    def install(self, *options: str, chart: Path = CHART, **operator: object) -> None:
        """Install or upgrade, and wait until the operator is ready."""
        where = ["--namespace", NAMESPACE, "--wait", "--timeout", "2m", "--force-conflicts"]  # `home` annotated the CRD
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

    def uids(self) -> set[str]:
        """Of these pods."""
        return {pod["metadata"]["uid"] for pod in self.pods()}

    def leader(self, but: str = "") -> str:
        """The pod that works; the others stand by. An uninstalled release could not give its Lease up any more."""
        names = {pod["metadata"]["name"] for pod in self.pods()} - {but}

        def holder() -> str | None:
            found = self.target.get("lease", OBJECTS, NAMESPACE)["spec"].get("holderIdentity", "").rpartition("_")[0]
            return found if found in names else None

        return eventually("one of the pods leads", holder, TAKEOVER_DEADLINE_SECONDS)

    def log(self, pod: str) -> str:
        return self.target.kubectl("logs", pod, "-n", NAMESPACE)

    def make_job(self, name: str) -> Manifest:
        """A job that can never start: its model's claim does not exist."""
        job = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "spec": tiny_spec()}
        self.target.apply(job | {"metadata": {"name": name, "namespace": NAMESPACE}})
        return self.target.get("finetunejob", name, NAMESPACE)


@pytest.fixture(scope="module")
def home(cluster: Target) -> Iterator[Target]:
    """The cluster with the tests' namespace; the CRD and the operators of others are left as they were found."""
    found = find_crd(cluster)
    others = other_operators(cluster)
    for place, name in others:
        lay_to_rest(cluster, place, name)
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}})
    yield cluster
    cluster.kubectl("delete", "namespace", NAMESPACE, "--wait")
    for (place, name), replicas in others.items():
        cluster.kubectl("scale", "deployment", name, "-n", place, f"--replicas={replicas}")
        cluster.kubectl("rollout", "status", "deployment", name, "-n", place, "--timeout=2m")
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


def other_operators(cluster: Target) -> dict[tuple[str, str], int]:
    """Namespace, name and replicas of the operators that are no release of these tests."""
    found = json.loads(cluster.kubectl("get", "deployments", "-A", "-l", OPERATORS, "-o", "json"))["items"]
    others = [deployment for deployment in found if deployment["metadata"]["namespace"] != NAMESPACE]
    return {(each["metadata"]["namespace"], each["metadata"]["name"]): each["spec"]["replicas"] for each in others}


def lay_to_rest(cluster: Target, namespace: str, name: str) -> None:
    """Have an operator work no more, until it is scaled again."""
    cluster.kubectl("scale", "deployment", name, "-n", namespace, "--replicas=0")
    pods = ("get", "pods", "-n", namespace, "-l", OPERATORS, "-o", "name")
    eventually(f"{name} of {namespace} at rest", lambda: not cluster.kubectl(*pods))


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
    "replicas": 3,
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
    pods = release.pods()
    assert len(pods) == 2
    for pod in pods:
        assert pod["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"]
        assert [status["restartCount"] for status in pod["status"]["containerStatuses"]] == [0]

    release.make_job("taken-on")
    leader = release.leader()
    (standby,) = {pod["metadata"]["name"] for pod in pods} - {leader}
    eventually("the leader's log tells of the job", lambda: "taken-on" in release.log(leader))
    eventually("the job's phase", lambda: release.target.get("finetunejob", "taken-on", NAMESPACE).get("status"))
    assert "taken-on" not in release.log(standby)
    for complaint in ("Forbidden", "forbidden", "Not enough permissions"):
        assert complaint not in release.log(leader) + release.log(standby)


def test_a_leader_that_was_paused_stands_by_without_its_container_having_ended(release: Release) -> None:
    release.install("--take-ownership")
    paused = release.leader()
    signal_operator(paused, "STOP")
    try:
        leader = release.leader(but=paused)
    finally:
        signal_operator(paused, "CONT")
    eventually("the paused one stands by", lambda: "Standing by" in release.log(paused))
    assert "is lost" in release.log(paused)
    release.make_job("taken-on")
    eventually("the new leader's log tells of the job", lambda: "taken-on" in release.log(leader))
    restarts = [status["restartCount"] for pod in release.pods() for status in pod["status"]["containerStatuses"]]
    assert restarts == [0, 0]


def signal_operator(pod: str, name: str) -> None:
    """Send a signal to the operator's process in a pod."""
    in_cluster("sh", "-c", f"""
        for process in $(pgrep -f bin/finetune-operator); do
          if tr '\\0' '\\n' < /proc/$process/environ | grep -qx HOSTNAME={pod}; then exec kill -{name} $process; fi
        done
        exit 1
    """)  # fmt: skip


def test_an_upgrade_rolls_out_the_crd_and_the_changed_value_and_keeps_the_jobs(
    release: Release, tmp_path: Path
) -> None:
    older = older_chart(tmp_path)
    release.install("--take-ownership", chart=older, logLevel="INFO")
    before = release.uids()
    job = release.make_job("survivor")
    assert "AGE-OF-OLD" in columns(find_crd(release.target))

    release.install(logLevel="DEBUG")
    assert not before & release.uids()
    for pod in release.pods():
        assert {"name": "FINETUNE_LOG_LEVEL", "value": "DEBUG"} in pod["spec"]["containers"][0]["env"]
    assert release.leader()
    assert "AGE-OF-OLD" not in columns(find_crd(release.target))
    kept = release.target.get("finetunejob", "survivor", NAMESPACE)
    assert (kept["metadata"]["uid"], kept["spec"]) == (job["metadata"]["uid"], job["spec"])


def test_an_upgrade_that_changes_nothing_restarts_nothing(release: Release) -> None:
    release.install("--take-ownership")
    before = release.uids()
    release.install()
    assert release.uids() == before


def test_uninstalling_keeps_the_crd_and_the_jobs_and_a_new_install_takes_them_on(release: Release) -> None:
    release.install("--take-ownership")
    job = release.make_job("kept")
    release.uninstall()

    left = "deployments,poddisruptionbudgets,serviceaccounts,roles,rolebindings,clusterroles,clusterrolebindings"
    assert OBJECTS not in release.target.kubectl("get", left, "-n", NAMESPACE, "-o", "name")
    assert release.target.get("finetunejob", "kept", NAMESPACE)["metadata"]["uid"] == job["metadata"]["uid"]

    release.install()
    assert len(release.pods()) == 2


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
    "finetunejobs.finetune.dev": "get list watch delete",
    "finetunejobs.finetune.dev/status": "patch",
    "jobs.batch": "get list watch create delete",
    "pods": "list watch",
    "configmaps": "get create",
    "persistentvolumeclaims": "get create",
    "services": "get create",
    "events": "list create",
    "workloads.kueue.x-k8s.io": "list",
}
OPERATOR_MAY_AT_HOME = {LEASES: "create"}
"""In its own namespace, whatever it watches: RBAC cannot limit creation to a name."""

OPERATOR_MAY_WITH_ITS_LEASE = {LEASES: "get create update"}
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
    "workloads.kueue.x-k8s.io/status",
    "localqueues.kueue.x-k8s.io",
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


def review(user: str, groups: Iterable[str], namespace: str, name: str, right: Right) -> Manifest:
    """The question whether somebody may do something; no namespace, no name: to all of them."""
    resource, _, subresource = right[0].partition("/")
    plural, _, group = resource.partition(".")
    asked = {"verb": right[1], "resource": plural, "subresource": subresource, "group": group, "namespace": namespace}
    asked |= {"name": name}
    spec = {"user": user, "groups": [*groups, "system:authenticated"], "resourceAttributes": asked}
    return {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}


def allowed(
    cluster: Target, user: str, asked: Iterable[Right], *, groups: Iterable[str] = (), where: str, name: str = ""
) -> set[Right]:
    """Those of the rights that the API server grants."""
    questions = sorted(asked)
    items = [review(user, groups, where, name, right) for right in questions]
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
    asked = set(product([*OPERATOR_MAY, *OPERATOR_MUST_NOT, LEASES], VERBS))
    who = f"system:serviceaccount:{NAMESPACE}:{OBJECTS}"
    groups = ["system:serviceaccounts", f"system:serviceaccounts:{NAMESPACE}"]
    may = rights(OPERATOR_MAY)
    assert allowed(home, who, asked, groups=groups, where=NAMESPACE) == may | rights(OPERATOR_MAY_AT_HOME)
    assert allowed(home, who, asked, groups=groups, where="kube-system") == (set() if watched else may)
    lease = set(product([LEASES], VERBS))
    assert allowed(home, who, lease, groups=groups, where=NAMESPACE, name=OBJECTS) == rights(
        OPERATOR_MAY_WITH_ITS_LEASE
    )


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
        eventually(f"{role} is aggregated", lambda: allowed(home, user, asked, where=NAMESPACE) == may)
        assert allowed(home, user, asked, where="kube-system") == set()
    finally:
        home.kubectl("delete", "-f", "-", stdin=rendered)
        home.kubectl("delete", "rolebinding", user, "-n", NAMESPACE, "--ignore-not-found")
