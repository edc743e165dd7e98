"""The training loop under a fake cluster (what it learns, workers, what is refused), and the stage once under Ray."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from nightseg.cluster.settings import TrainCompute
from nightseg.cluster.train import LocalSession
from nightseg.data.class_list import taxonomy
from nightseg.data.images import encode_png
from nightseg.data.table import frame_table
from nightseg.networks.model_folder import load_tensors, save_model
from nightseg.progress import SilentProgress
from nightseg.segmenter import train as training_loop
from nightseg.segmenter.data import Part
from nightseg.segmenter.loss import segmentation_loss
from nightseg.segmenter.network import model_card
from nightseg.segmenter.settings import Augmentation, Loss, Network, Training
from nightseg.segmenter.start import starting_network
from nightseg.segmenter.train import Plan, learn, start_learner, validate
from nightseg.stages import train_segmenter as stage
from nightseg.stages.train_segmenter import train_segmenter
from nightseg.storage import Attempt, Location, UserError, Workspace

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


def plan_for(
    rows: pa.Table,
    folder: Path,
    training: Training = TRAINING,
    validate: pa.Table | None = None,
    loss: Loss = Loss(kind="combined"),  # noqa: B008 frozen
) -> Plan:
    classes = taxonomy("camvid11")
    initial = starting_network("imagenet", NETWORK, classes, seed=0)
    start = Location.of(folder) / "start"
    save_model(start, initial.state_dict(), model_card(NETWORK, classes, initial.body.mean, initial.body.std))
    return Plan(rows, (Part.whole(rows.num_rows),), validate, start, classes, NETWORK, loss, training, 0)


def assert_same(first: Any, second: Any) -> None:
    """Bit for bit, through nested dictionaries and lists; how long it took is left out."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first.keys() - {"seconds", "waiting_seconds"}:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


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


