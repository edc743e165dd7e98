"""What counts as a discriminator that teaches nothing, and how long it must last."""

from __future__ import annotations

import math

import pytest

from nightseg.unit.collapse import ailing, collapsed, not_finite

COIN = 1.5  # least squares, three scales


def row(iteration: int, **changes: float) -> dict[str, float]:
    healthy = {"discriminator_day": 0.4, "discriminator_night": 0.5}
    healthy |= {"discriminator_gap_day": 0.2, "discriminator_gap_night": 0.1}
    return {"iteration": iteration, **healthy, **changes}


def test_terms_that_are_no_numbers_are_named() -> None:
    assert not_finite(row(1)) == []
    assert not_finite(row(1, discriminator_day=math.nan, discriminator_gap_night=math.inf)) == [
        "discriminator_day",
        "discriminator_gap_night",
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"discriminator_day": COIN, "discriminator_night": COIN}, None),  # cannot tell: where the game may end
        ({"discriminator_day": 0.0016}, None),
        ({"discriminator_day": 0.0014}, "day discriminator has won"),
        ({"discriminator_night": 0.0014}, "night discriminator has won"),
        ({"discriminator_gap_night": 2e-4}, None),
        ({"discriminator_gap_night": 5e-5, "discriminator_night": COIN}, "night discriminator is dead"),
    ],
)
def test_ailments(changes: dict[str, float], words: str | None) -> None:
    found = ailing(row(100, **changes), COIN)
    assert found is None if words is None else found is not None and words in found


def test_an_ailment_must_last() -> None:
    ill = {"discriminator_day": 1e-4}
    rows = [row(iteration, **ill) for iteration in range(100, 1001, 100)]
    assert collapsed(rows[:-1], lasting=1000, coin=COIN) is None  # not yet a thousand iterations
    found = collapsed(rows, lasting=1000, coin=COIN)
    assert found is not None and "day discriminator has won" in found and "last 1000 iterations" in found
    assert collapsed([*rows[:4], row(500), *rows[5:]], lasting=1000, coin=COIN) is None  # it recovered in between
    late = [row(100), *(row(iteration, **ill) for iteration in range(200, 1101, 100))]
    assert collapsed(late, lasting=1000, coin=COIN) is not None
    assert collapsed(late, lasting=1100, coin=COIN) is None
    assert collapsed([], lasting=1, coin=COIN) is None


def test_two_ailments_by_turns_are_no_collapse() -> None:
    rows = [row(10, discriminator_day=1e-4), row(20, discriminator_gap_night=0.0)]
    assert collapsed(rows, lasting=20, coin=COIN) is None
    assert collapsed(rows, lasting=10, coin=COIN) is not None
