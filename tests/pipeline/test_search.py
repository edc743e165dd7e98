"""A search refuses what cannot work, names and shares its trials, picks the best, and runs with Ray Tune (slow)."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from nightseg.pipeline import leaks, run
from nightseg.pipeline import search as module
from nightseg.pipeline.build import build_graph
from nightseg.pipeline.graph import Graph, NodeId
from nightseg.pipeline.run import Outcome
from nightseg.pipeline.search import Dimension, Found, Search, Trials, assignments, run_trial, search, shared_nodes
from nightseg.progress import Progress, SilentProgress
from nightseg.recipe import load_recipe, load_settings, save_recipe
from nightseg.recipe.types import Recipe
from nightseg.storage import Location, UserError, Workspace

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
ALPHA, COUNT = "models.adapted.loss.alpha", "models.adapted.self_training.select.count"
VALUES = {ALPHA: 0.5, "models.adapted.loss.gamma": 1.0, COUNT: 60}


def refused(folder: Path, *overrides: str, file: Path = CONFIGS / "search.yaml") -> str:
    """The message; nothing has been written and no Ray was started."""
    with pytest.raises(UserError) as caught:
        search(str(file), overrides, run_dir=str(folder / "run"), progress=SilentProgress())
    assert not (folder / "run").exists()
    return str(caught.value)


@pytest.fixture(autouse=True)
def no_ray(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "ray" not in request.keywords:
        from nightseg.cluster import ray as cluster

        monkeypatch.setattr(cluster, "connect", lambda: pytest.fail("no Ray before the request is checked"))


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_the_search_of_the_demo_is_right() -> None:
    settings = load_settings(Search, CONFIGS / "search.yaml")
    module._check("search.yaml", settings, Location.of(CONFIGS / "demo.yaml"))
    assert settings.trials == 4 and set(settings.space) >= {ALPHA, COUNT}


def test_ray_is_started_with_the_dashboard_that_frees_stopped_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray asks its dashboard whether the training of a stopped trial still lives; without one its CPUs stay taken."""
    from nightseg.cluster import ray as cluster

    asked: list[bool] = []

    def connect(*, dashboard: bool = False) -> None:
        asked.append(dashboard)
        raise InterruptedError

    monkeypatch.setattr(cluster, "connect", connect)
    with pytest.raises(InterruptedError):
        search(str(CONFIGS / "search.yaml"), [], run_dir=str(tmp_path / "run"), progress=SilentProgress())
    assert asked == [True]


def test_everything_that_is_wrong_is_in_one_message(tmp_path: Path) -> None:
    message = refused(
        tmp_path,
        "model=adaptd",
        "space={models.adapted.loss.alhpa: {uniform: [0, 1]}, "
        "models.adapted.loss.gamma: {uniform: [-1, 4]}, "
        f"{COUNT}: {{choice: [60, 120, many]}}}}",
    )
    for expected in (
        "4 errors",
        "nothing was started",
        "model: the recipe has no model 'adaptd', did you mean 'adapted'?",
        "space.models.adapted.loss.alhpa: ",
        "unknown key, did you mean 'alpha'?",
        "space.models.adapted.loss.gamma: ",
        f'space.{COUNT}: set {COUNT}="many": ',
    ):
        assert expected in message, f"{expected}\nis missing in\n{message}"


