"""A recipe from its check over all stages to results and report, and stages without a recipe."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from nightseg.cluster import ray as cluster
from nightseg.cluster.places import check_places
from nightseg.data.class_list import taxonomy
from nightseg.errors import all_of, together
from nightseg.networks.downloads import allow_downloads
from nightseg.pipeline import build, check, classes, leaks, tracking
from nightseg.pipeline.execute import check_room, execute
from nightseg.pipeline.folder import keep_earlier, lay_out
from nightseg.pipeline.graph import Graph, NodeId
from nightseg.pipeline.results import (
    RECIPE_NAME,
    RESULTS_NAME,
    compared,
    failures,
    gather,
    model_folder,
    read_results,
    sealed,
    told,
)
from nightseg.progress import Progress
from nightseg.recipe import load_recipe, save_recipe, told_of
from nightseg.recipe.types import Recipe
from nightseg.report import Run, write_report
from nightseg.storage import (
    Commit,
    DamagedCommit,
    Location,
    Shards,
    UserError,
    Workspace,
    check_contents,
    inputs,
)
from nightseg.storage.attempts import cure_of_bad, told_reasons
from nightseg.storage.lock import HOLDER_NAME
from nightseg.storage.scratch import temporary_folder

if TYPE_CHECKING:
    from nightseg.segmenter.predict import Segmenter

FRAMES_BEFORE: Final = 8  # of each folder that a run looks at before its first stage


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
        _settle(recipe)
        if (folder / "stages").is_folder():  # the folders have been looked at
            graph = build.build_graph(recipe, only)
            check.refuse(recipe, graph, check.done_in(folder))
        else:
            found = check.check(
                recipe, folder, only=only, most=FRAMES_BEFORE, is_measured=False, progress=progress
            )  # fmt: skip
            graph = found.graph
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
    _settle(recipe)
    graph = built or build.build_graph(recipe, only)
    part = Graph({node.id: node for node in graph.until(until)}) if until else graph
    workspace = Workspace(folder, borrow)
    with workspace.lock(), cluster.left_as_found():
        if not (folder / RESULTS_NAME).exists():  # else it is the recipe of what is finished, until more is
            save_recipe(recipe, folder / RECIPE_NAME)
        _check_cluster(recipe, part, folder, progress.say)
        found: list[leaks.Leak] = []

        def examine(read: Mapping[NodeId, Commit | Shards]) -> None:
            found.extend(leaks.find(graph, read))
            all_of(
                lambda: leaks.tell(found, recipe.leaks, progress),
                lambda: classes.check(graph, read, taxonomy(recipe.taxonomy), progress),
            )
            for start, models in leaks.unknown(graph).items():
                progress.say(f"what {start} learned from is not known, so neither is what {', '.join(models)} shares")

        concurrent = recipe.compute.concurrent
        commits, done, failed = execute(workspace, part, progress, examine, concurrent=concurrent, to_the_end=True)
        num_skipped, missing = len(commits) - len(done), list[dict[str, Any]]()
        errors = tuple(found.error for node, found in failed.items() if found.by == node)
        if errors:
            missing, graph = failures(graph, failed), graph.done(commits)
            if until or not _has_results(graph, only):
                raise as_one(errors)
        if until:
            return Outcome({}, len(done), num_skipped, time.monotonic() - began)
        if only is not None and not borrow:
            graph = _with_finished(recipe, graph, workspace, commits, progress)
            found = leaks.find(graph, commits)
        gathered = gather(recipe, graph, commits, done, found) | {"failed": missing}
        keep_earlier(folder, gathered)
        save_recipe(recipe, folder / RECIPE_NAME)
        (folder / RESULTS_NAME).write_json(sealed(compared(recipe, gathered, folder), folder))
        results = read_results(folder)
        lay_out(Run(folder, results), folder)
    return Outcome(results, len(done), num_skipped, time.monotonic() - began, errors)


def _check_cluster(recipe: Recipe, graph: Graph, folder: Location, say: Callable[[str], None]) -> None:
    """Refuse before anything starts what its nodes do not see or can never give."""
    if recipe.models or recipe.compute.map.actors:  # else all is done in this process
        check_places(check.places(recipe), _note_in(folder), say)
    check_room(graph, check.done_in(folder), say)


def _note_in(folder: Location) -> dict[str, bytes]:
    """A file that this driver has just written into its run folder, and what is in it; nothing of a store."""
    note = folder / HOLDER_NAME
    return {note.uri: note.read_bytes()} if folder.is_local and note.exists() else {}


def _has_results(graph: Graph, only: str | None) -> bool:
    """Whether anything is there that was asked for."""
    if only is not None:
        return any(nodes.of == only for nodes in graph.models.values())
    return bool(graph.models or graph.translations or graph.predictions)


def as_one(errors: Sequence[Exception]) -> Exception:
    """Of an outcome, to raise where a part is not enough."""
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
                commit = node.stage_in(workspace, commits).commit(check=check_contents)
                if commit is not None:
                    commits[node.id] = commit
    return whole.done(commits)


def _settle(recipe: Recipe) -> None:
    """What the recipe says of all processes of its run, before the first of them is started."""
    if recipe.allow_download:
        allow_downloads()
    inputs.use(int(recipe.compute.input_cache_gib * 2**30))


def prepare(
    recipe: Recipe, folder: Location, nodes: Collection[NodeId], *, only: str, progress: Progress
) -> dict[NodeId, Commit]:
    """Do some stages of a recipe, so that other runs can borrow them: what all trials of a search share.

    If there was something to do, the cluster stays connected for what comes next.
    """
    _settle(recipe)
    graph = build.build_graph(recipe, only)
    workspace = Workspace(folder)
    with workspace.lock():
        part = Graph({node: graph.nodes[node] for node in graph.nodes if node in nodes})
        return execute(workspace, part, progress, concurrent=recipe.compute.concurrent).commits


@contextmanager
def finished(graph: Graph, folder: Location | None, progress: Progress) -> Iterator[dict[NodeId, Commit]]:
    """The commits of a graph without a recipe, whose outputs the body takes to where they belong.

    The folder is removed then; work that is interrupted continues there when the same is asked again. Without a folder
    it begins anew, in a temporary one of this machine.

    Raises UserError: what a stage refuses; if it is for want of frames, which of them are bad and why.
    """
    with temporary_folder() if folder is None else nullcontext(folder) as place:
        workspace = Workspace(place)
        with workspace.lock(), cluster.left_as_found():
            try:
                commits = execute(workspace, graph, progress).commits
            except UserError as error:
                raise _all_are_bad(workspace) or error from error
            yield commits
    if folder is not None:
        folder.delete()


def _all_are_bad(workspace: Workspace) -> UserError | None:
    """That no frame of a stage can be used, which later ones only know as a want of frames; None if it is not so."""
    newest = {(commit.stage, commit.name): commit for commit in workspace.commits()}
    for commit in newest.values():
        if commit.quarantined and not commit.rows_out:
            reasons = told_reasons(commit.table("quarantine").to_pylist())
            what = f"{commit.stage}/{commit.name}: none of the {commit.rows_in} frames can be used {reasons}"
            return UserError(what, cure=f"{cure_of_bad(1.0)}; then run the same command again")
    return None
