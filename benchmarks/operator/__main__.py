"""python -m benchmarks.operator [--scenario steady burst] [--jobs 1000]: the operator at scale.

Beside it a plain one, and none at all: what the machine takes for the Jobs and pods alone.

A real API server with etcd, controller manager, scheduler and KWOK's nodes starts for each scenario and contestant, on
the same cores as the operator. Every FineTuneJob has one stage (stopAfter: Prepare), whose pod runs for a second and
ends with a valid last word. The figures come as a table on standard output.

  steady   jobs at 20 and at 3 a second: how long until a job's Job is seen, by a watch
  burst    all jobs at once: until all have a Job, until all are finished, and what it cost
  restart  a restart among finished jobs and five times as many pods of others, then idleness
  large    the same with five times the jobs and twice the pods
  leader   two replicas, of which the leading one is killed
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.operator import scenarios
from benchmarks.operator.client import Client
from benchmarks.operator.contestants import FINETUNE, KOPF, NOBODY, Contestant
from benchmarks.operator.ground import Ground
from benchmarks.operator.report import Figures, table
from benchmarks.operator.scenarios import Bench

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

CONTESTANTS = {"ours": FINETUNE, "plain": KOPF, "none": NOBODY}
SCENARIOS: dict[str, Callable[[Bench], Awaitable[Figures]]] = {
    "steady": scenarios.steady,
    "burst": scenarios.burst,
    "restart": scenarios.restart,
    "large": scenarios.large,
    "leader": scenarios.leader,
}
LEFT_OUT = {"plain": ("leader",), "none": ("restart", "large", "leader")}
"""The plain operator has no second replica, and where there is none nothing restarts."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the scenarios and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.operator", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), help="default: all")
    parser.add_argument("--operator", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="default: all")
    parser.add_argument("--jobs", type=int, default=1000, help="of the burst and the restart; the others scale with it")
    parser.add_argument("--keep", type=Path, help="folder for logs and audit logs; default: a temporary one")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench-operator-") as scratch:
        folder: Path = arguments.keep or Path(scratch)
        found = {name: _measure(name, arguments, folder) for name in arguments.operator}
    print(f"{arguments.jobs:,} jobs; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end\n")
    print(table(*(found.get(name, {}) for name in CONTESTANTS)))


def _measure(name: str, arguments: argparse.Namespace, folder: Path) -> Figures:
    chosen = [scenario for scenario in SCENARIOS if scenario in arguments.scenario]
    figures: Figures = {}
    for scenario in chosen:
        if scenario not in LEFT_OUT.get(name, ()):
            place = folder / f"{name}-{scenario}"
            figures |= asyncio.run(_scenario(scenario, CONTESTANTS[name], arguments.jobs, place))
    return figures


async def _scenario(name: str, contestant: Contestant, jobs: int, folder: Path) -> Figures:
    with Ground(folder) as ground:
        async with Client(ground.kubeconfig) as client:
            return await SCENARIOS[name](Bench(ground, client, contestant, jobs))


if __name__ == "__main__":
    main()
