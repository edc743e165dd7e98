"""Warm-up and decay at the steps where their values are known."""

from __future__ import annotations

from typing import Any

import pytest

from nightseg.segmenter.schedule import Schedule, cosine_decay, linear_warmup, poly_decay, step_decay

KINDS: list[dict[str, Any]] = [{"decay": "poly"}, {"decay": "cosine"}, {"decay": "step", "at": (0.5, 0.9)}]


def test_warmup_is_linear_and_ends_at_one() -> None:
    assert linear_warmup(0, 100) == pytest.approx(1e-3)
    assert linear_warmup(50, 100) == pytest.approx(0.5005)
    assert linear_warmup(100, 100) == 1
    assert linear_warmup(10_000, 100) == 1
    assert linear_warmup(0, 0) == 1


def test_poly_decay_with_power_one_is_a_line_and_never_reaches_zero() -> None:
    assert [poly_decay(step, 4, 1.0) for step in range(4)] == [1, 0.75, 0.5, 0.25]
    assert poly_decay(50, 100, 0.9) == pytest.approx(0.5**0.9)
    assert poly_decay(3, 4, 0.0) == 1


def test_cosine_decay_is_half_a_cosine() -> None:
    assert [cosine_decay(step, 6) for step in (0, 2, 3, 4)] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert 0 < cosine_decay(999, 1000) < 1e-5


def test_step_decay_falls_where_detectron2_does() -> None:
    """STEPS (60000, 80000) of MAX_ITER 90000, GAMMA 0.1."""
    shares = [step_decay(step, 90_000, (2 / 3, 8 / 9), 0.1) for step in (0, 59_999, 60_000, 79_999, 80_000, 89_999)]
    assert shares == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("kind", KINDS)
def test_learning_rate_rises_then_falls_once(kind: dict[str, Any]) -> None:
    schedule = Schedule(peak=0.01, total_steps=200, warmup_steps=20, **kind)
    rates = [schedule.learning_rate(step) for step in range(200)]
    top = rates.index(max(rates))
    assert 19 <= top <= 20
    assert rates[0] == pytest.approx(1e-5, rel=1e-2)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[-1] <= 1.01e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_rate_is_a_function_of_the_step_alone(kind: dict[str, Any]) -> None:
    schedule = Schedule(peak=0.3, total_steps=50, warmup_steps=5, **kind)
    forward = [schedule.learning_rate(step) for step in range(50)]
    assert forward[::-1] == [Schedule(0.3, 50, 5, **kind).learning_rate(step) for step in reversed(range(50))]
