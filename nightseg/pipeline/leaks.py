"""Leaks: frames that a model has seen and is measured on, found by what the files hold, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nightseg.data import table as frame
from nightseg.data.thumbnails import num_near
from nightseg.errors import UserError
from nightseg.pipeline.graph import Graph, NodeId, Use, View, Views
from nightseg.progress import Progress
from nightseg.stages.collect import THUMBNAIL, THUMBNAILS, thumbnail_table
from nightseg.storage import Commit, Shards

_NUM_PAIRS = 3


class Leak(NamedTuple):
    """Frames of one set that are in another, which a model may not share with it."""

    seen: str  # dataset
    how: dict[str, list[str]]  # it was seen, in words -> by which models
    measured: str  # the set that they are measured on, in words
    dataset: str  # that this set is, or is made from
    frames: int  # of it that are byte for byte in `seen`
    of: int
    pairs: list[list[str]]  # the first of them, and the frame that each repeats
    near: int  # others of it that look like one of `seen`

    def __str__(self) -> str:
        who = ", ".join(f"{how} (model {', '.join(models)})" for how, models in self.how.items())
        if not self.frames:
            return f"{self.near} of {self.of} frames of {self.measured} look like frames of {self.seen}, {who}"
        pairs = ", ".join(one if one == other else f"{one} = {other}" for one, other in self.pairs)
        more = f"; {self.near} more look like one" if self.near else ""
        return f"{self.frames} of {self.of} frames of {self.measured} are in {self.seen}, {who}: {pairs}{more}"


def needed(graph: Graph) -> set[NodeId]:
    """The nodes whose frames are compared, with all that they need."""
    found = {
        view.node
        for watched in graph.watched.values()
        for use in (*watched.learned, *watched.validated, *watched.tests)
        for view in _nodes(use.views)
    }
    while more := {need for node in found for need in graph.nodes[node].needs} - found:
        found |= more
    return found


def find(graph: Graph, commits: Mapping[NodeId, Commit | Shards], validation: bool = False) -> list[Leak]:
    """Every leak once, whichever models have it. Sets without a commit are left out.

    `validation`: what models are validated on counts as seen, as it is where models are chosen by it.
    """
    found: dict[Any, Leak] = {}
    sets = _Sets(commits)
    for model, (learned, validated, tests, _) in graph.watched.items():
        trained = [use for use in learned if use.is_training]
        seen = [*learned, *(validated if validation else ())]
        for one, other in [*_pairs(seen, tests), *_pairs(trained, validated)]:
            pair = (one.dataset, one.views, other)
            if pair not in found:
                found[pair] = sets.compare(one, other)
            found[pair].how.setdefault(one.what, []).append(model)
    return [leak for leak in found.values() if leak.frames or leak.near]


def tell(leaks: Iterable[Leak], rule: Literal["refuse", "report"], progress: Progress) -> None:
    """Raises UserError by the rule `refuse` if frames are shared; those that only look alike are no reason."""
    leaks = list(leaks)
    shared = [leak for leak in leaks if leak.frames]
    if shared and rule == "refuse":
        raise UserError(
            "leaks: " + "\n  ".join(map(str, shared)),
            cure="take these frames out of one of the two sets; or say `leaks: report` in the recipe, then it runs "
            "and log, results.json and report tell of it",
        )
    for leak in leaks:
        progress.say(f"leak: {leak}")


def unknown(graph: Graph) -> dict[str, list[str]]:
    """Model folders that models start from -> these models: what such a folder learned from is not known here."""
    found: dict[str, list[str]] = {}
    for model, watched in graph.watched.items():
        for folder in watched.folders if watched.tests or watched.validated else ():
            found.setdefault(folder, []).append(model)
    return found


def _pairs(seen: Iterable[Use], measured: Iterable[Use]) -> Iterator[tuple[Use, Use]]:
    return ((one, other) for other in measured for one in seen)


def _nodes(views: Views) -> Iterator[View]:
    return (view for view in views if isinstance(view, View))


class _Sets:
    """The frames of sets, each table read once."""

    def __init__(self, commits: Mapping[NodeId, Commit | Shards]) -> None:
        self.commits = commits
        self._tables: dict[NodeId, pa.Table] = {}
        kept = [commit.table(THUMBNAILS) for commit in commits.values() if commit.has_table(THUMBNAILS)]
        self._thumbnails = pa.concat_tables([thumbnail_table({}), *kept]).combine_chunks()

    def compare(self, one: Use, other: Use) -> Leak:
        seen, asked = self._frames(one.views), self._frames(other.views)
        is_shared = pc.and_(pc.is_valid(asked[frame.SHA256]), pc.is_in(asked[frame.SHA256], seen[frame.SHA256]))
        shared, rest = asked.filter(is_shared), asked.filter(pc.invert(is_shared))
        first = shared.slice(0, _NUM_PAIRS).to_pylist()
        repeated = seen.filter(
            pc.is_in(seen[frame.SHA256], pa.array([row[frame.SHA256] for row in first], pa.string()))
        )
        ids = {row[frame.SHA256]: row[frame.FRAME_ID] for row in reversed(repeated.to_pylist())}
        pairs = [[row[frame.FRAME_ID], ids[row[frame.SHA256]]] for row in first]
        near = num_near(self._looks(seen), self._looks(rest))
        return Leak(one.dataset, {}, other.what, other.dataset, shared.num_rows, asked.num_rows, pairs, near)

    def _frames(self, views: Views) -> pa.Table:
        parts = [pa.table({frame.FRAME_ID: pa.array([], pa.string()), frame.SHA256: pa.array([], pa.string())})]
        for view in _nodes(views):
            if view.node not in self.commits:
                continue
            if view.node not in self._tables:
                self._tables[view.node] = self.commits[view.node].table("frames")
            rows = self._tables[view.node]
            rows = rows if view.domain is None else rows.filter(pc.equal(rows[frame.DOMAIN], view.domain))
            parts.append(rows.select([frame.FRAME_ID, frame.SHA256]))
        return pa.concat_tables(parts)

    def _looks(self, frames: pa.Table) -> npt.NDArray[np.uint8]:
        """Thumbnails (N, K) of those frames that `collect` saw."""
        rows = pc.index_in(frames[frame.SHA256], self._thumbnails[frame.SHA256]).combine_chunks().drop_null()
        return np.stack(self._thumbnails[THUMBNAIL].take(rows).to_numpy()) if len(rows) else np.empty((0, 1), np.uint8)
