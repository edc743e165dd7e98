"""Which frames of a pool to take: the best by a score, or the ones that together are closest to a reference.

The FID of a subset is what "give me 1,600 frames by FID" asks for. Let the frames have weights w >= 0 that sum to 1.
Then, for a reference N(m2, C2) with C2 = R R^T,

    F(w) = sum_i w_i |x_i - m2|^2 + tr C2 - 2 tr (R^T C(w) R)^1/2

is the squared Frechet distance of the weighted frames, C(w) their covariance with divisor 1. C(w) is concave in w and
tr (.)^1/2 is monotone and concave, so F is convex. A subset of k frames is a corner of the polytope {0 <= w_i <= 1/k},
so a minimum over the polytope is below the FID of every subset: minimised by Frank and Wolfe's method (1956; Jaggi,
2013), whose linear step is "take the k frames with the smallest gradient", and whose gap certifies the bound.

N frames, d dimensions, r columns of R that matter, k = count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from nightseg.measures.frechet import Gaussian, gaussian_distance, gaussian_of_moments
from nightseg.measures.limits import NO_LIMITS, Limits
from nightseg.storage import UserError

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

FEWEST_ITERATIONS: Final = 25
MOST_ITERATIONS: Final = 200
FEWEST_SWAPS: Final = 10
MOST_SWAPS: Final = 200
MOST_EXACT_SWAPS: Final = 50
TIGHT_ENOUGH: Final = 1e-3
"""Relative distance of the bound at which the search ends: frames that differ by less do not differ."""

_WORK = 3e12  # floating-point operations
_EXACT_WORK = 1e10
_CANDIDATES = 128  # rows on either side that are rated as pairs
_MIXED_IN = 0.1  # of the fractional solution, where a gradient at the subset itself may not exist
_LONGEST_STEP = 0.99  # a step of 1 would end at a corner, where the covariance may be singular and has no gradient


def ranking(scores: npt.ArrayLike, frame_ids: Sequence[str]) -> Indices:
    """Positions from the smallest score to the largest; equal scores in order of frame id, whatever the pool's order.

    Raises ValueError for scores that are not finite.
    """
    values = np.asarray(scores, dtype=np.float64)
    assert values.shape == (len(frame_ids),), (values.shape, len(frame_ids))
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {len(values)} scores are not finite")
    return np.array(sorted(range(len(values)), key=lambda row: (values[row], frame_ids[row])), dtype=np.int64)


def check_count(count: int, pool: int) -> None:
    """Raise UserError for a number of frames that a pool cannot give."""
    if count < 1:
        raise UserError(f"count is {count}, it must be 1 or more")
    if count > pool:
        raise UserError(
            f"the pool has {pool} frames, {count} were asked for: lower `count`, add frames to the pool,"
            " or leave `select` out to learn from every frame"
        )


class Subset(NamedTuple):
    """A choice of rows, and how close to the best possible one it is."""

    indices: Indices  # (count,), the surest first
    fid: float  # squared Frechet distance to the reference, covariance divided by count: what the bound is about
    lower_bound: float  # no choice of as many rows has a smaller `fid`
    fid_unbiased: float  # covariance divided by count - 1, as pytorch-fid; NaN for one row
    influence: Floats  # (N,) gradient at the fractional solution: what adding each row would change, up to a constant


def select_subset(
    features: npt.ArrayLike,
    mean: npt.ArrayLike,
    cov: npt.ArrayLike,
    count: int,
    *,
    limits: Limits = NO_LIMITS,
    watch: Callable[[float, float], None] = lambda fid, lower_bound: None,
) -> Subset:
    """The `count` rows of (N, d) features whose FID to the reference `mean` (d,), `cov` (d, d) is smallest, or nearly.

    How nearly, `lower_bound` says. `limits` are respected; the bound holds for all choices under their quota. `watch`
    is told the fractional value and the bound after each iteration. In float64, with memory for a few (N, d) arrays.
    Raises UserError if the pool, or the pool under its quota, has too few rows; ValueError for values not finite.
    """
    rows_ND = np.asarray(features, dtype=np.float64)
    reference = gaussian_of_moments(mean, cov)
    if rows_ND.ndim != 2 or rows_ND.shape[1] != len(reference.mean):
        raise ValueError(f"expected features of shape (N, {len(reference.mean)}), got {rows_ND.shape}")
    if not np.isfinite(rows_ND).all():
        raise ValueError("some features are not finite")
    check_count(count, len(rows_ND))
    limits.check(count)

    problem = _Problem.of(rows_ND, reference)
    weights_N, influence_N, lower_bound = _minimise(problem, count, limits.without_gap(), watch)
    surest = np.lexsort((influence_N, -np.round(weights_N * count, 9)))
    rounded = limits.first(surest, count)
    if len(rounded) < count:
        raise UserError(
            f"`gap` {limits.gap} leaves room for about {len(rounded)} frames of the pool, {count} were asked for: lower"
            " the gap or `count`"
        )
    chosen = _swap(problem, rounded, weights_N, limits, lower_bound)
    # Best first, so that a shorter choice can be cut from a longer one.
    chosen = chosen[np.lexsort((chosen, influence_N[chosen], -np.round(weights_N[chosen] * count, 9)))]

    fid = _subset_fid(rows_ND[chosen], reference, divisor=count)
    unbiased = _subset_fid(rows_ND[chosen], reference, divisor=count - 1) if count > 1 else float("nan")
    return Subset(chosen, fid, min(max(lower_bound, 0.0), fid), unbiased, influence_N)


def _subset_fid(rows_kD: Floats, reference: Gaussian, divisor: int) -> float:
    mean_D = rows_kD.mean(axis=0)
    return gaussian_distance(Gaussian(mean_D, (rows_kD - mean_D).T / np.sqrt(divisor)), reference)


# -- the convex problem ----------------------------------------------------------------------------------------------


class _Point(NamedTuple):
    """What F needs to know of some weights: all linear in them."""

    distance: float  # sum_i w_i |x_i - m2|^2
    mean_r: Any  # torch (r,): sum_i w_i z_i
    second_rr: Any  # torch (r, r): sum_i w_i z_i z_i^T


class _Problem(NamedTuple):
    """The pool as seen by the reference: z = R^T (x - pool mean), in the directions in which the pool has spread."""

    rows_Nr: Any  # torch float64  # noqa: N815
    distance_N: Floats  # noqa: N815 # |x - m2|^2
    trace: float  # tr C2

    @classmethod
    def of(cls, rows_ND: Floats, reference: Gaussian) -> _Problem:
        import torch

        to_reference_ND = rows_ND - reference.mean
        distance_N = np.einsum("nd,nd->n", to_reference_ND, to_reference_ND)
        rows = torch.from_numpy((rows_ND - rows_ND.mean(axis=0)) @ reference.factor)
        rows -= rows.mean(dim=0)
        values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
        kept = values > len(values) * np.finfo(np.float64).eps * values[-1] if len(values) else values > 0
        if not bool(kept.all()):
            rows = rows @ vectors[:, kept]
        return cls(rows, distance_N, reference.trace)

    def at(self, chosen: Indices) -> _Point:
        """Equal weights on the chosen rows."""
        rows = self.rows_Nr[chosen]
        return _Point(float(self.distance_N[chosen].mean()), rows.mean(dim=0), rows.T @ rows / len(chosen))

    def weighted(self, weights_N: Floats) -> _Point:
        import torch

        weights = torch.from_numpy(weights_N)
        second_rr = self.rows_Nr.T @ (self.rows_Nr * weights[:, None])
        return _Point(float(self.distance_N @ weights_N), weights @ self.rows_Nr, second_rr)

    def affordable(self, fewest: int, most: int) -> int:
        """How many gradients are worth their time: a few minutes' work on two cores, whatever the size."""
        size, dims = self.rows_Nr.shape
        return int(np.clip(_WORK / (25 * dims**3 + 4 * size * dims**2 + 1), fewest, most))

    def value(self, point: _Point) -> float:
        return self._from_eigenvalues(point, self._eigenvalues(point))

    def gradient(self, point: _Point) -> tuple[float, Floats]:
        """F and its derivative by each weight, up to a constant that is the same for all rows.

        d F / d w_i = |x_i - m2|^2 - (z_i - z)^T C^-1/2 (z_i - z), C the covariance of z.
        """
        import torch

        values, vectors = torch.linalg.eigh(_covariance(point))
        kept = values > len(values) * np.finfo(np.float64).eps * (values[-1] if len(values) else 0.0)
        root = vectors[:, kept] * values[kept] ** -0.25
        spread = self.rows_Nr @ root - point.mean_r @ root
        gradient = self.distance_N - spread.square_().sum(dim=1).numpy()
        return self._from_eigenvalues(point, values), gradient

    def pairs(self, point: _Point, inside: Indices, most: int) -> tuple[Indices, Indices]:
        """Up to `most` disjoint pairs (of `inside`, not of it) whose exchange should lower F most, best first.

        Second order at `point`, C its covariance with eigenvalues l: the exchange of u for v changes C by
        E = (v v^T - u u^T) / k, and F by the gradient and 1/2 sum_ab E_ab^2 / (sqrt(l_a l_b) (sqrt l_a + sqrt l_b)).
        """
        import torch

        values, vectors = torch.linalg.eigh(_covariance(point))
        kept = values > len(values) * np.finfo(np.float64).eps * (values[-1] if len(values) else 0.0)
        roots, vectors = values[kept].sqrt(), vectors[:, kept]
        rows = (self.rows_Nr - point.mean_r) @ vectors
        gradient_N = self.distance_N - (rows.square() @ (1 / roots)).numpy()
        leaving, coming = _candidates(gradient_N, inside, _CANDIDATES)
        bend = 1 / (roots[:, None] * roots[None, :] * (roots[:, None] + roots[None, :]))
        u, v = rows[leaving], rows[coming]
        own_u, own_v = (((x.square() @ bend) * x.square()).sum(1) for x in (u, v))
        both = torch.stack([((row * v) @ bend * (row * v)).sum(1) for row in u])
        shift = (u[:, None] - v[None, :]).square() @ (1 / roots)
        curved = (own_u[:, None] + own_v[None, :] - 2 * both) / 2 + shift
        count = len(inside)
        change = (gradient_N[coming][None, :] - gradient_N[leaving][:, None]) / count + curved.numpy() / count**2
        out: list[int] = []
        into: list[int] = []
        for flat in np.argsort(change, axis=None, kind="stable"):
            row, column = divmod(int(flat), change.shape[1])
            if change[row, column] >= 0 or len(out) == most:
                break
            if leaving[row] not in out and coming[column] not in into:
                out.append(int(leaving[row]))
                into.append(int(coming[column]))
        return np.array(out, dtype=np.int64), np.array(into, dtype=np.int64)

    def best_exchange(self, smooth: _Point, point: _Point, inside: Indices) -> Indices | None:
        """`inside` after the one exchange that gives the smallest F, tried out; None where trying costs too much.

        Tried are the rows that the gradient at `smooth` likes least inside and most outside, as many as is affordable.
        """
        import torch

        side = int((_EXACT_WORK / (15 * max(self.rows_Nr.shape[1], 1) ** 3)) ** 0.5)
        leaving, coming = _candidates(self.gradient(smooth)[1], inside, min(side, _CANDIDATES))
        if not len(leaving) or not len(coming):
            return None
        count = len(inside)
        u, v = self.rows_Nr[leaving], self.rows_Nr[coming]
        mean = point.mean_r + (v[None] - u[:, None]) / count
        gone, come = (x[:, :, None] * x[:, None, :] / count for x in (u, v))
        cov = point.second_rr + come[None] - gone[:, None] - mean[..., :, None] * mean[..., None, :]
        roots = torch.linalg.eigvalsh(cov).clamp(min=0).sqrt().sum(dim=-1).numpy()
        values = (self.distance_N[coming][None] - self.distance_N[leaving][:, None]) / count - 2 * roots
        row, column = divmod(int(values.argmin()), values.shape[1])
        return np.concatenate([coming[column : column + 1], inside[inside != leaving[row]]])

    def _eigenvalues(self, point: _Point) -> Any:
        import torch

        return torch.linalg.eigvalsh(_covariance(point))

    def _from_eigenvalues(self, point: _Point, values: Any) -> float:
        return point.distance + self.trace - 2 * float(values.clamp(min=0).sqrt().sum())


