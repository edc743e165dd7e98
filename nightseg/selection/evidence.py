"""What shows whether a choice of frames is good: distances to beat, their course with the number, a plane to see.

N frames of the pool, d feature dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nightseg.selection.frechet import Gaussian, Moments, gaussian_distance, gaussian_of_features, gaussian_of_moments

Floats = npt.NDArray[np.float64]


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


def distance_curve(
    features: npt.ArrayLike, order: npt.ArrayLike, reference: Gaussian, counts: Sequence[int]
) -> Iterator[float]:
    """FID of the first c rows of `order` to the reference, for each of the increasing `counts` (each at least 2)."""
    rows_ND, order_N = np.asarray(features), np.asarray(order)
    moments = Moments(rows_ND.shape[1])
    for count in counts:
        moments.update(rows_ND[order_N[moments.count : count]])
        # Few rows have a thin factor, which is much cheaper than that of a d x d covariance.
        few = count <= rows_ND.shape[1]
        part = gaussian_of_features(rows_ND[order_N[:count]]) if few else gaussian_of_moments(moments.mean, moments.cov)
        yield gaussian_distance(part, reference)


class Plane(NamedTuple):
    """Two directions in which frames differ most, to draw them by."""

    mean: Floats  # (d,)
    directions: Floats  # (d, 2)
    share: tuple[float, float]  # of the whole variance

    def place(self, features: npt.ArrayLike) -> Floats:
        """(N, d) -> (N, 2)."""
        placed: Floats = (np.asarray(features, dtype=np.float64) - self.mean) @ self.directions
        return placed


def principal_plane(*sets: npt.ArrayLike) -> Plane:
    """The first two principal components of several (N, d) feature sets together; signs fixed, so that it repeats."""
    import torch

    moments = Moments(np.asarray(sets[0]).shape[1])
    for features in sets:
        moments.update(features)
    values, vectors = torch.linalg.eigh(torch.from_numpy(moments.scatter))
    directions = vectors[:, [-1, -2]].numpy() if len(values) > 1 else np.array([[1.0, 0.0]])
    largest = np.abs(directions).argmax(axis=0)
    directions = directions * np.sign(directions[largest, [0, 1]] + (directions[largest, [0, 1]] == 0))
    whole = float(values.clamp(min=0).sum()) or 1.0
    first, second = (float(values[-rank]) / whole if len(values) >= rank else 0.0 for rank in (1, 2))
    return Plane(moments.mean.copy(), directions, (first, second))
