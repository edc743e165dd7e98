"""What a person finds in a run folder: it is whole after a move, where there are no links, and on a store."""

from __future__ import annotations

import csv
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from nightseg.data.class_list import taxonomy
from nightseg.data.images import encode_png
from nightseg.data.table import frame_table, quarantine_table
from nightseg.pipeline.folder import lay_out, show_curves
from nightseg.pipeline.graph import Graph, ModelNodes, NodeId, View
from nightseg.pipeline.results import gather, model_folder
from nightseg.recipe import load_recipe, types
from nightseg.report.run import Run
from nightseg.storage import Commit, Location, Workspace

DAY, SELECT, LABEL = NodeId("collect", "day"), NodeId("select", "m"), NodeId("pseudo_label", "m")
TRAIN, TEST = NodeId("train_segmenter", "m"), NodeId("evaluate", "m")
CLASSES = taxonomy("camvid11").classes
FACTS: dict[str, Any] = {
    "start": "imagenet", "parents": [], "train": ["day"], "training": {"batch": 8}, "self_training": None,
    "loss": {"kind": "cross_entropy"}, "network": {"encoder": "resnet18"}, "validate_on": ["day"],
}  # fmt: skip
HISTORY = [
    {"epoch": 1, "steps": 4, "loss": 0.5, "gradient_norm": 1.0, "learning_rate": 0.1, "validation": {"miou": 0.25}}
]


def commit(run: Location, node: NodeId, files: dict[str, bytes], bad: int = 0, **more: Any) -> Commit:
    attempt = Workspace(run).stage(node.stage, node.name, version=1, recipe={}, inputs={}, seed=0).open()
    for name, data in files.items():
        (attempt.folder / name).write_bytes(data)
    for name, table in more.pop("tables", {}).items():
        (attempt.folder / name).write_table(table)
        files = files | {name: b""}
    return attempt.finish(rows_in=2 + bad, rows_out=2, quarantined=bad, outputs=list(files), seconds=1.0, **more)


def run_in(folder: Location, recipe_folder: Path) -> Run:
    """A finished run: two frames that are tested on, and chosen; a third is damaged."""
    images = {f"images/{n}.png": encode_png(np.full((8, 16, 3), n, np.uint8)) for n in (0, 1)}
    rows = [{"frame_id": f"day/{n}", "uri": f"images/{n}.png", "domain": "day", "label_pixels": [3] + 10 * [0]}
            for n in (0, 1)]  # fmt: skip
    bad = [{"frame_id": "day/2", "uri": "/x.png", "reason": "truncated", "detail": "cut, at the end"}]
    tables = {"frames.parquet": frame_table(rows), "quarantine.parquet": quarantine_table(bad)}
    day = commit(folder, DAY, images, bad=1, tables=tables)
    chosen = [{**row, "uri": f"{day.folder.uri}/{row['uri']}"} for row in rows]
    ranked = frame_table(chosen).append_column("rank", pa.array([1, 2])).append_column("score", pa.array([0.5, 0.25]))
    scores = {"miou": 0.25, "pa": 0.5, "ca": 0.5, "fwiou": 0.5, "iou": dict.fromkeys(CLASSES), "frames": 2}
    as_json = Location.of(recipe_folder / "x.json")

    def json_of(content: Any) -> bytes:
        as_json.write_json(content)
        return as_json.read_bytes()

    # Of the first frame 3 of 4 pixels are right, and a quarter is another class; the second has no labelled pixel.
    one = np.zeros((11, 11), np.int64)
    one[0, 0], one[3, 3], one[3, 8] = 2, 1, 1
    seen = [
        {"frame_id": f"day/{number}", "uri": "x", "test_sets": ["night"], "confusion": matrix.ravel().tolist()}
        for number, matrix in enumerate((one, 0 * one))
    ]
    predicted = frame_table(seen, extra={"test_sets": pa.list_(pa.string()), "confusion": pa.list_(pa.int64())})
    commits = {
        DAY: day,
        SELECT: commit(
            folder,
            SELECT,
            {"evidence.json": json_of({"cut": None, "method": "pooled"})},
            tables={"frames.parquet": ranked},
        ),
        TRAIN: commit(
            folder,
            TRAIN,
            {"model/model.json": b'{"key": "k"}', "model/model.safetensors": b"w", "history.json": json_of(HISTORY)},
            summary={"steps": 4, "kept": {"epoch": 1, "miou": 0.25}},
        ),
        TEST: commit(
            folder,
            TEST,
            {"masks/day/0.png": b"mask", "scores.json": json_of({"night": scores})},
            tables={"predictions.parquet": predicted},
        ),
    }
    graph = Graph(datasets={"day": (View(DAY),)})
    graph.models["m"] = ModelNodes(TRAIN, SELECT, None, FACTS, "m", 0, TEST, {"night": types.TestRow()})
    text = "name: made\ntaxonomy: camvid11\ndatasets: {day: {layout: scenes, count: 4}}\n"
    (recipe_folder / "recipe.yaml").write_text(text)
    results = gather(load_recipe(recipe_folder / "recipe.yaml"), graph, commits, set())
    (folder / "results.json").write_json(results)
    return Run(folder, results)


