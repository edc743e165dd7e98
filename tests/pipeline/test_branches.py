"""Branches of a made-up graph: one fails, the other is in the results; what people read of both at once."""

from __future__ import annotations

import io
import json
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from nightseg.cli.main import main
from nightseg.cluster import ray as cluster
from nightseg.cluster.settings import MapCompute, TrainCompute
from nightseg.data.class_list import taxonomy
from nightseg.metrics.confusion import scores
from nightseg.pipeline import build, execute
from nightseg.pipeline import run as runner
from nightseg.pipeline.folder import earlier
from nightseg.pipeline.graph import Graph, ModelNodes, Node, NodeId
from nightseg.pipeline.results import last_failures, read_results
from nightseg.progress import LineProgress, SilentProgress
from nightseg.recipe import load_recipe, types
from nightseg.recipe.types import Recipe
from nightseg.report import write_report
from nightseg.storage import Commit, Location, UserError, Workspace

RECIPE = """
name: made
taxonomy: camvid11
datasets: {day: {layout: scenes, count: 4}}
models: {base: {train: [day]}, left: {train: [day], start: base}, right: {train: [day], start: base},
         last: {train: [day], start: right}}
test_sets: {night: day}
"""
STARTS = {"base": "imagenet", "left": "base", "right": "base", "last": "right"}
CLASSES = taxonomy("camvid11")
COUNTS = np.eye(11, 12, dtype=np.int64) + 1
SCORES = scores(COUNTS)._asdict() | {"iou": dict(zip(CLASSES.classes, scores(COUNTS).iou, strict=True))}
SCORES |= {"confusion": COUNTS.tolist(), "frames": 4}
SOON = 20.0  # seconds that a thread of a busy machine may need
DAY = NodeId("collect", "day")


def train(name: str) -> NodeId:
    return NodeId("train_segmenter", name)


def evaluation(name: str) -> NodeId:
    return NodeId("evaluate", name)


class MadeUpGraph:
    """Every stage writes its name into a file; `act` has what some of them do before."""

    def __init__(self) -> None:
        self.worked: list[str] = []
        self.act: dict[NodeId, Callable[[], None]] = {}

    def build(self, recipe: Recipe, only: str | None = None) -> Graph:
        graph = Graph()
        self.add(graph, DAY, (), MapCompute())
        for name, start in STARTS.items():
            parents = [start] if start in STARTS else []
            self.add(graph, train(name), (DAY, *map(train, parents)), TrainCompute())
            facts: Mapping[str, Any] = {
                "parents": parents, "start": start, "train": [], "training": {"batch": 8}, "self_training": None,
                "loss": {"kind": "cross_entropy"}, "network": {"encoder": "resnet18"},
            }  # fmt: skip
            tests = {"night": types.TestRow()}
            graph.models[name] = ModelNodes(train(name), None, None, facts, name, 0, evaluation(name), tests)
        for name in STARTS:
            self.add(graph, evaluation(name), (DAY, train(name)), MapCompute(actors=0))
        return graph

    def add(self, graph: Graph, node: NodeId, needs: tuple[NodeId, ...], compute: MapCompute | TrainCompute) -> None:
        def work(attempt: Any, progress: Any, **arguments: Any) -> Commit:
            with progress.task(f"{node.stage} it", 1, "frames"):
                self.act.get(node, lambda: None)()
            (attempt.folder / "output.txt").write_bytes(str(node).encode())
            (attempt.folder / "scores.json").write_json({"night": SCORES})
            self.worked.append(str(node))
            files = ["output.txt", "scores.json"]
            return attempt.finish(rows_in=4, rows_out=4, outputs=files, summary={"steps": 40}, seconds=60.0)

        inputs = {str(need): need for need in needs}
        graph.nodes[node] = Node(node, 1, work, compute, inputs, {}, counted=tuple(inputs)[:1])


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> MadeUpGraph:
    graph = MadeUpGraph()
    monkeypatch.setattr(build, "build_graph", graph.build)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in ("room", "expected_room"):
        monkeypatch.setattr(cluster, name, {"CPU": 2.0, "GPU": 0.0, "memory": math.inf}.__getitem__)
    return graph


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return load_recipe(tmp_path / "recipe.yaml")


@pytest.fixture
def folder(tmp_path: Path) -> Location:
    return Location.of(tmp_path / "run")


def run(recipe: Recipe, folder: Location, concurrent: int | None = None, **more: Any) -> runner.Outcome:
    compute = recipe.compute.model_copy(update={"concurrent": concurrent})
    more.setdefault("progress", SilentProgress())
    return runner.run(recipe.model_copy(update={"compute": compute}), folder, **more)


