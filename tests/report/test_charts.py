"""Charts as geometry: where things lie is arithmetic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightseg.report.charts import Chart, DotAxis, curves, line, nice_values, scatter, share_curve, stacked_histogram


def test_ticks_are_round_and_inside() -> None:
    assert nice_values(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert nice_values(-1, 1) == pytest.approx([-1, -0.5, 0, 0.5, 1])
    assert nice_values(0, 255) == [0, 100, 200]
    assert nice_values(3, 3) == [3]


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (99.905, 99.945, ["99.91", "99.92", "99.93", "99.94"]),
        (0.9995, 0.9999, ["0.9995", "0.9996", "0.9997", "0.9998", "0.9999"]),
        (1000, 1000.4, ["1 000", "1 000.1", "1 000.2", "1 000.3", "1 000.4"]),
        (-0.3, 0.1, ["\u22120.3", "\u22120.2", "\u22120.1", "0", "0.1"]),
        (46.123456, 46.123456, ["46.1"]),
    ],
)
def test_no_two_ticks_say_the_same(low: float, high: float, texts: list[str]) -> None:
    chart = Chart((low, high), (low, high), [], "x")
    for ticks in (chart.x_ticks, chart.y_ticks):
        assert [tick.text.replace("\u202f", " ") for tick in ticks] == texts


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-3, 1e6))
def test_ticks_are_few(low: float, span: float) -> None:
    values = nice_values(low, low + span)
    assert 1 <= len(values) <= 6
    slack = 1e-6 * (abs(low) + span)  # a tick beside the edge by less than a thousandth of a pixel is drawn on it
    assert all(low - slack <= value <= low + span + slack for value in values)


def test_bars_stack_without_gap_and_fill_the_height() -> None:
    chart = stacked_histogram([0, 1, 2], {"day": [1, 0], "night": [3, 2]}, description="x", marks={"cut": 1})
    first, second, third = chart.bars
    assert (first.kind, second.kind, third.kind) == ("day", "night", "night")
    assert first.y + first.height == chart.bottom
    assert second.y + second.height == pytest.approx(first.y)
    assert second.y == chart.top  # 1 + 3 is the highest column
    assert third.height == pytest.approx(2 * first.height)
    assert chart.marks[0].place == (chart.left + chart.right) / 2
    assert second.title == "night: 3 frames, 0 to 1"


def test_curves_span_the_chart_and_nothing_is_no_error() -> None:
    chart = curves({"day": [0.0, 2.0, 1.0]}, x_range=(0, 255), description="x")
    points = [tuple(map(float, pair.split(","))) for pair in chart.lines[0].points.split()]
    assert points[0] == (chart.left, chart.bottom) and points[1][1] == chart.top
    assert points[2] == (chart.right, (chart.top + chart.bottom) / 2)
    assert curves({}, x_range=(0, 1), description="x").lines == []
    assert stacked_histogram([0, 1], {}, description="x").bars == []


def test_a_line_goes_through_its_points() -> None:
    chart = line([10, 20, 40], [4, 2, 3], kind="chosen", description="x", marks={"here": 20})
    xs, ys = zip(*(map(float, point.split(",")) for point in chart.lines[0].points.split()), strict=True)
    assert (xs[0], xs[-1]) == (chart.left, chart.right)
    assert xs[1] == pytest.approx(chart.left + (chart.right - chart.left) / 3, abs=0.01)
    assert ys[0] == chart.top  # 4, the highest; 2 lies a tenth of the range above the axis
    assert ys[1] == pytest.approx(chart.bottom - (chart.bottom - chart.top) * 0.1 / 1.1, abs=0.01)
    assert chart.marks[0].place == xs[1]


def test_dots_fill_the_drawing() -> None:
    chart = scatter({"pool": [[0, 0], [2, 4]], "chosen": [[1, 2]]}, description="x")
    assert chart is not None
    low, high, middle = chart.dots
    assert (low.x, low.y, high.x, high.y) == (chart.left, chart.bottom, chart.right, chart.top)
    assert (middle.x, middle.y, middle.kind) == ((low.x + high.x) / 2, (low.y + high.y) / 2, "chosen")
    assert scatter({"pool": []}, description="x") is None


def test_shares_are_percent_over_the_band_of_their_limits() -> None:
    chart = share_curve([1, 2, 3], [0.2, 0.1, 0.05], (0.1, 0.3), description="x")
    (band,) = chart.bars
    assert band.kind == "band" and (band.x, band.x + band.width) == (chart.left, chart.right)
    assert (band.y, band.y + band.height) == (chart.y(30), pytest.approx(chart.y(10)))
    assert chart.dots[1].y == chart.y(10) and chart.dots[2].y > chart.y(10)  # leaves the band below
    assert [tick.text for tick in chart.x_ticks] == ["1", "3"]
    assert share_curve([1], [0.0], (0.0, 0.0), description="x").bars[0].height == 0


def test_rows_of_dots_share_an_axis() -> None:
    axis = DotAxis([40.0, 60.0])
    row = axis.row([40.0, 60.0], 45.0)
    assert row.mean == pytest.approx(axis.width / 2) == pytest.approx(sum(row.places) / 2)
    assert row.line == pytest.approx(row.places[0] + (row.places[1] - row.places[0]) / 4, abs=0.01)  # rounded to 0.01
    assert axis.row([50.0], None).line is None
    assert DotAxis([50.0]).place(50.0) == axis.width / 2
