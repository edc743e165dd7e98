"""Ray Tune over the rounds: which loss, which selection, how many frames. Optuna proposes, ASHA stops the losers early.

What all trials share (base models, translations, features) is found by comparing graphs and done once, before the
first trial; every trial is an ordinary run folder that borrows it. A trial can therefore be inspected, resumed and
reported like any run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, NamedTuple

from pydantic import Field, model_validator

from nightseg import rounds, runner
from nightseg.compute import cluster
from nightseg.config import Name, Positive, Strict
from nightseg.graph import Graph, NodeId
from nightseg.progress import Progress, SilentProgress, Task
from nightseg.recipe import load_recipe, load_settings, save_recipe
from nightseg.storage import Location, UserError

METRIC = "miou"


class Dimension(Strict):
    """One searched key: a range of numbers, or a list of values."""

    uniform: tuple[float, float] | None = None
    log_uniform: tuple[Annotated[float, Field(gt=0)], float] | None = None
    choice: Annotated[list[int | float | str | bool], Field(min_length=2)] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Dimension:
        if sum(kind is not None for kind in (self.uniform, self.log_uniform, self.choice)) != 1:
            raise ValueError("give exactly one of uniform, log_uniform, choice")
        span = self.uniform or self.log_uniform
        if span is not None and not span[0] < span[1]:
            raise ValueError(f"the range begins at {span[0]:g} and ends at {span[1]:g}; the end must be larger")
        return self

    def ends(self) -> tuple[Any, Any]:
        """Two different values of the dimension."""
        if self.choice is not None:
            return self.choice[0], self.choice[1]
        span = self.uniform or self.log_uniform
        assert span is not None
        return span


class Search(Strict):
    """What to search, over which recipe, for how long."""

    name: Name
    recipe: str = Field(description="recipe file, relative to this file")
    set: list[str] = Field(default=[], description="overrides of the recipe, a.b=c")
    model: Name = Field(description="the model whose validation mIoU is maximised; it must have validate_on")
    space: Annotated[dict[str, Dimension], Field(min_length=1, description="dotted recipe key -> values")]
    trials: Positive = 16
    concurrent: Positive = 1
    grace_epochs: Positive = Field(default=1, description="epochs before ASHA may stop a trial")
    seed: Annotated[int, Field(ge=0)] = 0


class Found(NamedTuple):
    """The outcome of a search: trials with their values and mIoU (fractions), the best, and where it lies."""

    folder: Location
    best: dict[str, Any]
    trials: list[dict[str, Any]]
    best_recipe: Location


def search(file: str, overrides: tuple[str, ...] = (), *, run_dir: str | None = None, progress: Progress) -> Found:
    """Search; raises `UserError` before anything starts when the search or its recipe is wrong."""
    settings = load_settings(Search, file, overrides)
    recipe_file = _beside(Location.of(file), settings.recipe)
    recipe = load_recipe(recipe_file, settings.set)
    if settings.model not in recipe.models:
        raise UserError(f"{file}: model: the recipe has no model {settings.model!r}; known: {', '.join(recipe.models)}")
    if not recipe.models[settings.model].validate_on:
        raise UserError(
            f"{file}: model {settings.model} has no validate_on, so there is no score to maximise. "
            f"Cure: set: ['models.{settings.model}.validate_on=[DATASET]'], a dataset that is not a test set."
        )
    folder = Location.of(run_dir or f"runs/{settings.name}")
    shared = shared_nodes(settings, recipe_file)
    progress.say(f"{len(shared)} stages are shared by all trials and done once")
    runner.prepare(recipe, folder / "shared", shared, only=settings.model, progress=progress)
    cluster.connect()
    try:
        trials = _tune(
            settings, recipe_file, folder, recipe.training_of(recipe.models[settings.model]).epochs, progress
        )
    finally:
        cluster.disconnect()
    finished = [trial for trial in trials if trial[METRIC] is not None]
    if not finished:
        raise RuntimeError(f"no trial finished; their errors are in {folder.uri}/tune")
    best = max(finished, key=lambda trial: float(trial[METRIC]))
    best_recipe = folder / "best.yaml"
    save_recipe(load_recipe(recipe_file, [*settings.set, *_assignments(best["values"])]), best_recipe)
    (folder / "trials.json").write_json({"search": settings.model_dump(mode="json"), "best": best, "trials": trials})
    return Found(folder, best, trials, best_recipe)


def shared_nodes(settings: Search, recipe_file: Location) -> set[NodeId]:
    """The stages whose settings no searched key reaches, directly or through what they need."""
    first = {key: dimension.ends()[0] for key, dimension in settings.space.items()}
    base = _graph(settings, recipe_file, first)
    touched: set[NodeId] = set()
    for key, dimension in settings.space.items():
        other = _graph(settings, recipe_file, first | {key: dimension.ends()[1]})
        touched |= {
            node.id
            for node in base.nodes.values()
            if node.id not in other.nodes or (node.recipe, node.needs, node.seed) != _identity(other, node.id)
        }
    for node in base.nodes.values():  # in order, so one pass carries a change to everything that stands on it
        if touched.intersection(node.needs):
            touched.add(node.id)
    return {node for node in base.nodes if node not in touched and node.stage != "evaluate"}


def _identity(graph: Graph, node: NodeId) -> tuple[Mapping[str, Any], tuple[NodeId, ...], int]:
    return graph.nodes[node].recipe, graph.nodes[node].needs, graph.nodes[node].seed


def _graph(settings: Search, recipe_file: Location, values: Mapping[str, Any]) -> Graph:
    return rounds.build_graph(load_recipe(recipe_file, [*settings.set, *_assignments(values)]), settings.model)


def _assignments(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def _beside(file: Location, relative: str) -> Location:
    path = Location.of(relative) if relative.startswith("/") or "://" in relative else None
    return path or Location.of(f"{file.uri.rpartition('/')[0]}/{relative}")


def _tune(
    settings: Search, recipe_file: Location, folder: Location, epochs: int, progress: Progress
) -> list[dict[str, Any]]:
    import ray.tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    def trial(values: dict[str, Any]) -> None:
        _run_trial(settings, recipe_file, folder, values)

    tuner = ray.tune.Tuner(
        # Almost no CPU for the trial's driver: its training and its passes ask for their own.
        ray.tune.with_resources(trial, {"CPU": 0.01}),
        param_space={key: _domain(dimension) for key, dimension in settings.space.items()},
        tune_config=ray.tune.TuneConfig(
            metric=METRIC,
            mode="max",
            num_samples=settings.trials,
            max_concurrent_trials=settings.concurrent,
            search_alg=OptunaSearch(seed=settings.seed),
            scheduler=ASHAScheduler(max_t=max(epochs, settings.grace_epochs), grace_period=settings.grace_epochs),
        ),
        run_config=ray.tune.RunConfig(name="tune", storage_path=folder.uri, verbose=0),
    )
    with progress.task("search", settings.trials, "trials") as task:
        grid = _while_counting(tuner.fit, folder, task)
    rows = []
    for result in grid:
        metrics = result.metrics or {}
        rows.append(
            {
                "trial": metrics.get("trial_id"),
                "values": {key: (result.config or {}).get(key) for key in settings.space},
                METRIC: metrics.get(METRIC),
                "epochs": metrics.get("training_iteration", 0),
                "seconds": metrics.get("time_total_s"),
                "error": str(result.error) if result.error else None,
            }
        )
    return sorted(rows, key=lambda row: (row[METRIC] is None, -(row[METRIC] or 0.0)))


def _while_counting(fit: Any, folder: Location, task: Task) -> Any:
    """Run `fit` and advance the task as trial folders are finished."""
    over = threading.Event()

    def count() -> None:
        seen = 0
        while not over.wait(2.0):
            place = folder / "trials"
            finished = len([e for e in place.list(recursive=True) if e.name.endswith("/done")]) if place.exists() else 0
            if finished > seen:
                task.advance(finished - seen)
                seen = finished

    watcher = threading.Thread(target=count, daemon=True)
    watcher.start()
    try:
        return fit()
    finally:
        over.set()
        watcher.join()


def _domain(dimension: Dimension) -> Any:
    import ray.tune

    if dimension.uniform:
        return ray.tune.uniform(*dimension.uniform)
    if dimension.log_uniform:
        return ray.tune.loguniform(*dimension.log_uniform)
    return ray.tune.choice(dimension.choice)


def _run_trial(settings: Search, recipe_file: Location, folder: Location, values: dict[str, Any]) -> None:
    """One trial, inside a Tune actor: an ordinary run that borrows the shared stages and reports each validation."""
    import ray.tune

    place = folder / "trials" / ray.tune.get_context().get_trial_id()
    recipe = load_recipe(recipe_file, [*settings.set, *_assignments(values)])
    # No test set is touched during a search: the best model is tested once, afterwards.
    model = recipe.models[settings.model].model_copy(update={"test": {}})
    recipe = recipe.model_copy(update={"models": recipe.models | {settings.model: model}})
    runner.run(recipe, place, only=settings.model, borrow=[folder / "shared"], progress=_TrialProgress())
    (place / "done").write_bytes(b"")


class _TrialProgress(SilentProgress):
    """Passes the validation mIoU of every epoch on to Tune, which may stop the trial."""

    @contextmanager
    def task(self, title: str, total: int | None, unit: str) -> Iterator[Task]:
        with super().task(title, total, unit) as inner:
            yield _ReportingTask(inner)


class _ReportingTask:
    def __init__(self, inner: Task) -> None:
        self.inner = inner
        self.reported: set[Any] = set()

    def advance(self, count: int = 1, **figures: float | str) -> None:
        self.inner.advance(count, **figures)
        epoch = figures.get("epoch")
        if METRIC in figures and epoch not in self.reported:
            import ray.tune

            self.reported.add(epoch)
            ray.tune.report({METRIC: float(figures[METRIC])})
