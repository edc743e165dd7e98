"""The page of a search: which values were tried, how far they came, what they are worth. One file, no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from statistics import fmean
from typing import Any, Final, NamedTuple

from nightseg.metrics.seeds import deviation
from nightseg.report import formatting
from nightseg.report.charts import SIZE, Chart, Dot, Line, Tick, tick_values
from nightseg.report.page import METRICS
from nightseg.report.templates import template
from nightseg.storage import Location

PAGE_NAME: Final = "search.html"
COUNT: Final = ".select.count"  # how a key ends that says how many frames are learned from
KINDS: Final = {"done": "chosen", "stopped": "pool", "best": "reference"}  # end of a trial -> style of its marks
_PARALLEL: Final = (900, 300)
_SLICE: Final = (340, 170)
_MOST_VALUES: Final = 6  # of a choice that are written at an axis
_LETTER: Final = 7  # width of one, in the units of the charts
Row = Mapping[str, Any]


def write_search_page(folder: Location, content: Mapping[str, Any]) -> Location:
    """Write `search.html` beside the records that it is made from, the content of trials.json. Returns its place."""
    seen = Seen(content)
    page = template("search.html.j2").render(
        seen=seen,
        search=seen.search,
        content=content,
        tiles=tiles(seen),
        table=table(seen),
        parallel=parallel(seen) if seen.scored else None,
        slices=[(seen.short[key], slice_of(seen, key, seen.scored)) for key in seen.short] if seen.scored else [],
        importance=[(seen.short[key], share) for key, share in content["importance"].items()],
        history=history(seen) if seen.scored else None,
        curves=learning_curves(seen),
        sizes=[(seen.short[key], by_size(seen, key)) for key in seen.short if key.endswith(COUNT) and seen.done],
        size_chart=next((size_chart(seen, key) for key in seen.short if key.endswith(COUNT) and seen.done), None),
        failed=[row for row in seen.rows if row["end"] == "failed"],
    )
    place = folder / PAGE_NAME
    place.write_bytes(page.encode())
    return place


class Seen:
    """The records as the page sees them; scores are percent from here on."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.search: Mapping[str, Any] = content["search"]
        self.seconds: float = content["seconds"]
        self.rows: list[Row] = list(content["trials"])
        self.metric: str = self.search["metric"]
        kind, _, of = self.metric.partition(".")
        self.score_name = f"IoU of {of}" if kind == "iou" else METRICS[kind]
        self.is_max = self.search["mode"] == "max"
        self.short = formatting.short_names(self.search["space"])
        self.best: Row | None = content["best"]
        self.done = [row for row in self.rows if row["end"] == "done"]
        self.stopped = [row for row in self.rows if row["end"] == "stopped" and row["curve"]]
        order = [KINDS["stopped"], KINDS["done"], KINDS["best"]]  # the later ones on top
        self.scored = sorted([*self.stopped, *self.done], key=lambda row: order.index(self.kind(row)))

    def score(self, row: Row) -> float:
        return 100 * float(row[self.metric])

    def kind(self, row: Row) -> str:
        is_best = self.best is not None and row["trial"] == self.best["trial"]
        return KINDS["best" if is_best else row["end"]]

    def title(self, row: Row) -> str:
        how = "" if row["end"] == "done" else f", stopped after {formatting.plural(row['epochs'], 'epoch')}"
        return f"{row['number']}: {row['label']}: {self.score(row):.1f} %{how}"

    @cached_property
    def span(self) -> tuple[float, float]:
        """Of the scores of finished trials (of all where none is), with their spread over seeds, and a little more."""
        rows = self.done or self.stopped
        ends = [self.score(row) + sign * 100 * (row.get("std") or 0.0) for row in rows for sign in (-1, 1)]
        room = 0.08 * (max(ends) - min(ends)) or 1.0
        return min(ends) - room, max(ends) + room

    def shown(self, row: Row) -> float:
        """The score, or the end of the span that it lies beyond: one early epoch is no measure for finished trials."""
        return min(max(self.score(row), self.span[0]), self.span[1])


def tiles(seen: Seen) -> list[tuple[str, str, str]]:
    """(figure, what it counts, detail)."""
    ends = {end: sum(row["end"] == end for row in seen.rows) for end in ("done", "stopped", "failed", None)}
    words = {"done": "finished", "stopped": "stopped early", "failed": "failed", None: "unfinished"}
    told = ", ".join(f"{number} {words[end]}" for end, number in ends.items() if number)
    trainings, reused = (sum(row.get(key, 0) for row in seen.rows) for key in ("trainings", "reused"))
    return [
        (formatting.count(len(seen.rows)), "trial" if len(seen.rows) == 1 else "trials", told or "none yet"),
        (formatting.count(trainings), "training" if trainings == 1 else "trainings", "what the values change"),
        (formatting.count(reused), "stage re-used" if reused == 1 else "stages re-used", "what they do not"),
        (formatting.duration(seen.seconds), "of search", "in all its starts"),
    ]


