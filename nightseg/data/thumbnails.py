"""Frames as 8 x 8 means of their green: near duplicates, such as a frame saved again in another format or size."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

SIDE: Final = 8
NUM_VALUES: Final = SIDE * SIDE
# Saving a frame again moves the mean of a block by less than a level, scaling it by one or two; frames of one drive
# that are a second apart differ by ten and more somewhere.
_TOLERANCE: Final = 3
_LEAST_CONTRAST: Final = 16  # levels; flat frames, as by a lens cap, all look alike
_SAMPLES: Final = 144  # rows and columns that are looked at, at least


def thumbnail(image_HWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """uint8 (64,): mean green of the blocks of a uint8 HWC RGB image of any size, in rows from the top left."""
    step = max(1, min(image_HWC.shape[:2]) // _SAMPLES)
    sums = image_HWC[::step, ::step, 1].astype(np.int64)
    count: npt.NDArray[np.int64] = np.array(1)
    for axis, length in enumerate(sums.shape):
        edges = np.arange(SIDE) * length // SIDE
        sizes = np.maximum(np.diff([*edges, length]), 1)
        sums = np.add.reduceat(sums, edges, axis=axis)
        count = count * (sizes[:, None] if axis == 0 else sizes)
    return np.asarray((sums + count // 2) // count, np.uint8).reshape(-1)


def num_near(seen_NK: npt.NDArray[np.uint8], asked_MK: npt.NDArray[np.uint8]) -> int:
    """How many of M thumbnails have a near duplicate among N others."""
    seen_NK = seen_NK[np.ptp(seen_NK, axis=1) >= _LEAST_CONTRAST].astype(np.int16) if len(seen_NK) else seen_NK
    means = seen_NK.mean(axis=1) if len(seen_NK) else np.empty(0)
    order = np.argsort(means)
    seen_NK, means = seen_NK[order], means[order]
    count = 0
    for one_K in asked_MK.astype(np.int16):
        # means of all blocks together move less than those of one
        first, last = np.searchsorted(means, [one_K.mean() - 1, one_K.mean() + 1])
        near = np.abs(seen_NK[first:last] - one_K) <= _TOLERANCE
        count += bool(np.ptp(one_K) >= _LEAST_CONTRAST and near.all(axis=1).any())
    return count
