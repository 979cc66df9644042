"""FineTuneJobs on the cluster under test: make, watch, take apart. Every wait is for a condition, with a deadline."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.target import ROOT, Target, TargetError

Manifest = dict[str, Any]
Status = dict[str, Any]

Found = TypeVar("Found")

POLL_SECONDS = 0.5
DEADLINE_SECONDS = 300


def eventually(what: str, look: Callable[[], Found | None], deadline_seconds: float = DEADLINE_SECONDS) -> Found:
    """The first thing that `look` finds."""
    deadline = time.monotonic() + deadline_seconds
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(POLL_SECONDS)
    raise AssertionError(f"not seen within {deadline_seconds} s: {what}")


def in_cluster(*command: str) -> str:
    """What a command prints that runs among the cluster's own processes and mounts."""
    exec_ = [sys.executable, "-m", "cluster", "exec", "--", *command]
    return subprocess.run(exec_, cwd=ROOT, check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class Jobs:
    """The jobs of one namespace."""

    target: Target
    namespace: str

    def apply(self, name: str, **spec: Any) -> None:
        """Create a job out of the tiny one, with parts of its spec replaced; None takes a part away."""
        merged = {key: value for key, value in (tiny_spec() | spec).items() if value is not None}
        job = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "spec": merged}
        job["metadata"] = {"name": name, "namespace": self.namespace}
        self.target.apply(job)

    def get(self, name: str) -> Manifest:
        return self.target.get("finetunejob", name, self.namespace)

    def status(self, name: str) -> Status:
        status: Status = self.get(name).get("status", {})
        return status

    def condition(self, name: str, kind: str) -> Manifest:
        found = [c for c in self.status(name).get("conditions", []) if c["type"] == kind]
        return found[0] if found else {}

    def finish(self, name: str, deadline_seconds: float = DEADLINE_SECONDS) -> Status:
        """The status once the job is finished."""

        def finished() -> bool:
            return self.condition(name, "Finished").get("status") == "True"

        try:
            eventually(f"{name} finished", finished, deadline_seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.tell(name)}") from None
        return self.status(name)

    def tell(self, name: str) -> str:
        """All that helps to understand a job: its status, its pods, their logs."""
        selector = f"finetune.dev/job-name={name}"
        parts = [json.dumps(self.status(name), indent=1)]
        for command in (
            ("get", "pods,jobs,pvc", "-l", selector),
            ("logs", "-l", selector, "--tail=15", "--prefix"),
            ("get", "events", "--sort-by=.lastTimestamp"),
        ):
            try:
                parts.append(self.target.kubectl(*command, "-n", self.namespace))
            except TargetError as error:
                parts.append(str(error))
        return "\n".join(parts)

    def pods(self, name: str, stage: str) -> list[Manifest]:
        """The pods of one stage, whatever the attempt."""
        selector = f"finetune.dev/job-name={name},finetune.dev/stage={stage}"
        found = self.target.kubectl("get", "pods", "-n", self.namespace, "-l", selector, "-o", "json")
        items: list[Manifest] = json.loads(found)["items"]
        return items

    def running_pod(self, name: str, stage: str) -> str:
        """The name of the stage's running pod, once there is one."""

        def running() -> str | None:
            phases = {pod["metadata"]["name"]: pod["status"]["phase"] for pod in self.pods(name, stage)}
            return next((pod for pod, phase in phases.items() if phase == "Running"), None)

        return eventually(f"{name}'s {stage} pod runs", running)

    def stage_jobs(self, name: str) -> list[str]:
        """Names of the Jobs made for a FineTuneJob."""
        found = self.target.kubectl(
            "get", "jobs", "-n", self.namespace, "-l", f"finetune.dev/job-name={name}", "-o", "name"
        )
        return sorted(line.split("/")[1] for line in found.split())

    def events(self, name: str) -> list[Manifest]:
        found = self.target.kubectl(
            "get", "events", "-n", self.namespace, "--field-selector", f"involvedObject.name={name}", "-o", "json"
        )
        items: list[Manifest] = json.loads(found)["items"]
        return items


def tiny_spec() -> Manifest:
    """A job on a random model of kilobytes, all stages, on CPU."""
    return {
        "model": {"volume": {"claimName": "models", "path": "tiny"}},
        "datasets": [{"volume": {"claimName": "datasets", "path": "train.jsonl"}}],
        "evaluation": {"percent": 20, "maxRows": 16},
        "training": {"maxSteps": 6, "globalBatchSize": 4, "maxLength": 64, "learningRate": 0.01},
        "parallelism": {"gpusPerNode": 0},
        "pod": {"resources": {"requests": {"cpu": "100m", "memory": "500Mi"}, "limits": {"memory": "3Gi"}}},
        "output": {"volume": {"create": {"size": "1Gi"}}},
    }