def test_parts_of_a_batch_learn_what_the_batch_learns(rows: pa.Table, tmp_path: Path) -> None:
    still = TRAINING.model_copy(update={"epochs": 1, "freeze_batch_norm": True, "optimizer": "sgd"})
    whole = train(Session(tmp_path / "whole"), plan_for(rows, tmp_path, still))
    parts = still.model_copy(update={"accumulate": 2})
    found = train(Session(tmp_path / "parts"), plan_for(rows, tmp_path, parts))
    assert found["history"][0]["loss"] == pytest.approx(whole["history"][0]["loss"], rel=1e-5)
    for name, value in whole["network"].items():
        torch.testing.assert_close(found["network"][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_who_has_lost_the_other_worker_takes_its_parts_as_well(rows: pa.Table, tmp_path: Path) -> None:
    """Frames, order and parts of a step are those of two parts: killed with both, goes on alone, to the same bits."""
    one, two = TRAINING, TRAINING.model_copy(update={"accumulate": 2})
    expected = train(Session(tmp_path / "parts"), plan_for(rows, tmp_path, two))
    left = Session(tmp_path / "left")
    left.workers = 2
    assert_same(train(left, plan_for(rows, tmp_path, one)), expected)
    with pytest.raises(Killed):
        train(Session(tmp_path / "killed", die_after=1), plan_for(rows, tmp_path, two))
    after = Session(tmp_path / "killed")
    after.workers = 2
    assert_same(train(after, plan_for(rows, tmp_path, one)), expected)


def test_the_ema_is_what_is_validated_and_kept(rows: pa.Table, tmp_path: Path) -> None:
    training = TRAINING.model_copy(update={"epochs": 1, "ema_decay": 0.5})
    plan = plan_for(rows, tmp_path, training, rows.slice(0, 3))
    state = train(Session(tmp_path / "trainer"), plan)
    plain = train(Session(tmp_path / "plain"), plan_for(rows, tmp_path, training.model_copy(update={"ema_decay": 0.0})))
    assert plain["ema"] is None
    assert_same(state["network"], plain["network"])  # what is learned does not depend on it
    weight = "head.predictor.weight"
    assert not torch.equal(state["ema"][weight], state["network"][weight])
    session = Session(tmp_path / "again")
    learner = start_learner(plan, session)
    learner.restore(state)
    watched = training_loop._frames(plan, session)[1]
    assert watched is not None
    assert validate(learner.evaluated, watched, plan, session) == state["history"][0]["validation"]
    initial = starting_network("scratch", NETWORK, plan.classes, seed=0)
    card = stage._card(initial, plan, "scratch", Attempt(Location.of(tmp_path), Location.of(tmp_path), "k", {}))
    assert card["weights"] == "EMA, decay 0.5"


def test_the_weights_of_the_best_validation_are_kept(
    rows: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equal scores the earliest; a validation without a score is no best. Their EMA, if there is one."""
    told = iter([None, 0.25, 0.5, 0.5, 0.375])
    nothing = {"iou": {}, "pa": None, "ca": None, "fwiou": None}
    monkeypatch.setattr(training_loop, "validate", lambda *_: nothing | {"miou": next(told)})
    training = TRAINING.model_copy(update={"epochs": 5, "keep": "best", "ema_decay": 0.5})
    session = Session(tmp_path / "trainer")
    state = train(session, plan_for(rows, tmp_path, training, rows.slice(0, 3)))
    assert (state["best"]["epoch"], state["best"]["miou"]) == (3, 0.5)

    short = Session(tmp_path / "short", die_after=3)
    monkeypatch.setattr(training_loop, "validate", lambda *_: nothing | {"miou": 0.0})
    with pytest.raises(Killed):
        train(short, plan_for(rows, tmp_path, training, rows.slice(0, 3)))
    assert_same(state["best"]["weights"], dict(short.state["ema"]))


def test_a_step_is_slower_in_the_encoder_if_the_recipe_says_so(rows: pa.Table, tmp_path: Path) -> None:
    training = TRAINING.model_copy(update={"encoder_rate": 1e-12, "epochs": 1, "weight_decay": 0.0})
    plan = plan_for(rows, tmp_path, training)
    before, after = load_tensors(plan.start)[0], train(Session(tmp_path / "trainer"), plan)["network"]
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before if name.endswith("weight")}
    assert max(value for name, value in moved.items() if name.startswith("body.")) < 1e-9
    assert min(value for name, value in moved.items() if name.startswith("head.p2.0.weight")) > 1e-4


def test_a_compiled_network_without_a_compiler_is_refused(
    rows: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"training\.compile: it needs a C\+\+ compiler"):
        train(Session(tmp_path / "trainer"), plan_for(rows, tmp_path, TRAINING.model_copy(update={"compile": True})))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_compiled_network_learns_the_same(rows: pa.Table, tmp_path: Path) -> None:
    pytest.importorskip("torch._inductor")
    one = TRAINING.model_copy(update={"epochs": 1})
    expected = train(Session(tmp_path / "plain"), plan_for(rows, tmp_path, one))
    compiled = plan_for(rows, tmp_path, one.model_copy(update={"compile": True}))
    found = train(Session(tmp_path / "compiled"), compiled)
    assert found["network"].keys() == expected["network"].keys()  # names of the plain network
    assert found["history"][0]["loss"] == pytest.approx(expected["history"][0]["loss"], rel=1e-3)


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

    def poisoned(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        found = segmentation_loss(*arguments, **named)
        return found._replace(total=found.total * float("nan")) if len(calls) == 5 else found

    monkeypatch.setattr(training_loop, "segmentation_loss", poisoned)
    plan = plan_for(rows, tmp_path)  # 3 steps an epoch: the fifth is the second of epoch 2
    session = Session(tmp_path / "trainer")
    with pytest.raises(UserError) as caught:
        train(session, plan)
    order = plan.sampler.epoch(6, plan.seed, 1)
    assert "step 5" in str(caught.value)
    assert f"toy/{order[2].row}, toy/{order[3].row}\n" in str(caught.value)
    assert "checkpoint (step 3) is kept" in str(caught.value)
    assert "training.learning_rate" in str(caught.value)
    assert len(session.state["history"]) == 1  # the good checkpoint of epoch 1 is there
    assert all(torch.isfinite(value).all() for value in session.state["network"].values())


@pytest.mark.ray
def test_the_stage_commits_a_model_and_another_starts_from_it(
    rows: pa.Table, tmp_path: Path, ray_cluster: object
) -> None:
    workspace = Workspace(tmp_path / "run")

    def run(name: str, start: Any, workers: int, training: Training) -> Any:
        node = workspace.stage("train_segmenter", name, version=stage.VERSION, recipe={"name": name}, inputs={}, seed=3)
        return train_segmenter(
            {"toy": rows},
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

    teacher = run("teacher", "scratch", 1, TRAINING.model_copy(update={"keep": "best"}))
    tensors, card = load_tensors(teacher.folder / "model")
    assert card["kind"] == "semantic_fpn"
    assert (card["num_classes"], card["input_size"], card["parents"]) == (11, [64, 64], [])
    history = teacher.json("history.json")
    assert [record["epoch"] for record in history] == [1, 2]
    best = max(history, key=lambda record: record["validation"]["miou"])
    assert teacher.summary["kept"] == {"epoch": best["epoch"], "miou": best["validation"]["miou"]}
    assert card["weights"] == f"best validation, epoch {best['epoch']} of 2"
    assert teacher.rows_in == teacher.rows_out == 6
    assert teacher.verify() == []
    assert not (teacher.folder / "trainer").exists()

    student = run("student", teacher, 2, TRAINING.model_copy(update={"epochs": 1, "freeze_batch_norm": True}))
    _, student_card = load_tensors(student.folder / "model")
    assert student_card["parents"] == [{"stage": "train_segmenter", "name": "teacher", "key": teacher.key}]
    assert student.json("history.json")[0]["loss"] < teacher.json("history.json")[0]["loss"]
    assert all(torch.isfinite(value).all() for value in tensors.values())
