"""What a search tries, and one trial of it: which settings, what all trials share, and an ordinary run with a listener.

A trial is a run folder that borrows the shared stages, so it can be inspected, continued and reported like any run.
Its name follows from everything it depends on: a search that asks for the same trial again finds what it committed.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, NamedTuple

from pydantic import Field, model_validator

from nightseg.pipeline import build, run
from nightseg.pipeline.graph import Graph, Node, NodeId
from nightseg.progress import SilentProgress, Task
from nightseg.recipe import load_recipe
from nightseg.recipe.types import Recipe
from nightseg.segmenter.settings import Training
from nightseg.settings import Name, Positive, Strict
from nightseg.storage import Location, hash_of

METRIC = "miou"
EPOCH = "epoch"

Settings = tuple[Mapping[str, Any], tuple[NodeId, ...], int]  # of a stage: its part of the recipe, needs, seed


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
        untested = recipe.models[name].model_copy(update={"test": {}})
        return recipe.model_copy(update={"models": recipe.models | {name: untested}, "predictions": {}})

    @property
    def first(self) -> dict[str, Any]:
        """Values of some trial: the first of every dimension."""
        return {key: dimension.edges()[0] for key, dimension in self.settings.space.items()}

    def edges(self) -> list[dict[str, Any]]:
        """`first`, and all that differ from it in one dimension and lie on its edge."""
        others = [{key: value} for key, dimension in self.settings.space.items() for value in dimension.edges()[1:]]
        return [self.first | other for other in ({}, *others)]

    def training(self, values: Mapping[str, Any]) -> Training:
        recipe = self.recipe(values)
        return recipe.training_of(recipe.models[self.settings.model])

    def graph(self, values: Mapping[str, Any]) -> Graph:
        return build.build_graph(self.recipe(values), self.settings.model)

    def name(self, values: Mapping[str, Any]) -> str:
        """The same trial has the same name, whenever it is proposed."""
        content = self.recipe(values).model_dump(mode="json", exclude={"compute", "name"})
        return hash_of([self.foundation, content])[:12]


def shared_nodes(graphs: Iterable[Graph]) -> set[NodeId]:
    """The stages that no searched key reaches: the same in all of these graphs, one for each edge of the space.

    A stage that only some of them have (one of several models to start from) is shared by the trials that need it.
    """
    graphs = list(graphs)
    seen: dict[NodeId, Settings] = {}
    touched: set[NodeId] = set()
    for graph in graphs:
        for node in graph.nodes:
            if seen.setdefault(node, _settings(graph, node)) != _settings(graph, node):
                touched.add(node)
    for _ in graphs:  # a change reaches all that stands on it; what one graph adds may matter in an earlier one
        for graph in graphs:
            touched |= {node.id for node in _after(graph, touched)}
    return seen.keys() - touched


def _after(graph: Graph, touched: Collection[NodeId]) -> list[Node]:
    """The nodes that need a touched one, directly or not."""
    reached = set(touched)
    found = []
    for node in graph.nodes.values():  # in order, so one pass is enough
        if reached.intersection(node.needs):
            reached.add(node.id)
            found.append(node)
    return found


def _settings(graph: Graph, node: NodeId) -> Settings:
    return graph.nodes[node].recipe, graph.nodes[node].needs, graph.nodes[node].seed


def assignments(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


# -- one trial --------------------------------------------------------------------------------------------------------


def run_trial(trials: Trials, values: Mapping[str, Any], report: Callable[[int, float], None]) -> None:
    """An ordinary run that borrows the shared stages; `report(epoch, miou)` hears of each validation, in order.

    A trial that comes again first reports what it had reported: it is stopped where it was stopped, or goes on. The
    last epoch is reported when its model is committed, because Tune ends the process of a trial that has reported it.
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
    done = run.run(recipe, place, only=name, borrow=borrow, progress=progress).results
    attempt = Location.of(done["commits"][done["models"][name]["model"]]["folder"])
    for record in (attempt / "history.json").read_json():
        if record.get("validation"):  # also those of a training that was too quick to be watched
            on_epoch(record["epoch"], record["validation"][METRIC] or 0.0)
    report(training.epochs, record["validation"][METRIC] or 0.0)


class _TrialProgress(SilentProgress):
    """Passes on the validations of one task, the training of the searched model."""

    def __init__(self, title: str, on_epoch: Callable[[int, float], None]) -> None:
        self.title, self.on_epoch = title, on_epoch

    @contextmanager
    def task(self, title: str, total: int | None, unit: str) -> Iterator[Task]:
        with super().task(title, total, unit) as silent:
            yield _EpochTask(self.on_epoch) if title == self.title else silent


class _EpochTask:
    """The figures of a task stand until they are replaced, so an epoch is seen many times."""

    def __init__(self, on_epoch: Callable[[int, float], None]) -> None:
        self.on_epoch = on_epoch
        self.last = 0
        self.lock = threading.Lock()  # the training is watched by a thread

    def advance(self, count: int = 1, **figures: float | str) -> None:
        epoch = int(figures.get(EPOCH, 0))
        with self.lock:
            if epoch > self.last and METRIC in figures:
                self.last = epoch
                self.on_epoch(epoch, float(figures[METRIC]))
