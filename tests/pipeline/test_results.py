"""results.json gathers what stages committed; models are found through it, also after the run folder was moved."""

from __future__ import annotations

from pathlib import Path

import pytest

from nightseg.data.table import frame_table, quarantine_table
from nightseg.pipeline.graph import Graph, ModelNodes, NodeId, View
from nightseg.pipeline.results import MAX_QUARANTINE_ROWS, compared, gather, model_folder, read_results
from nightseg.recipe import load_recipe, types
from nightseg.recipe.types import Prediction
from nightseg.storage import Commit, Location, UserError, Workspace

DAY, SPLIT, SELECT = NodeId("collect", "day"), NodeId("split", "pool"), NodeId("select", "m")
LABEL, TRAIN, TEST = NodeId("pseudo_label", "m"), NodeId("train_segmenter", "m"), NodeId("evaluate", "m")
DUSK = NodeId("predict", "dusk")
FACTS = {
    "start": "imagenet",
    "parents": [],
    "train": [],
    "training": {"batch": 8},
    "self_training": None,
    "adapt_norms": None,
}
SCORES = {"miou": 0.25, "pa": 0.5, "iou": {"sky": 0.5, "car": None}, "confusion": [[3, 1], [0, 4]], "frames": 4}


LABELS = {"encoding": "camvid12", "why": "by their ids", "valid": 0.9, "absent": ["tree"]}


def commit(run: Location, node: NodeId, *, bad: int = 0, **files: object) -> Commit:
    """One stage that committed these JSON files, a model if it is a training, and a quarantine table of `bad` rows."""
    attempt = Workspace(run).stage(node.stage, node.name, version=1, recipe={}, inputs={}, seed=0).open()
    outputs = [f"{name}.json" for name in files]
    for name, content in files.items():
        (attempt.folder / f"{name}.json").write_json(content)
    if node.stage == "train_segmenter":
        (attempt.folder / "model/model.json").write_json({})
        outputs.append("model/model.json")
    if bad:
        rows = (
            {"frame_id": f"{number:05d}", "uri": "/x", "reason": "truncated", "detail": ""} for number in range(bad)
        )
        (attempt.folder / "quarantine.parquet").write_table(quarantine_table(rows))
        outputs.append("quarantine.parquet")
    if node == DAY:
        (attempt.folder / "frames.parquet").write_table(
            frame_table({"frame_id": d, "uri": d, "domain": d} for d in ["day"])
        )
        outputs.append("frames.parquet")
    summary = {"labels": LABELS} if node == DAY else {"steps": 40} if node.stage == "train_segmenter" else None
    return attempt.finish(rows_in=4 + bad, rows_out=4, quarantined=bad, outputs=outputs, seconds=1.5, summary=summary)


@pytest.fixture
def run(tmp_path: Path) -> Location:
    """A finished run folder with its results.json."""
    folder = Location.of(tmp_path / "run")
    commits = {
        DAY: commit(folder, DAY, bad=MAX_QUARANTINE_ROWS + 5),
        SPLIT: commit(folder, SPLIT, evidence={"margin": 0.2}),
        SELECT: commit(folder, SELECT, evidence={"method": "pooled"}),
        LABEL: commit(folder, LABEL, evidence={"kept_share": 0.5}),
        TRAIN: commit(folder, TRAIN),
        TEST: commit(folder, TEST, scores={"night": SCORES}),
        DUSK: commit(folder, DUSK),
    }
    graph = Graph()
    tests = {"night": types.TestRow(row="2.1", published_miou=31.5)}
    graph.models["m"] = ModelNodes(TRAIN, SELECT, LABEL, FACTS, "m", 0, TEST, tests)
    graph.datasets["night"] = (View(SPLIT, "night"),)
    graph.predictions["dusk"] = (DUSK, Prediction(dataset="night", model="m"))
    text = "name: made\ntaxonomy: camvid11\nseed: 3\ndatasets: {day: {layout: scenes, count: 4}}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    results = gather(load_recipe(tmp_path / "recipe.yaml"), graph, commits, {TRAIN, TEST})
    (folder / "results.json").write_json(results)
    return folder


