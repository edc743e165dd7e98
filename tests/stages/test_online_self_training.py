"""A model that teaches itself on a pool while it learns: resumed, on two workers, and as a stage."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from nightseg.cluster.settings import TrainCompute
from nightseg.cluster.train import LocalSession, fit
from nightseg.progress import SilentProgress
from nightseg.segmenter.network import SemanticFPN, build_semantic_fpn
from nightseg.segmenter.settings import Augmentation, Masked, Online, Teaching, Threshold, Training
from nightseg.segmenter.teacher import Pool
from nightseg.segmenter.train import Plan, average_statistics, learn
from nightseg.storage import Location
from tests.stages.test_train_segmenter import (
    NETWORK,
    TRAINING,
    Killed,
    Session,
    assert_same,
    plan_for,
    train,
    write_frames,
)

ONLINE = Online(
    batch=2,
    warmup_steps=3,
    masked=Masked(patch=16),
    flip=True,
    memory=4,
    augmentation=Augmentation(scale=(0.75, 1.5), brightness=0.3, noise=0.05),
)
THRESHOLD = Threshold(share=0.5, floor=0.1, precision=0.05)
LEARNING: dict[str, Any] = {
    "epochs": 3,
    "steps_per_epoch": 4,
    "checkpoint_every": 1,
    "ema_decay": 0.9,
    "learning_rate": 0.01,
    "accumulate": 1,
    "batch": 4,
}


def plan_of(folder: Path, training: Training, online: Online = ONLINE) -> Plan:
    torch.set_num_threads(1)
    rows = write_frames(Location.of(folder) / "frames", 8)
    teaching = Teaching(online=online, threshold=THRESHOLD, never_below={"sky": ["road"]})
    pool = Pool.of(rows.slice(4), teaching)
    labelled = [row | {"domain": "night" if number % 2 else "day"} for number, row in enumerate(rows.to_pylist()[:4])]
    return dataclasses.replace(plan_for(pa.Table.from_pylist(labelled, rows.schema), folder, training), pool=pool)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Session]:
    folder = tmp_path_factory.mktemp("undisturbed")
    plan = plan_of(folder, TRAINING.model_copy(update=LEARNING))
    session = Session(folder / "trainer")
    train(session, plan)
    return plan, session


def test_the_history_tells_what_the_teacher_saw(undisturbed: tuple[Plan, Session]) -> None:
    _, session = undisturbed
    records = [record["teacher"] for record in session.state["history"]]
    assert len(records) == 3
    for record in records:
        assert sum(record["shares"].values()) == pytest.approx(1.0)
        assert 0 < record["kept_share"] <= 1
        for name, bar in record["thresholds"].items():
            # The classes that are hardly predicted by now are not learned.
            assert bar is None or 26 / 256 <= bar < 1, name  # the floor, on an edge of a bin
    right, judged = session.state["teacher"]["judged"].sum(dim=2)
    assert (right <= judged).all() and 0 < right.sum() < judged.sum()  # on the labelled frames of the night


@pytest.mark.parametrize("number", range(3))
def test_a_killed_training_ends_with_the_same_bits(
    undisturbed: tuple[Plan, Session], tmp_path: Path, number: int
) -> None:
    """Killed at two random reports of 12: before the teacher teaches, while it does, in the midst of epochs."""
    plan, whole = undisturbed
    first, second = sorted(random.Random(number).sample(range(1, 12), 2))
    for die_after in (first, second):
        with pytest.raises(Killed):
            train(Session(tmp_path / "killed", die_after=die_after), plan)
    assert_same(train(Session(tmp_path / "killed"), plan), whole.state)


class Pair:
    """The session of one of two workers, as sums are concerned: the other one has `others`."""

    world_size = workers = 2

    def __init__(self, others: SemanticFPN) -> None:
        self._others = others

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        norms = [module for module in self._others.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        buffers = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None]
        return tensor + torch.cat(buffers)


def test_the_teacher_has_the_mean_statistics_of_all_workers() -> None:
    one, other = (build_semantic_fpn(NETWORK, 11) for _ in range(2))
    for number, network in enumerate((one, other)):
        torch.manual_seed(number)
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d) and module.running_mean is not None:
                module.running_mean.normal_()
    before = {name: buffer.clone() for name, buffer in one.named_buffers()}
    average_statistics(one, Pair(other))  # type: ignore[arg-type]
    theirs = dict(other.named_buffers())
    for name, buffer in one.named_buffers():
        mean = (before[name] + theirs[name]) / 2 if buffer.is_floating_point() else before[name]
        assert torch.equal(buffer, mean), name
    assert any(not torch.equal(buffer, before[name]) for name, buffer in one.named_buffers())


@pytest.mark.ray
def test_two_workers_are_one_teacher(ray_cluster: None, tmp_path: Path) -> None:
    """Frozen batch norms, as trainable ones know only their worker's frames; sums in another order round otherwise, and
    a pixel at a bar may then be kept by one and not by the other, later a threshold lie one of 256 bins apart."""
    changed = LEARNING | {"freeze_batch_norm": True, "optimizer": "sgd", "checkpoint_every": None, "accumulate": 2}
    plan = plan_of(tmp_path, TRAINING.model_copy(update=changed), ONLINE.model_copy(update={"batch": 4}))
    alone = LocalSession(Location.of(tmp_path / "alone"))
    learn(alone, {"plan": plan})
    expected = alone.restore()
    found = fit(
        learn,
        {"plan": plan},
        folder=Location.of(tmp_path) / "trainer",
        name="toy",
        compute=TrainCompute(workers=2),
        progress=SilentProgress(),
        title="train toy",
        total=plan.total_steps,
        unit="steps",
    ).load()
    assert expected is not None
    for one, other in zip(found["history"], expected["history"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)
        assert one["teacher"]["shares"] == pytest.approx(other["teacher"]["shares"], abs=5e-3)
        assert one["teacher"]["kept_share"] == pytest.approx(other["teacher"]["kept_share"], abs=0.015)
    assert found["teacher"]["taught"] == expected["teacher"]["taught"] == plan.total_steps - ONLINE.warmup_steps
