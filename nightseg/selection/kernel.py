"""Kernel distances between sets of feature vectors: KID, which unlike FID is right on average for small sets.

    k(x, y) = (x . y / d + 1)^3          (Binkowski et al., 2018, arXiv 1801.01401, section 4)

N rows of one set, M of the other, d dimensions.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from nightseg.selection.limits import NO_LIMITS, Limits

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

SUBSETS: Final = 100
SUBSET_ROWS: Final = 1000
"""The draws that the paper and the common tools use: 100 pairs of 1,000 rows, fewer where a set has fewer."""


_BLOCK_ROWS = 256


class KernelDistance(NamedTuple):
    """Unbiased squared maximum mean discrepancy: mean and standard deviation over the draws. May be below zero."""

    kid: float
    deviation: float


def kernel_distance(
    first: npt.ArrayLike, second: npt.ArrayLike, *, subsets: int = SUBSETS, rows: int = SUBSET_ROWS, seed: int = 0
) -> KernelDistance:
    """KID between two feature sets (N, d) and (M, d), each of at least 2 rows; draws follow from `seed`.

    Sets of up to `rows` are taken whole, once; their draws, of half as many rows, only say how far KID would spread.
    """
    one_ND, two_MD = np.asarray(first), np.asarray(second)
    if one_ND.ndim != 2 or two_MD.ndim != 2 or one_ND.shape[1] != two_MD.shape[1]:
        raise ValueError(f"expected features of shapes (N, d) and (M, d), got {one_ND.shape} and {two_MD.shape}")
    smaller = min(len(one_ND), len(two_MD))
    if smaller < 2:
        raise ValueError("a kernel distance needs at least 2 feature vectors of each set")
    whole = max(len(one_ND), len(two_MD)) <= rows
    size = max(2, smaller // 2) if whole else min(rows, smaller)
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(subsets):
        mine = one_ND[generator.choice(len(one_ND), size, replace=False)].astype(np.float64)
        theirs = two_MD[generator.choice(len(two_MD), size, replace=False)].astype(np.float64)
        drawn.append(_unbiased(mine, theirs))
    deviation = float(np.std(drawn))
    if not whole:
        return KernelDistance(float(np.mean(drawn)), deviation)
    # A draw of half a set without replacement spreads about as much as independent sets of the whole size do.
    return KernelDistance(_unbiased(one_ND.astype(np.float64), two_MD.astype(np.float64)), deviation)


def _unbiased(one_ND: Floats, two_ND: Floats) -> float:
    """Pairs of a row with itself are left out: they are what biases the plain estimate."""
    within = sum(
        (kernel.sum() - np.trace(kernel)) / (len(kernel) * (len(kernel) - 1))
        for kernel in (polynomial(one_ND, one_ND), polynomial(two_ND, two_ND))
    )
    return float(within - 2 * polynomial(one_ND, two_ND).mean())


def polynomial(one_ND: Floats, two_MD: Floats) -> Floats:
    """The cubic kernel between all rows: (N, M)."""
    kernel: Floats = (one_ND @ two_MD.T / one_ND.shape[1] + 1) ** 3
    return kernel


class _Likeness:
    """exp(-|x - y|^2 / (2 width^2)) of the rows of one set to others; squares of the rows are computed once."""

    def __init__(self, rows_ND: Floats, width: float) -> None:
        self.rows_ND = rows_ND
        self.squares_N = np.einsum("nd,nd->n", rows_ND, rows_ND)
        self.width = width

    def to(self, others_MD: Floats) -> Floats:
        """(N, M)."""
        apart_NM = self.rows_ND @ others_MD.T
        apart_NM *= -2
        apart_NM += self.squares_N[:, None] + np.einsum("md,md->m", others_MD, others_MD)[None, :]
        return np.asarray(np.exp(-np.maximum(apart_NM, 0.0) / (2 * self.width**2)))


def kernel_width(reference_MD: Floats, pool_ND: Floats) -> float:
    """Median distance between different rows of an even sample of the reference, of the pool if it has none; else 1."""
    for rows in (reference_MD, pool_ND):
        sample = rows[:: -(-len(rows) // SUBSET_ROWS)]
        squares = np.einsum("md,md->m", sample, sample)
        apart = (squares[:, None] + squares[None, :] - 2 * sample @ sample.T)[np.triu_indices(len(sample), 1)]
        apart = apart[apart > 1e-9 * squares.max(initial=0.0)]  # what rounding leaves of equal rows is no distance
        if len(apart):
            return float(np.sqrt(np.median(apart)))
    return 1.0


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
    pool = _Likeness(pool_ND, kernel_width(reference_MD, pool_ND))
    likeness_N = np.zeros(len(pool_ND))
    for start in range(0, len(reference_MD), _BLOCK_ROWS):
        likeness_N += pool.to(reference_MD[start : start + _BLOCK_ROWS]).sum(axis=1)
    likeness_N /= len(reference_MD)
    crowding_N = np.zeros(len(pool_ND))
    free_N = np.ones(len(pool_ND), dtype=bool)
    picked: list[int] = []
    while len(picked) < count and free_N.any():
        row = int(np.where(free_N, likeness_N - crowding_N / (len(picked) + 1), -np.inf).argmax())
        picked.append(row)
        free_N[limits.closed_by(picked)] = False
        crowding_N += pool.to(pool_ND[row : row + 1])[:, 0]
    return np.array(picked, dtype=np.int64), likeness_N
