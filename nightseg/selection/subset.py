"""The frames of a pool that together are closest to a reference: the subset with the smallest FID, and a certificate.

The FID of a subset is what "give me 1,600 frames by FID" asks for. Let the frames have weights w >= 0 that sum to 1.
Then, for a reference N(m2, C2) with C2 = R R^T,

    F(w) = sum_i w_i |x_i - m2|^2 + tr C2 - 2 tr (R^T C(w) R)^1/2

is the squared Frechet distance of the weighted frames, C(w) their covariance with divisor 1. C(w) is concave in w and
tr (.)^1/2 is monotone and concave, so F is convex. A subset of k frames is a corner of the polytope {0 <= w_i <= 1/k},
so a minimum over the polytope is below the FID of every subset: minimised by Frank and Wolfe's method (1956; Jaggi,
2013), whose linear step is "take the k frames with the smallest gradient". Every gradient met on the way bounds F from
below at all corners, and so does every mean of them. The weights are then rounded to a subset, which exchanges improve
(selection/exchange.py). No library solves this problem, and none that chooses frames says how good its choice is.

A subset of k frames has a covariance of rank k - 1 at most, weighted frames have one of any rank. Where the pool has
more directions than that, F is replaced by a larger convex function that is still F for subsets, so that its minimum
bounds them more closely. For every positive P, tr (A^T A)^1/2 of an A of rank m or less is at most half of
tr P^-1 A^T A plus the m largest eigenvalues of P. The smallest of these bounds over all P is, in the eigenvalues l of
C = A^T A from the largest on,

    h(C) = sum_{j <= J} l_j^1/2 + [(m - J) sum_{j > J} l_j]^1/2,    l_J > 1/(m - J) sum_{j > J} l_j >= l_{J+1}

with the smallest J >= 0 for which the right side holds; it is tr C^1/2 if C has m directions or fewer. P is C^1/2 with
its smallest eigenvalues made alike. As a minimum of functions that are linear in C and grow with it, h is concave in
the weights.

N frames, d dimensions, r columns of R that matter, k = count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from nightseg.errors import UserError
from nightseg.selection.exchange import BREADTHS, exchanged, moments_at
from nightseg.selection.frechet import Gaussian, gaussian_distance, gaussian_of_moments
from nightseg.selection.limits import NO_LIMITS, Limits
from nightseg.selection.rows import Rows, StoredRows, as_rows, parts_of

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

TIGHT_ENOUGH: Final = 1e-3
"""Relative distance of the bound at which the search ends: frames that differ by less do not differ."""

_ITERATIONS: Final = (45, 1000)  # fewest, most; in between as many as their work allows
_ROUNDS: Final = (12, 150)  # of exchanges, likewise
_MEMORIES: Final = (0.0, 0.8, 0.95)  # of the EMAs of gradients that give bounds
_LONGEST_STEP = 0.99  # a step of 1 would end at a corner, where the covariance may be singular and has no gradient
_SHORTEST_STEP = 1e-9
_ROUNDINGS = 64.0  # of a distance, in what is added up from them
_WORK = 3e11  # floating-point operations of one search: seconds for small pools, a few minutes for large ones


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
        raise UserError(f"count: it is {count}", cure="ask for 1 frame or more")
    if count > pool:
        raise UserError(
            f"count: the pool has {pool} frames, {count} were asked for",
            cure="a smaller count, or more frames in the pool",
        )


class Subset(NamedTuple):
    """A choice of rows, and how close to the best possible one it is."""

    indices: Indices  # (count,), largest weight first
    fid: float  # squared Frechet distance to the reference, covariance divided by count: what the bound is about
    lower_bound: float  # no choice of as many rows has a smaller `fid`
    influence: Floats  # (N,) gradient at the fractional solution: what adding each row would change, up to a constant


def select_subset(
    features: npt.ArrayLike | StoredRows,
    mean: npt.ArrayLike,
    cov: npt.ArrayLike,
    count: int,
    *,
    limits: Limits = NO_LIMITS,
    watch: Callable[[float, float], None] = lambda fid, lower_bound: None,
) -> Subset:
    """The `count` rows of (N, d) features whose FID to the reference `mean` (d,), `cov` (d, d) is smallest, or nearly.

    How nearly, `lower_bound` says. `limits` are respected; the bound holds for all choices under their quota. `watch`
    is told the fractional value and the bound after each iteration. In float64, with a few numbers a row in memory and
    its coordinates in a temporary file.
    Raises UserError if the pool, or the pool under its limits, has too few rows; ValueError for values not finite.
    """
    rows_ND = as_rows(features)
    reference = gaussian_of_moments(mean, cov)
    if len(rows_ND.shape) != 2 or rows_ND.shape[1] != len(reference.mean):
        raise ValueError(f"expected features of shape (N, {len(reference.mean)}), got {rows_ND.shape}")
    if not all(np.isfinite(rows_ND[part]).all() for part in parts_of(len(rows_ND))):
        raise ValueError("some features are not finite")
    check_count(count, len(rows_ND))
    limits.check(count)

    problem = Problem.of(rows_ND, reference, count)
    weights_N, influence_N, lower_bound = _minimise(problem, count, limits.without_gap(), watch)
    by_weight = np.lexsort((influence_N, -np.round(weights_N * count, 9)))
    orders = (by_weight, *(np.argsort(values, kind="stable") for values in (influence_N, problem.distance_N)))
    starts = [limits.filled(order, count) for order in orders]
    start = min(starts, key=lambda rows: problem.value(problem.at(rows)))
    chosen = _improve(problem, start, limits, lower_bound)
    # Best first, so that a shorter choice can be cut from a longer one.
    place = np.empty(len(rows_ND), dtype=np.int64)
    place[by_weight] = np.arange(len(rows_ND))
    chosen = chosen[np.argsort(place[chosen], kind="stable")]

    chosen_KD = rows_ND[chosen].astype(np.float64)
    mean_D = chosen_KD.mean(axis=0)
    of_chosen = Gaussian(mean_D, (chosen_KD - mean_D).T / np.sqrt(count))
    fid = gaussian_distance(of_chosen, reference)
    return Subset(chosen, fid, min(max(lower_bound, 0.0), fid), influence_N)


# -- the function ----------------------------------------------------------------------------------------------------


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

    rows_Nr: Rows  # z
    distance_N: Floats
    trace: float  # tr C2
    rank: int  # m: of the covariance of z, at most, for the subsets that are asked for
    error: float  # no value of a subset is wrong by more: what rounding and the directions left out can do

    @classmethod
    def of(cls, rows_ND: Rows, reference: Gaussian, count: int) -> Problem:
        """For subsets of `count` rows."""
        import torch

        size, parts = len(rows_ND), parts_of(len(rows_ND))
        mean_D = sum(rows_ND[part].sum(axis=0, dtype=np.float64) for part in parts) / size
        distance_N = np.empty(size)
        rows = StoredRows((size, reference.factor.shape[1]), np.float64)
        total_r = np.zeros(rows.shape[1])
        for part in parts:
            block_BD = rows_ND[part].astype(np.float64)
            block_Br = (block_BD - mean_D) @ reference.factor
            total_r += block_Br.sum(axis=0)
            rows[part] = block_Br
            block_BD -= reference.mean
            distance_N[part] = np.einsum("nd,nd->n", block_BD, block_BD)
        second_rr = torch.zeros((rows.shape[1], rows.shape[1]), dtype=torch.float64)
        for part in parts:
            rows[part] = block_Br = rows[part] - total_r / size
            block = torch.from_numpy(block_Br)
            second_rr += block.T @ block
        values, vectors = torch.linalg.eigh(second_rr / size)
        kept = values > len(values) * np.finfo(np.float64).eps * (values[-1] if len(values) else 0.0)
        error = _ROUNDINGS * np.finfo(np.float64).eps * float(distance_N.max())
        if not bool(kept.all()):
            # What a subset has in the other directions, at most: tr C^1/2 of m directions is at most (m tr C)^1/2.
            left_N, every = torch.empty(size, dtype=torch.float64), rows
            rows = StoredRows((size, int(kept.sum())), np.float64)
            for part in parts:
                block = torch.from_numpy(every[part])
                left_N[part] = (block @ vectors[:, ~kept]).square().sum(dim=1)
                rows[part] = (block @ vectors[:, kept]).numpy()
            most = float(left_N.topk(min(count, size)).values.mean())
            error += 2 * math.sqrt(min(count, int((~kept).sum())) * most)
        return cls(rows, distance_N, reference.trace, min(count - 1, int(rows.shape[1])), error)

    @property
    def dims(self) -> int:
        """r: directions in which the pool has spread that the reference sees."""
        return int(self.rows_Nr.shape[1])

    def at(self, chosen: Indices) -> Point:
        """Equal weights on the chosen rows."""
        return Point(float(self.distance_N[chosen].mean()), *moments_at(self.rows_Nr, chosen))

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
        middle_r, spread_N = point.mean_r @ to_unit, np.empty(len(self.distance_N))
        for part in parts_of(len(spread_N)):
            spread_N[part] = (torch.from_numpy(self.rows_Nr[part]) @ to_unit - middle_r).square_().sum(dim=1).numpy()
        return point.distance + self.trace - 2 * total, self.distance_N - spread_N


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


# -- the fractional solution -----------------------------------------------------------------------------------------


def _minimise(
    problem: Problem, count: int, limits: Limits, watch: Callable[[float, float], None]
) -> tuple[Floats, Floats, float]:
    """Weights (N,) near the minimum, the gradient there, and the best lower bound met on the way.

    The start, all rows alike, may break a quota. It does no harm: a tangent bounds F at every corner, wherever it is.
    """
    size = len(problem.distance_N)
    weights_N = np.full(size, 1 / size)
    point = problem.at(np.arange(size))
    tangents = [_Tangents(memory) for memory in _MEMORIES]
    lower_bound, share = -np.inf, 0.5
    for _ in range(problem.affordable(*_ITERATIONS)):
        value, gradient_N = problem.gradient(point)
        corners = []
        for tangent in tangents:
            tangent.add(value - float(gradient_N @ weights_N), gradient_N)
            corners.append(limits.first(np.argsort(tangent.slope_N, kind="stable"), count))
            below = tangent.offset + float(tangent.slope_N[corners[-1]].mean()) - problem.error
            lower_bound = max(lower_bound, below)
        watch(value, lower_bound)
        if value - lower_bound <= TIGHT_ENOUGH / 2 * max(value, 0.0):
            break
        # The corner of a mean gradient zigzags less; where it leads upwards, the gradient's own is taken.
        slopes = [float(gradient_N[corner].mean() - gradient_N @ weights_N) for corner in corners]
        choice = max((i for i in range(len(slopes)) if slopes[i] <= slopes[0] / 2), default=0)
        end = problem.at(corners[choice])
        share = _line_search(problem, point, end, value, slopes[choice], share)
        if share == 0.0:  # no step is better: rounding is all that is left of the gap
            break
        weights_N *= 1 - share
        weights_N[corners[choice]] += share / count
        point = between(point, end, share)
    return weights_N, gradient_N, lower_bound


class _Tangents:
    """An EMA of tangents offset + slope . w, each of which lies below F; with memory 0 the latest one."""

    def __init__(self, memory: float) -> None:
        self.memory = memory
        self.total = 0.0
        self.offset = 0.0
        self.slope_N: Floats = np.zeros(0)

    def add(self, offset: float, slope_N: Floats) -> None:
        self.total = self.memory * self.total + 1.0
        share = 1.0 / self.total
        self.offset += share * (offset - self.offset)
        self.slope_N = slope_N.copy() if share == 1.0 else self.slope_N + share * (slope_N - self.slope_N)


def _line_search(problem: Problem, start: Point, end: Point, value: float, slope: float, guess: float) -> float:
    """A share in (0, 1) of the way to `end` that lowers F, of known value and slope at the start; 0.0 if none does.

    The minimum of the parabola through them and one more value: every evaluation costs the eigenvalues of a matrix.
    """
    share = min(max(guess, 1e-4), _LONGEST_STEP)
    while share >= _SHORTEST_STEP:
        reached = problem.value(between(start, end, share))
        curvature = (reached - value - slope * share) / share**2
        best = min(-slope / (2 * curvature), _LONGEST_STEP) if curvature > 0 else _LONGEST_STEP
        if abs(best - share) < 0.1 * share and reached < value:
            return share
        better = problem.value(between(start, end, best))
        if min(reached, better) < value:
            return best if better <= reached else share
        share = min(share, best) / 4
    return 0.0


# -- from weights to rows --------------------------------------------------------------------------------------------


def _improve(problem: Problem, chosen: Indices, limits: Limits, lower_bound: float) -> Indices:
    """The chosen rows after rounds of exchanges, of ever more rows, while they lower F and the bound is not near."""
    value = problem.value(problem.at(chosen))
    breadths = iter(BREADTHS)
    breadth = next(breadths)
    for _ in range(problem.affordable(*_ROUNDS)):
        if value - lower_bound <= TIGHT_ENOUGH * value:
            break
        better = exchanged(problem.rows_Nr, problem.distance_N, chosen, value, limits, breadth)
        reached = problem.value(problem.at(better))
        if reached < value:
            chosen, value = better, reached
        elif (broader := next(breadths, None)) is not None:
            breadth = broader
        else:
            break
    return chosen
