"""The words of the graph that `build.py` makes and `run.py` runs: node, view, inputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel

from nightseg.cluster.settings import MapCompute, TrainCompute
from nightseg.data import table as frame
from nightseg.errors import UserError, closest
from nightseg.progress import Progress
from nightseg.recipe.types import Prediction, TestRow
from nightseg.segmenter.settings import AdaptNorms, Network, Training
from nightseg.storage import Attempt, Commit, Stage, Workspace
from nightseg.translators.settings import ColourTranslator, CommandTranslator, FourierTranslator
from nightseg.unit.settings import Translator


class NodeId(NamedTuple):
    """One stage applied to one named thing; its text is the place of its output in the run folder."""

    stage: str
    name: str

    def __str__(self) -> str:
        return f"{self.stage}/{self.name}"


class View(NamedTuple):
    """The frames of one node's output, or only those of one domain of it."""

    node: NodeId
    domain: str | None = None

    def __str__(self) -> str:
        return f"{self.node}:{self.domain}" if self.domain else str(self.node)


class Given(NamedTuple):
    """A table of the user, and what its content is known by in keys."""

    table: pa.Table
    identity: str

    def __str__(self) -> str:
        return self.identity


Views = tuple[View | Given, ...]


class Frames(NamedTuple):
    """An input that is one table: the frames of all views with absolute uris, in the order of the views."""

    views: Views


FRAME_STAGES: Final = ("collect", "split")  # they only read and sort what the user has
CPU_STAGES: Final = (*FRAME_STAGES, "evaluate_translation")  # passes without a network
TABLE_STAGES: Final = ("select", "pseudo_label")  # they choose by what tables say
DRIVER_STAGES: Final = (*TABLE_STAGES, "adapt_norms")  # they work in the driver's process, with any actors

Source = Frames | NodeId | Mapping[str, Frames | NodeId] | None
"""What an argument of a stage is read from: frames, the commit of a node, several of them by name, or nothing."""


@dataclass(frozen=True)
class Node:
    """A call of a stage that may wait. Its key follows from all that is said here, but for `unhashed`."""

    id: NodeId
    version: int
    stage: Callable[..., Commit]
    resources: MapCompute | TrainCompute  # what it is given, too: no GPU where it has no use for one
    inputs: Mapping[str, Source]  # argument -> where it comes from
    settings: Mapping[str, Any]  # argument -> value
    unhashed: Mapping[str, Any] = field(default_factory=dict)  # arguments without which the result would be the same
    facts: Mapping[str, Any] = field(default_factory=dict)  # what arguments stand for: content of files, class lists
    seed: int = 0  # only stages that draw random numbers have one: the others are shared between seeds
    counted: tuple[str, ...] = ()  # inputs whose frames it works on; the rest are models, references, tests
    expected_rows: int | None = None  # frames that lie in the folders; known before the stage has run
    most_rows: int | None = None  # frames it hands on at most

    @cached_property
    def needs(self) -> tuple[NodeId, ...]:
        return tuple(dict.fromkeys(_nodes_of(self.inputs.values())))

    @cached_property
    def takes(self) -> tuple[NodeId, ...]:
        """Those whose frames it works on."""
        return tuple(dict.fromkeys(_nodes_of(self.inputs[name] for name in self.counted)))

    @property
    def is_in_driver(self) -> bool:
        """Whether it works in the driver's process."""
        compute = self.resources
        return isinstance(compute, MapCompute) and (not compute.actors or self.id.stage in DRIVER_STAGES)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """Its part of the recipe: the very settings that the stage is given, hashed into its key."""
        return {
            **{name: _named(source) for name, source in self.inputs.items()},
            **{name: part_of_key(value) for name, value in self.settings.items()},
            **self.facts,
        }

    def stage_in(self, workspace: Workspace, commits: Mapping[NodeId, Commit]) -> Stage:
        """Its place in a run folder, with its key; `commits` has those that it needs."""
        inputs = {str(need): commits[need].content for need in self.needs}
        return workspace.stage(
            self.id.stage, self.id.name, version=self.version, recipe=self.recipe, inputs=inputs, seed=self.seed
        )

    def work(self, commits: Mapping[NodeId, Commit], attempt: Attempt, progress: Progress) -> Commit:
        read = {name: _read(source, commits) for name, source in self.inputs.items()}
        return self.stage(**read, **self.settings, **self.unhashed, attempt=attempt, progress=progress)


WITHOUT_EFFECT: Final[Mapping[type[BaseModel], set[str]]] = {
    Network: {"encoder_weights"},
    Training: {"preset", "checkpoint_every"},
    Translator: {"kind", "preset", "day", "night", "start", "tile", "collapse_after"},
    AdaptNorms: {"pool"},
    FourierTranslator: {"day", "night"},
    ColourTranslator: {"day", "night"},
    CommandTranslator: {"to", "timeout_seconds"},
}
"""Fields that the result of a stage does not follow from: how it is done, or a name of what its inputs and facts hold.
All others are part of its key, at their defaults, too: a field that is added changes the key."""


