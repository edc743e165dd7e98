"""sRGB, linear light and Oklab against published values."""

from __future__ import annotations

import numpy as np
import pytest

from nightseg.translators.srgb import from_oklab, to_linear, to_oklab, to_pixels

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
