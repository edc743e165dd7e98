"""Mean and spread over seeds, by hand."""

from __future__ import annotations

import pytest

from nightseg.metrics.seeds import deviation, difference, least_gain, mean, over_seeds


def test_mean_and_sample_deviation_of_each_metric_and_class() -> None:
    def record(miou: float, sky: float | None) -> dict[str, object]:
        return {"miou": miou, "pa": 0.5, "iou": {"sky": sky}, "confusion": [[1]]}

    found = over_seeds({0: record(0.25, 0.5), 1: record(0.5, 0.0), 4: record(0.75, None)})
    assert found == {
        "seeds": {"0": 0.25, "1": 0.5, "4": 0.75},
        "mean": {"pa": 0.5, "miou": 0.5, "iou": {"sky": None}},  # a class without IoU under one seed has no mean
        "std": {"pa": 0.0, "miou": 0.25, "iou": {"sky": None}},  # sqrt((1/16 + 0 + 1/16) / 2)
    }


def test_one_seed_has_no_spread() -> None:
    assert (mean([0.25]), deviation([0.25]), deviation([])) == (0.25, None, None)
    assert over_seeds({0: {"miou": 0.5, "iou": {}}})["std"] == {"miou": None, "iou": {}}


def test_differences_are_paired_by_seed_where_the_seeds_are_the_same() -> None:
    found = difference({"0": 0.5, "1": 0.75}, {"1": 0.5, "0": 0.25})
    assert found == (0.25, 0.0, True)  # the same gain under both seeds, however far apart these are
    apart = difference({"0": 0.5, "1": 1.0}, {"2": 0.25, "3": 0.25, "4": 0.25})
    assert apart == (0.5, pytest.approx(0.125**0.5, rel=1e-12), False)  # sqrt(2 x 0.25^2), and none of the other
    assert difference({"0": 0.5}, {"0": 0.25}) == (0.25, None, True)
    assert difference({"0": 0.5, "1": 0.5}, {"0": 0.25}) == (0.25, None, False)


def test_a_gain_must_be_larger_than_what_another_draw_of_the_seeds_brings() -> None:
    apart = {"0": 0.60, "1": 0.50, "2": 0.40}  # deviation 0.1
    assert least_gain(apart, {"0": 0.47}) == pytest.approx(0.02**0.5, rel=1e-12)  # as far apart as that, too
    assert least_gain({"0": 0.47}, apart) == pytest.approx(0.02**0.5, rel=1e-12)
    assert least_gain(apart, {"3": 0.5, "4": 0.5}) == pytest.approx(0.1, rel=1e-12)
    assert least_gain({"0": 0.5, "1": 0.75}, {"0": 0.25, "1": 0.5}) == 0.0  # pair by pair
    assert least_gain({"0": 0.5}, {"0": 0.25}) is None
