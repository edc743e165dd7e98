"""What a search may say: dimensions, samplers, names."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from nightseg.pipeline.search.settings import Dimension
from nightseg.recipe import RecipeError
from tests.small_search import ALPHA, COUNT, search_of


@pytest.mark.parametrize(
    ("given", "edges", "size"),
    [
        ({"uniform": [0.0, 1.0]}, [0.0, 1.0], float("inf")),
        ({"log_uniform": [1e-5, 0.1]}, [1e-5, 0.1], float("inf")),
        ({"integer": [2, 5]}, [2, 5], 4),
        ({"log_integer": [1, 1000]}, [1, 1000], 1000),
        ({"choice": [60, 120, 180]}, [60, 120, 180], 3),
        ({"choice": ["focal", "combined"]}, ["focal", "combined"], 2),
        ({"choice": [True, 1]}, [True, 1], 2),
    ],
)
def test_a_dimension_is_a_range_or_a_list(given: dict[str, Any], edges: list[Any], size: float) -> None:
    made = Dimension.model_validate_json(json.dumps(given))
    assert made.edges() == edges and made.size == size
    assert all(made.holds(value) for value in edges)
    if size < 10:
        assert [made.value(index) for index in range(int(size))] == (edges if made.choice else [2, 3, 4, 5])


@pytest.mark.parametrize(
    ("given", "others"),
    [
        ({"uniform": [0, 1]}, [-0.1, 1.1, "0.5", True]),
        ({"integer": [1, 3]}, [0, 4, 2.0, True]),
        ({"choice": [1, 2]}, [True, 1.0, 3]),
    ],
)
def test_what_a_dimension_does_not_hold(given: dict[str, Any], others: list[Any]) -> None:
    made = Dimension.model_validate_json(json.dumps(given))
    assert not any(made.holds(value) for value in others)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{}", "exactly one of uniform, log_uniform, integer, log_integer, choice"),
        ('{"uniform": [0, 1], "choice": [1, 2]}', "exactly one of"),
        ('{"uniform": [1, 0]}', "begins at 1 and ends at 0; the end must be larger"),
        ('{"integer": [3, 3]}', "begins at 3 and ends at 3"),
        ('{"uniform": [0.9999999, 0.9999998]}', "begins at 0.9999999 and ends at 0.9999998"),
        ('{"integer": [0.5, 3]}', "valid integer"),
        ('{"log_uniform": [0, 1]}', "greater than 0"),
        ('{"log_integer": [0, 9]}', "greater than or equal to 1"),
        ('{"choice": [1]}', "at least 2"),
        ('{"choice": [1, 2, 1]}', "twice"),
        ('{"range": [0, 1]}', "not permitted"),
    ],
)
def test_what_is_no_dimension_is_refused(given: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Dimension.model_validate_json(given)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampler=grid", f"give {ALPHA}, models.adapted.loss.gamma as choice or integer"),
        ("sampler=best", "sampler"),
        ("metric=mIoU", "'mIoU' is not allowed, did you mean 'miou'\\?; allowed: miou, pa, ca, fwiou, iou.CLASS"),
        ("metric=iou.", "'iou.' is not allowed, did you mean 'iou.CLASS'\\?; allowed: miou, "),
        ("metric=IoU.road", "'IoU.road' is not allowed, did you mean 'iou.road'\\?"),
        ("metric=zebra", "metric: 'zebra' is not allowed; allowed: miou, pa"),
        ("sampler=TPE", "did you mean 'tpe'"),
        ("hours=0", "greater than 0"),
        ("seeds=[1, 1]", "the seeds must differ"),
        ("mode=high", "mode"),
    ],
)
def test_wrong_words_are_refused(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        search_of(override)


def test_an_endless_grid_is_refused() -> None:
    with pytest.raises(RecipeError, match="1e\\+06 combinations, more than 10000"):
        search_of("sampler=grid", f"space={{{COUNT}: {{integer: [1, 1000000]}}}}")


def test_trials_are_called_by_what_was_searched() -> None:
    search = search_of()
    values = {ALPHA: 0.123456, "models.adapted.loss.gamma": 2.0, COUNT: 120}
    assert search.label(values) == "alpha=0.123456, gamma=2, count=120"
    assert search.label(values | {ALPHA: 1e-5}) == "alpha=1e-05, gamma=2, count=120"
    near = search_of("space={a.b: {choice: [0.99995, 0.99999]}}")
    assert [near.label({"a.b": value}) for value in (0.99995, 0.99999)] == ["b=0.99995", "b=0.99999"]
    both = search_of("space={models.a.loss.alpha: {uniform: [0, 1]}, models.b.loss.alpha: {uniform: [0, 1]}}")
    assert list(both.short.values()) == ["a.loss.alpha", "b.loss.alpha"]


def test_seeds_of_a_search_are_those_of_its_model() -> None:
    assert search_of("seeds=[1, 2]").overrides[-1] == "models.adapted.seeds=[1, 2]"
