"""Scores that are known to follow from one value, from two, from none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nightseg.pipeline.search.importance import explained, groups, importance
from tests.small_search import ALPHA, COUNT, GAMMA, search_of


def rows_of(values: list[dict[str, Any]], scores: list[float]) -> list[dict[str, Any]]:
    return [{"values": one, "end": "done", "miou": score} for one, score in zip(values, scores, strict=True)]


def drawn(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {ALPHA: float(rng.uniform()), GAMMA: float(rng.uniform(0, 4)), COUNT: int(rng.choice([60, 120, 180]))}
        for _ in range(count)
    ]


def test_epsilon_squared_of_an_example_by_hand() -> None:
    """Groups 1, 3 and 5, 7: means 2 and 6 around 4. Total 20, within 4 over 2 degrees: 1 - 2 * 3 / 20."""
    assert explained(np.array([0, 0, 1, 1]), np.array([1.0, 3.0, 5.0, 7.0])) == pytest.approx(0.7)
    assert explained(np.array([0, 1, 0, 1]), np.array([1.0, 1.0, 3.0, 3.0])) == 0.0
    assert explained(np.arange(4), np.arange(4.0)) == 0.0  # every trial a group of its own


def test_the_value_that_decides_is_first_and_others_explain_nothing() -> None:
    values = drawn(12)
    shares = importance(search_of(), rows_of(values, [float(one[COUNT] == 120) for one in values]))
    assert next(iter(shares)) == COUNT and shares[COUNT] == pytest.approx(1.0)
    shares = importance(search_of(), rows_of(values, [one[GAMMA] for one in values]))
    assert next(iter(shares)) == GAMMA and shares[GAMMA] > 0.7 > 0.3 > max(shares[ALPHA], shares[COUNT])


def test_chance_explains_nothing_on_average() -> None:
    """Without the correction three groups of twelve scores at random would explain 2 / 11 of them."""
    rng = np.random.default_rng(0)
    signed = [_signed(rng.normal(size=12)) for _ in range(2000)]
    # The mean of 2,000 values whose standard deviation is some 0.16: six of its own deviations.
    assert abs(float(np.mean(signed))) < 6 * 0.16 / 2000**0.5


def _signed(scores: Any) -> float:
    """Epsilon squared before it is cut at 0."""
    parts = scores.reshape(3, 4)
    within = ((parts - parts.mean(axis=1, keepdims=True)) ** 2).sum() / 9
    value = float(1 - within * 11 / ((scores - scores.mean()) ** 2).sum())
    assert explained(np.repeat(np.arange(3), 4), scores) == pytest.approx(max(0.0, value))
    return value


def test_groups_keep_equal_values_together() -> None:
    assert groups(["a", "b", "a", "c", "d"]).tolist() == [0, 1, 0, 2, 3]
    assert groups([True, False, True]).tolist() == [1, 0, 1]
    assert len(set(groups([1, "1", True, "True"]))) == 4
    for values in (
        [1, 2, 2, 2, 2, 3, 4, 5, 9],
        [1, 2, 3, 4] + 10 * [9],
        [8, 16, 32, 64, 64, 64, 8, 16, 64, 64, 32, 64],
    ):
        found, mirrored = groups(values), groups([-value for value in values])
        assert [len({*found[np.array(values) == value]}) for value in set(values)] == [1] * len(set(values))
        assert (found == 2 - mirrored).all() and len(set(found)) > 1


def test_a_value_that_decides_alone_is_seen_however_often_it_was_tried() -> None:
    """As a sampler leaves it: most trials at the best value, which is the highest."""
    values = [1, 2, 3, 4] + 10 * [9]
    assert explained(groups(values), np.array([0.4] * 4 + [0.6] * 10)) == pytest.approx(1.0)
    tried = [8, 16, 32, 64, 64, 64, 8, 16, 64, 64, 32, 64]
    assert explained(groups(tried), np.array([0.5 if one == 64 else 0.3 for one in tried])) == pytest.approx(1.0)


def test_too_few_trials_and_trials_that_are_alike_have_none() -> None:
    values = drawn(9)
    assert importance(search_of(), rows_of(values[:5], [1.0, 2.0, 3.0, 4.0, 5.0])) == {}
    assert importance(search_of(), rows_of(values, [0.5] * 9)) == {}
    failed = [row | {"end": "failed", "miou": None} for row in rows_of(values, [1.0] * 9)]
    assert importance(search_of(), failed) == {}
