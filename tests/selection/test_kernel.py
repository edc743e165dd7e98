import numpy as np
import pytest

from nightseg.selection.kernel import herding_order, kernel_distance, kernel_width
from nightseg.selection.limits import Limits


def test_kid_of_one_draw_is_the_double_sum() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(6, 3)), rng.normal(1, 1, size=(6, 3))

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 3 + 1) ** 3)

    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    within = sum(kernel(one[i], one[j]) + kernel(two[i], two[j]) for i, j in pairs) / 30
    across = sum(kernel(x, y) for x in one for y in two) / 36
    got = kernel_distance(one, two, subsets=3)
    assert got.kid == pytest.approx(within - 2 * across)


def test_kid_is_zero_on_average_for_two_halves_of_one_set_whatever_their_size() -> None:
    rng = np.random.default_rng(1)
    found = [kernel_distance(*rng.normal(size=(2, size, 5)), subsets=1).kid for size in (8, 60) for _ in range(150)]
    for part in (found[:150], found[150:]):
        assert abs(np.mean(part)) < 3 * np.std(part) / 150**0.5


def test_kid_sees_a_shift_and_follows_from_the_seed() -> None:
    rng = np.random.default_rng(2)
    one, two = rng.normal(size=(300, 4)), rng.normal(0.7, 1, size=(200, 4))
    got = kernel_distance(one, two, rows=50, seed=3)
    assert got.kid > 5 * got.deviation / 10
    assert got == kernel_distance(one, two, rows=50, seed=3)
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance(one[:1], two)
    with pytest.raises(ValueError, match="shapes"):
        kernel_distance(one, two[:, :3])


def test_herding_is_the_greedy_minimum_of_the_kernel_distance() -> None:
    rng = np.random.default_rng(3)
    pool, reference = rng.normal(size=(12, 3)), rng.normal(0.5, 1, size=(30, 3))
    width = kernel_width(reference, pool)

    def gaussian(one: np.ndarray, two: np.ndarray, width: float) -> np.ndarray:
        return np.exp(-((one[:, None] - two[None]) ** 2).sum(axis=2) / (2 * width**2))

    def discrepancy(rows: list[int]) -> float:
        chosen = pool[rows]
        return float(gaussian(chosen, chosen, width).mean() - 2 * gaussian(chosen, reference, width).mean())

    picked, likeness = herding_order(pool, reference, 5)
    assert picked[0] == likeness.argmax()
    assert likeness == pytest.approx(gaussian(pool, reference, width).mean(axis=1))
    assert len(set(picked.tolist())) == 5
    drawn = [discrepancy(rng.choice(12, 5, replace=False).tolist()) for _ in range(30)]
    assert discrepancy(picked.tolist()) < np.median(drawn)


def test_herding_respects_limits() -> None:
    rng = np.random.default_rng(4)
    pool, reference = rng.normal(size=(12, 3)), rng.normal(size=(20, 3))
    groups, places = np.repeat([0, 1, 2], 4), np.tile(np.arange(4), 3)
    picked, _ = herding_order(pool, reference, 5, Limits(groups, places, quota=2))
    assert len(picked) == 5
    assert np.bincount(groups[picked]).max() <= 2
    apart, _ = herding_order(pool, reference, 12, Limits(groups, places, gap=3))
    for group in range(3):
        assert (np.diff(np.sort(places[apart[groups[apart] == group]])) >= 3).all()
    assert 3 <= len(apart) <= 6


def test_the_deviation_of_small_sets_is_that_of_new_sets_of_their_size() -> None:
    rng = np.random.default_rng(5)
    found = [kernel_distance(*rng.normal(size=(2, 40, 4))) for _ in range(60)]
    true = np.std([one.kid for one in found])
    assert 0.5 * true < np.mean([one.deviation for one in found]) < 2 * true


def test_herding_of_repeated_and_single_references_takes_each_row_once() -> None:
    rng = np.random.default_rng(6)
    pool = rng.normal(size=(6, 5)) * 100
    for reference in (np.repeat(pool[2:3], 8, axis=0), pool[2:3], np.vstack([pool[2:3]] * 7 + [pool[4:5]])):
        picked, _ = herding_order(pool, reference, 6)
        assert sorted(picked.tolist()) == list(range(6))
        assert picked[0] == 2
    assert herding_order(np.ones((3, 2)), np.ones((4, 2)), 3)[0].tolist() == [0, 1, 2]
