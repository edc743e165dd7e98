"""What trials share, how they are named, and what one reports."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nightseg.pipeline import run
from nightseg.pipeline.graph import NodeId
from nightseg.pipeline.run import Outcome
from nightseg.pipeline.search.keys import preparing_keys
from nightseg.pipeline.search.trials import (
    Trials,
    assignments,
    lenders,
    run_trial,
    score_in,
    shared_nodes,
)
from nightseg.progress import Progress
from nightseg.recipe import load_recipe, save_recipe
from nightseg.recipe.types import Recipe
from nightseg.storage import Location, Workspace
from tests.small_search import ALPHA, CONFIGS, COUNT, GAMMA, VALUES, changed, row, trials_of


def shared_of(trials: Trials) -> set[NodeId]:
    return shared_nodes(trials.graph(values) for values in trials.edges())


# -- what is shared ---------------------------------------------------------------------------------------------------


def test_the_searched_loss_and_selection_leave_the_base_model_and_the_features_alone(tmp_path: Path) -> None:
    shared = {str(node) for node in shared_of(trials_of(tmp_path))}
    assert {
        "collect/night_val", "split/pool", "train_translator/unit", "translate/day_at_night",
        "train_segmenter/day_and_night", "score/pool_night.efficientnet_lite0",
        "score/day_at_night.efficientnet_lite0",
    } <= shared  # fmt: skip
    labels = "label/day_and_night.pool_night.adapted"
    own = {"select/adapted", labels, "pseudo_label/adapted", "train_segmenter/adapted"}
    graph = {str(node) for node in trials_of(tmp_path).graph(VALUES).nodes}
    assert graph - shared == own


def test_a_loss_alone_shares_the_pseudo_labels_too(tmp_path: Path) -> None:
    shared = {str(node) for node in shared_of(trials_of(tmp_path, f"space={{{ALPHA}: {{uniform: [0, 1]}}}}"))}
    assert {"select/adapted", "pseudo_label/adapted"} <= shared
    assert "train_segmenter/adapted" not in shared


def test_trials_that_learn_from_the_same_frames_borrow_them(tmp_path: Path) -> None:
    trials = trials_of(tmp_path)
    keys = preparing_keys(trials, [(values, trials.graph(values)) for values in trials.edges()])
    assert keys == [COUNT]  # alpha and gamma reach the training alone
    rows = [row(n, {ALPHA: 0.1 * n, GAMMA: 1.0, COUNT: count}, 0.3) for n, count in enumerate((60, 120, 60, 60), 1)]
    asked = {n: [place.name for place in lenders(keys, rows[n - 1], rows, trials)] for n in (1, 2, 3, 4)}
    assert asked == {1: ["shared"], 2: ["shared"], 3: ["shared", "t1"], 4: ["shared", "t1"]}
    assert lenders([], rows[3], rows, trials) == [trials.shared]


def test_a_base_that_is_searched_is_more_than_a_training(tmp_path: Path) -> None:
    trials = trials_of(tmp_path, "space={models.day_and_night.training.learning_rate: {uniform: [1e-4, 1e-3]}}")
    graphs = [(values, trials.graph(values)) for values in trials.edges()]
    assert preparing_keys(trials, graphs) == ["models.day_and_night.training.learning_rate"]


def test_a_key_that_moves_what_a_model_starts_from_reaches_its_teacher(tmp_path: Path) -> None:
    space = "space={models.adapted.start: {choice: [day_and_night, day_only]}}"
    shared = {str(node) for node in shared_of(trials_of(tmp_path, space))}
    assert "pseudo_label/adapted" not in shared  # the model it starts from is its teacher
    assert {"train_segmenter/day_and_night", "train_segmenter/day_only"} <= shared  # both are done once


def test_trials_touch_no_test_set_and_predict_nothing(tmp_path: Path) -> None:
    trials = trials_of(tmp_path)
    stages = {node.stage for node in trials.graph(VALUES).nodes}
    assert not stages & {"evaluate", "predict"}
    assert load_recipe(CONFIGS / "demo.yaml").test_sets  # the recipe itself has some


def test_a_trial_trains_all_seeds_of_its_model(tmp_path: Path) -> None:
    trials = changed(trials_of(tmp_path), "models.adapted.seeds=[4, 5]")
    trained = {node.name for node in trials.graph(VALUES).nodes if node.stage == "train_segmenter"}
    assert trained == {"day_only", "day_and_night", "adapted", "adapted.seed5"}


def test_values_reach_the_recipe_as_they_are(tmp_path: Path) -> None:
    model = trials_of(tmp_path).recipe(VALUES | {ALPHA: 1e-5}).models["adapted"]
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
        with progress.task("train adapted", 10, "steps") as task:
            for figures in self.figures:
                task.advance(1, **figures)
        records = [
            {"epoch": epoch, **({} if miou is None else {"validation": {"miou": miou}})}
            for epoch, miou in enumerate(self.history, 1)
        ]
        (folder / "attempt/history.json").write_json(records)
        self.is_committed = True
        node = "train_segmenter/adapted"
        commits = {node: {"folder": (folder / "attempt").uri}}
        return Outcome({"models": {"adapted": {"model": node}}, "commits": commits}, 1, 0, 1.0)


def told(monkeypatch: pytest.MonkeyPatch, trials: Trials, made: MadeUpRun) -> list[tuple[int, float, bool]]:
    """What a trial reports: epoch, mIoU, and whether its model was committed by then."""
    found: list[tuple[int, float, bool]] = []
    monkeypatch.setattr(run, "run", made)

    def report(epoch: int, miou: float) -> None:
        found.append((epoch, miou, made.is_committed))

    ended = run_trial(trials, VALUES, [trials.shared], report)
    assert made.is_committed
    return [*found, (ended.epochs, ended.score, made.is_committed)]


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
    assert made.asked["borrow"] == [trials.folder / "shared"] and made.asked["only"] == "adapted"


def test_epochs_that_nobody_watched_are_reported_from_the_history(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = MadeUpRun([], [0.1, 0.2, 0.3])
    assert told(monkeypatch, trials_of(tmp_path), made) == [(1, 0.1, True), (2, 0.2, True), (3, 0.3, True)]


def test_epochs_without_validation_are_not_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trials = changed(
        trials_of(tmp_path),
        "models.adapted.training.validate_every=2",
        "models.adapted.training.epochs=5",
    )
    figures = [
        {"epoch": 1.0},
        {"epoch": 2.0, "miou": 0.2},
        {"epoch": 3.0, "miou": 0.2},  # the figure of epoch 2 still stands
        {"epoch": 4.0, "miou": 0.4},
    ]
    made = MadeUpRun(figures, [None, 0.2, None, 0.4, 0.5])
    assert told(monkeypatch, trials, made) == [(2, 0.2, False), (4, 0.4, False), (5, 0.5, True)]


def test_a_trial_of_several_seeds_ends_with_their_mean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = MadeUpRun([{"epoch": 1.0, "miou": 0.1}, {"epoch": 2.0, "miou": 0.2}], [0.1, 0.2, 0.25])

    def with_another_seed(recipe: Recipe, folder: Location, **more: Any) -> Outcome:
        outcome = made(recipe, folder, **more)
        (folder / "other/history.json").write_json([{"epoch": 3, "validation": {"miou": 0.5}}])
        first, other = "train_segmenter/adapted", "train_segmenter/adapted.seed5"
        outcome.results["commits"][other] = {"folder": (folder / "other").uri}
        both = {"adapted": {"seed": 4, "model": first}, "adapted.seed5": {"seed": 5, "model": other}}
        outcome.results["models"]["adapted"]["trainings"] = both
        return outcome

    monkeypatch.setattr(run, "run", with_another_seed)
    found: list[tuple[Any, ...]] = []
    ended = run_trial(trials_of(tmp_path), VALUES, [], lambda *told: found.append(told))
    assert found == [(1, 0.1), (2, 0.2)]
    assert ended == (0.375, {"4": 0.25, "5": 0.5}, 3, 0.25)  # the curve ends with the first seed's own


def test_a_seed_that_fails_fails_its_trial_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = MadeUpRun([], [0.1, 0.2, 0.9])

    def without_the_other_seed(recipe: Recipe, folder: Location, **more: Any) -> Outcome:
        return made(recipe, folder, **more)._replace(errors=(FloatingPointError("seed 5: the loss is nan"),))

    monkeypatch.setattr(run, "run", without_the_other_seed)
    with pytest.raises(FloatingPointError, match="seed 5: the loss is nan"):
        run_trial(trials_of(tmp_path), VALUES, [], lambda *told: None)


def test_a_trial_is_compared_by_the_test_set_that_the_search_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its curve, by which it may be stopped, is still that of the validation."""
    trials = trials_of(tmp_path, "test=night", "spoil_test=true", "metric=iou.road")
    assert [*trials.graph(VALUES).models["adapted"].tests] == ["night"]
    made = MadeUpRun([{"epoch": 1.0, "miou": 0.1, "validation/iou.road": 0.7}], [0.1, 0.2, 0.3])

    def tested(recipe: Recipe, folder: Location, **more: Any) -> Outcome:
        outcome = made(recipe, folder, **more)
        model = outcome.results["models"]["adapted"]
        model["trainings"] = {"adapted": {**model, "seed": 0, "tests": {"night": {"miou": 0.5, "iou": {"road": 0.6}}}}}
        return outcome

    monkeypatch.setattr(run, "run", tested)
    found: list[tuple[Any, ...]] = []
    ended = run_trial(trials, VALUES, [], lambda *told: found.append(told))
    assert found[0] == (1, 0.7) and ended[:3] == (0.6, {"0": 0.6}, 3)


