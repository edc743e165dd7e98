"""Selections on the page: ranks and scores of a choice agree, chance has none; what a choice was worth."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from nightseg.report.page import write_report
from nightseg.report.run import Run
from nightseg.report.selections import is_ranking, selections

CHOICE = {"method": "pooled", "count": 160}


def with_selection(made_up_run: Any, **evidence: Any) -> dict[str, Any]:
    results = copy.deepcopy(made_up_run.results)
    results["selections"]["self_trained"]["evidence"] |= evidence
    return results


def details(results: dict[str, Any], made_up_run: Any) -> dict[str, list[str]]:
    (part,) = selections(Run(made_up_run.folder, results), 8)
    return {title: [picture.detail for picture in pictures] for title, pictures in part["groups"]}


def test_ranks_of_a_ranking_rise_with_its_scores(made_up_run: Any) -> None:
    found = details(with_selection(made_up_run), made_up_run)
    assert list(found) == ["closest", "last chosen", "first left out", "farthest"]
    assert found["closest"] == ["rank 1, score 20", "rank 2, score 21", "rank 3, score 22"]
    assert found["last chosen"] == ["rank 159, score 22", "rank 160, score 23"]
    assert found["first left out"][0].startswith("rank 161,")
    assert found["farthest"][-1].startswith("rank 307,")  # 310 in the pool, 3 of them repeat others


@pytest.mark.parametrize("method", ["fid-subset", "herding"])
def test_a_choice_of_a_set_shows_no_scores(made_up_run: Any, method: str) -> None:
    """Even where the chosen frames happen to be the first by score, their order is another."""
    results = with_selection(made_up_run, method=method)
    assert not is_ranking(results["selections"]["self_trained"]["evidence"])
    found = details(results, made_up_run)
    assert found == {"first of the choice": ["rank 1", "rank 2", "rank 3"], "some that are left out": ["", ""]}
    page = write_report(made_up_run.folder, results).read_bytes().decode()
    assert "Frames by score</b> <span" not in page and "Chosen as a set" in page


def test_limits_make_a_ranking_a_set(made_up_run: Any) -> None:
    assert "closest" not in details(with_selection(made_up_run, cut=None), made_up_run)


def test_chance_is_not_closest_or_farthest(made_up_run: Any) -> None:
    results = with_selection(made_up_run, method="random")
    assert set(details(results, made_up_run)) == {"chosen by chance", "left out by chance"}
    page = write_report(made_up_run.folder, results).read_bytes().decode()
    assert not {"Closest<", "Farthest<"} & {word for word in ("Closest<", "Farthest<") if word in page}
    assert "Chosen by chance: what a selection has to beat" in page


@pytest.mark.parametrize(
    ("select", "kind"),
    [
        ({"method": "random", "count": 160}, "random"),
        (None, "the whole pool"),
        ({"method": "random", "count": 80}, ""),  # of another number
        (CHOICE, ""),  # the same
    ],
)
def test_what_a_choice_was_worth_is_measured_by_a_model_that_differs_in_it_alone(
    made_up_run: Any, select: dict[str, Any] | None, kind: str
) -> None:
    results = copy.deepcopy(made_up_run.results)
    ours = results["models"]["self_trained"]
    other = copy.deepcopy(ours)
    other["self_training"]["select"] = select
    for scores in other["tests"].values():
        scores["seeds"] = {seed: value - 0.02 for seed, value in scores["seeds"].items()}
    results["models"]["other"] = other
    (part,) = selections(Run(made_up_run.folder, results), 2)
    assert [one.kind for one in part["worth"]] == [kind] * bool(kind)
    assert bool(part["missing"]) == (kind != "random")
    if kind:
        (one,) = part["worth"]
        assert one.gain.mean == pytest.approx(0.02) and one.spread is not None
        assert one.spread.interval == (0, 0)  # the same predictions, frame by frame
    other["loss"] = {"kind": "focal", "gamma": 2.0}
    (part,) = selections(Run(made_up_run.folder, results), 2)
    assert not part["worth"] and "self_trained_random: the same with select" in part["missing"]
