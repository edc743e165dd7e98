"""Ray Tune over the rounds: which loss, which selection, how many frames. Optuna proposes, ASHA stops the losers early.

What all trials share (base models, translations, features) is done once, before the first trial. A trial is a run
folder that borrows it, so it can be inspected, continued and reported like any run; its name follows from everything it
depends on. A search that was interrupted, or asked for more trials, continues: Optuna's proposals follow from its seed,
so the same trials come again and find what they have committed. Nothing is read from Tune's own files.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from statistics import fmean
from typing import Annotated, Any, NamedTuple

from pydantic import Field, model_validator

from nightseg.cluster import ray as cluster
from nightseg.cluster.ray import wants_logs
from nightseg.data.class_list import taxonomy
from nightseg.errors import UserError, all_of, closest
from nightseg.metrics.seeds import deviation
from nightseg.pipeline import build, check, classes, leaks, run
from nightseg.pipeline.graph import Graph, NodeId
from nightseg.progress import Progress, SilentProgress, Task
from nightseg.recipe import RecipeError, load_recipe, load_settings, save_recipe, told_of
from nightseg.recipe.types import Recipe
from nightseg.segmenter.settings import Training
from nightseg.settings import Name, Positive, Strict
from nightseg.storage import Commit, Location, Workspace, hash_of

METRIC = "miou"
EPOCH = "epoch"
SEEDS = "seeds"

# What Tune reserves for the driver of a trial. Its training and its passes ask for their own CPUs, and on a small
# machine for all of them; a request for nothing is refused, so it is a byte of memory.
DRIVER = {"memory": 1}


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

    def edges(self) -> list[Any]:
        """The values that decide what the dimension reaches: the ends of a range, or all of a choice."""
        return list(self.choice or self.uniform or self.log_uniform or ())


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


def search(file: str, overrides: Sequence[str] = (), *, run_dir: str | None = None, progress: Progress) -> Found:
    """Search, or continue a search. Writes trials.json and best.yaml, and one run folder a trial.

    Raises UserError before anything starts when the search or its recipe is wrong; RuntimeError if no trial finished.
    """
    settings = load_settings(Search, file, overrides)
    recipe_file = Location.of(file).beside(settings.recipe)
    _check(file, settings, recipe_file)
    folder = run.run_folder(settings.name, run_dir)
    with Workspace(folder).lock(), cluster.left_as_found():
        trials = Trials(settings, folder)
        save_recipe(load_recipe(recipe_file, settings.set), trials.recipe_file)
        with told_of(recipe_file, settings.set):
            _refuse(trials, progress)
        if not (folder / "trials.json").exists():
            cluster.connect(dashboard=True)  # before a stage of the base starts a Ray without one
        _examine(trials, progress)
        trials = _founded(trials, progress)
        identity = hash_of([trials.name(trials.first), settings.model_dump(mode="json")])
        rows = _finished(folder, identity)
        if rows is None:
            if cluster.is_local() and (folder / "trials.json").exists():
                cluster.disconnect()
            cluster.connect(dashboard=True)
            rows = _tune(trials, identity, progress)
        best = _best(rows, folder)
        best_recipe = folder / "best.yaml"
        save_recipe(load_recipe(trials.recipe_file, assignments(best["values"])), best_recipe)
        content = {"identity": identity, "search": settings.model_dump(mode="json"), "best": best, "trials": rows}
        (folder / "trials.json").write_json(content)
    return Found(folder, best, rows, best_recipe)


def _refuse(trials: Trials, progress: Progress) -> None:
    """What a stage of some trial would refuse, and what some frames of each folder tell, before the first stage."""
    model, shared = trials.settings.model, trials.folder / "shared"
    done, steps = check.done_in(shared), list[Callable[[], Any]]()
    if not (shared / "stages").is_folder():
        look = partial(check.check, most=run.FRAMES_BEFORE, is_measured=False, progress=progress)
        steps.append(partial(look, trials.recipe(trials.first), shared, only=model))
    for values in trials.edges()[bool(steps) :]:
        steps.append(partial(check.refuse, trials.recipe(values), trials.graph(values), done))
    all_of(*steps)


def _examine(trials: Trials, progress: Progress) -> None:
    """Trials are chosen by their validation frames, so none of these may be a test frame either."""
    recipe, model = load_recipe(trials.recipe_file), trials.settings.model
    graph = build.build_graph(recipe, model)
    commits = run.prepare(recipe, trials.folder / "shared", leaks.needed(graph), only=model, progress=progress)
    leaks.tell(leaks.find(graph, commits, validation=True), recipe.leaks, progress)
    classes.check(graph, commits, taxonomy(recipe.taxonomy), progress)


def _founded(trials: Trials, progress: Progress) -> Trials:
    """The trials, once what they share is committed."""
    edges = trials.edges()
    graphs = [trials.graph(values) for values in edges]
    shared = shared_nodes(graphs)
    progress.say(f"{len(shared)} stages are shared by all trials and done once")
    commits: dict[NodeId, Commit] = {}
    for values, graph in zip(edges, graphs, strict=True):
        if shared & graph.nodes.keys() - commits.keys():
            recipe, place = trials.recipe(values), trials.folder / "shared"
            commits |= run.prepare(recipe, place, shared, only=trials.settings.model, progress=progress)
    versions = {str(node): part.version for graph in graphs for node, part in graph.nodes.items()}
    contents = {str(node): commit.content for node, commit in commits.items()}
    return trials._replace(foundation=hash_of([versions, contents]))


def _finished(folder: Location, identity: str) -> list[dict[str, Any]] | None:
    """The trials of the very same search, if it came to its end and none of them failed."""
    try:
        content = (folder / "trials.json").read_json()
        is_finished = content["identity"] == identity and all(row["end"] != "failed" for row in content["trials"])
        return list(content["trials"]) if is_finished else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _best(rows: Sequence[Mapping[str, Any]], folder: Location) -> dict[str, Any]:
    """The best of the trials that came to their end: a trial that was stopped early has no model to show."""
    done = [row for row in rows if row["end"] == "done"]
    if not done:
        errors = [str(row["error"]) for row in rows if row["error"]]
        reason = errors[0] if errors else "none came to its last epoch"
        raise RuntimeError(f"no trial finished: {reason}. Their run folders are in {folder / 'trials'}")
    return dict(max(done, key=lambda row: float(row[METRIC])))


# -- before anything starts -------------------------------------------------------------------------------------------


def _check(file: str, settings: Search, recipe_file: Location) -> None:
    """All that is wrong with the request, in one message: unknown model, no validation set, values no recipe takes."""
    recipe = load_recipe(recipe_file, settings.set)
    problems = []
    if settings.model not in recipe.models:
        hint, known = closest(settings.model, recipe.models), ", ".join(recipe.models) or "none"
        problems.append(f"model: the recipe has no model {settings.model!r}{hint}; known: {known}")
    elif not recipe.models[settings.model].validate_on:
        problems.append(
            f"model: {settings.model} has no validate_on, so there is no score to maximise; add "
            f"models.{settings.model}.validate_on=[DATASET] to set, with a dataset that is not a test set"
        )
    else:
        tests = {dataset: test for test, dataset in recipe.test_sets.items()}
        problems += [
            f"model: {settings.model} is validated on {dataset}, which is the test set {tests[dataset]}; a search that "
            "looks at a test set spoils it: validate on other frames"
            for dataset in recipe.models[settings.model].validate_on
            if dataset in tests
        ]
    for key, dimension in settings.space.items():
        for value in dimension.edges():
            try:
                load_recipe(recipe_file, [*settings.set, *assignments({key: value})])
            except RecipeError as error:
                details = [line.strip() for line in str(error).splitlines()]
                problems += [f"space.{key}: {detail}" for detail in details[1:] or details]
                break
    if problems:
        head = f"{file}: {len(problems)} error{'s' if len(problems) > 1 else ''}; nothing was started."
        raise UserError(
            "\n".join([head, *(f"  {problem}" for problem in problems)]), cure="correct these keys and search again"
        )


# -- trials ------------------------------------------------------------------------------------------------------------


class Trials(NamedTuple):
    """What a trial needs besides its values. Picklable."""

    settings: Search
    folder: Location
    foundation: str = ""  # hash over what all trials share: other inputs or another stage version make other trials

    @property
    def recipe_file(self) -> Location:
        """The recipe without the searched values, with all that it reads, where every node of a cluster finds it."""
        return self.folder / "recipe.yaml"

    def recipe(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe of one trial. No test set is touched in a search: the best model is tested once, afterwards."""
        recipe = load_recipe(self.recipe_file, assignments(values))
        name = self.settings.model
        model = recipe.models[name]
        untested = model.model_copy(update={"test": {}})
        return recipe.model_copy(
            update={"models": recipe.models | {name: untested}, "predictions": {}, "consistency": None}
        )

    @property
    def first(self) -> dict[str, Any]:
        """Values of some trial: the first of every dimension."""
        return {key: dimension.edges()[0] for key, dimension in self.settings.space.items()}

    def edges(self) -> list[dict[str, Any]]:
        others = [{key: value} for key, dimension in self.settings.space.items() for value in dimension.edges()[1:]]
        return [self.first | other for other in ({}, *others)]

    def training(self, values: Mapping[str, Any]) -> Training:
        recipe = self.recipe(values)
        return recipe.training_of(recipe.models[self.settings.model])

    def graph(self, values: Mapping[str, Any]) -> Graph:
        return build.build_graph(self.recipe(values), self.settings.model)

    def name(self, values: Mapping[str, Any]) -> str:
        """The same trial has the same name, whenever it is proposed."""
        content = self.recipe(values).model_dump(mode="json", exclude={"base", "compute", "name"})
        return hash_of([self.foundation, content])[:12]


