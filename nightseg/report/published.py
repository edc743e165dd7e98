"""Published rows beside what this run measured, the improvements in their order, and which claims hold here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from nightseg.metrics.bootstrap import FrameSpread, Interval
from nightseg.metrics.seeds import Difference
from nightseg.report import formatting
from nightseg.report.charts import Bar, Chart, Dot, Tick
from nightseg.report.comparison import gain
from nightseg.report.frame_spread import gain_spread, miou_spread
from nightseg.report.run import Run

KINDS = ("published", "measured")
VERDICTS = {"holds": "up", "does not hold": "down", "not decided": "none"}  # and how the page colours them
WIDE = (960, 260)  # of the chart, which has a place for every row
_SPREAD_WIDTH = 4.0


class Over(NamedTuple):
    """A row over another one, in points: as published, if both are, and as measured."""

    name: str
    published: float | None
    measured: Difference
    spread: FrameSpread | None


class Row(NamedTuple):
    """A published row, in percent, and what this run measured, fractions."""

    row: str
    model: str
    test: str
    about: str
    published: float
    miou: float
    std: float | None
    spread: FrameSpread | None
    difference: float  # points, measured minus published
    start: Over | None  # the model that it starts from, on the same test set


def published(run: Run) -> dict[str, Any] | None:
    """None for a run that says of no model what was published."""
    rows = sorted(_rows(run), key=lambda row: (_natural(row.row), row.model))
    if not rows:
        return None
    tests = [row.test for row in rows]
    main = max(dict.fromkeys(tests), key=tests.count)
    of_main = [row for row in rows if row.test == main]
    steps = _improvements(run, of_main)
    return {"rows": rows, "tests": list(dict.fromkeys(tests)), "main": main, "improvements": steps,
            "chart": _chart(of_main, [row for row, _ in steps]), "kinds": KINDS}  # fmt: skip


def claims(run: Run) -> list[dict[str, Any]]:
    """What the recipe says of its models, as the results judge it, with what was published of the pairs."""
    found = []
    for claim in run.results.get("claims", {}).values():
        pairs = []
        for pair in claim["pairs"]:
            both = _points(run, pair["model"], pair["over"], claim["test"])
            measured = Difference(pair["mean"], pair["std"], pair["is_paired"]) if "mean" in pair else None
            inside = pair.get("interval")
            spread = inside and FrameSpread(Interval(inside["low"], inside["high"]), inside["units"], inside["of"])
            pairs.append(
                {**pair, "published": both, "measured": measured, "spread": spread, "kind": VERDICTS[pair["verdict"]]}
            )
        found.append({**claim, "pairs": pairs, "kind": VERDICTS[claim["verdict"]]})
    return found


def _rows(run: Run) -> Iterator[Row]:
    for model in run.models:
        for test in run.tests:
            told = _published(run, model, test)
            if told is None:
                continue
            scores, facts = run.score(model, test) or {}, run.results["models"][model]
            miou = run.miou(model, test)
            yield Row(
                scores.get("row") or model,
                model,
                test,
                facts.get("about") or formatting.describe(facts),
                told,
                miou,
                run.std(model, test),
                miou_spread(run, model, test),
                100 * miou - told,
                _over(run, model, facts["start"], test),
            )


def _published(run: Run, model: str, test: str) -> float | None:
    scores = (run.score(model, test) if model in run.results["models"] else None) or {}
    found: float | None = scores.get("published_miou")
    return found


def _points(run: Run, model: str, other: str, test: str) -> float | None:
    """The published difference; None where one of the two was not published."""
    ours, theirs = _published(run, model, test), _published(run, other, test)
    return None if ours is None or theirs is None else ours - theirs


def _over(run: Run, model: str, other: str, test: str) -> Over | None:
    if other not in run.results["models"] or not run.score(other, test):
        return None
    name = (run.score(other, test) or {}).get("row") or other
    return Over(
        name, _points(run, model, other, test), gain(run, model, other, test), gain_spread(run, model, other, test)
    )


def _natural(text: str) -> list[tuple[int, str]]:
    """For an order in which 10.1 follows 9.1."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def _improvements(run: Run, rows: Sequence[Row]) -> list[tuple[Row, Over | None]]:
    """The rows that were published as better than all before them, each over the one before."""
    found: list[tuple[Row, Over | None]] = []
    for row in rows:
        if not found or row.published > found[-1][0].published:
            found.append((row, _over(run, row.model, found[-1][0].model, row.test) if found else None))
    return found


def _chart(rows: Sequence[Row], improvements: Sequence[Row]) -> Chart:
    """mIoU by row, as published and as measured with its interval; dots are the improvements."""
    ends = [100 * end for row in rows if row.spread for end in row.spread.interval]
    values = [*ends, *(row.published for row in rows), *(100 * row.miou for row in rows)]
    room = 0.05 * (max(values) - min(values)) or 1.0
    last, first_row, last_row = max(len(rows) - 1, 1), rows[0], rows[-1]
    described = (
        f"mIoU of the rows {first_row.row} to {last_row.row} on {first_row.test}: published {first_row.published:.1f} "
        f"to {last_row.published:.1f} %, measured {100 * first_row.miou:.1f} to {100 * last_row.miou:.1f} %"
    )
    chart = Chart((0, last), (max(0.0, min(values) - room), max(values) + room), KINDS, described, size=WIDE)
    chart.x_ticks = [Tick(chart.x(place), row.row) for place, row in enumerate(rows)]
    series: Mapping[str, list[float]] = {
        "published": [row.published for row in rows],
        "measured": [100 * row.miou for row in rows],
    }
    for place, row in enumerate(rows):
        if row.spread:
            low, high = (chart.y(100 * end) for end in row.spread.interval)
            title = f"{row.row}: {formatting.interval(row.spread)}"
            left = round(chart.x(place) - _SPREAD_WIDTH / 2, 2)
            chart.bars.append(Bar(left, high, _SPREAD_WIDTH, round(low - high, 2), "pool", title))
    for kind, ys in series.items():
        chart.add_line(range(len(rows)), ys, kind)
        chart.dots += [Dot(chart.x(x), chart.y(y), kind) for x, y in enumerate(ys) if rows[x] in improvements]
    return chart
