"""The translator's stage on Ray: what it commits, and what a killed worker changes."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nightseg.cluster.settings import TrainCompute
from nightseg.cluster.train import fit
from nightseg.data.images import decode_image
from nightseg.progress import SilentProgress
from nightseg.stages import train_translator as stage
from nightseg.storage import Location, Workspace
from nightseg.unit import loss, train
from nightseg.unit.network import load_generators
from nightseg.unit.settings import LossWeights
from nightseg.unit.train import Plan, sample_sheet
from tests.rounding import rounding
from tests.stages.test_train_translator import attempt_in
from tests.unit.test_train import TINY, frames, run


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_commit_a_model_its_history_and_samples(tmp_path: Path) -> None:
    settings = TINY.model_copy(
        update={
            "perceptual_network": "efficientnet_lite0",
            "weights": LossWeights(),
            "crop": (32, 32),
            "iterations": 5,
            "samples_every": 4,
        }
    )
    day, night = frames(tmp_path, "day", 2, 100, 255), frames(tmp_path, "night", 2, 0, 60)
    attempt = attempt_in(tmp_path)
    commit = stage.train_translator(
        settings, day, night, seed=5, attempt=attempt, compute=TrainCompute(workers=2), progress=SilentProgress()
    )
    assert commit.rows_in == commit.rows_out == 4
    assert [output.path for output in commit.outputs] == [
        "history.json",
        "model/model.json",
        "model/model.safetensors",
        "samples.png",
        "samples/0000004.png",
        "samples/0000005.png",
    ]
    assert commit.file("samples/0000005.png").read_bytes() == commit.file("samples.png").read_bytes()
    assert commit.summary["iteration"] == 5 and commit.summary["perceptual_night"] > 0
    assert commit.json("history.json")[-1]["iteration"] == 5
    card = commit.json("model/model.json")
    assert (card["kind"], card["width"], card["res_blocks"], card["shared_blocks"]) == ("unit", 2, 1, 0)
    generators = load_generators(commit.folder / "model")
    sheet = decode_image(commit.file("samples.png").read_bytes())
    plan = Plan(stage._refs(day), stage._refs(night), settings, 5, 1)
    assert np.array_equal(sheet, sample_sheet(generators, plan.reader(plan.day), plan.reader(plan.night)))
    assert not (attempt.folder / "trainer").exists()

    alone = run({"plan": plan}).state()["history"]
    for row, expected in zip(commit.json("history.json"), alone, strict=True):
        # Adam turns the step of a weight round whose gradient is no more than rounding, one of 10^5 weights or so, and
        # moves it by 4e-3 then: some percent of one weight.
        assert row == pytest.approx(expected, rel=1e-2, abs=1e-3)
    # Sums of all layers of Lite0 and the networks, as if one after another.
    assert commit.json("history.json")[0] == pytest.approx(alone[0], rel=rounding(10**5), abs=rounding(64))


def learn_and_die_once(session: Any, settings: dict[str, Any]) -> None:
    """The loop, in a worker that is killed in the middle of its fifth iteration, the first time."""
    marker = Location.of(settings["plan"].day[0].uri).parent / "died"
    steps, whole_step = 0, loss.generator_step

    def step(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 5 and not marker.exists():
            marker.write_bytes(b"")
            os.kill(os.getpid(), signal.SIGKILL)
        return whole_step(*arguments)

    loss.generator_step = step
    try:
        train.learn(session, settings)
    finally:
        loss.generator_step = whole_step


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_worker_leaves_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    day, night = frames(tmp_path, "day", 2, 100, 255), frames(tmp_path, "night", 2, 0, 60)
    commits = []
    for name in ("undisturbed", "killed"):
        workspace = Workspace(tmp_path / name)
        attempt = workspace.stage("train_translator", "unit", version=1, recipe={}, inputs={}, seed=5).open()
        rest = {"seed": 5, "attempt": attempt, "compute": TrainCompute(), "progress": SilentProgress()}
        commits.append(stage.train_translator(TINY, day, night, **rest))
        monkeypatch.setattr(stage, "fit", functools.partial(fit_another, learn_and_die_once))
    assert (tmp_path / "day" / "died").exists()
    first, second = ({output.path: output.sha256 for output in commit.outputs} for commit in commits)
    assert first.pop("model/model.json") and second.pop("model/model.json")
    assert first == second


def fit_another(loop: Any, _: Any, *arguments: Any, **settings: Any) -> Any:
    return fit(loop, *arguments, **settings)