def shared_nodes(graphs: Iterable[Graph]) -> set[NodeId]:
    """The stages that no searched key reaches: the same in all of these graphs, one for each edge of the space.

    A stage that only some of them have (one of several models to start from) is shared by the trials that need it.
    """
    graphs = list(graphs)
    seen: dict[NodeId, Any] = {}
    touched: set[NodeId] = set()
    for graph in graphs:
        for node in graph.nodes.values():
            settings = (node.recipe, node.needs, node.seed)
            if seen.setdefault(node.id, settings) != settings:
                touched.add(node.id)
    for _ in graphs:  # a change reaches all that stands on it; what one graph adds may matter in an earlier one
        for graph in graphs:
            for node in graph.nodes.values():  # in order, so one pass is enough
                if touched.intersection(node.needs):
                    touched.add(node.id)
    return seen.keys() - touched


def assignments(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


# -- one trial --------------------------------------------------------------------------------------------------------


def run_trial(trials: Trials, values: Mapping[str, Any], report: Callable[..., None]) -> None:
    """An ordinary run that borrows the shared stages; `report(epoch, miou)` hears of each validation, in order.

    Of several seeds the first is watched; a trial that was not stopped then trains the others, and the last report is
    `report(epoch, mean, seeds)`, seed -> mIoU. A trial that comes again first reports what it had reported: it is
    stopped where it was stopped, or goes on. The last epoch is reported when its model is committed, because Tune ends
    the process of a trial that has reported it.
    """
    name = trials.settings.model
    place, training = trials.folder / "trials" / trials.name(values), trials.training(values)
    note = place / "validation.json"
    reported: dict[int, float] = {}

    def on_epoch(epoch: int, miou: float) -> None:
        if epoch % training.validate_every == 0 and max(reported, default=0) < epoch < training.epochs:
            reported[epoch] = miou
            note.write_json([list(pair) for pair in reported.items()])
            report(epoch, miou)

    for epoch, miou in note.read_json() if note.exists() else []:
        on_epoch(epoch, miou)
    progress = _TrialProgress(f"train {name}", on_epoch)
    borrow, recipe = [trials.folder / "shared"], trials.recipe(values)
    alone = recipe.compute.model_copy(update={"concurrent": 1})  # trials already run side by side
    recipe = recipe.model_copy(update={"compute": alone})
    done = run.run(recipe, place, only=name, borrow=borrow, progress=progress).results
    facts = done["models"][name]
    trained = facts.get("trainings") or {name: facts | {"seed": 0}}
    reached: dict[str, float] = {}
    for one in trained.values():
        commit = done["commits"][one["model"]]
        for record in (Location.of(commit["folder"]) / "history.json").read_json():
            if record.get("validation") and not reached:  # also those of a training that was too quick to be watched
                on_epoch(record["epoch"], record["validation"][METRIC] or 0.0)
        kept = commit.get("summary", {}).get("kept")
        reached[str(one["seed"])] = (kept or record["validation"])[METRIC] or 0.0
    report(training.epochs, fmean(reached.values()), *([reached] if len(reached) > 1 else []))


class _TrialProgress(SilentProgress):
    """Passes on the validations of one task, the training of the searched model, and is that task.

    The figures of a task stand until they are replaced, so an epoch is seen many times.
    """

    def __init__(self, title: str, on_epoch: Callable[[int, float], None]) -> None:
        self.title, self.on_epoch = title, on_epoch
        self.last = 0
        self.lock = threading.Lock()  # the training is watched by a thread

    @contextmanager
    def task(self, title: str, total: int | None, unit: str) -> Iterator[Task]:
        yield self if title == self.title else SilentProgress()

    def advance(self, count: int = 1, **figures: float | str) -> None:
        epoch = int(figures.get(EPOCH, 0))
        with self.lock:
            if epoch > self.last and METRIC in figures:
                self.last = epoch
                self.on_epoch(epoch, float(figures[METRIC]))


# -- Ray Tune ----------------------------------------------------------------------------------------------------------


def _tune(trials: Trials, identity: str, progress: Progress) -> list[dict[str, Any]]:
    """All trials, best first. Tune's folder holds only what TensorBoard shows, so it is written anew."""
    import optuna
    import ray.tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Tune would return as if the search were finished
    if not wants_logs():
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # tracebacks of trials; their reasons are in the rows
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings, logs = trials.settings, trials.folder / "tune"
    (logs / identity[:12]).delete()
    epochs = trials.training(trials.first).epochs

    def trial(values: dict[str, Any]) -> None:
        def report(epoch: int, miou: float, seeds: Mapping[str, float] | None = None) -> None:
            ray.tune.report({METRIC: miou, EPOCH: epoch, **({SEEDS: seeds} if seeds else {})})

        run_trial(trials, values, report)

    with progress.task("search", settings.trials, "trials") as task:
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(trial, DRIVER),
            param_space={key: _domain(dimension) for key, dimension in settings.space.items()},
            tune_config=ray.tune.TuneConfig(
                metric=METRIC,
                mode="max",
                num_samples=settings.trials,
                max_concurrent_trials=settings.concurrent,
                search_alg=OptunaSearch(seed=settings.seed),
                scheduler=ASHAScheduler(
                    time_attr=EPOCH, max_t=max(epochs, settings.grace_epochs), grace_period=settings.grace_epochs
                ),
                trial_dirname_creator=_folder_names(),
            ),
            run_config=ray.tune.RunConfig(
                name=identity[:12], storage_path=logs.uri, verbose=0, callbacks=[_progress_callback(task)]
            ),
        )
        with redirect_stdout(io.StringIO()):  # a box of settings, and a wrong hint where TensorBoard finds the trials
            grid = tuner.fit()
    rows = [_row(trials, result, epochs) for result in grid]
    return sorted(rows, key=lambda row: (row["end"] != "done", -(row[METRIC] or 0.0)))


