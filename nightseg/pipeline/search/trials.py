"""One trial: the recipe with its values, as an ordinary run that borrows what others have done."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any, Final, NamedTuple

from nightseg.pipeline import build, run
from nightseg.pipeline.graph import Graph, NodeId
from nightseg.pipeline.search.settings import Search
from nightseg.progress import SilentProgress, Task
from nightseg.recipe import load_recipe
from nightseg.recipe.types import Recipe, TestRow
from nightseg.segmenter.settings import Training
from nightseg.storage import Location, Workspace, hash_of
from nightseg.storage.lock import LEASE_SECONDS

EPOCH: Final = "epoch"
TRAINING: Final = "train_segmenter"
NOTE: Final = "validation.json"  # what a trial has reported, by metric, in its run folder

Report = Callable[[int, float], None]


class Trials(NamedTuple):
    """What a trial needs besides its values. Picklable."""

    settings: Search
    folder: Location
    foundation: str = ""  # hash over what all trials share: other inputs or another stage version make other trials

    @property
    def recipe_file(self) -> Location:
        """The recipe without the searched values, with all that it reads, where every node of a cluster finds it."""
        return self.folder / "recipe.yaml"

    @property
    def shared(self) -> Location:
        """The run folder of what all trials share."""
        return self.folder / "shared"

    def place(self, name: str) -> Location:
        """The run folder of a trial."""
        return self.folder / "trials" / name

    def recipe(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe of one trial. It touches no test set, except the one that trials are compared by."""
        recipe = load_recipe(self.recipe_file, assignments(values))
        name, test = self.settings.model, self.settings.test
        model = recipe.models[name].model_copy(update={"test": {} if test is None else {test: TestRow()}})
        return recipe.model_copy(
            update={"models": recipe.models | {name: model}, "predictions": {}, "consistency": None}
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


def assignments(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


# -- what is shared ---------------------------------------------------------------------------------------------------


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


def lenders(
    keys: Sequence[str], row: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], trials: Trials
) -> list[Location]:
    """The run folders that a trial borrows from: what all share, and the first trial that agrees with it in `keys`."""
    agree = [
        other
        for other in rows
        if other["number"] < row["number"] and all(other["values"][key] == row["values"][key] for key in keys)
    ]
    return [trials.shared, *(trials.place(other["trial"]) for other in agree[: bool(keys)])]


# -- one trial --------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """How a trial ended: its score (a fraction, the mean over the seeds), that of each seed, epochs trained.

    `validation` of the last epoch, of the seed that is watched, is the last point of its learning curve. The score may
    be another: of several seeds, of the epoch whose weights are kept, of a test set.
    """

    score: float
    seeds: dict[str, float]
    epochs: int
    validation: float = math.nan


def run_trial(trials: Trials, values: Mapping[str, Any], borrow: Sequence[Location], report: Report) -> Outcome:
    """An ordinary run that borrows stages; `report(epoch, score)` hears of each validation but the last, in order.

    Of several seeds the first is watched; a trial that was not stopped then trains the others. A trial that comes again
    first reports what it had reported: it is stopped where it was stopped, or goes on. The last epoch is the outcome,
    told when its model is committed: Tune ends the process of a trial that has reported it. Raises what made any stage
    fail, also that of one seed.
    """
    search = trials.settings
    place, training = trials.place(trials.name(values)), trials.training(values)
    note = place / NOTE
    found = note.read_json() if note.exists() else {}
    noted: dict[str, list[list[Any]]] = found if isinstance(found, dict) else {}  # once it did not say of which metric
    reported: dict[int, float] = {}

    def on_epoch(epoch: int, score: float) -> None:
        if epoch % training.validate_every == 0 and max(reported, default=0) < epoch < training.epochs:
            reported[epoch] = score
            if math.isfinite(score):  # else the report ends the trial
                note.write_json(noted | {search.metric: [list(pair) for pair in reported.items()]})
            report(epoch, score)

    for epoch, score in noted.get(search.metric, []):
        on_epoch(epoch, score)
    progress = _TrialProgress(f"train {search.model}", search.metric, on_epoch)
    recipe = trials.recipe(values)
    alone = recipe.compute.model_copy(update={"concurrent": 1})  # trials already run side by side
    recipe = recipe.model_copy(update={"compute": alone})
    _wait_for_the_dead(place)
    outcome = run.run(recipe, place, only=search.model, borrow=borrow, progress=progress)
    if outcome.errors:  # the mean over the seeds that did not fail would be that of the lucky ones
        raise run.as_one(outcome.errors)
    done = outcome.results
    facts = done["models"][search.model]
    trained = facts.get("trainings") or {search.model: facts | {"seed": 0}}
    reached, validation = dict[str, float](), math.nan
    for one in trained.values():
        commit = done["commits"][one["model"]]
        history = (Location.of(commit["folder"]) / "history.json").read_json()
        seen = {record[EPOCH]: record["validation"] for record in history if record.get("validation")}
        if not reached:  # also epochs of a training that was too quick to be watched
            for epoch, scores in seen.items():
                on_epoch(epoch, score_in(scores, search.metric))
            validation = score_in(seen.get(training.epochs, {}), search.metric)
        kept = commit.get("summary", {}).get("kept") or {EPOCH: training.epochs}
        measured = seen.get(kept[EPOCH], {}) if search.test is None else one["tests"][search.test]
        reached[str(one["seed"])] = score_in(measured, search.metric)
    return Outcome(fmean(reached.values()), reached, training.epochs, validation)


def _wait_for_the_dead(place: Location) -> None:
    """A lease on a store outlives a try that died; nobody else works here while the search has its own folder."""
    last = time.monotonic() + 1.5 * LEASE_SECONDS
    while not place.is_local and Workspace(place).holder() is not None and time.monotonic() < last:
        time.sleep(1.0)


def score_in(scores: Mapping[str, Any], metric: str) -> float:
    """A score by its name; NaN where it is not defined."""
    kind, _, name = metric.partition(".")
    found = scores.get(kind, {}).get(name) if name else scores.get(kind)
    return math.nan if found is None else float(found)


def own_stages(place: Location) -> list[str]:
    """What a trial has committed itself, borrowed stages not included: STAGE/NAME."""
    return [f"{commit.stage}/{commit.name}" for commit in Workspace(place).commits()]


class _TrialProgress(SilentProgress):
    """Passes on the validations of one task, the training of the searched model, and is that task.

    The figures of a task stand until they are replaced, so an epoch is seen many times.
    """

    def __init__(self, title: str, metric: str, on_epoch: Report) -> None:
        self.title, self.on_epoch = title, on_epoch
        self.figure = metric if metric == "miou" else f"validation/{metric}"
        self.last = 0
        self.lock = threading.Lock()  # the training is watched by a thread

    @contextmanager
    def task(self, title: str, total: int | None, unit: str) -> Iterator[Task]:
        yield self if title == self.title else SilentProgress()

    def advance(self, count: int = 1, **figures: float | str) -> None:
        epoch = int(figures.get(EPOCH, 0))
        with self.lock:
            if epoch > self.last and self.figure in figures:
                self.last = epoch
                self.on_epoch(epoch, float(figures[self.figure]))
