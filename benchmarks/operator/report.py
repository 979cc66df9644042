"""The figures as a table: ours, the target, the plain operator's, the ratio, no operator's, Kubeflow Trainer's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

Figures = dict[str, float]


@dataclass(frozen=True)
class Row:
    """One figure. Less is better throughout."""

    what: str
    unit: str
    target: float | None = None
    trainer: str = ""
    """Kubeflow Trainer's, from the project's design notes: measured once, by other means than these."""
    digits: int = 0


ROWS: Mapping[str, Row] = {
    "fast-p50": Row("CR to Job at 20/s, p50", "ms", 30, "4,300-4,800"),
    "fast-p99": Row("CR to Job at 20/s, p99", "ms", 250, "9,000-9,600"),
    "fast-writes": Row("writes a job at 20/s", "", 7, digits=1),
    "slow-p50": Row("CR to Job at 3/s, p50", "ms", trainer="30"),
    "slow-p99": Row("CR to Job at 3/s, p99", "ms", trainer="49"),
    "slow-writes": Row("writes a job at 3/s", "", 7, "15.7", digits=1),
    "burst-jobs": Row("all at once: all Jobs exist", "s", 15, "87-106", 1),
    "burst-finished": Row("all at once: all finished", "s", 60, "93-112", 1),
    "burst-writes": Row("all at once: writes a job", "", 7, "8.4", 1),
    "burst-events": Row("all at once: Events a job", "", digits=1),
    "burst-reads": Row("all at once: reads a job", "", digits=1),
    "burst-operator-cpu": Row("all at once: operator's CPU a job", "ms", trainer="25"),
    "burst-server-cpu": Row("all at once: API server's CPU a job", "ms", 60, "105"),
    "burst-memory": Row("all at once: operator's memory at most", "MiB"),
    "restart-quiet": Row("restart: quiet after", "s", 3, "1.7", 1),
    "restart-writes": Row("restart: writes", "", 0, "0"),
    "restart-memory": Row("restart: operator's memory", "MiB", trainer="86 + 190"),
    "idle-leases": Row("idle: writes of the Lease a second", "", trainer="0.5 each", digits=2),
    "idle-others": Row("idle: any other calls in 30 s", "", 0),
    "idle-cpu": Row("idle: CPU", "% of a core", digits=1),
    "idle-memory": Row("idle: operator's memory", "MiB"),
    "large-quiet": Row("large restart: quiet after", "s", 10, digits=1),
    "large-writes": Row("large restart: writes", "", 0),
    "large-memory": Row("large restart: operator's memory", "MiB", 150),
    "leader-killed": Row("leader killed: first reconcile of the next", "s", 17, "17.0", 1),
}


def table(ours: Figures, plain: Figures, nobody: Figures) -> str:
    """Markdown; a figure that was not measured of anyone is left out."""
    head = [
        "| | ours | target | plain kopf | ours / plain | no operator | Trainer + JobSet |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    keys = [key for key in ROWS if key in {*ours, *plain, *nobody}]
    return "\n".join([*head, *(_line(ROWS[key], *(who.get(key) for who in (ours, plain, nobody))) for key in keys)])


def _line(row: Row, ours: float | None, plain: float | None, nobody: float | None) -> str:
    missed = ours is not None and row.target is not None and round(ours, row.digits) > row.target
    told = _number(ours, row)
    ratio = f"{ours / plain:.2f}" if ours is not None and plain else ""
    unit = f", {row.unit}" if row.unit else ""
    target = f"{row.target:g}" if row.target is not None else ""
    cells = [f"{row.what}{unit}", f"**{told}** (missed)" if missed else told, target, _number(plain, row), ratio]
    return "| " + " | ".join([*cells, _number(nobody, row), row.trainer]) + " |"


def _number(value: float | None, row: Row) -> str:
    return "" if value is None else f"{value:,.{row.digits}f}"
