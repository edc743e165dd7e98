"""sRGB, linear light and Oklab, and the colours or low frequencies of one frame given to another. No training.

uint8 frames are sRGB. HW3: height, width, and red, green, blue or L, a, b. A style image may have any size.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

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

    Not the logarithmic space of Reinhard et al.: a night frame is full of black, whose logarithm is an arbitrary floor.
    """
    lab: Floats = np.cbrt(to_linear(image_HW3) @ _TO_CONES.T) @ _TO_LAB.T
    return lab


def from_oklab(lab_HW3: Floats) -> Pixels:
    """Oklab -> uint8 sRGB; colours outside the gamut are clipped band by band."""
    roots = lab_HW3.astype(np.float32, copy=False) @ _FROM_LAB.T
    return to_pixels((roots * roots * roots) @ _FROM_CONES.T)


def reinhard(image_HW3: Pixels, style_HW3: Pixels) -> Pixels:
    """Each axis of Oklab with the style image's mean and deviation (Reinhard et al., 2001, eq. 10, 11).

    The paper's axes are logarithmic; see `to_oklab` why these are not.
    """
    return from_oklab(match_moments(to_oklab(image_HW3), to_oklab(style_HW3)))


def match_moments(values_HWC: Floats, style_HWC: Floats) -> Floats:
    """Values with the style image's mean and deviation in every channel; a channel without spread gets none."""
    mean, deviation = _moments(values_HWC)
    goal_mean, goal_deviation = _moments(style_HWC)
    scale = np.divide(goal_deviation, deviation, out=np.zeros_like(deviation), where=deviation > 1e-9)
    moved: Floats = ((values_HWC - mean) * scale + goal_mean).astype(np.float32)
    return moved


def match_histograms(image_HW3: Pixels, style_HW3: Pixels) -> Pixels:
    """Every band moved by the monotone map of its values that brings it closest to the style image's histogram.

    A value goes to where the middle of its own ranks lies: a white sky over a third of the frame takes a tone from the
    upper third of the night, not that of its brightest lamp. Ranks are integers: no rounding moves equal histograms.
    """
    made = np.empty_like(image_HW3)
    for band in range(image_HW3.shape[2]):
        mine, theirs = (np.bincount(frame[..., band].reshape(-1), minlength=256) for frame in (image_HW3, style_HW3))
        middle = (2 * np.cumsum(mine) - mine) * theirs.sum()
        goal = 2 * np.cumsum(theirs) * mine.sum()
        curve = np.searchsorted(goal, middle, side="right").clip(0, 255).astype(np.uint8)
        made[..., band] = curve[image_HW3[..., band]]
    return made


def _moments(values_HWC: Floats) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    flat = values_HWC.reshape(-1, values_HWC.shape[-1])
    return flat.mean(axis=0, dtype=np.float64), flat.std(axis=0, dtype=np.float64)


def swap_low_amplitudes(image_HW3: Pixels, style_HW3: Pixels, beta: float) -> Pixels:
    """FDA: the image with the style image's amplitudes below `beta` cycles a pixel (arXiv 2004.05498, eq. 3).

    That is |u| < beta H and |v| < beta W in cycles a frame, band by band: beta 0 swaps nothing, any other at least the
    mean. A style image of another size is resized first (antialiased bilinear). Values outside [0, 255] are clipped.
    """
    height, width = image_HW3.shape[:2]
    rows, columns = np.fft.fftfreq(height), np.fft.rfftfreq(width)
    low_Uv = (np.abs(rows) < beta)[:, None] & (columns < beta)[None, :]
    if not low_Uv.any():
        return image_HW3.copy()
    style_HW3 = _resized(style_HW3, height, width)
    made = np.empty_like(image_HW3)
    for band in range(image_HW3.shape[2]):
        spectrum_Uv = np.fft.rfft2(image_HW3[..., band].astype(np.float32))
        wanted = np.abs(np.fft.rfft2(style_HW3[..., band].astype(np.float32))[low_Uv])
        mine = spectrum_Uv[low_Uv]
        size = np.abs(mine)
        # A frequency that the image lacks has no phase; the cosine is as good as any.
        direction = np.divide(mine, size, out=np.ones_like(mine), where=size > 0)
        spectrum_Uv[low_Uv] = wanted * direction
        plane_HW = np.fft.irfft2(spectrum_Uv, s=(height, width))
        made[..., band] = np.rint(np.clip(plane_HW, 0, 255))
    return made


def _resized(image_HW3: Pixels, height: int, width: int) -> Pixels:
    if image_HW3.shape[:2] == (height, width):
        return image_HW3
    picture = Image.fromarray(image_HW3).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(picture)
