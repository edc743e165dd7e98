"""Draws are scores of sums of matrices, the same for the same seed, in pairs for two models."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from nightseg.metrics import bootstrap
from nightseg.metrics.bootstrap import Interval, drawn_miou, interval, summed_by
from nightseg.metrics.confusion import scores


def matrices(num_frames: int = 7, num_classes: int = 3, columns: int = 4) -> np.ndarray:
    """Class 2 is in the labels of the first frame only, so some draws lack it; it is predicted elsewhere."""
    counts = np.random.default_rng(3).integers(0, 50, (num_frames, num_classes, columns))
    counts[1:, 2] = 0
    return counts


@pytest.mark.parametrize("rule", ["cityscapes", "detectron2"])
@pytest.mark.parametrize("columns", [3, 4])
def test_each_draw_is_the_score_of_the_frames_drawn(rule: Literal["cityscapes", "detectron2"], columns: int) -> None:
    counts = matrices(columns=columns)
    times = np.random.default_rng(5).multinomial(7, [1 / 7] * 7, size=40)
    expected = [scores(np.tensordot(row, counts, 1), rule).miou for row in times]
    # The mean of K = 3 quotients, added in another order: a few units in the last place.
    assert drawn_miou(counts, rule, draws=40, seed=5) == pytest.approx(expected, rel=1e-14)


def test_frames_that_are_all_alike_have_no_spread_and_models_are_drawn_in_pairs() -> None:
    alike = np.repeat(matrices(1), 9, axis=0)
    miou = scores(alike[0]).miou
    assert interval(drawn_miou(alike)) == pytest.approx((miou, miou))
    counts = matrices(30)
    assert np.ptp(drawn_miou(counts) - drawn_miou(10 * counts)) < 1e-12  # the same frames, at another size
    assert np.ptp(drawn_miou(counts)) > 0.01


@pytest.mark.parametrize("at_once", [1, 20, 7 * 33])
def test_draws_are_the_same_however_many_are_made_at_once(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    expected = drawn_miou(matrices(), draws=100)
    monkeypatch.setattr(bootstrap, "_TIMES_AT_ONCE", at_once)
    assert np.array_equal(drawn_miou(matrices(), draws=100), expected)


def test_draws_without_a_class_have_no_value() -> None:
    empty = np.zeros((4, 2, 2), np.int64)
    assert np.isnan(drawn_miou(empty)).all() and np.isnan(interval(drawn_miou(empty))).all()
    assert interval(np.array([np.nan, *range(41)])) == pytest.approx(Interval(1.0, 39.0))


def test_drives_are_added_up() -> None:
    counts = matrices(3)
    found = summed_by(["b", "a", "b"], counts)
    assert (found[0] == counts[1]).all() and (found[1] == counts[0] + counts[2]).all()
