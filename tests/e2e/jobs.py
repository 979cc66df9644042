"""FineTuneJobs on the cluster under test: make, watch, take apart. Every wait is for a condition, with a deadline."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cluster.staging import read_file
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

    def patch(self, name: str, **spec: Any) -> None:
        """Change what may be changed of a job's spec."""
        change = json.dumps({"spec": spec})
        self.target.kubectl("patch", "finetunejob", name, "-n", self.namespace, "--type=merge", "-p", change)

    def get(self, name: str) -> Manifest:
        return self.target.get("finetunejob", name, self.namespace)

    def status(self, name: str) -> Status:
        status: Status = self.get(name).get("status", {})
        return status

    def ended(self, name: str, number: int, stage: str = "train") -> Status:
        """What is told of an attempt of a stage, once it has ended."""

        def found() -> Status | None:
            attempts = self.status(name).get("attempts", [])
            told = (a for a in attempts if (a["number"], a["stage"]) == (number, stage) and "completionTime" in a)
            return next(told, None)

        try:
            return eventually(f"{name}'s attempt {number} of {stage} has ended", found)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.tell(name)}") from None

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


LONG_TRAINING: Manifest = {
    "training": {
        "maxSteps": 100,
        "globalBatchSize": 4,
        "perDeviceTrainBatchSize": 2,
        "maxLength": 64,
        "learningRate": 0.001,
        "checkpoint": {"everySteps": 10},
        "eval": {"everySteps": 50},
    },
    "method": {"lora": {"r": 4, "dropout": 0.1}},
}
"""Long enough to be disturbed; what it comes to is the fixture `unbroken_adapter`."""


def checkpoint_step(jobs: Jobs, pod: str) -> int:
    """The checkpoint that a running train pod has reached, 0 before the first."""
    try:
        path = f"/api/v1/namespaces/{jobs.namespace}/pods/{pod}:8080/proxy/progress"
        text = jobs.target.kubectl("get", "--raw", path)
    except TargetError:
        return 0
    return int(json.loads(text).get("checkpointStep") or 0)


def in_mid_run(jobs: Jobs, name: str, step: int = 20) -> str:
    """The name of the running train pod, once it has a checkpoint of this step."""
    pod = jobs.running_pod(name, "train")
    eventually(f"{name}'s checkpoint of step {step}", lambda: checkpoint_step(jobs, pod) >= step)
    return pod


def adapter_digest(jobs: Jobs, name: str) -> str:
    """The digest of the adapter's weights, as its manifest has it."""
    status = jobs.status(name)
    text = read_file(jobs.target, jobs.namespace, status["claimName"], f"{status['folder']}/adapter/manifest.json")
    (digest,) = [f["sha256"] for f in json.loads(text)["files"] if f["path"] == "adapter_model.safetensors"]
    return str(digest)


def work_folder(jobs: Jobs, name: str) -> Path:
    """The job's folder on its volume, which is a folder of this machine."""
    status = jobs.status(name)
    volume = jobs.target.get("pvc", status["claimName"], jobs.namespace)["spec"]["volumeName"]
    spec = jobs.target.get("pv", volume, "")["spec"]
    return Path(spec.get("hostPath", spec.get("local"))["path"], status["folder"])


def processes_of(jobs: Jobs, pod: str) -> list[int]:
    """The trainer's processes that compute, by their numbers inside the cluster: ranks, or the only process."""
    numbers = inhabitants(jobs.target, jobs.namespace, pod)
    ranks, alone = _with("RANK=", numbers, "environ"), _with("--attempt", numbers, "cmdline")
    assert ranks or alone, f"no trainer of {pod} was found among {numbers}"
    return ranks or alone


def inhabitants(target: Target, namespace: str, pod: str) -> list[int]:
    """All processes of a pod, by their numbers inside the cluster."""
    uid = target.get("pod", pod, namespace)["metadata"]["uid"]
    pattern = f"-e {uid} -e {uid.replace('-', '_')}"  # as the kubelet's cgroup driver writes it
    found = in_cluster("sh", "-c", f"grep -l {pattern} /proc/[0-9]*/cgroup 2>/dev/null || true").split()
    return [int(path.split("/")[2]) for path in found]


def _with(words: str, processes: list[int], file: str) -> list[int]:
    """Those in whose file of /proc these words stand; all looked at by one command, as a training goes on meanwhile."""
    files = [f"/proc/{process}/{file}" for process in processes]
    found = in_cluster("sh", "-c", f"grep -l -e {words} /dev/null {' '.join(files)} 2>/dev/null || true")
    return [int(path.split("/")[2]) for path in found.split()]


def send(signal_name: str, processes: list[int]) -> None:
    """Send a signal to processes inside the cluster."""
    in_cluster("kill", f"-{signal_name}", *map(str, processes))


def tiny_spec() -> Manifest:
    """A job on a random model of kilobytes, all stages, on CPU."""
    return {
        "model": {"volume": {"claimName": "models", "path": "tiny"}},
        "datasets": [{"volume": {"claimName": "datasets", "path": "train.jsonl"}}],
        "evaluation": {"percent": 20, "maxRows": 16},
        "training": {"maxSteps": 6, "globalBatchSize": 4, "maxLength": 64, "learningRate": 0.01},
        "parallelism": {"gpusPerNode": 0},
        "pod": {
            "resources": {"requests": {"cpu": "100m", "memory": "500Mi"}, "limits": {"memory": "3Gi"}},
            "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],  # threads spin while they wait for each other
        },
        "output": {"volume": {"create": {"size": "1Gi"}}},
    }