def _candidates(gradient_N: Floats, inside: Indices, most: int) -> tuple[Indices, Indices]:
    """The rows inside with the largest gradient, and the rows outside with the smallest, `most` of each."""
    outside = np.setdiff1d(np.arange(len(gradient_N)), inside)
    leaving = inside[np.argsort(-gradient_N[inside], kind="stable")[:most]]
    return leaving, outside[np.argsort(gradient_N[outside], kind="stable")[:most]]


def _covariance(point: _Point) -> Any:
    return point.second_rr - point.mean_r[:, None] * point.mean_r[None, :]


def _between(start: _Point, end: _Point, share: float) -> _Point:
    return _Point(*((1 - share) * a + share * b for a, b in zip(start, end, strict=True)))


def _minimise(
    problem: _Problem, count: int, limits: Limits, watch: Callable[[float, float], None]
) -> tuple[Floats, Floats, float]:
    """Weights (N,) near the minimum, the gradient there, and the best lower bound met on the way.

    The start, all rows alike, may break a quota. It does no harm: F(w) - gap bounds F at every corner for any w.
    """
    size = len(problem.distance_N)
    weights_N = np.full(size, 1 / size)
    point = problem.at(np.arange(size))
    lower_bound, share = -np.inf, 0.5
    for _ in range(problem.affordable(FEWEST_ITERATIONS, MOST_ITERATIONS)):
        value, gradient_N = problem.gradient(point)
        corner = limits.first(np.argsort(gradient_N, kind="stable"), count)
        gap = float(weights_N @ gradient_N - gradient_N[corner].mean())
        lower_bound = max(lower_bound, value - gap)
        watch(value, lower_bound)
        if value - lower_bound <= TIGHT_ENOUGH / 2 * max(value, 0.0):
            break
        end = problem.at(corner)
        share = _line_search(problem, point, end, value, -gap, share)
        if share == 0.0:  # no step is better: rounding is all that is left of the gap
            break
        weights_N *= 1 - share
        weights_N[corner] += share / count
        point = _between(point, end, share)
    return weights_N, gradient_N, lower_bound


