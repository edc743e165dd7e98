"""Pseudo-labels of a teacher that says what the pixels say, so every kept pixel can be counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from nightseg.cluster.settings import MapCompute
from nightseg.data.class_list import taxonomy
from nightseg.data.images import encode_png, read_image
from nightseg.data.labels import train_ids_of
from nightseg.data.stored_labels import INDEX_SCHEMA, KEPT_SCHEMA, Kept, read_stored, with_kept
from nightseg.data.table import frame_table, resolve
from nightseg.progress import SilentProgress
from nightseg.segmenter.data import InMemory, LabelledFrames
from nightseg.segmenter.settings import Guard, Threshold
from nightseg.stages.label import label
from nightseg.stages.pseudo_label import pseudo_label
from nightseg.stages.train_segmenter import as_kept, put_together
from nightseg.storage import Attempt, Commit, Location, UserError

CLASSES = taxonomy("camvid11")
SKY, ROAD, CAR = 0, 3, 8


def pixels(label: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """The frame that `reads_the_pixels` turns into this label and confidence (in 256ths)."""
    return np.dstack([label, confidence, np.zeros_like(label)]).astype(np.uint8)


@pytest.fixture
def frames(frame_file: Callable[..., Location]) -> pa.Table:
    """Five 8 x 12 frames: a sure sky, a road of which half is unsure, an unsure car."""
    rows = []
    for index in range(5):
        label = np.full((8, 12), ROAD)
        label[:4] = SKY
        label[6:, 8:] = CAR
        confidence = np.full((8, 12), 250)
        confidence[4:, :6] = 100 + index  # road: the first half of each row
        confidence[6:, 8:] = 40 + index
        uri = frame_file(f"{index}.png", encode_png(pixels(label, confidence)))
        rows.append({"frame_id": f"night/a b/{index}", "uri": uri.uri, "dataset": "night", "domain": "night"})
    return frame_table(rows)


def labelled_by(teacher: Commit, frames: pa.Table, attempt: Attempt, **changes: Any) -> Commit:
    arguments: dict[str, Any] = {
        "taxonomy": "camvid11",
        "attempt": attempt,
        "compute": MapCompute(actors=0, shard_rows=2, batch=2),
        "progress": SilentProgress(),
        "max_bad_fraction": 0.0,
    }
    return label(frames, teacher, **(arguments | changes))


def run(labels: Commit, attempt: Attempt, threshold: Threshold, **changes: Any) -> Commit:
    told = {"taxonomy": "camvid11", "attempt": attempt, "progress": SilentProgress()}
    return pseudo_label(labels, name="student", threshold=threshold, **(told | changes))


def labels_of(labels: Commit, kept: Commit) -> list[np.ndarray]:
    """As a training reads them."""
    rows = resolve(labels.table("frames"), labels.folder)
    said = Kept.of(kept.file("kept.json").read_bytes().decode())
    known = with_kept(rows, said, kept.table("labels")["label_pixels"]).to_pylist()
    return [ids for row in known if (ids := train_ids_of(row, CLASSES)) is not None]


@pytest.mark.usefixtures("shards_done", "reads_the_pixels")
class TestRules:
    @pytest.fixture
    def teacher(self, model_commit: Callable[..., Commit]) -> Commit:
        return model_commit(CLASSES)

    @pytest.fixture
    def labels(self, frames: pa.Table, teacher: Commit, work: Any) -> Commit:
        return labelled_by(teacher, frames, work("label"))

    def test_none_keeps_every_pixel(self, labels: Commit, work: Any) -> None:
        commit = run(labels, work("pseudo_label"), Threshold(kind="none"))
        for ids in labels_of(labels, commit):
            assert np.unique(ids).tolist() == [SKY, ROAD, CAR]
        assert commit.json("evidence.json")["kept_share"] == 1.0

    def test_fixed_keeps_what_is_confident_enough(self, labels: Commit, work: Any) -> None:
        """With 102/256 as the least confidence the unsure roads of frames 2, 3 and 4 stay."""
        commit = run(labels, work("pseudo_label"), Threshold(kind="fixed", confidence=102 / 256))
        found = labels_of(labels, commit)
        assert [(label[4:, :6] == 255).all() for label in found] == [True, True, False, False, False]
        assert all((label[6:, 8:] == 255).all() and (label[:4] == SKY).all() for label in found)
        evidence = commit.json("evidence.json")
        assert evidence["by_class"]["car"] == {
            "predicted": 40, "kept": 0, "kept_share": 0.0, "threshold": 102 / 256
        }  # fmt: skip
        assert any("every pixel of car" in warning for warning in evidence["warnings"])
        assert evidence["by_class"]["tree"]["kept_share"] is None

    def test_class_balanced_keeps_a_share_of_every_class(self, labels: Commit, teacher: Commit, work: Any) -> None:
        """Cars: 8 pixels a frame, 40 to 44: 60 % of 40 are the 24 of frames 2 to 4. Sky: all surer than the limit.

        Roads: 40 a frame, of which 24 are unsure. 60 % of 200 are 120: the 80 sure ones, and 40 of the unsure, which
        come in steps of 24 a frame, so those of frames 3 and 4 are kept.
        """
        threshold = Threshold(kind="class_balanced", confidence=0.9, share=0.6)
        commit = run(labels, work("pseudo_label"), threshold)
        found = labels_of(labels, commit)
        assert [bool((label[6:, 8:] == CAR).all()) for label in found] == [False, False, True, True, True]
        assert [bool((label[4:, :6] == ROAD).all()) for label in found] == [False, False, False, True, True]
        assert all((label[:4] == SKY).all() for label in found)
        by_class = commit.json("evidence.json")["by_class"]
        assert by_class["car"] == {"predicted": 40, "kept": 24, "kept_share": 0.6, "threshold": 42 / 256}
        assert by_class["road"] == {"predicted": 200, "kept": 128, "kept_share": 0.64, "threshold": 103 / 256}
        assert by_class["sky"] == {"predicted": 240, "kept": 240, "kept_share": 1.0, "threshold": 230 / 256}
        evidence = commit.json("evidence.json")
        del evidence["by_class"]
        assert "hardly ever predicts building" in evidence.pop("warnings")[0]
        assert evidence == {
            "teacher": {"name": teacher.name, "key": teacher.key},
            "labels": "label/x",
            "threshold": {"kind": "class_balanced", "confidence": 0.9, "share": 0.6, "floor": 0.0, "precision": None},
            "frames": 5,
            "pixels": 480,
            "kept_share": 392 / 480,
        }
        assert commit.summary == {"kept_share": 392 / 480, "warnings": 1, "threshold": "class_balanced"}
        assert labels.table("histograms")["class"].to_pylist() == list(CLASSES.classes)

    def test_another_threshold_reads_no_label_and_no_frame(self, labels: Commit, work: Any) -> None:
        first = run(labels, work("pseudo_label", "first"), Threshold(kind="none"))
        (labels.folder / "labels").delete()
        second = run(labels, work("pseudo_label", "second"), Threshold(kind="fixed", confidence=0.9))
        assert first.json("evidence.json")["kept_share"] == 1.0
        assert second.json("evidence.json")["kept_share"] == (480 - 5 * (24 + 8)) / 480

    def test_a_training_reads_what_is_kept(self, labels: Commit, frames: pa.Table, work: Any, frame_file: Any) -> None:
        """Beside a labelled frame, whose file says it all."""
        kept = run(labels, work("pseudo_label"), Threshold(kind="fixed", confidence=102 / 256))
        uri = frame_file("label.png", encode_png(np.full((8, 12), SKY, np.uint8))).uri
        day = frame_table([{**frames.to_pylist()[0], "label_uri": uri, "label_encoding": "train_ids"}])
        train = {"day": day, "pseudo": resolve(labels.table("frames"), labels.folder)}
        rows, parts = put_together(as_kept(train, {"pseudo": kept}), None, {}, CLASSES)
        read = LabelledFrames(rows, CLASSES, size=None, resize_labels=True, cache=InMemory(0))
        found = [[read[row][1].numpy() for row in part.rows] for part in parts]
        assert len(found) == 2 and (found[0][0] == SKY).all()
        assert all((ids == wanted).all() for ids, wanted in zip(found[1], labels_of(labels, kept), strict=True))
        assert rows["label_pixels"].to_pylist()[1:] == kept.table("labels")["kept_counts"].to_pylist()

    def test_tables_are_whole(self, labels: Commit, frames: pa.Table, teacher: Commit, work: Any) -> None:
        threshold = Threshold(kind="class_balanced", confidence=0.9, share=0.6)
        commit = run(labels, work("pseudo_label"), threshold)
        made, index, kept = labels.table("frames"), labels.table("index"), commit.table("labels")
        assert (index.schema, kept.schema) == (INDEX_SCHEMA, KEPT_SCHEMA)
        ids = frames["frame_id"].to_pylist()
        assert all(table["frame_id"].to_pylist() == ids for table in (made, index, kept))
        assert set(made["label_encoding"].to_pylist()) == {"train_ids"}
        assert set(zip(made["height"].to_pylist(), made["width"].to_pylist(), strict=True)) == {(8, 12)}
        assert (
            (labels.rows_in, labels.rows_out, labels.quarantined) == (commit.rows_in, commit.rows_out, 0) == (5, 5, 0)
        )
        model = (teacher.folder / "model/model.json").read_json()["weights_sha256"]
        for row, seen, facts, ids in zip(
            made.to_pylist(), index.to_pylist(), kept.to_pylist(), labels_of(labels, commit), strict=True
        ):
            stored = read_stored((labels.folder / row["label_uri"]).uri, row["label_sha256"])
            assert stored.labels_hw.shape == stored.covered == ids.shape
            assert seen["model"] == model
            assert seen["mean_confidence"] == facts["mean_confidence"] == stored.bins_hw.mean() / 256
            assert facts["kept"] == (ids != 255).mean()
            assert sum(facts["counts"]) == sum(seen["histogram"]) == 96
            assert (
                facts["kept_counts"] == facts["label_pixels"] == np.bincount(ids.ravel(), minlength=256)[:11].tolist()
            )
        total = np.array(index["histogram"].to_pylist()).sum(axis=0).reshape(11, 256)
        assert labels.table("histograms")["histogram"].to_pylist() == total.tolist()

    def test_bad_frames_are_quarantined(self, frames: pa.Table, teacher: Commit, work: Any, frame_file: Any) -> None:
        bad = frame_table([{"frame_id": "night/bad", "uri": frame_file("bad.png", b"").uri}])
        rows = pa.concat_tables([frames.slice(0, 3), bad, frames.slice(3)])
        labels = labelled_by(teacher, rows, work("label"), max_bad_fraction=0.5)
        assert (labels.rows_in, labels.rows_out, labels.quarantined) == (6, 5, 1)
        assert labels.table("quarantine")["reason"].to_pylist() == ["zero_bytes"]
        assert labels.table("frames")["frame_id"].to_pylist() == frames["frame_id"].to_pylist()
        assert run(labels, work("pseudo_label"), Threshold(kind="none")).rows_out == 5
        alone = labelled_by(teacher, bad, work("label", "alone"), max_bad_fraction=1.0)  # a shard without a good frame
        assert alone.rows_out == 0

    def test_too_many_bad_frames_are_refused_and_read_again(
        self, frames: pa.Table, teacher: Commit, work: Any, frame_file: Any
    ) -> None:
        good = Location.of(frames["uri"][0].as_py()).read_bytes()
        mended = frame_file("mended.png", b"")
        rows = pa.concat_tables([frames, frame_table([{"frame_id": "night/mended", "uri": mended.uri}])])
        with pytest.raises(UserError, match=r"1 of 6 frames.*zero_bytes"):
            labelled_by(teacher, rows, work("label"))
        mended.write_bytes(good)
        assert labelled_by(teacher, rows, work("label")).rows_out == 6

    def test_a_run_that_died_anywhere_ends_with_the_same_bytes(
        self, frames: pa.Table, teacher: Commit, work: Any, shards_done: list[str], monkeypatch: Any
    ) -> None:
        whole = labelled_by(teacher, frames, work("label", "whole"))
        num_shards = len(shards_done)
        write = Attempt.write_shard
        for survive in range(num_shards):
            shards_done.clear()

            def dies(self: Attempt, *args: Any, limit: int = survive, **kwargs: Any) -> Any:
                if len(shards_done) == limit:
                    raise KeyboardInterrupt
                return write(self, *args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(Attempt, "write_shard", dies)
                with pytest.raises(KeyboardInterrupt):
                    labelled_by(teacher, frames, work("label", f"dies {survive}"))
            commit = labelled_by(teacher, frames, work("label", f"dies {survive}"))
            assert len(shards_done) == num_shards  # no shard was done twice
            files = {output.path: output.sha256 for output in commit.outputs}
            assert files == {output.path: output.sha256 for output in whole.outputs}

    def test_rules_of_geometry_are_counted_and_learned(self, labels: Commit, work: Any) -> None:
        """All cars have a sure road above them; no sky has one."""
        rules = {"car": ["road"], "sky": ["road"]}
        commit = run(labels, work("pseudo_label"), Threshold(kind="none"), never_below=rules)
        assert [np.unique(ids).tolist() for ids in labels_of(labels, commit)] == [[SKY, ROAD, 255]] * 5
        kept = {name: one["kept"] for name, one in commit.json("evidence.json")["by_class"].items()}
        assert (kept["sky"], kept["road"], kept["car"]) == (240, 200, 0)

    @pytest.mark.parametrize(
        "threshold", [Threshold(kind="none"), Threshold(kind="class_balanced", share=1.0)], ids=lambda t: str(t.kind)
    )
    @pytest.mark.parametrize("act", ["warn", "ignore", "stop"])
    def test_a_later_round_is_watched(
        self, act: Any, threshold: Threshold, frames: pa.Table, teacher: Commit, work: Any
    ) -> None:
        """The first round sees sky on 48 of 96 pixels of its two frames, this one on none; cars stay as they were."""
        first = labelled_by(teacher, frames.slice(0, 2), work("label", "first"))
        rows = []
        for row in frames.to_pylist():
            image = read_image(Location.of(row["uri"]))
            image[..., 0][image[..., 0] == SKY] = ROAD
            Location.of(row["uri"]).write_bytes(encode_png(image))
            rows.append(row | {"sha256": None})
        labels = labelled_by(teacher, frame_table(rows), work("label"))
        keep = partial(run, labels, work("pseudo_label"), threshold, guard=Guard(act=act), first_round=first)
        if act == "stop":
            with pytest.raises(UserError, match=r"sees sky on 0.00% of the pool, that of the first round on 50.00%"):
                keep()
            return
        commit = keep()
        warnings = [text for text in commit.json("evidence.json")["warnings"] if "first round" in text]
        assert [text.split(" on ")[0] for text in warnings] == ["the teacher sees sky", "the teacher sees road"]
        assert all(("not learned" in text) == (act == "ignore") for text in warnings)
        thresholds = {name: one["threshold"] for name, one in commit.json("evidence.json")["by_class"].items()}
        assert (thresholds["road"] is None) == (act == "ignore") and thresholds["car"] is not None
        assert {tuple(np.unique(found)) for found in labels_of(labels, commit)} == {
            (ROAD, CAR) if act == "warn" else (CAR, 255)
        }

    def test_nothing_kept_is_an_error(self, labels: Commit, work: Any) -> None:
        with pytest.raises(UserError, match="keep none of 480 pixels"):
            run(labels, work("pseudo_label"), Threshold(kind="fixed", confidence=0.99))

    def test_wrong_inputs_are_named(self, frames: pa.Table, teacher: Commit, work: Any) -> None:
        with pytest.raises(UserError, match="there is no frame to label"):
            labelled_by(teacher, frames.slice(0, 0), work("label"))
        with pytest.raises(UserError, match="11 classes of camvid11, but the labels here have the 19"):
            labelled_by(teacher, frames, work("label"), taxonomy="cityscapes19")


@pytest.mark.ray
def test_the_stage_under_ray(
    frames: pa.Table,
    model_commit: Callable[..., Commit],
    work: Any,
    shards_done: list[str],
    ray_cluster: Any,
    monkeypatch: Any,
) -> None:
    """Actors do what this process does, to the byte. (That several do what one does: tests/cluster/test_map.py.)"""
    teacher = model_commit(CLASSES)
    alone = labelled_by(teacher, frames, work("label", "alone"))
    assert len(shards_done) == 3
    monkeypatch.undo()
    compute = MapCompute(shard_rows=2, batch=2, actors=1)
    spread = labelled_by(teacher, frames, work("label", "spread"), compute=compute)
    assert [(o.path, o.sha256) for o in spread.outputs] == [(o.path, o.sha256) for o in alone.outputs]
