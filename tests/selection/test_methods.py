import inspect

import numpy as np
import pytest

from nightseg.selection import methods
from nightseg.selection.frechet import frechet_distance, gaussian_of_features, gaussian_of_moments
from nightseg.selection.limits import Limits
from nightseg.selection.methods import herding_order, kernel_width
from nightseg.selection.settings import METHODS, Selection
from nightseg.storage import UserError


def test_every_method_of_the_list_has_its_function() -> None:
    found = {
        name.replace("_", "-")
        for name, function in inspect.getmembers(methods, inspect.isfunction)
        if list(inspect.signature(function).parameters) == ["request"] and name != "choose"
    }
    assert found == set(METHODS)
    with pytest.raises(ValueError, match="'heridng' is not allowed, did you mean 'herding'"):
        Selection(method="heridng", count=1)


def test_pooled_is_the_frechet_distance_of_a_single_frame() -> None:
    rng = np.random.default_rng(0)
    reference, pool = rng.normal(size=(40, 5)), rng.normal(size=(6, 5)).astype(np.float32)
    got = methods.pooled_scores(pool, gaussian_of_features(reference))
    cov = np.cov(reference.T)
    for row, score in zip(pool, got, strict=True):
        assert score == pytest.approx(frechet_distance(row, np.zeros((5, 5)), reference.mean(0), cov))


def test_pooled_works_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = np.random.default_rng(1).normal(size=(25, 3))
    reference = gaussian_of_features(pool[:10])
    at_once = methods.pooled_scores(pool, reference)
    monkeypatch.setattr("nightseg.selection.rows.BLOCK_ROWS", 7)
    assert np.array_equal(methods.pooled_scores(pool, reference), at_once)


def test_histogram_is_the_distance_light_has_to_move() -> None:
    histograms = np.eye(5)
    assert methods.histogram_scores(histograms, histograms[0]) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    halves = np.array([[0.5, 0.5, 0, 0, 0]])
    assert methods.histogram_scores(halves, histograms[0]) == pytest.approx([0.125])


def test_random_follows_from_seed_and_name_only() -> None:
    names = [f"frame {i}" for i in range(2000)]
    one = methods.random_scores(names, seed=1)
    assert np.array_equal(one, methods.random_scores(names, seed=1))
    assert np.array_equal(one[::-1], methods.random_scores(names[::-1], seed=1))
    assert not np.array_equal(one, methods.random_scores(names, seed=2))
    assert (one >= 0).all() and (one < 1).all() and abs(one.mean() - 0.5) < 0.03 and len(set(one)) == 2000


def test_mahalanobis_of_a_well_known_covariance() -> None:
    reference = gaussian_of_moments([1.0, 0.0], np.diag([4.0, 1.0]))
    pool = np.array([[1.0, 0.0], [3.0, 0.0], [1.0, 2.0]])
    many = methods.mahalanobis_scores(pool, reference, reference_count=10**9)
    assert many == pytest.approx([0, 1, 4], rel=1e-6)


def test_mahalanobis_of_a_singular_covariance_is_shrunk() -> None:
    rng = np.random.default_rng(0)
    reference = gaussian_of_features(rng.normal(size=(5, 20)))
    got = methods.mahalanobis_scores(rng.normal(size=(7, 20)), reference, 5)
    assert np.isfinite(got).all()
    assert (got > 0).all()
    assert 0 < methods.shrinkage(reference, 5) <= 1
    with pytest.raises(UserError, match="without a spread"):
        methods.mahalanobis_scores(np.zeros((1, 3)), gaussian_of_features(np.ones((4, 3))), 4)


def test_shrinkage_is_small_for_many_samples_and_whole_for_a_sphere() -> None:
    rng = np.random.default_rng(0)
    uneven = gaussian_of_features(rng.normal(size=(2000, 6)) * np.array([1, 2, 3, 4, 5, 6]))
    assert methods.shrinkage(uneven, 2000) < 0.01
    assert methods.shrinkage(gaussian_of_moments(np.zeros(6), np.eye(6)), 10) == 1.0


def test_influence_prefers_what_the_set_lacks() -> None:
    reference = gaussian_of_moments([0.0, 0.0], np.eye(2))
    narrow = gaussian_of_moments([0.0, 0.0], np.diag([1.0, 0.01]))
    wide, same = [0.0, 1.0], [1.0, 0.0]
    lacking, held = methods.influence_scores([wide, same], narrow, reference)
    assert lacking == pytest.approx(1 - 10)
    assert held == pytest.approx(1 - 1)


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


def test_herding_of_repeated_and_single_references_takes_each_row_once() -> None:
    rng = np.random.default_rng(6)
    pool = rng.normal(size=(6, 5)) * 100
    for reference in (np.repeat(pool[2:3], 8, axis=0), pool[2:3], np.vstack([pool[2:3]] * 7 + [pool[4:5]])):
        picked, _ = herding_order(pool, reference, 6)
        assert sorted(picked.tolist()) == list(range(6))
        assert picked[0] == 2
    assert herding_order(np.ones((3, 2)), np.ones((4, 2)), 3)[0].tolist() == [0, 1, 2]
