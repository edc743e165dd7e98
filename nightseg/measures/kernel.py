"""Kernel distances between sets of feature vectors: KID, which unlike FID is right on average for small sets.

    k(x, y) = (x . y / d + 1)^3          (Binkowski et al., 2018, arXiv 1801.01401, section 4)

N rows of one set, M of the other, d dimensions.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from nightseg.measures.limits import NO_LIMITS, Limits

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

SUBSETS: Final = 100
SUBSET_ROWS: Final = 1000
"""The draws that the paper and the common tools use: 100 pairs of 1,000 rows, fewer where a set has fewer."""


class KernelDistance(NamedTuple):
    """Unbiased squared maximum mean discrepancy: mean and standard deviation over the draws. May be below zero."""

    kid: float
    deviation: float


def kernel_distance(
    first: npt.ArrayLike, second: npt.ArrayLike, *, subsets: int = SUBSETS, rows: int = SUBSET_ROWS, seed: int = 0
) -> KernelDistance:
    """KID between two feature sets (N, d) and (M, d), each of at least 2 rows; draws follow from `seed`."""
    one_ND, two_MD = np.asarray(first), np.asarray(second)
    if one_ND.ndim != 2 or two_MD.ndim != 2 or one_ND.shape[1] != two_MD.shape[1]:
        raise ValueError(f"expected features of shapes (N, d) and (M, d), got {one_ND.shape} and {two_MD.shape}")
    rows = min(rows, len(one_ND), len(two_MD))
    if rows < 2:
        raise ValueError("a kernel distance needs at least 2 feature vectors of each set")
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(subsets):
        mine = one_ND[generator.choice(len(one_ND), rows, replace=False)].astype(np.float64)
        theirs = two_MD[generator.choice(len(two_MD), rows, replace=False)].astype(np.float64)
        drawn.append(_unbiased(mine, theirs))
    return KernelDistance(float(np.mean(drawn)), float(np.std(drawn)))


def _unbiased(one_ND: Floats, two_ND: Floats) -> float:
    """Pairs of a row with itself are left out: they are what biases the plain estimate."""
    count = len(one_ND)
    within = sum(
        (kernel.sum() - np.trace(kernel)) / (count * (count - 1))
        for kernel in (polynomial(one_ND, one_ND), polynomial(two_ND, two_ND))
    )
    return float(within - 2 * polynomial(one_ND, two_ND).mean())


def polynomial(one_ND: Floats, two_MD: Floats) -> Floats:
    """The cubic kernel between all rows: (N, M)."""
    kernel: Floats = (one_ND @ two_MD.T / one_ND.shape[1] + 1) ** 3
    return kernel


def gaussian(one_ND: Floats, two_MD: Floats, width: float) -> Floats:
    """exp(-|x - y|^2 / (2 width^2)) between all rows: (N, M)."""
    squares = (one_ND**2).sum(axis=1)[:, None] + (two_MD**2).sum(axis=1)[None, :] - 2 * one_ND @ two_MD.T
    kernel: Floats = np.exp(-np.maximum(squares, 0.0) / (2 * width**2))
    return kernel


def kernel_width(reference_MD: Floats) -> float:
    """Median distance between the rows of an even sample of (M, d); 1 if they are all the same."""
    sample = reference_MD[:: -(-len(reference_MD) // SUBSET_ROWS)]
    squares = (sample**2).sum(axis=1)
    apart = squares[:, None] + squares[None, :] - 2 * sample @ sample.T
    distances = np.sqrt(np.maximum(apart[np.triu_indices(len(sample), 1)], 0.0))
    return float(np.median(distances)) if distances.any() else 1.0


def herding_order(
    features: npt.ArrayLike, reference: npt.ArrayLike, count: int, limits: Limits = NO_LIMITS
) -> tuple[Indices, Floats]:
    """Rows of (N, d) features in the order in which they bring the mean of the chosen ones closest to the reference's.

    Kernel herding (Chen, Welling and Smola, 2010) with a Gaussian kernel, as wide as reference frames are apart (the
    cubic one of KID would favour long vectors): each pick is the row most like the reference
    (M, d) and least like what was picked. Returns (count,) rows, fewer where `limits` leave no more, and (N,) likeness
    to the reference, larger is nearer. Ties go to the earlier row.
    """
    pool_ND = np.asarray(features, dtype=np.float64)
    reference_MD = np.asarray(reference, dtype=np.float64)
    width = kernel_width(reference_MD)
    likeness_N = np.zeros(len(pool_ND))
    for start in range(0, len(reference_MD), SUBSET_ROWS):
        likeness_N += gaussian(pool_ND, reference_MD[start : start + SUBSET_ROWS], width).sum(axis=1)
    likeness_N /= len(reference_MD)
    crowding_N = np.zeros(len(pool_ND))
    free_N = np.zeros(len(pool_ND))  # -inf where taken
    picked: list[int] = []
    while len(picked) < count and np.isfinite(free_N).any():
        row = int((likeness_N - crowding_N / (len(picked) + 1) + free_N).argmax())
        picked.append(row)
        free_N[limits.closed_by(picked)] = -np.inf
        crowding_N += gaussian(pool_ND, pool_ND[row : row + 1], width)[:, 0]
    return np.array(picked, dtype=np.int64), likeness_N
