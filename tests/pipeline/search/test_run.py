"""A search refuses what cannot work, names and shares its trials, picks the best, and runs with Ray Tune (slow)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nightseg.pipeline import leaks, run
from nightseg.pipeline.build import build_graph
from nightseg.pipeline.graph import Graph, NodeId
from nightseg.pipeline.search import Found, search
from nightseg.pipeline.search import run as module
from nightseg.pipeline.search.proposals import propose
from nightseg.pipeline.search.records import Records
from nightseg.pipeline.search.trials import Trials, shared_nodes
from nightseg.progress import Progress, SilentProgress
from nightseg.recipe import load_recipe
from nightseg.recipe.types import Recipe
from nightseg.storage import Location, UserError, Workspace
from tests.command_line import json_of
from tests.small_search import ALPHA, CONFIGS, COUNT, search_of, trials_of


def refused(folder: Path, *overrides: str, file: Path = CONFIGS / "search.yaml") -> str:
    """The message; nothing has been written and no Ray was started."""
    with pytest.raises(UserError) as caught:
        search(str(file), overrides, run_dir=str(folder / "run"), progress=SilentProgress())
    assert not (folder / "run").exists()
    return str(caught.value)


@pytest.fixture(autouse=True)
def no_ray(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "ray" not in request.keywords:
        from nightseg.cluster import ray as cluster

        monkeypatch.setattr(cluster, "connect", lambda: pytest.fail("no Ray before the request is checked"))


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_the_search_of_the_demo_is_right() -> None:
    settings = search_of()
    module._check("search.yaml", settings, Location.of(CONFIGS / "demo.yaml"))
    assert settings.trials == 4 and set(settings.space) >= {ALPHA, COUNT}


def test_ray_is_started_with_the_dashboard_that_frees_stopped_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray asks its dashboard whether the training of a stopped trial still lives; without one its CPUs stay taken."""
    from nightseg.cluster import ray as cluster

    asked: list[bool] = []

    def connect(*, dashboard: bool = False) -> None:
        asked.append(dashboard)
        raise InterruptedError

    monkeypatch.setattr(cluster, "connect", connect)
    with pytest.raises(InterruptedError):
        search(str(CONFIGS / "search.yaml"), [], run_dir=str(tmp_path / "run"), progress=SilentProgress())
    assert asked == [True]


def test_everything_that_is_wrong_is_in_one_message(tmp_path: Path) -> None:
    message = refused(
        tmp_path,
        "model=adaptd",
        "space={models.adapted.loss.alhpa: {uniform: [0, 1]}, "
        "models.adapted.loss.gamma: {uniform: [-1, 4]}, "
        f"{COUNT}: {{choice: [60, 120, many]}}}}",
    )
    for expected in (
        "4 errors",
        "nothing was started",
        "model: the recipe has no model 'adaptd', did you mean 'adapted'?",
        "space.models.adapted.loss.alhpa: ",
        "unknown key, did you mean 'alpha'?",
        "space.models.adapted.loss.gamma: ",
        f'space.{COUNT}: set {COUNT}="many": ',
    ):
        assert expected in message, f"{expected}\nis missing in\n{message}"


def test_a_score_is_needed_and_it_must_not_be_a_test(tmp_path: Path) -> None:
    assert "has no validate_on, so there is no score" in refused(tmp_path, "set=[]")
    on_test = '["models.adapted.validate_on=[night_test]", "models.adapted.loss={kind: combined}"]'
    assert "night_test, which is the test set night" in refused(tmp_path, f"set={on_test}")
    assert "a search that looks at the test set night spoils it" in refused(tmp_path, "test=night")
    assert "no test set 'nigth', did you mean 'night'?" in refused(tmp_path, "test=nigth", "spoil_test=true")
    assert "there is no class 'rood', did you mean 'road'?" in refused(tmp_path, "metric=iou.rood")


