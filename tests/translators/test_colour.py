"""Colours against published values and known moments, histograms and spectra."""

from __future__ import annotations

import numpy as np
import pytest

from nightseg.translators.colour import (
    from_oklab,
    match_histograms,
    match_moments,
    reinhard,
    swap_low_amplitudes,
    to_linear,
    to_oklab,
    to_pixels,
)
from tests.rounding import assert_near

ALL_LEVELS = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2)


def test_every_level_comes_back() -> None:
    assert np.array_equal(to_pixels(to_linear(ALL_LEVELS)), ALL_LEVELS)


def test_half_the_light_is_level_188_and_what_cannot_be_shown_is_clipped() -> None:
    light = np.array([[[0.5, 0.0, 1.0], [-1.0, 2.0, 0.0031308]]], dtype=np.float32)
    assert to_pixels(light).tolist() == [[[188, 0, 255], [0, 255, 10]]]
    assert to_linear(np.array([[[0, 255, 10]]], dtype=np.uint8))[0, 0].tolist() == pytest.approx(
        [0, 1, 10 / 255 / 12.92]
    )


@pytest.mark.parametrize(
    ("pixel", "lab"),
    [
        ((255, 255, 255), (1.0, 0.0, 0.0)),
        ((255, 0, 0), (0.62796, 0.22486, 0.12585)),
        ((0, 255, 0), (0.86644, -0.23389, 0.17950)),
        ((0, 0, 255), (0.45201, -0.03246, -0.31153)),
        ((0, 0, 0), (0.0, 0.0, 0.0)),
    ],
)
def test_oklab_of_the_corners(pixel: tuple[int, int, int], lab: tuple[float, float, float]) -> None:
    assert to_oklab(np.array([[pixel]], dtype=np.uint8))[0, 0].tolist() == pytest.approx(lab, abs=2e-4)


def test_oklab_and_back() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    assert np.abs(from_oklab(to_oklab(pixels)).astype(int) - pixels).max() <= 1


def frame(seed: int, low: int = 90, high: int = 160, size: tuple[int, int] = (30, 40)) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (*size, 3), dtype=np.uint8)


def bands(*values: int) -> np.ndarray:
    return np.repeat(np.array(values, dtype=np.uint8)[None, :, None], 3, axis=2)


def test_means_and_deviations_become_the_styles() -> None:
    random = np.random.default_rng(0)
    mine, theirs = (random.normal(mean, 0.3, (50, 60, 3)).astype(np.float32) for mean in (0.2, 0.7))
    moved = match_moments(mine, theirs[:20])
    assert_near(moved.mean(axis=(0, 1)), theirs[:20].mean(axis=(0, 1)), terms=50 * 60)
    assert_near(moved.std(axis=(0, 1)), theirs[:20].std(axis=(0, 1)), terms=50 * 60)


def test_a_whole_frame_has_the_styles_moments_in_oklab() -> None:
    style = frame(1, 60, 110, size=(20, 25))
    got, wanted = to_oklab(reinhard(frame(0), style)), to_oklab(style)
    assert got.mean(axis=(0, 1)) == pytest.approx(wanted.mean(axis=(0, 1)), abs=1e-3)
    assert got.std(axis=(0, 1)) == pytest.approx(wanted.std(axis=(0, 1)), rel=0.05)


def test_a_frame_that_is_its_own_style_stays_and_a_flat_one_takes_the_mean() -> None:
    assert np.abs(reinhard(frame(0), frame(0)).astype(int) - frame(0)).max() <= 1
    flat, style = np.full((4, 5, 3), 200, np.uint8), np.full((6, 7, 3), 40, np.uint8)
    assert np.array_equal(reinhard(flat, style), np.full((4, 5, 3), 40, np.uint8))
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
    style = bands(*range(100))
    made = match_histograms(image, style)[0, :, 0]
    assert set(made[:50].tolist()) == {25} and set(made[50:].tolist()) == {75}


def test_the_map_of_values_is_monotone() -> None:
    ramp = bands(*range(256))
    made = match_histograms(ramp, frame(3, 0, 256))[0].astype(int)
    assert (np.diff(made, axis=0) >= 0).all()


def noise(seed: int, height: int = 24, width: int = 36) -> np.ndarray:
    return np.random.default_rng(seed).integers(60, 190, (height, width, 3), dtype=np.uint8)


def wave(mean: float, height: float, cycles: int) -> np.ndarray:
    row = mean + height * np.cos(2 * np.pi * cycles * np.arange(32) / 32)
    return np.rint(np.broadcast_to(row[None, :, None], (16, 32, 3))).astype(np.uint8)


def test_beta_0_returns_the_frame() -> None:
    image = noise(0)
    made = swap_low_amplitudes(image, noise(1), 0.0)
    assert np.array_equal(made, image) and made is not image


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5])
def test_equal_amplitudes_return_the_frame(beta: float) -> None:
    image = noise(0)
    assert np.array_equal(swap_low_amplitudes(image, image, beta), image)
    shifted = np.roll(image, (5, 7), axis=(0, 1))  # a shift moves phases only
    assert np.array_equal(swap_low_amplitudes(image, shifted, beta), image)


def test_the_mean_comes_from_the_style_and_what_beta_leaves_out_stays() -> None:
    image, style = wave(120, 20, cycles=4), np.full((16, 32, 3), 50, dtype=np.uint8)
    # 4 cycles on 32 pixels are 0.125 cycles a pixel
    assert np.abs(swap_low_amplitudes(image, style, 0.12).astype(int) - wave(50, 20, cycles=4)).max() <= 1
    assert np.abs(swap_low_amplitudes(image, style, 0.13).astype(int) - 50).max() <= 1


def test_amplitudes_are_swapped_inside_the_window_and_phases_nowhere() -> None:
    image, style, beta = noise(0), noise(1), 0.1
    before, style_spectrum, after = (
        np.fft.fft2(frame[..., 0].astype(float)) for frame in (image, style, swap_low_amplitudes(image, style, beta))
    )
    low = (np.abs(np.fft.fftfreq(24)) < beta)[:, None] & (np.abs(np.fft.fftfreq(36)) < beta)[None, :]
    assert low.sum() == 5 * 7
    rounding = 0.3 * np.sqrt(24 * 36) * 5  # five deviations of the sum of rounding errors
    assert np.abs(np.abs(after[low]) - np.abs(style_spectrum[low])).max() < rounding
    assert np.abs(after[~low] - before[~low]).max() < rounding
    turned = after[low] / before[low]
    assert np.abs(np.angle(turned[np.abs(style_spectrum[low]) > 20 * rounding])).max() < 0.1


def test_a_style_of_another_size_and_a_frame_without_structure() -> None:
    made = swap_low_amplitudes(noise(0), np.full((7, 90, 3), 120, dtype=np.uint8), 0.001)
    assert made.shape == (24, 36, 3) and abs(float(made.mean()) - 120) < 0.1
    dark = swap_low_amplitudes(np.zeros((16, 32, 3), np.uint8), np.full((16, 32, 3), 80, np.uint8), 0.2)
    assert np.array_equal(dark, np.full((16, 32, 3), 80, np.uint8))
