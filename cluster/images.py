"""Builds the project's images straight into the kubelet's store, tagged by what went into them."""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import base_image, build, node
from cluster.errors import ClusterError
from cluster.files import write_text
from cluster.namespace import Namespace, find, require
from cluster.paths import CHECKOUT, State, locked
from cluster.processes import Component, tail, wait_until
from cluster.progress import Progress, say

if TYPE_CHECKING:
    from collections.abc import Iterator

TARGETS = ("operator", "trainer")
STORE = "store"
"""Also to be had: the S3 server that the demo publishes to."""
REGISTRY = "docker.io/"  # what Kubernetes puts before a name that has no registry
GIBIBYTE = 1024**3
GIBIBYTES_WHILE_MADE = {"operator": 1, "trainer": 17}  # snapshot, layer and unpacked image at the same time
GIBIBYTES_FOR_CODE = 1
AUTHORITIES = ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
SYSTEM_AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")

# Enough for the layers of two trainer images, so that a changed pin does not cost the other target its cache.
BUILDKIT_CONFIG = """\
[worker.oci]
  enabled = false
[worker.containerd]
  enabled = true
  namespace = "k8s.io"
  networkMode = "host"
  defaultCgroupParent = "{cgroup}/buildkit"
  gc = true
  reservedSpace = "12GB"
  maxUsedSpace = "24GB"
  minFreeSpace = "8GB"
"""


def build_image(state: State, target: str) -> str:
    """Build the target if its inputs changed since it was last built; return the image's reference."""
    live = require(state)
    with locked(state.root / "images.lock"):
        reference = f"finetune-operator/{target}:{_digest_of_inputs(target)}"
        if f"{REGISTRY}{reference}" in node.images(live):
            say(f"image {reference} is up to date")
            return reference
        _check_space(state, target)
        progress = Progress("image", 1)
        with progress.step(f"{target} (its log is {state.logs}/image-{target}.log)"), _buildkit(live):
            _solve(live, target, reference)
        _remember_dependencies(state, target)
        _remove_unused(live, target, keep=reference)
    return reference


def provide_store(state: State) -> str:
    """Put the S3 server into the kubelet's store under its public name, by which examples/store.yaml asks for it."""
    live = require(state)
    reference = f"versity/versitygw:{build.versions()['versitygw']}"
    with locked(state.root / "images.lock"):
        if f"{REGISTRY}{reference}" not in node.images(live):
            build.build_store()
            node.import_program(live, f"{REGISTRY}{reference}", build.command("versitygw"))
    return reference


def prune(state: State) -> list[str]:
    """Remove images that no container uses and the cache of image builds; return what went, by name."""
    live = find(state)
    if live is None:
        say("The cluster is not running: its images stay. 'python3 -m cluster up' first to prune them, too.")
        return []
    removed = [name for target in TARGETS for name in _remove_unused(live, target)]
    with _buildkit(live):
        live.run(str(build.command("buildctl")), "prune", "--all")
    shutil.rmtree(state.root / "dependencies", ignore_errors=True)
    return [f"image {name}" for name in removed] + ["build cache"]


