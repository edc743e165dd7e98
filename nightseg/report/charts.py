"""Charts as geometry: where bars, lines and ticks lie. The template draws them as SVG, in the page's own colours.

Drawn pictures would be stuck with one theme and one font; this is also a tenth of their size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from nightseg.report.formatting import significant

WIDTH, HEIGHT = 480, 200  # of the drawing, in its own units; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 40, 10, 20, 24  # margins that hold the tick labels
_MAX_TICKS = 5


@dataclass(frozen=True)
class Bar:
    """A rectangle; `kind` is its style class, `title` what it says when touched."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    title: str


@dataclass(frozen=True)
class Line:
    """A polyline: SVG points."""

    points: str
    kind: str


@dataclass(frozen=True)
class Dot:
    """The middle of a small circle."""

    x: float
    y: float
    kind: str


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    place: float
    text: str


@dataclass(frozen=True)
class Chart:
    """Everything the template needs to draw one chart."""

    bars: tuple[Bar, ...]
    lines: tuple[Line, ...]
    marks: tuple[Tick, ...]  # vertical lines through the whole height
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    kinds: tuple[str, ...]  # for the legend, in drawing order
    description: str
    dots: tuple[Dot, ...] = ()
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


class _Axis:
    """Values to places along one axis."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = low, high if high > low else low + 1
        self.start, self.end = start, end

    def place(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self) -> tuple[Tick, ...]:
        return tuple(Tick(self.place(value), significant(value)) for value in nice_values(self.low, self.high))


def stacked_histogram(
    edges: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    description: str,
    marks: Mapping[str, float] | None = None,
    unit: str = "frames",
) -> Chart:
    """Bars of several series on top of each other, one column a bin; `marks` are named values on the x axis."""
    totals = [sum(values[index] for values in series.values()) for index in range(len(edges) - 1)]
    horizontal, vertical = _axes(edges[0], edges[-1], max(totals, default=0))
    bars = []
    for index, (low, high) in enumerate(pairwise(edges)):
        left, right = horizontal.place(low), horizontal.place(high)
        base = 0.0
        for kind, values in series.items():
            if values[index]:
                top, bottom = vertical.place(base + values[index]), vertical.place(base)
                title = f"{kind}: {values[index]:g} {unit}, {significant(low)} to {significant(high)}"
                bars.append(
                    Bar(left + 0.5, top, round(max(right - left - 1, 0.5), 2), round(bottom - top, 2), kind, title)
                )
                base += values[index]
    lines = tuple(Tick(horizontal.place(value), name) for name, value in (marks or {}).items())
    return Chart(tuple(bars), (), lines, horizontal.ticks(), vertical.ticks(), tuple(series), description)


def overlaid_histogram(
    edges: Sequence[float],
    whole: Sequence[float],
    part: Sequence[float],
    *,
    kinds: tuple[str, str],
    description: str,
    marks: Mapping[str, float] | None = None,
) -> Chart:
    """A histogram with a part of it in another colour: the part fills each bar from below."""
    rest = [total - chosen for total, chosen in zip(whole, part, strict=True)]
    return stacked_histogram(edges, {kinds[1]: part, kinds[0]: rest}, description=description, marks=marks)


def curves(series: Mapping[str, Sequence[float]], *, x_range: tuple[float, float], description: str) -> Chart:
    """Lines of equally spaced values over a range, from zero up."""
    highest = max((max(values) for values in series.values() if values), default=0.0)
    horizontal, vertical = _axes(*x_range, highest)
    lines = []
    for kind, values in series.items():
        step = (x_range[1] - x_range[0]) / max(len(values) - 1, 1)
        places = ((horizontal.place(x_range[0] + step * index), vertical.place(v)) for index, v in enumerate(values))
        lines.append(Line(" ".join(f"{x},{y}" for x, y in places), kind))
    return Chart((), tuple(lines), (), horizontal.ticks(), vertical.ticks(), tuple(series), description)


def line(
    x: Sequence[float],
    y: Sequence[float],
    *,
    kind: str,
    description: str,
    marks: Mapping[str, float] | None = None,
) -> Chart:
    """One line through points, a little room below the lowest; `marks` are named values on the x axis."""
    horizontal = _Axis(min(x), max(x), LEFT, WIDTH - RIGHT)
    vertical = _Axis(min(y) - 0.1 * (max(y) - min(y)), max(y), HEIGHT - BOTTOM, TOP)
    points = " ".join(f"{horizontal.place(a)},{vertical.place(b)}" for a, b in zip(x, y, strict=True))
    named = tuple(Tick(horizontal.place(value), name) for name, value in (marks or {}).items())
    return Chart((), (Line(points, kind),), named, horizontal.ticks(), vertical.ticks(), (kind,), description)


def scatter(sets: Mapping[str, Sequence[Sequence[float]]], *, description: str) -> Chart | None:
    """Dots of several kinds, the later kinds on top; None where there is no dot. The axes have no unit and no ticks."""
    if not any(sets.values()):
        return None
    across = [dot[0] for dots in sets.values() for dot in dots]
    up = [dot[1] for dots in sets.values() for dot in dots]
    horizontal = _Axis(min(across), max(across), LEFT, WIDTH - RIGHT)
    vertical = _Axis(min(up), max(up), HEIGHT - BOTTOM, TOP)
    dots = tuple(
        Dot(horizontal.place(dot[0]), vertical.place(dot[1]), kind) for kind, some in sets.items() for dot in some
    )
    return Chart((), (), (), (), (), tuple(sets), description, dots=dots)


def _axes(low: float, high: float, highest: float) -> tuple[_Axis, _Axis]:
    return (
        _Axis(low, high, LEFT, WIDTH - RIGHT),
        _Axis(0.0, highest, HEIGHT - BOTTOM, TOP),
    )


def nice_values(low: float, high: float) -> list[float]:
    """At most five round values between two bounds, steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    step = 10.0 ** math.floor(math.log10(span / _MAX_TICKS))
    factor = next(f for f in (1, 2, 5, 10, 20) if span / (f * step) <= _MAX_TICKS)
    step *= factor
    first = math.ceil(round(low / step, 9))
    last = math.floor(round(high / step, 9))
    return [index * step for index in range(first, last + 1)]