def table(seen: Seen) -> list[Row]:
    """Trials best first, with the share of the best score that a bar shows, and which score it is if there are two."""
    test = seen.search["test"]
    ends = {"done": "finished", "stopped": "stopped early"}
    if test is not None:
        ends = {"done": f"finished: {test}", "stopped": "stopped early: validation"}
    sign = -1 if seen.is_max else 1
    ranked = sorted(seen.scored, key=lambda row: (row["end"] != "done", sign * seen.score(row)))
    low, high = seen.span if seen.scored else (0.0, 1.0)
    return [
        {
            **row,
            "score": row[seen.metric],
            "share": (seen.shown(row) - low) / (high - low),
            "kind": seen.kind(row),
            "how": ends[row["end"]],
        }
        for row in ranked
    ]


# -- axes -------------------------------------------------------------------------------------------------------------


class Axis(NamedTuple):
    """Where values of a key lie between 0 and 1, and what is written there."""

    low: float
    high: float
    is_log: bool
    choice: tuple[Any, ...]
    ticks: tuple[tuple[float, str], ...]

    def place(self, value: Any) -> float:
        if self.choice:
            return (self.choice.index(value) + 0.5) / len(self.choice)
        number = math.log10(value) if self.is_log else float(value)
        return (number - self.low) / (self.high - self.low)


def axis_of(dimension: Mapping[str, Any]) -> Axis:
    """Of a dimension as it stands in the records. A choice of numbers stands in their order."""
    choice = dimension["choice"]
    if choice:
        are_numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in choice)
        values = tuple(sorted(choice) if are_numbers else choice)
        axis = Axis(0.0, 1.0, False, values, ())
        every = math.ceil(len(values) / _MOST_VALUES)
        written = [formatting.exact(value) for value in values]
        return axis._replace(
            ticks=tuple((axis.place(value), written[index]) for index, value in enumerate(values) if index % every == 0)
        )
    is_log = bool(dimension["log_uniform"] or dimension["log_integer"])
    low, high = dimension["uniform"] or dimension["log_uniform"] or dimension["integer"] or dimension["log_integer"]
    if not is_log:
        axis = Axis(float(low), float(high), False, (), ())
        return axis._replace(ticks=tuple((axis.place(value), text) for value, text in tick_values(low, high)))
    axis = Axis(math.log10(low), math.log10(high), True, (), ())
    powers = [10.0**power for power in range(math.ceil(axis.low - 1e-9), math.floor(axis.high + 1e-9) + 1)]
    shown = powers if len(powers) > 1 else [low, high]
    return axis._replace(ticks=tuple((axis.place(value), formatting.exact(value)) for value in shown))


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: max(letters - 1, 1)] + "\N{HORIZONTAL ELLIPSIS}"


# -- charts -----------------------------------------------------------------------------------------------------------


def parallel(seen: Seen) -> dict[str, Any]:
    """Each trial as a line through its values to its score."""
    width, height = _PARALLEL
    top, bottom, margin = 34, height - 14, 60
    names = [*seen.short.values(), seen.score_name]
    low, high = seen.span
    score = Axis(low, high, False, (), tuple(((v - low) / (high - low), text) for v, text in tick_values(low, high)))
    axes = [*(axis_of(seen.search["space"][key]) for key in seen.short), score]
    room = int((width - 2 * margin) / (len(axes) - 1) / _LETTER) - 2
    places = [margin + index * (width - 2 * margin) / (len(axes) - 1) for index in range(len(axes))]

    def up(share: float) -> float:
        return round(bottom - share * (bottom - top), 2)

    lines = []
    for row in seen.scored:
        values = [*(row["values"][key] for key in seen.short), seen.shown(row)]
        points = [f"{x:g},{up(axis.place(value))}" for x, axis, value in zip(places, axes, values, strict=True)]
        lines.append((Line(" ".join(points), seen.kind(row)), seen.title(row)))
    drawn = [
        {
            "x": x,
            "name": name,
            "ticks": [Tick(up(share), _cut(text, room)) for share, text in axis.ticks],
            "last": axis is score,
        }
        for x, name, axis in zip(places, names, axes, strict=True)
    ]
    return {"width": width, "height": height, "top": top, "bottom": bottom, "axes": drawn, "lines": lines}


