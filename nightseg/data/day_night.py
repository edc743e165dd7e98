"""Luminance histograms, and how they tell day from night.

The thesis separates a pool of frames into two domains by their histograms and ignores twilight. Brightness alone does
not do it: a camera at night amplifies until the picture is as bright as one by day. What exposure cannot change is
where the light is. By day the sky is the brightest thing; at night the street is lit from below and the sky is dark; at
twilight the sky is still bright over a street that lies in the dark. So a frame is described by two histograms, of its
upper third (where the sky is) and of the rest, on a scale that runs from its own black to its own white.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

NUM_BINS = 64
NUM_BANDS = 2  # upper third, rest
SKY_SHARE = 1 / 3
"""Share of a frame's pixels in the upper band."""

Floats = npt.NDArray[np.float64]

_PART = 1000  # frames that are described at a time
_SAMPLED_SIDE = 360  # pixels of the shorter side that are read; more change nothing in the histogram
_BLACK, _WHITE = 0.02, 0.995  # quantiles of the whole frame that count as its black and white
_LEAST_RANGE = 1 / 16  # of the scale: a frame of one grey must not have its noise stretched to full contrast
_LEVELS = np.arange(0.05, 1.0, 0.1)  # quantiles that describe a band; without the lamps and mirrors at the very end

# Root of the stretched luminance at `_LEVELS`, mean over 118 night, 698 day and 62 dusk frames of 12 cameras that were
# told apart by eye. Rows: upper band, lower band.
_NIGHT = (
    (0.02, 0.15, 0.20, 0.24, 0.27, 0.31, 0.35, 0.40, 0.47, 0.63),
    (0.26, 0.35, 0.41, 0.46, 0.50, 0.54, 0.58, 0.63, 0.69, 0.83),
)
_DAY = (
    (0.31, 0.47, 0.58, 0.67, 0.76, 0.84, 0.90, 0.95, 0.97, 0.99),
    (0.18, 0.35, 0.43, 0.49, 0.53, 0.56, 0.59, 0.63, 0.69, 0.83),
)
_DUSK = (
    (0.21, 0.32, 0.41, 0.52, 0.61, 0.69, 0.78, 0.84, 0.89, 0.96),
    (0.08, 0.17, 0.21, 0.24, 0.27, 0.29, 0.32, 0.36, 0.45, 0.72),
)
_CLEAR = 0.3  # |score| from which on a frame may move the centre of its domain
_DUSK_MARGIN = 0.2  # contrast by which a frame must be closer to dusk than to its domain to be called twilight
_PRIOR_FRAMES = 100  # clear frames that a pool needs to move a centre a quarter of the way to their mean
_LARGEST_POOL_WEIGHT = 0.5
_MAX_STEPS = 50
_GREY_LEVELS = 0.5  # mean difference between colour and luminance, of 255, below which a frame has no colour
_GREY_SHARE = 0.02  # the same as a share of the mean luminance: the dark of a colour camera is almost grey


class Tone(NamedTuple):
    """The features of one frame that the separation uses."""

    bands: npt.NDArray[np.float32]  # (2, 64): histograms of the upper third and of the rest, each sums to 1
    chroma: float  # mean absolute difference of R, G and B from the luminance, 0 to 255


class Separation(NamedTuple):
    """The domain of each frame of a pool."""

    score: Floats  # (N,) in [-1, 1]: -1 is night, 1 is day
    margin: Floats  # (N,) in [0, 1]: how clear that is; 0 for twilight and for frames without colour
    domain: list[str]  # day, night, twilight; unknown for grey frames among coloured ones
    centres: Floats  # (3, 2, 10): night, day, dusk as root stretched luminance at the quantiles 0.05, 0.15 ... 0.95


