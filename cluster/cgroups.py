"""The cluster's own control group, made in every hierarchy of version 1 or 2 and removed with everything below it."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

REMOVE_SECONDS = 10.0


@dataclass(frozen=True)
class Hierarchy:
    """One mounted tree of control groups."""

    mount: Path
    controllers: tuple[str, ...]
    version: int


def hierarchies() -> list[Hierarchy]:
    """Return every hierarchy that is mounted."""
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, kind, options, *_ = line.split()
        if kind == "cgroup":
            found.append(Hierarchy(Path(mount), tuple(options.split(",")), 1))
        elif kind == "cgroup2":
            controllers = Path(mount, "cgroup.controllers").read_text().split()
            found.append(Hierarchy(Path(mount), tuple(controllers), 2))
    return found


def create(name: str) -> None:
    """Make the group in every hierarchy, ready to hold children."""
    for hierarchy in hierarchies():
        group = hierarchy.mount / name.lstrip("/")
        group.mkdir(exist_ok=True)
        if "cpuset" in hierarchy.controllers and hierarchy.version == 1:
            _inherit_cpuset(hierarchy.mount, group)
        if hierarchy.version == 2:  # noqa: PLR2004  control groups version 2
            _delegate(hierarchy)
            _delegate(Hierarchy(group, hierarchy.controllers, 2))


def _inherit_cpuset(parent: Path, group: Path) -> None:
    """Fill in what version 1 leaves empty; no process can enter a group without processors and memory nodes."""
    for file in ("cpuset.cpus", "cpuset.mems"):
        (group / file).write_text((parent / file).read_text())


def _delegate(hierarchy: Hierarchy) -> None:
    for controller in hierarchy.controllers:
        with contextlib.suppress(OSError):  # one that cannot be delegated is missed later by what needs it, by name
            (hierarchy.mount / "cgroup.subtree_control").write_text(f"+{controller}")


def remove(name: str) -> None:
    """Remove the group and all below it, waiting for the kernel to let go of processes just killed."""
    deadline = time.monotonic() + REMOVE_SECONDS
    for hierarchy in hierarchies():
        group = hierarchy.mount / name.lstrip("/")
        while group.exists():
            _remove_tree(group)
            if not group.exists():
                break
            if time.monotonic() > deadline:
                raise TimeoutError(group)
            time.sleep(0.02)


def _remove_tree(group: Path) -> None:
    for folder, _, _ in os.walk(group, topdown=False):
        with contextlib.suppress(OSError):  # busy: tried again until the deadline
            Path(folder).rmdir()
