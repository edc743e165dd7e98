"""Charts as geometry: where bars, lines and ticks lie. The template draws them as SVG, in the page's own colours.

Drawn pictures would be stuck with one theme and one font; this is also a tenth of their size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from nightseg.report.formatting import exact, significant

SIZE = (480, 200)  # of the drawing, in its own units; the page scales it
SMALL = (240, 130)  # of which many stand side by side
LEFT, RIGHT, TOP, BOTTOM = 40, 10, 20, 24  # margins around the axes; they hold the tick labels
DOTS_WIDTH, DOTS_MARGIN = 220, 8  # of a row of dots
_MAX_TICKS = 5

Range = tuple[float, float]


class Bar(NamedTuple):
    """A rectangle; `kind` is its style class, `title` what it says when touched."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    title: str


class Line(NamedTuple):
    """A polyline: SVG points."""

    points: str
    kind: str


class Dot(NamedTuple):
    """The middle of a small circle; `title` is what it says when touched."""

    x: float
    y: float
    kind: str
    title: str = ""


class Tick(NamedTuple):
    """A labelled place on an axis."""

    place: float
    text: str


class Chart:
    """Everything the template needs to draw one chart; `kinds` are those of its legend, in drawing order.

    `marks` are named values on the x axis: vertical lines through the whole height.
    """

    def __init__(
        self,
        x: Range,
        y: Range,
        kinds: Sequence[str],
        description: str,
        marks: Mapping[str, float] | None = None,
        size: tuple[int, int] = SIZE,
    ) -> None:
        self.kinds, self.description = tuple(kinds), description
        self.width, self.height = size
        self.left, self.right, self.top, self.bottom = LEFT, self.width - RIGHT, TOP, self.height - BOTTOM
        self._ranges = x, y
        self.bars: list[Bar] = []
        self.lines: list[Line] = []
        self.dots: list[Dot] = []
        self.marks = [Tick(self.x(value), name) for name, value in (marks or {}).items()]
        self.x_ticks = [Tick(self.x(value), text) for value, text in tick_values(*x)]
        self.y_ticks = [Tick(self.y(value), text) for value, text in tick_values(*y)]

    def x(self, value: float) -> float:
        return _place(value, self._ranges[0], self.left, self.right)

    def y(self, value: float) -> float:
        return _place(value, self._ranges[1], self.bottom, self.top)

    def add_line(self, xs: Sequence[float], ys: Sequence[float], kind: str) -> None:
        points = " ".join(f"{self.x(x)},{self.y(y)}" for x, y in zip(xs, ys, strict=True))
        self.lines.append(Line(points, kind))


def _place(value: float, over: Range, start: float, end: float) -> float:
    low, high = over
    share = (value - low) / (high - low if high > low else 1)
    return round(start + share * (end - start), 2)


def stacked_histogram(
    edges: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    description: str,
    marks: Mapping[str, float] | None = None,
) -> Chart:
    """Bars of several series on top of each other, one column a bin."""
    totals = [sum(values[index] for values in series.values()) for index in range(len(edges) - 1)]
    chart = Chart((edges[0], edges[-1]), (0, max(totals, default=0)), list(series), description, marks)
    for index, (low, high) in enumerate(pairwise(edges)):
        left, width = chart.x(low) + 0.5, round(max(chart.x(high) - chart.x(low) - 1, 0.5), 2)
        base = 0.0
        for kind, values in series.items():
            if values[index]:
                top, bottom = chart.y(base + values[index]), chart.y(base)
                title = f"{kind}: {values[index]:g} frames, {significant(low)} to {significant(high)}"
                chart.bars.append(Bar(left, top, width, round(bottom - top, 2), kind, title))
                base += values[index]
    return chart


def curves(series: Mapping[str, Sequence[float]], *, x_range: Range, description: str) -> Chart:
    """Lines of equally spaced values over a range, from zero up."""
    highest = max((max(values) for values in series.values() if values), default=0.0)
    chart = Chart(x_range, (0, highest), list(series), description)
    for kind, values in series.items():
        step = (x_range[1] - x_range[0]) / max(len(values) - 1, 1)
        chart.add_line([x_range[0] + step * index for index in range(len(values))], values, kind)
    return chart