def _digest_of_inputs(target: str) -> str:
    digest = hashlib.sha256(f"{target} {base_image.reference()}".encode())
    for path in context_files(CHECKOUT):
        digest.update(f"{path.relative_to(CHECKOUT)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def context_files(root: Path) -> list[Path]:
    """Return the files that .dockerignore lets into a build, which is written as a list of what may enter."""
    lines = [line for line in (root / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    allowed = [root / line.removeprefix("!") for line in lines if line.startswith("!")]
    denied = [line.removeprefix("**/") for line in lines if line.startswith("**/")]

    def admitted(path: Path) -> bool:
        names = path.relative_to(root).parts
        return path.is_file() and not any(fnmatch.fnmatch(name, pattern) for name in names for pattern in denied)

    found = [path for entry in allowed for path in ([entry] if entry.is_file() else entry.rglob("*"))]
    return sorted(path for path in found if admitted(path))


def _dependencies(target: str) -> str:
    """Digest of all but the source: while it stays, only the last layer is made."""
    digest = hashlib.sha256(base_image.reference().encode())
    for name in ("Dockerfile", f"constraints/{target}.txt", "constraints/tools.txt"):
        digest.update((CHECKOUT / name).read_bytes())
    return digest.hexdigest()


def _remember_dependencies(state: State, target: str) -> None:
    file = state.root / "dependencies" / target
    file.parent.mkdir(exist_ok=True)
    file.write_text(_dependencies(target))


def _check_space(state: State, target: str) -> None:
    file = state.root / "dependencies" / target
    only_code = file.exists() and file.read_text() == _dependencies(target)
    needed = GIBIBYTES_FOR_CODE if only_code else GIBIBYTES_WHILE_MADE[target]
    free = shutil.disk_usage(state.root).free / GIBIBYTE
    if free < needed:
        message = (
            f"The {target} image takes about {needed} GiB below {state.root} while it is made; {free:.1f} are free."
        )
        raise ClusterError(message, "Free some space, for example with 'python3 -m cluster prune'.")


@contextlib.contextmanager
def _buildkit(live: Namespace) -> Iterator[None]:
    """Run BuildKit while it is needed: it starts in half a second and would hold 100 MB for nothing."""
    state = live.state
    config = write_text(state.config / "buildkitd.toml", BUILDKIT_CONFIG.format(cgroup=state.cgroup))
    command = (str(build.command("buildkitd")), "--config", str(config))
    log = state.logs / "buildkitd.log"
    scratch = state.root / "build-scratch"  # it leaves mount points behind; the machine's /tmp is not the place
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    live.start(Component("buildkitd", command, str(log), environment={"TMPDIR": str(scratch)}))
    try:
        probe = live.command(str(build.command("buildctl")), "debug", "workers")

        def answers() -> bool:
            return subprocess.run(probe, check=False, capture_output=True).returncode == 0

        wait_until(answers, "BuildKit", 30, log)
        yield
    finally:
        live.stop("buildkitd")


def _solve(live: Namespace, target: str, reference: str) -> None:
    log = live.state.logs / f"image-{target}.log"
    with tempfile.TemporaryDirectory(dir=live.state.root, prefix="certs-") as certs, log.open("wb") as output:
        _copy_authorities(Path(certs))
        command = live.command(str(build.command("buildctl")), *_build_options(target, reference, certs))
        result = subprocess.run(command, check=False, stdout=output, stderr=output, cwd=CHECKOUT)
    if result.returncode != 0:
        raise ClusterError(f"The {target} image did not build.{tail(log)}")


def _build_options(target: str, reference: str, certs: str) -> list[str]:
    """Options of `buildctl build`; uncompressed, because the image goes nowhere and gzip takes minutes."""
    options = {
        "target": target,
        "image-resolve-mode": "local",
        "build-arg:BASE_IMAGE": base_image.reference(),
        "context:certs": "local:certs",
    }
    options |= {f"build-arg:{name}": os.environ[name] for name in PROXIES if name in os.environ}
    output = {
        "type": "image",
        "name": f"{REGISTRY}{reference}",
        "compression": "uncompressed",
        "unpack": "true",
        "oci-mediatypes": "true",
    }
    return [
        *("build", "--progress=plain", "--frontend=dockerfile.v0"),
        *(f"--local={name}={folder}" for name, folder in _local_folders(certs).items()),
        *(f"--opt={name}={value}" for name, value in options.items()),
        f"--output={','.join(f'{name}={value}' for name, value in output.items())}",
    ]


def _local_folders(certs: str) -> dict[str, str]:
    return {"context": str(CHECKOUT), "dockerfile": str(CHECKOUT), "certs": certs}


def _copy_authorities(folder: Path) -> None:
    """Pass the certificate authorities that this machine trusts: behind a proxy, a stock image trusts too few."""
    named = [Path(os.environ[name]) for name in AUTHORITIES if os.environ.get(name)]
    bundle = next((path for path in [*named, SYSTEM_AUTHORITIES] if path.is_file()), None)
    if bundle:
        shutil.copyfile(bundle, folder / "ca.crt")


def _remove_unused(live: Namespace, target: str, keep: str = "") -> list[str]:
    """Remove the target's images but the kept one and those that a container uses; return their names."""
    digests = _digests(live)
    listed = node.ctr(live, "containers", "list").splitlines()[1:]
    used = {digests.get(line.split()[1]) for line in listed}
    mine = [name for name in digests if name.startswith(f"{REGISTRY}finetune-operator/{target}:")]
    old = [name for name in mine if digests[name] not in used and name != f"{REGISTRY}{keep}"]
    staying = {digest for name, digest in digests.items() if not _is_alias(name) and name not in old}
    aliases = [name for name, digest in digests.items() if _is_alias(name) and digest not in staying]
    if old or aliases:
        node.ctr(live, "images", "remove", *old, *aliases)
    return old


def _digests(live: Namespace) -> dict[str, str]:
    """Return the manifest's digest of every name in the store."""
    lines = node.ctr(live, "images", "list").splitlines()[1:]
    return {line.split()[0]: line.split()[2] for line in lines}


def _is_alias(name: str) -> bool:
    """Tell whether containerd's Kubernetes part gave the name, from the image's ID; it holds the content too."""
    return name.startswith("sha256:")
