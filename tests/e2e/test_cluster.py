"""The local cluster itself: it comes up, runs what production runs, heals, and leaves nothing behind.

Every test starts clusters of its own in a temporary state folder, beside the one that the other tests use.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from cluster import base_image, build, images, namespace
from cluster.api import Api
from cluster.cgroups import hierarchies
from cluster.control_plane import ControlPlane
from cluster.paths import CHECKOUT, State
from cluster.processes import start_time

pytestmark = pytest.mark.cluster

Found = TypeVar("Found")
POD_SECONDS = 120
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "seccompProfile": {"type": "RuntimeDefault"},
}


@dataclass
class LocalCluster:
    """A cluster in a state folder of its own, driven by the command line that people use."""

    state: State

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cluster", "--state", str(self.state.root), *arguments]
        result = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
        assert not check or result.returncode == 0, result.stdout + result.stderr
        return result

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        command = [str(self.state.bin / "kubectl"), "--kubeconfig", str(self.state.kubeconfig), *arguments]
        result = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def apply(self, *manifests: dict[str, Any]) -> None:
        self.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests}))

    def wait_ready(self, pod: str) -> None:
        limit = f"--timeout={POD_SECONDS}s"
        self.kubectl("--namespace", "strict", "wait", "--for=condition=Ready", f"pod/{pod}", limit)

    def finished(self, pod: str) -> dict[str, Any]:
        """Wait for the pod's only container to end, and return how it ended."""

        def ended() -> dict[str, Any] | None:
            found = json.loads(self.kubectl("--namespace", "strict", "get", "pod", pod, "--output", "json"))
            statuses = found["status"].get("containerStatuses", [{}])
            terminated: dict[str, Any] | None = statuses[0].get("state", {}).get("terminated")
            return terminated

        return eventually(ended, POD_SECONDS)

    def node_is_ready(self) -> bool:
        return self.kubectl("get", "nodes", "--no-headers").split()[1] == "Ready"


def eventually(look: Callable[[], Found | None], seconds: float) -> Found:
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, "the deadline passed"
        time.sleep(0.1)
    return found


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[Callable[[str], LocalCluster]]:
    """Make clusters by name; all are taken down in the end, whatever the test did."""
    made: list[LocalCluster] = []

    def make(name: str) -> LocalCluster:
        made.append(LocalCluster(State(tmp_path / name)))
        return made[-1]

    yield make
    for each in made:
        each.run("down", check=False)
        for store in ("containerd", "buildkit"):  # hundreds of megabytes, which pytest would keep; the logs may stay
            shutil.rmtree(each.state.root / store, ignore_errors=True)


def pod(name: str, *command: str, **container: Any) -> dict[str, Any]:
    main = {
        "name": "main",
        "image": base_image.reference(),
        "command": command,
        "securityContext": RESTRICTED,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        **container,
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "strict", "labels": {"app": name}},
        "spec": {"restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "containers": [main]},
    }


def strict_namespace() -> dict[str, Any]:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "strict", "labels": labels}}


def claim(name: str) -> dict[str, Any]:
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Mi"}}}
    metadata = {"name": name, "namespace": "strict"}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}


def service(name: str, port: int) -> dict[str, Any]:
    spec = {"selector": {"app": name}, "ports": [{"port": 80, "targetPort": port}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "strict"}, "spec": spec}


def with_volume(manifest: dict[str, Any], claim_name: str) -> dict[str, Any]:
    manifest["spec"]["volumes"] = [{"name": "data", "persistentVolumeClaim": {"claimName": claim_name}}]
    manifest["spec"]["containers"][0]["volumeMounts"] = [{"name": "data", "mountPath": "/data"}]
    return manifest


SERVE = """
import os, http.server
open("/data/page", "w").write("hello from a volume")
os.chdir("/data")
http.server.test(http.server.SimpleHTTPRequestHandler, port=8000)
"""
FETCH = """
import time, urllib.request
for _ in range(100):
    try:
        page = urllib.request.urlopen("http://web/page", timeout=2).read()
        break
    except OSError:
        time.sleep(0.2)
open("/dev/termination-log", "wb").write(page)
"""
EAT = "kept = []\nwhile True:\n    kept.append(bytearray(10_000_000))"


def leftovers(state: State, inhabitants: dict[int, str]) -> list[str]:
    """What the host still has of a cluster; empty when nothing is left."""

    def output(*command: str) -> list[str]:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    found = output("ip", "-brief", "link")
    found += [line for table in ("nat", "filter") for line in output("iptables", "-w", "-t", table, "-S")]
    found += Path("/proc/self/mounts").read_text().splitlines()
    found += [str(group) for each in hierarchies() for group in each.mount.glob("*")]
    found += [str(path) for path in Path("/run").glob("finetune-operator/*")]
    marks = (state.link, state.cgroup, str(state.root))
    found = [line for line in found if any(mark in line for mark in marks)]
    return found + [f"process {pid}" for pid in still_alive(inhabitants)]


