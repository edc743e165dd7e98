"""The translator's training loop: exact resume, one curve for two workers, curves and samples."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from nightseg.cluster.train import LocalSession
from nightseg.data.images import decode_image, encode_png
from nightseg.data.table import frame_table
from nightseg.stages import train_translator as stage
from nightseg.storage import Location, sha256_of
from nightseg.unit.data import FrameRef
from nightseg.unit.network import Generators, build_generators
from nightseg.unit.sample_sheet import sample_sheet
from nightseg.unit.settings import Translator, UnitWeights

TINY = Translator(
    day="day",
    night="night",
    width=2,
    res_blocks=1,
    discriminator_width=2,
    discriminator_scales=1,
    weights=UnitWeights(perceptual=0.0),
    iterations=7,
    batch=2,
    short_side=None,
    crop=(16, 16),
    learning_rate=2e-3,
    step_every=3,
    checkpoint_every=3,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Killed(Exception):  # noqa: N818 not an error of the program
    """Stands for SIGKILL."""


class FakeSession:
    """One worker without a cluster. `saved` survives a death; dies when `dies_after` checkpoints were saved."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def __init__(self, saved: list[bytes], dies_after: int = 1000) -> None:
        self.saved = saved
        self.dies_after = dies_after
        self.done: list[int] = []
        self.reports: list[dict[str, float]] = []

    def wrap(self, module: nn.Module) -> nn.Module:
        return module

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def restore(self) -> dict[str, Any] | None:
        return torch.load(io.BytesIO(self.saved[-1]), weights_only=True) if self.saved else None

    def report(self, metrics: Mapping[str, float], state: Mapping[str, Any] | None) -> None:
        self.reports.append(dict(metrics))
        assert (state is not None) == (self.rank == 0)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.saved.append(buffer.getvalue())
        if len(self.saved) >= self.dies_after:
            raise Killed

    def progress(self, done: int, **figures: float) -> None:
        self.done.append(done)

    def state(self) -> dict[str, Any]:
        state = self.restore()
        assert state is not None
        return state


def frames(folder: Path, name: str, count: int, low: int, high: int) -> pa.Table:
    """`count` noise images of 16 x 20 with values between low and high."""
    rows = []
    for index in range(count):
        random = np.random.default_rng([index, low])
        data = encode_png(random.integers(low, high, (16, 20, 3), dtype=np.uint8))
        file = folder / name / f"{index}.png"
        Location.of(file).write_bytes(data)
        row = {"frame_id": f"{name}/{index}", "uri": str(file), "dataset": name, "domain": name}
        rows.append(row | {"width": 20, "height": 16, "bytes": len(data), "sha256": sha256_of(data)})
    return frame_table(rows)


def plan_for(folder: Path, settings: Translator = TINY) -> dict[str, Any]:
    refs = [
        tuple(FrameRef(row["frame_id"], row["uri"], row["height"], row["width"]) for row in table.to_pylist())
        for table in (frames(folder, "day", 3, 100, 255), frames(folder, "night", 2, 0, 60))
    ]
    return {"plan": stage.Plan(refs[0], refs[1], settings, seed=5, threads=1)}


def train(settings: dict[str, Any], saved: list[bytes] | None = None, dies_after: int = 1000) -> FakeSession:
    session = FakeSession([] if saved is None else saved, dies_after)
    stage.learn(session, settings)  # type: ignore[arg-type]
    return session


def assert_same(first: Any, second: Any) -> None:
    """Bit for bit, through nested dictionaries and lists."""
    assert type(first) is type(second)
    if isinstance(first, Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


@pytest.mark.parametrize("dies_after", [1, 2])
def test_a_resumed_training_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_after: int
) -> None:
    monkeypatch.setattr(stage.Plan, "iterations_between_looks", 2)  # checkpoints fall inside a window of the history
    settings = plan_for(tmp_path)
    undisturbed = train(settings)
    saved: list[bytes] = []
    with pytest.raises(Killed):
        train(settings, saved, dies_after)
    resumed = train(settings, saved)
    assert_same(resumed.state(), undisturbed.state())
    assert undisturbed.state()["iteration"] == 7
    assert [row["iteration"] for row in undisturbed.state()["history"]] == [2, 4, 6, 7]
    assert undisturbed.done == [2, 4, 6, 7]
    before = len(saved)
    train(settings, saved)  # nothing left to do
    assert len(saved) == before


