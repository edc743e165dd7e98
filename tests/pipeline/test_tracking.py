"""What MLflow and W&B are told of a finished run, by stand-ins: neither is installed with nightseg."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nightseg.errors import UserError
from nightseg.pipeline.tracking import check_trackers, track, track_search
from nightseg.report import Run
from nightseg.storage import Location

RESULTS = {
    "recipe": "small",
    "models": {
        "m": {"tests": {"night": {"miou": 0.4, "mean": {"miou": 0.5, "pa": 0.9, "ca": None}}}, "model": "train/m"}
    },
    "commits": {},
}
HISTORY = [
    {"epoch": 1, "steps": 10, "loss": 2.0, "validation": {"miou": 0.25}},
    {"epoch": 2, "steps": 10, "loss": 1.0},
]
SCORES = {"m/night/miou": 0.5, "m/night/pa": 0.9}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Location:
    (tmp_path / "recipe.yaml").write_text("name: small\nseed: 3\ntaxonomy: camvid11\ndatasets: {}\n")
    (tmp_path / "report.html").write_text("the report")
    monkeypatch.setattr(Run, "history", lambda self, node: HISTORY if node == "train/m" else [])
    return Location.of(tmp_path)


def test_mlflow_gets_scores_curves_and_files(folder: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    stand_in = SimpleNamespace(
        start_run=lambda run_name: nullcontext(told.append(run_name)),
        log_params=told.append,
        set_tag=lambda key, value: told.append((key, value)),
        log_metrics=lambda values, step=None: told.append((step, values)),
        log_artifact=lambda file: told.append((Path(file).name, Path(file).read_text()[:10])),
    )
    monkeypatch.setitem(sys.modules, "mlflow", stand_in)
    check_trackers(["mlflow"])
    track(["mlflow"], folder, RESULTS)
    assert told == [
        "small",
        {"name": "small", "seed": 3, "taxonomy": "camvid11"},
        ("run_dir", folder.uri),
        (None, SCORES),
        (10, {"m/loss": 2.0, "m/validation_miou": 0.25}),
        (20, {"m/loss": 1.0}),
        ("recipe.yaml", "name: smal"),
        ("report.html", "the report"),
    ]


def test_wandb_gets_the_same_and_is_finished(folder: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    logged = SimpleNamespace(
        define_metric=lambda name, step_metric: told.append((name, step_metric)),
        log=told.append,
        summary={},
        log_artifact=lambda artifact: told.append("artifact"),
        finish=lambda: told.append("finished"),
    )
    stand_in = SimpleNamespace(
        init=lambda project, name, config: (told.append((project, name, config["seed"], config["run_dir"])), logged)[1],
        Artifact=lambda name, type: SimpleNamespace(add_file=lambda file: told.append(Path(file).name)),
    )
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    track(["wandb"], folder, RESULTS)
    assert logged.summary == SCORES
    assert told == [
        ("nightseg", "small", 3, folder.uri),
        ("m/*", "m/step"),
        {"m/step": 10, "m/loss": 2.0, "m/validation_miou": 0.25},
        {"m/step": 20, "m/loss": 1.0},
        "recipe.yaml",
        "report.html",
        "artifact",
        "finished",
    ]


def test_a_tracker_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb cannot be imported here .*pip install wandb \(or the extra `wandb`"):
        check_trackers(["wandb"])
    with pytest.raises(UserError, match="unknown 'mlfow', did you mean 'mlflow'"):
        check_trackers(["mlfow"])
    check_trackers([])


SEARCH = {
    "search": {"name": "best loss", "space": {"models.m.loss.alpha": {}, "models.m.loss.gamma": {}}, "metric": "miou"},
    "trials": [
        {"label": "alpha=0.5, gamma=2", "values": {"models.m.loss.alpha": 0.5, "models.m.loss.gamma": 2.0},
         "curve": [[1, 0.2], [2, 0.3]], "end": "done", "miou": 0.4, "epochs": 2},
        {"label": "alpha=0.9, gamma=1", "values": {}, "curve": [], "end": "failed"},
    ],
}  # fmt: skip


def test_a_search_is_a_run_for_each_trial_that_is_named_by_its_values(
    folder: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    stand_in = SimpleNamespace(
        start_run=lambda run_name, nested=False: nullcontext(told.append((run_name, nested))),
        log_params=told.append,
        set_tag=lambda key, value: None,
        log_metrics=lambda values, step: told.append((step, values)),
    )
    monkeypatch.setitem(sys.modules, "mlflow", stand_in)
    track_search(["mlflow"], folder, SEARCH)
    points = [(1, {"validation/miou": 0.2}), (2, {"validation/miou": 0.3}), (2, {"miou": 0.4})]
    trial = [("alpha=0.5, gamma=2", True), {"alpha": 0.5, "gamma": 2.0}, *points]
    assert told == [("best loss", False), *trial]

    told.clear()
    logged = SimpleNamespace(log=told.append, finish=lambda: told.append("finished"))
    stand_in = SimpleNamespace(
        init=lambda project, group, name, config, reinit: (told.append((group, name, config)), logged)[1]
    )
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    track_search(["wandb"], folder, SEARCH)
    points = [{name: score, "epoch": epoch} for epoch, values in points for name, score in values.items()]
    assert told == [("best loss", "alpha=0.5, gamma=2", {"alpha": 0.5, "gamma": 2.0}), *points, "finished"]
