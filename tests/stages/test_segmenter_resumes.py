"""A training that was killed and goes on ends as an undisturbed one, whatever it was doing; damaged checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from nightseg.data.class_list import taxonomy
from nightseg.data.images import decode_image
from nightseg.segmenter import train as training_loop
from nightseg.segmenter.settings import Loss
from nightseg.segmenter.train import Plan
from nightseg.storage import Location
from tests.stages.test_train_segmenter import TRAINING, Killed, Session, assert_same, plan_for, train, write_frames


def test_resumed_training_is_bit_for_bit_the_uninterrupted_one(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    rows = write_frames(Location.of(tmp_path) / "frames", 6)
    plan = plan_for(rows, tmp_path, validate=rows.slice(0, 2))
    expected = train(Session(tmp_path / "whole"), plan)
    with pytest.raises(Killed):
        train(Session(tmp_path / "killed", die_after=1), plan)
    resumed = Session(tmp_path / "killed")
    found = train(resumed, plan)

    assert_same(found, expected)
    assert [metrics["epoch"] for metrics in resumed.history] == [1, 2]
    assert found["pace"]["frames"] == 12


EVERYTHING = TRAINING.model_copy(
    update={"steps_per_epoch": 5, "checkpoint_every": 2, "ema_decay": 0.9, "clip_norm": 1.0, "encoder_rate": 0.3}
    | {"decay": "step", "decay_at": [0.5], "accumulate": 2, "freeze_batch_norm": False, "keep": "best"}
)
ALL_LOSSES = Loss.model_validate(
    {"kind": "combined", "class_weights": {"car": 3.0}, "ohem": {"share": 0.5}, "loss_chunk_rows": 16}
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Session]:
    """A training with everything that has a state, and how it ends if nothing happens to it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("undisturbed")
    rows = write_frames(Location.of(folder) / "frames", 6)
    plan = plan_for(rows, folder, EVERYTHING, rows.slice(0, 2), ALL_LOSSES)
    plan = dataclasses.replace(plan, curves=Location.of(folder) / "tensorboard")
    session = Session(folder / "trainer")
    train(session, plan)
    return plan, session


@pytest.mark.parametrize("reports", [2, 3, 4])
def test_a_training_resumed_within_an_epoch_ends_with_the_same_bits(
    undisturbed: tuple[Plan, Session], tmp_path: Path, reports: int
) -> None:
    """Checkpoints after steps 2, 4, 5 (the end of the epoch), 6, 8, 10. Only the undisturbed one draws curves."""
    plan, whole = undisturbed
    plan, expected = dataclasses.replace(plan, curves=None), whole.state
    assert [metrics.get("step") for metrics in whole.history] == [2, 4, None, 6, 8, None]
    assert expected["step"] == 10 and len(expected["history"]) == 2
    with pytest.raises(Killed):
        train(Session(tmp_path / "killed", die_after=reports), plan)
    resumed = Session(tmp_path / "killed")
    assert_same(train(resumed, plan), expected)
    assert resumed.history == whole.history


def test_how_often_it_is_saved_changes_nothing(
    undisturbed: tuple[Plan, Session], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, often = undisturbed
    training = plan.training.model_copy(update={"checkpoint_every": None})
    plan = dataclasses.replace(plan, curves=None, training=training)
    session, expected = Session(tmp_path / "rarely"), often.state
    assert_same(train(session, plan), expected)
    assert [metrics["epoch"] for metrics in session.history] == [1, 2]

    monkeypatch.setattr(training_loop, "STEPS_BETWEEN_READS", 3)
    monkeypatch.setattr(training_loop, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)  # as if an epoch took hours
    by_clock = Session(tmp_path / "clock")
    assert_same(train(by_clock, plan), expected)
    assert [metrics.get("step") for metrics in by_clock.history] == [3, None, 8, None]


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    undisturbed: tuple[Plan, Session], tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    plan, whole = undisturbed
    plan = dataclasses.replace(plan, curves=None)
    with pytest.raises(Killed):
        train(Session(tmp_path / "killed", die_after=4), plan)
    newest = Location.of(tmp_path / "killed") / "report-00000004/state.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(bytes(data[: len(data) // 2]) if damage == "cut" else bytes(data))
    assert_same(train(Session(tmp_path / "killed"), plan), whole.state)
    assert "report-00000004 is damaged and left out" in caplog.text


def test_curves_of_a_resumed_training_are_those_of_an_undisturbed_one(
    undisturbed: tuple[Plan, Session], tmp_path: Path
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first, _ = undisturbed
    plan = dataclasses.replace(first, curves=Location.of(tmp_path / "tensorboard"))
    with pytest.raises(Killed):
        train(Session(tmp_path / "killed", die_after=2), plan)
    train(Session(tmp_path / "killed"), plan)
    whole, resumed = (accumulator.EventAccumulator(one.curves.uri).Reload() for one in (first, plan) if one.curves)
    tags = whole.Tags()["scalars"]
    assert {"train/loss", "train/learning_rate", "train/gradient_norm", "pace/images_per_second"} <= set(tags)
    assert {"pace/data_wait_share", "validation/miou", "iou/sky"} <= set(tags)
    for tag in tags:
        if not tag.startswith("pace/"):  # times differ
            points = [[(event.step, event.value) for event in found.Scalars(tag)] for found in (whole, resumed)]
            assert points[0] == points[1], tag
    assert [event.step for event in resumed.Scalars("train/loss")] == [2, 4, 5, 6, 8, 10]
    pictures = resumed.Images("validation/frame_label_prediction")
    assert [picture.step for picture in pictures] == [5, 10]
    sheet = decode_image(pictures[0].encoded_image_string)
    assert sheet.shape == (2 * 64 + 2, 3 * 64 + 4, 3)  # two frames; image, label, prediction at the input size
    sky, road = (np.array(colour) for colour in (taxonomy("camvid11").palette[0], taxonomy("camvid11").palette[3]))
    assert (sheet[0, 66:130] == sky).all() and (sheet[63, 66:130] == road).all()
