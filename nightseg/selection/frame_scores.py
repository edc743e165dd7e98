"""A number for each frame of a pool, smaller is better: how well it would stand in for a reference set of frames.

N frames of the pool, d feature dimensions, P positions of a feature map.

    pooled        |x - m|^2 + tr C: the squared Frechet distance of one pooled vector, which has no covariance
    spatial       true squared Frechet distance between the feature vectors at all positions of one frame and those at
                  all positions of all reference frames
    mahalanobis   (x - m)^T S^-1 (x - m), S the shrunk covariance: minus the log of the density, but for constants
    influence     first-order change of the FID of a set when the frame is added to it; see measures/subset.py
    histogram     Wasserstein-1 distance of luminance histograms
    random        the control that any rule has to beat
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nightseg.selection.frechet import Gaussian
from nightseg.storage import UserError

Floats = npt.NDArray[np.float64]

_BLOCK_ROWS = 4096  # rows that are widened to float64 at a time


def pooled_scores(features: npt.ArrayLike, reference: Gaussian) -> Floats:
    """Squared Frechet distance of each row of (N, d) features, as a distribution without spread, to the reference.

    The reading of "FID of one frame" that the thesis can have meant. The trace is the same for all frames and does not
    change the ranking.
    """
    squares = [np.einsum("bd,bd->b", block, block) for block in _centred(features, reference.mean)]
    return np.concatenate([*squares, np.empty(0)]) + reference.trace


def mahalanobis_scores(features: npt.ArrayLike, reference: Gaussian, reference_count: int) -> Floats:
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
            "the frames of the reference are all the same: without a spread there is no Mahalanobis distance to them;"
            " name a larger dataset, or another method"
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


def influence_scores(features: npt.ArrayLike, current: Gaussian, reference: Gaussian) -> Floats:
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


def _centred(features: npt.ArrayLike, mean: Floats) -> Iterator[Floats]:
    """Blocks of rows as float64, the mean taken off."""
    rows_ND = np.asarray(features)
    if rows_ND.ndim != 2 or rows_ND.shape[1] != len(mean):
        raise ValueError(f"expected features of shape (N, {len(mean)}), got {rows_ND.shape}")
    for start in range(0, len(rows_ND), _BLOCK_ROWS):
        yield rows_ND[start : start + _BLOCK_ROWS].astype(np.float64) - mean


# -- a frame as a distribution over its positions --------------------------------------------------------------------


class SpatialReference(NamedTuple):
    """Per-position statistics of the reference frames, their covariance by its largest directions only.

    `tail` is the largest eigenvalue left out: what is missing in a distance is at most 2 sqrt(P tail) times the root
    of the trace of the frame's own covariance.
    """

    mean: Floats  # (d,)
    root: Floats  # (d, rank)
    trace: float  # of the whole covariance
    tail: float


def spatial_reference(mean: npt.ArrayLike, cov: npt.ArrayLike, rank: int = 256) -> SpatialReference:
    """The reference from mean (d,) and covariance (d, d) over all positions of all its frames."""
    import torch

    mean_D, cov_DD = np.asarray(mean, dtype=np.float64), np.asarray(cov, dtype=np.float64)
    values, vectors = torch.linalg.eigh(torch.from_numpy(cov_DD))
    values = values.clamp(min=0)
    first = max(len(values) - rank, 0)
    root = (vectors[:, first:] * values[first:].sqrt()).numpy()
    return SpatialReference(mean_D, root, float(np.trace(cov_DD)), float(values[first - 1]) if first else 0.0)


def spatial_scores(maps_NPd: npt.ArrayLike, reference: SpatialReference) -> tuple[Floats, Floats]:
    """Squared Frechet distance of each frame's positions (N, P, d), P >= 2, to the reference, and its error bound (N,).

    With Z the centred positions divided by sqrt(P - 1) the cross term is the sum of the singular values of Z root,
    found from P x P matrices: no d x d object is made for a frame. Leaving out directions makes that sum smaller and
    the distance larger, by no more than the bound.
    """
    import torch

    maps = np.asarray(maps_NPd)
    if maps.ndim != 3 or maps.shape[2] != len(reference.mean) or maps.shape[1] < 2:
        raise ValueError(f"expected maps (N, P >= 2, {len(reference.mean)}), got {tuple(maps.shape)}")
    num_frames, num_positions, dims = maps.shape
    root = torch.from_numpy(reference.root)
    means = torch.empty(num_frames, dims, dtype=torch.float64)
    traces = torch.empty(num_frames, dtype=torch.float64)
    seen = torch.empty(num_frames, num_positions, num_positions, dtype=torch.float64)
    # A frame at a time through a buffer that stays in the cache: over all at once, half of the time goes to memory.
    centred_Pd = torch.empty(num_positions, dims, dtype=torch.float64)
    for frame in range(num_frames):
        np.copyto(centred_Pd.numpy(), maps[frame])
        torch.mean(centred_Pd, dim=0, out=means[frame])
        centred_Pd.sub_(means[frame])
        traces[frame] = torch.linalg.vector_norm(centred_Pd) ** 2
        projected = centred_Pd @ root
        torch.mm(projected, projected.T, out=seen[frame])
    traces /= num_positions - 1
    values = torch.linalg.eigvalsh(seen / (num_positions - 1)).clamp(min=0)
    shifts = (means - torch.from_numpy(reference.mean)).square().sum(dim=1)
    distances = shifts + traces + reference.trace - 2 * values.sqrt().sum(dim=1)
    error = 2 * (num_positions * reference.tail * traces).sqrt()
    return distances.clamp(min=0).numpy(), error.numpy()