def part_of_key(value: Any) -> Any:
    """A setting as JSON, without the fields that its result does not follow from."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude=WITHOUT_EFFECT.get(type(value)))
    if isinstance(value, Mapping):
        return {name: part_of_key(part) for name, part in value.items()}
    return value


def _nodes_of(sources: Any) -> Iterator[NodeId]:
    for source in sources:
        match source:
            case NodeId():
                yield source
            case Frames(views):
                yield from (view.node for view in views if isinstance(view, View))
            case Mapping():
                yield from _nodes_of(source.values())


def _named(source: Source) -> Any:
    match source:
        case Frames(views):
            return [str(view) for view in views]
        case Mapping():
            return {name: _named(part) for name, part in source.items()}
        case _:
            return None if source is None else str(source)


def _read(source: Source, commits: Mapping[NodeId, Commit]) -> Any:
    match source:
        case NodeId():
            return commits[source]
        case Frames(views):
            return pa.concat_tables([_frames(view, commits) for view in views], promote_options="default")
        case Mapping():
            return {name: _read(part, commits) for name, part in source.items()}
        case _:
            return None


def _frames(view: View | Given, commits: Mapping[NodeId, Commit]) -> pa.Table:
    if isinstance(view, Given):
        return view.table
    commit = commits[view.node]
    rows = frame.resolve(commit.table("frames"), commit.folder)
    if view.domain is not None:
        rows = rows.filter(pc.equal(rows[frame.DOMAIN], view.domain))
    return rows.select(frame.FRAME_SCHEMA.names)


def frames_at_most(graph: Graph) -> dict[NodeId, int | None]:
    """The frames that each node hands on at most, as far as folders and recipe tell; None where they do not."""
    rows: dict[NodeId, int | None] = {}
    for node in graph.nodes.values():
        counted = [rows.get(need) for need in node.takes]
        known = [count for count in counted if count is not None]
        taken = sum(known) if known and len(known) == len(counted) else None
        most = node.expected_rows if node.expected_rows is not None else taken
        rows[node.id] = most if most is None or node.most_rows is None else min(most, node.most_rows)
    return rows


@dataclass
class ModelNodes:
    """What belongs to one training of a model of the recipe."""

    train: NodeId
    select: NodeId | None
    pseudo_label: NodeId | None
    facts: Mapping[str, Any]  # parents, start, loss, train sets, pool: as the results show them
    of: str  # the model, or a round of it
    seed: int = 0
    evaluate: NodeId | None = None
    tests: Mapping[str, TestRow] = field(default_factory=dict)  # test set -> the published row it reproduces
    consistency: NodeId | None = None


class Use(NamedTuple):
    """Frames that a model sees or is measured on."""

    what: str  # in words
    dataset: str
    views: Views
    is_training: bool = False  # labelled frames that it learns from


class Watched(NamedTuple):
    """Sets of one model that may share no frame."""

    learned: tuple[Use, ...]  # by the models that it starts from or is taught by, and by translators, too
    validated: tuple[Use, ...]
    tests: tuple[Use, ...]
    folders: tuple[str, ...]  # model folders that it starts from


@dataclass
class Graph:
    """Nodes in an order in which they can run, and where the recipe's names went."""

    nodes: dict[NodeId, Node] = field(default_factory=dict)
    models: dict[str, ModelNodes] = field(default_factory=dict)  # by training: each model once a seed
    datasets: dict[str, Views] = field(default_factory=dict)
    predictions: dict[str, tuple[NodeId, Prediction]] = field(default_factory=dict)
    # evaluated translations, with how the results name what took part: translator, its kind, segmenter, real, source
    translations: dict[str, tuple[NodeId, Mapping[str, Any]]] = field(default_factory=dict)
    watched: dict[str, Watched] = field(default_factory=dict)  # model -> its sets

    def done(self, commits: Collection[NodeId]) -> Graph:
        """What of it is there when only these nodes are committed: trained models, with the scores they have."""

        def is_done(*nodes: NodeId | None) -> bool:
            return all(node is None or node in commits for node in nodes)

        models = {}
        for name, nodes in self.models.items():
            if is_done(nodes.train, nodes.select, nodes.pseudo_label):
                models[name] = known = replace(nodes)
                if not is_done(nodes.evaluate):
                    known.evaluate, known.tests = None, {}
                if not is_done(nodes.consistency):
                    known.consistency = None
        return replace(
            self,
            models=models,
            datasets={n: views for n, views in self.datasets.items() if is_done(*_nodes_of([Frames(views)]))},
            predictions={name: entry for name, entry in self.predictions.items() if is_done(entry[0])},
            translations={name: entry for name, entry in self.translations.items() if is_done(entry[0])},
            watched={name: watched for name, watched in self.watched.items() if name in models},
        )

    def until(self, stage: str) -> list[Node]:
        """The nodes of one stage with all that they need, in order. Raises UserError if it has none."""
        wanted = {name for name in self.nodes if name.stage == stage}
        if not wanted:
            known = list(dict.fromkeys(name.stage for name in self.nodes))
            raise UserError(
                f"the recipe has no stage {stage!r}{closest(stage, known)}",
                cure=f"one of its stages: {', '.join(known)}",
            )
        while more := {need for name in wanted for need in self.nodes[name].needs} - wanted:
            wanted |= more
        return [node for node in self.nodes.values() if node.id in wanted]

    def order(self) -> None:
        """What only reads and sorts frames comes first: it is quick, and shows what is wrong with them."""
        first: dict[NodeId, Node] = {}
        for name, node in self.nodes.items():
            if name.stage in FRAME_STAGES and all(need in first for need in node.needs):
                first[name] = node
        self.nodes = first | self.nodes
