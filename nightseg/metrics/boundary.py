"""Boundary IoU: how well the contours of classes fit, where plain IoU looks at areas (Cheng et al., arXiv 2103.16562).

The band of a class holds its pixels that are at most d from a pixel which is not of the class, or from the outside of
the image; d is a share of the image's diagonal. Boundary IoU is the IoU of two bands: pixels in the band of both label
and prediction, over pixels in the band of either (their equation 2). "At most d" is meant in both directions
separately (Chebyshev distance), as their reference code has it, which erodes d times by 3 x 3 pixels.

What the paper leaves open for whole label maps is settled so that a perfect prediction scores 1: pixels with label 255
count nowhere, and are the outside of the image for label and prediction alike. Counts are those of whole frames and
add up over a data set; the score is computed once, from the sum, as for plain IoU.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from nightseg.metrics.confusion import ABSENT_CLASS_RULES, IGNORE, Bytes, Counts, byte_maps

DISTANCE = 0.02  # of the diagonal: the paper's value; it uses less for finer labels

Flags = npt.NDArray[np.bool_]


class BoundaryScores(NamedTuple):
    """Fractions in [0, 1]; NaN where nothing defines them."""

    miou: float
    iou: tuple[float, ...]  # K values


def boundary_counts(
    label: npt.ArrayLike, prediction: npt.ArrayLike, num_classes: int, distance: float = DISTANCE
) -> Counts:
    """int64 (K, 3): a class's pixels in the label's band, in the prediction's band, and in both. Additive over frames.

    `label` and `prediction` are integer arrays of one shape (H, W): train ids, and 255 for what has none. The band is
    `distance` times the diagonal wide, rounded, at least one pixel.

    Raises ValueError: shapes differ or are not (H, W), values are not integers, a label is neither a class nor 255.
    """
    labels, predictions = byte_maps(label, prediction, num_classes)
    if labels.ndim != 2:
        raise ValueError(f"a boundary needs label maps of shape (height, width), got {labels.shape}")
    if not 0 < distance < 1:
        raise ValueError(f"the distance is a share of the diagonal, between 0 and 1, got {distance}")
    ignored = labels == IGNORE
    unknown = labels[(labels >= num_classes) & ~ignored]
    if unknown.size:
        raise ValueError(f"label {int(unknown[0])}: labels are 0 to {num_classes - 1}, or 255")
    reach = max(1, round(distance * math.hypot(*labels.shape)))
    predictions = np.where(ignored, np.uint8(IGNORE), predictions)
    of_label, of_prediction = band(labels, reach), band(predictions, reach)
    both = of_label & of_prediction & (labels == predictions)
    parts = (labels[of_label], predictions[of_prediction], labels[both])
    return np.stack([np.bincount(part, minlength=256)[:num_classes] for part in parts], axis=1).astype(np.int64)


def boundary_scores(
    counts: npt.ArrayLike, absent_class: Literal["cityscapes", "detectron2"] = "cityscapes"
) -> BoundaryScores:
    """Boundary IoU of each class and their mean, from a (K, 3) sum of `boundary_counts`; rules as in `scores`."""
    if absent_class not in ABSENT_CLASS_RULES:
        raise ValueError(f"unknown rule {absent_class!r} for absent classes; known: {', '.join(ABSENT_CLASS_RULES)}")
    table = np.asarray(counts)
    if table.ndim != 2 or table.shape[1] != 3 or table.dtype.kind not in "iu":
        raise ValueError(f"expected integer counts (K, 3), got {table.dtype} {table.shape}")
    of_label, of_prediction, both = table.astype(np.float64).T
    union = of_label + of_prediction - both
    # A class that some label has is somewhere next to another or to the outside: its band is not empty.
    defined = union > 0 if absent_class == "cityscapes" else of_label > 0
    iou = np.divide(both, union, out=np.full(len(table), np.nan), where=defined)
    return BoundaryScores(float(iou[defined].mean()) if (of_label > 0).any() else math.nan, tuple(iou.tolist()))


def band(values_HW: Bytes, reach: int) -> Flags:
    """(H, W), True where a pixel of another value, or the outside, is at most `reach` >= 1 pixels away (Chebyshev).

    All values at once: a window holds one value exactly if none of its rows changes and its middle column does not.
    """
    height, width = values_HW.shape
    found = np.ones((height, width), dtype=np.bool_)
    if min(height, width) > 2 * reach:
        across, down = values_HW[:, 1:] != values_HW[:, :-1], values_HW[1:] != values_HW[:-1]
        rows = _any_in_window(across, 2 * reach, axis=1)
        inner = _any_in_window(rows, 2 * reach + 1, axis=0)
        inner |= _any_in_window(down[:, reach : width - reach], 2 * reach, axis=0)
        found[reach : height - reach, reach : width - reach] = inner
    return found


def _any_in_window(flags: Flags, count: int, axis: int) -> Flags:
    """Whether any of `count` flags from each place on is set, for the places that have so many; log2(count) passes."""
    along = flags.swapaxes(0, axis)
    length = 1
    while 2 * length <= count:
        along = along[:-length] | along[length:]
        length *= 2
    rest = count - length
    if rest:
        along = along[:-rest] | along[rest:]
    return along.swapaxes(0, axis)
