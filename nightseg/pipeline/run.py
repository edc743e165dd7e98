"""Run a graph: skip what is committed, do the rest in order, gather the results, report. Also says what it would do."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from nightseg.cluster import ray as cluster
from nightseg.cluster.settings import MapCompute, TrainCompute
from nightseg.cluster.turn import turn
from nightseg.data.class_list import taxonomy
from nightseg.errors import together
from nightseg.networks.downloads import allow_downloads
from nightseg.pipeline import build, check, classes, leaks, schedule, tracking
from nightseg.pipeline.folder import keep_earlier, lay_out, show_curves
from nightseg.pipeline.graph import FRAME_STAGES, TABLE_STAGES, Graph, Node, NodeId, frames_at_most
from nightseg.pipeline.results import RECIPE_NAME, RESULTS_NAME, compared, failures, gather, model_folder, sealed, told
from nightseg.pipeline.time_left import time_left
from nightseg.progress import Named, Progress
from nightseg.recipe import load_recipe, save_recipe, told_of
from nightseg.recipe.types import Recipe
from nightseg.report import Run, write_report
from nightseg.storage import (
    Commit,
    DamagedCommit,
    Location,
    Shards,
    Stage,
    TooManyBad,
    UserError,
    Workspace,
    check_contents,
)
from nightseg.storage.scratch import temporary_folder

if TYPE_CHECKING:
    from nightseg.segmenter.predict import Segmenter

FRAMES_BEFORE: Final = 8  # of each folder that a run looks at before its first stage
PROCESS_BYTES: Final = 3 * 2**30  # of memory that a process of a stage is taken to need beside others


class Outcome(NamedTuple):
    """What a run leaves: the results (also in results.json), how many stages it did and skipped, and why others failed.

    A model that failed, and those that need it, are not in the results; `failed` there says which.
    """

    results: dict[str, Any]
    done: int
    skipped: int
    seconds: float
    errors: tuple[Exception, ...] = ()


class Adapted(NamedTuple):
    """Where the run lies, its outcome and its report."""

    folder: Location
    outcome: Outcome
    report: Location

    @property
    def results(self) -> dict[str, Any]:
        """The content of results.json."""
        return self.outcome.results

    @property
    def models(self) -> list[str]:
        """What `load` opens, in the order of the recipe."""
        return list(self.results["models"])

    @property
    def scores(self) -> dict[str, dict[str, float | None]]:
        """Model -> test set -> mIoU in [0, 1], the mean over the seeds."""
        return {
            model: {test: scores.get("mean", scores)["miou"] for test, scores in facts["tests"].items()}
            for model, facts in self.results["models"].items()
        }

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Of each stage that failed: its `stage`, the `error`, the `models` that lack something for it, and what was
        `not_reached`. The models have no scores then; the same call tries it again."""
        return list(self.results.get("failed", ()))

    @property
    def failure(self) -> ExceptionGroup[Exception] | None:
        """What failed as one exception, which a program may raise."""
        errors = self.outcome.errors
        return ExceptionGroup("\n".join(told(self.failed)), errors) if errors else None

    def load(self, model: str, device: str | None = None) -> Segmenter:
        """A model of the run as a callable: see `nightseg.load_model`. Raises UserError if there is no such model."""
        from nightseg.segmenter.predict import Segmenter

        return Segmenter(model_folder(f"{self.folder}:{model}"), device)

    def __repr__(self) -> str:
        tests = list(dict.fromkeys(test for found in self.scores.values() for test in found))
        rows = [["mIoU in percent", *tests]]
        for model, found in self.scores.items():
            rows.append([model, *(f"{100 * v:.1f}" if (v := found.get(test)) is not None else "-" for test in tests)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join(w.ljust(n) if not k else w.rjust(n) for k, (w, n) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]
        return "\n".join([f"run {self.folder}", *table, *told(self.failed), f"report: {self.report}"])


class Planned(NamedTuple):
    """One line of the dry run."""

    node: NodeId
    state: Literal["committed", "runs", "continues", "waits"]
    changed: tuple[str, ...]  # parts of the key that differ from the nearest earlier commit: why it runs again
    rows: int | None  # frames it takes in; an upper bound where the stages before it have not run
    resources: str


def adapt(
    recipe_file: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    run_dir: str | None = None,
    only: str | None = None,
    log: Collection[str] = (),
    progress: Progress,
) -> Adapted:
    """The whole way: a recipe (file or mapping) in; a night model, results.json and report.html out.

    `log`: trackers that are given the finished run. Raises UserError before anything starts when the recipe is wrong.
    """
    tracking.check_trackers(log)
    folder, outcome = _from_file(recipe_file, overrides, run_dir, only, None, progress)
    report = write_report(folder, outcome.results)
    if not outcome.errors:
        tracking.track(log, folder, outcome.results)
    return Adapted(folder, outcome, report)


def work_until(
    recipe_file: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    stage: str,
    run_dir: str | None = None,
    only: str | None = None,
    progress: Progress,
) -> tuple[Location, Outcome]:
    """All nodes of one stage of a recipe, and what they need; results and report are of a whole run.

    Returns the run folder, and an outcome without results. Raises UserError as `adapt`, or if there is no such stage.
    """
    return _from_file(recipe_file, overrides, run_dir, only, stage, progress)


def _from_file(
    recipe_file: str | Path | Mapping[str, Any],
    overrides: Sequence[str],
    run_dir: str | None,
    only: str | None,
    until: str | None,
    progress: Progress,
) -> tuple[Location, Outcome]:
    recipe = load_recipe(recipe_file, overrides)
    folder = run_folder(recipe.name, run_dir)
    with told_of(recipe_file, overrides):
        _allow_downloads(recipe)
        graph = None
        if (folder / "stages").is_folder():  # the folders have been looked at
            graph = build.build_graph(recipe, only)
            check.refuse(recipe, graph, check.done_in(folder))
        else:
            check.check(recipe, folder, only=only, most=FRAMES_BEFORE, is_measured=False, progress=progress)
        return folder, run(recipe, folder, only=only, until=until, built=graph, progress=progress)


def run_folder(name: str, run_dir: str | None) -> Location:
    """What was asked for, else `<NIGHTSEG_RUNS or ./runs>/<name of the recipe or search>`."""
    return Location.of(run_dir) if run_dir else Location.of(os.environ.get("NIGHTSEG_RUNS") or "runs") / name


def run(
    recipe: Recipe,
    folder: Location,
    *,
    only: str | None = None,
    until: str | None = None,
    built: Graph | None = None,
    borrow: Sequence[Location] = (),
    progress: Progress,
) -> Outcome:
    """Do every stage that is not committed yet; a rerun of the same recipe continues where the last one ended.

    `built`: its graph, if there is one already: making it lists all folders. `until`: only this stage and what it
    needs; the outcome is without results then, and those that lie there stay. A stage that fails does not stop those
    that do not need it.

    Raises UserError before the run folder is touched if the recipe cannot be a graph: no such model, no image; what
    failed, if none of the models that were asked for is there in the end.
    """
    began = time.monotonic()
    _allow_downloads(recipe)
    graph = built or build.build_graph(recipe, only)
    part = Graph({node.id: node for node in graph.until(until)}) if until else graph
    workspace = Workspace(folder, borrow)
    with workspace.lock(), cluster.left_as_found():
        if not (folder / RESULTS_NAME).exists():  # else it is the recipe of what is finished, until more is
            save_recipe(recipe, folder / RECIPE_NAME)
        found: list[leaks.Leak] = []

        def examine(read: Mapping[NodeId, Commit | Shards]) -> None:
            found.extend(leaks.find(graph, read))
            with _kept(problems := list[UserError]()):
                leaks.tell(found, recipe.leaks, progress)
            with _kept(problems):
                classes.check(graph, read, taxonomy(recipe.taxonomy), progress)
            if problems:
                raise together(problems)
            for start, models in leaks.unknown(graph).items():
                progress.say(f"what {start} learned from is not known, so neither is what {', '.join(models)} shares")

        concurrent = recipe.compute.concurrent
        commits, done, failed = _work(workspace, part, progress, examine, concurrent=concurrent, to_the_end=True)
        num_skipped, missing = len(commits) - len(done), list[dict[str, Any]]()
        errors = tuple(found.error for node, found in failed.items() if found.by == node)
        if errors:
            missing, graph = failures(graph, failed), graph.done(commits)
            if until or not _has_results(graph, only):
                raise _as_one(errors)
        if until:
            return Outcome({}, len(done), num_skipped, time.monotonic() - began)
        if only is not None and not borrow:
            graph = _with_finished(recipe, graph, workspace, commits, progress)
            found = leaks.find(graph, commits)
        gathered = gather(recipe, graph, commits, done, found) | {"failed": missing}
        keep_earlier(folder, gathered)
        save_recipe(recipe, folder / RECIPE_NAME)
        results = sealed(compared(recipe, gathered, folder), folder)
        (folder / RESULTS_NAME).write_json(results)
        lay_out(Run(folder, results), folder)
    return Outcome(results, len(done), num_skipped, time.monotonic() - began, errors)


def _has_results(graph: Graph, only: str | None) -> bool:
    """Whether anything is there that was asked for."""
    if only is not None:
        return any(nodes.of == only for nodes in graph.models.values())
    return bool(graph.models or graph.translations or graph.predictions)


def _as_one(errors: Sequence[Exception]) -> Exception:
    if len(errors) == 1:
        return errors[0]
    of_the_user = [error for error in errors if isinstance(error, UserError)]
    if len(of_the_user) == len(errors):
        return together(of_the_user)
    return ExceptionGroup(f"{len(errors)} stages failed: " + "; ".join(str(error) for error in errors), errors)


def _with_finished(
    recipe: Recipe, graph: Graph, workspace: Workspace, commits: dict[NodeId, Commit], progress: Progress
) -> Graph:
    """The graph of the whole recipe as far as it is committed, and its commits: results of one model take none away."""
    try:
        whole = build.build_graph(recipe)
    except UserError as error:
        progress.say(f"the results are of these models alone, the others cannot be looked up: {error.what}")
        return graph
    for node in whole.nodes.values():
        if node.id not in commits and all(need in commits for need in node.needs):
            with suppress(DamagedCommit):  # it is made again when it is asked for
                commit = _stage(workspace, node, commits).commit(check=check_contents)
                if commit is not None:
                    commits[node.id] = commit
    return whole.done(commits)


def _allow_downloads(recipe: Recipe) -> None:
    if recipe.allow_download:
        allow_downloads()


def prepare(
    recipe: Recipe, folder: Location, nodes: Collection[NodeId], *, only: str, progress: Progress
) -> dict[NodeId, Commit]:
    """Do some stages of a recipe, so that other runs can borrow them: what all trials of a search share.

    If there was something to do, the cluster stays connected for what comes next.
    """
    _allow_downloads(recipe)
    graph = build.build_graph(recipe, only)
    workspace = Workspace(folder)
    with workspace.lock():
        part = Graph({node: graph.nodes[node] for node in graph.nodes if node in nodes})
        return _work(workspace, part, progress, concurrent=recipe.compute.concurrent).commits


@contextmanager
def finished(graph: Graph, folder: Location | None, progress: Progress) -> Iterator[dict[NodeId, Commit]]:
    """The commits of a graph without a recipe, whose outputs the body takes to where they belong.

    The folder is removed then; work that is interrupted continues there when the same is asked again. Without a folder
    it begins anew, in a temporary one of this machine.
    """
    with temporary_folder() if folder is None else nullcontext(folder) as place:
        workspace = Workspace(place)
        with workspace.lock(), cluster.left_as_found():
            yield _work(workspace, graph, progress).commits
    if folder is not None:
        folder.delete()


class _Worked(NamedTuple):
    """All commits, those of them that were made now, and what is not there."""

    commits: dict[NodeId, Commit]
    made: set[NodeId]
    failed: dict[NodeId, schedule.Failed]


def _work(
    workspace: Workspace,
    graph: Graph,
    progress: Progress,
    examine: Callable[[Mapping[NodeId, Commit | Shards]], None] = lambda read: None,
    *,
    concurrent: int | None = 1,
    to_the_end: bool = False,
) -> _Worked:
    """Commit the nodes, side by side where there is room, `concurrent` at a time at most.

    Once the first, which only read what the user has, are done one by one, `examine` may refuse what they found, also
    where it was too bad to commit. What is wrong with any of them is one error, so that all of it can be mended at
    once. Of the others, `to_the_end`: what does not need one that failed goes on; else its error ends all.
    """
    room = schedule.Room(lambda name: _taken(graph.nodes[name]), _most, concurrent or math.inf)
    stages = _Stages(workspace, graph, progress, room, to_the_end)
    commits, needs = stages.commits, stages.needs
    problems: list[UserError] = []
    read: dict[NodeId, Commit | Shards] = {}
    for name in takewhile(lambda name: name.stage in FRAME_STAGES or not needs[name], needs):
        with _kept(problems):
            if all(need in commits for need in needs[name]):
                try:
                    commits[name] = stages.find(name) or stages.work(name, False)
                except TooManyBad as error:
                    read[name] = error.shards
                    raise
    with _kept(problems):
        examine(commits | read)
    if problems:
        raise together(problems)
    missing = schedule.run(needs, commits, stages, room)
    return _Worked({name: commits[name] for name in needs if name in commits}, stages.made, missing)


class _Stages:
    """The nodes of a graph as steps that a schedule runs."""

    def __init__(
        self, workspace: Workspace, graph: Graph, progress: Progress, room: schedule.Room, to_the_end: bool
    ) -> None:
        self.workspace, self.nodes, self.progress = workspace, graph.nodes, progress
        self.expected_room = room._replace(most=lambda of: 1.0 if of == "driver" else cluster.expected_room(of))
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
            return _stage(self.workspace, self.nodes[name], self.commits).commit(check=check_contents)
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
                attempt = _stage(self.workspace, self.nodes[name], self.commits).open()
                if name.stage.startswith("train_"):
                    show_curves(self.workspace.root, name, attempt.folder)
                progress = Named(self.progress, str(name), name.name) if beside else self.progress
                commit = self.nodes[name].work(self.commits, attempt, progress)
            except UserError as error:
                if (damage := self._damaged.get(name)) is None:
                    raise
                raise UserError(f"{damage.what}; and it cannot be made again: {error}", cure=damage.cure) from error
            self.made.add(name)
            return commit

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
    if isinstance(compute, TrainCompute):
        count, cpus, gpus = compute.workers, compute.cpus_per_worker, compute.gpus_per_worker
    else:
        count, cpus, gpus = compute.actors, compute.cpus_per_actor, compute.gpus_per_actor
    return {"CPU": count * cpus, "GPU": count * gpus, "memory": float(count * PROCESS_BYTES)}


def _most(resource: str) -> float:
    if resource != "driver":
        return cluster.room(resource)
    if not cluster.is_this_machine():
        cluster.connect()  # before there are threads: Ray's handler of SIGTERM is the main thread's
    return 1.0


@contextmanager
def _kept(problems: list[UserError]) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        problems.append(error)


def plan(
    recipe: Recipe,
    folder: Location,
    *,
    only: str | None = None,
    until: str | None = None,
    borrow: Sequence[Location] = (),
) -> list[Planned]:
    """What `run` would do."""
    workspace = Workspace(folder, borrow)
    graph = build.build_graph(recipe, only)
    commits: dict[NodeId, Commit] = {}
    rows: dict[NodeId, int | None] = {}
    lines: list[Planned] = []
    for node in graph.until(until) if until else graph.nodes.values():
        state: Literal["committed", "runs", "continues", "waits"] = "waits"
        changed: tuple[str, ...] = ()
        if all(need in commits for need in node.needs):
            stage = _stage(workspace, node, commits)
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


def _stage(workspace: Workspace, node: Node, commits: dict[NodeId, Commit]) -> Stage:
    inputs = {str(need): commits[need].content for need in node.needs}
    return workspace.stage(
        node.id.stage, node.id.name, version=node.version, recipe=node.recipe, inputs=inputs, seed=node.seed
    )


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
