"""Where things lie: one folder of state per checkout, one cache per user, and the node's own paths inside."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

CHECKOUT = Path(__file__).resolve().parent.parent
PACKAGE = Path(__file__).resolve().parent


def cache_folder() -> Path:
    """Return the folder for what is the same for every checkout: binaries and the base image."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "finetune-operator"


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the file's lock; the kernel lets go of it when the process ends, however it ends."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class State:
    """The folder that one cluster keeps its files in; removing it while the cluster is down forgets everything."""

    root: Path

    @property
    def id(self) -> str:
        """Eight characters that name this cluster on the host: its link, its rules, its control groups."""
        return hashlib.sha256(str(self.root).encode()).hexdigest()[:8]

    @property
    def link(self) -> str:
        """Name of the host's end of the cable to the cluster; the kernel allows 15 characters."""
        return f"ftc{self.id}"

    @property
    def cgroup(self) -> str:
        """Control group, in every hierarchy, below which the kubelet puts pods."""
        return f"/finetune-{self.id}"

    @property
    def node_name(self) -> str:
        """Name of the only node."""
        return "local"

    @property
    def kubeconfig(self) -> Path:
        """Administrator's kubeconfig."""
        return self.root / "kubeconfig"

    @property
    def certificates(self) -> Path:
        """Keys and certificates of this run."""
        return self.root / "certificates"

    @property
    def config(self) -> Path:
        """Configuration written for the components of this run."""
        return self.root / "config"

    @property
    def resolver(self) -> Path:
        """The resolv.conf that the cluster and its pods see."""
        return self.config / "resolv.conf"

    @property
    def logs(self) -> Path:
        """One log per component; pods' logs in pods/."""
        return self.root / "logs"

    @property
    def volumes(self) -> Path:
        """Data of PersistentVolumes made by the local-path class."""
        return self.root / "volumes"

    @property
    def bin(self) -> Path:
        """Commands for people and tests: kubectl, helm, ctr, buildctl."""
        return self.root / "bin"

    def lock(self) -> AbstractContextManager[None]:
        """Let one command at a time change this cluster."""
        return locked(self.root / "lock")

    def record(self, **facts: Any) -> None:  # noqa: ANN401  whatever JSON can hold
        """Keep facts that a later command needs to find or to clean up this run."""
        known = self.recorded() | facts
        aside = self.root / "run.json.new"
        aside.write_text(json.dumps(known, indent=2) + "\n")
        aside.replace(self.root / "run.json")

    def recorded(self) -> dict[str, Any]:
        """Return the facts kept by ``record``; none when the folder is new."""
        try:
            facts: dict[str, Any] = json.loads((self.root / "run.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}
        return facts


def default_state() -> State:
    """Return the state folder of this checkout."""
    return State(CHECKOUT / ".cluster")
