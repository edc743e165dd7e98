"""FrameCache frames are the decoded frames, bit for bit, wherever they are kept and whatever was killed before."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from nightseg.data.class_list import taxonomy
from nightseg.data.images import encode_png
from nightseg.data.table import frame_table
from nightseg.data.taxonomy import Taxonomy
from nightseg.segmenter import data as module
from nightseg.segmenter.data import (
    Batch,
    Decoded,
    FrameCache,
    InMemory,
    LabelledFrames,
    OnDisk,
    Part,
    Reading,
    Sampler,
    cache_for,
    decoded_bytes,
    memory_share,
    training_batches,
)
from nightseg.segmenter.settings import Augmentation, Training
from nightseg.storage import Location, UserError, sha256_of
from nightseg.storage.paths import FAULT_VARIABLE
from nightseg.storage.scratch import Scratch

CLASSES = taxonomy("camvid11")
WHERE = {"size": None, "resize_labels": True}
AUGMENTATION = Augmentation(brightness=0.2, contrast=0.2, saturation=0.2, noise=0.1)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder, here and in the processes that tests start."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> pa.Table:
    rng = np.random.default_rng(0)
    rows = []
    for index in range(5):
        height, width = 30 + index, 40
        image = encode_png(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        label = encode_png(rng.integers(0, 12, (height, width), dtype=np.uint8))
        for name, data in (("image", image), ("label", label)):
            (Location.of(tmp_path) / f"{name}{index}.png").write_bytes(data)
        rows.append(
            {
                "frame_id": f"f{index}",
                "uri": str(tmp_path / f"image{index}.png"),
                "label_uri": str(tmp_path / f"label{index}.png"),
                "label_encoding": "camvid12",
                "sha256": sha256_of(image),
                "label_sha256": sha256_of(label),
                "height": height,
                "width": width,
            }
        )
    return frame_table(rows)


def on_disk(rows: pa.Table, workers: int = 2, **changed: object) -> OnDisk:
    kept = cache_for(rows, CLASSES, **(WHERE | changed), sharers=2, workers=workers)  # type: ignore[arg-type]
    assert isinstance(kept, OnDisk)
    return kept


def views(rows: pa.Table, kept: FrameCache, epochs: int = 2) -> list[Batch]:
    frames = LabelledFrames(rows, CLASSES, size=None, resize_labels=True, cache=kept)
    parts = [Part.whole(len(frames))]
    return [
        batch
        for epoch in range(epochs)
        for batch in training_batches(
            frames,
            parts,
            Sampler(parts).epoch(7, 3, epoch),
            Training(batch=3, crop=(20, 24), augmentation=AUGMENTATION),
            Reading(0, 1, seed=3, epoch=epoch, fill=(9, 8, 7), threads=2, pin_memory=False),
        )
    ]


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in zip(first, second, strict=True)
    )


def test_where_frames_are_kept_changes_no_bit(rows: pa.Table) -> None:
    expected = views(rows, InMemory(0))
    assert same(views(rows, InMemory(1 << 20)), expected)
    assert same(views(rows, InMemory(2 * 40 * 32 * 4)), expected)  # room for two frames
    held = on_disk(rows)  # a second user, so that the files stay
    assert same(views(rows, on_disk(rows)), expected)
    assert same(views(rows, on_disk(rows)), expected)  # from files alone
    held.close()


def test_frames_on_disk_are_decoded_once_for_all_processes(rows: pa.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    held = on_disk(rows)
    views(rows, on_disk(rows))

    def decoded_again(data: bytes) -> None:
        raise AssertionError("decoded twice")

    monkeypatch.setattr(module, "decode_image", decoded_again)
    views(rows, on_disk(rows))
    held.close()


def test_a_frame_keeps_image_and_label_of_their_own_sizes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = Decoded(rng.integers(0, 256, (3, 5, 3), dtype=np.uint8), rng.integers(0, 256, (7, 2), dtype=np.uint8))
    scratch = Scratch.open("x", tmp_path)
    assert scratch is not None
    for kept in (InMemory(1000), OnDisk(scratch)):
        assert kept.get(4) is None
        kept.put(4, frame)
        found = kept.get(4)
        assert found is not None and np.array_equal(found.image, frame.image)
        assert np.array_equal(found.label, frame.label)
        kept.close()


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:20], lambda data: b"", lambda data: b"x" + data[1:]]
)
def test_a_file_that_is_not_a_whole_frame_is_decoded_again(rows: pa.Table, damage: object) -> None:
    expected = views(rows, InMemory(0))
    held = on_disk(rows)
    views(rows, on_disk(rows))
    (folder,) = Path(tempfile.gettempdir()).glob("*/*")
    for file in folder.glob("*.frame"):
        file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    assert held.get(0) is None
    assert same(views(rows, on_disk(rows)), expected)
    assert held.get(0) is not None
    held.close()


PROGRAM = """
import pickle, sys
from nightseg.data.taxonomy import Taxonomy
from nightseg.data.class_list import taxonomy
from nightseg.segmenter.data import LabelledFrames, cache_for
rows, where = pickle.load(open(sys.argv[1], "rb"))
classes = taxonomy("camvid11")
frames = LabelledFrames(rows, classes, **where, cache=cache_for(rows, classes, **where, sharers=2, workers=2))
for index in range(len(frames)):
    frames[index]