def fails(error: Exception) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def meet(made: MadeUpGraph, *nodes: NodeId) -> None:
    """They pass only if they run at the same time."""
    barrier = threading.Barrier(len(nodes))
    made.act |= {node: lambda: barrier.wait(SOON) and None for node in nodes}


# -- side by side -----------------------------------------------------------------------------------------------------


def test_branches_end_as_they_do_one_after_the_other(
    made: MadeUpGraph, recipe: Recipe, folder: Location, tmp_path: Path
) -> None:
    alone = run(recipe, Location.of(tmp_path / "alone"), concurrent=1)
    assert made.worked == [str(node) for node in made.build(recipe).nodes]
    made.worked.clear()
    assert not (set(made.worked) or alone.errors)
    outcome = run(recipe, folder)
    assert outcome.results["commits"].keys() == alone.results["commits"].keys()
    assert [*outcome.results["commits"]] == [*alone.results["commits"]], "in the order of the graph"
    for node, facts in alone.results["commits"].items():
        theirs = outcome.results["commits"][node]
        assert (theirs["content"], theirs["key"]) == (facts["content"], facts["key"])
    assert run(recipe, folder).done == 0


def test_two_trainings_wait_for_the_cluster_at_the_same_time(
    made: MadeUpGraph, recipe: Recipe, folder: Location
) -> None:
    from nightseg.cluster.turn import waiting

    barrier = threading.Barrier(2)

    def waits() -> None:
        with waiting():
            barrier.wait(SOON)

    made.act = {train("left"): waits, train("right"): waits}
    assert run(recipe, folder).done == 9


def test_one_stage_at_a_time_works_in_this_process(made: MadeUpGraph, recipe: Recipe, folder: Location) -> None:
    inside = threading.Lock()

    def alone() -> None:
        assert inside.acquire(blocking=False)
        threading.Event().wait(0.05)
        inside.release()

    made.act = dict.fromkeys([train("left"), train("right")], alone)
    assert run(recipe, folder).errors == ()


def test_lines_of_branches_say_whose_they_are(made: MadeUpGraph, recipe: Recipe, folder: Location) -> None:
    stream = io.StringIO()
    run(recipe, folder, progress=LineProgress(stream))
    lines = stream.getvalue().splitlines()
    for name in ("left", "right"):
        assert f"[train_segmenter/{name}: train_segmenter it] 0/1 frames  0%" in lines
    assert "[train_segmenter it] 0/1 frames  0%" in lines  # the first model has nobody beside it
    assert any(line.startswith("[3/9] train_segmenter/left") for line in lines)


GIB = 2**30