def slice_of(seen: Seen, key: str, rows: Sequence[Row], size: tuple[int, int] = _SLICE) -> Chart:
    """The score against one value; lines are the spread over seeds."""
    axis = axis_of(seen.search["space"][key])
    chart = Chart((0.0, 1.0), seen.span, [], f"{seen.score_name} in percent against {key}", size=size)
    width = chart.right - chart.left
    longest = _LETTER * max(len(text) for _, text in axis.ticks)
    are_words = any(isinstance(value, str) for value in axis.choice)
    ticks = axis.ticks[:: 1 if are_words else math.ceil(len(axis.ticks) * longest / width)]  # a number is never cut
    chart.x_ticks = [Tick(chart.x(share), _cut(text, width // (_LETTER * len(ticks)))) for share, text in ticks]
    for row in rows:
        x, score, kind = axis.place(row["values"][key]), seen.shown(row), seen.kind(row)
        if row.get("std"):
            chart.add_line([x, x], [score - 100 * row["std"], score + 100 * row["std"]], kind)
        chart.dots.append(Dot(chart.x(x), chart.y(score), kind, seen.title(row)))
    return chart


def history(seen: Seen) -> Chart:
    """The score of each trial in the order of their numbers, and the best finished one so far."""
    last = max(row["number"] for row in seen.scored)
    chart = Chart((0.5, last + 0.5), seen.span, [], f"{seen.score_name} in percent by trial, and the best so far")
    every = math.ceil(last / 12)
    chart.x_ticks = [Tick(chart.x(number), str(number)) for number in range(1, last + 1) if (number - 1) % every == 0]
    best: list[tuple[float, float]] = []
    for row in sorted(seen.done, key=lambda row: int(row["number"])):
        score = seen.score(row)
        reached = score if not best else max(best[-1][1], score) if seen.is_max else min(best[-1][1], score)
        best += [(row["number"], best[-1][1])] if best else []
        best.append((row["number"], reached))
    if best:
        steps = [*best, (last + 0.5, best[-1][1])]
        chart.add_line([x for x, _ in steps], [y for _, y in steps], KINDS["best"])
    chart.dots = [
        Dot(chart.x(row["number"]), chart.y(seen.shown(row)), seen.kind(row), seen.title(row)) for row in seen.scored
    ]
    return chart


def learning_curves(seen: Seen) -> Chart | None:
    """The validation after each epoch that had one; a dot is where a trial was stopped, a ring the score that one which
    finished is compared by: over its seeds, of the epoch whose weights are kept, or of a test set."""
    lines = {row["trial"]: [(epoch, 100 * score) for epoch, score in row["curve"]] for row in seen.scored}
    points = [point for line in lines.values() for point in line]
    points += [(row["epochs"], seen.score(row)) for row in seen.done]
    if not points:
        return None
    low, high = min(y for _, y in points), max(y for _, y in points)
    room, last = 0.08 * (high - low) or 1.0, max(x for x, _ in points)
    chart = Chart((min(x for x, _ in points), last), (low - room, high + room), [], "validation after each epoch")
    every = math.ceil(last / 12)
    chart.x_ticks = [Tick(chart.x(epoch), str(epoch)) for epoch in range(1, last + 1) if (epoch - 1) % every == 0]
    for row in seen.scored:
        line = lines[row["trial"]]
        chart.add_line([x for x, _ in line], [y for _, y in line], seen.kind(row))
        ring = " outcome" if row["end"] == "done" else ""
        x, y = chart.x(row["epochs"]), chart.y(seen.score(row))
        chart.dots.append(Dot(x, y, seen.kind(row) + ring, seen.title(row)))
    return chart


def size_chart(seen: Seen, key: str) -> Chart:
    """The score against the number of frames that are learned from: each finished trial, and a line through the best
    of each size."""
    chart = slice_of(seen, key, seen.done, SIZE)
    axis = axis_of(seen.search["space"][key])
    best = [(axis.place(entry["size"]), 100 * entry["best"]) for entry in by_size(seen, key)]
    chart.add_line([x for x, _ in best], [y for _, y in best], KINDS["best"])
    return chart


def by_size(seen: Seen, key: str) -> list[dict[str, Any]]:
    """For each number of frames: its finished trials, their best and mean score, and the spread over the seeds of the
    best and over the trials (null where there is one)."""
    found: dict[int, list[Row]] = {}
    for row in seen.done:
        found.setdefault(row["values"][key], []).append(row)
    choose = max if seen.is_max else min
    entries = []
    for size, rows in sorted(found.items()):
        best = choose(rows, key=seen.score)
        scores = [row[seen.metric] for row in rows]
        spread = deviation(scores) if len(scores) > 1 else None
        entries.append(
            {"size": size, "trials": len(rows), "best": best[seen.metric], "of_seeds": best.get("std"),
             "mean": fmean(scores), "of_trials": spread}
        )  # fmt: skip
    return entries
