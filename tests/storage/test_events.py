"""Event files as TensorBoard itself reads them; a successor leaves no step twice and no gap."""

from __future__ import annotations

import secrets
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboardX.record_writer import masked_crc32c

from nightseg.data.images import encode_png
from nightseg.storage import Location, events
from nightseg.storage.events import Curves


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "s3":
        return Location.of(request.getfixturevalue("s3").place(secrets.token_hex(4))) / "curves"
    return Location.of(tmp_path) / "curves"


def read(folder: Location) -> Any:
    """As TensorBoard reads it, from a local copy: it knows no store by itself."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with tempfile.TemporaryDirectory() as copy:
        for entry in folder.list():
            (Path(copy) / entry.name).write_bytes((folder / entry.name).read_bytes())
        found = accumulator.EventAccumulator(copy)
        return found.Reload()


def points(folder: Location, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def names(folder: Location) -> list[str]:
    return [entry.name for entry in folder.list()]


def test_nothing_is_written_before_there_is_something(folder: Location) -> None:
    curves = Curves(folder)
    curves.scalars(1, {})
    curves.flush()
    assert not folder.exists()


def test_tensorboard_reads_the_curves_in_order(folder: Location) -> None:
    curves = Curves(folder)
    for step in (10, 20, 30):
        curves.scalars(step, {"loss": 1 / step, "iou/traffic light": 0.5})
        if step != 10:
            curves.flush()
    assert names(folder) == ["events.out.tfevents.0000000020.000", "events.out.tfevents.0000000030.000"]
    steps, losses = zip(*points(folder, "loss"), strict=True)
    assert steps == (10, 20, 30) and losses == pytest.approx((0.1, 0.05, 1 / 30), rel=1e-6)
    assert points(folder, "iou/traffic light") == [(10, 0.5), (20, 0.5), (30, 0.5)]


def test_tensorboard_reads_the_pictures(folder: Location) -> None:
    png = encode_png(np.full((4, 6, 3), 7, np.uint8))
    curves = Curves(folder)
    curves.picture(5, "frames", png, 4, 6)
    curves.flush()
    (picture,) = read(folder).Images("frames")
    assert (picture.step, picture.height, picture.width) == (5, 4, 6)
    assert picture.encoded_image_string == png


def test_who_continues_after_a_step_removes_what_was_later(folder: Location) -> None:
    first = Curves(folder)
    for step in (1, 2, 3, 4):
        first.scalars(step, {"loss": float(step)})
        first.flush()
    (folder / "note.txt").write_bytes(b"mine")
    second = Curves(folder, step=2)
    assert names(folder) == ["events.out.tfevents.0000000001.000", "events.out.tfevents.0000000002.000", "note.txt"]
    second.scalars(3, {"loss": 30.0})
    second.flush()
    assert points(folder, "loss") == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_those_who_watch_see_it_at_times(folder: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(events.time, "monotonic", lambda: now[0])
    curves = Curves(folder)
    for second in range(0, 100, 10):
        now[0] = float(second)
        curves.scalars(second, {"loss": 1.0})
        curves.flush_if_due()
    assert [name[-6:-4] for name in names(folder)] == ["30", "60", "90"]
    now[0] = 10_000.0  # after so long, only every 200 seconds
    curves.flush()
    for second in range(10_010, 10_430, 10):
        now[0] = float(second)
        curves.scalars(second, {"loss": 1.0})
        curves.flush_if_due()
    assert [int(name[-9:-4]) for name in names(folder)][-2:] == [10_210, 10_420]


def test_a_record_is_framed_as_the_format_says(folder: Location) -> None:
    """Length, its checksum, content, its checksum; the checksum of nothing is known."""
    assert masked_crc32c(b"") == 0xA282EAD8
    assert masked_crc32c(b"123456789") == (((0xE3069283 >> 15) | (0xE3069283 << 17)) + 0xA282EAD8) & 0xFFFFFFFF
    curves = Curves(folder)
    curves.scalars(1, {"loss": 1.0})
    curves.flush()
    data, found = (folder / names(folder)[0]).read_bytes(), 0
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        assert data[8:12] == struct.pack("<I", masked_crc32c(data[:8]))
        assert data[12 + length : 16 + length] == struct.pack("<I", masked_crc32c(data[12 : 12 + length]))
        data, found = data[16 + length :], found + 1
    assert found == 2


def test_two_flushes_at_one_step_keep_both_and_so_does_a_restart(tmp_path: Path) -> None:
    folder = Location.of(tmp_path)
    for value in (1.0, 2.0):
        curves = Curves(folder, 10)
        curves.scalars(10, {"train/loss": value})
        curves.flush()
        curves.scalars(10, {"validation/miou": value})
        curves.flush()
    assert names(folder) == [f"events.out.tfevents.0000000010.{part:03d}" for part in range(4)]


@pytest.mark.parametrize(("is_success", "status"), [(True, "STATUS_SUCCESS"), (False, "STATUS_FAILURE")])
def test_tensorboard_knows_what_a_folder_is_a_trial_of(folder: Location, is_success: bool, status: str) -> None:
    """Values and score of its table of hyperparameters; before the end, too."""
    metadata = pytest.importorskip("tensorboard.plugins.hparams.metadata")
    api = pytest.importorskip("tensorboard.plugins.hparams.api_pb2")
    curves = Curves(folder)
    curves.begin({"alpha": 0.5, "count": 120, "kind": "focal", "flip": True}, ["miou"])
    curves.flush()

    def told() -> Any:
        return read(folder).summary_metadata

    assert "_hparams_/session_end_info" not in told()
    curves.scalars(1, {"miou": 0.25})
    curves.end(is_success)
    contents = {tag: summary.plugin_data.content for tag, summary in told().items()}
    begun = metadata.parse_session_start_info_plugin_data(contents["_hparams_/session_start_info"]).hparams
    assert (begun["alpha"].number_value, begun["count"].number_value) == (0.5, 120)
    assert (begun["kind"].string_value, begun["flip"].bool_value) == ("focal", True)
    experiment = metadata.parse_experiment_plugin_data(contents["_hparams_/experiment"])
    assert [one.name.tag for one in experiment.metric_infos] == ["miou"]
    ended = metadata.parse_session_end_info_plugin_data(contents["_hparams_/session_end_info"])
    assert ended.status == api.Status.Value(status)
    assert points(folder, "miou") == [(1, 0.25)]
