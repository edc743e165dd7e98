"""What helped: models grouped by what they add, beside their controls, by class and by seed; what teachers saw."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from nightseg.report.ablation import ablation
from nightseg.report.page import write_report
from nightseg.report.run import Run
from nightseg.storage import Location
from tests.report.conftest import CLASSES
from tests.report.test_comparison import DAY, NIGHT

TAUGHT = NIGHT | {"pool": True}
OFFLINE = {"pool": "night", "teacher": "x", "mode": "offline", "select": None, "threshold": {"kind": "fixed"}}
ONLINE = OFFLINE | {"mode": "online", "online": {"mix": "classmix", "guard": {"act": "ignore", "range": [0.5, 2.0]}}}
BOTH = {"train": ["day", "made"], "weights": {"day": 2.0, "made": 1.0, "(pseudo-labels)": 1.0}}
CHOSEN = OFFLINE | {"select": {"method": "random", "count": 5}}


def model(
    *miou: float, learned: dict[str, Any] = NIGHT, sky: float | None = None, steps: int = 480, **more: Any
) -> dict[str, Any]:
    """Of these mIoU by seed; the sky has the same IoU, or `sky`, all other classes have none."""
    seeds = {str(seed): value for seed, value in enumerate(miou)}
    iou = {name: None for name in CLASSES.classes}

    def scores(value: float) -> dict[str, Any]:
        return {"miou": value, "iou": iou | {"sky": value if sky is None else sky}, "frames": 1, "confusion": []}

    mean = sum(miou) / len(miou)
    trainings = {seed: {"seed": int(seed), "tests": {"night": scores(value)}} for seed, value in seeds.items()}
    return {
        "about": "", "line": [], "root": "imagenet", "steps_in_all": steps, "frames_in_all": 8 * steps, "model": "",
        "network": {"encoder": "resnet18"}, "loss": {"kind": "focal"}, "training": {"batch": 8, "epochs": steps},
        "train": ["day"], "self_training": None, "learned": learned, "trainings": trainings,
        "tests": {"night": scores(miou[0]) | {"seeds": seeds, "mean": scores(mean), "std": {"miou": 0.01}, "node": ""}},
        **more,
    }  # fmt: skip


def run_of(models: dict[str, dict[str, Any]], commits: dict[str, Any] | None = None, **more: Any) -> Run:
    dates = {f"train_segmenter/{name}": {"created": f"{place:02d}"} for place, name in enumerate(models)}
    classes = {"name": "camvid11", "classes": CLASSES.classes, "palette": CLASSES.palette, "encodings": {}}
    results = {"models": models, "commits": dates | (commits or {}), "taxonomy": classes, "pseudo_labels": {}, **more}
    return Run(Location.of("/nowhere"), results)


MODELS = {
    "day_only": model(0.2, 0.2, learned=DAY, steps=240),
    "longer": model(0.25, 0.3125, learned=DAY, line=["day_only", "longer"]),
    "by_optics": model(0.5, 0.5, **BOTH, line=["day_only", "by_optics"]),
    "taught": model(0.4, learned=TAUGHT, **BOTH, self_training=OFFLINE),
    "random": model(0.6, learned=TAUGHT, **BOTH, self_training=CHOSEN),
    "online": model(0.5, learned=TAUGHT, **BOTH, self_training=ONLINE),
    "bare": model(0.1, 0.2, sky=0.0, learned=TAUGHT, **BOTH, about="no guard",
                  self_training=ONLINE | {"online": ONLINE["online"] | {"guard": None}}),
    "focal": model(0.3, loss={"kind": "combined"}, **BOTH),
}  # fmt: skip


def test_models_are_grouped_by_what_they_add_to_the_most_similar_earlier_one() -> None:
    found = ablation(run_of(MODELS), 2)
    assert found is not None
    shown = {row.name: (group, row.adds) for group, rows in found["groups"] for row in rows}
    assert shown == {
        "day_only": ("Labelled day frames alone", ""),
        "longer": ("Labelled day frames alone", "over day_only: trained for longer"),
        "by_optics": ("Labelled frames under night light", "over day_only: day: 1 → 2, + made"),
        "focal": ("Labelled frames under night light", "over by_optics: loss kind: focal → combined"),
        "taught": ("Self-training, in rounds", "over by_optics: + self-training on night (offline)"),
        "online": ("Self-training, online", "over taught: mode: offline → online, online: none → on"),
        "random": ("Selection of frames", "over taught: select: none → random"),
        "bare": ("Thresholds and guards", "over online: online guard: on → none"),
    }
    assert [row.about for _, rows in found["groups"] for row in rows if row.name == "bare"] == ["no guard"]


def test_gains_are_over_the_control_with_their_spread_and_by_class() -> None:
    found = ablation(run_of(MODELS), 2)
    assert found is not None and found["has_control"] and found["control"] == "longer" and found["best"] == "random"
    rows = {row.name: row for _, rows in found["groups"] for row in rows}
    assert rows["day_only"].control is rows["longer"].control is rows["longer"].gain is None
    gain = rows["by_optics"].gain
    # 50 - 25 and 50 - 31.25 points: 21.875 on average, 6.25 / sqrt(2) apart.
    assert gain == (pytest.approx(0.21875), pytest.approx(0.0625 / 2**0.5), True)
    assert rows["by_optics"].steps == 480 and rows["by_optics"].num_seeds == 2
    assert dict(rows["bare"].classes)["sky"] == pytest.approx(-0.28125)
    assert dict(rows["bare"].classes)["car"] is None
    (sky,) = found["by_class"]  # no other class has an IoU
    assert (sky["name"], sky["before"], sky["after"]) == ("sky", 0.28125, 0.6)


def test_without_a_control_there_is_no_gain() -> None:
    found = ablation(run_of({name: MODELS[name] for name in ("day_only", "by_optics")}), 2)
    assert found is not None and not found["has_control"] and found["by_class"] == []
    assert all(row.gain is None for _, rows in found["groups"] for row in rows)
    assert ablation(run_of({"day_only": MODELS["day_only"]}), 2) is None
    old = copy.deepcopy(MODELS)
    del old["longer"]["steps_in_all"]
    assert ablation(run_of(old), 2) is None


def test_rounds_show_how_the_share_of_each_class_changes() -> None:
    def evidence(teacher: str, sky: int, road: int) -> dict[str, Any]:
        by_class = {name: {"predicted": 0} for name in CLASSES.classes} | {
            "sky": {"predicted": sky}, "road": {"predicted": road}
        }  # fmt: skip
        return {"node": "", "evidence": {"teacher": {"name": teacher}, "by_class": by_class}}

    labels = {"m.1": evidence("day_only", 40, 60), "m.2": evidence("m.1", 15, 85), "m": evidence("m.2", 30, 70)}
    models = {name: copy.deepcopy(MODELS["taught"]) for name in ("m.1", "m.2", "m")}
    found = ablation(run_of({"day_only": MODELS["day_only"], **models}, pseudo_labels=labels), 2)
    assert found is not None
    (part,) = found["shares"]
    assert (part["title"], part["unit"], part["limits"]) == ("m", "round", (0.5, 1.5))
    sky, road = part["charts"]
    assert (sky[0], sky[3], road[0], road[3]) == ("sky", True, "road", False)  # 15 is below half of 40; 85 not above 90
    assert sky[2].dots[1].y == sky[2].y(15) and sky[2].bars[0].y == sky[2].y(60)
    assert set(part["rare"]) == set(CLASSES.classes) - {"sky", "road"}


def test_an_online_teacher_is_shown_by_epoch_within_the_limits_of_its_guard(made_up_run: Any) -> None:
    shares = [{"sky": 0.5, "road": 0.5}, {"sky": 0.3, "road": 0.7}]
    online = copy.deepcopy(MODELS["online"]) | {"self_training": ONLINE | {"online": {"guard": {"range": [0.7, 1.6]}}}}
    nodes = {}
    for name, warning in (("o", "the sky grows"), ("o.seed1", "the road grows")):
        history: list[dict[str, Any]] = [{"epoch": 1, "teacher": None}]
        history += [{"epoch": 2 + n, "teacher": {"shares": s, "warnings": [warning]}} for n, s in enumerate(shares)]
        attempt = made_up_run.workspace.stage("train_segmenter", name, version=1, recipe={}, inputs={}, seed=0).open()
        (attempt.folder / "history.json").write_json(history)
        commit = attempt.finish(rows_in=1, rows_out=1, seconds=1.0, outputs=["history.json"])
        nodes[f"train_segmenter/{name}"] = made_up_run.facts(commit)
        seed = int(name == "o.seed1")
        online["trainings"][name] = online["trainings"]["0"] | {"seed": seed, "model": f"train_segmenter/{name}"}
    del online["trainings"]["0"]
    run = run_of({"day_only": MODELS["day_only"], "o": online | {"model": "train_segmenter/o"}}, nodes)
    run.folder = made_up_run.folder
    found = ablation(run, 2)
    assert found is not None
    (part,) = found["shares"]
    assert (part["title"], part["unit"], part["limits"]) == ("o", "epoch", [0.7, 1.6])
    assert part["warnings"] == ["the sky grows", "o.seed1: the road grows"]
    assert [(name, is_outside) for name, _, _, is_outside in part["charts"]] == [("sky", True), ("road", False)]
    assert [tick.text for tick in part["charts"][0][2].x_ticks] == ["2", "3"]


def test_the_page_holds_the_figures(made_up_run: Any) -> None:
    run = Run(made_up_run.folder, made_up_run.results)
    found = ablation(run, 3)
    assert found is not None
    text = write_report(made_up_run.folder, made_up_run.results, samples=3).read_bytes().decode()
    section = text[text.index('<section id="helped">') : text.index('<section id="classes">')]
    row = next(row for _, rows in found["groups"] for row in rows if row.name == "self_trained")
    assert row.gain is not None
    assert f"+{100 * row.gain.mean:.1f} ± 2.1" in section and "Self-training, in rounds" in section
    assert section.count("<svg") == 1 + len(made_up_run.results["models"])  # the axis, and a row each
    sky = next(part for part in found["by_class"] if part["name"] == "sky")
    assert f"{100 * sky['before']:.1f} &rarr; <b>{100 * sky['after']:.1f}</b>" in section
    assert "Worst frames of self_trained" in section and section.count("<img") == 3 * 4


def test_scores_without_labels_stand_from_the_best_model_to_the_worst() -> None:
    models = {
        name: facts | {"consistency": {"confidence": place / 10}} for place, (name, facts) in enumerate(MODELS.items())
    }
    ranks = {"night": {"models": len(models), "spearman": {"confidence": 0.25}}}
    found = ablation(run_of(models, consistency={"dataset": "pool", "ranks": ranks}), 2)
    assert found is not None
    part = found["consistency"]
    assert (part["dataset"], part["spearman"]) == ("pool", {"confidence": 0.25})
    assert [row[0] for row in part["rows"]][::7] == ["random", "bare"]
    ranks["night"]["models"] = 3  # too few
    found = ablation(run_of(models, consistency={"dataset": "pool", "ranks": ranks}), 2)
    assert found is not None and found["consistency"] is None