def test_results_hold_the_scores_and_where_every_number_comes_from(run: Location) -> None:
    results = read_results(run)
    model = results["models"]["m"]
    assert model["start"] == "imagenet" and model["model"] == "train_segmenter/m"
    scores = SCORES | {"row": "2.1", "published_miou": 31.5, "node": "evaluate/m"}
    mean = {"miou": 0.25, "pa": 0.5, "iou": {"sky": 0.5, "car": None}}
    std = {"miou": None, "pa": None, "iou": {"sky": None, "car": None}}
    assert model["tests"]["night"] == scores | {"seeds": {"0": 0.25}, "mean": mean, "std": std}
    assert model["trainings"].keys() == {"m"}
    assert results["selections"] == {"m": {"node": "select/m", "evidence": {"method": "pooled"}}}
    assert results["pseudo_labels"] == {"m": {"node": "pseudo_label/m", "evidence": {"kept_share": 0.5}}}
    assert results["labels"] == {"day": LABELS}
    assert results["splits"] == {"pool": {"margin": 0.2}}
    assert results["datasets"] == {"night": ["split/pool:night"]}
    assert results["predictions"] == {"dusk": {"node": "predict/dusk", "dataset": "night", "model": "m"}}
    assert (results["recipe"], results["seed"], len(results["taxonomy"]["classes"])) == ("made", 3, 11)
    assert results["taxonomy"]["encodings"]["camvid12"]["11"] == 255
    assert {"python", "torch", "ray", "nightseg"} <= results["versions"].keys()
    assert results["hardware"]["cpus"] >= 1 and {"machine", "system"} <= results["hardware"].keys()
    assert results.keys() == {
        *("nightseg", "recipe", "seed", "taxonomy", "versions", "hardware", "models", "datasets", "splits"),
        *("labels", "selections", "pseudo_labels", "predictions", "translations", "leaks", "quarantine"),
        *("consistency", "frames", "commits", "seconds"),
    }
    assert results["taxonomy"].keys() == {"name", "classes", "palette", "encodings"}
    assert (results["taxonomy"]["name"], len(results["taxonomy"]["palette"])) == ("camvid11", 11)


def test_claims_are_held_against_the_first_test_set_unless_they_say_another(run: Location, tmp_path: Path) -> None:
    text = (tmp_path / "recipe.yaml").read_text()
    text += """models: {m: {train: [day]}, n: {train: [day], start: m}}
test_sets: {night: day, day: day}
claims: {one: {says: n is better, pairs: [[n, m]]}, two: {says: m is better, pairs: [[m, n]], test: day}}
"""
    (tmp_path / "recipe.yaml").write_text(text)
    found = compared(load_recipe(tmp_path / "recipe.yaml"), read_results(run), run)
    assert {name: (claim["says"], claim["test"]) for name, claim in found["claims"].items()} == {
        "one": ("n is better", "night"),
        "two": ("m is better", "day"),
    }
    assert found["differences"] == []  # of one model
    assert found["models"] == read_results(run)["models"]
    (tmp_path / "recipe.yaml").write_text(text.replace("[[n, m]]", "[[n, k]]").replace("test: day}", "test: dya}"))
    with pytest.raises(UserError) as error:
        load_recipe(tmp_path / "recipe.yaml")
    assert "claims.one.pairs.0.1: there is no model 'k'; known: m, n" in str(error.value)
    assert "claims.two.test: there is no test set 'dya', did you mean 'day'?" in str(error.value)


