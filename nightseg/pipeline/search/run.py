"""A search from its check to its best recipe.

What all trials share (base models, translations, features) is done once, before the first trial. A trial is a run
folder that borrows it, so it can be inspected, continued and reported like any run; its name follows from everything it
depends on. A search that was interrupted, or is asked for more trials, continues from its own records.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

from nightseg.cluster import ray as cluster
from nightseg.data.class_list import taxonomy
from nightseg.errors import UserError, all_of, closest
from nightseg.pipeline import build, check, classes, leaks, run, tracking
from nightseg.pipeline.graph import Graph, NodeId
from nightseg.pipeline.search.importance import importance
from nightseg.pipeline.search.keys import check_keys, preparing_keys
from nightseg.pipeline.search.records import FAILED, RECORDS_NAME, Records
from nightseg.pipeline.search.settings import Search
from nightseg.pipeline.search.trials import Trials, assignments, run_trial, shared_nodes
from nightseg.progress import Progress
from nightseg.recipe import RecipeError, load_recipe, load_settings, save_recipe, told_of
from nightseg.recipe.types import Recipe
from nightseg.report.search_page import write_search_page
from nightseg.storage import Commit, Location, Workspace, hash_of

BEST_NAME = "best.yaml"


class Found(NamedTuple):
    """The outcome of a search: trials with their values and scores (fractions), the best, and where it lies."""

    folder: Location
    best: dict[str, Any]
    trials: list[dict[str, Any]]
    best_recipe: Location
    page: Location | None = None
    metric: str = "miou"
    trainings: int = 0  # that all trials ran
    reused: int = 0  # stages that trials needed and did not have to do


def search(
    file: str,
    overrides: Sequence[str] = (),
    *,
    run_dir: str | None = None,
    log: Collection[str] = (),
    progress: Progress,
    watched: Callable[[Location], None] | None = None,
    work: Any = run_trial,
) -> Found:
    """Search, or continue a search. Writes trials.json, search.html and best.yaml, and one run folder a trial.

    `log`: trackers that are given the finished search. `watched` is called with the folder of the search before its
    first trial. `work`: one trial, as `run_trial`.
    Raises UserError before anything starts when the search or its recipe is wrong; RuntimeError if no trial finished.
    """
    tracking.check_trackers(log)
    settings = load_settings(Search, file, overrides)
    recipe_file = Location.of(file).beside(settings.recipe)
    _check(file, settings, recipe_file)
    folder = run.run_folder(settings.name, run_dir)
    with Workspace(folder).lock(), cluster.left_as_found():
        trials = Trials(settings, folder)
        save_recipe(load_recipe(recipe_file, settings.overrides), trials.recipe_file)
        with told_of(recipe_file, settings.overrides):
            graphs = [(values, trials.graph(values)) for values in trials.edges()]
            check_keys(trials, graphs, progress)
            _refuse(trials, graphs, progress)
        if not (folder / RECORDS_NAME).exists():
            cluster.connect(dashboard=True)  # before a stage of the base starts a Ray without one
        _examine(trials, progress)
        trials = _founded(trials, graphs, progress)
        records = Records(folder, settings, trials.name)
        if not records.is_finished:
            _all(trials, records, graphs, work, progress, watched)
        if records.shortfall:
            progress.say(records.shortfall)
        found = _found(trials, records)
        tracking.track_search(log, folder, records.content())
    return found


def _all(
    trials: Trials,
    records: Records,
    graphs: Sequence[tuple[dict[str, Any], Graph]],
    work: Any,
    progress: Progress,
    watched: Callable[[Location], None] | None,
) -> None:
    """The trials that are left."""
    from nightseg.pipeline.search.tune import places, tune

    if cluster.is_local() and (records.rows or records.others):
        cluster.disconnect()  # a stage of the base may have started a Ray without a dashboard
    cluster.connect(dashboard=True)
    search, recipes = trials.settings, [trials.recipe(values) for values, _ in graphs]
    concurrent = places([recipe.compute for recipe in recipes], cpus=search.cpus, gpus=search.gpus)
    if search.concurrent is not None and search.concurrent > concurrent:
        progress.say(f"{search.concurrent} trials at a time were asked for, there is room for {concurrent}")
    concurrent = min(concurrent, search.concurrent or search.trials)
    progress.say(f"{concurrent} {'trials' if concurrent > 1 else 'trial'} at a time")
    epochs = max(trials.training(values).epochs for values, _ in graphs)
    if watched is not None:
        watched(trials.folder)
    tune(
        trials,
        records,
        work,
        progress,
        concurrent=concurrent,
        epochs=epochs,
        keys=preparing_keys(trials, graphs),
        on_end=partial(_show, trials, records),
    )


def _show(trials: Trials, records: Records) -> Location:
    """The page of the search as it is now."""
    records.importance = importance(trials.settings, records.rows)
    return write_search_page(trials.folder, records.content())


def _found(trials: Trials, records: Records) -> Found:
    search, folder, rows, best = trials.settings, trials.folder, records.ranked, records.best
    page = _show(trials, records)
    records.write()
    if best is None:
        errors = [str(row["error"]) for row in rows if row["end"] == FAILED]
        reason = errors[0] if errors else "none came to its last epoch" if rows else "the time was over"
        raise RuntimeError(f"no trial finished: {reason}. Their run folders are in {folder / 'trials'}")
    best_recipe = folder / BEST_NAME
    save_recipe(load_recipe(trials.recipe_file, assignments(best["values"])), best_recipe)
    trainings, reused = (sum(row.get(key, 0) for row in rows) for key in ("trainings", "reused"))
    return Found(folder, best, rows, best_recipe, page, search.metric, trainings, reused)


# -- before anything starts -------------------------------------------------------------------------------------------


def _check(file: str, settings: Search, recipe_file: Location) -> None:
    """All that is wrong with the request, in one message: unknown model, no validation set, values no recipe takes."""
    recipe = load_recipe(recipe_file, settings.overrides)
    problems = []
    if settings.model not in recipe.models:
        hint, known = closest(settings.model, recipe.models), ", ".join(recipe.models) or "none"
        problems.append(f"model: the recipe has no model {settings.model!r}{hint}; known: {known}")
    else:
        problems += _wrong_with_score(settings, recipe)
    for key, dimension in settings.space.items():
        for value in dimension.edges():
            try:
                load_recipe(recipe_file, [*settings.overrides, *assignments({key: value})])
            except RecipeError as error:
                details = [line.strip() for line in str(error).splitlines()]
                problems += [f"space.{key}: {detail}" for detail in details[1:] or details]
                break
    if problems:
        head = f"{file}: {len(problems)} error{'s' if len(problems) > 1 else ''}; nothing was started."
        raise UserError(
            "\n".join([head, *(f"  {problem}" for problem in problems)]), cure="correct these keys and search again"
        )


def _wrong_with_score(settings: Search, recipe: Recipe) -> list[str]:
    """What is wrong with the score that trials are compared by."""
    model, validation = settings.model, recipe.models[settings.model].validate_on
    tests = {dataset: test for test, dataset in recipe.test_sets.items()}
    problems = []
    if settings.test is not None and settings.test not in recipe.test_sets:
        hint, known = closest(settings.test, recipe.test_sets), ", ".join(recipe.test_sets) or "none"
        problems.append(f"test: the recipe has no test set {settings.test!r}{hint}; known: {known}")
    elif settings.test is not None and not settings.spoil_test:
        problems.append(
            f"test: a search that looks at the test set {settings.test} spoils it: what it says of the best trial is "
            "too good; validate on other frames, or say spoil_test: true"
        )
    if settings.test is None and not validation:
        problems.append(
            f"model: {model} has no validate_on, so there is no score to compare by; add "
            f"models.{model}.validate_on=[DATASET] to set, with a dataset that is not a test set"
        )
    if not settings.spoil_test:
        problems += [
            f"model: {model} is validated on {dataset}, which is the test set {tests[dataset]}; a search that looks at "
            "a test set spoils it: validate on other frames, or say spoil_test: true"
            for dataset in validation
            if dataset in tests
        ]
    kind, _, name = settings.metric.partition(".")
    known_classes = taxonomy(recipe.taxonomy).classes
    if kind == "iou" and name not in known_classes:
        problems.append(f"metric: there is no class {name!r}{closest(name, known_classes)}")
    return problems


def _refuse(trials: Trials, graphs: Sequence[tuple[dict[str, Any], Graph]], progress: Progress) -> None:
    """What a stage of some trial would refuse, and what some frames of each folder tell, before the first stage."""
    model, shared = trials.settings.model, trials.shared
    done, steps = check.done_in(shared), list[Callable[[], Any]]()
    if not (shared / "stages").is_folder():
        look = partial(check.check, most=run.FRAMES_BEFORE, is_measured=False, progress=progress)
        steps.append(partial(look, trials.recipe(trials.first), shared, only=model))
    for values, graph in graphs[bool(steps) :]:
        steps.append(partial(check.refuse, trials.recipe(values), graph, done))
    all_of(*steps)


def _examine(trials: Trials, progress: Progress) -> None:
    """Trials are chosen by their validation frames, so none of these may be a test frame either."""
    recipe, model = load_recipe(trials.recipe_file), trials.settings.model
    whole = build.build_graph(recipe, model)  # with the test sets
    commits = run.prepare(recipe, trials.shared, leaks.needed(whole), only=model, progress=progress)
    found = leaks.find(whole, commits, validation=not trials.settings.spoil_test)
    leaks.tell(found, recipe.leaks, progress)
    classes.check(whole, commits, taxonomy(recipe.taxonomy), progress)


def _founded(trials: Trials, graphs: Sequence[tuple[dict[str, Any], Graph]], progress: Progress) -> Trials:
    """The trials, once what they share is committed."""
    shared = shared_nodes(graph for _, graph in graphs)
    progress.say(f"{len(shared)} stages are shared by all trials and done once")
    commits: dict[NodeId, Commit] = {}
    for values, graph in graphs:
        if shared & graph.nodes.keys() - commits.keys():
            recipe, place = trials.recipe(values), trials.shared
            commits |= run.prepare(recipe, place, shared, only=trials.settings.model, progress=progress)
    versions = {str(node): part.version for _, graph in graphs for node, part in graph.nodes.items()}
    contents = {str(node): commit.content for node, commit in commits.items()}
    return trials._replace(foundation=hash_of([versions, contents]))
