"""The colours of one frame given to another: by mean and deviation, or by the whole histogram. No training."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nightseg.translators.srgb import from_oklab, to_oklab

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def reinhard(image_HW3: Pixels, lender_HW3: Pixels) -> Pixels:
    """Each axis of Oklab shifted and scaled to the lender's mean and deviation (Reinhard et al., 2001, eq. 10, 11).

    The paper's axes are logarithmic; see `to_oklab` why these are not. The lender may have any size.
    """
    return from_oklab(match_moments(to_oklab(image_HW3), to_oklab(lender_HW3)))


def match_moments(values_HWC: Floats, lender_HWC: Floats) -> Floats:
    """Values with the lender's mean and standard deviation in every channel; a channel without spread keeps none."""
    mean, deviation = _moments(values_HWC)
    goal_mean, goal_deviation = _moments(lender_HWC)
    scale = np.divide(goal_deviation, deviation, out=np.zeros_like(deviation), where=deviation > 1e-9)
    moved: Floats = ((values_HWC - mean) * scale + goal_mean).astype(np.float32)
    return moved


def match_histograms(image_HW3: Pixels, lender_HW3: Pixels) -> Pixels:
    """Every band moved by a monotone map of its values that brings it as close to the lender's histogram as one can.

    A value goes to where the middle of its own ranks lies among the lender's: a sky of pure white over a third of the
    frame takes a tone from the upper third of the night, not that of its brightest lamp. Ranks are compared as
    integers, so a lender that is the image with its pixels in another order changes nothing.
    """
    made = np.empty_like(image_HW3)
    for band in range(image_HW3.shape[2]):
        mine, theirs = (np.bincount(frame[..., band].reshape(-1), minlength=256) for frame in (image_HW3, lender_HW3))
        middle = (2 * np.cumsum(mine) - mine) * theirs.sum()
        goal = 2 * np.cumsum(theirs) * mine.sum()
        curve = np.searchsorted(goal, middle, side="right").clip(0, 255).astype(np.uint8)
        made[..., band] = curve[image_HW3[..., band]]
    return made


def _moments(values_HWC: Floats) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    flat = values_HWC.reshape(-1, values_HWC.shape[-1])
    return flat.mean(axis=0, dtype=np.float64), flat.std(axis=0, dtype=np.float64)
