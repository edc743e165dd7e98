import numpy as np
import pytest

from nightseg.selection.limits import Limits, near_duplicates
from nightseg.storage import UserError

GROUPS = np.array([0, 0, 0, 1, 1, 2])
PLACES = np.array([0, 1, 2, 0, 1, 0])


def test_no_limit_takes_the_first() -> None:
    assert Limits().first([3, 1, 2], 2).tolist() == [3, 1]
    assert Limits(GROUPS, PLACES).first([3, 1, 2], 2).tolist() == [3, 1]
    Limits().check(100)


def test_quota_takes_the_first_of_each_group() -> None:
    limits = Limits(GROUPS, PLACES, quota=1)
    assert limits.first([2, 1, 0, 4, 3, 5], 6).tolist() == [2, 4, 5]
    assert limits.first([2, 1, 0, 4, 3, 5], 2).tolist() == [2, 4]
    with pytest.raises(UserError, match="leaves room for 3 frames of the pool, 4 were asked for"):
        limits.check(4)


def test_gap_keeps_neighbours_apart_within_a_drive_only() -> None:
    limits = Limits(GROUPS, PLACES, gap=2)
    assert limits.first([1, 0, 2, 3, 4, 5], 6).tolist() == [1, 3, 5]
    assert limits.first([0, 1, 2, 4, 3, 5], 6).tolist() == [0, 2, 4, 5]
    assert limits._replace(quota=1).first([0, 1, 2, 4, 3, 5], 6).tolist() == [0, 4, 5]


def test_quota_alone_agrees_with_the_walk_that_the_gap_needs() -> None:
    rng = np.random.default_rng(0)
    groups, places = rng.integers(0, 5, 40), rng.permutation(40)
    order = rng.permutation(40)
    fast = Limits(groups, places, quota=3).first(order, 12)
    walked = Limits(groups, places, quota=3, gap=0).first(order, 12)
    assert fast.tolist() == walked.tolist()


def test_near_duplicates_point_to_the_frame_they_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 16))
    rows[20] = 3 * rows[4]
    rows[41] = rows[4] + 1e-4 * rng.normal(size=16)
    rows[7] = rows[6] + 1e-4
    want = np.full(50, -1)
    want[[20, 41, 7]] = [4, 4, 6]
    assert near_duplicates(rows, 0.99).tolist() == want.tolist()
    monkeypatch.setattr("nightseg.selection.limits._BLOCK_ROWS", 6)
    assert near_duplicates(rows, 0.99).tolist() == want.tolist()
    assert near_duplicates(np.empty((0, 4)), 0.9).tolist() == []


def test_a_choice_that_fits_is_found_even_if_the_best_frame_is_in_the_way() -> None:
    limits = Limits(np.zeros(5, int), np.arange(5), gap=2)
    limits.check(3)
    assert limits.first([1, 0, 2, 3, 4], 3).tolist() == [1, 3]
    assert limits.filled([1, 0, 2, 3, 4], 3).tolist() == [0, 2, 4]
    assert limits.filled([1, 0, 2, 3, 4], 2).tolist() == [1, 3]
    with pytest.raises(UserError, match="`gap` 2 leaves room for 3 frames of the pool, 4 were asked for"):
        limits.check(4)
    both = Limits(np.array([0, 0, 0, 0, 0, 1]), np.array([0, 1, 2, 3, 4, 0]), quota=2, gap=2)
    assert both.room() == 3
    assert both.filled([2, 1, 3, 0, 4, 5], 3).tolist() == [2, 0, 5]


def test_copies_are_found_at_a_cosine_of_one() -> None:
    rows = np.random.default_rng(1).normal(size=(40, 1280)).astype(np.float32)
    assert (near_duplicates(np.vstack([rows, rows]), 1.0)[40:] == np.arange(40)).all()


def test_turns_take_one_of_each_group_before_the_second() -> None:
    limits = Limits(groups=np.array([0, 0, 0, 1, 1, 2]), quota=9)
    assert limits.by_turns(np.array([2, 0, 3, 5, 1, 4])).tolist() == [2, 3, 5, 0, 4, 1]
    assert Limits().by_turns(np.array([2, 0, 1])).tolist() == [2, 0, 1]
