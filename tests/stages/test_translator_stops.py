"""What a training of the translator refuses, and what stops it: settings, frames, divergence, collapse."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from nightseg.cluster.settings import TrainCompute
from nightseg.data.table import frame_table
from nightseg.progress import SilentProgress
from nightseg.stages import train_translator as stage
from nightseg.storage import Attempt, UserError, Workspace
from nightseg.unit.settings import UnitWeights
from tests.stages.test_train_translator import TINY, Killed, frames, plan_for, train


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
        ({"weights": UnitWeights()}, r"crop \(16, 16\) is too small for the perceptual loss"),
        ({"discriminator_scales": 2}, r"crop \(16, 16\) is too small.*32 pixels"),
        ({"tile": (80, 200)}, r"tile \(80, 200\) must be multiples of 4, 84 or more"),
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


def test_a_frame_gone_bad_is_named(tmp_path: Path) -> None:
    settings = plan_for(tmp_path)
    (tmp_path / "night" / "1.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"night/1 .*zero_bytes"):
        train(settings)


def test_divergence_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    settings = plan_for(tmp_path, TINY.model_copy(update={"iterations": 9, "checkpoint_every": 2}))
    saved: list[bytes] = []
    with pytest.raises(Killed):
        train(settings, saved, dies_after=2)
    state = torch.load(io.BytesIO(saved[-1]), weights_only=True)
    first = next(iter(state["generators"]))
    state["generators"][first][0] = float("nan")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with pytest.raises(
        UserError, match=r"(?s)iteration 5: it has diverged: the loss .*iteration 4\) is kept.*learning_rate"
    ):
        train(settings, [buffer.getvalue()])


def test_weights_that_are_not_finite_never_become_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage.Plan, "iterations_between_looks", 100)
    step = torch.optim.Adam.step

    def breaks(optimizer: torch.optim.Adam, *arguments: Any) -> Any:
        result = step(optimizer, *arguments)
        optimizer.param_groups[0]["params"][0].data[0] = float("inf")
        return result

    monkeypatch.setattr(torch.optim.Adam, "step", breaks)
    saved: list[bytes] = []
    with pytest.raises(UserError, match="weight"):
        train(plan_for(tmp_path), saved)
    assert saved == []


def with_dead_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Discriminators without weights: their last bias alone learns, and every patch gets the same score."""
    build = stage._networks

    def built(*arguments: Any) -> Any:
        networks = build(*arguments)
        with torch.no_grad():
            for parameter in networks.discriminators.parameters():
                parameter.zero_()
        return networks

    monkeypatch.setattr(stage, "_networks", built)


def test_a_collapsed_discriminator_stops_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_dead_judges(monkeypatch)
    settings = TINY.model_copy(update={"iterations": 9, "checkpoint_every": 2, "collapse_after": 5})
    saved: list[bytes] = []
    words = r"iteration 5: the day discriminator is dead: .* last 5 .*\(iteration 4\) is kept.*collapse_after: null"
    with pytest.raises(UserError, match=words):
        train(plan_for(tmp_path, settings), saved)
    assert torch.load(io.BytesIO(saved[-1]), weights_only=True)["iteration"] == 4
    with pytest.raises(UserError, match="iteration 5: the day discriminator is dead"):
        train(plan_for(tmp_path, settings), saved)  # again, from there
    unguarded = settings.model_copy(update={"collapse_after": None})
    assert train(plan_for(tmp_path, unguarded)).state()["iteration"] == 9


def test_what_is_kept_is_from_before_the_collapse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"iterations": 12, "checkpoint_every": 1, "collapse_after": 3, "discriminator_width": 16}
    settings = TINY.model_copy(update=changes)
    saved: list[bytes] = []
    with pytest.raises(Killed):
        train(plan_for(tmp_path, settings), saved, dies_after=5)
    state = torch.load(io.BytesIO(saved[-1]), weights_only=True)
    for name in state["discriminators"]:
        state["discriminators"][name].zero_()
    state["discriminator_optimizer"]["state"] = {}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    saved = [buffer.getvalue()]
    with pytest.raises(UserError, match=r"iteration 8: .* dead.*\(iteration 5\) is kept"):
        train(plan_for(tmp_path, settings), saved)
    assert len(saved) == 1  # 6 and 7 were no good
    monkeypatch.setattr(stage, "_is_ailing", lambda history, recipe: False)
    with pytest.raises(UserError, match=r"iteration 8: .*\(iteration 7\) is kept"):
        train(plan_for(tmp_path, settings), saved)