def luminance(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Luma (Rec. 601) of a uint8 HWC RGB image, as uint8 HW."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"expected a uint8 image of shape (H, W, 3), got {image.dtype} {image.shape}")
    red, green, blue = (image[..., channel].astype(np.uint16) for channel in range(3))
    return ((77 * red + 150 * green + 29 * blue) >> 8).astype(np.uint8)


def luminance_histogram(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Histogram of the luminance of a uint8 HWC RGB image: float32 (64,) over 0 to 255, sums to 1."""
    return whole(tone_of(image).bands)


def tone_of(image: npt.NDArray[np.uint8]) -> Tone:
    """Histograms and colourfulness of a uint8 HWC RGB image; large images are read at every n-th pixel."""
    step = max(1, min(image.shape[:2]) // _SAMPLED_SIDE)
    sampled = image[::step, ::step]
    luma = luminance(sampled)
    cut = max(1, round(len(luma) * SKY_SHARE))
    bands = np.stack([_histogram(luma[:cut]), _histogram(luma[cut:] if cut < len(luma) else luma)])
    chroma = np.abs(sampled.astype(np.int16) - luma[..., None].astype(np.int16)).mean()
    return Tone(bands, float(chroma))


def whole(bands: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """The histogram (..., 64) of the whole frame from those of its bands (..., 2, 64)."""
    bands_BH = np.asarray(bands, dtype=np.float64)
    mixed: Floats = bands_BH[..., 0, :] * SKY_SHARE + bands_BH[..., 1, :] * (1 - SKY_SHARE)
    return mixed.astype(np.float32)


def separate(bands: npt.ArrayLike, chroma: npt.ArrayLike, *, margin: float = 0.2) -> Separation:
    """Find the day and the night domain in a pool of N frames, and leave twilight out.

    The rule: each band is described by ten quantiles of its luminance, stretched between the frame's own black and
    white; distances between such descriptions are Wasserstein-2 distances between histograms. Every frame is compared
    with a centre of night, of day and of dusk,

        score = (distance to night - distance to day) / (distance to night + distance to day),

    and it is day or night if |score| >= `margin`; what is closer to dusk than to its domain by a clear contrast is
    twilight whatever its score. The centres start from means over many cameras; those of day and night then move to the
    mean of the pool's own clear frames (|score| >= 0.3), at most half of the way. The tie to the start is what makes
    a pool of day frames only come out as day only: nothing forces it into two halves.

    Frames without any colour (a thermal or near-infrared camera among colour cameras) are "unknown": in them the sky
    is dark by day. A pool that is mostly grey comes from grey cameras, and is separated like any other.

    `bands` (N, 2, 64), `chroma` (N,): see `Tone`. The result does not depend on the order of the frames but for
    rounding. `margin` lies in [0, 1]; a larger one leaves more frames out.
    """
    if not 0 <= margin <= 1:
        raise ValueError(f"margin must lie in 0 to 1, got {margin}")
    bands_NBH = np.asarray(bands).reshape(-1, NUM_BANDS, NUM_BINS)
    described_ND = by_parts(_describe, bands_NBH)
    grey = _without_colour(by_parts(_mean_luminance, bands_NBH), np.asarray(chroma, dtype=np.float64))
    start = np.array([_NIGHT, _DAY, _DUSK]).reshape(3, -1)
    centres = _find_centres(described_ND[~grey], start)
    score, is_dusk = _score(described_ND, centres)
    clearness = np.where(is_dusk | grey, 0.0, np.abs(score))
    domain = [
        "unknown" if no_colour else "twilight" if clear < margin or dusk else "day" if value > 0 else "night"
        for value, clear, dusk, no_colour in zip(score, clearness, is_dusk, grey, strict=True)
    ]
    return Separation(score, clearness, domain, centres.reshape(3, NUM_BANDS, -1))


def by_parts(of: Callable[[npt.NDArray[Any]], npt.NDArray[Any]], bands_NBH: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """What a function says of each frame, asked for some frames at a time: in float64 a pool would be large."""
    starts = range(0, max(len(bands_NBH), 1), _PART)
    return np.concatenate([of(bands_NBH[start : start + _PART]) for start in starts])


def _histogram(luma: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    counts = np.bincount(luma.ravel() // (256 // NUM_BINS), minlength=NUM_BINS)
    return (counts / max(luma.size, 1)).astype(np.float32)


def _quantiles(histograms_NH: Floats, levels: Floats) -> Floats:
    """Luminance in [0, 1] below which `levels` of the pixels lie, linear within a bin: (N, len(levels))."""
    edges = np.linspace(0, 1, NUM_BINS + 1)
    cumulative = np.concatenate([np.zeros((len(histograms_NH), 1)), np.cumsum(histograms_NH, axis=1)], axis=1)
    found = [np.interp(levels, row, edges) for row in cumulative]
    return np.array(found, dtype=np.float64).reshape(-1, len(levels))


def _describe(bands_NBH: npt.NDArray[Any]) -> Floats:
    """Root of the stretched luminance at `_LEVELS` of both bands, (N, 20): the root makes equal steps look equal."""
    bands_NBH = bands_NBH.astype(np.float64)
    ends = _quantiles(whole(bands_NBH).astype(np.float64), np.array([_BLACK, _WHITE]))
    black, white = ends[:, :1], ends[:, 1:]
    stretched = [
        np.clip((_quantiles(bands_NBH[:, band], _LEVELS) - black) / np.maximum(white - black, _LEAST_RANGE), 0, 1)
        for band in range(NUM_BANDS)
    ]
    return np.sqrt(np.concatenate(stretched, axis=1))


def _score(described_ND: Floats, centres: Floats) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Score of each frame, and whether it is closer to dusk than to its domain."""
    to_night, to_day, to_dusk = (np.linalg.norm(described_ND - centre, axis=1) for centre in centres)
    nearest = np.minimum(to_night, to_day)
    return _contrast(to_night, to_day), _contrast(nearest, to_dusk) > _DUSK_MARGIN


def _contrast(first: Floats, second: Floats) -> Floats:
    total = first + second
    return np.divide(first - second, total, out=np.zeros_like(total), where=total > 0)


def _find_centres(described_ND: Floats, start: Floats) -> Floats:
    """Centres of night, day and dusk for this pool; dusk stays where it is, it is no domain."""
    centres = start
    for _ in range(_MAX_STEPS):
        score, is_dusk = _score(described_ND, centres)
        moved = start.copy()
        for domain, clear in enumerate((score <= -_CLEAR, score >= _CLEAR)):
            members = described_ND[clear & ~is_dusk]
            if len(members):
                weight = _LARGEST_POOL_WEIGHT * len(members) / (len(members) + _PRIOR_FRAMES)
                moved[domain] = (1 - weight) * start[domain] + weight * members.mean(axis=0)
        if np.abs(moved - centres).max() < 1e-6:
            break
        centres = moved
    return centres


def _mean_luminance(bands_NBH: npt.NDArray[Any]) -> Floats:
    """(N,) in 0 to 255."""
    middles = (np.arange(NUM_BINS) + 0.5) * (256 / NUM_BINS)
    return np.asarray(whole(bands_NBH).astype(np.float64) @ middles)


def _without_colour(mean_luma: Floats, chroma: Floats) -> npt.NDArray[np.bool_]:
    """Which frames have no colour; none if that is most of the pool."""
    grey = (chroma < _GREY_LEVELS) & (chroma < _GREY_SHARE * mean_luma)
    return grey if grey.sum() < len(grey) / 2 else np.zeros(len(grey), dtype=np.bool_)
