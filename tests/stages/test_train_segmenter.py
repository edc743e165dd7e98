"""The training loop under a fake cluster (resume, workers, what is refused), and the stage once under Ray."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from nightseg.compute.training import LocalSession
from nightseg.config import Network, TrainCompute
from nightseg.config_training import Augmentation, Loss, Training
from nightseg.frames.images import encode_png
from nightseg.frames.table import frame_table
from nightseg.frames.taxonomy import taxonomy
from nightseg.learning.batches import sample_order
from nightseg.learning.segmentation import combined_loss_sum, mixture
from nightseg.learning.starting import starting_network
from nightseg.networks.checkpoint import load_tensors, save_model
from nightseg.progress import SilentProgress
from nightseg.stages import train_segmenter as stage
from nightseg.stages.train_segmenter import Plan, learn, train_segmenter
from nightseg.storage import Location, UserError
from nightseg.workspace import Workspace

NETWORK = Network(encoder="efficientnet_lite0", input_size=(64, 64), pyramid_channels=8, head_channels=8)
TRAINING = Training(
    optimizer="adamw",
    learning_rate=2e-3,
    batch=2,
    epochs=2,
    warmup_steps=2,
    crop=(64, 64),
    augmentation=Augmentation(scale=(0.75, 1.5), flip=0.5, brightness=0.2),
)


class Killed(Exception):  # noqa: N818 (an event, not an error)
    """What a SIGKILL is to this process."""


class Session(LocalSession):
    """A worker without a cluster, that can be killed right after a report."""

    def __init__(self, folder: Path, die_after: int | None = None) -> None:
        super().__init__(Location.of(folder))
        self.die_after = die_after

    def report(self, metrics: Mapping[str, float], state: Mapping[str, Any] | None) -> None:
        super().report(metrics, state)
        if len(self.history) == self.die_after:
            raise Killed

    @property
    def state(self) -> dict[str, Any]:
        restored = self.restore()
        assert restored is not None
        return restored


def write_frames(folder: Location, count: int) -> pa.Table:
    """Frames that can be learned: sky above, road below, a dark car on the road."""
    rng, rows = np.random.default_rng(0), []
    for index in range(count):
        label = np.zeros((64, 80), np.uint8)
        horizon = 24 + int(rng.integers(0, 16))
        label[horizon:] = 3
        left = int(rng.integers(0, 60))
        label[horizon + 4 : horizon + 14, left : left + 18] = 8
        colours = np.array(
            [[150, 190, 240], *[[0, 0, 0]] * 2, [110, 110, 110], *[[0, 0, 0]] * 4, [30, 20, 60]], np.int16
        )
        image = np.clip(colours[label] + rng.integers(-15, 16, (64, 80, 3)), 0, 255).astype(np.uint8)
        (folder / f"{index}.png").write_bytes(encode_png(image))
        (folder / f"{index}-label.png").write_bytes(encode_png(label))
        rows.append(
            {
                "frame_id": f"toy/{index}",
                "uri": (folder / f"{index}.png").uri,
                "label_uri": (folder / f"{index}-label.png").uri,
                "label_encoding": "camvid12",
                "width": 80,
                "height": 64,
            }
        )
    return frame_table(rows)


@pytest.fixture
def rows(tmp_path: Path) -> pa.Table:
    torch.set_num_threads(1)
    return write_frames(Location.of(tmp_path) / "frames", 6)


def plan_for(rows: pa.Table, folder: Path, training: Training = TRAINING, validate: pa.Table | None = None) -> Plan:
    classes = taxonomy("camvid11")
    initial = starting_network(
        "imagenet",
        encoder=NETWORK.encoder,
        encoder_weights=None,
        pyramid_channels=8,
        head_channels=8,
        classes=classes,
        seed=0,
        say=lambda _: None,
    )
    start = Location.of(folder) / "start"
    save_model(start, initial.state_dict(), {"kind": "semantic_fpn"})
    return Plan(rows, validate, start, classes, NETWORK, Loss(kind="combined"), training, 0, 1)


def train(session: Session, plan: Plan) -> dict[str, Any]:
    learn(session, {"plan": plan})
    return session.state


def test_loss_falls_and_validation_is_recorded(rows: pa.Table, tmp_path: Path) -> None:
    session = Session(tmp_path / "trainer")
    training = TRAINING.model_copy(
        update={"epochs": 4, "steps_per_epoch": 8, "validate_every": 2, "learning_rate": 0.01}
    )
    history = train(session, plan_for(rows, tmp_path, training, rows.slice(0, 3)))["history"]
    assert [record["epoch"] for record in history] == [1, 2, 3, 4]
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert history[-1]["learning_rate"] < history[0]["learning_rate"]
    assert ["validation" in record for record in history] == [False, True, False, True]
    scores = history[-1]["validation"]
    assert scores["pa"] > 0.5
    assert set(scores["iou"]) == set(taxonomy("camvid11").classes)
    assert session.history[-1]["miou"] == scores["miou"]
    assert session.done == 32


def test_resumed_training_is_bit_for_bit_the_uninterrupted_one(rows: pa.Table, tmp_path: Path) -> None:
    plan = plan_for(rows, tmp_path, validate=rows.slice(0, 2))
    expected = train(Session(tmp_path / "whole"), plan)
    with pytest.raises(Killed):
        train(Session(tmp_path / "killed", die_after=1), plan)
    resumed = Session(tmp_path / "killed")
    found = train(resumed, plan)

    assert found["history"] == expected["history"]
    assert [metrics["epoch"] for metrics in resumed.history] == [1, 2]
    assert found["pace"]["frames"] == expected["pace"]["frames"] == 12
    assert all(torch.equal(found["network"][name], value) for name, value in expected["network"].items())
    for key, moments in expected["optimizer"]["state"].items():
        assert all(torch.equal(found["optimizer"]["state"][key][name], value) for name, value in moments.items())


def test_nothing_is_left_to_do_for_a_finished_training(rows: pa.Table, tmp_path: Path) -> None:
    plan = plan_for(rows, tmp_path, TRAINING.model_copy(update={"epochs": 1}))
    expected = train(Session(tmp_path / "trainer"), plan)
    again = Session(tmp_path / "trainer", die_after=2)  # a second report would kill it
    assert train(again, plan)["history"] == expected["history"]


def test_frozen_batch_norms_keep_their_start(rows: pa.Table, tmp_path: Path) -> None:
    training = TRAINING.model_copy(update={"epochs": 1, "freeze_batch_norm": True})
    plan = plan_for(rows, tmp_path, training, rows.slice(0, 2))
    before, after = load_tensors(plan.start)[0], train(Session(tmp_path / "trainer"), plan)["network"]
    stem = "body.features.conv_stem.weight"
    assert all(torch.equal(before[name], after[name]) for name in before if ".bn1." in name)
    assert not torch.equal(before[stem], after[stem])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_batch_without_a_valid_pixel_is_harmless(rows: pa.Table, tmp_path: Path, precision: str) -> None:
    for uri in rows["label_uri"].to_pylist():
        Location.of(uri).write_bytes(encode_png(np.full((64, 80), 11, np.uint8)))  # void
    training = TRAINING.model_copy(update={"epochs": 1, "precision": precision, "weight_decay": 0.0})
    plan = plan_for(rows, tmp_path, training, rows.slice(0, 2))
    state = train(Session(tmp_path / "trainer"), plan)
    record = state["history"][0]
    assert record["loss"] == 0
    assert record["gradient_norm"] == 0
    assert record["validation"]["miou"] is None
    weight = "head.predictor.weight"
    assert torch.equal(load_tensors(plan.start)[0][weight], state["network"][weight])


def test_a_loss_that_is_not_finite_stops_and_names_the_frames(
    rows: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def poisoned(*arguments: Any) -> Any:
        calls.append(1)
        found = combined_loss_sum(*arguments)
        return found._replace(total=found.total * float("nan")) if len(calls) == 5 else found

    monkeypatch.setattr(stage, "combined_loss_sum", poisoned)
    plan = plan_for(rows, tmp_path)  # 3 steps an epoch: the fifth is the second of epoch 2
    session = Session(tmp_path / "trainer")
    with pytest.raises(UserError) as caught:
        train(session, plan)
    order = sample_order(6, 6, plan.seed, 1)
    assert "step 5" in str(caught.value)
    assert f"toy/{order[2].row}, toy/{order[3].row}\n" in str(caught.value)
    assert "training.learning_rate" in str(caught.value)
    assert len(session.state["history"]) == 1  # the good checkpoint of epoch 1 is there
    assert all(torch.isfinite(value).all() for value in session.state["network"].values())


def test_two_workers_weigh_every_valid_pixel_alike() -> None:
    """Global normalisation: gradients of two half batches, averaged as DDP does, are those of the whole batch."""
    target = torch.full((2, 8, 8), 255, dtype=torch.uint8)
    target[0], target[1, :1] = 0, 1  # 64 valid pixels against 8
    logits = torch.randn(2, 11, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    terms = mixture("combined", 0.5, 2.0, 1.0)
    whole = combined_loss_sum(logits, target, *terms)
    (expected,) = torch.autograd.grad(whole.mean(), logits)
    halves = [combined_loss_sum(logits[i : i + 1], target[i : i + 1], *terms) for i in range(2)]
    everywhere = sum(half.num_valid for half in halves)
    gradients = [torch.autograd.grad(half.total * 2 / everywhere, logits, retain_graph=True)[0] for half in halves]
    assert torch.allclose((gradients[0] + gradients[1]) / 2, expected, atol=1e-8)


def refuse(rows: pa.Table, validate: pa.Table | None = None, workers: int = 1, **changed: Any) -> str:
    training = TRAINING.model_copy(update=changed)
    plan = Plan(rows, validate, Location.of("/nowhere"), taxonomy("camvid11"), NETWORK, Loss(), training, 0, 1)
    with pytest.raises(UserError) as caught:
        stage._check(plan, "student", TrainCompute(workers=workers))
    return str(caught.value)


def test_what_cannot_train_is_refused_with_the_cure(rows: pa.Table) -> None:
    bare = rows.set_column(rows.schema.get_field_index("label_uri"), "label_uri", [[None, *["x"] * 5]])
    assert "student, train: 1 of 6 frames have no label (first toy/0)" in refuse(bare)
    assert "self_training.pool" in refuse(rows, bare)
    assert "hold no frame" in refuse(rows.slice(0, 0))
    assert "set training.warmup_steps to" in refuse(rows, warmup_steps=6)
    assert "multiple of 2" in refuse(rows, workers=2, batch=3)
    assert "set training.crop to (64, 64)" in refuse(rows, crop=(128, 64))


@pytest.mark.ray
def test_the_stage_commits_a_model_and_another_starts_from_it(
    rows: pa.Table, tmp_path: Path, ray_cluster: object
) -> None:
    workspace = Workspace(tmp_path / "run")

    def run(name: str, start: Any, workers: int, training: Training) -> Any:
        node = workspace.stage("train_segmenter", name, version=stage.VERSION, recipe={"name": name}, inputs={}, seed=3)
        return train_segmenter(
            rows,
            rows.slice(0, 2),
            name=name,
            network=NETWORK,
            loss=Loss(),
            training=training,
            start=start,
            taxonomy="camvid11",
            seed=3,
            attempt=node.open(),
            compute=TrainCompute(workers=workers, cpus_per_worker=0.5),
            progress=SilentProgress(),
        )

    teacher = run("teacher", "scratch", 1, TRAINING)
    tensors, card = load_tensors(teacher.folder / "model")
    assert card["kind"] == "semantic_fpn"
    assert (card["num_classes"], card["input_size"], card["parents"]) == (11, [64, 64], [])
    assert [record["epoch"] for record in teacher.json("history.json")] == [1, 2]
    assert teacher.rows_in == teacher.rows_out == 6
    assert teacher.verify() == []
    assert not (teacher.folder / "trainer").exists()

    student = run("student", teacher, 2, TRAINING.model_copy(update={"epochs": 1, "freeze_batch_norm": True}))
    _, student_card = load_tensors(student.folder / "model")
    assert student_card["parents"] == [{"stage": "train_segmenter", "name": "teacher", "key": teacher.key}]
    assert student.json("history.json")[0]["loss"] < teacher.json("history.json")[0]["loss"]
    assert all(torch.isfinite(value).all() for value in tensors.values())
