"""The segmenter's loop on Ray: killed within epochs, the weights are the same; two workers learn what one learns."""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nightseg.cluster.session import Session
from nightseg.cluster.settings import TrainCompute
from nightseg.cluster.train import FitResult, LocalSession, fit
from nightseg.networks.model_folder import TENSORS, save_model
from nightseg.progress import SilentProgress
from nightseg.segmenter import train as training_loop
from nightseg.segmenter.train import Plan, learn, start_learner, validate
from nightseg.storage import Location, sha256_of
from tests.stages.test_train_segmenter import TRAINING, plan_for, write_frames

FRAIL = TRAINING.model_copy(update={"steps_per_epoch": 5, "checkpoint_every": 2, "ema_decay": 0.9})
DIES, WAITS = 3, 8  # in these steps, counted from 0: each in the middle of an epoch


class Frail:
    """A session whose worker is killed in one step, and stands still in another; each only once."""

    def __init__(self, session: Session, marks: Path) -> None:
        self._session = session
        self._marks = marks
        self._step = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def restore(self) -> dict[str, Any] | None:
        state = self._session.restore()
        self._step = 0 if state is None else state["step"]
        return state

    def sum(self, tensor: Tensor) -> Tensor:
        """Of loss and weight, in every step, after the gradient and before the weights move; others pass."""
        if tensor.shape != (2,):
            return self._session.sum(tensor)
        if self._step == DIES and self._is_first("dies"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._step == WAITS and self._is_first("waits"):
            time.sleep(300)
        self._step += 1
        return self._session.sum(tensor)

    def _is_first(self, mishap: str) -> bool:
        mark = self._marks / mishap
        with mark.open("a") as stream:
            stream.write("x")
        return mark.stat().st_size == 1


def frail(session: Session, settings: dict[str, Any]) -> None:
    learn(Frail(session, Path(settings["marks"])), settings)  # type: ignore[arg-type]


def run(folder: Path, loop: Any, count: int = 1) -> FitResult:
    plan: Plan = pickle.loads((folder / "plan.pickle").read_bytes())
    return fit(
        loop,
        {"plan": plan, "marks": str(folder)},
        folder=Location.of(folder) / "trainer",
        name="toy",
        compute=TrainCompute(workers=count, max_failures=1),
        progress=SilentProgress(),
        title="train toy",
        total=plan.total_steps,
        unit="steps",
    )


def prepare(folder: Path, **changed: Any) -> Plan:
    torch.set_num_threads(1)
    rows = write_frames(Location.of(folder) / "frames", 6)
    plan = plan_for(rows, folder, FRAIL.model_copy(update=changed), rows.slice(0, 2))
    plan = dataclasses.replace(plan, curves=Location.of(folder) / "tensorboard")
    (folder / "plan.pickle").write_bytes(pickle.dumps(plan))
    return plan


def weights_hash(state: dict[str, Any], folder: Path, name: str) -> str:
    save_model(Location.of(folder) / name, state["network"] | {f"mean.{k}": v for k, v in state["ema"].items()}, CARD)
    return sha256_of((folder / name / TENSORS).read_bytes())


CARD = {"kind": "semantic_fpn"}
DRIVER = """
import sys
from pathlib import Path
from nightseg.cluster import ray as cluster
from tests.stages.test_segmenter_on_ray import frail, run
cluster.connect(num_cpus=1)
run(Path(sys.argv[1]), frail)
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_worker_and_driver_killed_within_epochs_leave_the_same_weights(tmp_path: Path) -> None:
    plan = prepare(tmp_path)
    alone = LocalSession(Location.of(tmp_path / "alone"))
    learn(alone, {"plan": dataclasses.replace(plan, curves=None)})
    expected = alone.restore()
    assert expected is not None

    root = Path(__file__).resolve().parents[2]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PYTHONPATH"] = str(root)
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    driver = subprocess.Popen(command, env=environment, cwd=tmp_path)
    deadline = time.monotonic() + 200
    while not (tmp_path / "waits").exists() and time.monotonic() < deadline:
        assert driver.poll() is None, "the driver ended before it could be killed"
        time.sleep(0.2)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    assert (tmp_path / "dies").read_text() == "xx"  # the step in which the worker was killed was done again
    states = LocalSession(Location.of(tmp_path / "trainer/toy"))
    cut = states.restore()
    assert cut is not None and cut["step"] == WAITS and len(cut["history"]) == 1  # within the second epoch

    finished = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")
    assert (tmp_path / "waits").read_text() == "xx"
    found = states.restore()
    assert found is not None
    assert weights_hash(found, tmp_path, "found") == weights_hash(expected, tmp_path, "expected")
    assert found["history"] == expected["history"]
    assert states.history == alone.history


@pytest.mark.ray
def test_what_two_workers_keep_as_best_is_what_was_validated(ray_cluster: None, tmp_path: Path) -> None:
    """Their batch norms have statistics of their own after a step; a single process finds the same score again."""
    plan = prepare(tmp_path, keep="best", ema_decay=0.0, checkpoint_every=None)
    state = run(tmp_path, learn, count=2).load()
    best, session = state["best"], LocalSession(Location.of(tmp_path / "alone"))
    learner = start_learner(plan, session)
    learner.network.load_state_dict(best["weights"])
    watched = training_loop._frames(plan, session)[1]
    assert watched is not None
    record = state["history"][best["epoch"] - 1]["validation"]
    assert record["miou"] == best["miou"]
    # Whole frames, one or two at a time: rounding may turn single pixels; other statistics would turn thousands.
    assert validate(learner.network, watched, plan, session)["pa"] == pytest.approx(record["pa"], abs=0.01)


@pytest.mark.ray
def test_two_workers_draw_the_loss_curve_of_one(ray_cluster: None, tmp_path: Path) -> None:
    """Frozen batch norms: trainable ones know only their worker's frames. Differences are those of rounding, which grow
    with every step as on no other processor: small beside what was learned, where a mistake would be as large as that.
    """
    plan = prepare(tmp_path, freeze_batch_norm=True, optimizer="sgd", batch=4, accumulate=2)
    alone = LocalSession(Location.of(tmp_path / "alone"))
    learn(alone, {"plan": dataclasses.replace(plan, curves=None)})
    expected = alone.restore()
    found = run(tmp_path, learn, count=2)
    assert expected is not None
    first, *later = zip(found.history, alone.history, strict=True)
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-5)
    assert [one["loss"] for one, _ in later] == pytest.approx([other["loss"] for _, other in later], rel=1e-3)
    state, start = found.load(), start_learner(plan, LocalSession(Location.of(tmp_path / "start"))).network.state_dict()
    for name, value in expected["ema"].items():
        learned, apart = (
            torch.linalg.vector_norm((value - other).float()) for other in (start[name], state["ema"][name])
        )
        assert apart <= 0.05 * learned, name
    assert state["history"][-1]["validation"]["pa"] == pytest.approx(
        expected["history"][-1]["validation"]["pa"], abs=0.01
    )
    assert len((Location.of(tmp_path) / "tensorboard").list()) == len(found.history)  # only one worker draws
