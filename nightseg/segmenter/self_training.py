"""Which pixels of a pseudo-label are kept, what no label can be, and the signs that a teacher has collapsed.

Thresholds are a function of per-class confidence histograms alone, so they can be recomputed from committed tables
without looking at a pixel. Confidence is the softmax probability of the chosen class, in [0, 1]; its bin is
floor(256 c), and class-balanced thresholds lie on bin edges, so a histogram tail counts exactly the pixels kept.

HW = height, width; K = number of classes; B = 256 bins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from nightseg.data import table as frame
from nightseg.data.images import BadFrame
from nightseg.data.labels import train_ids_of
from nightseg.data.stored_labels import NUM_BINS, Rules
from nightseg.data.taxonomy import Taxonomy
from nightseg.segmenter.settings import Threshold
from nightseg.storage import UserError

# Signs of a collapsed teacher. They warn, the user decides; only an empty result stops the stage.
DOMINANT_SHARE = 0.9
SMALL_KEPT_SHARE = 0.05
RARE_SHARE = 1e-4  # the rarest of the 19 Cityscapes classes has ten times as many pixels

NOTHING_KEPT = 2.0  # a threshold above every confidence
LEAST_JUDGED = 1000  # pixels of a class, before its precision says something

# Of a class's labelled pixels, that may break a rule of geometry: reflections, slips at borders.
BROKEN_SHARE = 1e-3

Labels = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]
Confidence = npt.NDArray[np.float32]


class KeptPixels(NamedTuple):
    """Pixels per class before and after the threshold, over all frames of a pseudo-labelled set."""

    predicted: Counts  # (K,)
    kept: Counts  # (K,)

    @property
    def share(self) -> float:
        """Kept share of all pixels, a fraction; 0 without a pixel."""
        total = int(self.predicted.sum())
        return int(self.kept.sum()) / total if total else 0.0

    @property
    def share_by_class(self) -> list[float | None]:
        """Kept share of each class's pixels, a fraction; None where the class was never predicted."""
        pairs = zip(self.kept.tolist(), self.predicted.tolist(), strict=True)
        return [kept / predicted if predicted else None for kept, predicted in pairs]


def confidence_bins(confidence_HW: Confidence) -> Labels:
    """Confidence in [0, 1] -> uint8 bin; 1.0 shares the last bin."""
    bins_HW: Labels = np.minimum(confidence_HW * np.float32(NUM_BINS), NUM_BINS - 1).astype(np.uint8)
    return bins_HW


def confidence_histogram(labels_HW: Labels, confidence_HW: Confidence, num_classes: int) -> Counts:
    """Pixels by class and confidence bin, int64 (K, B). Labels are train ids below `num_classes`."""
    index = labels_HW.astype(np.intp) * NUM_BINS + confidence_bins(confidence_HW)
    counts = np.bincount(index.reshape(-1), minlength=num_classes * NUM_BINS)
    assert counts.size == num_classes * NUM_BINS, "a label outside the taxonomy"
    return counts.reshape(num_classes, NUM_BINS).astype(np.int64)


def class_thresholds(threshold: Threshold, histograms_KB: Counts) -> npt.NDArray[np.float64]:
    """Least confidence kept for each class, float64 (K,) in [0, 1].

    `none` keeps every pixel, `fixed` those with at least `confidence`. `class_balanced` lowers the bar of each class
    to the largest bin edge that still keeps `share` of its pixels, but not below `floor`, and never raises it above
    `confidence` (class-balanced self-training, arXiv 1810.07911, with limits): hard classes are not starved by easy
    ones, and a class that is hardly ever right is not learned as it is. A class without a pixel gets the upper limit.
    """
    num_classes = histograms_KB.shape[0]
    match threshold.kind:
        case "none":
            return np.zeros(num_classes)
        case "fixed":
            return np.full(num_classes, threshold.confidence)
        case "class_balanced":
            limit = min(int(threshold.confidence * NUM_BINS), NUM_BINS - 1)
            least = math.ceil(threshold.floor * NUM_BINS - 1e-6)
            quantiles = [_share_bin(histogram_B, threshold.share) for histogram_B in histograms_KB]
            return np.array([min(limit, NUM_BINS - 1 if q is None else max(q, least)) / NUM_BINS for q in quantiles])


