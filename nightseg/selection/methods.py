"""The methods by which frames of a pool are chosen, behind one function.

A method of `settings.METHODS` is the function of its name below. It is given a `Request` and returns either a score for
each frame of the pool, smaller is better, or a `Choice` if it looks at more than single frames.

N frames of the pool, M of the reference, d feature dimensions, H bins of a histogram.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nightseg.data import table as frame
from nightseg.data.table import vectors
from nightseg.errors import UserError
from nightseg.selection.frechet import FEATURES, Gaussian, gaussian_of_features
from nightseg.selection.limits import NO_LIMITS, Limits
from nightseg.selection.rows import Rows, StoredRows, as_rows, blocks, parts_of, taken
from nightseg.selection.settings import Selection
from nightseg.selection.subset import Subset, ranking, select_subset
from nightseg.storage import Commit

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

# Columns of the table that the stage `score` writes, beside FEATURES.
HISTOGRAM: Final = "histogram"  # float32 (64,), luminance of the whole frame, sums to 1
SPATIAL: Final = "spatial"  # float64, squared Frechet distance of the frame's positions to those of a reference
SPATIAL_ERROR: Final = "spatial_error"  # float64, by how much that can be too large

_WIDTH_ROWS: Final = 1000  # from which the width of the kernel is found


class Described(NamedTuple):
    """A set of frames as the extractor sees it."""

    frame_ids: list[str]
    features: Rows  # float32 (N, d)
    histograms: npt.NDArray[np.float32]  # (N, 64)
    spatial: Floats | None = None
    spatial_error: Floats | None = None

    @classmethod
    def of(cls, scored: Commit) -> Described:
        """What the stage `score` committed. Raises UserError if no frame could be read."""
        if scored.rows_out == 0:
            bad = [row[frame.REASON] for row in scored.table("quarantine").to_pylist()[:3]]
            raise UserError(
                f"{scored.name}: none of its {scored.rows_in} frames could be read: {', '.join(bad)}",
                cure="mend the files, or name another dataset",
            )
        features, others, start = StoredRows((scored.rows_out, scored.summary["dims"]), np.float32), list[pa.Table](), 0
        for part in filter(len, scored.parts(FEATURES)):
            features[start : start + len(part)] = vectors(part[FEATURES])
            others.append(part.drop_columns(FEATURES))
            start += len(part)
        table = pa.concat_tables(others)
        return cls(
            table[frame.FRAME_ID].to_pylist(),
            features,
            vectors(table[HISTOGRAM]),
            *(table[name].to_numpy() if name in table.column_names else None for name in (SPATIAL, SPATIAL_ERROR)),
        )

    def rows(self, rows: Indices) -> Described:
        """Some of the frames, in the order of the table; itself where these are all."""
        if len(rows) == len(self.frame_ids):
            return self
        spatial, error = (None if values is None else values[rows] for values in (self.spatial, self.spatial_error))
        frame_ids, features = [self.frame_ids[row] for row in rows], taken(self.features, rows)
        return Described(frame_ids, features, self.histograms[rows], spatial, error)


class Reference(NamedTuple):
    """What chosen frames should be close to."""

    described: Described
    gaussian: Gaussian | None  # None for a single frame, which has no covariance

    @classmethod
    def of(cls, described: Described) -> Reference:
        return cls(described, gaussian_of_features(described.features) if len(described.frame_ids) > 1 else None)


class Choice(NamedTuple):
    """Rows of a pool, and a number for each that says why."""

    scores: Floats  # (N,) smaller is better
    chosen: Indices  # (count,) best first
    subset: Subset | None = None  # the certificate, of `fid-subset` only

    def order(self) -> Indices:
        """Every row: the chosen ones, then the others by their score."""
        by_score = np.argsort(self.scores, kind="stable")
        return np.concatenate([self.chosen, by_score[~np.isin(by_score, self.chosen)]])


class Request(NamedTuple):
    """What a method is given."""

    selection: Selection
    pool: Described
    near: Reference | None
    limits: Limits
    seed: int
    watch: Callable[[float, float], None] = lambda fid, lower_bound: None

    @property
    def reference(self) -> Described:
        assert self.near is not None  # `choose` has refused methods that need one
        return self.near.described

    @property
    def gaussian(self) -> Gaussian:
        """The normal distribution of the reference's features; raises UserError for a reference of one frame."""
        assert self.near is not None
        if self.near.gaussian is None:
            raise UserError(
                f"reference: selection by {self.selection.method} needs at least 2 frames, it has"
                f" {len(self.reference.frame_ids)}",
                cure="name a larger dataset",
            )
        return self.near.gaussian


def choose(request: Request) -> Choice:
    """The frames of the pool that the method of the selection prefers under the limits.

    Raises UserError: no reference for a method that needs one, too few frames in it, or in the pool under its limits.
    """
    selection, pool, limits = request.selection, request.pool, request.limits
    if request.near is None and selection.needs_reference:
        raise UserError(
            f"reference: selection by {selection.method} needs a reference to be close to",
            cure="set `reference` to a dataset, or train on a translated dataset, which is the reference by default",
        )
    limits.check(selection.count)
    found: Floats | Choice = globals()[selection.method.replace("-", "_")](request)
    if isinstance(found, Choice):
        return found
    return Choice(found, limits.filled(ranking(found, pool.frame_ids), selection.count))


