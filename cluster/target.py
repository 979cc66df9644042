"""The cluster that the demo and the end-to-end tests work on: its tools, its images, and the chart on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "charts" / "finetune-operator"
RELEASE = "finetune-operator"
OPERATOR_NAMESPACE = "finetune-system"


class TargetError(Exception):
    """Something the cluster or its user has to mend; the message says what."""


@dataclass(frozen=True)
class Target:
    """A reachable cluster and the two images that it can run."""

    kubectl_path: str
    helm_path: str
    kubeconfig: str | None
    operator_image: str
    trainer_image: str

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """What kubectl prints; TargetError with its own words if it fails."""
        return self._run(self.kubectl_path, *arguments, stdin=stdin)

    def helm(self, *arguments: str) -> str:
        """What helm prints; TargetError with its own words if it fails."""
        return self._run(self.helm_path, *arguments)

    def get(self, kind: str, name: str, namespace: str) -> dict[str, Any]:
        """One object, as the API server has it."""
        found: dict[str, Any] = json.loads(self.kubectl("get", kind, name, "-n", namespace, "-o", "json"))
        return found

    def apply(self, *manifests: dict[str, Any]) -> None:
        """Create or change objects, strictly."""
        items = {"apiVersion": "v1", "kind": "List", "items": list(manifests)}
        self.kubectl("apply", "--validate=strict", "-f", "-", stdin=json.dumps(items))

    def install_chart(self, **values: object) -> None:
        """Install or upgrade the operator, and wait until it is ready."""
        operator_repository, operator_tag = self.operator_image.rsplit(":", 1)
        trainer_repository, trainer_tag = self.trainer_image.rsplit(":", 1)
        fixed = {
            "image.repository": operator_repository,
            "image.tag": operator_tag,
            "trainer.image.repository": trainer_repository,
            "trainer.image.tag": trainer_tag,
        }
        settings = [f"--set-json={name}={json.dumps(value)}" for name, value in (fixed | values).items()]
        where = ["--namespace", OPERATOR_NAMESPACE, "--create-namespace"]
        self.helm("upgrade", "--install", RELEASE, str(CHART), *where, "--wait", "--timeout", "3m", *settings)

    def _run(self, *command: str, stdin: str | None = None) -> str:
        environment = os.environ | ({"KUBECONFIG": self.kubeconfig} if self.kubeconfig else {})
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise TargetError(f"{Path(command[0]).name} {' '.join(command[1:4])} ...: {done.stderr.strip()}")
        return done.stdout


def local_target() -> Target:
    """This checkout's own cluster, started and given both images."""
    _cluster_tool("up")
    folder = ROOT / ".cluster"
    return Target(
        kubectl_path=str(folder / "bin" / "kubectl"),
        helm_path=str(folder / "bin" / "helm"),
        kubeconfig=str(folder / "kubeconfig"),
        operator_image=_cluster_tool("image", "operator").split()[-1],
        trainer_image=_cluster_tool("image", "trainer").split()[-1],
    )


def provide_store_image() -> None:
    """Give this checkout's own cluster the image of examples/store.yaml."""
    _cluster_tool("image", "store")


def current_target() -> Target:
    """The cluster of the current kubeconfig, with images that its nodes can pull."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    tag = os.environ.get("IMAGE_TAG", version)
    repository = os.environ.get("IMAGE_REPOSITORY", "").rstrip("/")
    if not repository:
        raise TargetError(
            "IMAGE_REPOSITORY is not set: say where your cluster pulls the images from, e.g.\n"
            f"  IMAGE_REPOSITORY=registry.example/team make demo CLUSTER=current\n"
            "and put them there first:\n"
            f"  docker build --target operator -t $IMAGE_REPOSITORY/finetune-operator:{tag} . && docker push ...\n"
            f"  docker build --target trainer -t $IMAGE_REPOSITORY/finetune-trainer:{tag} . && docker push ..."
        )
    target = Target(
        kubectl_path=_tool("kubectl"),
        helm_path=_tool("helm"),
        kubeconfig=None,
        operator_image=f"{repository}/finetune-operator:{tag}",
        trainer_image=f"{repository}/finetune-trainer:{tag}",
    )
    target.kubectl("version", "-o", "json")
    return target


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise TargetError(f"{name} is not on the PATH: CLUSTER=current works with your own {name}.")
    return found


def _cluster_tool(*arguments: str) -> str:
    """Run a verb of the local cluster, its progress shown; returns what it prints as its answer."""
    command = [sys.executable, "-m", "cluster", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise TargetError(f"`python3 -m cluster {' '.join(arguments)}` failed; its last words are above.")
    return done.stdout
