"""Do the edges of a translated frame lie where those of its source lie? Light may change, outlines must not.

    n = (Y - m) / (s + c)       Y: luma, smoothed; m, s: mean and deviation of it in the window around a pixel
    g = |gradient of n|         Sobel
    agreement = correlation of g and g' over all pixels, Pearson's

Luma (Rec. 601) is in grey levels, 0 to 255. Local normalisation takes out what light does, so an edge in the dark
counts as much as one in the sun; the constant c keeps the noise of flat dark parts from counting as edges. The length
of the gradient forgets its sign: a sky that was brighter than the house and now is darker keeps its outline. All
windows grow with the frame, so that a frame and its enlargement agree about alike.

HW: height, width.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

FLOOR: Final = 4.0
"""c, grey levels: about the noise of a camera at night after smoothing."""

_SMOOTHING: Final = 1 / 240  # of the shorter side: radius of the box means before anything else
_WINDOW: Final = 1 / 24  # of the shorter side: radius of the window of the local mean and deviation
_NO_EDGE: Final = 1e-6


def edge_agreement(source_HW3: Pixels, translated_HW3: Pixels) -> float:
    """Correlation of the edges of two uint8 RGB frames of one size, in [-1, 1].

    1: the same outlines, also with the sign turned; little less for a Y + b, until edges drown in the floor; about 0:
    none in common. Two frames without any edge agree (1), one with and one without do not (0). Raises ValueError if
    the sizes differ.
    """
    if source_HW3.shape != translated_HW3.shape:
        raise ValueError(f"frames of one size are compared, not {source_HW3.shape} and {translated_HW3.shape}")
    first, second = (edges(frame) for frame in (source_HW3, translated_HW3))
    return correlation(first, second)


def edges(image_HW3: Pixels) -> Floats:
    """Length of the gradient of the locally normalised luma, float32 HW, at least 0."""
    side = min(image_HW3.shape[:2])
    luma_HW = image_HW3.astype(np.float32) @ np.array((0.299, 0.587, 0.114), dtype=np.float32)
    smooth_HW = _mean(_mean(luma_HW, max(1, round(side * _SMOOTHING))), max(1, round(side * _SMOOTHING)))
    return gradient_length(normalised(smooth_HW, max(2, round(side * _WINDOW)), FLOOR))


def normalised(plane_HW: Floats, radius: int, floor: float) -> Floats:
    """(Y - m) / (s + floor), m and s over the window of 2 radius + 1 pixels a side; the border is mirrored."""
    mean_HW = _mean(plane_HW, radius)
    # Of the deviations from the global mean: squares of raw grey levels would lose the digits of a small spread.
    centred_HW = plane_HW - plane_HW.mean()
    variance_HW = _mean(centred_HW * centred_HW, radius) - _mean(centred_HW, radius) ** 2
    result: Floats = (plane_HW - mean_HW) / (np.sqrt(np.maximum(variance_HW, 0.0)) + np.float32(floor))
    return result


def gradient_length(plane_HW: Floats) -> Floats:
    """sqrt(across^2 + down^2) of the Sobel differences, in units of the plane a pixel; the border is mirrored."""
    across, down = (ndimage.sobel(plane_HW, axis=axis, mode="reflect") / 8.0 for axis in (1, 0))
    length: Floats = np.hypot(across, down)
    return length


def correlation(first_HW: Floats, second_HW: Floats) -> float:
    """Pearson's correlation of two planes; if one is constant 0, if both are 1."""
    one, two = (plane.astype(np.float64) - plane.mean(dtype=np.float64) for plane in (first_HW, second_HW))
    spreads = [float(np.sqrt(np.mean(plane * plane))) for plane in (one, two)]
    flat = [spread < _NO_EDGE for spread in spreads]
    if any(flat):
        return 1.0 if all(flat) else 0.0
    return float(np.clip(np.mean(one * two) / (spreads[0] * spreads[1]), -1.0, 1.0))


def _mean(plane_HW: Floats, radius: int) -> Floats:
    mean: Floats = ndimage.uniform_filter(plane_HW, size=2 * radius + 1, mode="reflect")
    return mean
