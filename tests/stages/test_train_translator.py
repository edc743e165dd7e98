"""What the stage of the translator refuses before it trains, and what it warns of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nightseg.cluster.settings import TrainCompute
from nightseg.data.table import frame_table
from nightseg.progress import SilentProgress
from nightseg.stages import train_translator as stage
from nightseg.storage import Attempt, UserError, Workspace
from nightseg.unit.settings import LossWeights
from tests.unit.test_train import TINY, frames, plan_for


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def attempt_in(folder: Path) -> Attempt:
    workspace = Workspace(folder / "run")
    return workspace.stage("train_translator", "unit", version=1, recipe={}, inputs={}, seed=5).open()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 3}, "batch 3 cannot be shared evenly by 2 workers"),
        ({"crop": (18, 16)}, "multiples of 4"),
        ({"crop": (16, 18)}, "multiples of 4"),
        ({"weights": LossWeights()}, r"crop \(16, 16\) is too small for the perceptual loss"),
        ({"discriminator_scales": 2}, r"crop \(16, 16\) is too small.*32 pixels"),
        ({"crop": (64, 16), "weights": LossWeights()}, r"crop \(64, 16\) is too small for the perceptual loss"),
        ({"crop": (16, 64), "discriminator_scales": 2}, r"crop \(16, 64\) is too small.*32 pixels"),
        ({"tile": (80, 200)}, r"tile: .*\(80, 200\) must be multiples of 4, 84 or more"),
        ({"tile": (86, 200)}, "multiples of 4"),
    ],
)
def test_settings_that_cannot_train_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    day, night = frames(tmp_path, "day", 1, 100, 255), frames(tmp_path, "night", 1, 0, 60)
    with pytest.raises(UserError, match=message):
        stage.train_translator(
            TINY.model_copy(update=change),
            day,
            night,
            seed=0,
            attempt=attempt_in(tmp_path),
            compute=TrainCompute(workers=2),
            progress=SilentProgress(),
        )


def test_an_empty_domain_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="night dataset night holds no frame"):
        stage.train_translator(
            TINY,
            frames(tmp_path, "day", 1, 100, 255),
            frame_table([]),
            seed=0,
            attempt=attempt_in(tmp_path),
            compute=TrainCompute(),
            progress=SilentProgress(),
        )


def test_what_may_not_be_meant_is_said(tmp_path: Path) -> None:
    plan = plan_for(tmp_path)["plan"]
    progress = SaidProgress()
    stage._warn("unit", plan, progress)  # type: ignore[arg-type]
    assert progress.said == []
    small = replace(plan, settings=TINY.model_copy(update={"crop": (16, 32)}), night=plan.night[:1])
    stage._warn("unit", small, progress)  # type: ignore[arg-type]
    assert [line.partition(" (first")[0] for line in progress.said] == [
        "translator unit: 3 of 3 day frames are smaller than the crop (16, 32) and are enlarged until it fits",
        "translator unit: 1 of 1 night frames are smaller than the crop (16, 32) and are enlarged until it fits",
        "translator unit: there is only one night frame, so that is all there is to learn",
    ]
    assert "(first day/0, 16 x 20)" in progress.said[0]


class SaidProgress:
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)
