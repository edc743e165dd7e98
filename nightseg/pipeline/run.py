"""Run a graph: skip what is committed, do the rest in order, gather the results, report. Also says what it would do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from nightseg.cluster import ray as cluster
from nightseg.cluster.settings import MapCompute, TrainCompute
from nightseg.data.class_list import taxonomy
from nightseg.errors import together
from nightseg.networks.downloads import allow_downloads
from nightseg.pipeline import build, check, classes, leaks, tracking
from nightseg.pipeline.folder import keep_earlier, lay_out, show_curves
from nightseg.pipeline.graph import FRAME_STAGES, Graph, Node, NodeId, frames_at_most
from nightseg.pipeline.results import RECIPE_NAME, RESULTS_NAME, gather, model_folder, sealed
from nightseg.pipeline.time_left import time_left
from nightseg.progress import Progress
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

if TYPE_CHECKING:
    from nightseg.segmenter.predict import Segmenter

FRAMES_BEFORE: Final = 8  # of each folder that a run looks at before its first stage


class Outcome(NamedTuple):
    """What a run leaves: the results (also in results.json), and how many stages it did and skipped."""

    results: dict[str, Any]
    done: int
    skipped: int
    seconds: float


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
        return "\n".join([f"run {self.folder}", *table, f"report: {self.report}"])


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
    needs; the outcome is without results then, and those that lie there stay.

    Raises UserError before the run folder is touched if the recipe cannot be a graph: no such model, no image.
    """
    began = time.monotonic()
    _allow_downloads(recipe)
    graph = built or build.build_graph(recipe, only)
    nodes = graph.until(until) if until else list(graph.nodes.values())
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

        commits, done = _work(workspace, nodes, progress, examine)
        num_skipped = len(commits) - len(done)
        if until:
            return Outcome({}, len(done), num_skipped, time.monotonic() - began)
        if only is not None and not borrow:
            graph = _with_finished(recipe, graph, workspace, commits, progress)
            found = leaks.find(graph, commits)
        gathered = gather(recipe, graph, commits, done, found)
        keep_earlier(folder, gathered)
        save_recipe(recipe, folder / RECIPE_NAME)
        results = sealed(gathered, folder)
        (folder / RESULTS_NAME).write_json(results)
        lay_out(Run(folder, results), folder)
    return Outcome(results, len(done), num_skipped, time.monotonic() - began)


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
        commits, _ = _work(workspace, [node for node in graph.nodes.values() if node.id in nodes], progress)
    return commits


@contextmanager
def finished(graph: Graph, folder: Location | None, progress: Progress) -> Iterator[dict[NodeId, Commit]]:
    """The commits of a graph without a recipe, whose outputs the body takes to where they belong.

    The folder is removed then; work that is interrupted continues there when the same is asked again. Without a folder
    it begins anew, in a temporary one of this machine.
    """
    with TemporaryDirectory(prefix="nightseg-") if folder is None else nullcontext(folder) as place:
        workspace = Workspace(place)
        with workspace.lock(), cluster.left_as_found():
            commits, _ = _work(workspace, list(graph.nodes.values()), progress)
            yield commits
    if folder is not None:
        folder.delete()


def _work(
    workspace: Workspace,
    nodes: Sequence[Node],
    progress: Progress,
    examine: Callable[[Mapping[NodeId, Commit | Shards]], None] = lambda read: None,
) -> tuple[dict[NodeId, Commit], set[NodeId]]:
    """Commit the nodes in order; returns all commits and which of them were made now.

    Once the first, which only read what the user has, are done, `examine` may refuse what they found, also where it
    was too bad to commit. What is wrong with any of them is one error, so that all of it can be mended at once.
    """
    commits: dict[NodeId, Commit] = {}
    done: set[NodeId] = set()
    problems: list[UserError] = []
    known = {node.id: node for node in nodes}
    rows = frames_at_most(Graph(known))

    def work(number: int, node: Node) -> None:
        stage = _stage(workspace, node, commits)
        damage: DamagedCommit | None = None
        try:
            commit = stage.commit(check=check_contents)
        except DamagedCommit as error:
            commit, damage = None, error
            progress.say(f"{error.what}; it is made again")
        if commit is None:
            left = time_left(nodes[number - 1 :], known, commits, rows)
            progress.say(f"[{number}/{len(nodes)}] {node.id}" + (f"; left for the run: {left}" if left else ""))
            try:
                attempt = stage.open()
                if node.id.stage.startswith("train_"):
                    show_curves(workspace.root, node.id, attempt.folder)
                commit = node.work(commits, attempt, progress)
            except UserError as error:
                if damage is None:
                    raise
                raise UserError(f"{damage.what}; and it cannot be made again: {error}", cure=damage.cure) from error
            done.add(node.id)
        commits[node.id] = commit

    first = list(takewhile(lambda node: node.id.stage in FRAME_STAGES or not node.needs, nodes))
    num_first, read = len(first), dict[NodeId, Commit | Shards]()
    for number, node in enumerate(first, 1):
        with _kept(problems):
            if all(need in commits for need in node.needs):
                try:
                    work(number, node)
                except TooManyBad as error:
                    read[node.id] = error.shards
                    raise
    with _kept(problems):
        examine(commits | read)
    if problems:
        raise together(problems)
    for number, node in enumerate(nodes[num_first:], num_first + 1):
        work(number, node)
    return commits, done


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
        count, cpus, gpus, kind = compute.actors, compute.cpus_per_actor, compute.gpus_per_actor, "actor"
    each = f"{cpus:g} CPU" + (f" + {gpus:g} GPU" if gpus else "")
    return f"{count} {kind}{'s' if count > 1 else ''} x {each}"