@pytest.mark.parametrize("override", ["test=night", 'set=["models.adapted.validate_on=[night_test]"]'])
def test_a_search_may_spoil_a_test_set_if_it_says_so(override: str) -> None:
    settings = search_of(override, "spoil_test=true", "space={training.learning_rate: {uniform: [1e-4, 1e-3]}}")
    module._check("search.yaml", settings, Location.of(CONFIGS / "demo.yaml"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"space={{{COUNT}: {{choice: [60, 9999]}}}}", "self_training.select.count is 9999, and the pool has"),
        ("space={training.warmup_steps: {choice: [1, 9999]}}", "warmup_steps is 9999, but"),
        ("space={network.encoder: {choice: [efficientnet_lite0, resnet18]}}", "nothing is downloaded unasked"),
    ],
)
def test_what_a_stage_of_one_trial_would_refuse_is_refused_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    """Whichever value of the space it is; no Ray is started, no stage begins."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no-weights"))
    monkeypatch.delenv("NIGHTSEG_ALLOW_DOWNLOAD", raising=False)
    with pytest.raises(UserError, match=message) as caught:
        search(str(CONFIGS / "search.yaml"), [override], run_dir=str(tmp_path / "run"), progress=SilentProgress())
    assert "demo.yaml: line" in str(caught.value) or "set " in str(caught.value)
    assert not (tmp_path / "run" / "shared" / "stages").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trails=3", "trails: unknown key, did you mean 'trials'?"),
        ("trials=0", "trials: input should be greater than or equal to 1"),
        (f"space.{ALPHA}={{uniform: [1, 0]}}", "the end must be larger"),
        ("space={}", "space: "),
        ("recipe=demo2.yaml", "demo2.yaml: there is no such recipe file"),
        ("set=[training.epoch=3]", "set training.epoch=3: training.epoch: unknown key, did you mean 'epochs'?"),
    ],
)
def test_wrong_settings_name_their_key(tmp_path: Path, override: str, message: str) -> None:
    assert message in refused(tmp_path, override)


def test_the_recipe_lies_beside_the_search(tmp_path: Path) -> None:
    assert Location.of("/a/b/search.yaml").beside("demo.yaml").uri == "/a/b/demo.yaml"
    assert Location.of("/a/b/search.yaml").beside("../demo.yaml").uri == "/a/demo.yaml"
    assert Location.of("/a/b/search.yaml").beside("/c/demo.yaml").uri == "/c/demo.yaml"
    assert Location.of("s3://bucket/search.yaml").beside("s3://other/demo.yaml").uri == "s3://other/demo.yaml"


# -- the outcome ------------------------------------------------------------------------------------------------------


@pytest.fixture
def searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Found, dict[str, Any]]]:
    """A whole search whose trials are made up: what is found, and what was asked of the cluster, the runs and Tune."""
    from nightseg.cluster import ray as cluster
    from nightseg.pipeline.search import tune as tune_module

    def whole(*overrides: str, place: str = str(tmp_path / "search")) -> tuple[Found, dict[str, Any]]:
        asked: dict[str, Any] = {"connected": [], "prepared": {}, "tuned": [], "watched": []}

        def prepare(recipe: Recipe, folder: Location, nodes: set[NodeId], **more: Any) -> dict[NodeId, Any]:
            made = build_graph(recipe, more["only"]).nodes.keys() & nodes
            asked["prepared"][folder.uri] = asked["prepared"].get(folder.uri, set()) | made
            return {node: SimpleNamespace(content=str(node)) for node in made}

        def tune(trials: Trials, records: Records, work: Any, progress: Progress, **more: Any) -> None:
            asked["tuned"].append(more)
            while row := records.next(propose):
                score = 0.3 + row["values"][ALPHA] / 10
                curve = [[1, score / 2], [3, score]]
                counts = {"trainings": 1, "reused": 9}
                scores = {trials.settings.metric: score}
                records.end(row, end="done", **scores, epochs=3, curve=curve, seconds=60.0, **counts)
                more["on_end"]()

        monkeypatch.setattr(cluster, "connect", lambda **more: asked["connected"].append(more))
        monkeypatch.setattr(cluster, "room", lambda resource: {"CPU": 4.0}[resource])

        def find(graph: Graph, commits: Any, *, validation: bool) -> list[leaks.Leak]:
            asked["compared"] = commits.keys() == leaks.needed(graph) and validation
            return []

        monkeypatch.setattr(run, "prepare", prepare)
        monkeypatch.setattr(leaks, "find", find)
        monkeypatch.setattr(tune_module, "tune", tune)
        space = f"space={{{ALPHA}: {{uniform: [0.1, 0.9]}}, {COUNT}: {{choice: [60, 120]}}}}"
        words = ["trials=4", space, *overrides]
        found = search(
            str(CONFIGS / "search.yaml"),
            words,
            run_dir=place,
            progress=SilentProgress(),
            watched=asked["watched"].append,
        )
        return found, asked

    return whole


def test_a_search_prepares_what_is_shared_and_writes_what_it_found(
    searched: Callable[..., tuple[Found, dict[str, Any]]], tmp_path: Path
) -> None:
    found, asked = searched()
    folder = tmp_path / "search"
    assert asked["connected"] == [{"dashboard": True}] * 2  # before the shared stages, and for the trials
    (prepared,) = asked["prepared"].items()
    trials = trials_of(tmp_path / "trials")
    needed = leaks.needed(build_graph(load_recipe(folder / "recipe.yaml"), "adapted"))
    shared = shared_nodes(trials.graph(values) for values in trials.edges())
    assert prepared == (str(folder / "shared"), shared | needed) and asked["compared"]
    assert [one.uri for one in asked["watched"]] == [str(folder)] == [found.folder.uri]
    (told,) = asked["tuned"]
    assert (told["concurrent"], told["epochs"], told["keys"]) == (2, 2, [COUNT])  # 4 CPUs, and a trial takes two
    assert found.best == found.trials[0] == max(found.trials, key=lambda row: float(row["miou"]))
    assert (len(found.trials), found.trainings, found.reused) == (4, 4, 36)
    written = json.loads((folder / "trials.json").read_text())
    assert written["best"] == found.best and len(written["trials"]) == 4
    best = load_recipe(found.best_recipe).models["adapted"]
    assert best.loss is not None and best.loss.alpha == found.best["values"][ALPHA]
    assert load_recipe(folder / "recipe.yaml").models["adapted"].validate_on  # as the search sets it
    assert found.page is not None and found.best["label"] in found.page.read_bytes().decode()


def test_a_search_that_is_finished_is_not_done_again_but_one_that_asks_for_more_is(
    searched: Callable[..., tuple[Found, dict[str, Any]]],
) -> None:
    first, _ = searched()
    again, nothing = searched()
    assert again == first and (nothing["connected"], nothing["tuned"], nothing["watched"]) == ([], [], [])
    more, asked = searched("trials=6")
    assert asked["connected"] == [{"dashboard": True}] and len(more.trials) == 6
    assert {row["trial"] for row in more.trials} > {row["trial"] for row in first.trials}
    changes = ["datasets.dark={layout: scenes, count: 4, first: 7000}", "models.adapted.validate_on=[dark]"]
    other, _ = searched("trials=6", f"set={json.dumps(changes)}")
    assert {row["trial"] for row in other.trials}.isdisjoint({row["trial"] for row in more.trials})


def test_another_metric_is_asked_for_when_the_time_is_over(
    searched: Callable[..., tuple[Found, dict[str, Any]]], tmp_path: Path
) -> None:
    first, _ = searched("hours=1")
    place = tmp_path / "search/trials.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"seconds": 3601.0}))
    again, asked = searched("hours=1", "metric=pa")
    assert len(asked["tuned"]) == 1 and again.metric == "pa"
    assert {row["trial"] for row in again.trials} == {row["trial"] for row in first.trials}
    assert again.best["end"] == "done" and again.best["pa"] == max(row["pa"] for row in again.trials)


def test_a_search_whose_values_run_out_says_so(
    searched: Callable[..., tuple[Found, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(SilentProgress, "say", lambda self, line: said.append(line))
    found, _ = searched("trials=9", f"space={{{COUNT}: {{choice: [60, 120]}}, {ALPHA}: {{choice: [0.1, 0.9]}}}}")
    line = "only 4 different values: ended after 4 of 9 trials"
    assert len(found.trials) == 4 and said[-1] == line
    assert found.page is not None and f"O{line[1:]}." in found.page.read_bytes().decode()


def test_a_search_lies_on_any_storage(
    searched: Callable[..., tuple[Found, dict[str, Any]]], request: pytest.FixtureRequest
) -> None:
    place = request.getfixturevalue("s3").place("search").uri
    found, _ = searched(place=place)
    assert found.folder.uri == place and len(found.trials) == 4
    assert load_recipe(found.best_recipe).models["adapted"].validate_on == ["night_val"]
    assert found.page is not None and found.page.exists()
    assert searched(place=place)[0] == found


@pytest.mark.parametrize(("asked_for", "made"), [("concurrent=1", 1), ("concurrent=9", 2), ("cpus=2", 1)])
def test_more_trials_at_a_time_than_fit_are_not_begun(
    searched: Callable[..., tuple[Found, dict[str, Any]]], asked_for: str, made: int
) -> None:
    _, asked = searched(asked_for)
    assert asked["tuned"][0]["concurrent"] == made


def test_a_search_without_any_end_says_why(tmp_path: Path) -> None:
    trials = trials_of(tmp_path)
    records = Records(trials.folder, trials.settings, trials.name)
    with pytest.raises(RuntimeError, match="no trial finished: the time was over"):
        module._found(trials, records)
    records.end(records.next(propose), end="stopped", miou=0.5, curve=[[1, 0.5]], epochs=1, trainings=1, reused=3)
    with pytest.raises(RuntimeError, match="no trial finished: none came to its last epoch"):
        module._found(trials, records)
    records.end(records.next(propose), end="failed", miou=None, error="no frame is left")
    with pytest.raises(RuntimeError, match=r"no trial finished: no frame is left\. Their run folders are in /"):
        module._found(trials, records)


# -- the whole of it --------------------------------------------------------------------------------------------------

TINY = [
    "datasets.day.count=8",
    "datasets.pool={layout: scenes, count: 16, first: 1000, labelled: false, mix: {day: 0.5, night: 0.5}}",
    "datasets.day_test.count=2",
    "datasets.night_test.count=2",
    "datasets.night_val={layout: scenes, count: 2, first: 6000, mix: {night: 1.0}}",
    "translators.unit.start=null",
    "translators.unit.width=4",
    "translators.unit.res_blocks=1",
    "translators.unit.discriminator_width=4",
    "translators.unit.weights={perceptual: 0}",
    "translators.unit.crop=[64, 64]",
    "translators.unit.iterations=2",
    "network={encoder: efficientnet_lite0, pyramid_channels: 8, head_channels: 8}",
    "training.epochs=2",
    "training.steps_per_epoch=1",
    "training.warmup_steps=0",
    "training.batch=2",
    "training.crop=[64, 128]",
    "models.day_and_night.training=null",
    "models.adapted.training=null",
    "models.adapted.validate_on=[night_val]",
    "models.adapted.loss={kind: combined}",
]


def run_search(folder: Path, *overrides: str) -> dict[str, Any]:
    """`nightseg search configs/search.yaml --json` in a process of its own: one JSON object on standard output."""
    words = ["--run-dir", str(folder), "--json"]
    for override in (f"set={json.dumps(TINY)}", f"space.{COUNT}={{choice: [3, 4]}}", *overrides):
        words += ["--set", override]
    command = [sys.executable, "-m", "nightseg.cli.main", "search", str(CONFIGS / "search.yaml"), *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr and "Configuration for experiment" not in ended.stderr
    answer = json.loads(ended.stdout)
    assert isinstance(answer, dict)
    return answer


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_search_shares_its_base_compares_its_trials_and_continues(tmp_path: Path) -> None:
    folder = tmp_path / "search"
    answer = run_search(folder, "trials=2")

    ends = {trial["trial"]: trial["end"] for trial in answer["trials"]}
    assert len(ends) == 2 and set(ends.values()) <= {"done", "stopped"} and "done" in ends.values()
    assert all(0 <= trial["miou"] <= 1 and set(trial["values"]) >= {ALPHA, COUNT} for trial in answer["trials"])
    assert answer["best"]["end"] == "done"

    shared = {f"{commit.stage}/{commit.name}" for commit in Workspace(folder / "shared").commits()}
    assert {"train_segmenter/day_and_night", "train_translator/unit", "score/pool_night.efficientnet_lite0"} <= shared
    for trial, end in ends.items():
        own = {f"{commit.stage}/{commit.name}" for commit in Workspace(folder / "trials" / trial).commits()}
        assert not own & shared
        assert ("train_segmenter/adapted" in own) == (end == "done")
        assert (folder / "trials" / trial / "results.json").exists() == (end == "done")

    assert answer["trainings"] == 2 and answer["reused"] > 2 * 8
    boards = [path.parent.name for path in (folder / "tensorboard").rglob("events.out.tfevents.*")]
    assert {name[4:] for name in boards} == {trial["label"] for trial in answer["trials"]}
    assert "<svg" in (folder / "search.html").read_text() and not (folder / "tune").exists()

    best = load_recipe(folder / "best.yaml")
    loss = best.models["adapted"].loss
    assert loss is not None and loss.alpha == answer["best"]["values"][ALPHA]
    assert best.test_sets == {"night": "night_test", "day": "day_test"}

    plan = json_of("run", folder / "best.yaml", "--run-dir", folder / "best", "--dry-run")
    assert {"train_segmenter/adapted", "evaluate/adapted"} <= {stage["node"] for stage in plan["stages"]}

    made = {path: path.stat().st_mtime_ns for path in folder.rglob("_COMMITTED.json")}
    assert run_search(folder, "trials=2") == answer
    more = run_search(folder, "trials=3")  # the first two count and are not done again
    assert {trial["trial"] for trial in more["trials"]} > set(ends)
    assert {path: path.stat().st_mtime_ns for path in made} == made

    moved = folder.rename(tmp_path / "moved")
    trial = moved / "trials" / more["best"]["trial"]
    assert json_of("verify", moved)["damaged"] == json_of("verify", trial)["damaged"] == []
    frames = json_of("explain", trial)["frames"]
    assert {frame.partition("/")[0] for frame in frames} >= {"day", "pool"}
    assert json_of("explain", trial, frames[0])["frame_id"] == frames[0]
