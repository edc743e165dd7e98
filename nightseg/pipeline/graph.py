"""The words of the graph that `rounds.py` builds and `runner.py` runs: node, view, inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from nightseg.cluster.settings import MapCompute, TrainCompute
from nightseg.data import table as frame
from nightseg.progress import Progress
from nightseg.recipe.types import Prediction
from nightseg.storage import Attempt, Commit


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


Views = tuple[View, ...]


@dataclass(frozen=True)
class Inputs:
    """The committed outputs that a node may read; it sees no others."""

    commits: Mapping[NodeId, Commit]

    def __getitem__(self, node: NodeId) -> Commit:
        return self.commits[node]

    def frames(self, views: Sequence[View]) -> pa.Table:
        """The frames of all views as one table with absolute uris, in the order of the views."""
        return pa.concat_tables([self._frames(view) for view in views])

    def _frames(self, view: View) -> pa.Table:
        commit = self[view.node]
        rows = frame.resolve(commit.table("frames"), commit.folder)
        if view.domain is not None:
            rows = rows.filter(pc.equal(rows[frame.DOMAIN], view.domain))
        return rows.select(frame.FRAME_SCHEMA.names)


Work = Callable[[Inputs, Attempt, Progress], Commit]


@dataclass(frozen=True)
class Node:
    """One stage to run: what it needs, what identifies it, how it is done."""

    id: NodeId
    version: int
    recipe: Mapping[str, Any]  # its part of the recipe; hashed into the stage key
    needs: tuple[NodeId, ...]
    takes: tuple[NodeId, ...]  # those whose frames it works on; the rest are models, references, tests
    compute: MapCompute | TrainCompute
    work: Work
    seed: int = 0  # only stages that draw random numbers have one: the others are shared between seeds
    expected_rows: int | None = None  # frames that lie in the folders; known before the stage has run
    most_rows: int | None = None  # frames it hands on at most


@dataclass(frozen=True)
class TestNode:
    """One evaluation, and the published row it reproduces."""

    node: NodeId
    row: str
    published_miou: float | None  # percent


@dataclass(frozen=True)
class ModelNodes:
    """What belongs to one model of the recipe."""

    train: NodeId
    select: NodeId | None
    pseudo_label: NodeId | None
    facts: Mapping[str, Any]  # parents, start, loss, train sets, pool: as the results show them
    tests: Mapping[str, TestNode]


@dataclass(frozen=True)
class EvaluatedTranslation:
    """The evaluation of one translated dataset, and how the results name what took part in it."""

    node: NodeId
    facts: Mapping[str, Any]  # translator, its kind, segmenter, real, source


@dataclass
class Graph:
    """Nodes in an order in which they can run, and where the recipe's names went."""

    nodes: dict[NodeId, Node] = field(default_factory=dict)
    models: dict[str, ModelNodes] = field(default_factory=dict)
    datasets: dict[str, Views] = field(default_factory=dict)
    predictions: dict[str, tuple[NodeId, Prediction]] = field(default_factory=dict)
    translations: dict[str, EvaluatedTranslation] = field(default_factory=dict)
