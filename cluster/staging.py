"""Files in and out of PersistentVolumeClaims, by pods that hold them open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.target import Target

WAIT = "--timeout=180s"


def build_claim(name: str, size: str) -> dict[str, Any]:
    """A claim of the cluster's default class."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": size}}},
    }


def build_pod(name: str, image: str, claims: tuple[str, ...]) -> dict[str, Any]:
    """A pod that sleeps, with each claim under /claims/NAME; fits Pod Security `restricted`."""
    container = {
        "name": "files",
        "image": image,
        "command": ["python3", "-c", "import signal; signal.sigwait({signal.SIGTERM})"],
        "volumeMounts": [{"name": f"claim-{i}", "mountPath": f"/claims/{claim}"} for i, claim in enumerate(claims)],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    volumes = [{"name": f"claim-{i}", "persistentVolumeClaim": {"claimName": name}} for i, name in enumerate(claims)]
    security = {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "fsGroup": 65532,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "containers": [container],
            "volumes": volumes,
            "securityContext": security,
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 1,
            "restartPolicy": "Never",
        },
    }


@contextmanager
def open_claims(target: Target, namespace: str, *claims: str, name: str = "files") -> Iterator[str]:
    """The name of a pod in which the claims lie under /claims/NAME; it is gone afterwards."""
    target.kubectl("delete", "pod", name, "-n", namespace, "--ignore-not-found", "--wait")
    pod = build_pod(name, target.trainer_image, claims)
    pod["metadata"]["namespace"] = namespace
    target.apply(pod)
    try:
        target.kubectl("wait", "pod", name, "-n", namespace, "--for=condition=Ready", WAIT)
        yield name
    finally:
        target.kubectl("delete", "pod", name, "-n", namespace, "--ignore-not-found", "--wait")


def put_files(target: Target, namespace: str, files: Mapping[str, Path]) -> None:
    """Copy files or folders into claims: {'claim/path': local}. What is there under a path is replaced."""
    claims = tuple(dict.fromkeys(path.split("/", 1)[0] for path in files))
    with open_claims(target, namespace, *claims, name="put-files") as pod:
        for path, local in files.items():
            folder = f"/claims/{path}".rsplit("/", 1)[0]
            target.kubectl("exec", "-n", namespace, pod, "--", "mkdir", "-p", folder)
            target.kubectl("exec", "-n", namespace, pod, "--", "rm", "-rf", f"/claims/{path}")
            target.kubectl("cp", "-n", namespace, str(local), f"{pod}:/claims/{path}")


def copy_folder(target: Target, namespace: str, claim: str, path: str, local: Path) -> None:
    """Copy a folder of a claim to a local one, which is made, or whose files are replaced."""
    with open_claims(target, namespace, claim, name="copy-folder") as pod:
        target.kubectl("cp", "-n", namespace, f"{pod}:/claims/{claim}/{path}", str(local))


def read_file(target: Target, namespace: str, claim: str, path: str) -> str:
    """The text of one file on a claim."""
    with open_claims(target, namespace, claim, name="read-file") as pod:
        return target.kubectl("exec", "-n", namespace, pod, "--", "cat", f"/claims/{claim}/{path}")
