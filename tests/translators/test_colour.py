"""Colours given to another frame: moments and histograms that are known."""

from __future__ import annotations

import numpy as np
import pytest

from nightseg.translators.colour import match_histograms, match_moments, reinhard
from nightseg.translators.srgb import to_oklab


def frame(seed: int, low: int = 90, high: int = 160, size: tuple[int, int] = (30, 40)) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (*size, 3), dtype=np.uint8)


def bands(*values: int) -> np.ndarray:
    return np.repeat(np.array(values, dtype=np.uint8)[None, :, None], 3, axis=2)


def test_means_and_deviations_become_the_lenders() -> None:
    random = np.random.default_rng(0)
    mine, theirs = (random.normal(mean, 0.3, (50, 60, 3)).astype(np.float32) for mean in (0.2, 0.7))
    moved = match_moments(mine, theirs[:20])
    assert moved.mean(axis=(0, 1)) == pytest.approx(theirs[:20].mean(axis=(0, 1)), abs=1e-5)
    assert moved.std(axis=(0, 1)) == pytest.approx(theirs[:20].std(axis=(0, 1)), rel=1e-5)


def test_a_whole_frame_has_the_lenders_moments_in_oklab() -> None:
    lender = frame(1, 60, 110, size=(20, 25))
    got, wanted = to_oklab(reinhard(frame(0), lender)), to_oklab(lender)
    assert got.mean(axis=(0, 1)) == pytest.approx(wanted.mean(axis=(0, 1)), abs=1e-3)
    assert got.std(axis=(0, 1)) == pytest.approx(wanted.std(axis=(0, 1)), rel=0.05)


def test_a_frame_that_lends_to_itself_stays_and_a_flat_one_takes_the_mean() -> None:
    assert np.abs(reinhard(frame(0), frame(0)).astype(int) - frame(0)).max() <= 1
    flat, lender = np.full((4, 5, 3), 200, np.uint8), np.full((6, 7, 3), 40, np.uint8)
    assert np.array_equal(reinhard(flat, lender), np.full((4, 5, 3), 40, np.uint8))
    assert len(np.unique(reinhard(flat, frame(1)).reshape(-1, 3), axis=0)) == 1


def test_a_permutation_of_the_pixels_changes_nothing() -> None:
    image = frame(0, 0, 256)
    mixed = np.random.default_rng(5).permutation(image.reshape(-1, 3)).reshape(image.shape)
    assert np.array_equal(match_histograms(image, mixed), image)
    assert np.array_equal(match_histograms(image, np.concatenate([mixed, mixed])), image)


def test_histograms_by_hand() -> None:
    assert match_histograms(bands(0, 1, 2, 3), bands(10, 10, 20, 30)).tolist() == bands(10, 10, 20, 30).tolist()
    assert np.array_equal(match_histograms(frame(0), frame(0) + 50), frame(0) + 50)


def test_a_blown_out_sky_takes_the_middle_of_its_ranks_not_the_brightest_lamp() -> None:
    image = bands(*[0] * 50, *[255] * 50)
    lender = bands(*range(100))
    made = match_histograms(image, lender)[0, :, 0]
    assert set(made[:50].tolist()) == {25} and set(made[50:].tolist()) == {75}


def test_the_map_of_values_is_monotone() -> None:
    ramp = bands(*range(256))
    made = match_histograms(ramp, frame(3, 0, 256))[0].astype(int)
    assert (np.diff(made, axis=0) >= 0).all()
