"""Edges that agree, move and vanish; the pieces of the measure by hand."""

from __future__ import annotations

import numpy as np
import pytest

from nightseg.metrics.edges import FLOOR, correlation, edge_agreement, edges, gradient_length, normalised
from tests.rounding import rounding


def street(seed: int = 0) -> np.ndarray:
    """Blocks of random grey, 96 x 144."""
    grey = np.random.default_rng(seed).integers(40, 200, (8, 12), dtype=np.uint8)
    return np.repeat(np.kron(grey, np.ones((12, 12), np.uint8))[..., None], 3, axis=2)


def test_a_frame_agrees_with_itself_and_with_what_light_makes_of_it() -> None:
    image = street()
    assert edge_agreement(image, image) == pytest.approx(1.0)
    assert edge_agreement(image, 255 - image) == pytest.approx(1.0)
    darker = np.rint(image * 0.3 + 20).astype(np.uint8)
    assert edge_agreement(image, darker) > 0.95


def test_moved_edges_agree_less_the_farther_they_moved() -> None:
    image = street()
    agreements = [edge_agreement(image, np.roll(image, shift, axis=1)) for shift in (0, 1, 2, 4)]
    assert agreements == sorted(agreements, reverse=True) and agreements[2] < 0.8 and agreements[3] < 0.5
    assert edge_agreement(image, street(1)) > 0.5  # other greys, the same outlines
    assert abs(edge_agreement(image, np.roll(image, 6, axis=(0, 1)))) < 0.3


def test_edges_that_vanish_and_noise_cost_agreement() -> None:
    image = street()
    flat = np.full_like(image, 90)
    assert edge_agreement(image, flat) == 0.0 and edge_agreement(flat, flat) == 1.0
    noisy = np.clip(image + np.random.default_rng(0).normal(0, 12, image.shape), 0, 255).astype(np.uint8)
    assert 0.7 < edge_agreement(image, noisy) < 0.995
    half = image.copy()
    half[:, 72:] = 90
    assert 0.3 < edge_agreement(image, half) < 0.9


def test_sizes_must_be_the_same() -> None:
    with pytest.raises(ValueError, match="frames of one size"):
        edge_agreement(street(), street()[:-1])


def test_a_step_by_hand() -> None:
    """Left half 0, right half 8: Sobel differences over eight are half the step on both sides of it, 0 elsewhere."""
    plane = np.zeros((5, 8), dtype=np.float32)
    plane[:, 4:] = 8
    expected = np.zeros((5, 8))
    expected[:, 3:5] = 4
    assert gradient_length(plane) == pytest.approx(expected)
    assert gradient_length(plane.T.copy()) == pytest.approx(expected.T)
    ramp = np.broadcast_to(np.arange(9, dtype=np.float32) * 3, (4, 9))
    assert gradient_length(ramp)[:, 1:-1] == pytest.approx(3.0)  # a slope of 3 a pixel


def test_local_normalisation_by_hand() -> None:
    """A checkerboard of 10 and 30 in windows of 3 x 3: mean 20 +- 10 / 9, so the deviation is sqrt(100 - 100 / 81)."""
    plane = np.where(np.indices((7, 7)).sum(axis=0) % 2, 30, 10).astype(np.float32)
    found = normalised(plane, 1, FLOOR)[2:5, 2:5]
    deviation = np.sqrt(100 - 100 / 81)
    sign = np.where(np.indices((7, 7)).sum(axis=0) % 2, 1, -1)[2:5, 2:5]
    assert found == pytest.approx(sign * (10 - 10 / 9) / (deviation + FLOOR), rel=rounding(64))  # of nine
    assert not normalised(np.full((5, 5), 200, np.float32), 2, FLOOR).any()


def test_correlation_by_hand() -> None:
    a, b = np.array([[1.0, 2.0, 3.0]], np.float32), np.array([[2.0, 4.0, 3.0]], np.float32)
    assert correlation(a, b) == pytest.approx(0.5)  # cov 1/3, variances 2/3 and 2/3
    assert correlation(a, -a) == pytest.approx(-1.0)


def test_windows_grow_with_the_frame() -> None:
    image = street()
    large = np.kron(image, np.ones((4, 4, 1), np.uint8))
    moved, moved_large = (np.roll(frame, shift, axis=1) for frame, shift in ((image, 2), (large, 8)))
    assert edge_agreement(large, moved_large) == pytest.approx(edge_agreement(image, moved), abs=0.25)
    assert edges(large).shape == (384, 576) and edges(large).min() >= 0


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 2)])
def test_the_smallest_frames_agree_with_themselves(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    assert edge_agreement(image, image) == pytest.approx(1.0)
