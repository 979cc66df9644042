"""Our training on a GPU beside TRL with PEFT, and Unsloth where it is installed: speed, memory, loss.

    python -m benchmarks.gpu --work qlora-8x512 packed --rounds 2        # random weights shaped as Llama-3-8B
    python -m benchmarks.gpu --spec '{}' '{"method": {...}}'             # ours twice, with other settings
    python -m benchmarks.gpu --profile DIR --by ours                     # and what a step of ours is made of
    python -m benchmarks.gpu --task --model DIR --data FILE --seeds 5    # held-out loss after 50 steps
    python -m benchmarks.gpu --shape tiny --device cpu                   # to see it run

Each training has a process of its own, one after another, in turns. One that fails loses its own row only.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.process import OURS, TRL, UNSLOTH, Figures, Run
from benchmarks.gpu.task import Task
from benchmarks.gpu.works import BASES, SHAPES, WORKS
from cluster.target import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

GIB = 2**30
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}
"""Dense bf16 products a second times two, by NVIDIA's data sheets (SXM), where the GPU's name has this word."""
FLOPS_A_PARAMETER = 4
"""Of a frozen base, a token: two forward, two for the gradient of the input. Attention and adapters are left out."""
TASK_STEPS = 50
STDERR_SHOWN = 3000


@dataclass(frozen=True)
class Contestant:
    """Who trains, and with what settings of ours."""

    by: str
    spec: dict[str, Any]

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.by} {json.dumps(self.spec)}" if self.spec else self.by


Outcome = Figures | str
"""Or why there are no figures."""


def run_process(run: Run) -> Outcome:
    """Train in a process of its own."""
    known = os.environ.get("PYTHONPATH")
    paths = os.pathsep.join([*(str(ROOT / name) for name in ("", "trainer")), *([known] if known else [])])
    environment = {**os.environ, "PYTHONPATH": paths, **({"CUDA_VISIBLE_DEVICES": ""} if run.device == "cpu" else {})}
    done = subprocess.run(  # noqa: S603 - our own words
        [sys.executable, "-m", "benchmarks.gpu.process", json.dumps(asdict(run))],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    lines = done.stdout.splitlines()
    try:
        found: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        found = {"error": f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}"}
    if "error" in found:
        sys.stderr.write(done.stderr[-STDERR_SHOWN:])
        return str(found["error"])
    return Figures(**found)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line as soon as it is known, and tables at the end."""
    given = _parse(argv)
    contestants = _contestants(given.by, given.spec)
    if given.task:
        _compare_tasks(given, contestants)
    else:
        _compare_works(given, contestants)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS), help="default: all")
    parser.add_argument("--shape", choices=SHAPES, default="8b", help="default: %(default)s")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--by", nargs="+", choices=("ours", "trl", "unsloth"), default=["ours", "trl", "unsloth"])
    parser.add_argument("--spec", nargs="+", type=json.loads, default=[{}], help="over ours; of several, each in turn")
    parser.add_argument("--rounds", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=5, help="timed; default: %(default)s")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before, 1 or more; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--profile", type=Path, metavar="DIR", help="write a profile of one step of ours, a file a work"
    )
    task = parser.add_argument_group("a small real task")
    task.add_argument("--task", action="store_true", help=f"held-out loss after {TASK_STEPS} steps, instead of speed")
    task.add_argument("--model", type=Path, help="folder")
    task.add_argument("--data", type=Path, help="file of JSON lines, columns as our trainer takes them")
    task.add_argument("--method", choices=BASES, default="LoRA")
    task.add_argument("--task-steps", type=int, default=TASK_STEPS, help="default: %(default)s")
    task.add_argument("--seeds", type=int, default=1, help="default: %(default)s")
    given = parser.parse_args(argv)
    if given.warm_up < 1 or given.steps < 1:
        parser.error("--warm-up and --steps are 1 or more: a step is timed from the end of the one before")
    if given.task and not (given.model and given.data):
        parser.error("--task needs --model and --data")
    return given


def _contestants(by: Sequence[str], specs: Sequence[dict[str, Any]]) -> list[Contestant]:
    """In turns; Unsloth only where it is there."""
    found = []
    if "ours" in by:
        found += [Contestant(OURS, spec) for spec in specs]
    if "trl" in by:
        found.append(Contestant(TRL, {}))
    if "unsloth" in by:
        if importlib.util.find_spec("unsloth") is None:
            print("Unsloth: not installed")
        else:
            found.append(Contestant(UNSLOTH, {}))
    return found


# Speed


def _compare_works(given: argparse.Namespace, contestants: Sequence[Contestant]) -> None:
    outcomes: dict[tuple[str, str], list[Outcome]] = {}
    for work in given.work:
        for number in range(given.rounds):
            for contestant in contestants:
                run = Run(
                    by=contestant.by,
                    device=given.device,
                    seed=given.seed,
                    steps=given.warm_up + given.steps,
                    work=work,
                    shape=given.shape,
                    spec=contestant.spec,
                    warm_up=given.warm_up,
                    profile=_profile_of(given.profile, work, contestant, contestants) if number == 0 else "",
                )
                begun = time.monotonic()
                outcome = run_process(run)
                outcomes.setdefault((work, contestant.name), []).append(outcome)
                told = f"failed: {outcome}" if isinstance(outcome, str) else _told(outcome)
                print(f"{work}, {contestant.name}: {told} ({time.monotonic() - begun:.0f} s)", flush=True)
    print("\n" + speed_table(outcomes))


