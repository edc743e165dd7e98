"""No gain is claimed without a control of equal steps, which is found by what it learned from and for how long."""

from __future__ import annotations

from typing import Any

import pytest

from nightseg.report.comparison import control_of, headline, model_to_use
from nightseg.report.run import Run
from nightseg.storage import Location

DAY = {"domains": ["day"], "translated": False, "pool": False, "day_only": True}
NIGHT = {"domains": ["day", "night"], "translated": True, "pool": False, "day_only": False}


def model(steps: int, learned: dict[str, Any], *miou: float, batch: int = 8, **more: Any) -> dict[str, Any]:
    seeds = {str(seed): value for seed, value in enumerate(miou)}
    mean = sum(miou) / len(miou)
    std = None if len(miou) == 1 else (sum((value - mean) ** 2 for value in miou) / (len(miou) - 1)) ** 0.5
    scores = {"miou": miou[0], "seeds": seeds, "mean": {"miou": mean}, "std": {"miou": std}, "node": ""}
    return {
        "steps_in_all": steps, "frames_in_all": steps * batch, "network": {"encoder": "resnet18"}, "root": "imagenet",
        "train": ["day"], "learned": learned, "tests": {"night": scores}, **more,
    }  # fmt: skip


def run_of(**models: dict[str, Any]) -> Run:
    dates = {f"train_segmenter/{name}": {"created": f"{place:02d}"} for place, name in enumerate(models)}
    return Run(Location.of("/nowhere"), {"models": models, "commits": dates})


def test_a_gain_stands_beside_its_control_with_the_spread_of_its_differences() -> None:
    run = run_of(
        day_only=model(240, DAY, 0.25, 0.3125),
        other=model(480, DAY, 0.375, 0.4375),  # found by its facts, not by its name
        adapted=model(480, NIGHT, 0.5, 0.625),
    )
    found = headline(run)
    assert found is not None and found.gain is not None
    assert (found.best, found.miou, found.num_seeds, found.control) == ("adapted", 0.5625, 2, "other")
    # Seed by seed 12.5 and 18.75 points: 15.6 on average, 6.25 / sqrt(2) = 4.4 apart; 12.5 / sqrt(2) = 8.8.
    assert str(found) == (
        "adapted reaches 56.2 ± 8.8 % mIoU on night (2 seeds), +15.6 ± 4.4 points over other, its control of equal "
        "steps: labelled day frames alone (480 steps in all, adapted: 480)"
    )


@pytest.mark.parametrize(
    ("control", "is_one"),
    [
        (model(471, DAY, 0.25), True),  # 471 / 480: within two percent
        (model(470, DAY, 0.25), False),
        (model(960, DAY, 0.25), True),
        (model(480, DAY, 0.25, batch=4), False),  # half of the frames
        (model(480, NIGHT, 0.25), False),
        (model(480, DAY | {"day_only": False, "domains": ["day", "unknown"]}, 0.25), False),
        (model(480, DAY, 0.25, root="scratch"), False),
        (model(480, DAY, 0.25, network={"encoder": "resnet50"}), False),
        (model(480, DAY, 0.25) | {"tests": {}}, False),
    ],
)
def test_a_control_is_known_by_its_facts(control: dict[str, Any], is_one: bool) -> None:
    run = run_of(day_only_longer=control, adapted=model(480, NIGHT, 0.5))
    assert control_of(run, "adapted", "night") == ("day_only_longer" if is_one else None)
    found = headline(run)
    assert found is not None and (found.gain is not None) == is_one
    assert ("points" in str(found)) == is_one


def test_of_several_controls_the_one_with_the_nearest_steps_and_then_the_best_is_taken() -> None:
    run = run_of(
        a=model(900, DAY, 0.4), b=model(500, DAY, 0.3), c=model(500, DAY, 0.35), d=model(100, DAY, 0.2),
        adapted=model(480, NIGHT, 0.5),
    )  # fmt: skip
    assert control_of(run, "adapted", "night") == "c"


def test_without_a_control_the_figure_stands_alone_with_what_is_missing() -> None:
    run = run_of(day_only=model(240, DAY, 0.25), adapted=model(600, NIGHT, 0.5))
    assert str(headline(run)) == (
        "adapted reaches 50.0 % mIoU on night (1 seed); no control of equal steps: what of it is longer training is "
        "not known; add a model day_only_longer: {train: [day], start: day_only, training: ...} with 360 steps"
    )
    alone = str(headline(run_of(adapted=model(600, NIGHT, 0.5))))
    assert "points" not in alone and "add a model day_only_longer that learns from the labelled day frames" in alone


def test_a_control_whose_frames_have_no_domain_is_pointed_at() -> None:
    unknown = DAY | {"day_only": False, "domains": ["day", "unknown"]}
    text = str(headline(run_of(plain=model(480, unknown, 0.25), adapted=model(480, NIGHT, 0.5))))
    assert text.endswith("not known; if plain learned from day frames alone, give its datasets `domain: day`")
    short = str(headline(run_of(plain=model(240, unknown, 0.25), adapted=model(480, NIGHT, 0.5))))
    assert "add a model day_only_longer" in short


def test_a_model_of_day_alone_that_is_best_claims_nothing() -> None:
    longer = run_of(day_only=model(240, DAY, 0.25), longer=model(480, DAY, 0.5), adapted=model(480, NIGHT, 0.3))
    assert str(headline(longer)) == (
        "longer reaches 50.0 % mIoU on night (1 seed); it learned from labelled day frames alone, and no other model "
        "of this run is better there"
    )


def test_results_of_an_earlier_version_claim_nothing() -> None:
    old = {"tests": {"night": {"miou": 0.5, "node": ""}}, "train": ["day"]}
    found = headline(run_of(day_only=old, adapted={**old, "tests": {"night": {"miou": 0.75, "node": ""}}}))
    assert found is not None and found.gain is None and "adapted reaches 75.0 % mIoU on night (1 seed)" in str(found)


def test_the_model_to_use_is_one_for_the_night() -> None:
    """The best; where that is one of the day alone, as by a day test, the last of the recipe."""
    first = run_of(day_only=model(240, DAY, 0.25), adapted=model(480, NIGHT, 0.5), later=model(480, NIGHT, 0.4))
    assert model_to_use(first) == "adapted"
    by_day = run_of(day_only=model(240, DAY, 0.25), longer=model(480, DAY, 0.5), adapted=model(480, NIGHT, 0.3))
    assert model_to_use(by_day) == "adapted"
    untested = {"tests": {}}
    assert model_to_use(run_of(a=model(1, DAY, 0.5) | untested, b=model(2, NIGHT, 0.5) | untested)) == "b"