def test_results_say_what_was_done_now_and_how_long_it_took(run: Location) -> None:
    results = read_results(run)
    assert {node for node, facts in results["commits"].items() if not facts["skipped"]} == {
        "train_segmenter/m", "evaluate/m"
    }  # fmt: skip
    assert set(results["seconds"].values()) == {1.5}
    facts = results["commits"]["collect/day"]
    assert (facts["rows_in"], facts["rows_out"], facts["quarantined"]) == (4 + MAX_QUARANTINE_ROWS + 5, 4, 1005)
    assert facts["folder"].startswith(f"{run.uri}/stages/collect/day/") and facts["skipped"] is True
    assert facts.keys() == {
        *("key", "content", "folder", "seconds", "rows_in", "rows_out", "quarantined", "created", "code", "summary"),
        *("skipped", "order"),
    }


def test_quarantined_frames_are_listed_but_not_without_end(run: Location) -> None:
    results = read_results(run)
    assert len(results["quarantine"]) == MAX_QUARANTINE_ROWS
    assert results["quarantine"][0] == {
        "stage": "collect", "name": "day", "frame_id": "00000", "uri": "/x", "reason": "truncated", "detail": ""
    }  # fmt: skip
    assert results["commits"]["collect/day"]["quarantined"] == MAX_QUARANTINE_ROWS + 5


def test_an_evaluated_translation_stands_beside_the_models_that_learned_from_it(tmp_path: Path) -> None:
    folder, evaluation = Location.of(tmp_path / "run"), NodeId("evaluate_translation", "made")
    text = """
name: made
taxonomy: camvid11
datasets: {day: {layout: scenes, count: 4}, made: {translate: day, by: optics}, all: {join: [day, made]}}
translators: {optics: {kind: photometric}}
"""
    (tmp_path / "recipe.yaml").write_text(text)
    commits = {
        DAY: commit(folder, DAY),
        TRAIN: commit(folder, TRAIN),
        TEST: commit(folder, TEST, scores={"night": SCORES}),
        evaluation: commit(folder, evaluation, scores={"fid": {"translated": 3.5}, "edges": 0.5}),
    }
    graph = Graph()
    for name, train in (("m", ["all"]), ("other", ["day"])):
        graph.models[name] = ModelNodes(
            TRAIN, None, None, FACTS | {"train": train}, name, 0, TEST, {"night": types.TestRow()}
        )
    graph.datasets = {"day": (View(DAY),)}
    graph.translations["made"] = (evaluation, {"kind": "photometric", "segmenter": "other"})
    found = gather(load_recipe(tmp_path / "recipe.yaml"), graph, commits, set())["translations"]
    assert found == {
        "made": {
            "node": "evaluate_translation/made",
            "kind": "photometric",
            "segmenter": "other",
            "fid": {"translated": 3.5},
            "edges": 0.5,
            "models": {"m": {"night": 0.25}},
        }
    }


def test_scores_of_the_other_seeds_stay_where_the_evaluation_of_the_first_failed(run: Location, tmp_path: Path) -> None:
    again, tested = NodeId("train_segmenter", "m.seed4"), NodeId("evaluate", "m.seed4")
    commits = {
        TRAIN: commit(run, TRAIN),
        again: commit(run, again),
        tested: commit(run, tested, scores={"night": SCORES}),
    }
    graph = Graph()
    graph.models["m"] = ModelNodes(TRAIN, None, None, FACTS, "m", 0)
    graph.models["m.seed4"] = ModelNodes(again, None, None, FACTS, "m", 4, tested, {"night": types.TestRow()})
    (model,) = gather(load_recipe(tmp_path / "recipe.yaml"), graph, commits, set())["models"].values()
    assert model["tests"]["night"]["miou"] == SCORES["miou"]
    assert model["tests"]["night"]["seeds"] == {"4": SCORES["miou"]}


