"""Every recipe's small twin to its end: `make recipes`, or `python3 -m cluster.recipes [--only 1 3a ...]`.

Starts or finds the local cluster, installs the chart, makes models of the recipes' architectures with random weights,
stages them beside real rows, and runs examples/recipes/small/*.yaml. Exit code 0 only if all of them succeeded and the
held-out loss of each fell.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cluster import staging
from cluster.demo import CACHE, Status, is_finished, make_dataset, progress_line
from cluster.target import ROOT, Target, TargetError, local_target

NAMESPACE = "finetune-recipes"
FOLDER = ROOT / "examples" / "recipes" / "small"
DEADLINE_SECONDS = 1800
AT_ONCE = 2


@dataclass(frozen=True)
class Recipe:
    """One small twin."""

    key: str
    """What --only takes: 1, 1a, 3b, ..."""
    path: Path

    @property
    def job(self) -> str:
        """The name of its FineTuneJob."""
        return f"small-{self.key}"


@dataclass(frozen=True)
class Outcome:
    """How a recipe ended."""

    recipe: Recipe
    status: Status
    seconds: float

    @property
    def losses(self) -> tuple[float, float] | None:
        """Held-out loss before and after training, nats a token, if both were measured."""
        measured = [artifact.get("measured", {}) for artifact in self.status.get("artifacts", [])]
        found = next((each for each in measured if "evalLossBase" in each), None)
        return None if found is None else (float(found["evalLossBase"]), float(found["evalLoss"]))

    @property
    def good(self) -> bool:
        """Whether the job succeeded and learned."""
        losses = self.losses
        return self.status.get("phase") == "Succeeded" and losses is not None and losses[1] < losses[0]


def main() -> int:
    """Run the recipes; the exit code."""
    known = recipes()
    parser = argparse.ArgumentParser(prog="make recipes", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=[recipe.key for recipe in known], help="some of them (default: all)"
    )
    parser.add_argument(
        "--at-once", type=int, default=AT_ONCE, metavar="N", help="jobs at a time (default: %(default)s)"
    )
    options = parser.parse_args()
    chosen = [recipe for recipe in known if options.only is None or recipe.key in options.only]
    try:
        target = local_target()
        target.install_chart(**{"operator.progressIntervalSeconds": 3})
        stage(target)
        outcomes = run_all(target, chosen, options.at_once)
    except TargetError as error:
        print(f"\nThe recipes cannot go on: {error}", file=sys.stderr)
        return 1
    print(f"\n{table(outcomes)}")
    return 0 if all(outcome.good for outcome in outcomes) else 1


def recipes() -> list[Recipe]:
    """All small twins, in the order of the recipes."""
    return [Recipe(path.name.partition("-")[0], path) for path in sorted(FOLDER.glob("*.yaml"))]


def stage(target: Target) -> None:
    """A namespace with Pod Security `restricted`, and the twins' models and rows on two claims."""
    folder = CACHE / "recipes"
    if not (folder / "models" / "qwen2-gptq" / "config.json").exists():
        print("Making models of the recipes' architectures", flush=True)
        command = [ROOT / ".venv/bin/python", FOLDER / "stage.py", make_dataset(), folder]
        done = subprocess.run([str(word) for word in command], check=False, capture_output=True, text=True)
        if done.returncode:
            raise TargetError(f"{FOLDER.relative_to(ROOT)}/stage.py failed:\n{done.stderr}")
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    target.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}})
    for claim in (staging.build_claim("models", "1Gi"), staging.build_claim("datasets", "1Gi")):
        target.kubectl("apply", "-n", NAMESPACE, "-f", "-", stdin=json.dumps(claim))
    files = {f"models/{path.name}": path for path in sorted((folder / "models").iterdir())}
    files |= {f"datasets/{path.name}": path for path in sorted((folder / "datasets").iterdir())}
    staging.put_files(target, NAMESPACE, files)


def run_all(target: Target, chosen: list[Recipe], at_once: int) -> list[Outcome]:
    """Start the jobs, so many at a time, and follow them to their ends."""
    waiting, outcomes = list(chosen), list[Outcome]()
    running: dict[Recipe, float] = {}
    watch: dict[str, str] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            recipe = waiting.pop(0)
            start(target, recipe)
            running[recipe] = time.monotonic()
        for recipe, began in list(running.items()):
            status: Status = target.get("finetunejob", recipe.job, NAMESPACE).get("status", {})
            tell(recipe, status, watch)
            if is_finished(status):
                del running[recipe]
                outcomes.append(Outcome(recipe, status, time.monotonic() - began))
            elif time.monotonic() - began > DEADLINE_SECONDS:
                raise TargetError(f"{recipe.job} is not finished after {DEADLINE_SECONDS // 60} minutes.")
        time.sleep(1)
    return sorted(outcomes, key=lambda outcome: chosen.index(outcome.recipe))


def start(target: Target, recipe: Recipe) -> None:
    """Apply the twin's own file, after an earlier run of it is gone, claim and all."""
    target.kubectl("delete", "finetunejob", recipe.job, "-n", NAMESPACE, "--ignore-not-found", "--wait")
    for claim in target.kubectl("get", "pvc", "-n", NAMESPACE, "-o", "name").split():
        if claim.startswith(f"persistentvolumeclaim/{recipe.job}-"):
            target.kubectl("delete", claim, "-n", NAMESPACE, "--wait=false")
    target.kubectl("apply", "--validate=strict", "-n", NAMESPACE, "-f", str(recipe.path))
    print(f"{recipe.job:<10} kubectl apply -f {recipe.path.relative_to(ROOT)}", flush=True)


def tell(recipe: Recipe, status: Status, watch: dict[str, str]) -> None:
    """A line for each phase of a job, and for its end."""
    phase = status.get("phase", "Pending")
    if watch.get(recipe.key) != phase:
        watch[recipe.key] = phase
        print(f"{recipe.job:<10} {progress_line(status)}", flush=True)


def table(outcomes: list[Outcome]) -> str:
    """Recipe, stages, held-out loss before and after, seconds."""
    lines = [f"{'recipe':<26} {'stages':<34} {'held-out loss':>20} {'seconds':>8}  phase"]
    for outcome in outcomes:
        stages = " ".join(stage["name"] for stage in outcome.status.get("stages", []))
        losses = outcome.losses
        told = "not measured" if losses is None else f"{losses[0]:.4f} -> {losses[1]:.4f}"
        phase = outcome.status.get("phase", "")
        lines.append(f"{outcome.recipe.path.stem:<26} {stages:<34} {told:>20} {outcome.seconds:>8.0f}  {phase}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
