"""One real control plane for all tests here, a namespace for each, the operator as a process with the chart's role."""

from __future__ import annotations

import http.server
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from benchmarks.operator.contestants import AS_IN_ITS_IMAGE
from cluster import build
from cluster.api import Api
from cluster.control_plane import ControlPlane
from cluster.processes import free_ports
from finetune_operator.crd import render
from finetune_trainer.progress import PROGRESS_PORT, Progress
from tests.apiserver.api import JSON, Space, wait_for

ROOT = Path(__file__).resolve().parents[2]
ACCOUNT = "finetune-operator"
NUMBERS = itertools.count(1)
GRACE_SECONDS, TOKEN_SECONDS = 30, 24 * 3600
"""Kubernetes' own default of the one; the other is longer than `make chaos` takes."""
QUICK = {
    "FINETUNE_TRAINER_IMAGE": "registry.test/trainer:1",
    "FINETUNE_PROGRESS_INTERVAL_SECONDS": "0.5",
    "FINETUNE_START_DEADLINE_SECONDS": "4",
    "FINETUNE_RETRY_BACKOFF_SECONDS": "0.1",
    "FINETUNE_LOG_FORMAT": "text",
}


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path_factory.mktemp("control-plane"), with_controllers=True) as started:
        api = Api(started.kubeconfig)
        api.call("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", yaml.safe_load(render()))
        wait_for(lambda: api.get("/apis/finetune.dev/v1alpha1/finetunejobs"), "the CRD in service")
        yield started


@pytest.fixture(scope="session")
def api(control_plane: ControlPlane) -> Api:
    return Api(control_plane.kubeconfig)


@pytest.fixture(scope="session")
def kubectl(control_plane: ControlPlane) -> Callable[..., subprocess.CompletedProcess[str]]:
    def call(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [str(build.command("kubectl")), "--kubeconfig", str(control_plane.kubeconfig), *arguments]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=60)

    return call


@pytest.fixture
def space(api: Api) -> Space:
    """A namespace of the test's own."""
    return make_space(api)


@pytest.fixture(scope="module")
def shared_space(api: Api) -> Space:
    """A namespace for tests in which nothing comes to be."""
    return make_space(api)


def make_space(api: Api) -> Space:
    """A new namespace, under Pod Security `restricted`."""
    name = f"test-{next(NUMBERS)}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    wait_for(lambda: api.get(f"/api/v1/namespaces/{name}/serviceaccounts/default"), "the default service account")
    return Space(api, name)


@pytest.fixture(scope="session")
def operator_kubeconfig(control_plane: ControlPlane, api: Api, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The operator's own account, with the chart's role and nothing else."""
    for manifest in chart_role():
        namespace = manifest["metadata"].get("namespace")
        where = f"namespaces/{namespace}/" if namespace else ""
        api.call("POST", f"/apis/rbac.authorization.k8s.io/v1/{where}{manifest['kind'].lower()}s", manifest)
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": ACCOUNT, "namespace": "default"}}
    api.apply(account)
    path = f"/api/v1/namespaces/default/serviceaccounts/{ACCOUNT}/token"
    wanted = {"expirationSeconds": TOKEN_SECONDS}
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": wanted}
    token = json.loads(api.call("POST", path, request))["status"]["token"]
    config = json.loads(control_plane.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": token}
    file = tmp_path_factory.mktemp("operator") / "kubeconfig"
    file.write_text(json.dumps(config))
    return file


def chart_role() -> list[JSON]:
    """The roles and their bindings as the chart renders them."""
    command = [str(build.command("helm")), "template", ACCOUNT, str(ROOT / "charts" / "finetune-operator")]
    command += ["--namespace", "default", "--show-only", "templates/role.yaml"]
    command += ["--set", f"fullnameOverride={ACCOUNT}"]
    rendered = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [manifest for manifest in yaml.safe_load_all(rendered) if manifest]


@dataclass
class Operator:
    """The operator as a process of its own."""

    kubeconfig: Path
    namespace: str
    log: Path
    settings: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    port: int = 0
    meets_a_new_api_server: bool = False
    """Which refuses everything for a moment, until it knows the roles."""

    def start(self) -> None:
        self.port = free_ports(1)[0]
        environment = os.environ | QUICK | self.settings
        environment |= {"KUBECONFIG": str(self.kubeconfig), "FINETUNE_WATCH_NAMESPACE": self.namespace}
        environment |= {"FINETUNE_HEALTH_PORT": str(self.port)}
        command = [sys.executable, "-c", AS_IN_ITS_IMAGE, "finetune_operator"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    @property
    def running(self) -> subprocess.Popen[bytes]:
        assert self.process is not None
        return self.process

    def kill(self) -> None:
        """SIGKILL: nothing is said, nothing is tidied."""
        self.running.kill()
        self.running.wait()

    def restart(self) -> None:
        self.kill()
        self.start()

    def stop(self) -> int:
        """Its exit code, within the grace period of its pod; whatever happens it works on no later test's jobs."""
        self.running.terminate()
        try:
            return self.running.wait(timeout=GRACE_SECONDS)
        finally:
            self.running.kill()

    def get(self, path: str) -> int:
        """Status of a probe; 0 for no answer."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return int(answer.status)
        except OSError:
            return 0

    def memory_mib(self, kind: str = "Pss") -> float:
        text = Path(f"/proc/{self.running.pid}/smaps_rollup").read_text()
        return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{kind}:")) / 1024


@pytest.fixture
def new_operator(operator_kubeconfig: Path, space: Space, tmp_path: Path) -> Iterator[Callable[..., Operator]]:
    """Starts operators; at the end none may be left, nor have been refused anything."""
    started: list[Operator] = []

    def start(**settings: str) -> Operator:
        operator = Operator(operator_kubeconfig, space.namespace, tmp_path / "operator.log", settings)
        operator.start()
        started.append(operator)
        return operator

    yield start
    for operator in started:
        if operator.running.poll() is None:
            assert operator.stop() == 0
        check_log(operator)


@pytest.fixture(scope="module")
def operator(operator_kubeconfig: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """One operator for all namespaces and all tests of a module, which must outlive them all."""
    started = Operator(operator_kubeconfig, "", tmp_path_factory.mktemp("shared") / "operator.log")
    started.start()
    yield started
    assert started.running.poll() is None
    assert started.stop() == 0
    check_log(started)


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


def check_log(operator: Operator) -> None:
    """It did only what its role allows, and nothing that it did not expect happened."""
    log = operator.log.read_text()
    print(log[-4000:])
    assert "Traceback (most recent call last)" not in log
    assert operator.meets_a_new_api_server or not re.search(r"cannot \w+ resource", log)


def quiet_for(seconds: float, version: Callable[[], str]) -> bool:
    """Whether a version stays the same for so long: that nothing happens only time can tell."""
    before, end = version(), time.monotonic() + seconds
    while time.monotonic() < end:
        if version() != before:
            return False
        time.sleep(0.1)
    return True
