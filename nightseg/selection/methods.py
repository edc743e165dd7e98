"""The methods by which frames of a pool are chosen, behind one function: what they need, and what they leave to see.

N frames of the pool, d feature dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nightseg.selection import frame_scores as measured
from nightseg.selection.frechet import Gaussian, gaussian_of_features
from nightseg.selection.kernel import herding_order
from nightseg.selection.limits import Limits
from nightseg.selection.settings import Selection
from nightseg.selection.subset import Subset, ranking, select_subset
from nightseg.storage import UserError

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


class Described(NamedTuple):
    """A set of frames as the extractor sees it."""

    frame_ids: list[str]
    features: npt.NDArray[np.float32]  # (N, d)
    histograms: npt.NDArray[np.float32]  # (N, 64)
    spatial: Floats | None = None  # (N,) squared Frechet distance of the positions of each frame to the reference's
    spatial_error: Floats | None = None  # (N,) by how much that can be too large

    def rows(self, rows: Indices) -> Described:
        """Some of the frames."""
        spatial, error = (None if values is None else values[rows] for values in (self.spatial, self.spatial_error))
        frame_ids = [self.frame_ids[row] for row in rows]
        return Described(frame_ids, self.features[rows], self.histograms[rows], spatial, error)


class Reference(NamedTuple):
    """What chosen frames should be close to. Raises UserError on use by a method that needs more frames than it has."""

    described: Described
    gaussian: Gaussian | None  # None for a single frame, which has no covariance

    @classmethod
    def of(cls, described: Described) -> Reference:
        return cls(described, gaussian_of_features(described.features) if len(described.frame_ids) > 1 else None)

    def normal(self, method: str) -> Gaussian:
        """The normal distribution of the features."""
        if self.gaussian is None:
            raise UserError(
                f"selection by {method} needs a reference of at least 2 frames, it has"
                f" {len(self.described.frame_ids)}; name a larger dataset"
            )
        return self.gaussian


class Choice(NamedTuple):
    """Rows of a pool, and a number for each that says why."""

    scores: Floats  # (N,) smaller is better
    chosen: Indices  # (count,) best first
    subset: Subset | None  # the certificate, of `fid-subset` only

    def order(self) -> Indices:
        """Every row: the chosen ones, then the others by their score."""
        by_score = np.argsort(self.scores, kind="stable")
        return np.concatenate([self.chosen, by_score[~np.isin(by_score, self.chosen)]])


def choose(
    selection: Selection,
    pool: Described,
    reference: Reference | None,
    *,
    limits: Limits,
    seed: int,
    watch: Callable[[float, float], None] = lambda fid, lower_bound: None,
) -> Choice:
    """The `count` frames of the pool that a method prefers under the limits; `watch` follows `fid-subset`.

    Raises UserError: no reference for a method that needs one, too few frames in it, or in the pool under its limits.
    """
    method, count = selection.method, selection.count
    if reference is None and selection.needs_reference:
        raise UserError(
            f"selection by {method} needs a reference to be close to: set `reference` to a dataset, or train on a"
            " translated dataset, which is the reference by default"
        )
    limits.check(count)
    if method == "fid-subset":
        assert reference is not None
        target = reference.normal(method)
        cov = target.factor @ target.factor.T
        subset = select_subset(pool.features, target.mean, cov, count, limits=limits, watch=watch)
        return Choice(subset.influence, subset.indices, subset)
    if method == "herding":
        assert reference is not None
        reference.normal(method)
        picked, likeness = herding_order(pool.features, reference.described.features, count, limits)
        rest = ranking(-likeness, pool.frame_ids)
        chosen = limits.filled(np.concatenate([picked, rest[~np.isin(rest, picked)]]), count)
        return Choice(-likeness, chosen, None)
    scores = frame_scores(method, pool, reference, seed)
    return Choice(scores, limits.filled(ranking(scores, pool.frame_ids), count), None)


def frame_scores(method: str, pool: Described, reference: Reference | None, seed: int = 0) -> Floats:
    """The score (N,) of a method that ranks single frames; smaller is better."""
    if method == "random":
        return measured.random_scores(pool.frame_ids, seed)
    assert reference is not None
    match method:
        case "histogram":
            middle = reference.described.histograms.mean(axis=0, dtype=np.float64)
            return measured.histogram_scores(pool.histograms, middle)
        case "mahalanobis":
            count = len(reference.described.frame_ids)
            return measured.mahalanobis_scores(pool.features, reference.normal(method), count)
        case "pooled":
            return measured.pooled_scores(pool.features, reference.normal(method))
        case "spatial":
            assert pool.spatial is not None, "the stage that scores the pool leaves these"
            return pool.spatial
    raise AssertionError(f"{method} does not rank single frames")


def every_score(pool: Described, chosen: Indices, reference: Reference | None) -> dict[str, Floats]:
    """All scores of all frames that this reference allows, by name; `influence` is that on the chosen set."""
    if reference is None or reference.gaussian is None:
        return {}
    target = reference.gaussian
    found = {name: frame_scores(name, pool, reference) for name in ("pooled", "histogram")}
    if target.trace > 0:  # frames that are all alike have no spread to measure by
        found["mahalanobis"] = frame_scores("mahalanobis", pool, reference)
        if len(chosen) > 1:
            found["influence"] = measured.influence_scores(
                pool.features, gaussian_of_features(pool.features[chosen]), target
            )
    if pool.spatial is not None:
        found["spatial"] = pool.spatial
    if pool.spatial_error is not None:
        found["spatial_error"] = pool.spatial_error
    return found