# -- the methods of settings.METHODS -----------------------------------------------------------------------------------


def fid_subset(request: Request) -> Choice:
    target, count = request.gaussian, request.selection.count
    cov_DD = target.factor @ target.factor.T
    subset = select_subset(
        request.pool.features, target.mean, cov_DD, count, limits=request.limits, watch=request.watch
    )
    return Choice(subset.influence, subset.indices, subset)


def pooled(request: Request) -> Floats:
    return pooled_scores(request.pool.features, request.gaussian)


def spatial(request: Request) -> Floats:
    assert request.pool.spatial is not None, "the stage that scores the pool leaves these"
    return request.pool.spatial


def mahalanobis(request: Request) -> Floats:
    return mahalanobis_scores(request.pool.features, request.gaussian, len(request.reference.frame_ids))


def histogram(request: Request) -> Floats:
    return histogram_scores(request.pool.histograms, mean_histogram(request.reference))


def herding(request: Request) -> Choice:
    pool, limits, count = request.pool, request.limits, request.selection.count
    assert request.gaussian  # refuses a single frame
    picked, likeness = herding_order(pool.features, request.reference.features, count, limits)
    rest = ranking(-likeness, pool.frame_ids)
    return Choice(-likeness, limits.filled(np.concatenate([picked, rest[~np.isin(rest, picked)]]), count))


def random(request: Request) -> Floats:
    return random_scores(request.pool.frame_ids, request.seed)


# -- scores of single frames -------------------------------------------------------------------------------------------


def every_score(pool: Described, chosen: Indices, reference: Reference | None) -> dict[str, Floats]:
    """The columns of scores.parquet that a selection by any method has, as far as this reference allows them.

    They are for comparing methods; a new one needs none, its own score is the column `score`. `influence` is that on
    the chosen set.
    """
    if reference is None or reference.gaussian is None:
        return {}
    target = reference.gaussian
    found = {
        "pooled": pooled_scores(pool.features, target),
        "histogram": histogram_scores(pool.histograms, mean_histogram(reference.described)),
    }
    if target.trace > 0:  # frames that are all alike have no spread to measure by
        found["mahalanobis"] = mahalanobis_scores(pool.features, target, len(reference.described.frame_ids))
        if len(chosen) > 1:
            current = gaussian_of_features(pool.features[chosen])
            found["influence"] = influence_scores(pool.features, current, target)
    measured = {SPATIAL: pool.spatial, SPATIAL_ERROR: pool.spatial_error}
    return found | {name: values for name, values in measured.items() if values is not None}


def mean_histogram(reference: Described) -> Floats:
    middle: Floats = reference.histograms.mean(axis=0, dtype=np.float64)
    return middle


def pooled_scores(features: npt.ArrayLike | StoredRows, reference: Gaussian) -> Floats:
    """Squared Frechet distance of each row of (N, d) features, as a distribution without spread, to the reference.

    The reading of "FID of one frame" that the thesis can have meant. The trace is the same for all frames and does not
    change the ranking.
    """
    squares = [np.einsum("bd,bd->b", block, block) for block in _centred(features, reference.mean)]
    return np.concatenate([*squares, np.empty(0)]) + reference.trace


def mahalanobis_scores(features: npt.ArrayLike | StoredRows, reference: Gaussian, reference_count: int) -> Floats:
    """Squared Mahalanobis distance of each row of (N, d) features to the reference, its covariance shrunk.

    The covariance of few frames is singular. It is moved towards a multiple of the identity by the share that the
    oracle approximating estimator finds best for `reference_count` samples (Chen et al., 2010, arXiv 0907.4698).
    """
    import torch

    dims = len(reference.mean)
    cov_DD = torch.from_numpy(reference.factor @ reference.factor.T)
    share = shrinkage(reference, reference_count)
    cov_DD.mul_(1 - share).diagonal().add_(share * reference.trace / dims)
    if reference.trace == 0.0:
        raise UserError(
            "method mahalanobis: all frames of the reference are the same, and without a spread there is no distance",
            cure="name a larger dataset, or another method",
        )
    lower_DD = torch.linalg.cholesky(cov_DD)
    squares = [
        torch.linalg.solve_triangular(lower_DD, torch.from_numpy(block).T, upper=False).square().sum(0).numpy()
        for block in _centred(features, reference.mean)
    ]
    return np.concatenate([*squares, np.empty(0)])


def shrinkage(reference: Gaussian, count: int) -> float:
    """Share in [0, 1] of the scaled identity in the best estimate of a covariance from `count` Gaussian samples."""
    dims, trace = len(reference.mean), reference.trace
    inner = reference.factor.T @ reference.factor
    squared_trace = float(np.sum(inner * inner))  # tr C^2, from the smaller product
    above = (1 - 2 / dims) * squared_trace + trace**2
    below = (count + 1 - 2 / dims) * (squared_trace - trace**2 / dims)
    return 1.0 if below <= 0 else min(1.0, above / below)


