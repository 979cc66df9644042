"""What the machine must have: root, Linux features, Go, Debian's packages; each absence has its own sentence."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from cluster.cgroups import hierarchies
from cluster.errors import ClusterError

APT_PACKAGE_OF_COMMAND = {
    "runc": "runc",
    "debootstrap": "debootstrap",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "openssl": "openssl",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "mount": "mount",
}
CNI_PLUGINS = ("ptp", "host-local", "portmap", "loopback")
CNI_FOLDERS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))
NAMESPACES = ("net", "mnt", "pid")
OLDEST_GO = (1, 21)  # from here on, Go fetches the newer toolchain that a go.mod asks for by itself
CONTROLLERS = ("cpu", "cpuset", "memory", "pids")


def require_root() -> None:
    """Namespaces, mounts and control groups belong to root."""
    if os.geteuid() != 0:
        message = "The cluster runs containers on this machine and needs root."
        raise ClusterError(message, "Run the same command with sudo, or as root.")


def require_kernel() -> None:
    """Name the first kernel feature that is missing."""
    if platform.system() != "Linux":
        raise ClusterError(f"The cluster runs on Linux only, and this is {platform.system()}.", "Use a Linux machine.")
    missing = [name for name in NAMESPACES if not Path(f"/proc/self/ns/{name}").exists()]
    if missing:
        raise ClusterError(f"The kernel has no {', '.join(missing)} namespaces.", "Use a kernel that has them.")
    if not _kernel_has_overlay():
        message = "The kernel has no overlay file system, which container images need."
        raise ClusterError(message, "Load it with 'modprobe overlay', or use a kernel that has it.")
    found = {controller for hierarchy in hierarchies() for controller in hierarchy.controllers}
    without = [name for name in CONTROLLERS if name not in found]
    if without:
        message = f"No control group hierarchy is mounted for {', '.join(without)}."
        raise ClusterError(message, "Mount control groups below /sys/fs/cgroup (version 1 or 2 will do).")


def _kernel_has_overlay() -> bool:
    listed = Path("/proc/filesystems")
    if "\toverlay\n" not in listed.read_text() and shutil.which("modprobe"):
        subprocess.run(["modprobe", "overlay"], check=False, capture_output=True)
    return "\toverlay\n" in listed.read_text()


def require_go() -> None:
    """Go builds nearly every part."""
    go = shutil.which("go")
    remedy = "Install Go 1.26 or newer from https://go.dev/dl and put it into PATH."
    if go is None:
        message = "Go is missing; Kubernetes and the other parts are built with it."
        raise ClusterError(message, remedy)
    text = subprocess.run([go, "version"], check=True, capture_output=True, text=True).stdout
    version = re.search(r"go(\d+)\.(\d+)", text)
    if version is None or tuple(map(int, version.groups())) < OLDEST_GO:
        raise ClusterError(f"Go is too old ({text.strip()}).", remedy)


def cni_folder() -> Path | None:
    """Return the folder that holds every network plugin, or None."""
    whole = (folder for folder in CNI_FOLDERS if all((folder / name).exists() for name in CNI_PLUGINS))
    return next(whole, None)


def missing_packages() -> list[str]:
    """Return Debian's names of the packages that are not there, each once."""
    names = [package for command, package in APT_PACKAGE_OF_COMMAND.items() if shutil.which(command) is None]
    if cni_folder() is None:
        names.append("containernetworking-plugins")
    return sorted(set(names))


def install_packages(names: list[str]) -> None:
    """Install with apt-get, or say what to install where there is none."""
    wanted = " ".join(names)
    if shutil.which("apt-get") is None:
        raise ClusterError(f"These programs are missing: {wanted}.", "Install them with this system's package manager.")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update"], ["apt-get", "install", "--yes", "--no-install-recommends", *names]):
        result = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
        if result.returncode != 0:
            last = (result.stderr.strip() or result.stdout.strip()).splitlines()[-1:]
            message = f"'{' '.join(command[:2])}' failed: {''.join(last)}"
            raise ClusterError(message, f"Install {wanted} by hand and run this command again.")
