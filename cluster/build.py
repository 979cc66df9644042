"""Builds what the cluster runs, once per version, into a cache that all checkouts share."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import base_image, requirements
from cluster.errors import ClusterError
from cluster.paths import PACKAGE, cache_folder, locked
from cluster.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

KEPT_LINES_OF_ERROR = 15


@dataclass(frozen=True)
class Part:
    """Commands of one module, pinned by the go.mod of a folder below cluster/go.

    Parts that share a folder share one version of every module, and so compile it once; no folder: the part's own.
    """

    name: str
    module: str = ""
    commands: tuple[str, ...] = ("tool",)
    shared_folder: str = ""
    tags: str = ""
    version_variables: Callable[[str], Mapping[str, str]] = field(default=lambda _version: {})
    renamed: tuple[tuple[str, str], ...] = ()

    @property
    def folder(self) -> Path:
        """Where the go.mod lies."""
        return PACKAGE / "go" / (self.shared_folder or self.name)

    @property
    def version(self) -> str:
        """The pinned version, such as v1.36.3."""
        text = (self.folder / "go.mod").read_text()
        pinned = re.search(rf"^(?:require)?\s+{re.escape(self.module)} (v\S+)", text, re.MULTILINE)
        return pinned.group(1) if self.module and pinned else "v0"

    @property
    def flags(self) -> list[str]:
        """What `go build` is told besides the tools."""
        variables = [f"-X {name}={value}" for name, value in self.version_variables(self.version).items()]
        link = " ".join(["-s", "-w", *variables])
        undebugged = "-gcflags=all=-dwarf=false"  # the linker drops it anyway, and a tenth of compiling goes into it
        return ["-mod=readonly", "-trimpath", "-buildvcs=false", undebugged, "-tags", self.tags, "-ldflags", link]

    @property
    def built(self) -> Path:
        """Folder of the finished commands; its name changes with anything that the build depends on."""
        digest = hashlib.sha256(" ".join([*self.flags, *self.commands]).encode())
        for file in sorted(self.folder.rglob("*.*")):
            digest.update(file.read_bytes())
        return cache_folder() / "bin" / f"{self.name}-{self.version}-{digest.hexdigest()[:12]}"


def _kubernetes_variables(version: str) -> dict[str, str]:
    """Without these, clients and kubelet report v0.0.0 (hack/lib/version.sh of Kubernetes sets the same ones)."""
    major, minor, _ = version.removeprefix("v").split(".")
    values = {"gitVersion": version, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
    return {f"k8s.io/component-base/version.{name}": value for name, value in values.items()}


PARTS = (
    Part(
        "kubernetes",
        "k8s.io/kubernetes",
        tuple(
            f"k8s.io/kubernetes/cmd/{name}"
            for name in (
                "kube-apiserver",
                "kube-controller-manager",
                "kube-proxy",
                "kube-scheduler",
                "kubectl",
                "kubelet",
            )
        ),
        version_variables=_kubernetes_variables,
    ),
    Part("etcd", "go.etcd.io/etcd/server/v3", renamed=(("server", "etcd"),)),
    Part(
        "containerd",
        "github.com/containerd/containerd/v2",
        tuple(
            f"github.com/containerd/containerd/v2/cmd/{name}"
            for name in ("containerd", "containerd-shim-runc-v2", "ctr")
        ),
        tags="no_btrfs no_devmapper no_zfs",
        version_variables=lambda version: {"github.com/containerd/containerd/v2/version.Version": version},
    ),
    Part(
        "buildkit",
        "github.com/moby/buildkit",
        ("github.com/moby/buildkit/cmd/buildctl", "github.com/moby/buildkit/cmd/buildkitd"),
        shared_folder="containerd",
        version_variables=lambda version: {"github.com/moby/buildkit/version.Version": version},
    ),
    Part("coredns", "github.com/coredns/coredns", ("./coredns",), shared_folder="kubernetes"),
    Part(
        "local-path-provisioner",
        "github.com/rancher/local-path-provisioner",
        ("github.com/rancher/local-path-provisioner",),
        shared_folder="kubernetes",
    ),
    Part(
        "helm",
        "helm.sh/helm/v4",
        ("helm.sh/helm/v4/cmd/helm",),
        shared_folder="kubernetes",
        version_variables=lambda version: {"helm.sh/helm/v4/internal/version.version": version},
    ),
    Part("pause"),
    Part("registry", "github.com/distribution/distribution/v3"),
    Part("versitygw", "github.com/versity/versitygw"),
    Part("kwok", "sigs.k8s.io/kwok", ("sigs.k8s.io/kwok/cmd/kwok",), shared_folder="kubernetes"),
    Part(
        "prometheus",
        "github.com/prometheus/prometheus",
        ("github.com/prometheus/prometheus/cmd/promtool",),
        shared_folder="kubernetes",
        tags="remove_all_sd",
    ),
)
CONTROL_PLANE_PARTS = ("kubernetes", "etcd")
SERVER_PARTS = ("registry", "versitygw")
"""No part of the cluster: servers that tests of the trainer's sources start by themselves."""
STORE_PARTS = ("versitygw",)
"""One of these is also the S3 store that the demo publishes to, in a pod."""
FAKE_NODE_PARTS = ("kwok",)
"""No part of the cluster either: nodes without machines, for the operator's benchmark."""
RULE_CHECKER_PARTS = ("prometheus",)
"""Nor this: promtool, for the tests of the chart's alerts."""


