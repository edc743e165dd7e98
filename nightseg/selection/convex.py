"""The FID of weighted frames as a function to minimise: its value and its gradient.

A subset of k frames has a covariance of rank k - 1 at most, weighted frames have one of any rank. Where the pool has
more directions than that, F of measures/subset.py is replaced by a larger convex function that is still F for subsets,
so that its minimum bounds them more closely. For every positive P, tr (A^T A)^1/2 of an A of rank m or less is at most
half of tr P^-1 A^T A plus the m largest eigenvalues of P. The smallest of these bounds over all P is, in the
eigenvalues l of C = A^T A from the largest on,

    h(C) = sum_{j <= J} l_j^1/2 + [(m - J) sum_{j > J} l_j]^1/2,    l_J > 1/(m - J) sum_{j > J} l_j >= l_{J+1}

with the smallest J >= 0 for which the right side holds; it is tr C^1/2 if C has m directions or fewer. P is C^1/2 with
its smallest eigenvalues made alike. As a minimum of functions that are linear in C and grow with it, h is concave in
the weights.

The letters are those of measures/subset.py, which minimises it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nightseg.selection.frechet import Gaussian

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

_ROUNDINGS = 64.0  # of a distance, in what is added up from them
_WORK = 3e11  # floating-point operations of one search: seconds for small pools, a few minutes for large ones


class Point(NamedTuple):
    """What F needs to know of some weights: all linear in them."""

    distance: float  # sum_i w_i |x_i - m2|^2
    mean_r: Any  # torch (r,): sum_i w_i z_i
    second_rr: Any  # torch (r, r): sum_i w_i z_i z_i^T

    @property
    def covariance_rr(self) -> Any:
        """Of z, divisor 1."""
        return self.second_rr - self.mean_r[:, None] * self.mean_r[None, :]


def between(start: Point, end: Point, share: float) -> Point:
    """The point a share of the way from `start` to `end`."""
    return Point(*((1 - share) * a + share * b for a, b in zip(start, end, strict=True)))


class Problem(NamedTuple):
    """The pool as seen by the reference: z = R^T (x - pool mean), in the directions in which the pool has spread."""

    rows_Nr: Any  # noqa: N815 (torch float64)
    distance_N: Floats  # noqa: N815 (|x - m2|^2)
    trace: float  # tr C2
    rank: int  # m: of the covariance of z, at most, for the subsets that are asked for
    doubt: float  # no value of a subset is wrong by more: what rounding and the directions left out can do

    @classmethod
    def of(cls, rows_ND: Floats, reference: Gaussian, count: int) -> Problem:
        """For subsets of `count` rows."""
        import torch

        to_reference_ND = rows_ND - reference.mean
        distance_N = np.einsum("nd,nd->n", to_reference_ND, to_reference_ND)
        rows = torch.from_numpy((rows_ND - rows_ND.mean(axis=0)) @ reference.factor)
        rows -= rows.mean(dim=0)
        values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
        kept = values > len(values) * np.finfo(np.float64).eps * (values[-1] if len(values) else 0.0)
        doubt = _ROUNDINGS * np.finfo(np.float64).eps * float(distance_N.max())
        if not bool(kept.all()):
            # What a subset has in the other directions, at most: tr C^1/2 of m directions is at most (m tr C)^1/2.
            left_N = (rows @ vectors[:, ~kept]).square().sum(dim=1)
            most = float(left_N.topk(min(count, len(left_N))).values.mean())
            doubt += 2 * math.sqrt(min(count, int((~kept).sum())) * most)
            rows = rows @ vectors[:, kept]
        return cls(rows, distance_N, reference.trace, min(count - 1, int(rows.shape[1])), doubt)

    @property
    def dims(self) -> int:
        """r: directions in which the pool has spread that the reference sees."""
        return int(self.rows_Nr.shape[1])

    def at(self, chosen: Indices) -> Point:
        """Equal weights on the chosen rows."""
        rows = self.rows_Nr[chosen]
        return Point(float(self.distance_N[chosen].mean()), rows.mean(dim=0), rows.T @ rows / len(chosen))

    def weighted(self, weights_N: Floats) -> Point:
        """Any weights (N,) that sum to 1."""
        import torch

        weights = torch.from_numpy(weights_N)
        second_rr = self.rows_Nr.T @ (self.rows_Nr * weights[:, None])
        return Point(float(self.distance_N @ weights_N), weights @ self.rows_Nr, second_rr)

    def affordable(self, fewest: int, most: int) -> int:
        """How many gradients are worth their time."""
        size, dims = self.rows_Nr.shape
        return int(np.clip(_WORK / (25 * dims**3 + 4 * size * dims**2 + 1e9), fewest, most))

    def value(self, point: Point) -> float:
        """F for a subset, and the larger function for weights that no subset has."""
        import torch

        total, _ = _roots(torch.linalg.eigvalsh(point.covariance_rr), self.rank)
        return point.distance + self.trace - 2 * total

    def gradient(self, point: Point) -> tuple[float, Floats]:
        """The value and its derivative by each weight, up to a constant that is the same for all rows.

        d F / d w_i = |x_i - m2|^2 - (z_i - z)^T P^-1 (z_i - z), P the root of the covariance C of z, or what is at
        least as large where C has too many directions.
        """
        import torch

        values, vectors = torch.linalg.eigh(point.covariance_rr)
        _, roots = _roots(values, self.rank)
        # Every P gives a tangent from below: one that rounding leaves standing, and its own value.
        least = len(values) * np.finfo(np.float64).eps * (values[-1].clamp(min=0) if len(values) else 0.0)
        roots = roots.clamp(min=max(float(least), np.finfo(np.float64).tiny) ** 0.5)
        total = float((values.clamp(min=0) / roots).sum() + roots.topk(self.rank).values.sum()) / 2
        to_unit = vectors * roots**-0.5
        spread = self.rows_Nr @ to_unit - point.mean_r @ to_unit
        return point.distance + self.trace - 2 * total, self.distance_N - spread.square_().sum(dim=1).numpy()


def _roots(values_r: Any, rank: int) -> tuple[float, Any]:
    """h of a covariance with these eigenvalues, smallest first, and the eigenvalues (r,) of the P that attains it."""
    import torch

    values = values_r.flip(0).clamp(min=0)
    if rank == 0:
        return 0.0, torch.full_like(values_r, torch.inf)
    tails = values.flip(0).cumsum(0).flip(0)[:rank]  # sums from each eigenvalue on
    means = tails / torch.arange(rank, 0, -1)
    first = int((values[:rank] <= means).byte().argmax())  # J
    roots = values.sqrt()
    roots[first:] = means[first].sqrt()
    return float(roots[:rank].sum()), roots.flip(0)