def listed(place: Location) -> list[dict[str, str]]:
    return list(csv.DictReader(place.read_bytes().decode().splitlines()))


def test_a_run_folder_says_what_is_in_it_wherever_it_is(tmp_path: Path) -> None:
    run = run_in(Location.of(tmp_path / "run"), tmp_path)
    lay_out(run, run.folder)
    lay_out(run, run.folder)  # again, over what is there
    moved = Location.of(tmp_path / "moved")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert (moved / "masks/m/day/0.png").read_bytes() == b"mask"
    assert not os.readlink(f"{moved.uri}/masks/m").startswith("/")
    assert model_folder(moved / "models/m") == moved / "models/m"
    assert (moved / "models/m/model.safetensors").read_bytes() == b"w"
    assert (moved / "selected/m/names.txt").read_bytes() == b"day/0\nday/1\n"
    rows = listed(moved / "selected/m/frames.csv")
    assert [row["rank"] for row in rows] == ["1", "2"] and "score" not in rows[0]  # the choice is no ranking by it
    assert (moved / rows[1]["file"]).exists()
    assert (moved / "selected/m/sheet.jpg").read_bytes()[:2] == b"\xff\xd8"
    assert listed(moved / "quarantine.csv") == [
        {"stage": "collect", "name": "day", "frame_id": "day/2", "uri": "/x.png", "reason": "truncated",
         "detail": "cut, at the end"}
    ]  # fmt: skip
    (scored,) = listed(moved / "frame_scores.csv")
    assert {key: scored[key] for key in ("model", "test", "frame")} == {"model": "m", "test": "night", "frame": "day/0"}
    # IoU of sky 2 / 2, of road 1 / 2, of car 0 / 1: their mean is a half.
    assert (float(scored["pa"]), float(scored["miou"])) == (0.75, 0.5)
    (epoch,) = listed(moved / "training.csv")
    assert (epoch["model"], epoch["step"], epoch["validation_miou"], epoch["validation_pa"]) == ("m", "4", "0.25", "")
    shutil.copytree(tmp_path / "moved/models/m", tmp_path / "given away")  # no link that leads nowhere
    assert (tmp_path / "given away/model.safetensors").read_bytes() == b"w"


def test_a_card_is_read_by_hubs_and_changes_nothing_that_is_hashed(tmp_path: Path) -> None:
    run = run_in(Location.of(tmp_path / "run"), tmp_path)
    lay_out(run, run.folder)
    text = (run.folder / "models/m/README.md").read_bytes().decode()
    _, front, body = text.split("---\n", 2)
    read = yaml.safe_load(front)
    assert read["datasets"] == ["day"] and read["pipeline_tag"] == "image-segmentation"
    (result,) = read["model-index"][0]["results"]
    assert {one["type"]: one["value"] for one in result["metrics"]}["mean_iou"] == 25.0
    assert "chosen by mIoU 25.0 % on the validation set day" in body and "100.0" in body
    commit = run.commit("train_segmenter/m")
    assert commit is not None and commit.verify() == []


@pytest.mark.parametrize("fault", [errno.EPERM, errno.ENOTSUP, errno.EXDEV])
def test_without_links_files_are_copied_and_folders_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(fault, "no links here")

    run = run_in(Location.of(tmp_path / "run"), tmp_path)
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "symlink", refuse)
    lay_out(run, run.folder)
    assert (run.folder / "models/m/model.safetensors").read_bytes() == b"w"
    place = (run.folder / "masks/m.txt").read_bytes().decode().strip()
    assert (run.folder / place / "day/0.png").read_bytes() == b"mask"


def test_on_a_store_models_are_copied_and_masks_named(tmp_path: Path) -> None:
    run = run_in(Location.of(f"memory://folder/{tmp_path.name}"), tmp_path)
    lay_out(run, run.folder)
    lay_out(run, run.folder)
    assert (run.folder / "models/m/model.safetensors").read_bytes() == b"w"
    place = (run.folder / "masks/m.txt").read_bytes().decode().strip()
    assert (run.folder / place / "day/0.png").read_bytes() == b"mask"


def test_curves_have_the_name_of_their_model_while_it_trains(tmp_path: Path) -> None:
    attempt = Location.of(tmp_path / "run/stages/train_segmenter/m/0123/attempt-1")
    for node in (TRAIN, NodeId("train_translator", "unit")):
        show_curves(Location.of(tmp_path / "run"), node, attempt)
    (attempt / "tensorboard/events").write_bytes(b"x")
    assert (tmp_path / "run/tensorboard/m/events").exists()
    assert (tmp_path / "run/tensorboard/translator unit/events").exists()


def test_models_of_several_seeds_have_a_card_each(tmp_path: Path) -> None:
    run = run_in(Location.of(tmp_path / "run"), tmp_path)
    one = run.results["models"]["m"]["trainings"]["m"]
    trainings = {"m": one, "m.seed1": one | {"seed": 1}}
    models = {"m": run.results["models"]["m"] | {"trainings": trainings}}
    lay_out(Run(run.folder, run.results | {"models": models}), run.folder)
    for name, seed in (("m", 0), ("m.seed1", 1)):
        assert f"seed {seed})" in (run.folder / f"models/{name}/README.md").read_bytes().decode()