def command(name: str) -> Path:
    """Return the path of a built command, such as kubelet."""
    for part in PARTS:
        if (part.built / name).exists():
            return part.built / name
    raise ClusterError(f"'{name}' is not built.", "Run 'python3 -m cluster build'.")


def build_all() -> None:
    """Build everything that is not in the cache: packages, Go parts, base image."""
    requirements.require_root()
    requirements.require_kernel()
    packages = requirements.missing_packages()
    others = SERVER_PARTS + FAKE_NODE_PARTS + RULE_CHECKER_PARTS
    parts = [part for part in PARTS if part.name not in others and not part.built.exists()]
    base_missing = not base_image.archive().exists()
    progress = Progress("build", bool(packages) + len(parts) + base_missing)
    if packages:
        with progress.step(f"Debian packages {', '.join(packages)}"):
            requirements.install_packages(packages)
    build_parts(parts, progress)
    if base_missing:
        with progress.step(f"base image {base_image.reference()}"), locked(cache_folder() / "base.lock"):
            base_image.make()


def build_control_plane() -> None:
    """Build only what an API server of its own needs; any user may."""
    _build_missing(CONTROL_PLANE_PARTS)


def build_servers() -> None:
    """Build only the servers that tests start by themselves; any user may."""
    _build_missing(SERVER_PARTS)


def build_store() -> None:
    """Build only the S3 server; any user may."""
    _build_missing(STORE_PARTS)


def build_fake_nodes() -> None:
    """Build only what plays nodes and kubelets; any user may."""
    _build_missing(FAKE_NODE_PARTS)


def build_rule_checker() -> None:
    """Build only promtool; any user may."""
    _build_missing(RULE_CHECKER_PARTS)


def _build_missing(names: tuple[str, ...]) -> None:
    parts = [part for part in PARTS if part.name in names and not part.built.exists()]
    build_parts(parts, Progress("build", len(parts)))


def build_parts(parts: list[Part], progress: Progress) -> None:
    """Build one part after the other: side by side they would only fight for memory."""
    if not parts:
        return
    requirements.require_go()
    for part in parts:
        with progress.step(f"{part.name} {part.version}"), locked(cache_folder() / f"{part.name}.lock"):
            if not part.built.exists():  # another checkout may have built it while we waited for the lock
                _build(part)


def _build(part: Part) -> None:
    """Build aside and rename, so that an interrupted build leaves nothing that looks finished."""
    part.built.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=part.built.parent, prefix=f".{part.name}-") as scratch:
        aside = Path(scratch) / "bin"
        aside.mkdir()
        result = subprocess.run(
            ["go", "build", *part.flags, "-o", f"{aside}/", *part.commands],
            cwd=part.folder,
            env=os.environ | {"CGO_ENABLED": "0", "GOWORK": "off"},
            check=False,
            capture_output=True,
            text=True,
        )
        if result.returncode != 0:
            end = "\n".join(result.stderr.splitlines()[-KEPT_LINES_OF_ERROR:])
            message = f"{part.name} {part.version} did not build:\n{end}\n"
            raise ClusterError(message, "Mostly a network or disk matter: run the same command again to go on.")
        for old, new in part.renamed:
            (aside / old).rename(aside / new)
        aside.rename(part.built)


def versions() -> dict[str, str]:
    """Return the pinned version of each part."""
    return {part.name: part.version for part in PARTS if part.module}


def prune() -> list[str]:
    """Remove builds of other versions than the pinned ones; return their names."""
    folder = cache_folder() / "bin"
    kept = {part.built.name for part in PARTS}
    old = [entry for entry in (folder.iterdir() if folder.exists() else ()) if entry.name not in kept]
    for entry in old:
        shutil.rmtree(entry)
    return sorted(entry.name for entry in old)