def test_a_score_is_needed_and_it_must_not_be_a_test(tmp_path: Path) -> None:
    assert "has no validate_on, so there is no score" in refused(tmp_path, "set=[]")
    on_test = '["models.adapted.validate_on=[night_test]", "models.adapted.loss={kind: combined}"]'
    assert "night_test, which is the test set night" in refused(tmp_path, f"set={on_test}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"space={{{COUNT}: {{choice: [60, 9999]}}}}", "self_training.select.count is 9999, and the pool has"),
        ("space={training.warmup_steps: {choice: [1, 9999]}}", "warmup_steps is 9999, but"),
        ("space={network.encoder: {choice: [efficientnet_lite0, resnet18]}}", "nothing is downloaded unasked"),
    ],
)
def test_what_a_stage_of_one_trial_would_refuse_is_refused_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    """Whichever value of the space it is; no Ray is started, no stage begins."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no-weights"))
    monkeypatch.delenv("NIGHTSEG_ALLOW_DOWNLOAD", raising=False)
    with pytest.raises(UserError, match=message) as caught:
        search(str(CONFIGS / "search.yaml"), [override], run_dir=str(tmp_path / "run"), progress=SilentProgress())
    assert "demo.yaml: line" in str(caught.value) or "set " in str(caught.value)
    assert not (tmp_path / "run" / "shared" / "stages").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trails=3", "trails: unknown key, did you mean 'trials'?"),
        ("trials=0", "trials: input should be greater than or equal to 1"),
        (f"space.{ALPHA}={{uniform: [1, 0]}}", "the end must be larger"),
        ("space={}", "space: "),
        ("recipe=demo2.yaml", "demo2.yaml: there is no such recipe file"),
        ("set=[training.epoch=3]", "set training.epoch=3: training.epoch: unknown key, did you mean 'epochs'?"),
    ],
)
def test_wrong_settings_name_their_key(tmp_path: Path, override: str, message: str) -> None:
    assert message in refused(tmp_path, override)


def test_the_recipe_lies_beside_the_search(tmp_path: Path) -> None:
    assert Location.of("/a/b/search.yaml").beside("demo.yaml").uri == "/a/b/demo.yaml"
    assert Location.of("/a/b/search.yaml").beside("../demo.yaml").uri == "/a/demo.yaml"
    assert Location.of("/a/b/search.yaml").beside("/c/demo.yaml").uri == "/c/demo.yaml"
    assert Location.of("s3://bucket/search.yaml").beside("s3://other/demo.yaml").uri == "s3://other/demo.yaml"


def trials_of(folder: Path, *overrides: str) -> Trials:
    settings = load_settings(Search, CONFIGS / "search.yaml", overrides)
    trials = Trials(settings, Location.of(folder), foundation="shared")
    recipe = load_recipe(CONFIGS / "demo.yaml", [*settings.set, "models.adapted.training.epochs=3"])
    save_recipe(recipe, trials.recipe_file)
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


def test_a_key_that_only_the_last_choice_moves_is_seen(tmp_path: Path) -> None:
    space = "space={models.adapted.start: {choice: [day_and_night, day_and_night, day_only]}}"
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
    trials = trials_of(tmp_path)
    run_trial(trials, VALUES, lambda *told: found.append(told))
    assert found == [(1, 0.1), (2, 0.2), (3, 0.375, {"4": 0.25, "5": 0.5})]
    metrics = {"miou": 0.375, "epoch": 3, "seeds": found[-1][2]}
    settings = load_settings(Search, CONFIGS / "search.yaml", [f"space={{{ALPHA}: {{uniform: [0, 1]}}}}"])
    small = trials._replace(settings=settings)
    row = module._row(small, SimpleNamespace(metrics=metrics, config={ALPHA: 0.5}, error=None), epochs=3)
    assert (row["miou"], row["seeds"]) == (0.375, {"4": 0.25, "5": 0.5})
    # Of two values the sample standard deviation is their difference by the root of two.
    assert row["std"] == pytest.approx(0.25 / 2**0.5, rel=1e-12)


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


# -- the outcome ------------------------------------------------------------------------------------------------------


def row(trial: str, miou: float | None, end: str = "done", error: str | None = None) -> dict[str, Any]:
    return {"trial": trial, "values": {ALPHA: 0.5}, "miou": miou, "epochs": 3, "end": end, "error": error}


def test_the_best_is_a_trial_that_came_to_its_end() -> None:
    rows = [row("a", 0.3), row("b", 0.5, end="stopped"), row("c", 0.4), row("d", None, end="failed", error="bad")]
    assert module._best(rows, Location.of("/s"))["trial"] == "c"


def test_a_search_without_any_end_says_why() -> None:
    rows = [row("b", 0.5, end="stopped"), row("d", None, end="failed", error="no frame is left")]
    with pytest.raises(RuntimeError, match=r"no trial finished: no frame is left\. Their run folders are in /s/trials"):
        module._best(rows, Location.of("/s"))


def test_a_finished_search_is_known_again_unless_a_trial_failed(tmp_path: Path) -> None:
    folder = Location.of(tmp_path)
    assert module._finished(folder, "x") is None
    (folder / "trials.json").write_json({"identity": "x", "trials": [row("a", 0.3)]})
    assert module._finished(folder, "x") == [row("a", 0.3)]
    assert module._finished(folder, "y") is None
    (folder / "trials.json").write_json({"identity": "x", "trials": [row("a", 0.3), row("b", None, end="failed")]})
    assert module._finished(folder, "x") is None
    (folder / "trials.json").write_bytes(b"{")
    assert module._finished(folder, "x") is None


def test_a_result_of_tune_becomes_a_row(tmp_path: Path) -> None:
    settings = load_settings(Search, CONFIGS / "search.yaml", [f"space={{{ALPHA}: {{uniform: [0, 1]}}}}"])
    trials = Trials(settings, Location.of(tmp_path), "shared")
    save_recipe(load_recipe(CONFIGS / "demo.yaml", settings.set), trials.recipe_file)
    done = SimpleNamespace(metrics={"miou": 0.4, "epoch": 3, "time_total_s": 9.0}, config={ALPHA: 0.5}, error=None)
    found = module._row(trials, done, epochs=3)
    assert found == row(trials.name({ALPHA: 0.5}), 0.4) | {"seconds": 9.0}
    early = SimpleNamespace(metrics={"miou": 0.2, "epoch": 1}, config={ALPHA: 0.1}, error=None)
    assert module._row(trials, early, epochs=3)["end"] == "stopped"
    trace = "Traceback ...\n  in work\nnightseg.errors.UserError: 3 frames are bad\n  first: a.png"
    failed = SimpleNamespace(metrics=None, config={ALPHA: 0.2}, error=trace)
    assert module._row(trials, failed, epochs=3)["error"] == "3 frames are bad\n  first: a.png"
    other = SimpleNamespace(metrics={}, config={ALPHA: 0.2}, error="Traceback ...\nRuntimeError: a worker died\n")
    assert module._row(trials, other, epochs=3)["error"] == "RuntimeError: a worker died"


def test_trials_have_readable_names_in_tensorboard() -> None:
    name = module._folder_names()
    first = SimpleNamespace(trial_id="f3", config={ALPHA: 0.123456, COUNT: 60, "models.m.start": "a/../b"})
    assert name(first) == "001,alpha=0.1235,count=60,start=a_.._b"
    assert name(SimpleNamespace(trial_id="a7", config={ALPHA: 1e-5})) == "002,alpha=1e-05"
    assert name(first).startswith("001")
    assert len(name(SimpleNamespace(trial_id="b2", config={ALPHA: "x" * 200}))) == 120  # of 255 that a file may have


def test_the_callback_counts_trials_and_survives_being_pickled() -> None:
    class Count:
        done, best = 0, 0.0

        def advance(self, count: int = 1, **figures: Any) -> None:
            self.done += count
            self.best = figures.get("best", self.best)

    task = Count()
    callback = module._progress_callback(task)
    for miou in (0.2, 0.4, 0.3):
        callback.on_trial_result(iteration=1, trials=[], trial=None, result={"miou": miou, "epoch": 1})
    callback.on_trial_complete(iteration=1, trials=[], trial=None)
    callback.on_trial_error(iteration=1, trials=[], trial=None)
    assert (task.done, task.best) == (2, 0.4)
    pickle.loads(pickle.dumps(callback))


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """What the parts of Tune are made with: arguments by place or name; a part of Tune among them is its name."""
    import ray.tune
    from ray.tune import schedulers
    from ray.tune.search import optuna

    asked: dict[str, Any] = {}

    class Part(str):
        def fit(self) -> list[Any]:
            return []

    def recorder(what: str) -> Callable[..., Part]:
        def record(*arguments: Any, **named: Any) -> Part:
            asked[what] = {str(place): value for place, value in enumerate(arguments)} | named
            return Part(what)

        return record

    monkeypatch.delenv("TUNE_DISABLE_SIGINT_HANDLER", raising=False)
    for place, name in (
        *((ray.tune, name) for name in ("Tuner", "TuneConfig", "RunConfig", "with_resources")),
        *((schedulers, "ASHAScheduler"), (optuna, "OptunaSearch")),
    ):
        monkeypatch.setattr(place, name, recorder(name))

    def tune(*overrides: str) -> dict[str, Any]:
        space = f"space={{{ALPHA}: {{uniform: [0.1, 0.9]}}, {COUNT}: {{choice: [3, 4]}}}}"
        assert module._tune(trials_of(tmp_path, space, *overrides), "0123456789abcdef", SilentProgress()) == []
        return asked

    return tune


def test_tune_is_handed_what_the_search_says(tuned: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    asked = tuned("trials=7", "concurrent=3", "grace_epochs=2", "seed=11")
    assert asked["OptunaSearch"] == {"seed": 11}
    assert asked["ASHAScheduler"] == {"time_attr": "epoch", "max_t": 3, "grace_period": 2}
    assert callable(asked["TuneConfig"].pop("trial_dirname_creator"))
    assert asked["TuneConfig"] == {
        "metric": "miou", "mode": "max", "num_samples": 7, "max_concurrent_trials": 3,
        "search_alg": "OptunaSearch", "scheduler": "ASHAScheduler",
    }  # fmt: skip
    assert len(asked["RunConfig"].pop("callbacks")) == 1
    assert asked["RunConfig"] == {"name": "0123456789ab", "storage_path": f"{tmp_path}/tune", "verbose": 0}
    domains = asked["Tuner"].pop("param_space")
    assert asked["Tuner"] == {"0": "with_resources", "tune_config": "TuneConfig", "run_config": "RunConfig"}
    assert (domains[ALPHA].lower, domains[ALPHA].upper) == (0.1, 0.9) and domains[COUNT].categories == [3, 4]
    assert callable(asked["with_resources"].pop("0"))
    assert asked["with_resources"] == {"1": {"memory": 1}}  # a trial's own work asks for its CPUs
    assert os.environ["TUNE_DISABLE_SIGINT_HANDLER"] == "1"


def test_a_grace_beyond_the_end_of_a_training_stops_no_trial(tuned: Callable[..., dict[str, Any]]) -> None:
    assert tuned("grace_epochs=5")["ASHAScheduler"] == {"time_attr": "epoch", "max_t": 5, "grace_period": 5}


@pytest.mark.parametrize(
    ("given", "kind", "edges"),
    [
        ({"uniform": (0.5, 2.0)}, "Uniform", (0.5, 2.0)),
        ({"log_uniform": (0.001, 0.1)}, "LogUniform", (0.001, 0.1)),
        ({"choice": [3, 4]}, "Categorical", [3, 4]),
    ],
)
def test_a_dimension_is_drawn_from_as_it_says(given: dict[str, Any], kind: str, edges: Any) -> None:
    domain = module._domain(Dimension(**given))
    if kind == "Categorical":
        assert domain.categories == edges
    else:
        assert (domain.lower, domain.upper) == edges and type(domain.get_sampler()).__name__.startswith(f"_{kind}")


@pytest.fixture
def searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Found, dict[str, Any]]]:
    """A whole search whose trials are made up: what is found, and what was asked of the cluster, the runs and Tune."""
    from nightseg.cluster import ray as cluster

    def whole(*overrides: str) -> tuple[Found, dict[str, Any]]:
        asked: dict[str, Any] = {"connected": [], "prepared": {}, "identities": []}

        def prepare(recipe: Recipe, folder: Location, nodes: set[NodeId], **more: Any) -> dict[NodeId, Any]:
            made = build_graph(recipe, more["only"]).nodes.keys() & nodes
            asked["prepared"][folder.uri] = asked["prepared"].get(folder.uri, set()) | made
            return {node: SimpleNamespace(content=str(node)) for node in made}

        def tune(trials: Trials, identity: str, progress: Progress) -> list[dict[str, Any]]:
            asked["identities"].append(identity)
            ends = [({ALPHA: 0.25, COUNT: 60}, 0.3, "done"), ({ALPHA: 0.75, COUNT: 120}, 0.4, "done")]
            return [row(trials.name(values), miou, end) | {"values": values} for values, miou, end in ends]

        monkeypatch.setattr(cluster, "connect", lambda **more: asked["connected"].append(more))

        def find(graph: Graph, commits: Any, *, validation: bool) -> list[leaks.Leak]:
            asked["compared"] = commits.keys() == leaks.needed(graph) and validation
            return []

        monkeypatch.setattr(run, "prepare", prepare)
        monkeypatch.setattr(leaks, "find", find)
        monkeypatch.setattr(module, "_tune", tune)
        space = f"space={{{ALPHA}: {{uniform: [0.1, 0.9]}}, {COUNT}: {{choice: [60, 120]}}}}"
        place = str(tmp_path / "search")
        return search(
            str(CONFIGS / "search.yaml"), [space, *overrides], run_dir=place, progress=SilentProgress()
        ), asked

    return whole


def test_a_search_prepares_what_is_shared_and_writes_what_it_found(
    searched: Callable[..., tuple[Found, dict[str, Any]]], tmp_path: Path
) -> None:
    found, asked = searched()
    folder = tmp_path / "search"
    assert asked["connected"] == [{"dashboard": True}] * 2  # before the shared stages, and for the trials
    (prepared,) = asked["prepared"].items()
    trials = trials_of(tmp_path / "trials")
    needed = leaks.needed(build_graph(load_recipe(folder / "recipe.yaml"), "adapted"))
    assert prepared == (str(folder / "shared"), shared_of(trials) | needed) and asked["compared"]
    assert found.folder.uri == str(folder) and found.best == found.trials[1]
    assert found.best["values"] == {ALPHA: 0.75, COUNT: 120}
    written = json.loads((folder / "trials.json").read_text())
    assert (written["best"], written["trials"]) == (found.best, found.trials)
    assert [written["identity"]] == asked["identities"] and written["search"]["space"].keys() == {ALPHA, COUNT}
    best = load_recipe(found.best_recipe).models["adapted"]
    assert best.loss is not None and best.loss.alpha == 0.75
    assert load_recipe(folder / "recipe.yaml").models["adapted"].validate_on  # as the search sets it


def test_a_search_that_is_finished_is_not_done_again_but_one_that_asks_for_more_is(
    searched: Callable[..., tuple[Found, dict[str, Any]]],
) -> None:
    first, asked = searched()
    again, nothing = searched()
    assert again == first and (nothing["connected"], nothing["identities"]) == ([], [])
    for more in ("trials=9", "grace_epochs=2", f"space.{ALPHA}={{uniform: [0.2, 0.9]}}"):
        _, other = searched(more)
        assert other["connected"] == [{"dashboard": True}] and other["identities"] not in ([], asked["identities"])


# -- the whole of it --------------------------------------------------------------------------------------------------

TINY = [
    "datasets.day.count=8",
    "datasets.pool={layout: scenes, count: 16, first: 1000, labelled: false, mix: {day: 0.5, night: 0.5}}",
    "datasets.day_test.count=2",
    "datasets.night_test.count=2",
    "datasets.night_val={layout: scenes, count: 2, first: 6000, mix: {night: 1.0}}",
    "translators.unit.start=null",
    "translators.unit.width=4",
    "translators.unit.res_blocks=1",
    "translators.unit.discriminator_width=4",
    "translators.unit.weights={perceptual: 0}",
    "translators.unit.crop=[64, 64]",
    "translators.unit.iterations=2",
    "network={encoder: efficientnet_lite0, pyramid_channels: 8, head_channels: 8}",
    "training.epochs=2",
    "training.steps_per_epoch=1",
    "training.warmup_steps=0",
    "training.batch=2",
    "training.crop=[64, 128]",
    "models.day_and_night.training=null",
    "models.adapted.training=null",
    "models.adapted.validate_on=[night_val]",
    "models.adapted.loss={kind: combined}",
]


def run_search(folder: Path, *overrides: str) -> dict[str, Any]:
    """`nightseg search configs/search.yaml --json` in a process of its own: one JSON object on standard output."""
    words = ["--run-dir", str(folder), "--json"]
    for override in (f"set={json.dumps(TINY)}", f"space.{COUNT}={{choice: [3, 4]}}", *overrides):
        words += ["--set", override]
    command = [sys.executable, "-m", "nightseg.cli.main", "search", str(CONFIGS / "search.yaml"), *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr and "Configuration for experiment" not in ended.stderr
    answer = json.loads(ended.stdout)
    assert isinstance(answer, dict)
    return answer


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_search_shares_its_base_compares_its_trials_and_continues(tmp_path: Path) -> None:
    folder = tmp_path / "search"
    answer = run_search(folder, "trials=2")

    ends = {trial["trial"]: trial["end"] for trial in answer["trials"]}
    assert len(ends) == 2 and set(ends.values()) <= {"done", "stopped"} and "done" in ends.values()
    assert all(0 <= trial["miou"] <= 1 and set(trial["values"]) >= {ALPHA, COUNT} for trial in answer["trials"])
    assert answer["best"]["end"] == "done"

    shared = {f"{commit.stage}/{commit.name}" for commit in Workspace(folder / "shared").commits()}
    assert {"train_segmenter/day_and_night", "train_translator/unit", "score/pool_night.efficientnet_lite0"} <= shared
    for trial, end in ends.items():
        own = {f"{commit.stage}/{commit.name}" for commit in Workspace(folder / "trials" / trial).commits()}
        assert not own & shared
        assert ("train_segmenter/adapted" in own) == (end == "done")
        assert (folder / "trials" / trial / "results.json").exists() == (end == "done")

    events = list((folder / "tune").rglob("events.out.tfevents.*"))
    assert len(events) == 2 and all(file.stat().st_size > 0 for file in events)

    best = load_recipe(folder / "best.yaml")
    loss = best.models["adapted"].loss
    assert loss is not None and loss.alpha == answer["best"]["values"][ALPHA]
    assert best.test_sets == {"night": "night_test", "day": "day_test"}

    made = {path: path.stat().st_mtime_ns for path in folder.rglob("_COMMITTED.json")}
    assert run_search(folder, "trials=2") == answer
    more = run_search(folder, "trials=3")  # the first two come again and find what they have done
    assert {trial["trial"] for trial in more["trials"]} > set(ends)
    assert {path: path.stat().st_mtime_ns for path in made} == made