def inhabitants_of(state: State) -> dict[int, str]:
    """Every process that shares a namespace with the cluster, with its start: numbers of both are used again."""
    pid = namespace.require(state).pid
    namespaces = {(Path(f"/proc/{pid}/ns") / kind).readlink() for kind in ("net", "mnt", "pid")}
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            inside = {(entry / "ns" / kind).readlink() for kind in ("net", "mnt", "pid")}
            if inside & namespaces:
                found[int(entry.name)] = start_time(int(entry.name)) or ""
    return found


def still_alive(inhabitants: dict[int, str]) -> list[int]:
    return [pid for pid, started in inhabitants.items() if start_time(pid) == started]


def host_settings() -> dict[str, str]:
    names = ("vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops")
    return {name: Path("/proc/sys", name).read_text() for name in names}


def host_folders() -> set[str]:
    return {entry.name for entry in Path("/run").iterdir()} - {namespace.HOST_FACTS.name}


def test_it_runs_what_production_runs_and_leaves_nothing(make_cluster: Callable[[str], LocalCluster]) -> None:
    cluster = make_cluster("a-deep-folder-with-a-long-name/" * 4 + "state")  # sockets have only 107 bytes for a path
    settings, folders = host_settings(), host_folders()
    cluster.run("up")
    inhabitants = inhabitants_of(cluster.state)
    assert cluster.node_is_ready()
    cluster.apply(
        strict_namespace(),
        claim("data"),
        with_volume(pod("web", "python3", "-c", SERVE), "data"),
        service("web", 8000),
        pod("client", "python3", "-c", FETCH),
        pod("greedy", "python3", "-c", EAT, resources={"limits": {"memory": "64Mi"}}),
    )
    assert cluster.finished("client")["message"] == "hello from a volume"
    assert cluster.finished("greedy")["reason"] == "OOMKilled"
    assert cluster.run("status").stdout.count("healthy") >= 6
    assert set(leftovers(cluster.state, inhabitants)), "the check itself sees a running cluster"

    cluster.run("down")

    assert leftovers(cluster.state, inhabitants) == []
    assert (host_settings(), host_folders()) == (settings, folders)


def test_an_unrestricted_pod_is_refused_where_the_namespace_says_so(
    make_cluster: Callable[[str], LocalCluster],
) -> None:
    cluster = make_cluster("state")
    cluster.run("up")
    cluster.apply(strict_namespace())
    with pytest.raises(AssertionError, match="violates PodSecurity"):
        cluster.apply(pod("root", "true", securityContext={"runAsUser": 0}))


def test_what_has_ended_is_reported_and_started_again(make_cluster: Callable[[str], LocalCluster]) -> None:
    cluster = make_cluster("state")
    cluster.run("up")
    live = namespace.require(cluster.state)
    live.ask("signal", name="kubelet", number=int(signal.SIGKILL))
    eventually(lambda: "kubelet" not in live.running(), POD_SECONDS)

    told = cluster.run("status", check=False)

    assert told.returncode == 1
    assert "kubelet                  killed by SIGKILL" in told.stdout
    cluster.run("up")
    assert namespace.require(cluster.state) == live, "the rest went on"
    cluster.run("status")


def test_up_after_everything_was_killed(make_cluster: Callable[[str], LocalCluster]) -> None:
    cluster = make_cluster("state")
    cluster.run("up")
    cluster.apply(strict_namespace(), pod("sleeper", "sleep", "1000"))
    cluster.wait_ready("sleeper")
    inhabitants = inhabitants_of(cluster.state)
    for pid in still_alive(inhabitants):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    eventually(lambda: not still_alive(inhabitants), POD_SECONDS)

    cluster.run("up")

    assert cluster.node_is_ready()
    assert cluster.kubectl("get", "pods", "--all-namespaces", "--output", "name") == "", "a new cluster is empty"
    rules = [line for line in leftovers(cluster.state, {}) if "-j MASQUERADE" in line]
    assert len(rules) == 1, "the killed run's rules are gone"
    assert "sleep" not in cluster.run("exec", "--", "ps", "-e", "-o", "comm").stdout.split()
    cluster.run("down")
    assert leftovers(cluster.state, inhabitants) == []


def test_down_finds_what_nobody_recorded(make_cluster: Callable[[str], LocalCluster]) -> None:
    """As after an `up` that was killed half-way, or a state folder that was removed by hand."""
    cluster = make_cluster("state")
    cluster.run("up")
    inhabitants = inhabitants_of(cluster.state)
    (cluster.state.root / "run.json").unlink()
    cluster.run("down")
    assert leftovers(cluster.state, inhabitants) == []


def test_two_side_by_side(make_cluster: Callable[[str], LocalCluster]) -> None:
    one, other = make_cluster("one"), make_cluster("other")
    one.run("up")
    other.run("up")
    one.kubectl("create", "namespace", "only-here")
    assert "only-here" not in other.kubectl("get", "namespaces", "--output", "name")
    other.run("down")
    assert one.node_is_ready()
    one.run("status")