"""


def test_after_a_kill_whole_frames_are_used_and_the_torn_one_is_not_there(rows: pa.Table, tmp_path: Path) -> None:
    (tmp_path / "table").write_bytes(pickle.dumps((rows, WHERE)))
    words = [sys.executable, "-c", PROGRAM, str(tmp_path / "table")]
    ended = subprocess.run(words, env=os.environ | {FAULT_VARIABLE: "after:scratch-0000003.frame"}, check=False)
    assert ended.returncode == -9
    kept = on_disk(rows)
    assert [kept.get(row) is not None for row in range(5)] == [True, True, True, False, False]
    plain = LabelledFrames(rows, CLASSES, size=None, resize_labels=True, cache=InMemory(0))
    for row in range(3):
        found = kept.get(row)
        image, label = plain[row]
        assert found is not None and torch.equal(torch.from_numpy(found.image).permute(2, 0, 1), image)
        assert torch.equal(torch.from_numpy(found.label), label)
    assert same(views(rows, kept), views(rows, InMemory(0)))


def test_files_go_when_the_frames_do(rows: pa.Table, temporary: Path) -> None:
    frames = LabelledFrames(rows, CLASSES, size=None, resize_labels=True, cache=on_disk(rows))
    image, _ = frames[0]
    assert list(temporary.glob("*/*/*.frame"))
    before = image.clone()
    del frames
    gc.collect()
    assert not list(temporary.glob("*/*"))
    assert torch.equal(image, before)


def test_memory_for_one_worker_whose_frames_fit_else_files(rows: pa.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    def kind(table: pa.Table, workers: int) -> type[FrameCache]:
        kept = cache_for(table, CLASSES, size=None, resize_labels=True, sharers=2, workers=workers)
        kept.close()
        return type(kept)

    assert kind(rows, 1) is InMemory
    assert kind(rows, 2) is OnDisk
    no_hash = rows.set_column(rows.schema.get_field_index("sha256"), "sha256", [pa.nulls(5, pa.string())])
    assert kind(no_hash, 2) is InMemory
    no_size = rows.set_column(rows.schema.get_field_index("width"), "width", [pa.nulls(5, pa.int32())])
    assert kind(no_size, 1) is OnDisk
    monkeypatch.setattr(module, "memory_share", lambda sharers: 100)
    assert kind(rows, 1) is OnDisk
    monkeypatch.setattr(Scratch, "open", lambda key: None)
    assert kind(rows, 1) is InMemory


def test_files_belong_to_frames_and_settings(rows: pa.Table) -> None:
    first = on_disk(rows)
    first.put(0, Decoded(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.uint8)))
    assert on_disk(rows).get(0) is not None
    other_ids = Taxonomy("other", CLASSES.classes, CLASSES.palette, {"camvid12": {index: 0 for index in range(12)}})
    assert cache_for(rows, other_ids, size=None, resize_labels=True, sharers=2, workers=2).get(0) is None
    for changed in ({"size": (8, 8)}, {"resize_labels": False}):
        assert on_disk(rows, **changed).get(0) is None
    assert on_disk(rows.slice(0, 4)).get(0) is None
    relabelled = rows.set_column(rows.schema.get_field_index("label_encoding"), "label_encoding", [["train_ids"] * 5])
    assert on_disk(relabelled).get(0) is None


def test_bytes_of_all_frames(rows: pa.Table) -> None:
    native = sum((30 + index) * 40 for index in range(5))
    assert decoded_bytes(rows, size=None, resize_labels=True) == 4 * native
    assert decoded_bytes(rows, size=(8, 16), resize_labels=True) == 5 * 4 * 128
    assert decoded_bytes(rows, size=(8, 16), resize_labels=False) == 5 * 3 * 128 + native
    assert memory_share(1) > 100 << 20 and memory_share(4) == memory_share(1) // 4


def test_a_full_disk_only_means_decoding_again(rows: pa.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = views(rows, InMemory(0))
    kept = on_disk(rows)
    monkeypatch.setattr(Scratch, "write", lambda self, name, parts: False)
    assert same(views(rows, kept), expected)


def test_a_changed_frame_is_refused_wherever_frames_are_kept(rows: pa.Table) -> None:
    Location.of(rows["uri"][1].as_py()).write_bytes(encode_png(np.zeros((31, 40, 3), np.uint8)))
    with pytest.raises(UserError, match=r"(?s)f1: .*has changed"):
        views(rows, on_disk(rows))
