"""What a run would do, stage by stage: what is committed, what runs and why, how many frames, on what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from nightseg.cluster.settings import MapCompute, TrainCompute
from nightseg.pipeline import build
from nightseg.pipeline.graph import Graph, Node, NodeId
from nightseg.recipe.types import Recipe
from nightseg.storage import Commit, DamagedCommit, Location, Stage, Workspace, check_contents


class Planned(NamedTuple):
    """One line of the dry run."""

    node: NodeId
    state: Literal["committed", "runs", "continues", "waits"]
    changed: tuple[str, ...]  # parts of the key that differ from the nearest earlier commit: why it runs again
    rows: int | None  # frames it takes in; an upper bound where the stages before it have not run
    resources: str


def plan(
    recipe: Recipe,
    folder: Location,
    *,
    only: str | None = None,
    until: str | None = None,
    built: Graph | None = None,
    borrow: Sequence[Location] = (),
) -> list[Planned]:
    """What `run` would do. `built`: its graph, if there is one already."""
    workspace = Workspace(folder, borrow)
    graph = built or build.build_graph(recipe, only)
    commits: dict[NodeId, Commit] = {}
    rows: dict[NodeId, int | None] = {}
    lines: list[Planned] = []
    for node in graph.until(until) if until else graph.nodes.values():
        state: Literal["committed", "runs", "continues", "waits"] = "waits"
        changed: tuple[str, ...] = ()
        if all(need in commits for need in node.needs):
            stage = node.stage_in(workspace, commits)
            try:
                commit = stage.commit(check=check_contents)
                changed = () if commit else _changed(stage)
            except DamagedCommit:
                commit, changed = None, ("damaged outputs",)
            if commit is not None:
                state = "committed"
                commits[node.id] = commit
            else:
                state = "continues" if stage.is_open() else "runs"
        taken = _rows_in(node, commits, rows)
        committed = commits.get(node.id)
        count, most = committed.rows_out if committed else taken, node.most_rows
        rows[node.id] = count if count is None or most is None else min(count, most)
        lines.append(Planned(node.id, state, changed, taken, _resources(node.resources)))
    return lines


def _changed(stage: Stage) -> tuple[str, ...]:
    before = stage.nearest()
    return () if before is None else tuple(_differences(stage.identity, before, ()))


def _differences(now: Any, before: Any, path: tuple[str, ...]) -> Iterator[str]:
    """Dotted paths of what is not the same."""
    if isinstance(now, dict) and isinstance(before, dict):
        for key in sorted(now.keys() | before.keys()):
            yield from _differences(now.get(key), before.get(key), (*path, key))
    elif now != before:
        yield ".".join(path)


def _rows_in(node: Node, commits: dict[NodeId, Commit], rows: dict[NodeId, int | None]) -> int | None:
    if node.expected_rows is not None:
        return node.expected_rows
    if node.id in commits:
        return commits[node.id].rows_in
    counted = [count for need in node.takes if (count := rows[need]) is not None]
    return sum(counted) if counted else None


def _resources(compute: MapCompute | TrainCompute) -> str:
    if isinstance(compute, TrainCompute):
        count, cpus, gpus, kind = compute.workers, compute.cpus_per_worker, compute.gpus_per_worker, "worker"
    else:
        if not compute.actors:
            return "in this process"
        count, cpus, gpus, kind = compute.actors, compute.cpus_per_actor, compute.gpus_per_actor, "actor"
    each = f"{cpus:g} CPU" + (f" + {gpus:g} GPU" if gpus else "")
    return f"{count} {kind}{'s' if count > 1 else ''} x {each}"
