"""The cluster's view of the file system: a node's usual paths, kept in the state folder, unseen by the host.

Runs inside the new mount namespace. Every default of containerd, CNI and kubelet holds there (/run/containerd,
/var/lib/kubelet, ...), paths of sockets stay short however deep the checkout lies, and nothing reaches the host.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.paths import CHECKOUT, cache_folder

if TYPE_CHECKING:
    from cluster.paths import State

NODE_FOLDERS = {
    "containerd": "/var/lib/containerd",
    "buildkit": "/var/lib/buildkit",
    "kubelet": "/var/lib/kubelet",
    "logs/pods": "/var/log/pods",
}
SHADOWED = ("/var/lib", "/var/log")
SCRATCH = Path("/run/finetune-operator")

# The kubelet wants these values and sets them for the whole machine where they differ. It is shown files that hold
# them already (kubelet: setupKernelTunables), so the host's own stay as they are.
KERNEL_TUNABLES = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}


def prepare(state: State) -> None:
    """Mount what differs from the host. The namespace is private already; within it, mounts reach the pods."""
    resolver = Path(os.path.realpath("/etc/resolv.conf"))
    hidden = [path for path in (CHECKOUT, cache_folder(), state.root) if _will_be_hidden(path)]
    kept = {path: os.open(path, os.O_PATH) for path in hidden}
    _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    for folder in SHADOWED:
        _shadow(folder)
    for path, descriptor in kept.items():
        path.mkdir(parents=True, exist_ok=True)
        _mount("--no-canonicalize", "--bind", f"/proc/{os.getpid()}/fd/{descriptor}", str(path))
    for name, path_inside in NODE_FOLDERS.items():
        _bind_folder(state.root / name, Path(path_inside))
    _show_resolver(state.resolver, resolver)
    _show_tunables()
    _mount("--make-rshared", "/")


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", "--no-mtab", *arguments], check=True)  # without it, /run/mount appears on the host


def _will_be_hidden(path: Path) -> bool:
    return path.exists() and any(path.is_relative_to(folder) for folder in ("/run", *SHADOWED))


def _shadow(folder: str) -> None:
    """Let writes below the folder go to memory, not to the host."""
    layers = SCRATCH / folder.strip("/").replace("/", "-")
    for name in ("upper", "work"):
        (layers / name).mkdir(parents=True)
    options = f"lowerdir={folder},upperdir={layers}/upper,workdir={layers}/work"
    _mount("-t", "overlay", "-o", options, "overlay", folder)


def _bind_folder(source: Path, target: Path) -> None:
    source.mkdir(parents=True, exist_ok=True)
    target.mkdir(parents=True, exist_ok=True)
    _mount("--bind", str(source), str(target))


def _show_resolver(ours: Path, theirs: Path) -> None:
    """Name servers that answer from here: a stub on the host's loopback address does not."""
    if theirs.is_relative_to("/run"):
        theirs.parent.mkdir(parents=True, exist_ok=True)
        theirs.write_text(ours.read_text())
    else:
        _mount("--bind", str(ours), str(theirs))


def _show_tunables() -> None:
    for name, value in KERNEL_TUNABLES.items():
        real = Path("/proc/sys", name)
        if not real.exists() or real.read_text().strip() == value:
            continue
        shown = SCRATCH / "tunables" / name
        shown.parent.mkdir(parents=True, exist_ok=True)
        shown.write_text(f"{value}\n")
        _mount("--bind", str(shown), str(real))
