"""The FID of weighted frames as a function to minimise: its value, its gradient, and what an exchange of rows does.

The letters are those of measures/subset.py, which minimises it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nightseg.measures.frechet import Gaussian
from nightseg.measures.limits import Limits

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

_WORK = 3e11  # floating-point operations of one search: seconds for small pools, a few minutes for large ones
_EXACT_WORK = 2e9  # and of trying out single exchanges, each time
_CANDIDATES = 96  # rows on either side that are rated as pairs
_MOST_TRIED = 1024


class Point(NamedTuple):
    """What F needs to know of some weights: all linear in them."""

    distance: float  # sum_i w_i |x_i - m2|^2
    mean_r: Any  # torch (r,): sum_i w_i z_i
    second_rr: Any  # torch (r, r): sum_i w_i z_i z_i^T


def between(start: Point, end: Point, share: float) -> Point:
    """The point a share of the way from `start` to `end`."""
    return Point(*((1 - share) * a + share * b for a, b in zip(start, end, strict=True)))


class Exchanges(NamedTuple):
    """Pairs of rows to exchange, by what that should change F, the best first."""

    out: Indices
    into: Indices
    change: Floats

    def disjoint(self, most: int) -> tuple[Indices, Indices]:
        """Up to `most` pairs that should lower F and share no row."""
        out: dict[int, int] = {}
        used: set[int] = set()
        for leaving, coming, change in zip(self.out.tolist(), self.into.tolist(), self.change.tolist(), strict=True):
            if change >= 0 or len(out) == most:
                break
            if leaving not in out and coming not in used:
                out[leaving] = coming
                used.add(coming)
        return np.array(list(out), dtype=np.int64), np.array(list(out.values()), dtype=np.int64)


class Problem(NamedTuple):
    """The pool as seen by the reference: z = R^T (x - pool mean), in the directions in which the pool has spread."""

    rows_Nr: Any  # noqa: N815 (torch float64)
    distance_N: Floats  # noqa: N815 (|x - m2|^2)
    trace: float  # tr C2

    @classmethod
    def of(cls, rows_ND: Floats, reference: Gaussian) -> Problem:
        import torch

        to_reference_ND = rows_ND - reference.mean
        distance_N = np.einsum("nd,nd->n", to_reference_ND, to_reference_ND)
        rows = torch.from_numpy((rows_ND - rows_ND.mean(axis=0)) @ reference.factor)
        rows -= rows.mean(dim=0)
        values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
        kept = values > len(values) * np.finfo(np.float64).eps * (values[-1] if len(values) else 0.0)
        if not bool(kept.all()):
            rows = rows @ vectors[:, kept]
        return cls(rows, distance_N, reference.trace)

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
        """F."""
        import torch

        return self._from_eigenvalues(point, torch.linalg.eigvalsh(_covariance(point)))

    def gradient(self, point: Point) -> tuple[float, Floats]:
        """F and its derivative by each weight, up to a constant that is the same for all rows.

        d F / d w_i = |x_i - m2|^2 - (z_i - z)^T C^-1/2 (z_i - z), C the covariance of z.
        """
        values, vectors = self._directions(point)
        spread = self.rows_Nr @ (vectors * values**-0.25) - point.mean_r @ (vectors * values**-0.25)
        return self._from_eigenvalues(point, values), self.distance_N - spread.square_().sum(dim=1).numpy()

    def exchanges(self, point: Point, inside: Indices) -> Exchanges:
        """What exchanging a row inside for one outside should change, for the most promising rows of both sides.

        Second order at `point`, whose covariance C has eigenvalues l: the exchange of u for v changes C by
        E = (v v^T - u u^T) / k, and F by its gradient and 1/2 sum_ab E_ab^2 / (sqrt(l_a l_b) (sqrt l_a + sqrt l_b)).
        """
        import torch

        values, vectors = self._directions(point)
        roots = values.sqrt()
        rows = (self.rows_Nr - point.mean_r) @ vectors
        count = len(inside)
        bend = 1 / (roots[:, None] * roots[None, :] * (roots[:, None] + roots[None, :]))
        squares = rows.square()
        gradient = torch.from_numpy(self.distance_N) - squares @ (1 / roots)
        own = ((squares @ bend) * squares).sum(dim=1) / 2
        outside = np.setdiff1d(np.arange(len(self.distance_N)), inside)
        gone, come = (-gradient / count + own / count**2).numpy(), (gradient / count + own / count**2).numpy()
        leaving = inside[np.argsort(gone[inside], kind="stable")[:_CANDIDATES]]
        coming = outside[np.argsort(come[outside], kind="stable")[:_CANDIDATES]]
        u, v = rows[leaving], rows[coming]
        both = torch.stack([((row * v) @ bend * (row * v)).sum(dim=1) for row in u])
        shift = (u[:, None] - v[None, :]).square() @ (1 / roots)
        change = gone[leaving][:, None] + come[coming][None, :] + ((shift - both) / count**2).numpy()
        order = np.argsort(change, axis=None, kind="stable")
        row, column = np.divmod(order, change.shape[1])
        return Exchanges(leaving[row], coming[column], change.ravel()[order])

    def best_single(
        self, point: Point, inside: Indices, proposals: Exchanges, limits: Limits
    ) -> tuple[Indices, Indices] | None:
        """The one exchange with the smallest F among the best proposals, tried out; None where that costs too much."""
        import torch

        most = min(int(_EXACT_WORK / (15 * max(self.dims, 1) ** 3 + 1)), _MOST_TRIED, len(proposals.out))
        if most == 0:
            return None
        out, into, count = proposals.out[:most], proposals.into[:most], len(inside)
        u, v = self.rows_Nr[out], self.rows_Nr[into]
        mean = point.mean_r + (v - u) / count
        second = point.second_rr + (v[:, :, None] * v[:, None, :] - u[:, :, None] * u[:, None, :]) / count
        values = torch.linalg.eigvalsh(second - mean[:, :, None] * mean[:, None, :]).clamp(min=0)
        found = (self.distance_N[into] - self.distance_N[out]) / count - 2 * values.sqrt().sum(dim=-1).numpy()
        for best in np.argsort(found, kind="stable").tolist():
            row = np.array([into[best]]), inside[inside != out[best]]
            if len(limits.first(np.concatenate(row), count)) == count:
                return out[best : best + 1], into[best : best + 1]
        return None

    def _directions(self, point: Point) -> tuple[Any, Any]:
        """Eigenvalues above rounding error, and their vectors."""
        import torch

        values, vectors = torch.linalg.eigh(_covariance(point))
        kept = values > len(values) * np.finfo(np.float64).eps * (values[-1] if len(values) else 0.0)
        return values[kept], vectors[:, kept]

    def _from_eigenvalues(self, point: Point, values: Any) -> float:
        return point.distance + self.trace - 2 * float(values.clamp(min=0).sqrt().sum())


def _covariance(point: Point) -> Any:
    return point.second_rr - point.mean_r[:, None] * point.mean_r[None, :]
