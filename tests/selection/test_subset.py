import itertools

import numpy as np
import pytest
import torch

from nightseg.selection import evidence, subset
from nightseg.selection.frechet import frechet_distance, gaussian_of_features, gaussian_of_moments
from nightseg.selection.limits import Limits
from nightseg.selection.methods import influence_scores, pooled_scores
from nightseg.selection.subset import Point, Problem
from nightseg.storage import UserError

EPS = float(np.finfo(np.float64).eps)


def test_choice_is_by_score_then_by_name() -> None:
    scores = [2.0, 1.0, 1.0, 0.0, 1.0]
    assert subset.ranking(scores, ["e", "d", "c", "b", "a"])[:3].tolist() == [3, 4, 2]
    assert subset.ranking(scores, ["e", "d", "c", "b", "a"])[:5].tolist() == [3, 4, 2, 1, 0]


def test_choice_does_not_depend_on_the_order_of_the_pool() -> None:
    rng = np.random.default_rng(2)
    names, scores = [f"f{i}" for i in range(30)], rng.integers(0, 4, 30).astype(float)
    order = rng.permutation(30)
    straight = [names[i] for i in subset.ranking(scores, names)[:12]]
    mixed = [names[i] for i in order]
    assert [mixed[i] for i in subset.ranking(scores[order], mixed)[:12]] == straight


def test_more_than_the_pool_is_refused() -> None:
    with pytest.raises(UserError, match="the pool has 2 frames, 3 were asked for"):
        subset.check_count(3, 2)
    with pytest.raises(UserError, match="1 frame or more"):
        subset.check_count(0, 1)
    with pytest.raises(ValueError, match="finite"):
        subset.ranking([0.0, float("nan")], ["a", "b"])


def test_a_close_choice_beats_random_ones() -> None:
    rng = np.random.default_rng(3)
    reference = gaussian_of_features(rng.normal(size=(200, 8)))
    pool = np.concatenate([rng.normal(size=(40, 8)), rng.normal(5, 1, size=(160, 8))])
    chosen = subset.ranking(pooled_scores(pool, reference), [f"{i:03d}" for i in range(200)])[:40]
    assert set(chosen) == set(range(40))
    drawn = list(evidence.random_subset_distances(pool, reference, 40, draws=5, seed=0))
    assert len(drawn) == 5 and len(set(drawn)) == 5
    assert evidence.subset_distance(pool, chosen, reference) < 0.1 * min(drawn)
    assert drawn == list(evidence.random_subset_distances(pool, reference, 40, draws=5, seed=0))


def test_the_whole_pool_is_the_only_subset_of_its_size() -> None:
    pool = np.random.default_rng(4).normal(size=(12, 3))
    reference = gaussian_of_features(pool + 1)
    drawn = list(evidence.random_subset_distances(pool, reference, 12, draws=3, seed=0))
    assert drawn == pytest.approx([3.0] * 3)


def weighted(problem: Problem, weights_N: np.ndarray) -> Point:
    """Any weights (N,) that sum to 1."""
    weights, rows_Nr = torch.from_numpy(weights_N), torch.from_numpy(problem.rows_Nr[:])
    second_rr = rows_Nr.T @ (rows_Nr * weights[:, None])
    return Point(float(problem.distance_N @ weights_N), weights @ rows_Nr, second_rr)