def test_seeds_stand_beside_each_other_with_mean_and_spread(run: Location, tmp_path: Path) -> None:
    again, tested = NodeId("train_segmenter", "m.seed4"), NodeId("evaluate", "m.seed4")
    scores = SCORES | {"miou": 0.75, "pa": 0.5, "iou": {"sky": 0.25, "car": None}}
    commits = {
        TRAIN: commit(run, TRAIN), TEST: commit(run, TEST, scores={"night": SCORES}),
        again: commit(run, again), tested: commit(run, tested, scores={"night": scores}),
    }  # fmt: skip
    graph, tests = Graph(), {"night": types.TestRow()}
    graph.models["m"] = ModelNodes(TRAIN, None, None, FACTS, "m", 0, TEST, tests)
    graph.models["m.seed4"] = ModelNodes(again, None, None, FACTS, "m", 4, tested, tests)
    results = gather(load_recipe(tmp_path / "recipe.yaml"), graph, commits, set())
    assert results["models"].keys() == {"m"}
    model = results["models"]["m"]
    night = model["tests"]["night"]
    assert (night["miou"], night["seeds"]) == (0.25, {"0": 0.25, "4": 0.75})  # the model's own are those of the first
    assert night["mean"] == {"miou": 0.5, "pa": 0.5, "iou": {"sky": 0.375, "car": None}}
    # Two values: their deviation is their distance over the root of 2.
    assert night["std"]["miou"] == pytest.approx(0.5 / 2**0.5, rel=1e-12) and night["std"]["iou"]["car"] is None
    assert model["trainings"]["m.seed4"]["tests"]["night"]["miou"] == 0.75
    (run / "results.json").write_json(results)
    assert "m.seed4" in model_folder(f"{run.uri}:m.seed4").uri and "m.seed4" not in model_folder(f"{run.uri}:m").uri


def test_results_tell_the_steps_of_the_whole_line_and_in_what_light_it_learned(tmp_path: Path) -> None:
    run = Location.of(tmp_path / "run")
    text = """
name: made
taxonomy: camvid11
datasets:
  day: {layout: scenes, count: 4}
  dark: {split: day, keep: night}
  fresh: {translate: day, by: optics, fresh: true}
  made: {translate: day, by: optics}
  all: {join: [day, made]}
translators: {optics: {kind: photometric}}
"""
    (tmp_path / "recipe.yaml").write_text(text)
    graph, commits = Graph(), {DAY: commit(run, DAY)}
    graph.datasets = {"day": (View(DAY),)}
    for name, parent, train, batch, pool in (
        ("first", None, ["day"], 8, None),
        ("longer", "first", ["day"], 16, None),
        ("both", "first", ["all"], 8, None),
        ("fresh", "first", ["day", "fresh"], 8, None),
        ("dark", "longer", ["dark"], 8, None),
        ("taught", "longer", ["day"], 8, {"pool": "night"}),
    ):
        node = NodeId("train_segmenter", name)
        commits[node] = commit(run, node)
        facts = {"parents": [parent] if parent else [], "start": parent or "imagenet", "train": train}
        facts |= {"training": {"batch": batch}, "self_training": pool}
        graph.models[name] = ModelNodes(node, None, None, facts, name)
    models = gather(load_recipe(tmp_path / "recipe.yaml"), graph, commits, set())["models"]
    keys = ("steps", "steps_in_all", "frames_in_all")
    assert [models["first"][key] for key in keys] == [40, 40, 320]
    assert [models["longer"][key] for key in keys] == [40, 80, 320 + 640]
    assert [models["taught"][key] for key in keys] == [40, 120, 320 + 640 + 320]
    assert models["taught"]["line"] == ["first", "longer", "taught"]
    assert models["longer"]["learned"] == {
        "domains": ["day"],
        "translated": False,
        "night_labels": False,
        "pool": False,
        "day_only": True,
    }
    assert models["both"]["learned"] == {
        "domains": ["day", "night"], "translated": True, "night_labels": False, "pool": False, "day_only": False
    }  # fmt: skip
    assert models["fresh"]["learned"] == models["both"]["learned"]  # no stage translates these frames
    assert models["dark"]["learned"]["domains"] == ["day", "night"] and models["dark"]["learned"]["night_labels"]
    assert [name for name, facts in models.items() if facts["learned"]["day_only"]] == ["first", "longer"]


