"""Predictions of a stage as files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nightseg.cluster.settings import MapCompute
from nightseg.data.class_list import taxonomy
from nightseg.data.images import decode_image, decode_label, encode_png
from nightseg.data.table import frame_table
from nightseg.progress import SilentProgress
from nightseg.stages.predict import check_pictures, predict
from nightseg.storage import Commit, UserError, sha256_of

CLASSES = taxonomy("camvid11")


def image(value: int, height: int = 4, width: int = 6) -> np.ndarray:
    """`reads_the_pixels` calls it class `value`, with confidence 0.5."""
    return np.dstack([np.full((height, width), v) for v in (value, 128, 0)]).astype(np.uint8)


@pytest.fixture
def model(model_commit: Callable[..., Commit]) -> Commit:
    return model_commit(CLASSES)


@pytest.mark.usefixtures("shards_done", "reads_the_pixels")
def test_stage_writes_every_picture_and_says_where(model: Commit, work: Any, frame_file: Any) -> None:
    rows = [{"frame_id": f"dusk/{i}", "uri": frame_file(f"{i}.png", encode_png(image(i))).uri} for i in range(3)]
    rows.append({"frame_id": "dusk/bad", "uri": frame_file("bad.png", b"").uri})
    commit = predict(
        frame_table(rows),
        model,
        name="dusk",
        attempt=work("predict"),
        compute=MapCompute(actors=0, shard_rows=2, batch=2),
        progress=SilentProgress(),
        max_bad_fraction=0.5,
    )
    assert (commit.rows_in, commit.rows_out, commit.quarantined) == (4, 3, 1)
    assert commit.summary == {"save": ["mask", "color", "overlay", "confidence"]}
    assert commit.table("quarantine").to_pylist()[0]["frame_id"] == "dusk/bad"
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


@pytest.mark.usefixtures("shards_done", "reads_the_pixels")
def test_stage_saves_only_what_is_asked_for(model: Commit, work: Any, frame_file: Any) -> None:
    rows = frame_table([{"frame_id": "a", "uri": frame_file("a.png", encode_png(image(1))).uri}])
    settings: dict[str, Any] = {
        "compute": MapCompute(actors=0), "progress": SilentProgress(), "max_bad_fraction": 0.0, "name": "x",
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
