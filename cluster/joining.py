"""Further nodes beside the first: a containerd and a kubelet each, in the same network, added and removed at will.

A node's image store begins as a copy of the first one's in which every file is a hard link: it takes no space and
seconds, and each store may remove its own names. Losing a node ends its kubelet only, which to Kubernetes looks like a
cut cable: containers go on, and nobody hears of them.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import certificates, cgroups, control_plane, kubeconfig, node
from cluster.api import Api
from cluster.errors import ClusterError
from cluster.namespace import require
from cluster.node import Node
from cluster.processes import wait_until
from cluster.progress import say

if TYPE_CHECKING:
    from cluster.api import Manifest
    from cluster.namespace import Namespace
    from cluster.paths import State

READY_SECONDS = 60.0
DRAIN_SECONDS = 60.0
ADDRESSES = "10.243.0."
"""Of further nodes: known inside the cluster only, like those of pods."""
FOLDERS = {"containerd": "/var/lib/containerd", "kubelet": "/var/lib/kubelet", "pods": "/var/log/pods"}
LINKED = ("io.containerd.content.v1.content/blobs", "io.containerd.snapshotter.v1.overlayfs/snapshots")
COPIED = ("io.containerd.metadata.v1.bolt/meta.db", "io.containerd.snapshotter.v1.overlayfs/metadata.db")
"""Of a containerd's root: what is never written again, and the databases."""


def add(state: State, name: str) -> None:
    """Make a further node of this name, or start again what of it has ended."""
    _check(state, name)
    with state.lock():
        live = require(state)
        new = _find(live, name)
        if name not in numbers(state):
            _clear(live, new)
            _make(live, new)
        _start(live, new)
        state.record(nodes=numbers(state) | {name: new.number})
    say(f"node '{name}' is Ready")


def remove(state: State, name: str) -> None:
    """End a further node and its pods, and leave nothing of it."""
    _check(state, name)
    with state.lock():
        live = require(state)
        old, api = _find(live, name), Api(state.kubeconfig)
        if old.component("kubelet") in live.running():
            _drain(api, name)
        _clear(live, old)
        if api.get(f"/api/v1/nodes/{name}"):
            api.call("DELETE", f"/api/v1/nodes/{name}")
        state.record(nodes={other: number for other, number in numbers(state).items() if other != name})


def lose(state: State, name: str) -> None:
    """Kill the node's kubelet: what runs there goes on unheard of, until `add` starts it again."""
    _check(state, name)
    live = require(state)
    kubelet = _find(live, name).component("kubelet")
    live.ask("signal", name=kubelet, number=int(signal.SIGKILL))
    wait_until(lambda: kubelet not in live.running(), f"The end of {kubelet}", READY_SECONDS)


def start_again(live: Namespace) -> None:
    """Start what has ended of the further nodes."""
    for name in numbers(live.state):
        _start(live, _find(live, name))


def numbers(state: State) -> dict[str, int]:
    """The further nodes, by name."""
    found: dict[str, int] = state.recorded().get("nodes", {})
    return found


def _check(state: State, name: str) -> None:
    if name == state.node_name:
        raise ClusterError(f"'{name}' is the cluster's first node.", "It comes and goes with 'up' and 'down'.")
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,18}[a-z0-9])?", name):
        raise ClusterError(f"'{name}' cannot name a node.", "Take up to 20 small letters, digits and dashes.")


def _find(live: Namespace, name: str) -> Node:
    taken = numbers(live.state)
    free = next(number for number in range(1, len(taken) + 2) if number not in taken.values())
    number = taken.get(name, free)
    return Node(name, f"{ADDRESSES}{number}", number, cgroup=f"{live.state.cgroup}/{name}")


def _folder(live: Namespace, name: str) -> Path:
    return live.state.root / "nodes" / name