def test_scores_without_labels_are_ranked_against_miou(tmp_path: Path) -> None:
    run = Location.of(tmp_path / "run")
    text = "name: made\ntaxonomy: camvid11\ndatasets: {day: {layout: scenes, count: 4}}\nconsistency: {dataset: day}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    graph, commits, tests = Graph(), {}, {"night": types.TestRow()}
    for model, miou, sure, same in (("a", 0.2, 0.9, 0.1), ("b", 0.3, 0.8, 0.5), ("a.seed1", 0.4, 0.7, 0.3)):
        nodes = [NodeId(stage, model) for stage in ("train_segmenter", "evaluate", "consistency")]
        commits[nodes[0]] = commit(run, nodes[0])
        commits[nodes[1]] = commit(run, nodes[1], scores={"night": SCORES | {"miou": miou}})
        commits[nodes[2]] = commit(run, nodes[2], scores={"confidence": sure, "mirrored": same})
        of, _, seed = model.partition(".seed")
        graph.models[model] = ModelNodes(nodes[0], None, None, FACTS, of, int(seed or 0), nodes[1], tests, nodes[2])
    results = gather(load_recipe(tmp_path / "recipe.yaml"), graph, commits, set())
    assert results["models"]["a"]["consistency"] == {"confidence": pytest.approx(0.8), "mirrored": pytest.approx(0.2)}
    assert results["models"]["a"]["trainings"]["a.seed1"]["consistency"] == {"confidence": 0.7, "mirrored": 0.3}
    assert results["consistency"]["dataset"] == "day"
    assert results["consistency"]["ranks"]["night"]["models"] == 2
    del graph.models["a.seed1"]
    results = gather(load_recipe(tmp_path / "recipe.yaml"), graph, commits, set())
    ranks = results["consistency"]["ranks"]["night"]["spearman"]
    assert ranks == {"confidence": pytest.approx(-1), "mirrored": pytest.approx(1)}


# -- finding a model --------------------------------------------------------------------------------------------------


def test_a_model_is_found_by_its_folder_or_by_its_name_in_a_run(run: Location) -> None:
    found = model_folder(f"{run.uri}:m")
    assert (found / "model.json").exists()
    assert model_folder(found) == found


def test_a_model_is_found_after_the_run_folder_was_moved(run: Location, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    run.local.rename(tmp_path / "elsewhere" / "moved: again")
    found = model_folder(f"{tmp_path}/elsewhere/moved: again:m")
    assert found.uri.startswith(f"{tmp_path}/elsewhere/") and (found / "model.json").exists()


def test_a_model_that_was_borrowed_is_found_where_it_lies(run: Location, tmp_path: Path) -> None:
    trial = Location.of(tmp_path / "trial")
    (trial / "results.json").write_json((run / "results.json").read_json())
    assert model_folder(f"{trial.uri}:m").uri.startswith(run.uri)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("{run}", "say which model; known: m. Cure: give RUN_DIR:MODEL"),
        ("{run}:n", "the run has no model 'n'; known: m. Cure: give RUN_DIR:MODEL"),
        ("{run}:mm", "no model 'mm', did you mean 'm'"),
        ("{run}:", "say which model"),
        ("{run}/nowhere", "neither a model folder .* nor a finished run .*runs/demo:adapted"),
        ("{run}/nowhere:m", "neither a model folder"),
        (":m", "neither a model folder"),
    ],
)
def test_what_is_no_model_is_named_with_the_cure(run: Location, place: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model_folder(place.format(run=run.uri))


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"models": {}}', b'{"models": 3, "commits": {}}'])
def test_damaged_results_are_named(run: Location, content: bytes) -> None:
    (run / "results.json").write_bytes(content)
    with pytest.raises(UserError, match="not the results of a run, or damaged"):
        model_folder(f"{run.uri}:m")


def test_missing_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no results.json there. Cure: finish the run first"):
        read_results(Location.of(tmp_path))
