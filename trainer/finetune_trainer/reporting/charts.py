"""Line charts as inline SVG: axes with round numbers, no script. Pure: the same points, the same picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from finetune_trainer.reporting.html import Html, tag

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 14, 34
"""Margins of the plot, in the picture's units; its text stands there."""
TICKS = 7
ROUND_STEPS = (1, 2, 2.5, 5, 10)

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    name: str
    points: tuple[Point, ...]
    """Step and value, by step."""
    marked: bool = False
    """With a dot at each point: for few of them."""


@dataclass(frozen=True)
class Scale:
    """An axis: which number stands where."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Where a number stands, in the picture's units."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)


def line_chart(title: str, series: Sequence[Series], shown: Callable[[float], str], *, from_zero: bool = False) -> Html:
    """A figure with its lines over the steps; `shown` writes a value. Empty where there is no point.

    `from_zero`: for amounts, whose size is told by their height.
    """
    drawn = [each for each in series if each.points]
    if not drawn:
        return Html("")
    points = [point for each in drawn for point in each.points]
    steps = round_ticks([step for step, _ in points], from_zero=True)
    values = round_ticks([value for _, value in points], from_zero=from_zero)
    across = Scale(steps[0], steps[-1], LEFT, WIDTH - RIGHT)
    upward = Scale(values[0], values[-1], HEIGHT - BOTTOM, TOP)
    picture = tag(
        "svg",
        tag("title", f"{title}: {_told(drawn, shown)}"),
        *(_row(upward.at(value), shown(value)) for value in values),
        *(_column(across.at(step), f"{step:,.6g}") for step in steps),
        tag("text", "step", x=WIDTH - RIGHT, y=HEIGHT - 4, class_="end"),
        *(_line(each, index, across, upward) for index, each in enumerate(drawn)),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
    )
    return tag("figure", tag("figcaption", title, _legend(drawn, shown)), picture)


def round_ticks(numbers: Sequence[float], *, from_zero: bool = False) -> list[float]:
    """About `TICKS` round numbers, evenly apart, the first at or below all of them and the last at or above."""
    low, high = (0.0 if from_zero else min(numbers)), max(numbers)
    if high - low <= abs(high) * 1e-9:  # one value, or differences that are but rounding
        margin = abs(high) * 0.1 or 1.0
        low, high = (low if from_zero else low - margin), high + margin
    step = _round_step((high - low) / (TICKS - 1))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def _round_step(rough: float) -> float:
    scale = 10.0 ** math.floor(math.log10(rough))
    return next(step * scale for step in ROUND_STEPS if step * scale >= rough * (1 - 1e-9))


def _told(series: Sequence[Series], shown: Callable[[float], str]) -> str:
    """The chart in words, for those who do not see it."""
    return "; ".join(
        f"{each.name} from {shown(each.points[0][1])} at step {each.points[0][0]:,.6g} "
        f"to {shown(each.points[-1][1])} at step {each.points[-1][0]:,.6g}"
        for each in series
    )


def _legend(series: Sequence[Series], shown: Callable[[float], str]) -> Html:
    entries = (
        tag("span", f"{each.name} ", tag("b", shown(each.points[-1][1])), class_=f"key line{index}")
        for index, each in enumerate(series)
    )
    return tag("span", *entries, class_="legend")


def _row(y: float, label: str) -> Html:
    line = tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid")
    return Html(line + tag("text", label, x=LEFT - 6, y=y + 4, class_="end"))


def _column(x: float, label: str) -> Html:
    return tag("text", label, x=x, y=HEIGHT - BOTTOM + 15, class_="middle")


def _line(series: Series, index: int, across: Scale, upward: Scale) -> Html:
    places = [(across.at(step), upward.at(value)) for step, value in series.points]
    path = " ".join(f"{'L' if number else 'M'}{x} {y}" for number, (x, y) in enumerate(places))
    parts = (
        [tag("path", d=path, class_=f"line line{index}")]
        if any(one != other for one, other in pairwise(places))
        else []
    )
    marked = places if series.marked or not parts else []
    parts += [tag("circle", cx=x, cy=y, r=3, class_=f"dot line{index}") for x, y in marked]
    return Html("".join(parts))
