"""Counting pixels: the confusion matrix of predicted against true classes, and the four scores made from it.

Rows are labels, columns are predictions, entries are pixels (int64). Matrices add up: those of frames, shards and
workers give exactly the matrix of the whole set, and all scores are computed once, from the sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

IGNORE = 255
ABSENT_CLASS_RULES = ("cityscapes", "detectron2")

MOST_CHANGES = 1 / 8  # of the pixels, up to which counting by runs is the faster way

Bytes = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]


class Scores(NamedTuple):
    """Fractions in [0, 1]; NaN where nothing defines them (no valid pixel, a class that occurs nowhere)."""

    pa: float  # pixel accuracy
    ca: float  # class accuracy: mean over the classes that occur in the labels
    miou: float
    fwiou: float  # IoU weighted by how often each class occurs in the labels
    iou: tuple[float, ...]  # K values


def confusion_matrix(label: npt.ArrayLike, prediction: npt.ArrayLike, num_classes: int) -> Counts:
    """Pixels by label (row) and prediction (column), int64 (K, K). Pixels with label 255 are left out.

    `label` and `prediction` are integer arrays of the same shape. A prediction that is no class (255, or any value from
    K on) at a labelled pixel is an error of that pixel, as in cityscapesScripts: if there are any, the matrix has one
    more column, (K, K + 1), that holds them; `scores` and `add_up` take both forms.

    Raises ValueError: shapes differ, values are not integers, or a label is neither a class nor 255.
    """
    labels, predictions = byte_maps(label, prediction, num_classes)
    return matrix_of_pairs(pair_counts(labels, predictions), num_classes)


def pair_counts(first: Bytes, second: Bytes) -> Counts:
    """How often each pair of values occurs in two uint8 arrays of the same shape: int64 (256, 256), first by second.

    Where both stay the same along a row, a whole run of pixels is counted at once; noise is counted pixel by pixel.
    """
    before, after = first.ravel(), second.ravel()
    changes = before[1:] != before[:-1]
    changes |= after[1:] != after[:-1]
    if before.size == 0 or np.count_nonzero(changes) > before.size * MOST_CHANGES:
        # One 16-bit code a pixel and one bincount over all of them: no mask, no 64-bit copies.
        counts = np.bincount(before.astype(np.uint16) << 8 | after, minlength=1 << 16)
    else:
        last = np.append(np.flatnonzero(changes), before.size - 1)
        codes = before[last].astype(np.uint16) << 8 | after[last]
        # Sums of whole numbers below 2^53 are exact in float64.
        counts = np.bincount(codes, weights=np.diff(last, prepend=-1), minlength=1 << 16)
    return counts.astype(np.int64).reshape(256, 256)


def matrix_of_pairs(counts: Counts, num_classes: int) -> Counts:
    """The matrix of `confusion_matrix` from counts of (label, prediction) pairs, int64 (256, 256), of train ids.

    Raises ValueError: a label is neither a class nor 255.
    """
    unknown = counts[num_classes:IGNORE].sum(axis=1)
    if unknown.any():
        first = num_classes + int(unknown.argmax())
        raise ValueError(f"label {first} at {int(unknown.max())} pixels: labels are 0 to {num_classes - 1}, or 255")
    matrix = counts[:num_classes, :num_classes]
    outside = counts[:num_classes, num_classes:].sum(axis=1)
    return np.column_stack([matrix, outside]) if outside.any() else matrix.copy()


def byte_maps(label: npt.ArrayLike, prediction: npt.ArrayLike, num_classes: int) -> tuple[Bytes, Bytes]:
    """Both as uint8 of one shape; a prediction that is no byte becomes 255. Raises ValueError as `confusion_matrix`."""
    labels, predictions = _as_bytes(label, "label"), _as_bytes(prediction, "prediction")
    if labels.shape != predictions.shape:
        raise ValueError(f"label and prediction differ in size: {labels.shape} and {predictions.shape}")
    if not 1 <= num_classes <= IGNORE:
        raise ValueError(f"num_classes must lie in 1 to {IGNORE}, got {num_classes}")
    return labels, predictions


def add_up(matrices: Iterable[npt.ArrayLike], num_classes: int) -> Counts:
    """The matrix of all frames: (K, K), or (K, K + 1) if any of them has the column of pixels without a class."""
    total = np.zeros((num_classes, num_classes + 1), dtype=np.int64)
    for matrix in matrices:
        counts = _checked(matrix)
        total[:, : counts.shape[1]] += counts
    return total if total[:, -1].any() else total[:, :-1].copy()


def scores(matrix: npt.ArrayLike, absent_class: Literal["cityscapes", "detectron2"] = "cityscapes") -> Scores:
    """PA, CA, mIoU, FWIoU and the IoU of each class, from a matrix of `confusion_matrix` or `add_up`.

    The rule decides about a class that no label has but some prediction has. "cityscapes" (cityscapesScripts): its IoU
    is 0 and counts in the mean. "detectron2" (SemSegEvaluator): it has no IoU and the mean leaves it out. A class that
    occurs neither in labels nor in predictions has no IoU under both. PA, CA and FWIoU are the same under both.
    """
    if absent_class not in ABSENT_CLASS_RULES:
        raise ValueError(f"unknown rule {absent_class!r} for absent classes; known: {', '.join(ABSENT_CLASS_RULES)}")
    counts = _checked(matrix)
    num_classes = len(counts)
    hits = np.diagonal(counts).astype(np.float64)
    labelled = counts.sum(axis=1).astype(np.float64)
    union = labelled + counts[:, :num_classes].sum(axis=0) - hits
    present = labelled > 0
    defined = union > 0 if absent_class == "cityscapes" else present
    iou = np.divide(hits, union, out=np.full(num_classes, np.nan), where=defined)
    if not present.any():
        nothing = float("nan")
        return Scores(nothing, nothing, nothing, nothing, tuple(iou.tolist()))
    return Scores(
        pa=float(hits.sum() / labelled.sum()),
        ca=float((hits[present] / labelled[present]).mean()),
        miou=float(iou[defined].mean()),
        fwiou=float((iou[present] * labelled[present]).sum() / labelled.sum()),
        iou=tuple(iou.tolist()),
    )


def _as_bytes(values: npt.ArrayLike, what: str) -> Bytes:
    array = np.asarray(values)
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind not in "iub":
        raise ValueError(f"a {what} holds class numbers, that is integers, not {array.dtype}")
    if what == "label" and array.size and not 0 <= int(array.min()) <= int(array.max()) <= IGNORE:
        raise ValueError(f"labels lie in 0 to 255, got {int(array.min())} to {int(array.max())}")
    # -1 and 300 are as little a class as 255 is.
    return np.where((array < 0) | (array > IGNORE), IGNORE, array).astype(np.uint8)


def _checked(matrix: npt.ArrayLike) -> Counts:
    counts = np.asarray(matrix)
    if counts.ndim != 2 or counts.shape[1] not in (len(counts), len(counts) + 1) or counts.dtype.kind not in "iu":
        raise ValueError(f"expected an integer matrix (K, K) or (K, K + 1), got {counts.dtype} {counts.shape}")
    return counts.astype(np.int64)
