"""What a training set is put together from: every file once, parts with weights, frames rendered anew."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nightseg.data.class_list import taxonomy
from nightseg.data.images import encode_png, read_image
from nightseg.data.table import frame_table
from nightseg.pipeline.build import build_graph
from nightseg.recipe import load_recipe
from nightseg.report import gallery
from nightseg.segmenter.data import Sampler
from nightseg.segmenter.settings import Network
from nightseg.stages import train_segmenter as stage
from nightseg.stages.train_segmenter import put_together
from nightseg.storage import Location, UserError, Workspace, hash_of
from nightseg.translators.photometric import LitIds, night_of
from nightseg.translators.settings import PhotometricTranslator

CLASSES = taxonomy("camvid11")
OPTICS = PhotometricTranslator(kind="photometric")


def rows(*names: str) -> Any:
    return frame_table(
        {"frame_id": f"toy/{name}", "uri": f"/{name}.png", "label_uri": f"/{name}-label.png"} for name in names
    )


def test_a_file_that_two_parts_share_is_read_once_and_drawn_for_both() -> None:
    table, parts = put_together({"day": rows("a", "b"), "night": rows("b", "a", "c")}, None, {"night": OPTICS}, CLASSES)
    assert table["uri"].to_pylist() == ["/a.png", "/b.png", "/c.png"]
    assert [part.rows for part in parts] == [(0, 1), (1, 0, 2)]
    assert [part.weight for part in parts] == [None, None] and parts[0].render is None
    assert sorted(sample.row for sample in Sampler(parts).epoch(5, 0, 0)) == [0, 0, 1, 1, 2]


def test_a_fresh_part_is_rendered_by_its_optics() -> None:
    _, parts = put_together(
        {"day": rows("a"), "night": rows("a")}, {"day": 1.0, "night": 3.0}, {"night": OPTICS}, CLASSES
    )
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    label = rng.integers(0, 11, (24, 32), dtype=np.uint8)
    render = parts[1].render
    assert render is not None and [part.weight for part in parts] == [1.0, 3.0]
    lit = LitIds.of(OPTICS.classes, CLASSES.classes)
    expected = night_of(image, label, optics=OPTICS, lit=lit, seed=7, frame_id="")
    assert np.array_equal(render(image, label, 7), expected)
    assert not np.array_equal(render(image, label, 8), expected)
    assert render(image, label, 7).mean() < image.mean()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("n: {translate: day, by: colours, fresh: true}", "translates beforehand"),
        ("n: {translate: dark, by: optics, fresh: true}", "starts from frames"),
        ("n: {translate: day, by: optics, fresh: true}\n  s: {split: n, keep: day}", "no frames to split"),
        ("n: {translate: day, by: optics, fresh: true}\n  both: {join: [day, n]}", "name it in `train`"),
    ],
)
def test_what_cannot_be_translated_anew_is_refused(tmp_path: Any, change: str, message: str) -> None:
    recipe = f"""
name: x
taxonomy: camvid11
datasets:
  day: {{layout: scenes, count: 2}}
  dark: {{translate: day, by: optics}}
  {change}
translators:
  optics: {{kind: photometric}}
  colours: {{kind: colour, night: day}}
models: {{m: {{train: {{day: 1.0, n: 2.0}}}}}}
"""
    (tmp_path / "r.yaml").write_text(recipe)
    with pytest.raises(UserError, match=message):
        load_recipe(tmp_path / "r.yaml")


def test_a_part_with_a_weight_and_no_frame_is_refused_and_one_without_weight_is_nothing() -> None:
    tables = {"day": rows("a"), "night": rows()}
    with pytest.raises(UserError, match="night has no frame, and a weight of 2"):
        put_together(tables, {"day": 1.0, "night": 2.0}, {}, CLASSES)
    assert [part.rows for part in put_together(tables, None, {}, CLASSES)[1]] == [(0,), ()]


def test_a_dataset_that_is_named_twice_is_refused(tmp_path: Any) -> None:
    text = (
        "name: x\ndatasets: {day: {layout: scenes, count: 2}}\ntaxonomy: camvid11\nmodels: {m: {train: [day, day]}}\n"
    )
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match="day is named 2 times"):
        load_recipe(tmp_path / "r.yaml")


def test_the_order_of_parts_is_part_of_the_key(tmp_path: Any) -> None:
    text = """
