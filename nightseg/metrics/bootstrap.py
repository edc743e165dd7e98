"""How far mIoU would move with other frames: a seeded bootstrap over frames, or over drives where these are known.

N frames (or drives), K classes, D draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

DRAWS: Final = 1000
LEVEL: Final = 0.95
_TIMES_AT_ONCE: Final = 1 << 22  # how often each frame is drawn, for so many frames and draws together: 64 MB

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Interval(NamedTuple):
    """The middle LEVEL of what draws gave (percentile method, Efron and Tibshirani, 1993, section 13)."""

    low: float
    high: float


class FrameSpread(NamedTuple):
    """A 95 % interval of mIoU or of a difference, fractions; `units` things of the kind `of` were drawn."""

    interval: Interval
    units: int
    of: Literal["frame", "drive"]


def drawn_miou(counts_NKC: Counts, absent_class: str = "cityscapes", *, draws: int = DRAWS, seed: int = 0) -> Floats:
    """(D,) mIoU of N frames drawn with replacement, from the confusion matrix of each frame, K x K or K x (K + 1).

    The same N and seed draw the same frames, so draws of two models on the same frames are pairs. A draw has the value
    of `metrics.confusion.scores` of the sum of its matrices; NaN where no class is defined. Sums of whole numbers below
    2^53 are exact in float64, so the result depends on no library or thread count.
    """
    num_frames, num_classes = counts_NKC.shape[:2]
    square_NKK = counts_NKC[:, :, :num_classes]
    parts = (np.diagonal(square_NKK, axis1=1, axis2=2), counts_NKC.sum(axis=2), square_NKK.sum(axis=1))
    parts_N3K = np.concatenate(parts, axis=1).astype(np.float64)
    rng, share_N = np.random.default_rng(seed), np.full(num_frames, 1 / num_frames)
    step = max(1, _TIMES_AT_ONCE // num_frames)
    sums_D3K = np.concatenate(
        [
            rng.multinomial(num_frames, share_N, size=min(step, draws - first)).astype(np.float64) @ parts_N3K
            for first in range(0, draws, step)
        ]
    )
    hits_DK, labelled_DK, predicted_DK = np.split(sums_D3K, 3, axis=1)
    union_DK = labelled_DK + predicted_DK - hits_DK
    defined_DK = union_DK > 0 if absent_class == "cityscapes" else labelled_DK > 0
    iou_DK = np.divide(hits_DK, union_DK, out=np.zeros_like(hits_DK), where=defined_DK)
    num_D = defined_DK.sum(axis=1)
    miou_D: Floats = np.divide(iou_DK.sum(axis=1), num_D, out=np.full(draws, np.nan), where=num_D > 0)
    return miou_D


def interval(values: Floats) -> Interval:
    """Of values that draws gave; those without a value are left out."""
    known = values[~np.isnan(values)]
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(known) else (np.nan, np.nan)
    return Interval(float(low), float(high))


def summed_by(groups: Sequence[str], counts_NKC: Counts) -> Counts:
    """The matrices of each group of frames, added up; groups in the order of their names."""
    names, place_N = np.unique(np.asarray(groups), return_inverse=True)
    total = np.zeros((len(names), *counts_NKC.shape[1:]), dtype=np.int64)
    np.add.at(total, place_N, counts_NKC)
    return total
