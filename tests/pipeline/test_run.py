"""Plans and runs of a made-up graph: what is done, skipped, continued, borrowed, and why something runs again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from nightseg.cluster import ray as cluster
from nightseg.cluster.settings import MapCompute, TrainCompute
from nightseg.pipeline import build
from nightseg.pipeline import run as runner
from nightseg.pipeline.folder import earlier, owners
from nightseg.pipeline.graph import Graph, ModelNodes, Node, NodeId
from nightseg.pipeline.plan import plan
from nightseg.pipeline.results import read_results
from nightseg.progress import SilentProgress
from nightseg.recipe import load_recipe, types
from nightseg.recipe.types import Recipe
from nightseg.storage import Attempt, Commit, Location, UserError, WorkspaceBusy

RECIPE = """
name: made
taxonomy: camvid11
seed: 7
datasets: {day: {layout: scenes, count: 4}}
models: {m: {train: [day]}}
test_sets: {night: day}
"""
DAY, TRAIN, TEST = NodeId("collect", "day"), NodeId("train_segmenter", "m"), NodeId("evaluate", "m")
SCORES = {"miou": 0.25, "pa": 0.5, "ca": 0.5, "fwiou": 0.5, "iou": {"sky": None}, "confusion": [[1]], "frames": 4}


class MadeUpGraph:
    """collect/day -> train_segmenter/m -> evaluate/m; every stage writes one file, and `worked` tells of it."""

    def __init__(self) -> None:
        self.worked: list[str] = []
        self.connected = 0
        self.text = {DAY: "frames", TRAIN: "weights", TEST: "scores"}
        self.settings: dict[NodeId, dict[str, Any]] = {DAY: {"count": 4}, TRAIN: {"epochs": {"last": 2}}, TEST: {}}
        self.fails: NodeId | None = None
        self.most_rows: int | None = None
        self.meanwhile: Callable[[], None] = lambda: None

    def build(self, recipe: Recipe, only: str | None = None) -> Graph:
        if only not in (None, "m"):
            raise UserError(f"{only}: no such model")
        graph = Graph()
        for node, needs in ((DAY, ()), (TRAIN, (DAY,)), (TEST, (DAY, TRAIN))):
            is_training = node is TRAIN
            graph.nodes[node] = Node(
                node,
                1,
                self.work(node),
                TrainCompute(cpus_per_worker=2) if is_training else MapCompute(actors=2, gpus_per_actor=0.5),
                inputs={need.stage: need for need in needs},
                settings=self.settings[node],
                counted=tuple(need.stage for need in needs[:1]),
                seed=recipe.seed if is_training else 0,
                expected_rows=4 if node is DAY else None,
                most_rows=self.most_rows if node is DAY else None,
            )
        facts: Mapping[str, Any] = {
            "parents": [], "start": "imagenet", "train": [], "training": {"batch": 8}, "self_training": None,
            "loss": {"kind": "cross_entropy"}, "network": {"encoder": "resnet18"},
        }  # fmt: skip
        tests = {"night": types.TestRow(row="2.1", published_miou=31.5)}
        graph.models["m"] = ModelNodes(TRAIN, None, None, facts, "m", 0, TEST, tests)
        return graph

    def work(self, node: NodeId) -> Callable[..., Commit]:
        def work(attempt: Attempt, progress: Any, **arguments: Any) -> Commit:
            assert {name: arguments[name] for name in self.settings[node]} == self.settings[node]
            for need in set(arguments) - set(self.settings[node]):
                assert isinstance(arguments[need], Commit), "a stage runs after what it needs"
            self.worked.append(str(node))
            self.meanwhile()
            (attempt.folder / "output.txt").write_bytes(self.text[node].encode())
            if self.fails == node:
                raise RuntimeError("the power went")
            (attempt.folder / "scores.json").write_json({"night": SCORES})
            outputs = ["output.txt", "scores.json"]
            return attempt.finish(rows_in=4, rows_out=4, outputs=outputs, summary={"steps": 40})

        return work


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> MadeUpGraph:
    graph = MadeUpGraph()
    monkeypatch.setattr(build, "build_graph", graph.build)

    def connect() -> None:
        graph.connected += 1

    monkeypatch.setattr(cluster, "connect", connect)
    return graph


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return load_recipe(tmp_path / "recipe.yaml")


@pytest.fixture
def folder(tmp_path: Path) -> Location:
    return Location.of(tmp_path / "run")


def run(recipe: Recipe, folder: Location, **more: Any) -> runner.Outcome:
    return runner.run(recipe, folder, progress=SilentProgress(), **more)


def states(recipe: Recipe, folder: Location) -> dict[str, str]:
    return {str(line.node): line.state for line in plan(recipe, folder)}


# -- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_works_in_order_and_leaves_recipe_and_results(
    made: MadeUpGraph, recipe: Recipe, folder: Location
) -> None:
    outcome = run(recipe, folder)
    assert made.worked == ["collect/day", "train_segmenter/m", "evaluate/m"]
    assert (outcome.done, outcome.skipped) == (3, 0)
    assert load_recipe(folder / "recipe.yaml") == recipe
    assert read_results(folder) == outcome.results
    assert outcome.results["models"]["m"]["tests"]["night"]["published_miou"] == 31.5


def test_an_unchanged_run_does_nothing_and_starts_no_ray(made: MadeUpGraph, recipe: Recipe, folder: Location) -> None:
    first = run(recipe, folder)
    made.worked.clear()
    made.connected = 0
    again = run(recipe, folder)
    assert (made.worked, made.connected) == ([], 0)
    assert (again.done, again.skipped) == (0, 3)
    assert again.results["models"] == first.results["models"]
    assert all(facts["skipped"] for facts in again.results["commits"].values())


def test_a_change_runs_what_stands_on_it(made: MadeUpGraph, recipe: Recipe, folder: Location) -> None:
    run(recipe, folder)
    made.worked.clear()
    made.settings[TRAIN], made.text[TRAIN] = {"epochs": {"last": 3}}, "better weights"
    run(recipe, folder)
    assert made.worked == ["train_segmenter/m", "evaluate/m"]


def test_a_change_that_changes_no_output_goes_no_further(made: MadeUpGraph, recipe: Recipe, folder: Location) -> None:
    run(recipe, folder)
    made.worked.clear()
    made.settings[DAY] = {"count": 4, "comment": "the same frames"}
    run(recipe, folder)
    assert made.worked == ["collect/day"]


def test_what_failed_continues_in_the_same_attempt(made: MadeUpGraph, recipe: Recipe, folder: Location) -> None:
    made.fails = TRAIN
    with pytest.raises(RuntimeError, match="the power went"):
        run(recipe, folder)
    assert not (folder / "results.json").exists()
    assert states(recipe, folder) == {
        "collect/day": "committed", "train_segmenter/m": "continues", "evaluate/m": "waits"
    }  # fmt: skip
    made.fails = None
    made.worked.clear()
    outcome = run(recipe, folder)
    assert made.worked == ["train_segmenter/m", "evaluate/m"]
    assert outcome.results["commits"]["train_segmenter/m"]["folder"].endswith("attempt-1")


def damage(outcome: runner.Outcome, node: NodeId, name: str = "output.txt") -> Location:
    """Turns one bit of a committed file."""
    file = Location.of(outcome.results["commits"][str(node)]["folder"]) / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(bytes(data))
    return file


@pytest.mark.parametrize("node", [DAY, TRAIN, TEST])
def test_a_damaged_stage_is_done_again_and_nothing_else(
    made: MadeUpGraph, recipe: Recipe, folder: Location, node: NodeId
) -> None:
    first = run(recipe, folder)
    damage(first, node)
    lines = {line.node: line for line in plan(recipe, folder)}
    assert (lines[node].state, lines[node].changed) == ("runs", ("damaged outputs",))
    made.worked.clear()
    again = run(recipe, folder)
    assert made.worked == [str(node)]
    contents = [{n: facts["content"] for n, facts in one.results["commits"].items()} for one in (first, again)]
    assert contents[0] == contents[1]
    assert again.results["models"] == first.results["models"]
    assert run(recipe, folder).done == 0


def test_a_damaged_stage_that_cannot_be_done_again_says_what_is_damaged(
    made: MadeUpGraph, recipe: Recipe, folder: Location
) -> None:
    file = damage(run(recipe, folder), DAY)
    whole = file.read_bytes()

    def gone() -> None:
        raise UserError("/data/day: there is no such folder")

    made.meanwhile = gone
    with pytest.raises(
        UserError, match=r"output\.txt has sha256 \w+ instead of sha256 \w+; and it cannot be .*no such"
    ):
        run(recipe, folder)
    data = bytearray(whole)
    data[len(data) // 2] ^= 4
    file.write_bytes(bytes(data))
    assert run(recipe, folder).done == 0, "what was restored counts again"


def test_damage_that_a_lender_has_is_not_borrowed(
    made: MadeUpGraph, recipe: Recipe, folder: Location, tmp_path: Path
) -> None:
    damage(run(recipe, folder), TRAIN)
    made.worked.clear()
    run(recipe, Location.of(tmp_path / "other"), borrow=[folder])
    assert made.worked == ["train_segmenter/m"]


def test_a_wrong_request_leaves_no_run_folder(made: MadeUpGraph, recipe: Recipe, folder: Location) -> None:
    with pytest.raises(UserError, match="no such model"):
        run(recipe, folder, only="n")
    assert not folder.exists()


def test_a_second_driver_is_told_who_works_here(made: MadeUpGraph, recipe: Recipe, folder: Location) -> None:
    def start_another() -> None:
        with pytest.raises(WorkspaceBusy, match="in use by process"):
            run(recipe, folder)

    made.meanwhile = start_another
    assert run(recipe, folder).done == 3
    assert made.worked == ["collect/day", "train_segmenter/m", "evaluate/m"]


def test_other_runs_borrow_what_was_prepared(
    made: MadeUpGraph, recipe: Recipe, folder: Location, tmp_path: Path
) -> None:
    shared = Location.of(tmp_path / "shared")
    commits = runner.prepare(recipe, shared, {DAY}, only="m", progress=SilentProgress())
    assert list(commits) == [DAY] and made.worked == ["collect/day"]
    outcome = run(recipe, folder, borrow=[shared])
    assert made.worked == ["collect/day", "train_segmenter/m", "evaluate/m"]
    assert outcome.skipped == 1
    assert outcome.results["commits"]["collect/day"]["folder"].startswith(shared.uri)


def test_run_folders_have_a_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NIGHTSEG_RUNS", raising=False)
    assert runner.run_folder("demo", None).uri == f"{tmp_path}/runs/demo"
    assert runner.run_folder("demo", "s3://bucket/here").uri == "s3://bucket/here"
    monkeypatch.setenv("NIGHTSEG_RUNS", "/data/runs")
    assert runner.run_folder("demo", None).uri == "/data/runs/demo"


def test_work_without_a_place_lies_in_a_temporary_folder_and_goes_with_it(
    made: MadeUpGraph, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with runner.finished(made.build(recipe), None, SilentProgress()) as commits:
        (place,) = tmp_path.glob("nightseg-*/*")
        assert all(commit.folder.uri.startswith(str(place)) for commit in commits.values())
    assert not list(tmp_path.glob("nightseg-*/*"))


# -- plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_of_nothing_done_counts_frames_and_resources(
    made: MadeUpGraph, recipe: Recipe, folder: Location
) -> None:
    lines = plan(recipe, folder)
    assert [line.state for line in lines] == ["runs", "waits", "waits"]
    assert [line.rows for line in lines] == [4, 4, 4]
    assert [line.resources for line in lines] == [
        "2 actors x 1 CPU + 0.5 GPU", "1 worker x 2 CPU", "2 actors x 1 CPU + 0.5 GPU"
    ]  # fmt: skip
    assert not folder.exists() and made.worked == []


def test_a_plan_knows_that_a_selection_hands_on_fewer_frames(
    made: MadeUpGraph, recipe: Recipe, folder: Location
) -> None:
    made.most_rows = 3
    assert [line.rows for line in plan(recipe, folder)] == [4, 3, 3]
    made.most_rows = 9
    assert [line.rows for line in plan(recipe, folder)] == [4, 4, 4]


def test_a_plan_names_the_keys_that_changed(made: MadeUpGraph, recipe: Recipe, folder: Location) -> None:
    run(recipe, folder)
    assert set(states(recipe, folder).values()) == {"committed"}
    made.settings[TRAIN] = {"epochs": {"last": 3}, "batch": 8}
    lines = {line.node: line for line in plan(recipe.model_copy(update={"seed": 8}), folder)}
    assert (lines[DAY].state, lines[TRAIN].state, lines[TEST].state) == ("committed", "runs", "waits")
    assert set(lines[TRAIN].changed) == {"recipe.epochs.last", "recipe.batch", "seed"}


def test_a_plan_knows_what_can_be_borrowed(made: MadeUpGraph, recipe: Recipe, folder: Location, tmp_path: Path) -> None:
    run(recipe, folder)
    lines = plan(recipe, Location.of(tmp_path / "other"), borrow=[folder])
    assert [line.state for line in lines] == ["committed"] * 3


# -- what a person finds in the run folder ----------------------------------------------------------------------------


def test_results_of_another_recipe_are_kept_with_what_belongs_to_them(
    made: MadeUpGraph, recipe: Recipe, folder: Location
) -> None:
    """A changed setting adds results; given back, the first ones are the last again, and the others are kept."""
    first = run(recipe, folder)
    assert not earlier(folder)
    made.settings[TRAIN], made.text[TRAIN] = {"epochs": {"last": 3}}, "better weights"
    second = run(recipe.model_copy(update={"max_bad_fraction": 0.02}), folder)
    (place,) = earlier(folder)
    assert read_results(place) == first.results and load_recipe(place / "recipe.yaml") == recipe
    assert (place / "models/m/README.md").exists() and read_results(folder) == second.results
    old, new = (one.results["commits"]["train_segmenter/m"]["key"] for one in (first, second))
    known = owners(folder)
    assert known["train_segmenter/m", old] == [f"earlier/{place.name}"]
    assert known["train_segmenter/m", new] == ["results.json"]
    assert known["collect/day", first.results["commits"]["collect/day"]["key"]] == [
        "results.json", f"earlier/{place.name}"
    ]  # fmt: skip

    made.settings[TRAIN], made.text[TRAIN] = {"epochs": {"last": 2}}, "weights"
    run(recipe, folder)
    (place,) = earlier(folder)
    assert read_results(place)["commits"]["train_segmenter/m"]["key"] == new


def test_one_stage_is_done_with_what_it_needs_and_the_whole_run_goes_on_from_there(
    made: MadeUpGraph, recipe: Recipe, folder: Location
) -> None:
    outcome = run(recipe, folder, until="train_segmenter")
    assert made.worked == [str(DAY), str(TRAIN)] and outcome[:3] == ({}, 2, 0)
    assert not (folder / "results.json").exists()
    assert [line.node for line in plan(recipe, folder, until="collect")] == [DAY]
    whole = run(recipe, folder)
    assert made.worked == [str(DAY), str(TRAIN), str(TEST)] and (whole.done, whole.skipped) == (1, 2)
    before = read_results(folder)
    assert run(recipe, folder, until="collect")[1:3] == (0, 1)
    assert read_results(folder) == before


def test_a_stage_that_the_recipe_lacks_is_refused_before_the_folder_is_touched(
    made: MadeUpGraph, recipe: Recipe, folder: Location
) -> None:
    with pytest.raises(UserError, match=r"no stage 'colect', did you mean 'collect'.*train_segmenter, evaluate"):
        run(recipe, folder, until="colect")
    assert not folder.exists()


def test_a_run_that_fails_leaves_finished_results_as_they_are(
    made: MadeUpGraph, recipe: Recipe, folder: Location
) -> None:
    first = run(recipe, folder)
    made.settings[TRAIN], made.fails = {"epochs": {"last": 3}}, TRAIN
    with pytest.raises(RuntimeError, match="the power went"):
        run(recipe.model_copy(update={"max_bad_fraction": 0.02}), folder)
    assert read_results(folder) == first.results and load_recipe(folder / "recipe.yaml") == recipe
    assert not earlier(folder)


def test_other_settings_of_the_same_results_keep_nothing_twice(
    made: MadeUpGraph, recipe: Recipe, folder: Location
) -> None:
    run(recipe, folder)
    run(recipe.model_copy(update={"max_bad_fraction": 0.02}), folder)  # in no key of these stages
    assert not earlier(folder) and load_recipe(folder / "recipe.yaml").max_bad_fraction == 0.02
