"""Published rows stand beside what was measured, in their order; claims show how they were judged."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from nightseg.report.comparison import claims as judged
from nightseg.report.page import write_report
from nightseg.report.published import claims, published
from nightseg.report.run import Run
from tests.report.conftest import MadeUpRun

ROWS = {"day_only": ("9.1", 30.0), "day_only_longer": ("9.2", 29.0), "self_trained": ("10.1", 45.0)}


@pytest.fixture
def run(made_up_run: MadeUpRun) -> Run:
    """The made-up run with a published row for each model, the third after the first."""
    results: dict[str, Any] = copy.deepcopy(made_up_run.results)
    for name, (row, miou) in ROWS.items():
        results["models"][name]["tests"]["night"] |= {"row": row, "published_miou": miou}
    results["models"]["self_trained"]["start"] = "day_only"
    results["models"]["self_trained"]["tests"]["day"] |= {"row": "10.2", "published_miou": 60.0}
    found = Run(made_up_run.folder, results)
    said = {"better": {"says": "pools help", "pairs": [["self_trained", "day_only"]], "test": "night"}}
    results["claims"] = judged(found, said)
    return found


def test_rows_are_in_their_order_with_difference_and_change(run: Run) -> None:
    found = published(run)
    assert found is not None
    assert [row.row for row in found["rows"]] == ["9.1", "9.2", "10.1", "10.2"]
    assert (found["main"], found["tests"]) == ("night", ["night", "day"])
    first, _, last, other = found["rows"]
    assert first.start is None  # ImageNet
    assert last.difference == pytest.approx(100 * run.miou("self_trained", "night") - 45.0, abs=1e-9)
    assert last.start.name == "9.1" and last.start.published == 15.0
    assert last.start.measured.mean == pytest.approx(
        run.miou("self_trained", "night") - run.miou("day_only", "night"), abs=1e-12
    )
    assert last.start.spread is not None and last.start.spread.interval.low > 0
    assert other.start.published is None  # nothing was published of day_only by day


def test_improvements_are_better_than_all_before_as_published(run: Run) -> None:
    found = published(run)
    assert found is not None
    assert [(row.row, step and step.published) for row, step in found["improvements"]] == [
        ("9.1", None),
        ("10.1", 15.0),
    ]
    chart = found["chart"]
    assert [tick.text for tick in chart.x_ticks] == ["9.1", "9.2", "10.1"]
    assert sorted(line.kind for line in chart.lines) == ["measured", "published"]
    assert len(chart.dots) == 4 and len(chart.bars) == 3  # two improvements in two lines, an interval a row


def test_claims_show_the_published_difference_beside_the_measured_one(run: Run) -> None:
    (claim,) = claims(run)
    (pair,) = claim["pairs"]
    assert (claim["verdict"], claim["kind"]) == ("holds", "up")
    assert pair["published"] == 15.0
    assert pair["measured"].mean == pytest.approx(
        run.miou("self_trained", "night") - run.miou("day_only", "night"), abs=1e-12
    )


def test_the_page_has_rows_curve_and_claims(run: Run) -> None:
    text = write_report(run.folder, run.results).read_bytes().decode()
    for expected in ("Published rows", "How it improved", "What is said, and what holds here", "Pools help", "10.2"):
        assert expected in text, expected
    assert 'class="measured"' in text and "swatch published" in text


def test_a_run_without_published_rows_or_claims_has_no_such_section(made_up_run: MadeUpRun) -> None:
    results: dict[str, Any] = copy.deepcopy(made_up_run.results)
    for facts in results["models"].values():
        for scores in facts["tests"].values():
            scores["published_miou"] = None
    bare = Run(made_up_run.folder, results)
    assert published(bare) is None and claims(bare) == []
    assert 'id="published"' not in write_report(bare.folder, results).read_bytes().decode()