def line(x: Sequence[float], y: Sequence[float], *, kind: str, description: str, marks: Mapping[str, float]) -> Chart:
    """One line through points, a little room below the lowest."""
    lowest = min(y) - 0.1 * (max(y) - min(y))
    chart = Chart((min(x), max(x)), (lowest, max(y)), [kind], description, marks)
    chart.add_line(x, y, kind)
    return chart


def progress(lines: Sequence[Sequence[tuple[float, float]]], *, description: str) -> Chart:
    """A small chart of several lines of points, from zero on the x axis, a little room around the values."""
    points = [point for one in lines for point in one]
    low, high = min(y for _, y in points), max(y for _, y in points)
    room = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
    chart = Chart((0, max(x for x, _ in points)), (max(0, low - room), high + room), [], description, size=SMALL)
    for one in lines:
        chart.add_line([x for x, _ in one], [y for _, y in one], "chosen")
        chart.dots += [Dot(chart.x(x), chart.y(y), "chosen") for x, y in one]
    return chart


def scatter(sets: Mapping[str, Sequence[Sequence[float]]], *, description: str) -> Chart | None:
    """Dots of several kinds, the later kinds on top; None where there is no dot. The axes have no unit and no ticks."""
    dots = [(kind, x, y) for kind, some in sets.items() for x, y in some]
    if not dots:
        return None
    _, across, up = zip(*dots, strict=True)
    chart = Chart((min(across), max(across)), (min(up), max(up)), list(sets), description)
    chart.x_ticks, chart.y_ticks = [], []
    chart.dots = [Dot(chart.x(x), chart.y(y), kind) for kind, x, y in dots]
    return chart


def share_curve(xs: Sequence[float], shares: Sequence[float], limits: Range, *, description: str) -> Chart:
    """A small curve of percentages over the band between two limits, both fractions."""
    values, (low, high) = [100 * share for share in shares], (100 * limit for limit in limits)
    top = 1.05 * max(*values, high) or 1.0
    chart = Chart((min(xs), max(xs)), (0, top), [], description, size=SMALL)
    chart.x_ticks = [Tick(chart.x(x), f"{x:g}") for x in dict.fromkeys((min(xs), max(xs)))]
    height = round(chart.y(low) - chart.y(high), 2)
    title = f"{significant(low)} to {significant(high)} %"
    chart.bars.append(Bar(chart.left, chart.y(high), chart.right - chart.left, height, "band", title))
    chart.add_line(xs, values, "chosen")
    chart.dots = [Dot(chart.x(x), chart.y(value), "chosen") for x, value in zip(xs, values, strict=True)]
    return chart


class Dots(NamedTuple):
    """A row of dots, a bar at their mean, and a line, on the x axis of a `DotAxis`."""

    places: tuple[float, ...]
    mean: float
    line: float | None


class DotAxis:
    """The axis that rows of dots share: a little more than the range of all values."""

    width = DOTS_WIDTH

    def __init__(self, values: Sequence[float]) -> None:
        room = 0.06 * (max(values) - min(values)) or 1.0
        self._range = min(values) - room, max(values) + room
        self.ticks = [Tick(self.place(value), text) for value, text in tick_values(*self._range)]

    def place(self, value: float) -> float:
        return _place(value, self._range, DOTS_MARGIN, DOTS_WIDTH - DOTS_MARGIN)

    def row(self, values: Sequence[float], line: float | None) -> Dots:
        places = tuple(map(self.place, values))
        return Dots(places, self.place(sum(values) / len(values)), None if line is None else self.place(line))


def tick_values(low: float, high: float) -> list[tuple[float, str]]:
    """`nice_values`, and how each is written: with all of its digits, so that no two ticks say the same."""
    write = exact if high > low else significant
    return [(value, write(value)) for value in nice_values(low, high)]


def nice_values(low: float, high: float) -> list[float]:
    """Five round values or so between two bounds, steps of 1, 2 or 5 times a power of ten; no digit is chance."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    power = math.floor(math.log10(span / _MAX_TICKS))
    step = 10.0**power
    factor = next(f for f in (1, 2, 5, 10, 20) if span / (f * step) <= _MAX_TICKS)
    step *= factor
    first = math.ceil(round(low / step, 9))
    last = math.floor(round(high / step, 9))
    return [round(index * step, -power) for index in range(first, last + 1)]
