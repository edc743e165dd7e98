"""Scores of predictions that are known: by a model whose answer is in the pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from nightseg.cluster.settings import MapCompute
from nightseg.data.class_list import taxonomy
from nightseg.data.images import decode_label, encode_png
from nightseg.data.table import frame_table
from nightseg.progress import SilentProgress
from nightseg.recipe.types import Evaluation
from nightseg.segmenter.predict import Segmented, Segmenter
from nightseg.segmenter.settings import Inference
from nightseg.stages.evaluate import evaluate
from nightseg.storage import Attempt, Commit, Location, UserError, sha256_of

CLASSES = taxonomy("camvid11")


@pytest.fixture
def frames(frame_file: Callable[..., Location]) -> pa.Table:
    """Three 4 x 6 frames. Label: sky over road, one ignored pixel. The model says road for the first k sky pixels."""
    rows = []
    for index in range(3):
        label = np.full((4, 6), 3, dtype=np.uint8)
        label[:2] = 0
        guess = label.copy()
        guess[0, :index] = 3
        label[3, 5] = 11  # void in camvid12
        image = np.dstack([guess, guess, guess])
        files = {"uri": encode_png(image), "label_uri": encode_png(label)}
        places = {key: frame_file(f"{key}/{index}.png", data).uri for key, data in files.items()}
        hashes = {"sha256": sha256_of(files["uri"]), "label_sha256": sha256_of(files["label_uri"])}
        names = {"frame_id": f"night/{index}", "dataset": "night", "domain": "night", "label_encoding": "camvid12"}
        rows.append(names | places | hashes)
    return frame_table(rows)


def run(frames: pa.Table, model: Commit, attempt: Attempt, **changes: Any) -> Commit:
    """The test set is called `night`."""
    arguments: dict[str, Any] = {
        "name": "m",
        "taxonomy": "camvid11",
        "attempt": attempt,
        "compute": MapCompute(actors=0, shard_rows=2, batch=2),
        "progress": SilentProgress(),
        "max_bad_fraction": 0.0,
        "evaluation": Evaluation(),
        "inference": Inference(),
    }
    return evaluate({"night": frames}, model, **(arguments | changes))


def scores_of(commit: Commit) -> Any:
    return commit.json("scores.json")["night"]


@pytest.mark.usefixtures("shards_done", "reads_the_pixels")
class TestStage:
    @pytest.fixture
    def model(self, model_commit: Callable[..., Commit]) -> Commit:
        return model_commit(CLASSES)

    def test_scores_come_from_the_summed_matrix(self, frames: pa.Table, model: Commit, work: Any) -> None:
        """36 sky pixels, 3 of them called road; 33 road pixels, all right; 3 ignored."""
        commit = run(frames, model, work("evaluate"))
        found = scores_of(commit)
        assert found["confusion"][0] == [33, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]
        assert found["confusion"][3][3] == 33 and np.sum(found["confusion"]) == 69
        assert found["pa"] == 66 / 69
        assert found["ca"] == (33 / 36 + 1) / 2
        assert found["iou"]["sky"] == 33 / 36 and found["iou"]["road"] == 33 / 36 and found["iou"]["car"] is None
        assert found["miou"] == 33 / 36
        assert found["fwiou"] == pytest.approx(33 / 36)
        assert (found["frames"], found["absent_class"]) == (3, "cityscapes")
        assert found.keys() == {
            *("pa", "ca", "miou", "fwiou", "iou", "confusion", "absent_class", "frames")
        }  # what the report reads

    def test_predictions_are_kept_with_their_own_matrix(self, frames: pa.Table, model: Commit, work: Any) -> None:
        commit = run(frames, model, work("evaluate"))
        rows = commit.table("predictions").to_pylist()
        assert [row["frame_id"] for row in rows] == ["night/0", "night/1", "night/2"]
        for index, row in enumerate(rows):
            data = (commit.folder / row["prediction_uri"]).read_bytes()
            assert sha256_of(data) == row["prediction_sha256"]
            assert (decode_label(data)[0] == 3).sum() == index
            assert np.reshape(row["confusion"], (11, 11))[0, 3] == index
            assert row["label_uri"] == frames["label_uri"][index].as_py()

    def test_boundary_iou_is_measured_where_it_is_asked_for(self, frames: pa.Table, model: Commit, work: Any) -> None:
        """4 x 6 pixels and one pixel of reach: the outer ring, and two rows at the horizon, are all there is."""
        plain = run(frames, model, work("evaluate", "plain"))
        commit = run(frames, model, work("evaluate", "bands"), evaluation=Evaluation(boundary=0.02))
        assert "boundary" not in scores_of(plain) and "boundary" not in plain.table("predictions").column_names
        scores = scores_of(commit)
        assert {key: value for key, value in scores.items() if key != "boundary"} == scores_of(plain)
        found = scores["boundary"]
        rows = commit.table("predictions")["boundary"].to_pylist()
        assert found["counts"] == np.sum([np.reshape(row, (11, 3)) for row in rows], axis=0).tolist()
        # Sky is all band in the label, 3 x 12 pixels; the model says road for 0, 1 and 2 of them.
        assert found["counts"][0] == [36, 33, 33] and found["iou"]["sky"] == 33 / 36
        assert found["iou"]["tree"] is None and found["distance"] == 0.02
        assert found["miou"] == np.mean([value for value in found["iou"].values() if value is not None])

    def test_absent_class_rule(self, frames: pa.Table, model: Commit, work: Any, frame_file: Any) -> None:
        """A car that is nowhere in the labels: IoU 0 under Cityscapes' rule, left out under detectron2's."""
        row = frames.slice(0, 1).to_pylist()[0]
        image = np.full((4, 6, 3), 8, dtype=np.uint8)
        row |= {"uri": frame_file("car.png", encode_png(image)).uri, "sha256": None, "frame_id": "night/car"}
        rows = pa.concat_tables([frames, frame_table([row])])
        strict = scores_of(run(rows, model, work("evaluate", "a")))
        rule = Evaluation(absent_class="detectron2")
        lenient = scores_of(run(rows, model, work("evaluate", "b"), evaluation=rule))
        assert strict["iou"]["car"] == 0.0 and lenient["iou"]["car"] is None
        assert lenient["miou"] == pytest.approx(strict["miou"] * 3 / 2)

    def test_bad_frames_and_labels_are_set_aside(
        self, frames: pa.Table, model: Commit, work: Any, frame_file: Any
    ) -> None:
        first = frames.slice(0, 1).to_pylist()[0] | {"sha256": None, "label_sha256": None}
        small = frame_file("small.png", encode_png(np.zeros((2, 2), np.uint8))).uri
        odd = frame_file("odd.png", encode_png(np.full((4, 6), 77, np.uint8))).uri
        bad = [
            first | {"frame_id": "empty", "uri": frame_file("empty.png", b"").uri},
            first | {"frame_id": "small", "label_uri": small},
            first | {"frame_id": "odd", "label_uri": odd},
            first | {"frame_id": "gone", "label_uri": small + "x"},
            first | {"frame_id": "changed", "label_sha256": "0" * 64},
        ]
        rows = pa.concat_tables([frames, frame_table(bad)])
        commit = run(rows, model, work("evaluate"), max_bad_fraction=0.7)
        reasons = dict(
            zip(*commit.table("quarantine").select(["frame_id", "reason"]).to_pydict().values(), strict=True)
        )
        assert reasons == {
            "empty": "zero_bytes", "small": "label_size", "odd": "label_value",
            "gone": "label_missing", "changed": "unreadable",
        }  # fmt: skip
        details = dict(
            zip(*commit.table("quarantine").select(["frame_id", "detail"]).to_pydict().values(), strict=True)
        )
        assert details["odd"].startswith(f"label {odd}: ids 77 (24 pixels) are not in the encoding camvid12")
        assert small in details["small"] and details["gone"].count(small + "x") == 1
        assert scores_of(commit)["frames"] == 3
        with pytest.raises(UserError, match="5 of 8 frames"):
            run(rows, model, work("evaluate", "strict"))
        with pytest.raises(UserError, match="5 of 5 frames"):
            run(frame_table(bad), model, work("evaluate", "nothing left"), max_bad_fraction=1.0)

    def test_what_cannot_be_measured_is_refused(
        self, frames: pa.Table, model: Commit, work: Any, frame_file: Any
    ) -> None:
        with pytest.raises(UserError, match="holds no frame"):
            run(frames.slice(0, 0), model, work("evaluate"))
        bare = frame_table([frames.to_pylist()[0] | {"label_uri": None}])
        with pytest.raises(UserError, match="1 of 1 frames have no label"):
            run(bare, model, work("evaluate"))
        with pytest.raises(UserError, match="ids mean different things"):
            run(frames, model, work("evaluate"), taxonomy="cityscapes19")
        void = frame_file("void.png", encode_png(np.full((4, 6), 11, np.uint8))).uri
        row = frames.to_pylist()[0] | {"label_uri": void, "label_sha256": None}
        with pytest.raises(UserError, match="none of the 1 labels has a pixel with a class"):
            run(frame_table([row]), model, work("evaluate"))


@pytest.mark.usefixtures("shards_done", "reads_the_pixels")
def test_a_frame_of_two_test_sets_is_segmented_once_and_counts_in_both(
    frames: pa.Table, model_commit: Callable[..., Commit], work: Any
) -> None:
    model, sets = model_commit(CLASSES), {"all": frames, "last": frames.slice(2)}
    arguments: dict[str, Any] = {
        "name": "m", "taxonomy": "camvid11", "evaluation": Evaluation(), "inference": Inference(),
        "compute": MapCompute(actors=0, shard_rows=2), "progress": SilentProgress(), "max_bad_fraction": 0.5,
    }  # fmt: skip
    commit = evaluate(sets, model, attempt=work("evaluate"), **arguments)
    assert (commit.rows_in, commit.rows_out) == (3, 3)
    assert commit.table("predictions")["test_sets"].to_pylist() == [["all"], ["all"], ["all", "last"]]
    both = commit.json("scores.json")
    assert both["all"] == scores_of(run(frames, model, work("evaluate", "alone")))
    assert both["last"] == scores_of(run(frames.slice(2), model, work("evaluate", "last")))
    assert commit.summary["miou"] == {name: scores["miou"] for name, scores in both.items()}
    bad = frame_table([frames.to_pylist()[0] | {"frame_id": "night/bad", "uri": "/no/file.png"}])
    with pytest.raises(UserError, match="1 of 4 frames"):  # a set without any frame has no score
        evaluate({"all": frames, "bad": bad}, model, attempt=work("evaluate", "bad"), **arguments)


@pytest.mark.usefixtures("shards_done")
def test_the_stage_looks_as_it_is_told(
    frames: pa.Table, model_commit: Callable[..., Commit], work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Inference] = []

    def batch(self: Segmenter, images: list[Any]) -> list[Segmented]:
        used.append(self.inference)
        return [Segmented(image[..., 0].copy(), image[..., 1].astype(np.float32)) for image in images]

    monkeypatch.setattr(Segmenter, "batch", batch)
    run(frames, model_commit(CLASSES), work("evaluate"), inference=Inference(flip=True))
    assert used == [Inference(flip=True)] * 2
