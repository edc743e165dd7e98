"""Trainings on the page: rates, steps, data, shares of the classes, curves; the spread over frames beside scores."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from nightseg.metrics.bootstrap import DRAWS, drawn_miou, interval
from nightseg.report.frame_spread import gain_spread, miou_spread
from nightseg.report.page import matrix, write_report
from nightseg.report.run import Run
from nightseg.report.trainings import trainings
from tests.report.conftest import CLASSES

HISTORY = [
    {"epoch": 1, "steps": 10, "loss": 2.0, "validation": {"miou": 0.25}},
    {"epoch": 2, "steps": 10, "loss": 1.0},
    {"epoch": 3, "steps": 10, "loss": 0.5, "validation": {"miou": 0.5}},
]


@pytest.fixture
def results(made_up_run: Any) -> dict[str, Any]:
    """The made-up run, whose day_only has a history, rates and counted labels."""
    attempt = made_up_run.attempt("train_segmenter", "watched")
    (attempt.folder / "history.json").write_json(HISTORY)
    kept = {"steps": 30, "kept": {"epoch": 3, "miou": 0.5}}
    commit = attempt.finish(rows_in=5, rows_out=5, outputs=["history.json"], summary=kept, seconds=90.0)
    found = copy.deepcopy(made_up_run.results)
    found["commits"]["train_segmenter/watched"] = made_up_run.facts(commit) | {"summary": kept}
    model = found["models"]["day_only"]
    rates = {"optimizer": "adamw", "learning_rate": 0.003, "decay": "poly", "warmup_steps": 5, "epochs": 3, "batch": 8}
    model |= {"model": "train_segmenter/watched", "training": rates, "validate_on": ["val"]}
    shares = [0.75, 0.25, *[0.0] * 9]
    found["frames"] = {"day": {"what": "day frames", "frames": 48, "class_pixels": [3, 1, *[0] * 9], "shares": shares}}
    return found


def test_what_a_model_learned_from_and_how_is_in_a_row(made_up_run: Any, results: dict[str, Any]) -> None:
    found = trainings(Run(made_up_run.folder, results))
    assert found is not None
    row = next(row for row in found["rows"] if row["name"] == "day_only")
    assert row["data"] == [("day", 48, None)] and (row["steps"], row["epochs"], row["batch"]) == (30, 3, 8)
    assert (row["rate"], row["how"]) == (0.003, "adamw, poly, 5 steps of warm-up")
    assert row["kept"] == "best of validation on val, epoch 3" and row["seconds"] == 90.0
    _, drawn = next(one for one in found["curves"] if one[0] == "day_only")
    assert [title for title, _ in drawn] == ["loss", "mIoU on val, %"]
    assert [len(chart.dots) for _, chart in drawn] == [3, 2]
    page = write_report(made_up_run.folder, results).read_bytes().decode()
    assert "best of validation on val, epoch 3" in page and "adamw, poly, 5 steps of warm-up" in page


def test_shares_of_the_classes_are_by_name(made_up_run: Any, results: dict[str, Any]) -> None:
    """Of labels, of pseudo-labels as far as kept (results.json sorts its keys), of the test sets."""
    by_class = results["pseudo_labels"]["self_trained"]["evidence"]["by_class"]
    results["pseudo_labels"]["self_trained"]["evidence"]["by_class"] = dict(sorted(by_class.items()))
    found = trainings(Run(made_up_run.folder, results))
    assert found is not None
    shares = found["shares"]
    assert shares["columns"] == ["day", "pseudo-labels of self_trained", "test: night", "test: day"]
    rows = {name: values for name, _, values in shares["rows"]}
    assert rows["sky"][0] == 0.75 and list(rows) == list(CLASSES.classes)
    kept = {name: facts["kept"] for name, facts in by_class.items()}
    assert rows["road"][1] == pytest.approx(kept["road"] / sum(kept.values()))
    assert np.sum([*rows.values()], axis=0) == pytest.approx(1.0)


def test_the_matrix_has_all_confusions(made_up_run: Any) -> None:
    rows = matrix(Run(made_up_run.folder, made_up_run.results), "day_only", "night")
    counts = np.array(made_up_run.results["models"]["day_only"]["tests"]["night"]["confusion"])
    assert [pixels for *_, pixels in rows] == counts.sum(axis=1).tolist()
    assert rows[3][2] == pytest.approx((counts[3] / counts[3].sum()).tolist())
    assert rows[1][2] == [None] * 11  # no building is labelled


def test_intervals_are_drawn_from_the_frames_of_a_test_set(made_up_run: Any) -> None:
    run = Run(made_up_run.folder, made_up_run.results)
    rows = sorted(run.predictions("day_only", "night"), key=lambda row: row["frame_id"])
    counts = np.array([row["confusion"] for row in rows]).reshape(-1, 11, 11)
    found = miou_spread(run, "day_only", "night")
    assert found is not None and (found.units, found.of) == (5, "frame")
    assert found.interval == pytest.approx(interval(drawn_miou(counts, draws=DRAWS)))
    pair = gain_spread(run, "self_trained", "day_only", "night")
    back = gain_spread(run, "day_only", "self_trained", "night")
    assert pair is not None and back is not None
    assert pair.interval == pytest.approx((-back.interval.high, -back.interval.low))


def test_without_the_frames_there_is_no_interval(made_up_run: Any) -> None:
    results = copy.deepcopy(made_up_run.results)
    for facts in results["commits"].values():
        facts["folder"] = "/gone/stages/x/y/0123456789ab/attempt-1"
    assert miou_spread(Run(made_up_run.folder.parent, results), "day_only", "night") is None
