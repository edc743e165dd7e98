"""fid-subset against the choice of the frames nearest to the reference's mean: what it costs and what it is worth.

Three made-up pools: `matched` is drawn from the reference's own distribution, `biased` lies beside it, `mixture` has
six modes of which none is the reference.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from benchmarks.contest import Contest, Size
from nightseg.selection.evidence import random_subset_distances, subset_distance
from nightseg.selection.frechet import gaussian_of_moments
from nightseg.selection.methods import pooled_scores
from nightseg.selection.subset import Subset, select_subset

SIZES: dict[Size, tuple[int, int, int]] = {  # frames, dimensions, count
    "tiny": (200, 8, 40), "default": (3000, 96, 320), "full": (14_937, 2048, 1600),
}  # fmt: skip
MODES = 6
RANDOM_DRAWS: dict[Size, int] = {"tiny": 5, "default": 20, "full": 2}


def matched(size: Size) -> Contest:
    return _contest(size, "matched", shift=0.0, spread=0.0)


def biased(size: Size) -> Contest:
    return _contest(size, "biased", shift=0.5, spread=0.0)


def mixture(size: Size) -> Contest:
    return _contest(size, "mixture", shift=0.0, spread=1.5)


def _contest(size: Size, pool: str, shift: float, spread: float) -> Contest:
    frames, dims, count = SIZES[size]
    random = np.random.default_rng(0)
    # Spectra of deep features fall about like this.
    root = np.linalg.qr(random.normal(size=(dims, dims)))[0] * np.arange(1, dims + 1) ** -0.7
    reference_features = random.normal(size=(2 * dims + 500, dims)) @ root.T
    mean, cov = reference_features.mean(axis=0), np.cov(reference_features.T)
    modes = spread * random.normal(size=(MODES, dims)) @ root.T
    features = random.normal(shift, 1.0, (frames, dims)) @ root.T + modes[random.integers(0, MODES, frames)]
    features = features.astype(np.float32)
    reference = gaussian_of_moments(mean, cov)

    def nearest() -> npt.NDArray[np.int64]:
        return np.argsort(pooled_scores(features, reference), kind="stable")[:count]

    def check(ours: Subset, theirs: npt.NDArray[np.int64]) -> str:
        pooled = subset_distance(features, theirs, reference)
        drawn = list(random_subset_distances(features, reference, count, draws=RANDOM_DRAWS[size], seed=0))
        assert len(set(ours.indices.tolist())) == count
        assert ours.lower_bound <= ours.fid <= min(pooled, *drawn), (ours, pooled, drawn)
        times = f"{ours.fid / ours.lower_bound:.4f} times " if ours.lower_bound else "above "
        return (
            f"FID {ours.fid:.4g}, {times}the bound {ours.lower_bound:.4g};"
            f" nearest {pooled:.4g}, random {np.mean(drawn):.4g}"
        )

    return Contest(
        name=f"subset_{pool}",
        work=f"fid-subset: {count:,} of {frames:,} frames, d = {dims}, {pool} pool",
        peer="nightseg's pooled: the frames nearest to the mean",
        run_ours=lambda: select_subset(features, mean, cov, count),
        run_peer=nearest,
        check=check,
    )
