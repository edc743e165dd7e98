"""No gain is claimed without a control of equal steps, which is found by what it learned from and for how long."""

from __future__ import annotations

from typing import Any

import pytest

from nightseg.report.comparison import claims, control_of, differences, headline, measured, model_to_use, verdict
from nightseg.report.frame_spread import gain_spread
from nightseg.report.run import Run
from nightseg.storage import Location
from tests.report.conftest import MadeUpRun

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


def test_the_model_to_use_is_the_best_at_night() -> None:
    first = run_of(day_only=model(240, DAY, 0.25), adapted=model(480, NIGHT, 0.5), later=model(480, NIGHT, 0.4))
    assert model_to_use(first) == "adapted"
    of_day = run_of(day_only=model(240, DAY, 0.25), longer=model(480, DAY, 0.5), adapted=model(480, NIGHT, 0.3))
    assert model_to_use(of_day) == "longer"


def test_where_only_a_day_test_tells_the_model_to_use_has_learned_more_than_day() -> None:
    models = {"adapted": model(480, NIGHT, 0.3), "longer": model(480, DAY, 0.5), "released": model(480, DAY, 0.4)}
    by_day = run_of(**{name: facts | {"tests": {"val": facts["tests"]["night"]}} for name, facts in models.items()})
    assert model_to_use(by_day) == "adapted"
    untested = {"tests": {}}
    assert model_to_use(run_of(a=model(1, DAY, 0.5) | untested, b=model(2, NIGHT, 0.5) | untested)) == "b"
    assert model_to_use(run_of(a=model(1, DAY, 0.5) | untested, b=model(2, DAY, 0.5) | untested)) == "b"


def test_every_model_has_its_difference_over_start_teacher_and_control_with_an_interval(made_up_run: MadeUpRun) -> None:
    results = made_up_run.results
    models = {name: dict(facts) for name, facts in results["models"].items()}
    models["self_trained"]["start"] = "day_only"
    models["self_trained"]["self_training"] = {**models["self_trained"]["self_training"], "teacher": "day_only"}
    run = Run(made_up_run.folder, {**results, "models": models})
    found = {(one["model"], one["over"], one["test"]): one for one in differences(run)}
    assert {key: one["is"] for key, one in found.items() if key[2] == "night"} == {
        ("self_trained", "day_only", "night"): ["start", "teacher"],
        ("self_trained", "day_only_longer", "night"): ["control"],
    }
    one = found["self_trained", "day_only", "night"]
    # Over the seeds both gain 0.04 and 0.01 in the second: half of the difference of these is between the means.
    first = models["self_trained"]["tests"]["night"]["miou"] - models["day_only"]["tests"]["night"]["miou"]
    assert one["mean"] == pytest.approx(first + 0.015, abs=1e-12) and one["is_paired"] and one["seeds"] == 2
    assert one["least"] == one["std"] > 0
    spread = gain_spread(run, "self_trained", "day_only", "night")
    assert spread is not None and one["interval"] == {**spread.interval._asdict(), "units": 5, "of": "frame"}
    assert one["interval"]["low"] <= first <= one["interval"]["high"]


@pytest.mark.parametrize(
    ("mean", "least", "low", "high", "expected"),
    [
        (0.05, None, 0.01, 0.09, "holds"),  # one seed
        (0.05, 0.04, 0.01, 0.09, "holds"),
        (0.05, 0.06, 0.01, 0.09, "not decided"),  # seeds differ by more
        (0.05, 0.01, -0.01, 0.09, "not decided"),  # with other frames there may be none
        (0.05, 0.01, 0.0, 0.09, "not decided"),
        (-0.05, 0.01, -0.09, -0.01, "does not hold"),
        (-0.05, 0.06, -0.09, -0.01, "not decided"),
        (0.0, 0.0, 0.0, 0.0, "not decided"),
    ],
)
def test_what_a_difference_decides(mean: float, least: float | None, low: float, high: float, expected: str) -> None:
    found = {"mean": mean, "least": least, "interval": {"low": low, "high": high}}
    assert verdict(found) == expected


def test_without_frames_nothing_is_decided() -> None:
    assert verdict(None) == "not decided"
    run = run_of(day_only=model(240, DAY, 0.25), adapted=model(480, NIGHT, 0.5))
    found = measured(run, "adapted", "day_only", "night")
    assert (found["mean"], found["interval"], verdict(found)) == (0.25, None, "not decided")


def test_a_claim_holds_if_each_of_its_pairs_does(made_up_run: MadeUpRun) -> None:
    better, worse = ["self_trained", "day_only"], ["day_only", "self_trained"]  # 12 % of the blocks are wrong, and 45 %
    said = {
        "right": [better],
        "wrong": [worse],
        "one_wrong": [better, worse],
        "gone": [better, ["self_trained", "never_trained"]],
        "same": [["day_only", "day_only"]],
    }
    run = Run(made_up_run.folder, made_up_run.results)
    found = claims(run, {name: {"says": name, "pairs": pairs, "test": "night"} for name, pairs in said.items()})
    assert {name: claim["verdict"] for name, claim in found.items()} == {
        "right": "holds",
        "wrong": "does not hold",
        "one_wrong": "does not hold",
        "gone": "not decided",
        "same": "not decided",
    }
    assert [pair["verdict"] for pair in found["one_wrong"]["pairs"]] == ["holds", "does not hold"]
    assert found["gone"]["pairs"][1] == {"model": "self_trained", "over": "never_trained", "verdict": "not decided"}
    untested = claims(run, {"x": {"says": "x", "pairs": [better], "test": "fog"}})
    assert untested["x"]["verdict"] == "not decided"
