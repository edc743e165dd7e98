"""Which frames of a pool to learn from: a score for each frame (smaller is better), and the best `count` of them.

Three rules: `pooled` and `histogram` rank frames by how close they are to a reference, `random` is the control that any
rule has to beat. Equal scores are ordered by frame id, so a choice never depends on the order of the pool.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from nightseg.measures.frechet import Gaussian, gaussian_distance, gaussian_of_features
from nightseg.storage import UserError

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

_BLOCK_ROWS = 4096  # rows that are widened to float64 at a time


def pooled_scores(features: npt.ArrayLike, reference: Gaussian) -> Floats:
    """Squared Frechet distance of each row of (N, d) features, as a distribution without spread, to the reference.

    One pooled vector has no covariance, so the distance is |x - m|^2 + tr C: the reading of "FID of one frame" that the
    thesis can have meant. The trace is the same for all frames and does not change the ranking.
    """
    rows_ND = np.asarray(features)
    if rows_ND.ndim != 2 or rows_ND.shape[1] != len(reference.mean):
        raise ValueError(f"expected features of shape (N, {len(reference.mean)}), got {rows_ND.shape}")
    squares = np.empty(len(rows_ND))
    for start in range(0, len(rows_ND), _BLOCK_ROWS):
        shifts_BD = rows_ND[start : start + _BLOCK_ROWS].astype(np.float64) - reference.mean
        squares[start : start + _BLOCK_ROWS] = np.einsum("bd,bd->b", shifts_BD, shifts_BD)
    return squares + reference.trace


def histogram_scores(histograms: npt.ArrayLike, reference: npt.ArrayLike) -> Floats:
    """Wasserstein-1 distance of each luminance histogram (N, bins) to the reference (bins,), in [0, 1].

    0 is the same histogram, 1 is black against white. Unlike a difference bin by bin it knows that neighbouring bins
    are alike: a slightly brighter frame is slightly farther.
    """
    rows_NH = np.asarray(histograms, dtype=np.float64)
    reference_H = np.asarray(reference, dtype=np.float64)
    if rows_NH.ndim != 2 or reference_H.shape != rows_NH.shape[1:] or rows_NH.shape[1] < 2:
        raise ValueError(f"expected histograms (N, bins) and (bins,), got {rows_NH.shape} and {reference_H.shape}")
    gaps_NH = np.cumsum(rows_NH - reference_H, axis=1)[:, :-1]
    scores: Floats = np.abs(gaps_NH).sum(axis=1) / (rows_NH.shape[1] - 1)
    return scores


def random_scores(frame_ids: Sequence[str], seed: int) -> Floats:
    """A number in [0, 1) for each frame that follows from the seed and its id only.

    Taking frames out of the pool, or changing its order, leaves the order of the others as it was.
    """
    numbers = [int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:6]) for name in frame_ids]
    return np.array(numbers, dtype=np.float64) / 2.0**48


def choose(scores: npt.ArrayLike, frame_ids: Sequence[str], count: int) -> Indices:
    """Positions of the `count` frames with the smallest scores, best first; equal scores in order of frame id.

    Raises UserError if the pool has fewer frames, ValueError for scores that are not finite.
    """
    values = np.asarray(scores, dtype=np.float64)
    assert values.shape == (len(frame_ids),), (values.shape, len(frame_ids))
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {len(values)} scores are not finite")
    if count < 1:
        raise UserError(f"count is {count}, it must be 1 or more")
    if count > len(values):
        raise UserError(
            f"the pool has {len(values)} frames, {count} were asked for: lower `count`, add frames to the pool,"
            " or leave `select` out to learn from every frame"
        )
    order = sorted(range(len(values)), key=lambda i: (values[i], frame_ids[i]))
    return np.array(order[:count], dtype=np.int64)


def subset_distance(features: npt.ArrayLike, chosen: npt.ArrayLike, reference: Gaussian) -> float:
    """FID between the chosen rows (at least 2) of (N, d) features and the reference."""
    return gaussian_distance(gaussian_of_features(np.asarray(features)[np.asarray(chosen)]), reference)


def random_subset_distances(
    features: npt.ArrayLike, reference: Gaussian, count: int, *, draws: int, seed: int
) -> Iterator[float]:
    """FID of `draws` random subsets of `count` rows (at least 2), one after the other: what a choice has to beat."""
    rows_ND = np.asarray(features)
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        yield subset_distance(rows_ND, np.sort(generator.choice(len(rows_ND), count, replace=False)), reference)
