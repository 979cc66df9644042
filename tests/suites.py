"""Run the suites one after another and say how long each took: `python3 -m tests.suites [--full] SUITE...`.

Every suite runs even if one before it failed; the exit code is 0 only if all passed. `--full` runs the random trials at
their full count instead of a sample.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / ".venv" / "bin"

Command = list[str]


def pytest(*arguments: str) -> Command:
    return [str(BIN / "pytest"), *arguments]


SIDE_BY_SIDE = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
"""Two processes, one for each of a small machine's cores. A file's tests stay together: what they share is made
once."""


def tool(name: str, *arguments: str) -> Command:
    return [str(BIN / name), *arguments]


SUITES: dict[str, list[Command]] = {
    "lint": [
        tool("ruff", "check", "."),
        tool("ruff", "format", "--check", "."),
        tool(
            "mypy",
            "operator/finetune_operator",
            "trainer/finetune_trainer",
            "cluster",
            "examples",
            "benchmarks",
            "tests",
        ),
        tool("lint-imports"),
    ],
    "unit": [
        [sys.executable, "-m", "cluster", "build"],
        [sys.executable, "-c", "from cluster import build; build.build_servers(); build.build_rule_checker()"],
        ["env", "OMP_NUM_THREADS=1", *pytest("tests/unit", *SIDE_BY_SIDE, "--durations=5")],
    ],
    "apiserver": [pytest("tests/apiserver", "--durations=5")],
    "e2e": [pytest("tests/e2e", "--durations=10")],
    "chaos": [pytest("tests", "-m", "chaos")],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="random trials at their full count")
    parser.add_argument("suites", nargs="+", choices=SUITES)
    options = parser.parse_args()
    results = [(suite, *run(suite, full=options.full)) for suite in options.suites]
    print("\nsuite        result   minutes")
    for suite, passed, seconds in results:
        print(f"{suite:<12} {'passed' if passed else 'FAILED':<8} {seconds / 60:7.1f}")
    return 0 if all(passed for _, passed, _ in results) else 1


def run(suite: str, *, full: bool) -> tuple[bool, float]:
    started = time.monotonic()
    passed = True
    for command in SUITES[suite]:
        print(f"\n== {suite}: {Path(command[0]).name} {' '.join(command[1:])}", flush=True)
        full_trials = ["--full-trials"] if full and any(part.endswith("/pytest") for part in command) else []
        passed &= subprocess.run([*command, *full_trials], cwd=ROOT, check=False).returncode == 0
    return passed, time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
