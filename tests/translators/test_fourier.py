"""The amplitude swap on frames whose spectrum is known."""

from __future__ import annotations

import numpy as np
import pytest

from nightseg.translators.fourier import swap_low_amplitudes


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


def test_the_mean_comes_from_the_lender_and_what_beta_leaves_out_stays() -> None:
    image, lender = wave(120, 20, cycles=4), np.full((16, 32, 3), 50, dtype=np.uint8)
    # 4 cycles on 32 pixels are 0.125 cycles a pixel
    assert np.abs(swap_low_amplitudes(image, lender, 0.12).astype(int) - wave(50, 20, cycles=4)).max() <= 1
    assert np.abs(swap_low_amplitudes(image, lender, 0.13).astype(int) - 50).max() <= 1


def test_amplitudes_are_swapped_inside_the_window_and_phases_nowhere() -> None:
    image, lender, beta = noise(0), noise(1), 0.1
    before, lent, after = (
        np.fft.fft2(frame[..., 0].astype(float)) for frame in (image, lender, swap_low_amplitudes(image, lender, beta))
    )
    low = (np.abs(np.fft.fftfreq(24)) < beta)[:, None] & (np.abs(np.fft.fftfreq(36)) < beta)[None, :]
    assert low.sum() == 5 * 7
    rounding = 0.3 * np.sqrt(24 * 36) * 5  # five deviations of the sum of rounding errors
    assert np.abs(np.abs(after[low]) - np.abs(lent[low])).max() < rounding
    assert np.abs(after[~low] - before[~low]).max() < rounding
    turned = after[low] / before[low]
    assert np.abs(np.angle(turned[np.abs(lent[low]) > 20 * rounding])).max() < 0.1


def test_a_lender_of_another_size_and_a_frame_without_structure() -> None:
    made = swap_low_amplitudes(noise(0), np.full((7, 90, 3), 120, dtype=np.uint8), 0.001)
    assert made.shape == (24, 36, 3) and abs(float(made.mean()) - 120) < 0.1
    dark = swap_low_amplitudes(np.zeros((16, 32, 3), np.uint8), np.full((16, 32, 3), 80, np.uint8), 0.2)
    assert np.array_equal(dark, np.full((16, 32, 3), 80, np.uint8))
