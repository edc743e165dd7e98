"""Boundary IoU by hand, and against the erosion of its paper's reference code."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_erosion

from nightseg.metrics.boundary import band, boundary_counts, boundary_scores

Map = npt.NDArray[np.uint8]


def rectangle(left: int) -> Map:
    """100 x 100 pixels, the rectangle 1 of 20 rows and 30 columns on 0."""
    label = np.zeros((100, 100), dtype=np.uint8)
    label[40:60, left : left + 30] = 1
    return label


SHARE = 2 / math.hypot(100, 100)  # of the diagonal: two pixels


def test_a_rectangle_that_is_shifted_by_less_than_the_band() -> None:
    """The band of a rectangle h x w is its ring of two pixels, h w - (h - 4)(w - 4) = 600 - 416 = 184 pixels."""
    counts = boundary_counts(rectangle(30), rectangle(31), 2, SHARE)
    # Both rings of a shift by one: the rows of the upper and lower two, 29 long; of the 16 rows between, the left and
    # the right side share one of two columns each.
    both = 4 * 29 + 16 * 2
    assert counts[1].tolist() == [184, 184, both]
    assert boundary_scores(counts).iou[1] == pytest.approx(both / (2 * 184 - both))
    area = 20 * 29 / (2 * 600 - 20 * 29)
    assert boundary_scores(counts).iou[1] < area


def test_a_rectangle_that_is_shifted_out_of_its_band() -> None:
    """By three pixels: of the sides nothing is left, of the upper and lower rows 27 columns."""
    counts = boundary_counts(rectangle(30), rectangle(33), 2, SHARE)
    assert counts[1].tolist() == [184, 184, 4 * 27]


def test_the_ground_has_a_band_along_the_rectangle_and_along_the_image() -> None:
    """At the image: a ring of two, 100^2 - 96^2. Along the rectangle: 24 x 34 - 20 x 30, corners included."""
    counts = boundary_counts(rectangle(30), rectangle(30), 2, SHARE)
    ground = 100**2 - 96**2 + 24 * 34 - 20 * 30
    assert counts[0].tolist() == [ground] * 3
    assert boundary_scores(counts) == (1.0, (1.0, 1.0))


def test_a_hole_costs_more_at_the_boundary_than_in_the_area() -> None:
    guess = rectangle(30)
    guess[49:51, 44:46] = 0
    counts = boundary_counts(rectangle(30), guess, 2, SHARE)
    # Its own ring of two, 6 x 6 - 2 x 2 pixels, is a false alarm of class 1; the ring of the rectangle is right.
    assert counts[1].tolist() == [184, 184 + 32, 184]


def test_ignored_pixels_are_outside_for_both() -> None:
    label = rectangle(30)
    label[:, 45:] = 255
    perfect = boundary_counts(label, rectangle(30), 2, SHARE)
    assert np.array_equal(perfect[:, 0], perfect[:, 1]) and np.array_equal(perfect[:, 0], perfect[:, 2])
    # What is left of the rectangle is 20 x 15, and its cut is a boundary like that at the border of an image.
    assert perfect[1].tolist() == [20 * 15 - 16 * 11] * 3
    anything = np.where(label == 255, np.uint8(7), rectangle(30))
    assert np.array_equal(boundary_counts(label, anything, 2, SHARE), perfect)


def test_a_prediction_without_a_class_is_in_no_band() -> None:
    guess = rectangle(30)
    guess[guess == 1] = 255
    assert boundary_counts(rectangle(30), guess, 2, SHARE)[1].tolist() == [184, 0, 0]


def erosions(label: Map, guess: Map, num_classes: int, distance: float) -> npt.NDArray[np.int64]:
    """As the reference code has it: what d erosions by 3 x 3 take away, with nothing outside the image."""
    times = max(1, round(distance * math.hypot(*label.shape)))
    guess = np.where(label == 255, 255, guess)
    rows = []
    for index in range(num_classes):
        bands = []
        for mask in (label == index, guess == index):
            kept = binary_erosion(mask, np.ones((3, 3)), iterations=times, border_value=0)
            bands.append(mask & ~kept)
        rows.append([bands[0].sum(), bands[1].sum(), (bands[0] & bands[1]).sum()])
    return np.array(rows)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_bands_are_those_of_repeated_erosion(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width, block = rng.integers(1, 60), rng.integers(1, 60), rng.integers(1, 12)
    coarse = rng.integers(0, 4, (-(-height // block), -(-width // block)))
    label = np.kron(coarse, np.ones((block, block), np.int64))[:height, :width].astype(np.uint8)
    guess = np.roll(label, rng.integers(0, 3, 2), (0, 1))
    label[rng.random(label.shape) < 0.01] = 255
    distance = float(rng.uniform(0.005, 0.2))
    assert np.array_equal(boundary_counts(label, guess, 4, distance), erosions(label, guess, 4, distance))


def test_counts_add_up_and_do_not_depend_on_how_a_map_lies_in_memory() -> None:
    label, guess = rectangle(30), rectangle(32)
    turned = boundary_counts(label.T, guess.T, 2, SHARE)
    assert np.array_equal(
        turned, boundary_counts(np.ascontiguousarray(label.T), np.ascontiguousarray(guess.T), 2, SHARE)
    )
    twice = boundary_counts(label, guess, 2, SHARE) + turned
    once = boundary_scores(boundary_counts(label, guess, 2, SHARE))
    assert boundary_scores(twice).miou == pytest.approx(once.miou)


def test_the_width_follows_the_diagonal() -> None:
    assert band(np.zeros((300, 400), np.uint8), 10).sum() == 300 * 400 - 280 * 380
    counts = boundary_counts(np.zeros((300, 400), np.uint8), np.zeros((300, 400), np.uint8), 1)  # 2 % of 500
    assert counts.tolist() == [[300 * 400 - 280 * 380] * 3]
    assert boundary_counts(np.zeros((3, 3), np.uint8), np.zeros((3, 3), np.uint8), 1).tolist() == [[8, 8, 8]]


def test_rules_for_absent_classes() -> None:
    counts = np.array([[10, 10, 10], [0, 4, 0], [0, 0, 0]])
    strict, lenient = boundary_scores(counts), boundary_scores(counts, "detectron2")
    assert strict.iou[:2] == (1.0, 0.0) and math.isnan(strict.iou[2]) and strict.miou == 0.5
    assert lenient.iou[0] == 1.0 and math.isnan(lenient.iou[1]) and lenient.miou == 1.0
    assert math.isnan(boundary_scores(np.zeros((2, 3), int)).miou)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prediction": np.zeros((2, 3), np.uint8)}, "differ in size"),
        ({"label": np.full((2, 2), 3, np.uint8)}, "label 3"),
        ({"label": np.zeros(4, np.uint8), "prediction": np.zeros(4, np.uint8)}, "height, width"),
        ({"distance": 0.0}, "share of the diagonal"),
    ],
)
def test_what_cannot_be_counted_is_an_error(change: dict[str, object], words: str) -> None:
    arguments = {"label": np.zeros((2, 2), np.uint8), "prediction": np.zeros((2, 2), np.uint8), "num_classes": 3}
    with pytest.raises(ValueError, match=words):
        boundary_counts(**(arguments | change))  # type: ignore[arg-type]


def test_scores_refuse_what_are_no_counts_or_no_rule() -> None:
    with pytest.raises(ValueError, match="rule"):
        boundary_scores(np.zeros((2, 3), int), "other")  # type: ignore[arg-type]
    for counts in (np.zeros((2, 3)), np.zeros((2, 2), int), np.zeros(3, int)):
        with pytest.raises(ValueError, match="counts"):
            boundary_scores(counts)