def _row(trials: Trials, result: Any, epochs: int) -> dict[str, Any]:
    metrics, values = result.metrics or {}, {key: (result.config or {}).get(key) for key in trials.settings.space}
    reached, seeds = int(metrics.get(EPOCH, 0)), metrics.get(SEEDS)
    return {
        "trial": trials.name(values),
        "values": values,
        METRIC: metrics.get(METRIC),  # the mean of its seeds
        **({"std": deviation([*seeds.values()]), SEEDS: seeds} if seeds else {}),
        "epochs": reached,
        "end": "failed" if result.error else "done" if reached >= epochs else "stopped",
        "seconds": metrics.get("time_total_s"),
        "error": _reason(str(result.error)) if result.error else None,
    }


def _reason(trace: str) -> str:
    """The message of a trial's error. Tune hands over its traceback; that also lies in the folder of the trial."""
    message = trace.rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2]
    return message.strip() if message != trace else trace.strip().rpartition("\n")[2]


def _folder_names() -> Callable[[Any], str]:
    """How a trial is called in TensorBoard: its number and its values."""
    numbers: dict[str, int] = {}

    def name(trial: Any) -> str:
        number = numbers.setdefault(trial.trial_id, len(numbers) + 1)
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in trial.config.items()}
        words = [f"{key.rpartition('.')[2]}={value}" for key, value in shown.items()]
        return re.sub(r"[^\w.=,+-]", "_", ",".join([f"{number:03d}", *words]))[:120]

    return name


def _progress_callback(task: Task) -> Any:
    import ray.tune

    class Advance(ray.tune.Callback):  # type: ignore[misc]
        """Advances the task at the end of each trial. Tune pickles its callbacks; the task stays here."""

        best: float | None = None

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Mapping[str, Any], **_: Any) -> None:
            if METRIC in result:
                self.best = max(float(result[METRIC]), self.best or 0.0)
                task.advance(0, best=self.best)

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            task.advance(1)

        on_trial_error = on_trial_complete

        def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
            return object, ()

    return Advance()


def _domain(dimension: Dimension) -> Any:
    import ray.tune

    if dimension.uniform:
        return ray.tune.uniform(*dimension.uniform)
    if dimension.log_uniform:
        return ray.tune.loguniform(*dimension.log_uniform)
    return ray.tune.choice(dimension.choice)
