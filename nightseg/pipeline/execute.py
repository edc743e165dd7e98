"""Execute a graph: what is committed is found, the rest is done, side by side where there is room."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import partial
from itertools import takewhile
from typing import Final, NamedTuple

from nightseg.cluster import ahead
from nightseg.cluster import ray as cluster
from nightseg.cluster.nodes import words
from nightseg.cluster.settings import MapCompute, TrainCompute
from nightseg.cluster.turn import turn
from nightseg.errors import UserError, kept, together
from nightseg.pipeline import schedule
from nightseg.pipeline.folder import show_curves
from nightseg.pipeline.graph import FRAME_STAGES, TABLE_STAGES, Graph, Node, NodeId, frames_at_most
from nightseg.pipeline.time_left import time_left
from nightseg.progress import Named, Progress
from nightseg.storage import Commit, DamagedCommit, Shards, TooManyBad, Workspace, check_contents

PROCESS_BYTES: Final = 3 * 2**30  # of memory that a process of a stage is taken to need beside others


class Worked(NamedTuple):
    """All commits, those of them that were made now, and what is not there."""

    commits: dict[NodeId, Commit]
    made: set[NodeId]
    failed: dict[NodeId, schedule.Failed]


def execute(
    workspace: Workspace,
    graph: Graph,
    progress: Progress,
    examine: Callable[[Mapping[NodeId, Commit | Shards]], None] = lambda read: None,
    *,
    concurrent: int | None = 1,
    to_the_end: bool = False,
) -> Worked:
    """Commit the nodes, side by side where there is room, `concurrent` at a time at most.

    Once the first, which only read what the user has, are done one by one, `examine` may refuse what they found, also
    where it was too bad to commit. What is wrong with any of them is one error, so that all of it can be mended at
    once. Of the others, `to_the_end`: what does not need one that failed goes on; else its error ends all.
    """
    room = expected_room(graph, concurrent)._replace(most=_most)
    stages = _Stages(workspace, graph, progress, room, to_the_end)
    commits, needs = stages.commits, stages.needs
    problems: list[UserError] = []
    read: dict[NodeId, Commit | Shards] = {}
    for name in takewhile(lambda name: name.stage in FRAME_STAGES or not needs[name], needs):
        with kept(problems):
            if all(need in commits for need in needs[name]):
                try:
                    commits[name] = stages.find(name) or stages.work(name, False)
                except TooManyBad as error:
                    read[name] = error.shards
                    raise
    with kept(problems):
        examine(commits | read)
    if problems:
        raise together(problems)
    missing = schedule.run(needs, commits, stages, room)
    return Worked({name: commits[name] for name in needs if name in commits}, stages.made, missing)


def expected_room(graph: Graph, concurrent: int | None) -> schedule.Room:
    """What the stages of a graph may take at a time, as far as that is known without a connection to a cluster."""
    return schedule.Room(lambda name: _taken(graph.nodes[name]), _expected, concurrent or math.inf)


def check_room(graph: Graph, done: Collection[NodeId], say: Callable[[str], None]) -> None:
    """Refuse before anything starts what a stage that is not in `done` asks for and the cluster can never give.

    A pass starts no more actors than it has shards, so only one of them is asked for here. Of this machine nothing but
    its cores is known before Ray starts.
    """
    coming = (node for name, node in graph.nodes.items() if name not in done and not node.is_in_driver)
    for compute in dict.fromkeys(node.resources for node in coming):
        who, place = ("worker", "compute.train") if isinstance(compute, TrainCompute) else ("actor", "compute.map")
        count, cpus, gpus = _processes(compute)
        count = count if isinstance(compute, TrainCompute) else 1
        if not cluster.is_this_machine():
            cluster.connect()
            cluster.require(who, count, cpus=cpus, gpus=gpus, place=place, say=say)
        elif count * cpus > (cores := cluster.expected_room("CPU")):
            raise UserError(
                f"{place}: {count} {who}s with {cpus:g} CPU each need {count * cpus:g} CPU, and this machine has "
                f"{cores:g}",
                cure=f"lower {place}.{who}s or {place}.cpus_per_{who}, or run it on a cluster",
            )


class _Stages:
    """The nodes of a graph as steps that a schedule runs."""

    def __init__(
        self, workspace: Workspace, graph: Graph, progress: Progress, room: schedule.Room, to_the_end: bool
    ) -> None:
        self.workspace, self.nodes, self.progress = workspace, graph.nodes, progress
        self.expected_room = room._replace(most=_expected)
        self.to_the_end = to_the_end
        self.needs = {name: node.needs for name, node in graph.nodes.items()}
        self.commits: dict[NodeId, Commit] = {}
        self.made: set[NodeId] = set()
        self._rows = frames_at_most(graph)
        self._damaged: dict[NodeId, DamagedCommit] = {}
        self._lost: set[NodeId] = set()  # what failed, and what needs it
        self._began: dict[NodeId, float] = {}

    def find(self, name: NodeId) -> Commit | None:
        try:
            return self.nodes[name].stage_in(self.workspace, self.commits).commit(check=check_contents)
        except DamagedCommit as error:
            self._damaged[name] = error
            self.progress.say(f"{error.what}; it is made again")
            return None

    def work(self, name: NodeId, beside: bool) -> Commit:
        with turn():
            still, number = self._time_left(), list(self.nodes).index(name) + 1
            self._began[name] = time.monotonic()
            left = f"; left for the run: {still}" if still else ""
            self.progress.say(f"[{number}/{len(self.nodes)}] {name}{left}")
            try:
                attempt = self.nodes[name].stage_in(self.workspace, self.commits).open()
                if name.stage.startswith("train_"):
                    show_curves(self.workspace.root, name, attempt.folder)
                progress = Named(self.progress, str(name), name.name) if beside else self.progress
                if not cluster.is_this_machine() and cluster.may_grow():
                    progress = ahead.EndInSight(progress, partial(self._ask_ahead, name))
                commit = self.nodes[name].work(self.commits, attempt, progress)
            except UserError as error:
                if (damage := self._damaged.get(name)) is None:
                    raise
                raise UserError(f"{damage.what}; and it cannot be made again: {error}", cure=damage.cure) from error
            self.made.add(name)
            return commit

    def _ask_ahead(self, name: NodeId) -> None:
        """`name` ends soon: nodes for the stages that can begin then, where those that are there do not do."""
        asked = Counter[tuple[float, float]]()
        for other, needs in self.needs.items():
            node = self.nodes[other]
            can_begin = other not in self.commits and all(need == name or need in self.commits for need in needs)
            if name in needs and can_begin and not node.is_in_driver:
                count, *each = _processes(node.resources)
                asked[(each[0], each[1])] += self._starting(node, count)
        for (cpus, gpus), count in asked.items():
            amounts = {"CPU": cpus, "GPU": gpus}
            if lacking := ahead.missing(count, amounts):
                self.progress.say(
                    f"what follows needs room for {lacking} more process{'es' * (lacking != 1)} "
                    f"({words(amounts)} each): asks for nodes now"
                )
                ahead.ask(count, amounts)

    def _starting(self, node: Node, most: int) -> int:
        """How many of its processes start: no more actors than there are shards."""
        rows = self._rows[node.id]
        if rows is None or isinstance(node.resources, TrainCompute):
            return most
        return min(most, math.ceil(rows / node.resources.shard_rows))

    def failed(self, name: NodeId, error: Exception) -> None:
        if not self.to_the_end:
            raise error
        self._lost.add(name)
        for other in self.needs:
            if self._lost.intersection(self.needs[other]):
                self._lost.add(other)
        if self._open():
            self.progress.say(f"{name} failed, what does not need it goes on: {error}")

    def _open(self) -> list[Node]:
        """What is still to be done."""
        return [node for name, node in self.nodes.items() if name not in self.commits and name not in self._lost]

    def _time_left(self) -> str:
        now = time.monotonic()

        def together_in(seconds: Mapping[NodeId, float]) -> float:
            at_work = {n: max(0.0, s - (now - self._began[n])) for n, s in seconds.items() if n in self._began}
            # those at work come first, as they hold their room already
            return schedule.seconds_of(
                at_work | {n: at_work.get(n, s) for n, s in seconds.items()}, self.needs, self.expected_room
            )

        return time_left(self._open(), self.nodes, dict(self.commits), self._rows, together_in)


def _taken(node: Node) -> dict[str, float]:
    """What a node takes of CPUs, GPUs, memory (bytes) and the driver's process.

    On one machine, PyTorch in the driver's process has all CPUs. A cluster lends the driver none.
    """
    compute = node.resources
    if node.is_in_driver:
        cpus = 1.0 if node.id.stage in TABLE_STAGES else math.inf
        return {"driver": 1.0, "CPU": cpus if cluster.is_this_machine() else 0.0}
    count, cpus, gpus = _processes(compute)
    return {"CPU": count * cpus, "GPU": count * gpus, "memory": float(count * PROCESS_BYTES)}


def _expected(resource: str) -> float:
    return 1.0 if resource == "driver" else cluster.expected_room(resource)


def _processes(compute: MapCompute | TrainCompute) -> tuple[int, float, float]:
    """How many, and CPUs and GPUs of each."""
    if isinstance(compute, TrainCompute):
        return compute.workers, compute.cpus_per_worker, compute.gpus_per_worker
    return compute.actors, compute.cpus_per_actor, compute.gpus_per_actor


def _most(resource: str) -> float:
    if resource != "driver":
        return cluster.room(resource)
    if not cluster.is_this_machine():
        cluster.connect()  # before there are threads: Ray's handler of SIGTERM is the main thread's
    return 1.0
