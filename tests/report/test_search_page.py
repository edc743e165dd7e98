"""The page of a search: one file without network, true numbers, and nothing that a search lacks."""

from __future__ import annotations

import random
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from nightseg.pipeline.search.records import Records
from nightseg.pipeline.search.settings import Search
from nightseg.report.search_page import (
    Seen,
    axis_of,
    by_size,
    history,
    learning_curves,
    parallel,
    slice_of,
    write_search_page,
)
from nightseg.storage import Location, hash_of
from tests.small_search import ALPHA, COUNT, GAMMA, row, search_of


def content_of(folder: Path, rows: list[dict[str, Any]], *overrides: str, **more: Any) -> dict[str, Any]:
    search: Search = search_of(*overrides)
    records = Records(Location.of(folder), search, lambda values: hash_of(values))
    records.rows = rows
    return records.content() | {"importance": {}} | more


def rows() -> list[dict[str, Any]]:
    counts = {"trainings": 1, "reused": 9, "seconds": 60.0}
    return [
        row(1, {ALPHA: 0.25, GAMMA: 1.0, COUNT: 60}, 0.40, **counts),
        row(2, {ALPHA: 0.50, GAMMA: 2.0, COUNT: 120}, 0.46, std=0.01, seeds={"0": 0.45, "1": 0.47}, **counts),
        row(3, {ALPHA: 0.75, GAMMA: 4.0, COUNT: 120}, 0.10, "stopped", **counts),
        row(4, {ALPHA: 0.10, GAMMA: 3.0, COUNT: 120}, 0.44, **counts),
        row(5, {ALPHA: 0.90, GAMMA: 0.0, COUNT: 180}, None, "failed", **counts) | {"error": "no <b> frame is left"},
    ]


def page_of(folder: Path, content: dict[str, Any]) -> str:
    place = write_search_page(Location.of(folder), content)
    assert place.name == "search.html"
    return place.read_bytes().decode()


