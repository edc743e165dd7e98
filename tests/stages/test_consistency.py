"""How sure and consistent a model is, on frames for which the answers are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nightseg.cluster.settings import MapCompute
from nightseg.data.class_list import taxonomy
from nightseg.data.images import encode_png
from nightseg.data.table import frame_table
from nightseg.progress import SilentProgress
from nightseg.segmenter.predict import Segmented, Segmenter
from nightseg.segmenter.settings import Inference
from nightseg.stages.consistency import consistency
from nightseg.storage import Commit, UserError

CLASSES = taxonomy("camvid11")


@pytest.fixture
def stage(model_commit: Callable[..., Commit], work: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Commit]:
    """The stage with a model that calls the leftmost column class 0 and the others by their red, and is half sure."""

    def batch(self: Segmenter, images: list[np.ndarray]) -> list[Segmented]:
        labels = [image[..., 0].copy() for image in images]
        for label in labels:
            label[:, 0] = 0
        return [Segmented(label, np.full(label.shape, 0.5, np.float32)) for label in labels]

    monkeypatch.setattr(Segmenter, "batch", batch)

    def run(rows: list[dict[str, Any]], count: int = 9) -> Commit:
        return consistency(
            frame_table(rows),
            model_commit(CLASSES),
            name="m",
            count=count,
            inference=Inference(),
            attempt=work("consistency"),
            compute=MapCompute(actors=0, shard_rows=2, batch=2),
            progress=SilentProgress(),
            max_bad_fraction=1.0,
        )

    return run


def ones(frame_file: Any, name: str) -> dict[str, Any]:
    return {"frame_id": name, "uri": frame_file(f"{name}.png", encode_png(np.ones((2, 4, 3), np.uint8))).uri}


@pytest.mark.usefixtures("shards_done")
def test_scores_of_known_answers(stage: Callable[..., Commit], frame_file: Any) -> None:
    rows = [ones(frame_file, name) for name in "abc"]
    rows[1] = {"frame_id": "bad", "uri": frame_file("bad.png", b"").uri}
    commit = stage(rows)
    assert (commit.rows_in, commit.rows_out, commit.quarantined) == (3, 2, 1)
    scores = commit.json("scores.json")
    assert scores["confidence"] == 0.5
    # A row 0 1 1 1 is 1 1 1 0 by way of the mirror: class 0 agrees nowhere, class 1 on two of four pixels.
    assert scores["mirrored"] == 0.25
    # 255 (1 / 255)^0.6 = 9.2: a brighter frame is 0 9 9 9. Class 0 agrees, 1 and 9 do not.
    assert scores["brightened"] == pytest.approx(1 / 3)
    entropy = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    assert scores["diversity"] == pytest.approx(entropy / math.log(11))


def test_frames_are_taken_evenly(stage: Callable[..., Commit], frame_file: Any) -> None:
    commit = stage([ones(frame_file, name) for name in "abcde"], count=3)
    assert commit.table("views")["frame_id"].to_pylist() == ["a", "c", "e"]


def test_no_frame_is_refused(stage: Callable[..., Commit], frame_file: Any) -> None:
    with pytest.raises(UserError, match=r"holds no frame\. Cure: another dataset"):
        stage([])
    with pytest.raises(UserError, match="1 of 1 frames"):
        stage([{"frame_id": "bad", "uri": frame_file("bad.png", b"").uri}])