def _line_search(problem: _Problem, start: _Point, end: _Point, value: float, slope: float, guess: float) -> float:
    """A share in (0, 1) of the way to `end` that lowers F, of known value and slope at the start; 0.0 if none does.

    The minimum of the parabola through them and one more value: every evaluation costs the eigenvalues of a matrix.
    """
    share = min(guess, _LONGEST_STEP)
    for _ in range(8):
        reached = problem.value(_between(start, end, share))
        curvature = (reached - value - slope * share) / share**2
        best = min(-slope / (2 * curvature), _LONGEST_STEP) if curvature > 0 else _LONGEST_STEP
        if abs(best - share) < 0.1 * share and reached < value:
            return share
        better = problem.value(_between(start, end, best))
        if min(reached, better) < value:
            return best if better <= reached else share
        share = min(share, best) / 4
    return 0.0


# -- from weights to rows --------------------------------------------------------------------------------------------


def _swap(problem: _Problem, chosen: Indices, weights_N: Floats, limits: Limits, lower_bound: float) -> Indices:
    """The chosen rows after exchanges that lower F, many at once while that works, then fewer.

    Near the optimum the gradient alone promises gains that the curvature takes away, so pairs are rated with it.
    """
    count, size = len(chosen), len(weights_N)
    if count == size:
        return chosen
    mixture = problem.weighted(weights_N)
    point = problem.at(chosen)
    value = problem.value(point)
    exchanged = max(1, count // 20)
    for _ in range(problem.affordable(FEWEST_SWAPS, MOST_SWAPS)):
        if exchanged == 0 or value - lower_bound <= TIGHT_ENOUGH * value:
            break
        out, into = problem.pairs(_between(point, mixture, _MIXED_IN), chosen, exchanged)
        while exchanged:
            out, into = out[:exchanged], into[:exchanged]
            wanted = np.concatenate([into, np.setdiff1d(chosen, out)])
            tried = limits.first(np.concatenate([wanted, out]), count)
            reached = problem.at(tried)
            better = problem.value(reached)
            if len(tried) == count and better < value:
                chosen, point, value = tried, reached, better
                break
            exchanged = min(exchanged, len(out)) // 2
    for _ in range(MOST_EXACT_SWAPS):
        if value - lower_bound <= TIGHT_ENOUGH * value:
            break
        exchange = problem.best_exchange(_between(point, mixture, _MIXED_IN), point, chosen)
        if exchange is None or len(limits.first(exchange, count)) < count:
            break
        reached = problem.at(exchange)
        better = problem.value(reached)
        if better >= value:
            break
        chosen, point, value = exchange, reached, better
    return chosen