def text_of(page: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", page.partition("</style>")[2]).replace("&nbsp;", " ").split())


def test_the_page_stands_alone_and_says_what_was_found(tmp_path: Path) -> None:
    page = page_of(tmp_path, content_of(tmp_path, rows(), importance={ALPHA: 0.75, COUNT: 0.25}))
    assert not re.search(r"(src|href)=\"(?!#|data:)", page) and "<script" not in page and "url(" not in page
    text = text_of(page)
    assert "n=2 reaches 46.0 ± 1.0 % mIoU" in text
    assert (
        "5 trials 3 finished, 1 stopped early, 1 failed" in text
        and "5 trainings" in text
        and "45 stages re-used" in text
    )
    for words in ("alpha 75 %", "5: n=5: no &lt;b&gt; frame is left", "stopped early", "no trial sees a test set"):
        assert words in text, words
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(drawing)
    assert page.count("<svg") == 7  # parallel coordinates, three slices, history, curves, sizes


@pytest.mark.parametrize("known", [[], rows()[:1], [rows()[2]], [rows()[4]], [row(1, rows()[0]["values"], None, None)]])
def test_a_search_that_has_just_begun_has_a_page(tmp_path: Path, known: list[dict[str, Any]]) -> None:
    text = text_of(page_of(tmp_path, content_of(tmp_path, known)))
    assert ("No trial has come to its end yet" in text) == (known[:1] == [] or known[0]["end"] != "done")


def test_a_search_by_a_test_set_says_that_it_spoils_it(tmp_path: Path) -> None:
    text = text_of(page_of(tmp_path, content_of(tmp_path, rows(), "test=night", "spoil_test=true")))
    assert "compared by the test set night: what it says of the best is too good" in text
    assert "no trial sees a test set" not in text


def test_the_course_is_that_of_the_best_so_far(tmp_path: Path) -> None:
    for mode, best in (("max", [0.40, 0.46, 0.46, 0.46]), ("min", [0.40, 0.40, 0.40, 0.40])):
        seen = Seen(content_of(tmp_path, rows(), f"mode={mode}"))
        chart = history(seen)
        points = [tuple(map(float, point.split(","))) for point in chart.lines[0].points.split()]
        assert {y for _, y in points} == {chart.y(100 * score) for score in best}
        assert len(chart.dots) == 4  # the failed one has no score


def test_a_trial_that_was_stopped_is_marked(tmp_path: Path) -> None:
    chart = learning_curves(Seen(content_of(tmp_path, rows())))
    assert chart is not None and len(chart.lines) == 4
    (dot,) = (dot for dot in chart.dots if "outcome" not in dot.kind)
    assert dot.kind == "pool" and (dot.x, dot.y) == (chart.x(3), chart.y(10)) and "stopped after 3 epochs" in dot.title


def test_what_a_trial_is_compared_by_stands_beside_its_curve(tmp_path: Path) -> None:
    """Of another epoch, of several seeds or of a test set, it is no point of the line."""
    made = rows()
    made[1]["curve"] = [[1, 0.2], [3, 0.3]]
    chart = learning_curves(Seen(content_of(tmp_path, made)))
    assert chart is not None
    ring = next(dot for dot in chart.dots if dot.kind == "reference outcome")
    assert (ring.x, ring.y) == (chart.x(3), chart.y(46)) and "46.0 %" in ring.title
    assert chart.lines[-1].points.endswith(f"{chart.x(3)},{chart.y(30)}")
    assert [dot.kind for dot in chart.dots] == ["pool", "chosen outcome", "chosen outcome", "reference outcome"]
    assert learning_curves(Seen(content_of(tmp_path, [made[1] | {"curve": []}]))) is not None


def test_scores_of_a_test_set_and_of_validation_are_told_apart(tmp_path: Path) -> None:
    text = text_of(page_of(tmp_path, content_of(tmp_path, rows(), "test=night", "spoil_test=true")))
    assert text.count("finished: night") == 3 and text.count("stopped early: validation") == 1
    assert "compared by: test set night, mean over its seeds" in text and "the two do not compare" in text
    text = text_of(page_of(tmp_path, content_of(tmp_path, rows())))
    assert "stopped early: validation" not in text and "compared by: validation of what it keeps" in text


def test_early_scores_do_not_squeeze_those_of_finished_trials(tmp_path: Path) -> None:
    seen = Seen(content_of(tmp_path, rows()))
    assert 38 < seen.span[0] < 40 < 47 < seen.span[1] < 48  # 40.0 to 46.0 + 1.0, and 8 % of that
    assert seen.shown(rows()[2]) == seen.span[0]
    assert len(parallel(seen)["lines"]) == 4


def test_sizes_have_their_best_and_their_spread(tmp_path: Path) -> None:
    assert by_size(Seen(content_of(tmp_path, rows())), COUNT) == [
        {"size": 60, "trials": 1, "best": 0.40, "of_seeds": None, "mean": 0.40, "of_trials": None},
        {"size": 120, "trials": 2, "best": 0.46, "of_seeds": 0.01, "mean": pytest.approx(0.45, rel=1e-12),
         "of_trials": pytest.approx(0.02 / 2**0.5, rel=1e-12)},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("dimension", "value", "place"),
    [
        ("{uniform: [1, 3]}", 2.0, 0.5),
        ("{log_uniform: [1e-4, 1e-2]}", 1e-3, 0.5),
        ("{integer: [0, 4]}", 1, 0.25),
        ("{log_integer: [1, 100]}", 10, 0.5),
        ("{choice: [9, 3, 6]}", 3, 1 / 6),  # numbers in their order
        ("{choice: [b, a]}", "b", 0.25),
        ("{choice: [true, false]}", False, 0.75),
    ],
)
def test_values_lie_where_their_axis_says(dimension: str, value: Any, place: float) -> None:
    search = search_of(f"space={{a.b: {dimension}}}")
    axis = axis_of(search.model_dump(mode="json")["space"]["a.b"])
    assert axis.place(value) == pytest.approx(place, abs=1e-12)  # of logarithms of powers of ten
    assert axis.ticks and all(-1e-9 <= share <= 1 + 1e-9 for share, _ in axis.ticks)


@pytest.mark.parametrize(
    ("dimension", "value", "text"),
    [
        ("{choice: [0.99995, 0.99999]}", 0.99995, "0.99995"),
        ("{uniform: [0.999, 0.9999]}", 0.9991234, "0.9991234"),
        ("{log_uniform: [100000, 100050]}", 100012.34, "100 012.34"),
    ],
)
def test_values_have_the_digits_that_tell_them_apart(tmp_path: Path, dimension: str, value: float, text: str) -> None:
    """In the table, and at the axes, where a number that has no room is left out rather than cut."""
    made = [row(1, {"a.b": value}, 0.4, trainings=1, reused=9)]
    content = content_of(tmp_path, made, f"space={{a.b: {dimension}}}")
    assert text in text_of(page_of(tmp_path, content)).replace("\u202f", " ")
    ticks = [tick.text for tick in slice_of(Seen(content), "a.b", made).x_ticks]
    assert 2 <= len(ticks) == len(set(ticks)) and not any("\N{HORIZONTAL ELLIPSIS}" in tick for tick in ticks)


def test_the_page_of_many_trials_is_small(tmp_path: Path) -> None:
    rng = random.Random(0)
    values = [{ALPHA: rng.random(), GAMMA: 4 * rng.random(), COUNT: rng.choice([60, 120, 180])} for _ in range(200)]
    many = [row(n, one, rng.random(), trainings=1, reused=9) for n, one in enumerate(values, 1)]
    assert len(page_of(tmp_path, content_of(tmp_path, many))) < 400_000