def _profile_of(folder: Path | None, work: str, of: Contestant, all_of_them: Sequence[Contestant]) -> str:
    """The file for a profile; empty where none is wanted."""
    if folder is None or of.by != OURS:
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder.resolve() / f"{work}-{all_of_them.index(of)}.txt")


def _told(figures: Figures) -> str:
    return (
        f"{speed(figures):,.0f} tokens/s, {figures.peak_bytes / GIB:.2f} GiB "
        f"({figures.reserved_bytes / GIB:.2f} reserved), first loss {figures.first_loss:.4f}"
    )


def speed(figures: Figures) -> float:
    """Tokens a second of the median step, padding left out."""
    return figures.step_tokens / statistics.median(figures.step_seconds)


def utilization(figures: Figures) -> float | None:
    """Of the GPU's dense bf16 peak; None where that is not known."""
    peak = next((flops for word, flops in PEAK_FLOPS.items() if word in figures.device), None)
    return None if peak is None else speed(figures) * FLOPS_A_PARAMETER * figures.parameters / peak


def speed_table(outcomes: dict[tuple[str, str], list[Outcome]]) -> str:
    """Markdown: the medians of the rounds that have figures, and of the speed the range; ratios are to TRL."""
    lines = [
        "| work | by | tokens/s | rounds | MFU | peak GiB | reserved GiB | first loss | tokens/s / TRL | peak / TRL |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    found = {key: [each for each in rounds if isinstance(each, Figures)] for key, rounds in outcomes.items()}
    for (work, name), rounds in found.items():
        if not rounds:
            lines.append(f"| {work} | {name} | failed: {outcomes[work, name][-1]} | | | | | | | |")
            continue
        speeds = sorted(map(speed, rounds))
        used = [each for each in map(utilization, rounds) if each is not None]
        theirs = found.get((work, TRL), [])
        cells = [
            work,
            name,
            f"{statistics.median(speeds):,.0f}",
            f"{len(rounds)}: {speeds[0]:,.0f} to {speeds[-1]:,.0f}",
            f"{statistics.median(used):.3f}" if used else "",
            f"{_median(rounds, _peak):.2f}",
            f"{_median(rounds, _reserved):.2f}",
            f"{_median(rounds, lambda each: each.first_loss):.4f}",
            _ratio(rounds, theirs, speed),
            _ratio(rounds, theirs, _peak),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    one = next((each for rounds in found.values() for each in rounds), None)
    if one is not None:
        lines += ["", f"On {one.device}. {_explained(one)}"]
    return "\n".join(lines)


def _explained(figures: Figures) -> str:
    peak = next((flops for word, flops in PEAK_FLOPS.items() if word in figures.device), None)
    if peak is None:
        return "No MFU: its peak is not known."
    return (
        f"MFU is of {peak / 1e12:,.0f} TFLOP/s, dense bf16, at {FLOPS_A_PARAMETER}N FLOPs a token: the base is frozen. "
        f"N is {figures.parameters:,} parameters, the head with them, the embeddings not; attention is left out."
    )


def _peak(figures: Figures) -> float:
    return figures.peak_bytes / GIB


def _reserved(figures: Figures) -> float:
    return figures.reserved_bytes / GIB


def _median(rounds: Sequence[Figures], of: Callable[[Figures], float]) -> float:
    return statistics.median(map(of, rounds))


def _ratio(rounds: Sequence[Figures], theirs: Sequence[Figures], of: Callable[[Figures], float]) -> str:
    """Empty where there is nothing to compare with, as on CPU, whose memory is not measured."""
    base = _median(theirs, of) if theirs else 0.0
    return f"{_median(rounds, of) / base:.2f}" if base else ""


# A small real task


def _compare_tasks(given: argparse.Namespace, contestants: Sequence[Contestant]) -> None:
    losses: dict[str, list[float | None]] = {each.name: [] for each in contestants}
    with tempfile.TemporaryDirectory(prefix="task-") as folder:
        task = Task(Path(folder))
        task.prepare(given.model, given.data, given.method, given.device, given.task_steps)
        first = Run(by="", device=given.device, seed=0, steps=given.task_steps, task=folder)
        for seed in range(given.seed, given.seed + given.seeds):
            for contestant in contestants:
                outcome = run_process(replace(first, by=contestant.by, seed=seed, spec=contestant.spec))
                loss = None if isinstance(outcome, str) else outcome.held_out_loss
                losses[contestant.name].append(loss)
                told = f"failed: {outcome}" if loss is None else f"held-out loss {loss:.4f}"
                print(f"seed {seed}, {contestant.name}: {told}", flush=True)
    print("\n" + task_table(losses))


def task_table(losses: dict[str, list[float | None]]) -> str:
    """Markdown: mean held-out loss, and its difference from TRL's of the same seed with its standard error."""
    lines = ["| by | seeds | held-out loss | less TRL's | standard error |", "| --- | --- | --- | --- | --- |"]
    theirs = losses.get(TRL, [])
    for name, found in losses.items():
        known = [each for each in found if each is not None]
        pairs = [
            one - other
            for one, other in zip(found, theirs, strict=False)
            if name != TRL and one is not None and other is not None
        ]
        mean = f"{statistics.mean(known):.4f}" if known else "failed"
        apart = f"{statistics.mean(pairs):+.4f}" if pairs else ""
        error = f"{statistics.stdev(pairs) / math.sqrt(len(pairs)):.4f}" if len(pairs) > 1 else ""
        lines.append(f"| {name} | {len(known)} | {mean} | {apart} | {error} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