def _make(live: Namespace, new: Node) -> None:
    """Give the node its certificate, address, control group, folders and images."""
    layout = control_plane.layout_of(live.state, live.node_address)
    identity = certificates.kubelet(new.name, new.address)
    certificates.issue(layout.certificates, identity)
    kubeconfig.write(layout.kubeconfig(identity.file), layout.server, layout.certificates, identity.file)
    live.run("ip", "address", "replace", f"{new.address}/32", "dev", "eth0")
    cgroups.create(new.cgroup)
    for name, default in FOLDERS.items():
        (_folder(live, new.name) / name).mkdir(parents=True)
        _mount(live, _folder(live, new.name) / name, new.folder(default))
    _copy_store(live, new)
    live.start(node.containerd(live.state, new))
    node.wait_for_containerd(live, new)
    node.forget_containers(live, new)  # those of the first node, whose names were copied too


def _mount(live: Namespace, source: Path, target: Path) -> None:
    """Show a folder where the node expects it, with its own propagation: mounts of pods appear there only."""
    live.run("mkdir", "-p", str(target))
    live.run("mount", "--no-mtab", "--bind", str(source), str(target))
    live.run("mount", "--no-mtab", "--make-private", str(target))
    live.run("mount", "--no-mtab", "--make-rshared", str(target))


def _copy_store(live: Namespace, new: Node) -> None:
    """Copy the first node's images. Its containerd stands still meanwhile, so the databases are as after a crash."""
    source, target = live.state.root / "containerd", _folder(live, new.name) / "containerd"
    live.ask("signal", name="containerd", number=int(signal.SIGSTOP))
    try:
        for paths, how in ((LINKED, "--link"), (COPIED, "--reflink=auto")):
            for path in paths:
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                subprocess.run(
                    ["cp", "--archive", how, str(source / path), str(target / path)], check=True, capture_output=True
                )
    finally:
        live.ask("signal", name="containerd", number=int(signal.SIGCONT))


def _start(live: Namespace, known: Node) -> None:
    """Start its processes unless they run, and wait until Kubernetes finds them well."""
    state = live.state
    live.start(node.containerd(state, known))
    node.wait_for_containerd(live, known)
    kubelet = node.kubelet(live, control_plane.layout_of(state, live.node_address), known)
    live.start(kubelet)
    api = Api(state.kubeconfig)

    def well() -> bool:
        health: str = live.ask("list", health=True)[kubelet.name].get("health", "")
        return health == "healthy"

    wait_until(well, f"A healthy {kubelet.name}", READY_SECONDS, Path(kubelet.log))
    wait_until(lambda: node.is_ready(api, known.name), f"A Ready node '{known.name}'", READY_SECONDS, Path(kubelet.log))


def _drain(api: Api, name: str) -> None:
    """Delete the node's pods and wait until its kubelet has cleared them away, network and all."""
    path = f"/api/v1/pods?fieldSelector=spec.nodeName%3D{name}"

    def pods() -> list[Manifest]:
        found: list[Manifest] = json.loads(api.call("GET", path))["items"]
        return found

    for pod in pods():
        place = f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"
        api.call("DELETE", f"{place}?gracePeriodSeconds=1")
    wait_until(lambda: not pods(), f"The end of the pods on '{name}'", DRAIN_SECONDS)


def _clear(live: Namespace, old: Node) -> None:
    """Remove what a node has, all of it or what an interrupted command left."""
    live.stop(old.component("kubelet"))
    if old.component("containerd") in live.running():
        node.remove_containers(live, old)
        live.stop(old.component("containerd"))
    folders = [old.folder(default) for default in (*FOLDERS.values(), "/run/containerd")]
    for folder in folders:
        _unmount(live, folder)
        live.run("rm", "-rf", "--one-file-system", str(folder))
    cgroups.remove(old.cgroup)
    live.run("ip", "address", "delete", f"{old.address}/32", "dev", "eth0", check=False)
    shutil.rmtree(_folder(live, old.name), ignore_errors=True)


def _unmount(live: Namespace, folder: Path) -> None:
    """Unmount the folder and all below it, the latest mount first."""
    mounted = [line.split()[1] for line in live.run("cat", "/proc/self/mounts").stdout.splitlines()]
    inside = [path for path in mounted if Path(path).is_relative_to(folder)]
    for path in reversed(inside):
        live.run("umount", "--no-mtab", "--lazy", path)
