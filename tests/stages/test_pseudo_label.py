"""Pseudo-labels of a teacher that says what the pixels say, so every kept pixel can be counted by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from nightseg.cluster.settings import MapCompute
from nightseg.data.class_list import taxonomy
from nightseg.data.images import decode_label, encode_png, read_image
from nightseg.data.table import frame_table, resolve
from nightseg.progress import SilentProgress
from nightseg.segmenter.settings import Guard, Threshold
from nightseg.stages.pseudo_label import LABELS_SCHEMA, Drafter, DraftLabeller, pseudo_label
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


def run(frames: pa.Table, teacher: Commit, attempt: Attempt, threshold: Threshold, **changes: Any) -> Commit:
    arguments: dict[str, Any] = {
        "name": "student",
        "threshold": threshold,
        "taxonomy": "camvid11",
        "attempt": attempt,
        "compute": MapCompute(actors=0, shard_rows=2, batch=2),
        "progress": SilentProgress(),
        "max_bad_fraction": 0.0,
    }
    return pseudo_label(frames, teacher, **(arguments | changes))


def labels_of(commit: Commit) -> list[np.ndarray]:
    table = resolve(commit.table("frames"), commit.folder)
    return [decode_label(Location.of(uri).read_bytes()) for uri in table["label_uri"].to_pylist()]


@pytest.mark.usefixtures("shards_done", "reads_the_pixels")
class TestRules:
    @pytest.fixture
    def teacher(self, model_commit: Callable[..., Commit]) -> Commit:
        return model_commit(CLASSES)

    def test_none_keeps_every_pixel(self, frames: pa.Table, teacher: Commit, work: Any) -> None:
        commit = run(frames, teacher, work("pseudo_label"), Threshold(kind="none"))
        for label in labels_of(commit):
            assert np.unique(label).tolist() == [SKY, ROAD, CAR]
        assert commit.json("evidence.json")["kept_share"] == 1.0

    def test_fixed_keeps_what_is_confident_enough(self, frames: pa.Table, teacher: Commit, work: Any) -> None:
        """With 102/256 as the least confidence the unsure roads of frames 2, 3 and 4 stay."""
        commit = run(frames, teacher, work("pseudo_label"), Threshold(kind="fixed", confidence=102 / 256))
        found = labels_of(commit)
        assert [(label[4:, :6] == 255).all() for label in found] == [True, True, False, False, False]
        assert all((label[6:, 8:] == 255).all() and (label[:4] == SKY).all() for label in found)
        evidence = commit.json("evidence.json")
        assert evidence["by_class"]["car"] == {
            "predicted": 40, "kept": 0, "kept_share": 0.0, "threshold": 102 / 256
        }  # fmt: skip
        assert any("every pixel of car" in warning for warning in evidence["warnings"])
        assert evidence["by_class"]["tree"]["kept_share"] is None

    def test_class_balanced_keeps_a_share_of_every_class(self, frames: pa.Table, teacher: Commit, work: Any) -> None:
        """Cars: 8 pixels a frame, 40 to 44: 60 % of 40 are the 24 of frames 2 to 4. Sky: all surer than the limit.

        Roads: 40 a frame, of which 24 are unsure. 60 % of 200 are 120: the 80 sure ones, and 40 of the unsure, which
        come in steps of 24 a frame, so those of frames 3 and 4 are kept.
        """
        threshold = Threshold(kind="class_balanced", confidence=0.9, share=0.6)
        attempt = work("pseudo_label")
        commit = run(frames, teacher, attempt, threshold)
        found = labels_of(commit)
        assert [bool((label[6:, 8:] == CAR).all()) for label in found] == [False, False, True, True, True]
        assert [bool((label[4:, :6] == ROAD).all()) for label in found] == [False, False, False, True, True]
        assert all((label[:4] == SKY).all() for label in found)
        by_class = commit.json("evidence.json")["by_class"]
        assert by_class["car"] == {"predicted": 40, "kept": 24, "kept_share": 0.6, "threshold": 42 / 256}
        assert by_class["road"] == {"predicted": 200, "kept": 128, "kept_share": 0.64, "threshold": 103 / 256}
        assert by_class["sky"] == {"predicted": 240, "kept": 240, "kept_share": 1.0, "threshold": 230 / 256}
        assert not (attempt.folder / "drafts").exists()
        evidence = commit.json("evidence.json")
        del evidence["by_class"]
        assert "hardly ever predicts building" in evidence.pop("warnings")[0]
        assert evidence == {
            "teacher": {"name": teacher.name, "key": teacher.key},
            "threshold": {"kind": "class_balanced", "confidence": 0.9, "share": 0.6, "floor": 0.0, "precision": None},
            "frames": 5,
            "pixels": 480,
            "kept_share": 392 / 480,
        }
        assert commit.summary == {"kept_share": 392 / 480, "warnings": 1, "threshold": "class_balanced"}
        assert commit.table("histograms")["class"].to_pylist() == list(CLASSES.classes)

    def test_tables_are_whole(self, frames: pa.Table, teacher: Commit, work: Any) -> None:
        commit = run(frames, teacher, work("pseudo_label"), Threshold(kind="class_balanced", confidence=0.9, share=0.6))
        made, labels = commit.table("frames"), commit.table("labels")
        assert labels.schema == LABELS_SCHEMA
        assert made["frame_id"].to_pylist() == labels["frame_id"].to_pylist() == frames["frame_id"].to_pylist()
        assert set(made["label_encoding"].to_pylist()) == {"train_ids"}
        assert (commit.rows_in, commit.rows_out, commit.quarantined) == (5, 5, 0)
        for row, facts in zip(made.to_pylist(), labels.to_pylist(), strict=True):
            data = (commit.folder / row["label_uri"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == row["label_sha256"]
            confidence = (commit.folder / facts["confidence_uri"]).read_bytes()
            assert hashlib.sha256(confidence).hexdigest() == facts["confidence_sha256"]
            assert decode_label(confidence).shape == (2, 3)
            kept = decode_label(data)
            assert facts["kept"] == (kept != 255).mean()
            assert sum(facts["counts"]) == sum(facts["histogram"]) == 96
            assert facts["kept_counts"] == np.bincount(kept.ravel(), minlength=256)[:11].tolist()
        total = np.array(labels["histogram"].to_pylist()).sum(axis=0).reshape(11, 256)
        assert commit.table("histograms")["histogram"].to_pylist() == total.tolist()

    def test_bad_frames_are_quarantined_under_every_rule(
        self, frames: pa.Table, teacher: Commit, work: Any, frame_file: Any
    ) -> None:
        bad = frame_table([{"frame_id": "night/bad", "uri": frame_file("bad.png", b"").uri}])
        rows = pa.concat_tables([frames.slice(0, 3), bad, frames.slice(3)])
        for kind in ("none", "fixed", "class_balanced"):
            rule = Threshold(kind=kind, confidence=0.1)
            commit = run(rows, teacher, work("pseudo_label", kind), rule, max_bad_fraction=0.5)
            assert (commit.rows_in, commit.rows_out, commit.quarantined) == (6, 5, 1)
            assert commit.table("quarantine")["reason"].to_pylist() == ["zero_bytes"]
            assert commit.table("frames")["frame_id"].to_pylist() == frames["frame_id"].to_pylist()

    @pytest.mark.parametrize("kind", ["none", "class_balanced"])
    def test_too_many_bad_frames_are_refused_and_read_again(
        self, frames: pa.Table, teacher: Commit, work: Any, frame_file: Any, kind: Any
    ) -> None:
        good = Location.of(frames["uri"][0].as_py()).read_bytes()
        mended = frame_file("mended.png", b"")
        rows = pa.concat_tables([frames, frame_table([{"frame_id": "night/mended", "uri": mended.uri}])])
        for attempt in range(2):
            if attempt:
                mended.write_bytes(good)
                commit = run(rows, teacher, work("pseudo_label"), Threshold(kind=kind))
                assert commit.rows_out == 6
            else:
                with pytest.raises(UserError, match=r"1 of 6 frames.*zero_bytes"):
                    run(rows, teacher, work("pseudo_label"), Threshold(kind=kind))

    @pytest.mark.parametrize("kind", ["fixed", "class_balanced"])
    def test_a_run_that_died_anywhere_ends_with_the_same_bytes(
        self, frames: pa.Table, teacher: Commit, work: Any, shards_done: list[str], monkeypatch: Any, kind: Any
    ) -> None:
        threshold = Threshold(kind=kind, confidence=0.4)
        whole = run(frames, teacher, work("pseudo_label", "whole"), threshold)
        num_shards, files = len(shards_done), {}
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
                    run(frames, teacher, work("pseudo_label", f"dies {survive}"), threshold)
            commit = run(frames, teacher, work("pseudo_label", f"dies {survive}"), threshold)
            assert len(shards_done) == num_shards  # no shard was done twice
            files = {output.path: output.sha256 for output in commit.outputs}
            assert files == {output.path: output.sha256 for output in whole.outputs}

    @pytest.mark.parametrize(
        "threshold", [Threshold(kind="none"), Threshold(kind="class_balanced", share=1.0)], ids=lambda t: str(t.kind)
    )
    @pytest.mark.parametrize("act", ["warn", "ignore", "stop"])
    def test_a_later_round_is_watched(
        self, act: Any, threshold: Threshold, frames: pa.Table, teacher: Commit, work: Any
    ) -> None:
        """The first round sees sky on 48 of 96 pixels of its two frames, this one on none; cars stay as they were."""
        first = run(frames.slice(0, 2), teacher, work("pseudo_label", "first"), Threshold(kind="none"))
        rows = []
        for row in frames.to_pylist():
            image = read_image(Location.of(row["uri"]))
            image[..., 0][image[..., 0] == SKY] = ROAD
            Location.of(row["uri"]).write_bytes(encode_png(image))
            rows.append(row | {"sha256": None})
        guard, attempt = Guard(act=act), work("pseudo_label")
        label = partial(run, frame_table(rows), teacher, attempt, threshold, guard=guard, first_round=first)
        if act == "stop":
            with pytest.raises(UserError, match=r"sees sky on 0.00% of the pool, that of the first round on 50.00%"):
                label()
            return
        commit = label()
        warnings = [text for text in commit.json("evidence.json")["warnings"] if "first round" in text]
        assert [text.split(" on ")[0] for text in warnings] == ["the teacher sees sky", "the teacher sees road"]
        assert all(("not learned" in text) == (act == "ignore") for text in warnings)
        thresholds = {name: one["threshold"] for name, one in commit.json("evidence.json")["by_class"].items()}
        assert (thresholds["road"] is None) == (act == "ignore") and thresholds["car"] is not None
        assert {tuple(np.unique(found)) for found in labels_of(commit)} == {
            (ROAD, CAR) if act == "warn" else (CAR, 255)
        }

    def test_nothing_kept_is_an_error(self, frames: pa.Table, teacher: Commit, work: Any) -> None:
        with pytest.raises(UserError, match="keep none of 480 pixels"):
            run(frames, teacher, work("pseudo_label"), Threshold(kind="fixed", confidence=0.99))

    def test_wrong_inputs_are_named(self, frames: pa.Table, teacher: Commit, work: Any) -> None:
        with pytest.raises(UserError, match="there is no frame to label"):
            run(frames.slice(0, 0), teacher, work("pseudo_label"), Threshold())
        with pytest.raises(UserError, match="11 classes of camvid11, but the labels here have the 19"):
            run(frames, teacher, work("pseudo_label"), Threshold(), taxonomy="cityscapes19")


def test_drafts_and_the_network_agree(
    frames: pa.Table, model_commit: Callable[..., Commit], tmp_path: Any, monkeypatch: Any
) -> None:
    """A real network: the labels made from drafts are its argmax wherever its confidence reaches the threshold."""
    from nightseg.segmenter.predict import RowSegmenter, Segmenter

    folder = model_commit(CLASSES).folder / "model"
    drafts, out = Location.of(tmp_path / "drafts"), Location.of(tmp_path / "out")
    tables = Drafter(RowSegmenter(folder, MapCompute(batch=3)))(frames, drafts)
    assert sum(tables["histograms"]["histogram"][0].as_py()) == 5 * 96
    rows = frames
    for name in ("height", "width"):
        rows = rows.set_column(rows.schema.get_field_index(name), name, tables["drafts"][name])
    thresholds = np.linspace(0.05, 0.25, 11).round(2)
    thresholds = np.floor(thresholds * 256) / 256
    made = DraftLabeller(drafts, thresholds, CLASSES)(rows, out)
    segmenter = Segmenter(folder, "cpu")
    for row in made["frames"].to_pylist():
        from nightseg.data.images import read_image

        labels, confidence = segmenter.batch([read_image(Location.of(row["uri"]))])[0]
        wanted = np.where(confidence >= thresholds[labels], labels, 255)
        assert (decode_label((out / row["label_uri"]).read_bytes()) == wanted).all()


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
    teacher, threshold = model_commit(CLASSES), Threshold(kind="class_balanced", confidence=0.5, share=0.5)
    alone = run(frames, teacher, work("pseudo_label", "alone"), threshold)
    assert len(shards_done) == 6
    monkeypatch.undo()
    compute = MapCompute(shard_rows=2, batch=2, actors=1)
    spread = run(frames, teacher, work("pseudo_label", "spread"), threshold, compute=compute)
    assert [(o.path, o.sha256) for o in spread.outputs] == [(o.path, o.sha256) for o in alone.outputs]
