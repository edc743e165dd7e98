"""Scores of predictions that are known: by a model whose answer is in the pixels, and between two folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from nightseg.config import MapCompute
from nightseg.frames.images import decode_label, encode_png
from nightseg.frames.table import frame_table
from nightseg.frames.taxonomy import taxonomy
from nightseg.progress import SilentProgress
from nightseg.stages.evaluate import evaluate, evaluate_folders
from nightseg.storage import Location, UserError, sha256_of
from nightseg.workspace import Attempt, Commit

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
    arguments: dict[str, Any] = {
        "name": "m.night",
        "taxonomy": "camvid11",
        "attempt": attempt,
        "compute": MapCompute(shard_rows=2, batch=2),
        "progress": SilentProgress(),
        "max_bad_fraction": 0.0,
    }
    return evaluate(frames, model, **(arguments | changes))


@pytest.mark.usefixtures("serial", "reads_the_pixels")
class TestStage:
    @pytest.fixture
    def model(self, model_commit: Callable[..., Commit]) -> Commit:
        return model_commit(CLASSES)

    def test_scores_come_from_the_summed_matrix(self, frames: pa.Table, model: Commit, work: Any) -> None:
        """36 sky pixels, 3 of them called road; 33 road pixels, all right; 3 ignored."""
        commit = run(frames, model, work("evaluate"))
        found = commit.json("scores.json")
        assert found["confusion"][0] == [33, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]
        assert found["confusion"][3][3] == 33 and np.sum(found["confusion"]) == 69
        assert found["pa"] == 66 / 69
        assert found["ca"] == (33 / 36 + 1) / 2
        assert found["iou"]["sky"] == 33 / 36 and found["iou"]["road"] == 33 / 36 and found["iou"]["car"] is None
        assert found["miou"] == 33 / 36
        assert found["fwiou"] == pytest.approx(33 / 36)
        assert (found["frames"], found["absent_class"]) == (3, "cityscapes")

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

    def test_absent_class_rule(self, frames: pa.Table, model: Commit, work: Any, frame_file: Any) -> None:
        """A car that is nowhere in the labels: IoU 0 under Cityscapes' rule, left out under detectron2's."""
        row = frames.slice(0, 1).to_pylist()[0]
        image = np.full((4, 6, 3), 8, dtype=np.uint8)
        row |= {"uri": frame_file("car.png", encode_png(image)).uri, "sha256": None, "frame_id": "night/car"}
        rows = pa.concat_tables([frames, frame_table([row])])
        strict = run(rows, model, work("evaluate", "a")).json("scores.json")
        lenient = run(rows, model, work("evaluate", "b"), absent_class="detectron2").json("scores.json")
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
        assert commit.json("scores.json")["frames"] == 3
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


# -- folders ---------------------------------------------------------------------------------------------------------

LABEL = np.array([[0, 0, 3], [3, 3, 11]], dtype=np.uint8)
GUESS = np.array([[0, 3, 3], [3, 3, 0]], dtype=np.uint8)


def folders(
    tmp_path: Path, predictions: dict[str, np.ndarray], labels: dict[str, np.ndarray]
) -> tuple[Location, Location]:
    for folder, files in (("predictions", predictions), ("labels", labels)):
        for name, array in files.items():
            (Location.of(tmp_path / folder) / name).write_bytes(encode_png(array))
    return Location.of(tmp_path / "predictions"), Location.of(tmp_path / "labels")


def test_folders_are_paired_by_name_and_scored(tmp_path: Path) -> None:
    where = folders(
        tmp_path, {"a b.png": GUESS, "é.png": GUESS, "extra.png": GUESS}, {"a b.png": LABEL, "é.png": LABEL}
    )
    found = evaluate_folders(*where, "camvid11")
    assert (found["frames"], found["label_encoding"], found["taxonomy"]) == (2, "camvid12", "camvid11")
    assert found["confusion"][0][0] == 2 and found["confusion"][0][3] == 2 and found["confusion"][3][3] == 6
    assert found["pa"] == 0.8 and found["iou"]["sky"] == 0.5 and found["iou"]["road"] == 0.75
    assert found["miou"] == 0.625
    assert found["iou"]["tree"] is None


def test_train_ids_are_preferred_and_an_encoding_can_be_asked_for(tmp_path: Path) -> None:
    train_ids = np.where(LABEL == 11, 255, LABEL).astype(np.uint8)
    where = folders(tmp_path, {"a.png": GUESS}, {"a.png": train_ids})
    assert evaluate_folders(*where, "camvid11")["label_encoding"] == "train_ids"
    assert evaluate_folders(*where, "camvid11")["miou"] == 0.625
    with pytest.raises(UserError, match=r"a\.png.*ids 255"):
        evaluate_folders(*where, "camvid11", label_encoding="camvid12")
    with pytest.raises(UserError, match="no label encoding 'camvid'"):
        evaluate_folders(*where, "camvid11", label_encoding="camvid")


def test_cityscapes_names_belong_together(tmp_path: Path) -> None:
    """Road is 7 and car 26 in labelIds, 0 and 13 in train ids."""
    label_ids = np.array([[7, 26], [7, 4]], dtype=np.uint8)
    guess = np.array([[0, 13], [13, 0]], dtype=np.uint8)
    where = folders(
        tmp_path,
        {"x_000_leftImg8bit.png": guess, "color/x_000_leftImg8bit.png": guess},
        {"city/x_000_gtFine_labelIds.png": label_ids, "city/x_000_gtFine_color.png": label_ids,
         "city/x_000_gtFine_instanceIds.png": label_ids},
    )  # fmt: skip
    found = evaluate_folders(*where, "cityscapes19")
    assert found["label_encoding"] == "label_ids"
    assert found["pa"] == 2 / 3
    # train ids beside them are taken instead
    train_ids = np.array([[0, 13], [0, 255]], dtype=np.uint8)
    (where[1] / "city/x_000_gtFine_labelTrainIds.png").write_bytes(encode_png(train_ids))
    again = evaluate_folders(*where, "cityscapes19")
    assert again["label_encoding"] == "train_ids" and again["confusion"] == found["confusion"]


def test_the_name_decides_where_values_could_be_either(tmp_path: Path) -> None:
    """Raw ids 7 and 11 are also train ids, but a file called labelIds holds label ids: road and building."""
    where = folders(
        tmp_path, {"x.png": np.array([[0, 2]], np.uint8)}, {"x_gtFine_labelIds.png": np.array([[7, 11]], np.uint8)}
    )
    assert evaluate_folders(*where, "cityscapes19")["pa"] == 1.0


def test_an_undecided_pixel_is_wrong(tmp_path: Path) -> None:
    undecided = GUESS.copy()
    undecided[0, 0] = 255
    where = folders(tmp_path, {"a.png": undecided}, {"a.png": LABEL})
    assert evaluate_folders(*where, "camvid11")["pa"] == 3 / 5


def test_folder_errors_name_the_files(tmp_path: Path) -> None:
    def refused(name: str, predictions: dict[str, np.ndarray], labels: dict[str, np.ndarray], match: str) -> None:
        where = folders(tmp_path / name, predictions, labels)
        with pytest.raises(UserError, match=match):
            evaluate_folders(*where, "camvid11")

    with pytest.raises(UserError, match="predictions: there is no folder"):
        evaluate_folders(Location.of(tmp_path / "no"), Location.of(tmp_path / "no"), "camvid11")
    refused("1", {"a.png": GUESS}, {"a.png": LABEL, "b.png": LABEL}, r"1 of 2 labels .* have no prediction.*b\.png")
    refused("2", {"a.png": GUESS[:1]}, {"a.png": LABEL}, r"3 x 1, its label .* 3 x 2")
    refused("3", {"a.png": GUESS + np.uint8(20)}, {"a.png": LABEL}, r"holds 20, 23, which are no train ids of camvid11")
    refused("4", {"a.png": GUESS}, {"a.png": LABEL + np.uint8(60)}, r"no encoding of camvid11 knows.*camvid12 lacks 60")
    refused("5", {"a.png": GUESS}, {"a.png": np.full((2, 3), 11, np.uint8)}, "none of the 1 labels")
    refused("6", {"a.png": GUESS}, {"x/a.png": LABEL, "y/a.png": LABEL}, "occurs more than once")
    (Location.of(tmp_path / "7/predictions") / "a.png").write_bytes(b"text")
    refused("7", {}, {"a.png": LABEL}, r"a\.png: not_an_image")
    refused("8", {"a.jpg": GUESS}, {"a.png": LABEL}, "there is no PNG")


@pytest.mark.usefixtures("serial")
def test_the_stage_looks_as_it_is_told(
    frames: pa.Table, model_commit: Callable[..., Commit], work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nightseg.learning.inference import Inference
    from nightseg.stages import evaluate as stage

    used: list[Inference] = []

    def segment_rows(segmenter: Any, rows: pa.Table, batch: int) -> Any:
        used.append(segmenter.inference)
        return iter(())

    monkeypatch.setattr(stage, "segment_rows", segment_rows)
    evaluator = stage.Evaluator(model_commit(CLASSES).folder / "model", 2, "cpu", CLASSES, Inference(flip=True))
    evaluator(frames, Location.of("/nowhere"))
    assert used == [Inference(flip=True)]