@pytest.mark.parametrize(
    ("stage", "compute", "takes"),
    [
        ("train_segmenter", TrainCompute(workers=2, cpus_per_worker=1.5), {"CPU": 3, "GPU": 0, "memory": 6 * GIB}),
        ("train_segmenter", TrainCompute(gpus_per_worker=1), {"CPU": 1, "GPU": 1, "memory": 3 * GIB}),
        ("score", MapCompute(actors=3, gpus_per_actor=0.25), {"CPU": 3, "GPU": 0.75, "memory": 9 * GIB}),
        ("score", MapCompute(actors=0), {"driver": 1, "CPU": math.inf}),
        ("adapt_norms", MapCompute(actors=3), {"driver": 1, "CPU": math.inf}),
        ("select", MapCompute(actors=3), {"driver": 1, "CPU": 1}),
    ],
)
def test_what_a_stage_takes_of_a_machine(
    stage: str, compute: MapCompute | TrainCompute, takes: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(NodeId(stage, "x"), 1, lambda: None, compute, {}, {})  # type: ignore[arg-type,return-value]
    monkeypatch.setattr(cluster, "is_this_machine", lambda: True)
    assert execute._taken(node) == takes
    monkeypatch.setattr(cluster, "is_this_machine", lambda: False)  # a cluster lends the driver no CPU
    assert execute._taken(node) == ({"driver": 1, "CPU": 0} if "driver" in takes else takes)


@pytest.mark.parametrize(
    ("compute", "refused"),
    [
        (
            TrainCompute(workers=2, cpus_per_worker=1.5),
            "compute.train: 2 workers with 1.5 CPU each need 3 CPU, and this",
        ),
        (TrainCompute(workers=2), None),
        (MapCompute(actors=3), None),  # no more start than there are shards
        (MapCompute(cpus_per_actor=4), "compute.map: 1 actors with 4 CPU each need 4 CPU, and this machine has 2"),
        (MapCompute(actors=0, cpus_per_actor=4), None),
    ],
)
def test_what_can_never_be_is_refused_before_anything_starts(
    compute: MapCompute | TrainCompute, refused: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = NodeId("train_segmenter" if isinstance(compute, TrainCompute) else "score", "x")
    graph = Graph({name: Node(name, 1, lambda: None, compute, {}, {})})  # type: ignore[arg-type,return-value]
    monkeypatch.setattr(cluster, "is_this_machine", lambda: True)
    monkeypatch.setattr(cluster, "expected_room", lambda resource: 2.0)
    execute.check_room(graph, {name}, print)  # it is done
    if refused is None:
        execute.check_room(graph, (), print)
    else:
        with pytest.raises(UserError, match=refused):
            execute.check_room(graph, (), print)


def test_a_cluster_is_asked_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    name, asked = NodeId("train_segmenter", "x"), []
    graph = Graph({name: Node(name, 1, lambda: None, TrainCompute(workers=8, gpus_per_worker=1), {}, {})})  # type: ignore[arg-type,return-value]
    monkeypatch.setattr(cluster, "is_this_machine", lambda: False)
    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(cluster, "require", lambda who, count, **more: asked.append((who, count, more["gpus"])))
    execute.check_room(graph, (), print)
    assert asked == [("worker", 8, 1.0)]


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrent", [1, None])
def test_a_failed_model_stops_those_that_need_it_and_no_other(
    made: MadeUpGraph, recipe: Recipe, folder: Location, concurrent: int | None
) -> None:
    made.act[train("right")] = fails(UserError("right: the loss is not finite", cure="a smaller step"))
    outcome = run(recipe, folder, concurrent)
    assert set(outcome.results["models"]) == {"base", "left"} and len(outcome.errors) == 1
    assert outcome.results["models"]["left"]["tests"]["night"]["mean"]["miou"] == SCORES["miou"]
    assert outcome.results["failed"] == last_failures(folder) == [
        {
            "stage": "train_segmenter/right",
            "error": "right: the loss is not finite. Cure: a smaller step.",
            "models": ["right", "last"],
            "not_reached": ["train_segmenter/last", "evaluate/right", "evaluate/last"],
        }
    ]  # fmt: skip
    page = write_report(folder, outcome.results).read_bytes().decode()
    assert "failed: right: the loss is not finite" in page and "right, last" in page

    made.act.clear()
    made.worked.clear()
    again = run(recipe, folder, concurrent)
    assert made.worked == ["train_segmenter/right", "train_segmenter/last", "evaluate/right", "evaluate/last"]
    assert again.results["failed"] == [] and again.errors == () and set(again.results["models"]) == set(STARTS)


def test_a_model_without_its_scores_is_there_and_named(made: MadeUpGraph, recipe: Recipe, folder: Location) -> None:
    made.act[evaluation("left")] = fails(RuntimeError("a worker died"))
    results = run(recipe, folder).results
    assert set(results["models"]) == set(STARTS) and results["models"]["left"]["tests"] == {}
    (failed,) = results["failed"]
    assert (failed["models"], failed["not_reached"]) == (["left"], [])
    assert failed["error"] == "RuntimeError: a worker died"


def test_the_command_line_says_what_failed_and_ends_with_1(
    made: MadeUpGraph, recipe: Recipe, folder: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = SimpleNamespace(graph=made.build(recipe))
    monkeypatch.setattr(runner.check, "check", lambda *words, **more: checked)
    monkeypatch.setattr(runner.check, "refuse", lambda *words, **more: None)
    made.act[train("right")] = fails(RuntimeError("a worker died"))
    made.act[evaluation("left")] = fails(UserError("left: too many bad frames", cure="mend them"))
    words = ["run", str(tmp_path / "recipe.yaml"), "--run-dir", folder.uri]
    ended = CliRunner().invoke(main, words)
    assert ended.exit_code == 1
    assert (
        "nightseg: train_segmenter/right failed: RuntimeError: a worker died. Not reached: train_segmenter/last, "
        in (ended.stderr)
    )
    assert (
        "evaluate/left failed: left: too many bad frames. Cure: mend them. Results are missing of left" in ended.stderr
    )
    assert "4 stages done" in ended.stdout and "Traceback" not in ended.output
    shown = CliRunner().invoke(main, ["status", folder.uri])
    assert shown.exit_code == 0 and "train_segmenter/right failed" in shown.stdout

    ended = CliRunner().invoke(main, [*words, "--json", "--debug"])
    assert ended.exit_code == 1 and json.loads(ended.stdout)["failed"] == read_results(folder)["failed"]
    assert "Traceback" in ended.stderr and "too many bad frames" in ended.stderr
    assert len(json.loads(CliRunner().invoke(main, ["status", folder.uri, "--json"]).stdout)["failed"]) == 2


def test_without_any_result_the_error_is_told_as_it_is(made: MadeUpGraph, recipe: Recipe, folder: Location) -> None:
    made.act[train("base")] = fails(UserError("base: no weights", cure="fetch them"))
    with pytest.raises(UserError, match=r"^base: no weights\. Cure: fetch them\.$"):
        run(recipe, folder)
    assert not (folder / "results.json").exists()


def test_a_single_model_that_was_asked_for_and_fails_is_an_error(
    made: MadeUpGraph, recipe: Recipe, folder: Location
) -> None:
    first = run(recipe, folder)
    made.act[train("right")] = fails(RuntimeError("a worker died"))
    (folder / "stages/train_segmenter/right").delete()
    with pytest.raises(RuntimeError, match="a worker died"):
        run(recipe, folder, only="right")
    assert read_results(folder) == first.results and not earlier(folder)


def test_what_searches_share_ends_at_the_first_error(made: MadeUpGraph, recipe: Recipe, folder: Location) -> None:
    made.act[train("base")] = fails(RuntimeError("a worker died"))
    nodes = {DAY, train("base"), evaluation("base")}
    with pytest.raises(RuntimeError, match="a worker died"):
        runner.prepare(recipe, folder, nodes, only="base", progress=SilentProgress())
    assert made.worked == ["collect/day"]


# -- what is still to be done -----------------------------------------------------------------------------------------


def test_the_time_left_is_that_of_branches_side_by_side(
    made: MadeUpGraph, recipe: Recipe, folder: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nightseg.pipeline import time_left

    monkeypatch.setattr(time_left, "work_of", lambda node, rows: 1.0)
    told = {}
    for concurrent in (1, None):
        stream = io.StringIO()
        run(recipe, folder / str(concurrent), concurrent, progress=LineProgress(stream))
        lines = [line for line in stream.getvalue().splitlines() if "] train_segmenter/left" in line]
        told[concurrent] = lines[0].partition("left for the run: ")[2]
    # left, right, last; with two at a time the way over right is the longest
    assert told == {
        1: "at least 3 min 0 s, and what is not known yet: evaluate",
        None: "at least 2 min 0 s, and what is not known yet: evaluate",
    }


def test_nodes_for_what_follows_are_asked_for_before_it_begins(
    made: MadeUpGraph, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster that grows: when the base is nearly trained, for both branches; not for what needs more than it."""
    asked: list[tuple[str, int, Mapping[str, float]]] = []
    now = [""]
    monkeypatch.setattr(cluster, "is_this_machine", lambda: False)
    monkeypatch.setattr(cluster, "may_grow", lambda: True)
    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(execute.ahead, "missing", lambda count, each: count)
    monkeypatch.setattr(execute.ahead, "ask", lambda count, each: asked.append((now[0], count, each)))

    class Nearly(execute.ahead.EndInSight):
        def task(self, title: str, total: int | None, unit: str) -> Any:
            now[0] = title
            self.tell(0.0)
            return super().task(title, total, unit)

    monkeypatch.setattr(execute.ahead, "EndInSight", Nearly)
    graph = made.build(recipe)
    execute.execute(Workspace(tmp_path / "run"), graph, SilentProgress())
    one = {"CPU": TrainCompute().cpus_per_worker, "GPU": 0.0}
    # base after day, left and right after base, last after right; evaluations are the driver's
    assert [(count, dict(each)) for _, count, each in asked] == [(1, one), (2, one), (1, one)]
    asked.clear()
    monkeypatch.setattr(cluster, "may_grow", lambda: False)
    execute.execute(Workspace(tmp_path / "fixed"), graph, SilentProgress())
    assert asked == []


@pytest.mark.parametrize(("rows", "count"), [(10, 3), (100, 8), (None, 8), (0, 0)])
def test_no_more_actors_are_asked_for_than_there_will_be_shards(
    made: MadeUpGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int | None, count: int
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(execute.ahead, "missing", lambda count, each: count)
    monkeypatch.setattr(execute.ahead, "ask", lambda count, each: asked.append(count))
    graph, score = Graph(), NodeId("score", "day")
    made.add(graph, DAY, (), MapCompute())
    made.add(graph, score, (DAY,), MapCompute(actors=8, shard_rows=4))
    graph.nodes[DAY] = replace(graph.nodes[DAY], expected_rows=rows)
    room = execute.expected_room(graph, 1)
    execute._Stages(Workspace(tmp_path / "run"), graph, SilentProgress(), room, False)._ask_ahead(DAY)
    assert asked == ([count] if count else [])
