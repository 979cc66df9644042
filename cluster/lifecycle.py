"""Up and down: what starts in which order, when it counts as up, and what is left when it is down (nothing)."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from cluster import addons, build, certificates, control_plane, joining, namespace, node
from cluster.api import Api
from cluster.errors import ClusterError
from cluster.namespace import Namespace
from cluster.paths import CHECKOUT, State
from cluster.processes import wait_until
from cluster.progress import say

WIPED = ("etcd", "kubelet", "nodes", "volumes", "config", "certificates", "logs", "kubeconfig")
READY_SECONDS = 120.0
WRAPPED = {"ctr": ("--namespace", "k8s.io"), "buildctl": ()}


def up(state: State) -> None:
    """Start the cluster, or start again what of it has ended. Images stay between runs, all else begins empty."""
    build.build_all()
    started = time.monotonic()
    state.root.mkdir(parents=True, exist_ok=True)
    with state.lock():
        running = namespace.find(state)
        live = running or _begin(state)
        try:
            _start_components(live, after_a_crash=running is None)
            joining.start_again(live)
        except BaseException:
            say("The cluster did not come up; 'python3 -m cluster down' removes what was started.")
            raise
        _link_commands(state)
    say(f"cluster up: node '{state.node_name}' is Ready ({time.monotonic() - started:.1f} s)")
    say(f"export KUBECONFIG={state.kubeconfig}")


def down(state: State) -> None:
    """Stop the cluster and leave nothing of it but images and logs."""
    if not state.root.exists():
        return
    with state.lock():
        live = namespace.find(state)
        if live:
            _stop_gently(live)
        namespace.remove(state)
        _wipe(state, keep=("logs",))


def _begin(state: State) -> Namespace:
    """Clear what an earlier run may have left, however it ended, and make new namespaces."""
    namespace.remove(state)
    _wipe(state)
    live = namespace.create(state)
    layout = control_plane.layout_of(state, live.node_address)
    certificates_of_node = certificates.kubelet(state.node_name, live.node_address)
    control_plane.issue(layout, certificates.proxy(), certificates_of_node)
    return live


def _start_components(live: Namespace, *, after_a_crash: bool) -> None:
    state = live.state
    layout, first = control_plane.layout_of(state, live.node_address), node.first(live)
    for component in (control_plane.etcd(layout), control_plane.api_server(layout), node.containerd(state, first)):
        live.start(component)
    node.wait_for_containerd(live, first)
    if after_a_crash:
        node.forget_containers(live, first)
    node.import_images(live)
    api = Api(layout.kubeconfig("admin"))
    wait_until(api.ready, "The API server", READY_SECONDS, state.logs / "kube-apiserver.log")
    for component in (
        control_plane.controller_manager(layout),
        node.kubelet(live, layout, first),
        control_plane.scheduler(layout),
        node.kube_proxy(live, layout),
        addons.coredns(live, layout),
    ):
        live.start(component)
    addons.apply(live, api)
    live.start(addons.local_path_provisioner(state, layout))
    _wait_until_usable(live, api)
    shutil.copy2(layout.kubeconfig("admin"), state.kubeconfig)


def _wait_until_usable(live: Namespace, api: Api) -> None:
    """Wait for parts that are well, a Ready node, and the account without which no pod is admitted."""
    state = live.state

    def well() -> bool:
        parts = live.ask("list", health=True).values()
        return not any(str(part.get("health", "")).startswith("unhealthy") for part in parts if not part["ended"])

    # A node is Ready for a while after its kubelet has ended: a new one may not listen yet.
    wait_until(well, "A healthy kubelet", READY_SECONDS, state.logs / "kubelet.log")
    wait_until(lambda: node.is_ready(api, state.node_name), "A Ready node", READY_SECONDS, state.logs / "kubelet.log")

    def account() -> bool:
        return api.get("/api/v1/namespaces/default/serviceaccounts/default") is not None

    wait_until(account, "The default account", READY_SECONDS, state.logs / "kube-controller-manager.log")


def _stop_gently(live: Namespace) -> None:
    """Let the image store close in order; all else may just end."""
    try:
        for name in ("kubelet", "buildkitd"):
            live.stop(name, seconds=2)
        if "containerd" in live.running():
            node.remove_containers(live, node.first(live))
            live.stop("containerd", seconds=3)
    except (ClusterError, OSError) as error:
        say(f"The containers did not stop in order ({error}); the kernel ends them.")


def _wipe(state: State, keep: tuple[str, ...] = ()) -> None:
    """Remove what belongs to one run. Nothing may be mounted there: it would be emptied through the mount."""
    mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    inside = [path for path in mounted if Path(path).is_relative_to(state.root)]
    if inside:
        message = f"{inside[0]} is a mount inside the cluster's folder, made by someone else."
        raise ClusterError(message, f"Unmount it with 'umount {inside[0]}' and run the command again.")
    for name in WIPED:
        path = state.root / name
        if name in keep:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _link_commands(state: State) -> None:
    """Put kubectl, helm, ctr and buildctl where people and tests find them."""
    state.bin.mkdir(exist_ok=True)
    for name in ("kubectl", "helm"):
        aside = state.bin / f".{name}"
        aside.unlink(missing_ok=True)
        aside.symlink_to(build.command(name))
        aside.replace(state.bin / name)
    for name, arguments in WRAPPED.items():
        wrapper = state.bin / name
        inside = " ".join(["exec", "--", str(build.command(name)), *arguments])
        wrapper.write_text(
            f"#!/bin/sh\n# Runs inside the cluster, where its sockets are.\n"
            f'PYTHONPATH="{CHECKOUT}" exec python3 -m cluster --state "{state.root}" {inside} "$@"\n'
        )
        wrapper.chmod(0o755)


def execute(state: State, command: list[str]) -> None:
    """Become the command, run inside the cluster's namespaces in this working folder; never returns."""
    live = namespace.require(state)
    tools = os.pathsep.join(sorted({str(part.built) for part in build.PARTS}))
    environment = os.environ | {
        "PATH": f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{tools}",
        "KUBECONFIG": str(state.kubeconfig),
        "CONTAINERD_NAMESPACE": "k8s.io",
    }
    inside = live.command("env", f"--chdir={Path.cwd()}", *command)
    os.execvpe(inside[0], inside, environment)  # noqa: S606  the person's own command
