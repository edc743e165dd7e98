"""The translator's training loop: exact resume, one curve for two workers, curves and samples."""

from __future__ import annotations

import hashlib
import io
import math
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
from nightseg.storage import Location, UserError, sha256_of
from nightseg.unit import loss, train
from nightseg.unit.data import FrameRef
from nightseg.unit.loss import TERMS
from nightseg.unit.network import Generators, build_generators
from nightseg.unit.settings import LossWeights, Translator
from nightseg.unit.train import Log, Plan, collapsed, failing, learn, not_finite, sample_sheet
from tests.rounding import assert_near, rounding

CHANCE = 1.5  # least squares, three scales

TINY = Translator(
    day="day",
    night="night",
    width=2,
    res_blocks=1,
    discriminator_width=2,
    discriminator_scales=1,
    weights=LossWeights(perceptual=0.0),
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

    rank, world_size, workers, device = 0, 1, 1, torch.device("cpu")

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
    return {"plan": Plan(refs[0], refs[1], settings, seed=5, threads=1)}


def run(settings: dict[str, Any], saved: list[bytes] | None = None, dies_after: int = 1000) -> FakeSession:
    session = FakeSession([] if saved is None else saved, dies_after)
    learn(session, settings)  # type: ignore[arg-type]
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
    monkeypatch.setattr(Plan, "iterations_a_row", 2)  # checkpoints fall inside a window of the history
    settings = plan_for(tmp_path)
    undisturbed = run(settings)
    saved: list[bytes] = []
    with pytest.raises(Killed):
        run(settings, saved, dies_after)
    resumed = run(settings, saved)
    assert_same(resumed.state(), undisturbed.state())
    assert undisturbed.state()["iteration"] == 7
    assert [row["iteration"] for row in undisturbed.state()["history"]] == [2, 4, 6, 7]
    assert undisturbed.done == [2, 4, 6, 7]
    before = len(saved)
    run(settings, saved)  # nothing left to do
    assert len(saved) == before


def test_curves_change_no_result_and_a_restart_leaves_no_gap(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = plan_for(tmp_path)
    plain = run(settings)
    drawn = {"plan": replace(settings["plan"], log=Location.of(tmp_path))}
    saved: list[bytes] = []
    with pytest.raises(Killed):
        run(drawn, saved, dies_after=1)
    assert_same(run(drawn, saved).state(), plain.state())
    curves = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(curves.Tags()["scalars"]) == {f"loss/{term}" for term in TERMS}
    points = curves.Scalars("loss/total")
    assert [point.step for point in points] == [1, 2, 3, 4, 5, 6, 7]
    # written as float32
    assert [np.float32(row["total"]) for row in plain.state()["history"]] == [point.value for point in points]
    sheets = curves.Images("samples/day_night_night_day")
    assert [sheet.step for sheet in sheets] == [3, 6, 7]
    assert decode_image(sheets[-1].encoded_image_string).shape == (sheets[-1].height, sheets[-1].width, 3)


def test_history_holds_every_term_and_the_learning_rate_is_halved(tmp_path: Path) -> None:
    state = run(plan_for(tmp_path)).state()
    assert set(state["history"][0]) == {"iteration", *TERMS}
    assert all(np.isfinite(list(row.values())).all() for row in state["history"])
    for optimizer in ("generator_optimizer", "discriminator_optimizer"):
        assert state[optimizer]["param_groups"][0]["lr"] == pytest.approx(2e-3 / 4)  # halved after 3 and 6


def test_the_ema_is_warmed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EMA of step 0, 1, ... with decay min(ema_decay, (1 + step) / (10 + step)), computed here from the weights."""
    seen: list[Tensor] = []
    step = loss.generator_step

    def remembers(networks: Any, *arguments: Any) -> Any:
        if not seen:
            seen.append(next(networks.generators.parameters()).detach().clone())
        losses = step(networks, *arguments)
        seen.append(next(networks.generators.parameters()).detach().clone())
        return losses

    monkeypatch.setattr(loss, "generator_step", remembers)
    state = run(plan_for(tmp_path, TINY.model_copy(update={"ema_decay": 0.9}))).state()
    expected = seen[0].double()
    for index, weights in enumerate(seen[1:]):
        decay = min(0.9, (1 + index) / (10 + index))
        expected = decay * expected + (1 - decay) * weights.double()
    found = state["ema"][next(iter(state["ema"]))]
    assert_near(found, expected, terms=7 * 4, magnitude=1.0)  # each step rounds a value below 1 a few times
    assert not torch.equal(found, seen[-1])


def first_losses(plan: Plan, world_size: int, workers: int | None = None) -> list[dict[str, float]]:
    """The report of every worker after one iteration; each shows its own share of the mean. Asked were `workers`."""
    once = replace(plan, settings=plan.settings.model_copy(update={"iterations": 1}))
    reports = []
    for rank in range(world_size):
        session = FakeSession([])
        session.rank, session.world_size, session.workers = rank, world_size, workers or world_size
        learn(session, {"plan": once})  # type: ignore[arg-type]
        reports.append(session.reports[-1])
    return reports


def test_two_workers_share_the_global_batch(tmp_path: Path) -> None:
    plan = plan_for(tmp_path)["plan"]
    (alone,), shared = first_losses(plan, 1), first_losses(plan, 2)
    # Means of up to 2 * 3 * 16 * 20 pixels, of networks of some ten layers with sums of up to 200.
    near = rounding(2000 + 2000)
    for term in TERMS:
        assert alone[term] == pytest.approx(sum(report[term] for report in shared), rel=near, abs=near)


def test_who_has_lost_the_other_worker_takes_the_global_batch_in_two_parts(tmp_path: Path) -> None:
    plan = plan_for(tmp_path)["plan"]
    (alone,), (left,) = first_losses(plan, 1), first_losses(plan, 1, workers=2)
    near = rounding(2000 + 2000)  # as above
    for term in TERMS:
        assert left[term] == pytest.approx(alone[term], rel=near, abs=near)


def test_samples_and_terms_can_be_looked_at_while_it_trains(tmp_path: Path) -> None:
    settings = TINY.model_copy(update={"samples_every": 2, "ema_decay": 0.5, "precision": "float32"})
    plan = plan_for(tmp_path, settings)["plan"]
    folders = [Location.of(tmp_path / "undisturbed"), Location.of(tmp_path / "killed")]
    run({"plan": replace(plan, log=folders[0])})
    saved: list[bytes] = []
    with pytest.raises(Killed):
        run({"plan": replace(plan, log=folders[1])}, saved, dies_after=1)
    half = (folders[1] / "history.json").read_json()
    assert [row["iteration"] for row in half] == [1, 2] and set(half[0]) == {"iteration", *TERMS}
    assert not (folders[1] / "samples" / "0000004.png").exists()
    run({"plan": replace(plan, log=folders[1])}, saved)
    for name in ("samples/0000002.png", "samples/0000004.png", "samples/0000006.png", "samples/0000007.png"):
        first, second = ((folder / name).read_bytes() for folder in folders)
        assert first == second
        assert decode_image(first).shape == (2 * 16 + 2, 4 * 20 + 3 * 2, 3)
    histories = [(folder / "history.json").read_json() for folder in folders]
    assert histories[0] == histories[1] and histories[0][-1]["iteration"] == 7
    other = FakeSession([])
    other.rank = 1
    log = Log(other, replace(plan, log=Location.of(tmp_path / "none")), 0)  # type: ignore[arg-type]
    log.samples(2, Generators(2, 1), [])
    assert not (tmp_path / "none").exists()


TRAINING = """
import os, signal, sys
import torch
from nightseg.cluster.train import LocalSession
from nightseg.storage import Location
from nightseg.unit import loss, train
sys.path.insert(0, {tests!r})
from tests.unit.test_train import plan_for, TINY
from pathlib import Path

torch.set_num_threads(1)
steps, begun = 0, loss.generator_step

def step(*arguments):
    global steps
    steps += 1
    if steps == {kill_in}:
        os.kill(os.getpid(), signal.SIGKILL)  # the discriminators of this iteration have learnt, the generators not
    return begun(*arguments)

loss.generator_step = step
settings = TINY.model_copy(update={{"ema_decay": 0.9}})
train.learn(LocalSession(Location.of({folder!r})), plan_for(Path({data!r}), settings))
"""


def test_a_training_that_was_killed_ends_with_the_same_weights(tmp_path: Path) -> None:
    settings = plan_for(tmp_path / "data", TINY.model_copy(update={"ema_decay": 0.9}))
    undisturbed = run(settings).state()
    folder = tmp_path / "trainer"
    words = {"tests": str(Path(__file__).parents[2]), "folder": str(folder), "data": str(tmp_path / "data")}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start_process(kill_in: int) -> int:
        code = TRAINING.format(**words, kill_in=kill_in)
        return subprocess.run([sys.executable, "-c", code], env=environment, timeout=240, check=False).returncode

    assert start_process(kill_in=5) == -signal.SIGKILL
    assert LocalSession(Location.of(folder)).restore()["iteration"] == 3  # type: ignore[index]
    learn(LocalSession(Location.of(folder)), settings)  # type: ignore[arg-type]
    resumed = LocalSession(Location.of(folder)).restore()
    assert_same(resumed, undisturbed)
    assert weights_hash(resumed) == weights_hash(undisturbed)


def weights_hash(state: dict[str, Any] | None) -> str:
    assert state is not None
    digest = hashlib.sha256()
    for side in ("generators", "ema", "discriminators"):
        for name, tensor in sorted(state[side].items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


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
    plan = Plan(day, night, TINY, seed=5, threads=1)
    state = run({"plan": plan}).state()
    assert state["iteration"] == 7 and np.isfinite([list(row.values()) for row in state["history"]]).all()
    sheet = plan.sample_sheet(build_generators(2, 1, state["ema"]))
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


# -- trainings that have gone wrong -----------------------------------------------------------------------------------


def test_a_frame_gone_bad_is_named(tmp_path: Path) -> None:
    settings = plan_for(tmp_path)
    (tmp_path / "night" / "1.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"night/1 .*zero_bytes"):
        run(settings)


def test_divergence_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    settings = plan_for(tmp_path, TINY.model_copy(update={"iterations": 9, "checkpoint_every": 2}))
    saved: list[bytes] = []
    with pytest.raises(Killed):
        run(settings, saved, dies_after=2)
    state = torch.load(io.BytesIO(saved[-1]), weights_only=True)
    first = next(iter(state["generators"]))
    state["generators"][first][0] = float("nan")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with pytest.raises(
        UserError, match=r"(?s)iteration 5: it has diverged: the loss .*iteration 4\) is kept.*learning_rate"
    ):
        run(settings, [buffer.getvalue()])


def test_weights_that_are_not_finite_never_become_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plan, "iterations_a_row", 100)
    step = torch.optim.Adam.step

    def breaks(optimizer: torch.optim.Adam, *arguments: Any) -> Any:
        result = step(optimizer, *arguments)
        optimizer.param_groups[0]["params"][0].data[0] = float("inf")
        return result

    monkeypatch.setattr(torch.optim.Adam, "step", breaks)
    saved: list[bytes] = []
    with pytest.raises(UserError, match="weight"):
        run(plan_for(tmp_path), saved)
    assert saved == []


def with_constant_discriminators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Discriminators without weights: their last bias alone learns, and every patch gets the same score."""
    build = train.build_networks

    def built(*arguments: Any) -> Any:
        networks = build(*arguments)
        with torch.no_grad():
            for parameter in networks.discriminators.parameters():
                parameter.zero_()
        return networks

    monkeypatch.setattr(train, "build_networks", built)


def test_a_collapsed_discriminator_stops_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_constant_discriminators(monkeypatch)
    settings = TINY.model_copy(update={"iterations": 9, "checkpoint_every": 2, "collapse_after": 5})
    saved: list[bytes] = []
    words = r"iteration 5: the day discriminator is constant: .* last 5 .*\(iteration 4\) is kept.*collapse_after: null"
    with pytest.raises(UserError, match=words):
        run(plan_for(tmp_path, settings), saved)
    assert torch.load(io.BytesIO(saved[-1]), weights_only=True)["iteration"] == 4
    with pytest.raises(UserError, match="iteration 5: the day discriminator is constant"):
        run(plan_for(tmp_path, settings), saved)  # again, from there
    unguarded = settings.model_copy(update={"collapse_after": None})
    assert run(plan_for(tmp_path, unguarded)).state()["iteration"] == 9


def test_what_is_kept_is_from_before_the_collapse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"iterations": 12, "checkpoint_every": 1, "collapse_after": 3, "discriminator_width": 16}
    settings = TINY.model_copy(update=changes)
    saved: list[bytes] = []
    with pytest.raises(Killed):
        run(plan_for(tmp_path, settings), saved, dies_after=5)
    state = torch.load(io.BytesIO(saved[-1]), weights_only=True)
    for name in state["discriminators"]:
        state["discriminators"][name].zero_()
    state["discriminator_optimizer"]["state"] = {}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    saved = [buffer.getvalue()]
    with pytest.raises(UserError, match=r"iteration 8: .* constant.*\(iteration 5\) is kept"):
        run(plan_for(tmp_path, settings), saved)
    assert len(saved) == 1  # 6 and 7 were no good
    monkeypatch.setattr(train, "_is_failing", lambda history, settings: False)
    with pytest.raises(UserError, match=r"iteration 8: .*\(iteration 7\) is kept"):
        run(plan_for(tmp_path, settings), saved)


def row(iteration: int, **changes: float) -> dict[str, float]:
    healthy = {"discriminator_day": 0.4, "discriminator_night": 0.5}
    healthy |= {"discriminator_gap_day": 0.2, "discriminator_gap_night": 0.1}
    return {"iteration": iteration, **healthy, **changes}


def test_terms_that_are_no_numbers_are_named() -> None:
    assert not_finite(row(1)) == []
    assert not_finite(row(1, discriminator_day=math.nan, discriminator_gap_night=math.inf)) == [
        "discriminator_day",
        "discriminator_gap_night",
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"discriminator_day": CHANCE, "discriminator_night": CHANCE}, None),  # cannot tell: where training may end
        ({"discriminator_day": 0.0016}, None),
        ({"discriminator_day": 0.0014}, "day discriminator is saturated"),
        ({"discriminator_night": 0.0014}, "night discriminator is saturated"),
        ({"discriminator_gap_night": 2e-4}, None),
        ({"discriminator_gap_night": 5e-5, "discriminator_night": CHANCE}, "night discriminator is constant"),
    ],
)
def test_faults(changes: dict[str, float], words: str | None) -> None:
    found = failing(row(100, **changes), CHANCE)
    assert found is None if words is None else found is not None and words in found


def test_a_fault_must_last() -> None:
    ill = {"discriminator_day": 1e-4}
    rows = [row(iteration, **ill) for iteration in range(100, 1001, 100)]
    assert collapsed(rows[:-1], lasting=1000, chance=CHANCE) is None  # not yet a thousand iterations
    found = collapsed(rows, lasting=1000, chance=CHANCE)
    assert found is not None and "day discriminator is saturated" in found and "last 1000 iterations" in found
    assert collapsed([*rows[:4], row(500), *rows[5:]], lasting=1000, chance=CHANCE) is None  # it recovered in between
    late = [row(100), *(row(iteration, **ill) for iteration in range(200, 1101, 100))]
    assert collapsed(late, lasting=1000, chance=CHANCE) is not None
    assert collapsed(late, lasting=1100, chance=CHANCE) is None
    assert collapsed([], lasting=1, chance=CHANCE) is None


def test_two_faults_by_turns_are_no_collapse() -> None:
    rows = [row(10, discriminator_day=1e-4), row(20, discriminator_gap_night=0.0)]
    assert collapsed(rows, lasting=20, chance=CHANCE) is None
    assert collapsed(rows, lasting=10, chance=CHANCE) is not None
