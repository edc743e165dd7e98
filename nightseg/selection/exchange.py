"""Exchanging chosen rows for better ones, each exchange rated by what it does, without eigenvalues of its own.

A subset lies in a corner, where F of selection/subset.py may have no gradient: with fewer rows than dimensions its
covariance C is singular. But what a change E of C does to tr C^1/2 is

    tr (C + E)^1/2 - tr C^1/2 = 1/pi  integral over s > 0 of  log [det (C + E + s^2) / det (C + s^2)]

(write the root as an integral over resolvents, and the trace of their difference as a derivative of log det). And

    det (C + s^2) = det N,    N = [M + s^2, m; m^T, 1] = s^2 [1, 0; 0, 0] + 1/k sum_i y_i y_i^T,    y_i = (z_i, 1)

with M the second moment and m the mean of the chosen z. Taking v in and giving u away is thus a change of N by two
rows, and its determinant grows by the factor (1 + v.v/k) (1 - u.u/k) + (u.v)^2 / k^2, where i.j is the product of y_i
and y_j under the inverse of N. Rows that may help are multiplied with each other once, for some twenty s. From then on
an exchange changes all products by two rows (Sherman and Morrison), and the next one is rated as well as the first.

The letters are those of selection/subset.py. a rows to give, b to take, c = a + b, n nodes s.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from nightseg.selection.limits import Limits
from nightseg.selection.rows import Rows, parts_of

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

BREADTHS: Final = (1, 2, 4)
_GIVEN, _TAKEN = 96, 192  # rows on either side that are rated as pairs, times the breadth: the best ones alone
_LEAST_GAIN: Final = 1e-5  # of F; smaller ones drown in the error of the integral

# s in units of the root of the rows' spread. The integrand is smooth in log s, so few nodes give what an exchange does
# to some 1e-5 of F.
_LOWEST, _HIGHEST, _STEP = 1e-6, 100.0, 0.8


def moments_at(rows_Nr: Rows, chosen: Indices) -> tuple[Any, Any]:
    """Mean (r,) and second moment (r, r) of the chosen rows, as tensors."""
    import torch

    mean_r = torch.zeros(rows_Nr.shape[1], dtype=torch.float64)
    second_rr = torch.zeros((len(mean_r), len(mean_r)), dtype=torch.float64)
    for part in parts_of(len(chosen)):
        block_Br = torch.from_numpy(rows_Nr[chosen[part]])
        mean_r += block_Br.sum(dim=0)
        second_rr.addmm_(block_Br.T, block_Br)
    return mean_r.div_(len(chosen)), second_rr.div_(len(chosen))


def exchanged(
    rows_Nr: Rows, distance_N: Floats, chosen: Indices, value: float, limits: Limits, breadth: int = 1
) -> Indices:
    """The chosen rows after exchanges that should lower F, the best first, until none of those tried does.

    `rows_Nr` (float64) are z, `distance_N` is |x - m2|^2, `value` is F of the chosen rows; `limits` are
    respected; `breadth` multiplies how many rows are tried. One call costs the eigenvectors of one covariance, and each
    exchange some ten milliseconds, which grow with the square of the breadth.
    """
    rated = _Rated.of(rows_Nr, distance_N, chosen, limits, breadth)
    least = _LEAST_GAIN * abs(value)
    current = chosen.copy()
    for _ in range(min(rated.is_done_ab.shape)):
        change_ab = rated.changes()
        change_ab[~limits.exchangeable(current, rated.given, rated.taken)] = np.inf
        give, take = np.unravel_index(int(change_ab.argmin()), change_ab.shape)
        if not change_ab[give, take] < -least:
            break
        current[current == rated.given[give]] = rated.taken[take]
        rated.exchange(int(give), int(take))
    return current


class _Nodes(NamedTuple):
    """Of the integral over s: s^2, and the weights of the integrand."""

    squares_n: Any
    weights_n: Any

    @classmethod
    def of(cls, spread: float) -> _Nodes:
        """Trapezoids in log s. Beyond the ends the integrand falls as s and as 1/s: two geometric series."""
        import torch

        scale = math.sqrt(max(spread, np.finfo(np.float64).tiny))
        steps = round(math.log(_HIGHEST / _LOWEST) / _STEP)
        nodes_n = scale * _LOWEST * torch.exp(_STEP * torch.arange(steps + 1, dtype=torch.float64))
        weights_n = _STEP / math.pi * nodes_n
        weights_n[[0, -1]] /= 1 - math.exp(-_STEP)
        return cls(nodes_n.square(), weights_n)


class _Rated(NamedTuple):
    """Rows that may be exchanged, and their products as the chosen rows are by now."""

    given: Indices  # (a,) chosen rows
    taken: Indices  # (b,) rows to take instead
    is_done_ab: npt.NDArray[np.bool_]
    distance_c: Any
    products_ncc: Any
    weights_n: Any
    size: int  # k

    @classmethod
    def of(cls, rows_Nr: Rows, distance_N: Floats, chosen: Indices, limits: Limits, breadth: int = 1) -> _Rated:
        import torch

        count, parts = len(chosen), parts_of(len(distance_N))
        mean_r, second_rr = moments_at(rows_Nr, chosen)
        values_r, vectors_rr = torch.linalg.eigh(second_rr - mean_r[:, None] * mean_r[None, :])
        spread_N, take_N, give_N = torch.empty((3, len(distance_N)), dtype=torch.float64)
        for part in parts:
            spread_N[part] = (torch.from_numpy(rows_Nr[part]) - mean_r).square_().sum(dim=1)
        # the median, since one row far away is no measure of the others
        nodes = _Nodes.of(float(spread_N.median() + spread_N[chosen].mean()) or float(spread_N.mean()))
        inverse_rn = 1 / (values_r.clamp(min=0)[:, None] + nodes.squares_n)
        # Which rows to try: by what giving or taking each of them alone does, were k to stay as it is.
        for part in parts:
            length_Bn = ((torch.from_numpy(rows_Nr[part]) - mean_r) @ vectors_rr).square_() @ inverse_rn + 1.0
            share_B = torch.from_numpy(distance_N[part]) / count
            take_N[part] = share_B - 2 * (_safe_log(1 + length_Bn / count) @ nodes.weights_n)
            give_N[part] = -share_B - 2 * (_safe_log(1 - length_Bn / count) @ nodes.weights_n)
        outside = np.setdiff1d(np.arange(len(distance_N)), chosen)
        given = chosen[np.argsort(give_N.numpy()[chosen], kind="stable")]
        taken = outside[np.argsort(take_N.numpy()[outside], kind="stable")]
        # Half of the rows to give are the best of their group: a full group takes only what it gives.
        given = _alternately(given, limits.by_turns(given))[: breadth * _GIVEN]
        taken = taken[limits.exchangeable(chosen, given, taken).any(axis=0)][: breadth * _TAKEN]
        both = np.concatenate([given, taken])
        rows_cr = (torch.from_numpy(rows_Nr[both]) - mean_r) @ vectors_rr
        # Seen from the mean, y_i.y_j is (z_i - m)^T (C + s^2)^-1 (z_j - m) + 1.
        products_ncc = torch.stack([(rows_cr * inverse_r) @ rows_cr.T + 1.0 for inverse_r in inverse_rn.T])
        is_done_ab = np.zeros((len(given), len(taken)), dtype=bool)
        distance_c = torch.from_numpy(distance_N[both])
        return cls(given, taken, is_done_ab, distance_c, products_ncc, nodes.weights_n, count)

    def changes(self) -> npt.NDArray[np.float64]:
        """(a, b) what exchanging one row for another does to F; infinity where one has had its turn."""
        import torch

        a, size = len(self.given), self.size
        lengths_nc = self.products_ncc.diagonal(dim1=1, dim2=2) / size
        across_nab = self.products_ncc[:, :a, a:] / size
        factor_nab = (1 - lengths_nc[:, :a, None]) * (1 + lengths_nc[:, None, a:]) + across_nab.square_()
        distance_ab = (self.distance_c[None, a:] - self.distance_c[:a, None]) / size
        change_ab = distance_ab - 2 * torch.tensordot(self.weights_n, _safe_log(factor_nab), dims=1)
        found: npt.NDArray[np.float64] = change_ab.numpy()
        found[self.is_done_ab] = np.inf
        return found

    def exchange(self, give: int, take: int) -> None:
        """One pair changes places; products and what is done are changed in place."""
        import torch

        taken = self.products_ncc[:, :, len(self.given) + take].clone()
        given = self.products_ncc[:, :, give].clone()
        share_taken_n = 1 / (self.size + taken[:, len(self.given) + take])
        given -= (share_taken_n * taken[:, give])[:, None] * taken
        share_given_n = 1 / (self.size - given[:, give])
        rows_n2c = torch.stack([taken, given], dim=1)
        shares_n12 = torch.stack([-share_taken_n, share_given_n], dim=1)[:, None, :]
        self.products_ncc.baddbmm_(rows_n2c.mT * shares_n12, rows_n2c)
        self.is_done_ab[give], self.is_done_ab[:, take] = True, True


def _alternately(first: Indices, second: Indices) -> Indices:
    """The rows of two orders of the same rows, by turns, each once."""
    both = np.stack([first, second], axis=1).ravel()
    _, places = np.unique(both, return_index=True)
    return both[np.sort(places)]


def _safe_log(factor: Any) -> Any:
    """Rounding may leave a determinant that is nearly 0 below it."""
    return factor.clamp(min=np.finfo(np.float64).eps).log()