def pool_and_reference(seed: int, size: int, dims: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A pool that is only in part like the reference, and the reference's mean and covariance."""
    rng = np.random.default_rng(seed)
    reference = rng.normal(size=(20 * dims, dims)) * np.linspace(0.5, 2, dims)
    pool = rng.normal(size=(size, dims)) * np.linspace(0.8, 1.5, dims) + rng.integers(0, 3, (size, 1))
    return pool, reference.mean(axis=0), np.cov(reference.T)


def plain_fid(rows: np.ndarray, mean: np.ndarray, cov: np.ndarray) -> float:
    return frechet_distance(rows.mean(axis=0), np.cov(rows.T, bias=True), mean, cov)


@pytest.mark.parametrize(("seed", "count", "dims"), [(0, 4, 2), (1, 5, 2), (2, 6, 2), (3, 2, 2), (4, 3, 5), (5, 4, 8)])
def test_the_bound_is_below_every_subset_and_the_choice_is_near_the_best(seed: int, count: int, dims: int) -> None:
    pool, mean, cov = pool_and_reference(seed, 12, dims)
    found = subset.select_subset(pool, mean, cov, count)
    best = min(plain_fid(pool[list(rows)], mean, cov) for rows in itertools.combinations(range(12), count))
    assert found.lower_bound <= best + 1e-9
    # Of each direction that so few frames lack, rounding leaves the root of some eps of the largest.
    assert found.fid == pytest.approx(plain_fid(pool[found.indices], mean, cov), rel=4 * dims * EPS**0.5)
    assert found.fid <= 1.05 * best
    assert len(set(found.indices.tolist())) == count


@pytest.mark.parametrize(("small", "far"), [(1e-3, 0.0), (3e-4, 0.0), (1e-4, 0.0), (1e-5, 0.0), (1.0, 1e8)])
def test_the_bound_holds_where_rounding_hides_what_is_small(small: float, far: float) -> None:
    """A direction that is left out for being small, and a frame so far away that the others drown beside it."""
    rng = np.random.default_rng(4)
    pool = rng.normal(size=(12, 4)) * small
    pool[:, 0] = np.tile([1.0, -1.0], 6)
    pool[0] += far
    root = np.diag([1.0, small, small, small])

    def exact(rows: np.ndarray) -> float:
        centred = (rows - rows.mean(axis=0)) / np.sqrt(len(rows))
        roots = np.linalg.svd(centred @ root, compute_uv=False)
        return float(
            np.square(rows.mean(axis=0)).sum() + np.square(centred).sum() + np.square(root).sum() - 2 * roots.sum()
        )

    found = subset.select_subset(pool, np.zeros(4), root @ root, 6)
    best = min(exact(pool[list(rows)]) for rows in itertools.combinations(range(12), 6))
    assert found.lower_bound <= best


def test_one_frame_has_a_bound_that_is_its_distance() -> None:
    pool, mean, cov = pool_and_reference(0, 30, 4)
    found = subset.select_subset(pool, mean, cov, 1)
    nearest = np.square(pool - mean).sum(axis=1).min() + np.trace(cov)
    assert found.fid == pytest.approx(nearest) and found.lower_bound == pytest.approx(nearest)


def test_a_large_pool_is_chosen_from_to_within_a_percent_of_the_bound() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(500, 12))
    parts = rng.integers(0, 4, 600)
    pool = rng.normal(size=(600, 12)) + 2 * rng.normal(size=(4, 12))[parts]
    mean, cov = reference.mean(axis=0), np.cov(reference.T)
    seen: list[tuple[float, float]] = []
    found = subset.select_subset(pool, mean, cov, 80, watch=lambda fid, bound: seen.append((fid, bound)))
    assert 0 < found.lower_bound <= found.fid <= 1.01 * found.lower_bound
    near = gaussian_of_features(reference)
    pooled = subset.ranking(pooled_scores(pool, near), [f"{row:03d}" for row in range(600)])[:80]
    assert evidence.subset_distance(pool, found.indices, near) < evidence.subset_distance(pool, pooled, near)
    assert evidence.subset_distance(pool, found.indices, near) < min(
        evidence.random_subset_distances(pool, near, 80, draws=5, seed=0)
    )
    fids, bounds = zip(*seen, strict=True)
    assert list(fids) == sorted(fids, reverse=True)
    assert list(bounds) == sorted(bounds)


def test_a_pool_with_fewer_rows_than_dimensions() -> None:
    rng = np.random.default_rng(1)
    reference, pool = rng.normal(size=(40, 64)), rng.normal(size=(30, 64))
    mean, cov = reference.mean(axis=0), np.cov(reference.T)
    found = subset.select_subset(pool, mean, cov, 10)
    assert 0 <= found.lower_bound <= found.fid
    assert found.fid == pytest.approx(plain_fid(pool[found.indices], mean, cov), rel=4 * 64 * EPS**0.5)
    drawn = [plain_fid(pool[rng.choice(30, 10, replace=False)], mean, cov) for _ in range(20)]
    assert found.fid < min(drawn)


def test_the_whole_pool_is_its_own_certificate() -> None:
    pool, mean, cov = pool_and_reference(0, 25, 3)
    found = subset.select_subset(pool, mean, cov, 25)
    assert sorted(found.indices.tolist()) == list(range(25))
    assert found.lower_bound == pytest.approx(found.fid, rel=1e-9)


def test_identical_frames_are_a_pool_too() -> None:
    pool = np.ones((10, 3))
    found = subset.select_subset(pool, np.zeros(3), np.eye(3), 4)
    assert found.fid == pytest.approx(6.0)  # |1 - 0|^2 + tr I, no spread to match with
    assert found.lower_bound == pytest.approx(6.0)


def slopes_by_difference(problem: Problem, weights: np.ndarray, rows: int) -> list[float]:
    """How fast the value changes from `weights` towards each of the first rows."""
    step, corners = 1e-6, np.eye(len(weights))
    ends = [
        [problem.value(weighted(problem, (1 - share) * weights + share * corners[row])) for share in (step, -step)]
        for row in range(rows)
    ]
    return [(toward - away) / (2 * step) for toward, away in ends]


