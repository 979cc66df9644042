"""The base image of local builds, made from Debian's packages: the public one needs an image registry."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError
from cluster.paths import cache_folder

SUITE = "bookworm"
PACKAGES = ("python3", "python3-venv", "ca-certificates")
DROPPED = ("var/cache/apt", "var/lib/apt/lists", "var/log", "usr/share/doc", "usr/share/man", "usr/share/locale")
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
RECIPE = f"1 {SUITE} {PACKAGES} {DROPPED}"


def architecture() -> str:
    """Return this machine's architecture as images name it."""
    machine = os.uname().machine
    return ARCHITECTURES.get(machine, machine)


def reference() -> str:
    """Return the image's name; the tag changes with the recipe."""
    digest = hashlib.sha256(f"{RECIPE} {architecture()}".encode()).hexdigest()[:12]
    return f"docker.io/finetune-operator/base:{SUITE}-{digest}"


def archive() -> Path:
    """Where the finished image lies in the cache, ready for `ctr images import`."""
    return cache_folder() / "images" / f"{reference().rpartition('/')[2].replace(':', '-')}.tar"


def make() -> None:
    """Bootstrap a minimal Debian with Python and pack it as an image of one layer."""
    if archive().exists():
        return
    archive().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive().parent, prefix=".base-") as scratch:
        root = Path(scratch) / "root"
        _bootstrap(root)
        layer = Path(scratch) / "layer.tar"
        subprocess.run(
            ["tar", "--create", f"--file={layer}", "--numeric-owner", "--sort=name", f"--directory={root}", "."],
            check=True,
        )
        aside = Path(scratch) / "image.tar"
        write_image(aside, reference(), layer, Cmd=["python3"])
        aside.rename(archive())


def _bootstrap(root: Path) -> None:
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, str(root)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode != 0:
        lines = (result.stdout + result.stderr).strip().splitlines()
        message = f"debootstrap could not make the base image: {' / '.join(lines[-3:])}"
        raise ClusterError(message, "Check that Debian's mirror can be reached and run the same command again.")
    for name in DROPPED:
        for entry in (root / name).iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def write_image(file: Path, name: str, layer: Path, **command: list[str]) -> None:
    """Write an archive of one uncompressed layer in the form of `docker save`, which containerd imports.

    `command`: Entrypoint or Cmd, as the image format calls them.
    """
    config: dict[str, Any] = {
        "architecture": architecture(),
        "os": "linux",
        "config": {**command, "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{_sha256(layer)}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    with tarfile.open(file, "w") as image:
        image.add(layer, arcname="layer.tar")
        for entry, content in (("config.json", config), ("manifest.json", manifest)):
            body = json.dumps(content).encode()
            header = tarfile.TarInfo(entry)
            header.size = len(body)
            image.addfile(header, io.BytesIO(body))


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_program_image(file: Path, name: str, program: Path) -> None:
    """Write an image that holds one static program and nothing else, and runs it with the pod's arguments."""
    layer = file.with_suffix(".layer")
    with tarfile.open(layer, "w") as content:
        content.add(program, arcname=program.name)
    write_image(file, name, layer, Entrypoint=[f"/{program.name}"])
