import itertools
from collections.abc import Sequence
from typing import NamedTuple

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
    monkeypatch.setattr("nightseg.selection.rows.BLOCK_ROWS", 6)
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


# -- against the definition, by trying everything --------------------------------------------------------------------


class Case(NamedTuple):
    """Seven frames in up to three drives."""

    limits: Limits
    order: list[int]

    def fits(self, rows: Sequence[int]) -> bool:
        groups, places, quota, gap = self.limits
        assert groups is not None and places is not None
        pairs = [(a, b) for a, b in itertools.combinations(rows, 2) if groups[a] == groups[b]]
        most = max((sum(groups[row] == groups[other] for other in rows) for row in rows), default=0)
        apart = gap is None or all(abs(places[a] - places[b]) >= gap for a, b in pairs)
        return apart and (quota is None or most <= quota)

    def greedy(self) -> list[int]:
        taken: list[int] = []
        for row in self.order:
            if self.fits([*taken, row]):
                taken.append(row)
        return taken


@pytest.mark.parametrize("draw", range(6))
@pytest.mark.parametrize("quota", [None, 1, 2, 3])
@pytest.mark.parametrize("gap", [None, 1, 2, 3])
def test_limits_are_what_they_say(quota: int | None, gap: int | None, draw: int) -> None:
    rng = np.random.default_rng(draw)
    case = Case(Limits(rng.integers(0, 3, 7), rng.permutation(7), quota, gap), rng.permutation(7).tolist())
    limits, free = case.limits, case.limits.quota is None and case.limits.gap is None
    subsets = [rows for size in range(8) for rows in itertools.combinations(range(7), size) if case.fits(rows)]
    room = max(map(len, subsets))
    assert limits.room() == (None if free else room)
    for count in range(1, 8):
        assert limits.first(case.order, count).tolist() == case.greedy()[:count]
        if count > room:
            with pytest.raises(UserError, match=f"room for {room} frames"):
                limits.check(count)
            continue
        limits.check(count)
        filled = limits.filled(case.order, count).tolist()
        assert len(filled) == count and case.fits(filled)
        assert filled == [row for row in case.order if row in filled]
        if len(case.greedy()) >= count:
            assert filled == case.greedy()[:count]
    picked: list[int] = []
    closed: set[int] = set()
    for row in case.greedy():
        picked.append(row)
        now = set(limits.closed_by(picked).tolist())
        gone = {other for other in range(7) if other in picked or not case.fits([*picked, other])}
        assert row in now <= gone
        closed |= now
        assert closed == gone
    groups = limits.groups
    assert groups is not None
    turn = {
        row: sum(groups[other] == groups[row] for other in case.order[:place]) for place, row in enumerate(case.order)
    }
    by_turns = limits.by_turns(np.array(case.order)).tolist()
    assert by_turns == (case.order if free else sorted(case.order, key=turn.__getitem__))
    assert limits.without_gap() == limits._replace(gap=None)