def test_weights_of_the_best_epoch_are_compared_by_that_epoch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = MadeUpRun([], [0.1, 0.4, 0.3])

    def kept(recipe: Recipe, folder: Location, **more: Any) -> Outcome:
        outcome = made(recipe, folder, **more)
        outcome.results["commits"]["train_segmenter/adapted"]["summary"] = {"kept": {"epoch": 2, "miou": 0.4}}
        return outcome

    monkeypatch.setattr(run, "run", kept)
    ended = run_trial(trials_of(tmp_path), VALUES, [], lambda *told: None)
    assert (ended.score, ended.validation) == (0.4, 0.3)


def test_a_lease_of_a_try_that_died_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """On a store nothing frees the lock of a process that was killed."""
    trials = trials_of(tmp_path)._replace(folder=Location.of(request.getfixturevalue("s3").place("dead")) / "search")
    save_recipe(load_recipe(trials_of(tmp_path).recipe_file), trials.recipe_file)
    holders = iter(["a dead process", "a dead process", None])
    monkeypatch.setattr(Workspace, "holder", lambda self: next(holders))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    made = MadeUpRun([], [0.1, 0.2, 0.3])
    monkeypatch.setattr(run, "run", made)
    assert run_trial(trials, VALUES, [], lambda *told: None).score == 0.3
    assert list(holders) == []