def test_the_gradient_is_that_of_finite_differences() -> None:
    pool, mean, cov = pool_and_reference(4, 30, 4)
    reference = gaussian_of_moments(mean, cov)
    problem = Problem.of(pool, reference, len(pool))
    weights = np.random.default_rng(0).dirichlet(np.ones(30))
    centre = weights @ pool
    spread = (pool - centre).T @ ((pool - centre) * weights[:, None])
    at, gradient = problem.gradient(weighted(problem, weights))
    assert at == pytest.approx(frechet_distance(centre, spread, mean, cov), rel=1e-9)
    slopes = slopes_by_difference(problem, weights, rows=5)
    assert slopes == pytest.approx(gradient[:5] - weights @ gradient, rel=1e-5, abs=1e-7)
    current = gaussian_of_features(pool)
    influence = influence_scores(pool, current._replace(factor=current.factor * np.sqrt(29 / 30)), reference)
    whole = problem.gradient(problem.at(np.arange(30)))[1]
    assert influence - influence[0] == pytest.approx(whole - whole[0])


def test_the_distance_is_convex_in_the_weights() -> None:
    pool, mean, cov = pool_and_reference(5, 40, 5)
    problem = Problem.of(pool, gaussian_of_moments(mean, cov), len(pool))
    rng = np.random.default_rng(0)
    for _ in range(50):
        one, two = rng.dirichlet(np.ones(40) * 0.3, 2)
        share = rng.random()
        middle = problem.value(weighted(problem, share * one + (1 - share) * two))
        ends = share * problem.value(weighted(problem, one)) + (1 - share) * problem.value(weighted(problem, two))
        assert middle <= ends + 1e-9


def test_few_frames_in_many_dimensions_have_a_closer_function() -> None:
    rng = np.random.default_rng(6)
    pool, reference = rng.normal(size=(40, 9)) * np.linspace(0.3, 2, 9), gaussian_of_features(rng.normal(size=(50, 9)))
    few, many = Problem.of(pool, reference, 5), Problem.of(pool, reference, 40)
    assert (few.rank, many.rank) == (4, 9)
    subset_of_five = few.at(rng.permutation(40)[:5])
    assert few.value(subset_of_five) == pytest.approx(many.value(subset_of_five), rel=4 * 9 * EPS**0.5)
    for _ in range(20):
        weights, other = rng.dirichlet(np.ones(40), 2)
        point = weighted(few, weights)
        value, gradient = few.gradient(point)
        assert value == pytest.approx(few.value(point), rel=1e-9)
        assert value > many.value(point)
        # No P gives less than the smallest bound, and the tangent is below the function everywhere.
        factor = rng.normal(size=(9, 9))
        positive = factor @ factor.T + 0.1 * np.eye(9)
        bound = (
            np.trace(np.linalg.solve(positive, point.covariance_rr.numpy())) + np.linalg.eigvalsh(positive)[-4:].sum()
        )
        assert value >= point.distance + few.trace - bound
        assert few.value(weighted(few, other)) >= value + gradient @ (other - weights) - 1e-9
    slopes = slopes_by_difference(few, weights, rows=5)
    assert slopes == pytest.approx(gradient[:5] - weights @ gradient, rel=1e-5, abs=1e-7)


def test_quota_and_gap_are_respected_and_the_bound_still_holds() -> None:
    pool, mean, cov = pool_and_reference(6, 60, 3)
    groups, places = np.repeat(np.arange(6), 10), np.tile(np.arange(10), 6)
    free = subset.select_subset(pool, mean, cov, 12)
    limits = Limits(groups, places, quota=3)
    under_quota = subset.select_subset(pool, mean, cov, 12, limits=limits)
    assert np.bincount(groups[under_quota.indices]).max() <= 3
    assert free.lower_bound <= under_quota.lower_bound + 1e-6 <= under_quota.fid + 2e-6
    apart = subset.select_subset(pool, mean, cov, 12, limits=limits._replace(gap=4))
    for group in range(6):
        taken = np.sort(places[apart.indices[groups[apart.indices] == group]])
        assert (np.diff(taken) >= 4).all()
    assert under_quota.lower_bound <= apart.fid + 1e-9
    with pytest.raises(UserError, match="`quota` 1 leaves room for 6 frames"):
        subset.select_subset(pool, mean, cov, 12, limits=limits._replace(quota=1))
    with pytest.raises(UserError, match="`gap` 20 leaves room for 6 frames"):
        subset.select_subset(pool, mean, cov, 12, limits=Limits(groups, places, gap=20))


def test_what_cannot_be_chosen_from_is_refused() -> None:
    pool, mean, cov = pool_and_reference(0, 5, 2)
    with pytest.raises(UserError, match="the pool has 5 frames, 6 were asked for"):
        subset.select_subset(pool, mean, cov, 6)
    with pytest.raises(ValueError, match="shape"):
        subset.select_subset(pool[:, :1], mean, cov, 2)
    with pytest.raises(ValueError, match="finite"):
        subset.select_subset(np.full((5, 2), np.nan), mean, cov, 2)
