import itertools

import numpy as np
import pytest

from nightseg.selection.exchange import _Rated, exchanged
from nightseg.selection.frechet import gaussian_of_features, gaussian_of_moments
from nightseg.selection.limits import NO_LIMITS, Limits
from nightseg.selection.subset import Problem


def problem_of(size: int, dims: int, count: int, seed: int = 0) -> Problem:
    """A pool with a steep spectrum, beside its reference."""
    rng = np.random.default_rng(seed)
    scale = np.arange(1, dims + 1) ** -1.0
    reference = gaussian_of_features(rng.normal(size=(5 * dims, dims)) * scale)
    return Problem.of(rng.normal(0.4, 1.0, size=(size, dims)) * scale, reference, count)


def swapped(chosen: np.ndarray, out: int, into: int) -> np.ndarray:
    return np.where(chosen == out, into, chosen)


def improved(problem: Problem, chosen: np.ndarray, limits: Limits) -> np.ndarray:
    return exchanged(problem.rows_Nr, problem.distance_N, chosen, problem.value(problem.at(chosen)), limits)


@pytest.mark.parametrize(("count", "dims"), [(12, 4), (6, 16), (1, 5), (2, 3), (30, 8)])
def test_every_exchange_is_rated_as_what_it_does_before_and_after_others(count: int, dims: int) -> None:
    problem = problem_of(60, dims, count)
    chosen = np.arange(0, 60, 60 // count)[:count]
    rated = _Rated.of(problem.rows_Nr, problem.distance_N, chosen, NO_LIMITS)
    for _ in range(min(3, count)):  # the second and third from updated products
        before = problem.value(problem.at(chosen))
        found = rated.changes()
        pairs = list(itertools.product(range(len(rated.given)), range(len(rated.taken))))
        live = [pair for pair in pairs if not rated.is_done_ab[pair]]
        exact = [
            problem.value(problem.at(swapped(chosen, rated.given[give], rated.taken[take]))) - before
            for give, take in live
        ]
        assert [found[pair] for pair in live] == pytest.approx(exact, rel=2e-3, abs=2e-4 * float(np.abs(exact).max()))
        assert all(found[pair] == np.inf for pair in set(pairs) - set(live))
        give, take = live[int(np.argmin(exact))]
        chosen = swapped(chosen, rated.given[give], rated.taken[take])
        rated.exchange(give, take)


def test_no_single_exchange_is_better_in_the_end() -> None:
    problem, chosen = problem_of(40, 6, 10), np.arange(10)
    first = problem.value(problem.at(chosen))
    while (better := improved(problem, chosen, NO_LIMITS)).tolist() != chosen.tolist():
        assert problem.value(problem.at(better)) < problem.value(problem.at(chosen))
        assert len(set(better.tolist())) == 10
        chosen = better
    last = problem.value(problem.at(chosen))
    assert last < 0.8 * first
    outside = np.setdiff1d(np.arange(40), chosen)
    tried = [problem.value(problem.at(swapped(chosen, out, into))) for out in chosen for into in outside]
    assert min(tried) > last * (1 - 1e-4)


def test_exchanges_respect_quota_and_gap() -> None:
    problem = problem_of(60, 6, 12)
    limits = Limits(groups=np.arange(60) // 15, places=np.arange(60) % 15, quota=3, gap=3)
    chosen = limits.first(np.arange(60), 12)
    better = improved(problem, chosen, limits)
    assert problem.value(problem.at(better)) < problem.value(problem.at(chosen))
    assert sorted(limits.first(better, 12).tolist()) == sorted(better.tolist())
    free = improved(problem, chosen, NO_LIMITS)
    assert len(limits.first(free, 12)) < 12  # the limits were in the way


@pytest.mark.parametrize("limits", [{"quota": 3}, {"gap": 2}, {"quota": 4, "gap": 2}, {}])
def test_what_may_be_exchanged_is_what_would_fit(limits: dict[str, int]) -> None:
    rng = np.random.default_rng(1)
    rules = Limits(groups=rng.integers(0, 3, 30), places=rng.permutation(30), **limits)
    chosen = rules.first(rng.permutation(30), 9)
    outside = np.setdiff1d(np.arange(30), chosen)
    allowed = rules.exchangeable(chosen, chosen, outside)
    for (row, out), (column, into) in itertools.product(enumerate(chosen), enumerate(outside)):
        assert allowed[row, column] == (len(rules.first(swapped(chosen, out, into), 9)) == 9)
    assert bool(limits) != allowed.all()


def test_rows_without_spread_are_exchanged_by_distance_alone() -> None:
    rows = np.zeros((5, 2))
    problem = Problem.of(rows, gaussian_of_features(np.zeros((4, 2))), 2)
    problem = problem._replace(distance_N=np.array([3.0, 1, 4, 1, 5]))
    assert problem.dims == 0
    assert sorted(improved(problem, np.array([0, 2]), NO_LIMITS).tolist()) == [1, 3]


def test_a_full_group_still_exchanges_within_itself() -> None:
    """More rows of full groups wait outside than are looked at, and the best to give are of other groups."""
    rng = np.random.default_rng(0)
    near, far = rng.normal(0, 0.8, (600, 6)), rng.normal(1, 1.6, (300, 6))
    limits = Limits(groups=np.repeat([0, 1, 2], [600, 150, 150]), quota=200)
    problem = Problem.of(np.concatenate([near, far]), gaussian_of_moments(np.zeros(6), np.eye(6)), 500)
    chosen = np.concatenate([np.arange(200), np.arange(600, 900)])
    better = improved(problem, chosen, limits)
    assert problem.value(problem.at(better)) < 0.99 * problem.value(problem.at(chosen))
    assert len(limits.first(better, 500)) == 500