def _share_bin(histogram_B: Counts, share: float) -> int | None:
    """The largest bin such that the pixels in it and above are at least `share` of all; None without a pixel."""
    total = int(histogram_B.sum())
    if total == 0:
        return None
    needed = math.ceil(share * total - 1e-6)  # 0.7 * 10 must ask for 7 pixels, whatever the last bit says
    tail_B = np.cumsum(histogram_B[::-1])[::-1]  # pixels in bin b or above, falls with b
    return int(np.flatnonzero(tail_B >= needed)[-1])


def precise_thresholds(right_KB: Counts, all_KB: Counts, precision: float) -> npt.NDArray[np.float64]:
    """Smallest bin edge of each class, float64 (K,), such that at least `precision` of its pixels in that bin and above
    are right; above 1 where there is none, 0 for a class with fewer than LEAST_JUDGED pixels."""
    tails = [np.cumsum(counts_KB[:, ::-1], axis=1)[:, ::-1] for counts_KB in (right_KB, all_KB)]
    is_right_KB = (tails[0] >= precision * tails[1] - 1e-6) & (tails[1] > 0)
    edges_K = np.where(is_right_KB.any(axis=1), is_right_KB.argmax(axis=1) / NUM_BINS, NOTHING_KEPT)
    return np.where(tails[1][:, 0] >= LEAST_JUDGED, edges_K, 0.0)


def least_bins(thresholds_K: npt.NDArray[np.float64]) -> tuple[int, ...]:
    """The first bin of each class with nothing below its threshold; NUM_BINS: none of its pixels is kept. Of a
    confidence of 1 the last bin is kept, which has it."""
    kept_K = np.minimum(np.ceil(thresholds_K * NUM_BINS - 1e-6), NUM_BINS - 1)
    return tuple(np.where(thresholds_K > 1, NUM_BINS, kept_K).astype(int).tolist())


def kept_of_histograms(histograms_NKB: npt.NDArray[np.integer], bins: Sequence[int]) -> Counts:
    """Pixels of each frame and class in these bins and above, int64 (N, K)."""
    is_kept_KB = np.arange(NUM_BINS) >= np.array(bins)[:, None]
    kept_NK: Counts = np.einsum("nkb,kb->nk", histograms_NKB, is_kept_KB, dtype=np.int64, casting="unsafe")
    return kept_NK


# -- rules of geometry ------------------------------------------------------------------------------------------------


def rules_of(never_below: Mapping[str, Sequence[str]], classes: Taxonomy) -> Rules:
    ids = {name: index for index, name in enumerate(classes.classes)}
    return {ids[name]: tuple(ids[above] for above in others) for name, others in never_below.items()}


def impossible(labels_BHW: Tensor, rules: Rules) -> Tensor:
    """bool BHW: pixels of a class that have, above them in their column, one that it is never below."""
    found_BHW = torch.zeros(labels_BHW.shape, dtype=torch.bool, device=labels_BHW.device)
    for low, others in rules.items():
        is_above_BHW = torch.isin(labels_BHW, torch.tensor(others, device=labels_BHW.device, dtype=labels_BHW.dtype))
        found_BHW |= (labels_BHW == low) & (is_above_BHW.cumsum(dim=-2, dtype=torch.int32) > 0)
    return found_BHW