name: x
taxonomy: camvid11
datasets: {day: {layout: scenes, count: 2}, more: {layout: scenes, count: 2, first: 5}}
models: {m: {train: TRAIN}}
"""
    keys = []
    for train in ("[day, more]", "[more, day]", "{day: 1, more: 2}", "{more: 2, day: 1}"):
        (tmp_path / "r.yaml").write_text(text.replace("TRAIN", train))
        graph = build_graph(load_recipe(tmp_path / "r.yaml"))
        keys.append(hash_of(graph.nodes[graph.models["m"].train].recipe))
    assert len(set(keys)) == 4  # frames are drawn in another order


def test_a_training_leaves_some_of_the_nights_that_it_saw_and_the_report_shows_them(tmp_path: Any) -> None:
    rng, found = np.random.default_rng(0), []
    for name in "abcd":
        for ending, pixels in (("", rng.integers(0, 256, (24, 32, 3))), ("-label", rng.integers(0, 11, (24, 32)))):
            (tmp_path / f"{name}{ending}.png").write_bytes(encode_png(pixels.astype(np.uint8)))
        uris = {"uri": f"{tmp_path}/{name}.png", "label_uri": f"{tmp_path}/{name}-label.png"}
        found.append({"frame_id": f"toy/{name}", **uris, "label_encoding": "camvid12"})
    table, parts = put_together(
        {"day": frame_table(found), "night": frame_table(found)}, None, {"night": OPTICS}, CLASSES
    )
    plan = SimpleNamespace(train=table, parts=parts, classes=CLASSES, network=Network(input_size=(12, 16)))
    attempt = Workspace(tmp_path / "run").stage("train_segmenter", "m", version=1, recipe={}, inputs={}, seed=0).open()
    assert stage._rendered(plan, ["day", "night"], attempt) == ["rendered", "rendered.parquet"]
    rows = (attempt.folder / "rendered.parquet").read_table().to_pylist()
    assert [row["frame_id"] for row in rows] == [f"toy/{name}" for name in "abd" for _ in range(3)]
    assert {row["part"] for row in rows} == {"night"}
    pictures = [read_image(attempt.folder / row["rendering_uri"]) for row in rows]
    assert all(picture.shape == (12, 16, 3) and picture.mean() < 100 for picture in pictures)
    assert not np.array_equal(pictures[0], pictures[1])  # another night of the same frame

    whole = [row | {"rendering_uri": (attempt.folder / row["rendering_uri"]).uri} for row in rows]
    run = SimpleNamespace(nodes=lambda kind: ["train_segmenter/m", "train_segmenter/n"], rows=lambda node, table: whole)
    (shown,) = gallery._rendered_anew(run)  # type: ignore[arg-type]
    assert shown["name"] == "night, anew with every sample"
    assert [[picture.caption for picture in pair] for pair in shown["pairs"]] == [["source", *["night"] * 3]] * 3


def test_a_frame_to_render_that_is_gone_ends_the_training_before_its_first_step(tmp_path: Any) -> None:
    table, parts = put_together({"night": rows("gone")}, None, {"night": OPTICS}, CLASSES)
    plan = SimpleNamespace(train=table, parts=parts, classes=CLASSES, network=Network())
    with pytest.raises(UserError, match=r"toy/gone: missing"):
        stage._rendered(plan, ["night"], SimpleNamespace(folder=Location.of(tmp_path)))  # type: ignore[arg-type]


def test_without_such_parts_nothing_is_left(tmp_path: Any) -> None:
    table, parts = put_together({"day": rows("a")}, None, {}, CLASSES)
    plan = SimpleNamespace(train=table, parts=parts, classes=CLASSES, network=Network())
    assert stage._rendered(plan, ["day"], SimpleNamespace(folder=Location.of(tmp_path) / "none")) == []  # type: ignore[arg-type]
