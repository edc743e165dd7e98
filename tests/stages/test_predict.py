"""Predictions as files: of a stage, and of a folder of images with everything that can be wrong with one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nightseg.config import MapCompute
from nightseg.frames.images import decode_image, decode_label, encode_jpeg, encode_png
from nightseg.frames.table import frame_table
from nightseg.frames.taxonomy import taxonomy
from nightseg.progress import SilentProgress
from nightseg.stages.predict import check_pictures, predict, predict_folder
from nightseg.storage import Location, UserError, sha256_of
from nightseg.workspace import Commit

CLASSES = taxonomy("camvid11")


def image(value: int, height: int = 4, width: int = 6) -> np.ndarray:
    """`reads_the_pixels` calls it class `value`, with confidence 0.5."""
    return np.dstack([np.full((height, width), v) for v in (value, 128, 0)]).astype(np.uint8)


@pytest.fixture
def model(model_commit: Callable[..., Commit]) -> Commit:
    return model_commit(CLASSES)


@pytest.mark.usefixtures("serial", "reads_the_pixels")
def test_stage_writes_every_picture_and_says_where(model: Commit, work: Any, frame_file: Any) -> None:
    rows = [{"frame_id": f"dusk/{i}", "uri": frame_file(f"{i}.png", encode_png(image(i))).uri} for i in range(3)]
    rows.append({"frame_id": "dusk/bad", "uri": frame_file("bad.png", b"").uri})
    commit = predict(
        frame_table(rows),
        model,
        name="dusk",
        attempt=work("predict"),
        compute=MapCompute(shard_rows=2, batch=2),
        progress=SilentProgress(),
        max_bad_fraction=0.5,
    )
    assert (commit.rows_in, commit.rows_out, commit.quarantined) == (4, 3, 1)
    for index, row in enumerate(commit.table("predictions").to_pylist()):
        assert row["mean_confidence"] == 0.5
        files = {
            kind: (commit.folder / row[f"{kind}_uri"]).read_bytes()
            for kind in ("prediction", "color", "overlay", "confidence")
        }
        assert {kind: sha256_of(data) for kind, data in files.items()} == {
            kind: row[f"{kind}_sha256"] for kind in files
        }
        assert (decode_label(files["prediction"]) == index).all()
        assert decode_image(files["color"])[0, 0].tolist() == list(CLASSES.palette[index])
        assert (decode_label(files["confidence"]) == 128).all()
        assert decode_image(files["overlay"]).shape == (4, 6, 3)


@pytest.mark.usefixtures("serial", "reads_the_pixels")
def test_stage_saves_only_what_is_asked_for(model: Commit, work: Any, frame_file: Any) -> None:
    rows = frame_table([{"frame_id": "a", "uri": frame_file("a.png", encode_png(image(1))).uri}])
    settings: dict[str, Any] = {
        "compute": MapCompute(), "progress": SilentProgress(), "max_bad_fraction": 0.0, "name": "x",
    }  # fmt: skip
    commit = predict(rows, model, attempt=work("predict"), save=("mask",), **settings)
    assert "overlay_uri" not in commit.table("predictions").column_names
    assert not (commit.folder / "overlays").exists()
    with pytest.raises(UserError, match="holds no frame"):
        predict(rows.slice(0, 0), model, attempt=work("predict", "none"), **settings)


def test_pictures_are_checked() -> None:
    assert check_pictures(["overlay", "mask", "mask"]) == ("mask", "overlay")
    with pytest.raises(UserError, match="unknown picture 'masks'; known: mask, color, overlay, confidence"):
        check_pictures(["masks"])
    with pytest.raises(UserError, match="no picture is asked for"):
        check_pictures([])


@pytest.mark.usefixtures("reads_the_pixels")
class TestFolder:
    def predict(self, model: Commit, images: Path, out: Path, **changes: Any) -> dict[str, Any]:
        where = (model.folder / "model", Location.of(images), Location.of(out))
        return predict_folder(*where, batch=2, progress=SilentProgress(), **changes)

    def test_masks_lie_where_the_images_lay(self, model: Commit, tmp_path: Path) -> None:
        images = Location.of(tmp_path / "images")
        (images / "b c/é ö.png").write_bytes(encode_png(image(5, 7, 9)))
        (images / "a.JPG").write_bytes(encode_jpeg(image(3)))
        (images / "same.png").write_bytes(encode_png(image(1)))
        (images / "same.bmp").write_bytes(encode_png(image(2)))
        (images / "notes.txt").write_bytes(b"not looked at")
        found = self.predict(model, images.local, tmp_path / "out", save=["mask", "overlay"])
        masks = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png"))
        assert masks == ["a.png", "b c/é ö.png", "same.bmp.png", "same.png.png"]
        mask = decode_label((tmp_path / "out/b c/é ö.png").read_bytes())
        assert mask.shape == (7, 9) and (mask == 5).all()
        assert (tmp_path / "out/overlay/b c/é ö.jpg").exists()
        assert (found["images"], found["written"], found["quarantined"]) == (4, 4, 0)
        assert found["save"] == ["mask", "overlay"] and found["taxonomy"] == "camvid11"
        assert Location.of(tmp_path / "out/quarantine.json").read_json() == []

    def test_bad_images_do_not_stop_the_rest(self, model: Commit, tmp_path: Path) -> None:
        images = Location.of(tmp_path / "images")
        jpeg = encode_jpeg(image(3, 64, 64))
        (images / "0 cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
        (images / "1 good.png").write_bytes(encode_png(image(4)))
        (images / "2 empty.png").write_bytes(b"")
        (images / "3 text.png").write_bytes(b"hello")
        (images / "4 good.png").write_bytes(encode_png(image(6)))
        with open(os.fsencode(images.uri) + b"/5 latin \xe9.png", "wb") as stream:
            stream.write(encode_png(image(1)))
        found = self.predict(model, images.local, tmp_path / "out")
        assert (found["images"], found["written"], found["quarantined"]) == (6, 2, 4)
        listed = Location.of(tmp_path / "out/quarantine.json").read_json()
        assert sorted((row["frame_id"], row["reason"]) for row in listed) == [
            ("0 cut", "truncated"), ("2 empty", "zero_bytes"), ("3 text", "not_an_image"),
            (r"5 latin \udce9", "unreadable"),
        ]  # fmt: skip
        assert (decode_label((tmp_path / "out/4 good.png").read_bytes()) == 6).all()

    def test_one_image_is_a_folder_of_one(self, model: Commit, tmp_path: Path) -> None:
        (tmp_path / "a.b.png").write_bytes(encode_png(image(2)))
        assert self.predict(model, tmp_path / "a.b.png", tmp_path / "out")["written"] == 1
        assert (decode_label((tmp_path / "out/a.b.png").read_bytes()) == 2).all()

    def test_errors_are_said_before_the_work(self, model: Commit, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no such folder"):
            self.predict(model, tmp_path / "nowhere", tmp_path / "out")
        images = Location.of(tmp_path / "images")
        (images / "x.png").write_bytes(b"")
        with pytest.raises(UserError, match=r"none of the 1 images.*zero_bytes"):
            self.predict(model, images.local, tmp_path / "out")
        (images / "color/x.png").write_bytes(encode_png(image(1)))
        with pytest.raises(UserError, match=r"would both write color/x\.png"):
            self.predict(model, images.local, tmp_path / "out2", save=["mask", "color"])
        assert not (tmp_path / "out2").exists()