def test_a_further_node_joins_is_lost_and_leaves(make_cluster: Callable[[str], LocalCluster]) -> None:
    cluster = make_cluster("state")
    cluster.run("up")
    web = with_volume(pod("web", "python3", "-c", SERVE), "data")
    cluster.apply(strict_namespace(), claim("data"), on_node("local", web), service("web", 8000))
    cluster.wait_ready("web")
    cluster.run("node", "add", "second")
    inhabitants = inhabitants_of(cluster.state)
    assert sandboxes(cluster, "second") == [], "its kubelet would give back addresses of the first one's pods"
    cluster.apply(
        on_node("second", pod("client", "python3", "-c", FETCH)),
        on_node("second", pod("sleeper", "sleep", "1000")),
    )
    assert cluster.finished("client")["message"] == "hello from a volume", "pods of two nodes meet"
    cluster.wait_ready("sleeper")

    cluster.run("node", "lose", "second")
    assert "kubelet@second           killed by SIGKILL" in cluster.run("status", check=False).stdout
    assert sleepers(cluster) == 1, "what runs on a lost node goes on"

    cluster.run("node", "add", "second")
    assert "node second: Ready" in cluster.run("status").stdout
    assert sleepers(cluster) == 1
    cluster.run("node", "remove", "second")

    assert sleepers(cluster) == 0
    assert "second" not in cluster.run("status").stdout + cluster.kubectl("get", "nodes")
    cluster.run("node", "add", "second")
    cluster.run("down")
    assert leftovers(cluster.state, inhabitants) == []


def on_node(name: str, manifest: dict[str, Any]) -> dict[str, Any]:
    manifest["spec"]["nodeSelector"] = {"kubernetes.io/hostname": name}
    return manifest


def sandboxes(cluster: LocalCluster, node: str) -> list[str]:
    socket = f"/run/containerd-{node}/containerd.sock"
    return cluster.run("exec", "--", "ctr", "--address", socket, "sandboxes", "list").stdout.splitlines()[1:]


def sleepers(cluster: LocalCluster) -> int:
    return cluster.run("exec", "--", "ps", "-e", "-o", "args").stdout.splitlines().count("sleep 1000")


def test_a_stranger_with_the_recorded_pid_is_left_alone(tmp_path: Path) -> None:
    """After a restart of the machine, another process may have the number."""
    cluster = LocalCluster(State(tmp_path))
    with subprocess.Popen(["sleep", "60"]) as stranger:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        cluster.state.record(pid=stranger.pid, start_time="1", boot=boot, node_address="198.18.0.2")
        assert cluster.run("status", check=False).stdout.startswith("cluster: down")
        cluster.run("down")
        assert stranger.poll() is None
        stranger.kill()


def test_without_root_it_says_so_in_a_sentence(tmp_path: Path) -> None:
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    command = [*as_nobody, "/usr/bin/python3", "-m", "cluster", "--state", str(tmp_path), "up"]
    result = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == (
        "error: The cluster runs containers on this machine and needs root. "
        "Run the same command with sudo, or as root.\n"
    )


def test_exec_without_a_cluster_says_how_to_start_one(tmp_path: Path) -> None:
    result = LocalCluster(State(tmp_path)).run("exec", "--", "true", check=False)
    assert (result.returncode, result.stderr) == (
        1,
        "error: The cluster is not running. Start it with 'python3 -m cluster up'.\n",
    )


def test_a_missing_go_is_named_with_the_remedy(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    command = [sys.executable, "-c", "from cluster import requirements; requirements.require_go()"]
    result = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)
    assert "Install Go 1.26 or newer" in result.stderr


def test_images_are_named_by_what_the_build_sees(tmp_path: Path) -> None:
    (tmp_path / ".dockerignore").write_text("# a comment\n*\n!operator\n!pyproject.toml\n**/*.pyc\n**/__pycache__\n")
    for name in ("operator/a.py", "operator/__pycache__/a.pyc", "docs/x.md", "pyproject.toml", "operator/deep/b.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    seen = [str(path.relative_to(tmp_path)) for path in images.context_files(tmp_path)]
    assert seen == ["operator/a.py", "pyproject.toml"]


def test_a_light_control_plane_survives_its_api_server(tmp_path: Path) -> None:
    with ControlPlane(tmp_path, with_controllers=True) as control_plane:
        api = Api(control_plane.kubeconfig)
        api.apply(strict_namespace())
        control_plane.stop()
        assert not api.ready()
        control_plane.start()
        assert api.get("/api/v1/namespaces/strict") is not None
        assert api.get("/api/v1/namespaces/default/serviceaccounts/default") is not None
        children = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=True).stdout
    assert len(children.split()) == 3
    assert not [pid for pid in children.split() if start_time(int(pid))]


def test_a_build_is_found_by_everything_that_it_depends_on() -> None:
    folders = {part.built.name for part in build.PARTS}
    assert len(folders) == len(build.PARTS)
    kubernetes = next(part for part in build.PARTS if part.name == "kubernetes")
    assert kubernetes.built.name.startswith(f"kubernetes-{kubernetes.version}-")
