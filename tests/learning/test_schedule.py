"""Warm-up and decay at the steps where their values are known."""

from __future__ import annotations

import pytest

from nightseg.learning.schedule import learning_rate, linear_warmup, poly_decay


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


def test_learning_rate_rises_then_falls_once() -> None:
    rates = [learning_rate(s, peak=0.01, total_steps=200, warmup_steps=20, power=0.9) for s in range(200)]
    top = rates.index(max(rates))
    assert 19 <= top <= 20
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[-1] < 1e-4
