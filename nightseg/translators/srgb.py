"""Eight-bit sRGB, linear light and Oklab. HW3: height, width, and red, green, blue or L, a, b."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# Linear sRGB to cone responses, and their cube roots to lightness and two opponent colours (Ottosson, 2020).
_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_OPPONENTS = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
_TO_CONES, _FROM_CONES = _CONES.astype(np.float32), np.linalg.inv(_CONES).astype(np.float32)
_TO_LAB, _FROM_LAB = _OPPONENTS.astype(np.float32), np.linalg.inv(_OPPONENTS).astype(np.float32)

_CODES = np.arange(256) / 255.0
_LINEAR = np.where(_CODES <= 0.04045, _CODES / 12.92, ((_CODES + 0.055) / 1.055) ** 2.4).astype(np.float32)


def to_linear(image_HW3: Pixels) -> Floats:
    """uint8 sRGB -> float32 linear light in [0, 1] (IEC 61966-2-1)."""
    linear: Floats = _LINEAR[image_HW3]
    return linear


def to_pixels(linear_HW3: Floats) -> Pixels:
    """float32 linear light, clipped to [0, 1] -> uint8 sRGB, rounded to nearest. Undoes `to_linear` exactly."""
    light = np.clip(linear_HW3, 0.0, 1.0)
    curve = np.float32(1.055) * np.power(light, np.float32(1 / 2.4)) - np.float32(0.055)
    coded = np.where(light <= 0.0031308, np.float32(12.92) * light, curve)
    pixels: Pixels = np.rint(coded * np.float32(255.0)).astype(np.uint8)
    return pixels


def to_oklab(image_HW3: Pixels) -> Floats:
    """uint8 sRGB -> float32 Oklab: L in [0, 1], a and b about +-0.4.

    Chosen over the logarithmic space of Reinhard et al. because a night frame is full of black, whose logarithm is
    whatever floor one puts under it; a cube root has no such edge, and its three axes are as little correlated.
    """
    lab: Floats = np.cbrt(to_linear(image_HW3) @ _TO_CONES.T) @ _TO_LAB.T
    return lab


def from_oklab(lab_HW3: Floats) -> Pixels:
    """Oklab -> uint8 sRGB; colours outside the gamut are clipped band by band."""
    roots = lab_HW3.astype(np.float32, copy=False) @ _FROM_LAB.T
    return to_pixels((roots * roots * roots) @ _FROM_CONES.T)
