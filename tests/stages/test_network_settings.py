"""The settings of a recipe's network reach the network that is trained, and its card."""

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
from nightseg.segmenter.data import Part
from nightseg.segmenter.network import model_card
from nightseg.segmenter.predict import Segmenter
from nightseg.segmenter.settings import Loss, Network, Training
from nightseg.segmenter.start import starting_network
from nightseg.segmenter.train import Plan, learn
from nightseg.stages.train_segmenter import check_training
from nightseg.storage import Location, UserError

TRAINING = Training(batch=2, epochs=1, steps_per_epoch=2, warmup_steps=0, crop=(64, 64))


@pytest.fixture
def rows(tmp_path: Path) -> pa.Table:
    torch.set_num_threads(1)
    folder = Location.of(tmp_path) / "frames"
    (folder / "a.png").write_bytes(encode_png(np.full((64, 64, 3), 90, np.uint8)))
    (folder / "a-label.png").write_bytes(encode_png(np.arange(64, dtype=np.uint8).repeat(64).reshape(64, 64) % 11))
    row = {"uri": (folder / "a.png").uri, "label_uri": (folder / "a-label.png").uri, "label_encoding": "camvid12"}
    return frame_table([{"frame_id": f"toy/{index}", "width": 64, "height": 64, **row} for index in range(2)])


def plan_for(rows: pa.Table, folder: Path, network: Network) -> Plan:
    return Plan(
        rows,
        (Part.whole(rows.num_rows),),
        None,
        Location.of(folder) / "start",
        taxonomy("camvid11"),
        network,
        Loss(),
        TRAINING,
        seed=0,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"encoder": "resnet18", "norm": "frozen"},
        {"encoder": "resnet18", "freeze_at": 2},
        {"encoder": "resnet50", "stride_in_1x1": True},
        {"encoder": "timm/resnet10t", "norm": "frozen"},
    ],
)
def test_what_is_trained_is_what_was_asked_for_and_opens_again(
    rows: pa.Table, tmp_path: Path, settings: Mapping[str, Any]
) -> None:
    network = Network(**settings, pyramid_channels=8, head_channels=8)
    plan = plan_for(rows, tmp_path, network)
    initial = starting_network("scratch", network, plan.classes, seed=0)
    card = model_card(network, plan.classes, initial.body.mean, initial.body.std)
    save_model(plan.start, initial.state_dict(), card)
    session = LocalSession(Location.of(tmp_path) / "trainer")
    learn(session, {"plan": plan})
    state = session.restore()
    assert state is not None
    before, after = load_tensors(plan.start)[0], state["network"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "head.predictor.weight" in moved
    assert before.keys() == after.keys()
    if network.norm == "frozen":
        assert not any("num_batches_tracked" in name for name in before)
        assert not any("running_mean" in name for name in moved)
    if network.freeze_at:
        assert not any(name.startswith(("body.conv1.", "body.bn1.", "body.layer1.")) for name in moved)
        assert "body.layer2.0.conv1.weight" in moved
    save_model(Location.of(tmp_path) / "model", after, card)
    segmenter = Segmenter(Location.of(tmp_path) / "model", "cpu")
    assert segmenter(np.zeros((40, 50, 3), np.uint8)).labels.shape == (40, 50)
    if network.stride_in_1x1:
        assert segmenter._network.body.get_submodule("layer3.0.conv1").stride == (2, 2)


def test_norms_of_all_workers_need_gpus(rows: pa.Table, tmp_path: Path) -> None:
    plan = plan_for(rows, tmp_path, Network(encoder="resnet18", norm="sync"))

    def check(**compute: Any) -> None:
        check_training("m", plan, TrainCompute(**compute))

    with pytest.raises(UserError, match=r"network\.norm sync"):
        check(workers=2)
    check(workers=1)
    check(workers=2, gpus_per_worker=1)
