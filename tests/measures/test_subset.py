import numpy as np
import pytest

from nightseg.measures import subset
from nightseg.measures.frechet import frechet_distance, gaussian_of_features
from nightseg.storage import UserError


def test_pooled_is_the_frechet_distance_of_a_single_frame() -> None:
    rng = np.random.default_rng(0)
    reference, pool = rng.normal(size=(40, 5)), rng.normal(size=(6, 5)).astype(np.float32)
    got = subset.pooled_scores(pool, gaussian_of_features(reference))
    cov = np.cov(reference.T)
    for row, score in zip(pool, got, strict=True):
        assert score == pytest.approx(frechet_distance(row, np.zeros((5, 5)), reference.mean(0), cov))


def test_pooled_works_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = np.random.default_rng(1).normal(size=(25, 3))
    reference = gaussian_of_features(pool[:10])
    at_once = subset.pooled_scores(pool, reference)
    monkeypatch.setattr(subset, "_BLOCK_ROWS", 7)
    assert np.array_equal(subset.pooled_scores(pool, reference), at_once)


def test_histogram_is_the_distance_light_has_to_move() -> None:
    histograms = np.eye(5)
    assert subset.histogram_scores(histograms, histograms[0]) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    halves = np.array([[0.5, 0.5, 0, 0, 0]])
    assert subset.histogram_scores(halves, histograms[0]) == pytest.approx([0.125])


def test_random_follows_from_seed_and_name_only() -> None:
    names = [f"frame {i}" for i in range(2000)]
    one = subset.random_scores(names, seed=1)
    assert np.array_equal(one, subset.random_scores(names, seed=1))
    assert np.array_equal(one[::-1], subset.random_scores(names[::-1], seed=1))
    assert not np.array_equal(one, subset.random_scores(names, seed=2))
    assert (one >= 0).all() and (one < 1).all() and abs(one.mean() - 0.5) < 0.03 and len(set(one)) == 2000


def test_choice_is_by_score_then_by_name() -> None:
    scores = [2.0, 1.0, 1.0, 0.0, 1.0]
    assert subset.choose(scores, ["e", "d", "c", "b", "a"], 3).tolist() == [3, 4, 2]
    assert subset.choose(scores, ["e", "d", "c", "b", "a"], 5).tolist() == [3, 4, 2, 1, 0]


def test_choice_does_not_depend_on_the_order_of_the_pool() -> None:
    rng = np.random.default_rng(2)
    names, scores = [f"f{i}" for i in range(30)], rng.integers(0, 4, 30).astype(float)
    order = rng.permutation(30)
    straight = [names[i] for i in subset.choose(scores, names, 12)]
    mixed = [names[i] for i in order]
    assert [mixed[i] for i in subset.choose(scores[order], mixed, 12)] == straight


def test_more_than_the_pool_is_refused() -> None:
    with pytest.raises(UserError, match="the pool has 2 frames, 3 were asked for"):
        subset.choose([0.0, 1.0], ["a", "b"], 3)
    with pytest.raises(UserError, match="1 or more"):
        subset.choose([0.0], ["a"], 0)
    with pytest.raises(ValueError, match="finite"):
        subset.choose([0.0, float("nan")], ["a", "b"], 1)


def test_a_close_choice_beats_random_ones() -> None:
    rng = np.random.default_rng(3)
    reference = gaussian_of_features(rng.normal(size=(200, 8)))
    pool = np.concatenate([rng.normal(size=(40, 8)), rng.normal(5, 1, size=(160, 8))])
    chosen = subset.choose(subset.pooled_scores(pool, reference), [f"{i:03d}" for i in range(200)], 40)
    assert set(chosen) == set(range(40))
    drawn = list(subset.random_subset_distances(pool, reference, 40, draws=5, seed=0))
    assert len(drawn) == 5 and len(set(drawn)) == 5
    assert subset.subset_distance(pool, chosen, reference) < 0.1 * min(drawn)
    assert drawn == list(subset.random_subset_distances(pool, reference, 40, draws=5, seed=0))


def test_the_whole_pool_is_the_only_subset_of_its_size() -> None:
    pool = np.random.default_rng(4).normal(size=(12, 3))
    reference = gaussian_of_features(pool + 1)
    drawn = list(subset.random_subset_distances(pool, reference, 12, draws=3, seed=0))
    assert drawn == pytest.approx([3.0] * 3)
