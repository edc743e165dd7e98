import numpy as np
import pytest

from nightseg.selection import frame_scores
from nightseg.selection.frechet import frechet_distance, gaussian_of_features, gaussian_of_moments
from nightseg.storage import UserError


def test_pooled_is_the_frechet_distance_of_a_single_frame() -> None:
    rng = np.random.default_rng(0)
    reference, pool = rng.normal(size=(40, 5)), rng.normal(size=(6, 5)).astype(np.float32)
    got = frame_scores.pooled_scores(pool, gaussian_of_features(reference))
    cov = np.cov(reference.T)
    for row, score in zip(pool, got, strict=True):
        assert score == pytest.approx(frechet_distance(row, np.zeros((5, 5)), reference.mean(0), cov))


def test_pooled_works_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = np.random.default_rng(1).normal(size=(25, 3))
    reference = gaussian_of_features(pool[:10])
    at_once = frame_scores.pooled_scores(pool, reference)
    monkeypatch.setattr(frame_scores, "_BLOCK_ROWS", 7)
    assert np.array_equal(frame_scores.pooled_scores(pool, reference), at_once)


def test_histogram_is_the_distance_light_has_to_move() -> None:
    histograms = np.eye(5)
    assert frame_scores.histogram_scores(histograms, histograms[0]) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    halves = np.array([[0.5, 0.5, 0, 0, 0]])
    assert frame_scores.histogram_scores(halves, histograms[0]) == pytest.approx([0.125])


def test_random_follows_from_seed_and_name_only() -> None:
    names = [f"frame {i}" for i in range(2000)]
    one = frame_scores.random_scores(names, seed=1)
    assert np.array_equal(one, frame_scores.random_scores(names, seed=1))
    assert np.array_equal(one[::-1], frame_scores.random_scores(names[::-1], seed=1))
    assert not np.array_equal(one, frame_scores.random_scores(names, seed=2))
    assert (one >= 0).all() and (one < 1).all() and abs(one.mean() - 0.5) < 0.03 and len(set(one)) == 2000


def test_mahalanobis_of_a_well_known_covariance() -> None:
    reference = gaussian_of_moments([1.0, 0.0], np.diag([4.0, 1.0]))
    pool = np.array([[1.0, 0.0], [3.0, 0.0], [1.0, 2.0]])
    many = frame_scores.mahalanobis_scores(pool, reference, reference_count=10**9)
    assert many == pytest.approx([0, 1, 4], rel=1e-6)


def test_mahalanobis_of_a_singular_covariance_is_shrunk() -> None:
    rng = np.random.default_rng(0)
    reference = gaussian_of_features(rng.normal(size=(5, 20)))
    got = frame_scores.mahalanobis_scores(rng.normal(size=(7, 20)), reference, 5)
    assert np.isfinite(got).all()
    assert (got > 0).all()
    assert 0 < frame_scores.shrinkage(reference, 5) <= 1
    with pytest.raises(UserError, match="without a spread"):
        frame_scores.mahalanobis_scores(np.zeros((1, 3)), gaussian_of_features(np.ones((4, 3))), 4)


def test_shrinkage_is_small_for_many_samples_and_whole_for_a_sphere() -> None:
    rng = np.random.default_rng(0)
    uneven = gaussian_of_features(rng.normal(size=(2000, 6)) * np.array([1, 2, 3, 4, 5, 6]))
    assert frame_scores.shrinkage(uneven, 2000) < 0.01
    assert frame_scores.shrinkage(gaussian_of_moments(np.zeros(6), np.eye(6)), 10) == 1.0


def test_influence_prefers_what_the_set_lacks() -> None:
    reference = gaussian_of_moments([0.0, 0.0], np.eye(2))
    narrow = gaussian_of_moments([0.0, 0.0], np.diag([1.0, 0.01]))
    wide, same = [0.0, 1.0], [1.0, 0.0]
    lacking, held = frame_scores.influence_scores([wide, same], narrow, reference)
    assert lacking == pytest.approx(1 - 10)
    assert held == pytest.approx(1 - 1)


def test_spatial_is_the_distance_of_the_positions() -> None:
    rng = np.random.default_rng(0)
    everywhere = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6))
    maps = rng.normal(size=(3, 16, 6))
    mean, cov = everywhere.mean(axis=0), np.cov(everywhere.T)
    got, error = frame_scores.spatial_scores(maps, frame_scores.spatial_reference(mean, cov))
    for positions, score in zip(maps, got, strict=True):
        assert score == pytest.approx(frechet_distance(positions.mean(axis=0), np.cov(positions.T), mean, cov))
    assert error.tolist() == [0, 0, 0]


def test_spatial_with_fewer_directions_is_larger_by_no_more_than_its_bound() -> None:
    rng = np.random.default_rng(1)
    everywhere = rng.normal(size=(600, 30)) * np.linspace(0.05, 3, 30)
    mean, cov = everywhere.mean(axis=0), np.cov(everywhere.T)
    maps = rng.normal(size=(5, 9, 30))
    exact, _ = frame_scores.spatial_scores(maps, frame_scores.spatial_reference(mean, cov))
    fast, error = frame_scores.spatial_scores(maps, frame_scores.spatial_reference(mean, cov, rank=20))
    assert ((fast >= exact - 1e-9) & (fast <= exact + error)).all()
    assert (error > 0).all()
    with pytest.raises(ValueError, match="P >= 2"):
        frame_scores.spatial_scores(maps[:, :1], frame_scores.spatial_reference(mean, cov))
