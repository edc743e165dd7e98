"""The translator's training loop: exact resume, one curve for two workers, divergence, and the whole stage."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from nightseg.config import TrainCompute, Translator, UnitWeights
from nightseg.frames.images import decode_image, encode_png
from nightseg.frames.table import frame_table
from nightseg.learning.sample_sheet import sample_sheet
from nightseg.learning.unpaired import FrameRef
from nightseg.networks.unit import Generators, load_generators
from nightseg.progress import SilentProgress
from nightseg.stages import train_translator as stage
from nightseg.storage import Location, UserError, sha256_of
from nightseg.workspace import Attempt, Workspace

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
    with pytest.raises(UserError, match=r"(?s)diverged.*iteration 5\..*iteration 4\) is kept.*learning_rate"):
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


def test_a_frame_gone_bad_is_named(tmp_path: Path) -> None:
    settings = plan_for(tmp_path)
    (tmp_path / "night" / "1.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"night/1 .*zero_bytes"):
        train(settings)


def test_the_sample_sheet_shows_both_directions(tmp_path: Path) -> None:
    plan = plan_for(tmp_path)["plan"]
    generators = Generators(2, 1).eval()
    sheet = sample_sheet(generators, plan.reader(plan.day), plan.reader(plan.night))
    assert sheet.shape == (2 * 16 + 2, 4 * 20 + 3 * 2, 3)  # two rows: there are two night frames
    with torch.no_grad():
        assert np.array_equal(sheet[:16, :20], plan.reader(plan.day).read(0))
    assert np.array_equal(sheet[:16, 44:64], plan.reader(plan.night).read(0))
    assert not np.array_equal(sheet[:16, 22:42], sheet[:16, :20])


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


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_commit_a_model_its_history_and_samples(tmp_path: Path) -> None:
    settings = TINY.model_copy(
        update={
            "perceptual_network": "efficientnet_lite0",
            "weights": UnitWeights(),
            "crop": (32, 32),
            "iterations": 2,
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
    ]
    assert commit.summary["iteration"] == 2 and commit.summary["perceptual_night"] > 0
    assert commit.json("history.json")[-1]["iteration"] == 2
    card = commit.json("model/model.json")
    assert (card["kind"], card["width"], card["res_blocks"]) == ("unit", 2, 1)
    generators = load_generators(commit.folder / "model")
    sheet = decode_image(commit.file("samples.png").read_bytes())
    plan = stage.Plan(stage._refs(day), stage._refs(night), settings, 5, 1)
    assert np.array_equal(sheet, sample_sheet(generators, plan.reader(plan.day), plan.reader(plan.night)))
    assert not (attempt.folder / "trainer").exists()

    alone = train({"plan": plan}).state()["history"]
    for row, expected in zip(commit.json("history.json"), alone, strict=True):
        assert row == pytest.approx(expected, rel=1e-2, abs=1e-3)  # the second step amplifies rounding (Adam)
    assert commit.json("history.json")[0] == pytest.approx(alone[0], rel=1e-4, abs=1e-6)


def test_the_model_is_the_running_mean_of_the_generators() -> None:
    settings = Translator(day="day", night="night", width=2, res_blocks=1, discriminator_width=2)
    networks = stage.build_networks(settings, 0, torch.device("cpu"))
    weights = next(networks.generators.parameters())
    begun, steps = weights.detach().clone(), (1.0, 3.0)
    for step in steps:
        with torch.no_grad():
            weights.copy_(begun + step)
        stage._average(networks, 0.75)
    # 0.75 (0.75 b + 0.25 (b + 1)) + 0.25 (b + 3) = b + 0.9375
    torch.testing.assert_close(next(networks.averaged.parameters()), begun + 0.9375)
    stage._average(networks, 0.0)
    torch.testing.assert_close(next(networks.averaged.parameters()), begun + 3.0)