def influence_scores(features: npt.ArrayLike | StoredRows, current: Gaussian, reference: Gaussian) -> Floats:
    """First-order change of FID(set, reference) when weight moves to each row of (N, d) features; `current` is the set.

    |x - m2|^2 - (x - m1)^T T (x - m1) with T = R (R^T C1 R)^-1/2 R^T, C2 = R R^T: near the reference is good, far from
    what the set has already is good too. Directions in which the set has no spread at all are left out.
    """
    import torch

    overlap = torch.from_numpy(reference.factor.T @ current.factor)
    values, vectors = torch.linalg.eigh(overlap @ overlap.T)
    kept = values > len(values) * np.finfo(np.float64).eps * values[-1].clamp(min=0)
    root = reference.factor @ (vectors[:, kept] * values[kept] ** -0.25).numpy()
    scores = []
    for to_reference, to_set in zip(_centred(features, reference.mean), _centred(features, current.mean), strict=True):
        spread = to_set @ root
        scores.append(np.einsum("bd,bd->b", to_reference, to_reference) - np.einsum("br,br->b", spread, spread))
    return np.concatenate([*scores, np.empty(0)])


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


def _centred(features: npt.ArrayLike | StoredRows, middle: Floats) -> Iterator[Floats]:
    """Blocks of rows as float64, the middle taken off."""
    rows_ND = as_rows(features)
    if len(rows_ND.shape) != 2 or rows_ND.shape[1] != len(middle):
        raise ValueError(f"expected features of shape (N, {len(middle)}), got {rows_ND.shape}")
    for block in blocks(rows_ND):
        yield block.astype(np.float64) - middle


# -- herding -----------------------------------------------------------------------------------------------------------


def _likeness(rows_ND: Rows, others_MD: Rows, width: float) -> Floats:
    """(N,) sum over the others of exp(-|x - y|^2 / (2 width^2))."""
    likeness_N = np.zeros(len(rows_ND))
    for part in parts_of(len(rows_ND)):
        block_BD = rows_ND[part].astype(np.float64)
        squares_B = np.einsum("bd,bd->b", block_BD, block_BD)
        for others in blocks(others_MD):
            others_bD = others.astype(np.float64)
            apart_Bb = block_BD @ others_bD.T
            apart_Bb *= -2
            apart_Bb += squares_B[:, None] + np.einsum("bd,bd->b", others_bD, others_bD)[None, :]
            likeness_N[part] += np.exp(-np.maximum(apart_Bb, 0.0) / (2 * width**2)).sum(axis=1)
    return likeness_N


def kernel_width(reference_MD: Rows, pool_ND: Rows) -> float:
    """Median distance between different rows of an even sample of the reference, of the pool if it has none; else 1."""
    for rows in (reference_MD, pool_ND):
        sample = rows[np.arange(0, len(rows), -(-len(rows) // _WIDTH_ROWS))].astype(np.float64)
        squares = np.einsum("md,md->m", sample, sample)
        apart = (squares[:, None] + squares[None, :] - 2 * sample @ sample.T)[np.triu_indices(len(sample), 1)]
        apart = apart[apart > 1e-9 * squares.max(initial=0.0)]  # what rounding leaves of equal rows is no distance
        if len(apart):
            return float(np.sqrt(np.median(apart)))
    return 1.0


def herding_order(
    features: npt.ArrayLike | StoredRows,
    reference: npt.ArrayLike | StoredRows,
    count: int,
    limits: Limits = NO_LIMITS,
) -> tuple[Indices, Floats]:
    """Rows of (N, d) features in the order in which they bring the mean of the chosen ones closest to the reference's.

    Kernel herding (Chen, Welling and Smola, 2010) with a Gaussian kernel, as wide as reference frames are apart (the
    cubic one of KID would favour long vectors): each pick is the row most like the reference
    (M, d) and least like what was picked. Returns (count,) rows, fewer where `limits` leave no more, and (N,) likeness
    to the reference, larger is nearer. Ties go to the earlier row.
    """
    pool_ND, reference_MD = as_rows(features), as_rows(reference)
    width = kernel_width(reference_MD, pool_ND)
    likeness_N = _likeness(pool_ND, reference_MD, width) / len(reference_MD)
    crowding_N = np.zeros(len(pool_ND))
    free_N = np.ones(len(pool_ND), dtype=bool)
    picked: list[int] = []
    while len(picked) < count and free_N.any():
        row = int(np.where(free_N, likeness_N - crowding_N / (len(picked) + 1), -np.inf).argmax())
        picked.append(row)
        free_N[limits.closed_by(picked)] = False
        crowding_N += _likeness(pool_ND, pool_ND[row : row + 1], width)
    return np.array(picked, dtype=np.int64), likeness_N
