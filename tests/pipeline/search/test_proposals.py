"""What is proposed follows from the search, the number and the trials before; nothing is proposed twice."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from nightseg.pipeline.search.proposals import propose, study
from nightseg.pipeline.search.settings import Search
from tests.small_search import ALPHA, COUNT, GAMMA, row, search_of

Rows = list[dict[str, Any]]
LOG = "training.learning_rate"


def rows_of(search: Search, score: Callable[[dict[str, Any]], float], count: int) -> Rows:
    """A search one trial after the other."""
    rows: Rows = []
    for number in range(1, count + 1):
        values = propose(search, number, rows)
        if values is None:
            break
        rows.append(row(number, values, score(values)))
    return rows


def bowl(values: dict[str, Any]) -> float:
    """Highest, 1, at alpha 0.3 and gamma 3; the count does not matter."""
    return 1 - (values[ALPHA] - 0.3) ** 2 - (values[GAMMA] - 3) ** 2 / 16


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_same_records_and_number_propose_the_same(sampler: str) -> None:
    search = search_of(f"sampler={sampler}")
    rows = rows_of(search, bowl, 12)
    assert rows_of(search, bowl, 12) == rows
    for cut in (0, 3, 9, 11):  # after a kill: the trials from then on are the same
        assert propose(search, cut + 1, rows[:cut]) == rows[cut]["values"]
    assert propose(search_of(f"sampler={sampler}", "seed=1"), 1, []) != rows[0]["values"]
    assert propose(search, 2, rows[:1]) != propose(search, 3, rows[:1])


def test_values_lie_in_the_space_as_they_are_shown() -> None:
    space = f"space={{{ALPHA}: {{uniform: [0, 1]}}, {LOG}: {{log_uniform: [1e-4, 1e-2]}}, a.b: {{integer: [1, 9]}}, " \
            f"a.c: {{log_integer: [1, 900]}}, a.d: {{choice: [x, y]}}}}"  # fmt: skip
    search = search_of(space)
    rows = rows_of(search, lambda values: values[ALPHA], 30)
    assert len(rows) == 30 and all(search.holds(one["values"]) for one in rows)
    for key, kind in ((ALPHA, float), (LOG, float), ("a.b", int), ("a.c", int), ("a.d", str)):
        assert {type(one["values"][key]) for one in rows} == {kind}
    assert all(float(f"{one['values'][key]:.4g}") == one["values"][key] for one in rows for key in (ALPHA, LOG))
    low = sum(one["values"][LOG] < 1e-3 for one in rows)
    assert 5 <= low <= 25  # half of a logarithmic range, where a uniform one would hold a tenth: 3 of 30


@pytest.mark.parametrize(
    "range",
    [
        "uniform: [0.999, 0.9999]",
        "uniform: [0.9995, 0.99999]",
        "uniform: [-0.9999, -0.999]",
        "uniform: [100000, 100050]",
        "log_uniform: [100000, 100050]",
        "log_uniform: [0.9995, 0.99999]",
    ],
)
def test_a_narrow_range_has_as_many_values_as_a_wide_one(range: str) -> None:
    search = search_of("sampler=random", f"space={{{ALPHA}: {{{range}}}}}", "trials=200")
    rows = rows_of(search, lambda values: values[ALPHA], 200)
    assert len(rows) == 200 and all(search.holds(one["values"]) for one in rows)
    assert len({search.label(one["values"]) for one in rows}) == 200
    assert max(len(repr(one["values"][ALPHA])) for one in rows) <= 10  # short decimals all the same


@pytest.mark.parametrize("range", ["uniform: [0, 1]", "uniform: [0.2, 0.3]", "uniform: [0, 10]", "uniform: [-1, 1]"])
def test_a_wide_range_has_four_digits(range: str) -> None:
    rows = rows_of(search_of("sampler=random", f"space={{{ALPHA}: {{{range}}}}}"), lambda values: 0.0, 100)
    values = [one["values"][ALPHA] for one in rows]
    assert [float(f"{value:.4g}") for value in values] == values and len(values) == 100


@pytest.mark.parametrize("mode", ["max", "min"])
def test_tpe_goes_where_the_score_is_best(mode: str) -> None:
    """Trials after those at random lie in the best quarter of alpha, by their mean; by chance it would be the half."""
    search = search_of(f"mode={mode}", f"space={{{ALPHA}: {{uniform: [0, 1]}}}}")
    rows = rows_of(search, lambda values: values[ALPHA], 30)
    later = [one["values"][ALPHA] for one in rows[10:]]
    mean = sum(later) / len(later)
    assert mean > 0.75 if mode == "max" else mean < 0.25


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_all_of_a_small_space_is_tried_once(sampler: str) -> None:
    search = search_of(
        f"sampler={sampler}", f"space={{{COUNT}: {{choice: [60, 120, 180]}}, a.b: {{integer: [1, 2]}}}}", "trials=99"
    )
    rows = rows_of(search, lambda values: float(values[COUNT]), 99)
    assert len(rows) == 6
    assert {tuple(one["values"].values()) for one in rows} == set(itertools.product((60, 120, 180), (1, 2)))


def test_the_order_of_a_grid_is_mixed_and_follows_from_the_seed() -> None:
    space = f"space={{{COUNT}: {{choice: [1, 2, 3, 4]}}, a.b: {{choice: [1, 2, 3, 4]}}}}"
    orders = [
        [tuple(one["values"].values()) for one in rows_of(search_of("sampler=grid", f"seed={seed}", space), sum_of, 99)]
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])  # else a few trials would all have the first value


def sum_of(values: dict[str, Any]) -> float:
    return float(sum(values.values()))


def test_optuna_is_told_how_each_trial_ended() -> None:
    values = {ALPHA: 0.5, GAMMA: 1.0, COUNT: 60}
    rows = [
        row(1, values, 0.3),
        row(2, values, 0.2, "stopped"),
        row(3, values, None, "failed"),
        row(4, values, None, end=None),
    ]
    known = study(search_of("mode=min"), rows).trials
    assert [trial.state.name for trial in known] == ["COMPLETE", "PRUNED", "FAIL", "RUNNING"]
    assert known[0].value == 0.3 and known[1].intermediate_values == {1: 0.1, 3: 0.2}
    assert study(search_of("mode=min"), rows).direction.name == "MINIMIZE"
    assert study(search_of(), rows).direction.name == "MAXIMIZE"
