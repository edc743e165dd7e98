"""What a search shares between its trials, how trials are named, and what a trial tells of its epochs."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from nightseg.pipeline import run
from nightseg.pipeline.graph import NodeId
from nightseg.pipeline.run import Outcome
from nightseg.pipeline.trials import Dimension, Search, Trials, assignments, run_trial, shared_nodes
from nightseg.progress import Progress
from nightseg.recipe import load_recipe, load_settings, save_recipe
from nightseg.recipe.types import Recipe
from nightseg.storage import Location

CONFIGS = Path(__file__).parents[2] / "configs"
ALPHA, COUNT = "models.self_trained.loss.alpha", "models.self_trained.self_training.select.count"
VALUES = {ALPHA: 0.5, "models.self_trained.loss.gamma": 1.0, COUNT: 60}


def trials_of(folder: Path, *overrides: str) -> Trials:
    settings = load_settings(Search, CONFIGS / "search.yaml", overrides)
    trials = Trials(settings, Location.of(folder), foundation="shared")
    save_recipe(load_recipe(CONFIGS / "demo.yaml", settings.set), trials.recipe_file)
    return trials


def changed(trials: Trials, *overrides: str) -> Trials:
    """The same trials of a recipe with other settings."""
    save_recipe(load_recipe(trials.recipe_file, overrides), trials.recipe_file)
    return trials


def shared_of(trials: Trials) -> set[NodeId]:
    return shared_nodes(trials.graph(values) for values in trials.edges())


# -- dimensions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "edges"),
    [
        ({"uniform": [0.0, 1.0]}, [0.0, 1.0]),
        ({"log_uniform": [1e-5, 0.1]}, [1e-5, 0.1]),
        ({"choice": [60, 120, 180]}, [60, 120, 180]),
        ({"choice": ["focal", "combined"]}, ["focal", "combined"]),
    ],
)
def test_a_dimension_is_a_range_or_a_list(given: dict[str, Any], edges: list[Any]) -> None:
    assert Dimension.model_validate_json(str(given).replace("'", '"')).edges() == edges


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{}", "exactly one of uniform, log_uniform, choice"),
        ('{"uniform": [0, 1], "choice": [1, 2]}', "exactly one of"),
        ('{"uniform": [1, 0]}', "begins at 1 and ends at 0; the end must be larger"),
        ('{"log_uniform": [0, 1]}', "greater than 0"),
        ('{"choice": [1]}', "at least 2"),
        ('{"range": [0, 1]}', "not permitted"),
    ],
)
def test_what_is_no_dimension_is_refused(given: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Dimension.model_validate_json(given)


# -- what is shared ---------------------------------------------------------------------------------------------------


def test_the_searched_loss_and_selection_leave_the_base_model_and_the_features_alone(tmp_path: Path) -> None:
    shared = {str(node) for node in shared_of(trials_of(tmp_path))}
    assert {
        "collect/night_val", "split/pool", "train_translator/unit", "translate/day_at_night",
        "train_segmenter/day_and_night", "score/pool_night.efficientnet_lite0", "score/day_at_night.efficientnet_lite0",
    } <= shared  # fmt: skip
    own = {"select/self_trained", "pseudo_label/self_trained", "train_segmenter/self_trained"}
    graph = {str(node) for node in trials_of(tmp_path).graph(VALUES).nodes}
    assert graph - shared == own


def test_a_loss_alone_shares_the_pseudo_labels_too(tmp_path: Path) -> None:
    shared = {str(node) for node in shared_of(trials_of(tmp_path, f"space={{{ALPHA}: {{uniform: [0, 1]}}}}"))}
    assert {"select/self_trained", "pseudo_label/self_trained"} <= shared
    assert "train_segmenter/self_trained" not in shared


def test_a_key_that_only_the_last_choice_moves_is_seen(tmp_path: Path) -> None:
    space = "space={models.self_trained.start: {choice: [day_and_night, day_and_night, day_only]}}"
    shared = {str(node) for node in shared_of(trials_of(tmp_path, space))}
    assert "pseudo_label/self_trained" not in shared  # the model it starts from is its teacher
    assert {"train_segmenter/day_and_night", "train_segmenter/day_only"} <= shared  # both are done once


def test_trials_touch_no_test_set_and_predict_nothing(tmp_path: Path) -> None:
    trials = trials_of(tmp_path)
    stages = {node.stage for node in trials.graph(VALUES).nodes}
    assert not stages & {"evaluate", "predict"}
    assert load_recipe(CONFIGS / "demo.yaml").test_sets  # the recipe itself has some


def test_values_reach_the_recipe_as_they_are(tmp_path: Path) -> None:
    model = trials_of(tmp_path).recipe(VALUES | {ALPHA: 1e-5}).models["self_trained"]
    assert model.loss is not None and model.loss.alpha == 1e-5
    assert model.self_training is not None and model.self_training.select is not None
    assert model.self_training.select.count == 60
    assert assignments({"a": "no", "b": True, "c": 0.1, "d": 3}) == ['a="no"', "b=true", "c=0.1", "d=3"]


# -- names ------------------------------------------------------------------------------------------------------------


def test_the_same_trial_has_the_same_name(tmp_path: Path) -> None:
    trials = trials_of(tmp_path)
    name = trials.name(VALUES)
    assert trials_of(tmp_path / "elsewhere", "trials=99").name(dict(reversed(VALUES.items()))) == name
    assert pickle.loads(pickle.dumps(trials)).name(VALUES) == name
    assert trials.name(VALUES | {COUNT: 120}) != name
    assert trials._replace(foundation="other frames").name(VALUES) != name
    assert changed(trials, "compute.map.actors=7").name(VALUES) == name  # how it is computed is not what is computed
    assert changed(trials, "training.epochs=7").name(VALUES) != name


# -- one trial --------------------------------------------------------------------------------------------------------


class MadeUpRun:
    """In the place of `run.run`: a training that shows these figures, then commits this history."""

    def __init__(self, figures: Sequence[dict[str, float]], history: Sequence[float | None]) -> None:
        self.figures, self.history = figures, history
        self.asked: dict[str, Any] = {}
        self.is_committed = False

    def __call__(self, recipe: Recipe, folder: Location, *, progress: Progress, **more: Any) -> Outcome:
        self.asked = {"recipe": recipe, "folder": folder, **more}
        with progress.task("train day_and_night", 10, "steps") as other:
            other.advance(1, epoch=1.0, miou=0.99)
        with progress.task("train self_trained", 10, "steps") as task:
            for figures in self.figures:
                task.advance(1, **figures)
        records = [
            {"epoch": epoch, **({} if miou is None else {"validation": {"miou": miou}})}
            for epoch, miou in enumerate(self.history, 1)
        ]
        (folder / "attempt/history.json").write_json(records)
        self.is_committed = True
        node = "train_segmenter/self_trained"
        commits = {node: {"folder": (folder / "attempt").uri}}
        return Outcome({"models": {"self_trained": {"model": node}}, "commits": commits}, 1, 0, 1.0)


def told(monkeypatch: pytest.MonkeyPatch, trials: Trials, made: MadeUpRun) -> list[tuple[int, float, bool]]:
    """What a trial reports: epoch, mIoU, and whether its model was committed by then."""
    found: list[tuple[int, float, bool]] = []
    monkeypatch.setattr(run, "run", made)
    run_trial(trials, VALUES, lambda epoch, miou: found.append((epoch, miou, made.is_committed)))
    return found


def test_each_epoch_is_reported_once_and_the_last_after_its_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    figures = [
        {"loss": 3.0},
        {"loss": 2.0, "epoch": 1.0, "miou": 0.1},
        {"loss": 1.5, "epoch": 1.0, "miou": 0.1},  # figures stand until they are replaced
        {"loss": 1.0, "epoch": 2.0, "miou": 0.2},
        {"loss": 0.5, "epoch": 3.0, "miou": 0.3},
    ]
    made = MadeUpRun(figures, [0.1, 0.2, 0.3])
    trials = trials_of(tmp_path)
    assert told(monkeypatch, trials, made) == [(1, 0.1, False), (2, 0.2, False), (3, 0.3, True)]
    assert made.asked["folder"] == trials.folder / "trials" / trials.name(VALUES)
    assert made.asked["borrow"] == [trials.folder / "shared"] and made.asked["only"] == "self_trained"


def test_epochs_that_nobody_watched_are_reported_from_the_history(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = MadeUpRun([], [0.1, 0.2, 0.3])
    assert told(monkeypatch, trials_of(tmp_path), made) == [(1, 0.1, True), (2, 0.2, True), (3, 0.3, True)]


def test_epochs_without_validation_are_not_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trials = changed(
        trials_of(tmp_path),
        "models.self_trained.training.validate_every=2",
        "models.self_trained.training.epochs=5",
    )
    figures = [
        {"epoch": 1.0},
        {"epoch": 2.0, "miou": 0.2},
        {"epoch": 3.0, "miou": 0.2},  # the figure of epoch 2 still stands
        {"epoch": 4.0, "miou": 0.4},
    ]
    made = MadeUpRun(figures, [None, 0.2, None, 0.4, 0.5])
    assert told(monkeypatch, trials, made) == [(2, 0.2, False), (4, 0.4, False), (5, 0.5, True)]


def test_a_trial_that_comes_again_first_tells_what_it_had_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trials = trials_of(tmp_path)

    class StoppedError(Exception):
        pass

    def stop(epoch: int, miou: float) -> None:
        if epoch == 2:
            raise StoppedError  # as Tune ends the process of a trial while it reports

    monkeypatch.setattr(run, "run", MadeUpRun([{"epoch": 1.0, "miou": 0.1}, {"epoch": 2.0, "miou": 0.2}], []))
    with pytest.raises(StoppedError):
        run_trial(trials, VALUES, stop)
    resumed = MadeUpRun([{"epoch": 3.0, "miou": 0.3}], [0.1, 0.2, 0.3])
    assert told(monkeypatch, trials, resumed) == [(1, 0.1, False), (2, 0.2, False), (3, 0.3, True)]
