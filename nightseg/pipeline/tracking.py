"""A finished run in MLflow or Weights & Biases: its scores, the curves of its trainings, its recipe and its report.

Once, at the end, by the driver: workers on a cluster need no access, a run that was interrupted is logged when it is
done, and both programs may be offline. Where they log to is said by their own variables of the environment:
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME; WANDB_PROJECT, WANDB_MODE.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import Any, Final

import yaml

from nightseg.errors import UserError, closest
from nightseg.pipeline.results import RECIPE_NAME, RESULTS_NAME
from nightseg.report import Run
from nightseg.report.formatting import short_names
from nightseg.report.page import REPORT_NAME
from nightseg.storage import Location
from nightseg.storage.scratch import temporary_folder

TRACKERS: Final = ("mlflow", "wandb")
_PACKAGES: Final = {"mlflow": "mlflow-skinny", "wandb": "wandb"}
_FILES: Final = (RECIPE_NAME, RESULTS_NAME, REPORT_NAME)
_SCORES: Final = ("miou", "pa", "ca", "fwiou")
_CURVES: Final = ("loss", "gradient_norm", "learning_rate")


def check_trackers(names: Collection[str]) -> None:
    """Raise UserError, before anything runs, if one of them is not known or not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"log: unknown {name!r}{closest(name, TRACKERS)}", cure=f"use {' or '.join(TRACKERS)}")
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"log: {name} cannot be imported here ({error})",
                cure=f"pip install {_PACKAGES[name]} (or the extra `{name}` of nightseg)",
            ) from error


def track(names: Collection[str], folder: Location, results: dict[str, Any]) -> None:
    """Log a finished run, whose report is written, to each of them."""
    run = Run(folder, results)
    recipe = yaml.safe_load((folder / RECIPE_NAME).read_bytes())
    with temporary_folder() as place:
        files = []
        for name in _FILES:
            with suppress(FileNotFoundError):
                file = Location.of(place) / name
                file.write_bytes((folder / name).read_bytes())
                files.append(file.uri)
        if "mlflow" in names:
            _to_mlflow(run, recipe, files)
        if "wandb" in names:
            _to_wandb(run, recipe, files)


def track_search(names: Collection[str], folder: Location, content: dict[str, Any]) -> None:
    """Log a finished search (the content of its trials.json) to each of them: a run for each trial, named and described
    by its values: its validation after each epoch, then the score that it is compared by."""
    search = content["search"]
    short, metric = short_names(search["space"]), search["metric"]
    rows = [
        (
            row["label"],
            {short[key]: value for key, value in row["values"].items()},
            [
                *((epoch, f"validation/{metric}", score) for epoch, score in row["curve"]),
                (row["epochs"], metric, row[metric]),
            ],
        )
        for row in content["trials"]
        if row["end"] in ("done", "stopped")
    ]
    if "mlflow" in names:
        mlflow = importlib.import_module("mlflow")
        with mlflow.start_run(run_name=search["name"]):
            mlflow.set_tag("run_dir", folder.uri)
            for label, values, points in rows:
                with mlflow.start_run(run_name=label, nested=True):
                    mlflow.log_params(values)
                    for epoch, name, score in points:
                        mlflow.log_metrics({name: score}, step=epoch)
    if "wandb" in names:
        wandb = importlib.import_module("wandb")
        project = os.environ.get("WANDB_PROJECT") or "nightseg"
        for label, values, points in rows:
            logged = wandb.init(project=project, group=search["name"], name=label, config=values, reinit=True)
            for epoch, name, score in points:
                logged.log({name: score, "epoch": epoch})
            logged.finish()


def _to_mlflow(run: Run, recipe: dict[str, Any], files: list[str]) -> None:
    mlflow = importlib.import_module("mlflow")
    with mlflow.start_run(run_name=run.results["recipe"]):
        mlflow.log_params(
            {key: recipe[key] for key in ("name", "seed", "taxonomy") if isinstance(recipe.get(key), str | int)}
        )
        mlflow.set_tag("run_dir", run.root.uri)
        mlflow.log_metrics(dict(_scores(run)))
        for training, step, values in _curves(run):
            mlflow.log_metrics({f"{training}/{key}": value for key, value in values.items()}, step=step)
        for file in files:
            mlflow.log_artifact(file)


def _to_wandb(run: Run, recipe: dict[str, Any], files: list[str]) -> None:
    wandb = importlib.import_module("wandb")
    project = os.environ.get("WANDB_PROJECT") or "nightseg"
    logged = wandb.init(project=project, name=run.results["recipe"], config={**recipe, "run_dir": run.root.uri})
    try:
        for training in dict.fromkeys(training for training, _, _ in _curves(run)):
            logged.define_metric(f"{training}/*", step_metric=f"{training}/step")
        for training, step, values in _curves(run):
            logged.log({f"{training}/{key}": value for key, value in {"step": step, **values}.items()})
        logged.summary.update(dict(_scores(run)))
        artifact = wandb.Artifact(f"{run.results['recipe']}-report", type="report")
        for file in files:
            artifact.add_file(file)
        logged.log_artifact(artifact)
    finally:
        logged.finish()


def _scores(run: Run) -> Iterator[tuple[str, float]]:
    """`MODEL/TEST/miou` and the like, fractions in [0, 1], means over the seeds."""
    for model in run.models:
        for test in run.results["models"][model]["tests"]:
            found = run.mean(model, test)
            yield from ((f"{model}/{test}/{key}", found[key]) for key in _SCORES if found.get(key) is not None)


def _curves(run: Run) -> Iterator[tuple[str, int, dict[str, float]]]:
    """(training, step, values) after each epoch."""
    for model in run.models:
        for training, node in run.trainings(model).items():
            for step, record in run.epochs(node):
                seen = record.get("validation") or {}
                values = {key: record.get(key) for key in _CURVES}
                values |= {f"validation_{key}": seen.get(key) for key in _SCORES}
                yield training, step, {key: float(value) for key, value in values.items() if value is not None}