def test_a_score_that_is_not_defined_is_not_a_number() -> None:
    assert score_in({"miou": 0.5, "iou": {"road": 0.25}}, "miou") == 0.5
    assert score_in({"miou": 0.5, "iou": {"road": 0.25}}, "iou.road") == 0.25
    assert math.isnan(score_in({"miou": None}, "miou")) and math.isnan(score_in({"iou": {"road": None}}, "iou.road"))
    assert math.isnan(score_in({}, "iou.road"))


def test_a_note_of_an_earlier_version_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trials = trials_of(tmp_path)
    (trials.place(trials.name(VALUES)) / "validation.json").write_json([[1, 0.9]])
    assert told(monkeypatch, trials, MadeUpRun([], [0.1, 0.2, 0.3]))[0] == (1, 0.1, True)


def test_a_trial_that_comes_again_first_tells_what_it_had_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trials = trials_of(tmp_path)

    class StoppedError(Exception):
        pass

    def stop(epoch: int, miou: float) -> None:
        if epoch == 2:
            raise StoppedError  # as Tune ends the process of a trial while it reports

    monkeypatch.setattr(run, "run", MadeUpRun([{"epoch": 1.0, "miou": 0.1}, {"epoch": 2.0, "miou": 0.2}], []))
    with pytest.raises(StoppedError):
        run_trial(trials, VALUES, [], stop)
    figures = [{"epoch": 3.0, "miou": 0.3, "validation/pa": 0.9}]
    other = trials._replace(settings=trials.settings.model_copy(update={"metric": "pa"}))
    of_another = told(monkeypatch, other, MadeUpRun(figures, [0.1, 0.2, 0.3]))  # of a history without it
    assert all(math.isnan(score) for _, score, _ in of_another)
    resumed = MadeUpRun(figures, [0.1, 0.2, 0.3])
    assert told(monkeypatch, trials, resumed) == [(1, 0.1, False), (2, 0.2, False), (3, 0.3, True)]