def check_never_below(
    never_below: Mapping[str, Sequence[str]], labelled: pa.Table, classes: Taxonomy, where: str
) -> None:
    """Refuse rules that labels break, on more than BROKEN_SHARE of a class's pixels. Every label file is read once.

    Raises UserError with the figures.
    """
    if not never_below:
        return
    rules = rules_of(never_below, classes)
    files = {(row[frame.LABEL_URI], row[frame.LABEL_ENCODING]): row for row in _label_rows(labelled)}

    def count(row: Mapping[str, object]) -> list[tuple[int, int]]:
        try:
            label_HW = train_ids_of(row, classes)
        except BadFrame:
            return []  # it was good when it was collected: reading the frames says what has happened to it
        if label_HW is None:
            return []
        label_1HW = torch.from_numpy(label_HW)[None]
        return [
            (int((label_1HW == low).sum()), int(impossible(label_1HW, {low: others}).sum()))
            for low, others in rules.items()
        ]

    with ThreadPoolExecutor(max_workers=2) as readers:
        counted = [counts for counts in readers.map(count, files.values()) if counts]
    for number, (name, others) in enumerate(never_below.items()):
        pixels, broken = (sum(counts[number][part] for counts in counted) for part in (0, 1))
        if broken > BROKEN_SHARE * pixels:
            raise UserError(
                f"{where}: self_training.never_below: in the labels {name} is below {_names(others, 'or')} in its "
                f"column: {broken:,} of its {pixels:,} pixels ({broken / pixels:.2%}), in "
                f"{sum(counts[number][1] > 0 for counts in counted)} of {len(counted)} labels",
                cure=f"take {name} out of never_below, or name only classes that it is really never below",
            )


def _label_rows(labelled: pa.Table) -> list[dict[str, object]]:
    columns = [frame.LABEL_URI, frame.LABEL_ENCODING, frame.LABEL_SHA256]
    return [row for row in labelled.select(columns).to_pylist() if row[frame.LABEL_URI] is not None]


# -- evidence ---------------------------------------------------------------------------------------------------------


def out_of_range(
    shares_K: npt.NDArray[np.float64], start_K: npt.NDArray[np.float64], allowed: tuple[float, float]
) -> npt.NDArray[np.bool_]:
    """Classes whose share has left the range around its start. One that is hardly ever predicted has none to lose, and
    may grow up to the range of the least share that counts."""
    is_lost_K = (start_K >= RARE_SHARE) & (shares_K < allowed[0] * start_K)
    has_swallowed_K: npt.NDArray[np.bool_] = shares_K > allowed[1] * np.maximum(start_K, RARE_SHARE)
    return is_lost_K | has_swallowed_K


def guard(pixels: KeptPixels, classes: Sequence[str]) -> list[str]:
    """Warnings about pseudo-labels that would teach the student to forget; empty when all is well.

    Raises UserError when no pixel at all is kept: there is nothing to learn from.
    """
    predicted, kept = pixels.predicted, pixels.kept
    if int(kept.sum()) == 0:
        raise UserError(
            f"self_training.threshold: the pseudo-labels keep none of {int(predicted.sum()):,} pixels, the teacher is "
            "nowhere as confident as the threshold asks",
            cure="lower `confidence`, or use `kind: class_balanced`",
        )
    warnings = []
    shares = kept / kept.sum()
    top = int(np.argmax(shares))
    if shares[top] > DOMINANT_SHARE:
        warnings.append(
            f"{classes[top]} takes {shares[top]:.1%} of the kept pixels: the student will learn little else; "
            "look at the teacher's predictions, or use `kind: class_balanced` with a lower `share`"
        )
    if pixels.share < SMALL_KEPT_SHARE:
        warnings.append(
            f"only {pixels.share:.2%} of the pixels are kept: the teacher is unsure of these frames; "
            "lower the threshold or select frames closer to what it knows"
        )
    rare = predicted < RARE_SHARE * predicted.sum()
    vanished = [name for name, is_rare, now in zip(classes, rare, kept, strict=True) if not is_rare and now == 0]
    if vanished:
        warnings.append(
            f"the threshold removes every pixel of {_names(vanished)}: the student sees no example in the new frames; "
            "`kind: class_balanced` keeps a share of every class"
        )
    unseen = [name for name, is_rare in zip(classes, rare, strict=True) if is_rare]
    if unseen:
        warnings.append(
            f"the teacher hardly ever predicts {_names(unseen)} on these frames (less than {RARE_SHARE:.2%} of the "
            "pixels): it may have lost what it knew of them, and the student will not learn it here"
        )
    return warnings


def _names(names: Sequence[str], word: str = "and") -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"