def test_curves_change_no_result_and_a_restart_leaves_no_gap(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = plan_for(tmp_path)
    plain = train(settings)
    drawn = {"plan": replace(settings["plan"], journal=Location.of(tmp_path))}
    saved: list[bytes] = []
    with pytest.raises(Killed):
        train(drawn, saved, dies_after=1)
    assert_same(train(drawn, saved).state(), plain.state())
    curves = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(curves.Tags()["scalars"]) == {f"loss/{term}" for term in stage.TERMS}
    points = curves.Scalars("loss/total")
    assert [point.step for point in points] == [1, 2, 3, 4, 5, 6, 7]
    assert [point.value for point in points] == pytest.approx([row["total"] for row in plain.state()["history"]])
    sheets = curves.Images("samples/day_night_night_day")
    assert [sheet.step for sheet in sheets] == [3, 6, 7]
    assert decode_image(sheets[-1].encoded_image_string).shape == (sheets[-1].height, sheets[-1].width, 3)


def test_history_holds_every_term_and_the_learning_rate_is_halved(tmp_path: Path) -> None:
    state = train(plan_for(tmp_path)).state()
    assert set(state["history"][0]) == {"iteration", *stage.TERMS}
    assert all(np.isfinite(list(row.values())).all() for row in state["history"])
    for optimizer in ("generator_optimizer", "discriminator_optimizer"):
        assert state[optimizer]["param_groups"][0]["lr"] == pytest.approx(2e-3 / 4)  # halved after 3 and 6


def first_losses(plan: stage.Plan, world_size: int) -> list[dict[str, float]]:
    """The report of every worker after one iteration; each shows its own share of the mean."""
    once = replace(plan, settings=plan.settings.model_copy(update={"iterations": 1}))
    reports = []
    for rank in range(world_size):
        session = FakeSession([])
        session.rank, session.world_size = rank, world_size
        stage.learn(session, {"plan": once})  # type: ignore[arg-type]
        reports.append(session.reports[-1])
    return reports


def test_two_workers_share_the_global_batch(tmp_path: Path) -> None:
    plan = plan_for(tmp_path)["plan"]
    (alone,), shared = first_losses(plan, 1), first_losses(plan, 2)
    for term in stage.TERMS:
        assert alone[term] == pytest.approx(sum(report[term] for report in shared), rel=1e-4, abs=1e-6)


def test_samples_and_terms_can_be_looked_at_while_it_trains(tmp_path: Path) -> None:
    settings = TINY.model_copy(update={"samples_every": 2, "ema_decay": 0.5, "precision": "float32"})
    plan = plan_for(tmp_path, settings)["plan"]
    folders = [Location.of(tmp_path / "undisturbed"), Location.of(tmp_path / "killed")]
    train({"plan": replace(plan, journal=folders[0])})
    saved: list[bytes] = []
    with pytest.raises(Killed):
        train({"plan": replace(plan, journal=folders[1])}, saved, dies_after=1)
    half = (folders[1] / "history.json").read_json()
    assert [row["iteration"] for row in half] == [1, 2] and set(half[0]) == {"iteration", *stage.TERMS}
    assert not (folders[1] / "samples" / "0000004.png").exists()
    train({"plan": replace(plan, journal=folders[1])}, saved)
    for name in ("samples/0000002.png", "samples/0000004.png", "samples/0000006.png", "samples/0000007.png"):
        first, second = ((folder / name).read_bytes() for folder in folders)
        assert first == second
        assert decode_image(first).shape == (2 * 16 + 2, 4 * 20 + 3 * 2, 3)
    histories = [(folder / "history.json").read_json() for folder in folders]
    assert histories[0] == histories[1] and histories[0][-1]["iteration"] == 7
    other = FakeSession([])
    other.rank = 1
    journal = stage.Journal(other, replace(plan, journal=Location.of(tmp_path / "none")), 0)  # type: ignore[arg-type]
    journal.samples(2, Generators(2, 1), [])
    assert not (tmp_path / "none").exists()


TRAINING = """
import os, signal, sys
import torch
from nightseg.cluster.train import LocalSession
from nightseg.stages import train_translator as stage
from nightseg.storage import Location
sys.path.insert(0, {tests!r})
from test_train_translator import plan_for, TINY
from pathlib import Path

torch.set_num_threads(1)
steps, begun = 0, stage.generator_step

def step(*arguments):
    global steps
    steps += 1
    if steps == {kill_in}:
        os.kill(os.getpid(), signal.SIGKILL)  # the discriminators of this iteration have learnt, the generators not
    return begun(*arguments)

stage.generator_step = step
settings = TINY.model_copy(update={{"ema_decay": 0.9}})
stage.learn(LocalSession(Location.of({folder!r})), plan_for(Path({data!r}), settings))
"""


def test_a_training_that_was_killed_ends_with_the_same_weights(tmp_path: Path) -> None:
    settings = plan_for(tmp_path / "data", TINY.model_copy(update={"ema_decay": 0.9}))
    undisturbed = train(settings).state()
    folder = tmp_path / "trainer"
    words = {"tests": str(Path(__file__).parent), "folder": str(folder), "data": str(tmp_path / "data")}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(kill_in: int) -> int:
        code = TRAINING.format(**words, kill_in=kill_in)
        return subprocess.run([sys.executable, "-c", code], env=environment, timeout=240, check=False).returncode

    assert run(kill_in=5) == -signal.SIGKILL
    assert LocalSession(Location.of(folder)).restore()["iteration"] == 3  # type: ignore[index]
    stage.learn(LocalSession(Location.of(folder)), settings)  # type: ignore[arg-type]
    resumed = LocalSession(Location.of(folder)).restore()
    assert_same(resumed, undisturbed)
    assert weights_hash(resumed) == weights_hash(undisturbed)


def weights_hash(state: dict[str, Any] | None) -> str:
    assert state is not None
    digest = hashlib.sha256()
    for side in ("generators", "averaged", "discriminators"):
        for name, tensor in sorted(state[side].items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def test_what_may_not_be_meant_is_said(tmp_path: Path) -> None:
    plan = plan_for(tmp_path)["plan"]
    progress = SaidProgress()
    stage._say_what_is_odd("unit", plan, progress)  # type: ignore[arg-type]
    assert progress.said == []
    small = replace(plan, settings=TINY.model_copy(update={"crop": (16, 32)}), night=plan.night[:1])
    stage._say_what_is_odd("unit", small, progress)  # type: ignore[arg-type]
    assert [line.partition(" (first")[0] for line in progress.said] == [
        "translator unit: 3 of 3 day frames are smaller than the crop (16, 32) and are enlarged until it fits",
        "translator unit: 1 of 1 night frames are smaller than the crop (16, 32) and are enlarged until it fits",
        "translator unit: there is only one night frame, so its look is all there is to learn",
    ]
    assert "(first day/0, 16 x 20)" in progress.said[0]


class SaidProgress:
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def odd_frames(folder: Path, name: str, pixels: np.ndarray) -> tuple[FrameRef, ...]:
    file = folder / f"{name}.png"
    Location.of(file).write_bytes(encode_png(pixels))
    return (FrameRef(f"{name}/0", str(file), *pixels.shape[:2]),)


@pytest.mark.parametrize("shape", [(16, 20), (16, 16), (5, 9), (1, 1), (16, 20, 3), (3, 40, 3)])
def test_one_image_a_domain_small_or_grey_is_enough(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Frames smaller than the crop are enlarged until it fits; grey ones are taken as colour."""
    random = np.random.default_rng(1)
    day = odd_frames(tmp_path, "day", random.integers(120, 256, shape, dtype=np.uint8))
    night = odd_frames(tmp_path, "night", random.integers(0, 90, shape, dtype=np.uint8))
    plan = stage.Plan(day, night, TINY, seed=5, threads=1)
    state = train({"plan": plan}).state()
    assert state["iteration"] == 7 and np.isfinite([list(row.values()) for row in state["history"]]).all()
    sheet = decode_image(plan.sample_sheet(build_generators(2, 1, state["averaged"])))
    assert sheet.shape[0] >= 16 and sheet.shape[2] == 3
    if len(shape) == 2:
        image = plan.reader(day).read(0)
        assert np.array_equal(image[..., 0], image[..., 1]) and np.array_equal(image[..., 0], image[..., 2])


def test_the_sample_sheet_shows_both_directions(tmp_path: Path) -> None:
    plan = plan_for(tmp_path)["plan"]
    generators = Generators(2, 1).eval()
    sheet = sample_sheet(generators, plan.reader(plan.day), plan.reader(plan.night))
    assert sheet.shape == (2 * 16 + 2, 4 * 20 + 3 * 2, 3)  # two rows: there are two night frames
    with torch.no_grad():
        assert np.array_equal(sheet[:16, :20], plan.reader(plan.day).read(0))
    assert np.array_equal(sheet[:16, 44:64], plan.reader(plan.night).read(0))
    assert not np.array_equal(sheet[:16, 22:42], sheet[:16, :20])
