"""What cannot train is refused before anything starts, with the cure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from nightseg.cluster.settings import TrainCompute
from nightseg.data.class_list import taxonomy
from nightseg.data.images import encode_png
from nightseg.data.table import frame_table
from nightseg.errors import UserError
from nightseg.segmenter.data import Part
from nightseg.segmenter.settings import Loss, Network, Ohem, Training
from nightseg.segmenter.train import Plan
from nightseg.stages.train_segmenter import check_training
from nightseg.storage import Location

TRAINING = Training(batch=2, epochs=2, warmup_steps=2, crop=(64, 64))


def rows(*labels: str | None) -> pa.Table:
    return frame_table(
        [
            {
                "frame_id": f"toy/{n}",
                "uri": f"/{n}.png",
                "label_uri": label,
                "label_encoding": "camvid12",
                "width": 80,
                "height": 64,
            }
            for n, label in enumerate(labels)
        ]
    )


def accept(
    train: pa.Table,
    validate: pa.Table | None = None,
    workers: int = 1,
    gpus: float = 0.0,
    norm: Any = "batch",
    **changed: Any,
) -> None:
    network = Network(encoder="efficientnet_lite0", input_size=(64, 64), norm=norm)
    training = TRAINING.model_copy(update={"steps_per_epoch": 3, **changed})
    plan = Plan(
        train,
        (Part.whole(train.num_rows),),
        validate,
        Location.of("nowhere"),
        taxonomy("camvid11"),
        network,
        Loss(),
        training,
        seed=0,
    )
    check_training("student", plan, TrainCompute(workers=workers, gpus_per_worker=gpus))


def refusal(train: pa.Table, *rest: Any, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        accept(train, *rest, **more)
    return str(caught.value)


def test_frames_that_cannot_be_learned_from() -> None:
    good, bare = rows("a", "b"), rows(None, "x")
    assert "student, train: 1 of 2 frames have no label (first toy/0)" in refusal(bare)
    assert "self_training.pool" in refusal(good, bare)
    assert "hold no frame" in refusal(good.slice(0, 0))


def test_labels_of_ignored_pixels_only(tmp_path: Path) -> None:
    """A set that was drawn from a good one, such as its night frames, may have them."""
    for name, value in (("void", 11), ("road", 3)):
        (tmp_path / f"{name}.png").write_bytes(encode_png(np.full((4, 4), value, np.uint8)))
    void, road = str(tmp_path / "void.png"), str(tmp_path / "road.png")
    assert "student, train: none of the 2 labels has a pixel with a class" in refusal(rows(void, void))
    assert "student, validate_on: none of the 1 labels" in refusal(rows(void, road), rows(void))


def test_settings_that_contradict_each_other() -> None:
    good = rows("a", "b")
    assert "set training.warmup_steps to 0 or so" in refusal(good, warmup_steps=6)
    assert "multiple of 2" in refusal(good, workers=2, batch=3)
    assert "2 in 3 parts each (training.accumulate). Cure: choose a batch that is a multiple of 6" in refusal(
        good, workers=2, batch=9, accumulate=3
    )
    assert "set training.crop to (64, 64)" in refusal(good, crop=(160, 64))
    assert "set training.crop to (64, 64)" in refusal(good, crop=(64, 160))
    assert "norm sync is computed by GPUs only" in refusal(good, workers=2, norm="sync")
    accept(good, warmup_steps=5)  # of 6 steps
    assert "keep is best, and it has no validation frames" in refusal(good, keep="best")
    assert "keep is best, and it has no validation frames" in refusal(good, good.slice(0, 0), keep="best")
    accept(good, good, keep="best")
    accept(good, crop=(96, 96))  # 1.5 times 64: as large as a frame becomes
    accept(good, workers=1, norm="sync")
    accept(good, workers=2, gpus=1.0, norm="sync")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 4, "accumulate": 3}, "cannot be taken in 3 equal parts"),
        ({"decay_at": [0.9, 0.5]}, "the shares must rise"),
        ({"ema_decay": 1.0}, "less than 1"),
        ({"clip_norm": 0.0}, "greater than 0"),
    ],
)
def test_trainings_that_mean_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Training(**settings)


def test_one_rule_of_ohem_and_chunks_of_whole_logit_rows() -> None:
    for wrong in ({}, {"share": 0.5, "confidence": 0.5}):
        with pytest.raises(ValueError, match="exactly one of share and confidence"):
            Ohem(**wrong)
    with pytest.raises(ValueError, match="multiple of 4"):
        Loss(loss_chunk_rows=30)


def test_values_by_class() -> None:
    classes = taxonomy("camvid11")
    assert classes.per_class({"pole": 3.0}, default=1.0)[:4] == (1.0, 1.0, 3.0, 1.0)
    assert classes.per_class([float(n) for n in range(11)], default=1.0)[10] == 10.0
    with pytest.raises(UserError, match=r"camvid11 has no class 'pol', did you mean 'pole'\?"):
        classes.per_class({"pol": 3.0}, default=1.0)
    with pytest.raises(UserError, match="3 values for the 11 classes"):
        classes.per_class([1.0, 2.0, 3.0], default=1.0)
