"""Commands on folders and files read them in an object store, and write there, as on a disk."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from nightseg.data.class_list import taxonomy
from nightseg.networks.model_folder import CARD, load_tensors
from nightseg.segmenter.detectron2 import their_name
from nightseg.segmenter.network import build_semantic_fpn
from nightseg.segmenter.settings import Network
from nightseg.storage import Location
from tests.command_line import json_of
from tests.object_store import ObjectStore

pytestmark = pytest.mark.slow

CLASSES = taxonomy("camvid11").classes
CONFIG = {
    "MODEL": {
        "META_ARCHITECTURE": "SemanticSegmentor",
        "BACKBONE": {"NAME": "build_resnet_fpn_backbone"},
        "RESNETS": {"DEPTH": 18, "RES2_OUT_CHANNELS": 64},
        "FPN": {"IN_FEATURES": ["res2", "res3", "res4", "res5"]},
    },
    "INPUT": {"MIN_SIZE_TEST": 64},
}


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def data(s3: ObjectStore, tmp_path: Path) -> Location:
    """Eight frames by day with labels, and dark ones without."""
    place = s3.place(f"commands/{tmp_path.name}")
    generator = np.random.default_rng(0)
    for number in range(8):
        pixels = generator.integers(0, 255, (64, 96, 3), dtype=np.uint8)
        labels = generator.integers(0, len(CLASSES), (64, 96), dtype=np.uint8)
        for folder, name, content in (("day", "d", pixels), ("labels", "d", labels), ("night", "n", pixels // 8)):
            (place / folder / f"{name}{number}.png").write_bytes(png(content))
    return place


def test_a_checkpoint_becomes_a_model_that_predicts_and_is_scored_and_goes_back(data: Location) -> None:
    torch.manual_seed(0)
    small = Network(encoder="resnet18", pyramid_channels=8, head_channels=32, norm="frozen")
    network = build_semantic_fpn(small, num_classes=len(CLASSES))
    theirs = {their_name(name): tensor.clone() for name, tensor in network.state_dict().items()}
    buffer = io.BytesIO()
    torch.save({"model": theirs}, buffer)
    (data / "model_final.pth").write_bytes(buffer.getvalue())
    (data / "config.yaml").write_bytes(yaml.safe_dump(CONFIG).encode())

    words = ("--config", data / "config.yaml", "--taxonomy", "camvid11")
    json_of("convert", "detectron2", data / "model_final.pth", data / "model", *words)
    assert (data / "model" / CARD).exists() and len(load_tensors(data / "model")[0]) == len(network.state_dict())
    json_of("convert", "to-detectron2", data / "model", data / "back.pth")
    back = torch.load(io.BytesIO((data / "back.pth").read_bytes()), weights_only=True)["model"]
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], theirs[name]) for name in theirs)
    assert (data / "back.yaml").exists()

    predicted = json_of("predict", data / "model", data / "day", "--out", data / "masks")
    assert predicted["written"] == 8 and predicted["out"] == data.uri + "/masks"
    scores = json_of("evaluate", data / "masks", data / "labels", "--taxonomy", "camvid11")
    masks, labels = (
        np.stack([np.array(Image.open(io.BytesIO((data / folder / f"d{n}.png").read_bytes()))) for n in range(8)])
        for folder in ("masks", "labels")
    )
    assert scores["pa"] == pytest.approx(float((masks == labels).mean()), abs=1e-6)


def test_frames_become_a_table_a_selection_and_a_recipe_that_can_be_run(
    data: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    json_of("split", data / "night", "--out", data / "split.parquet")
    assert (data / "split.parquet").read_table().num_rows == 8
    json_of("select", data / "split.parquet", "--count", 3, "--method", "random", "--out", data / "chosen")
    assert (data / "chosen" / "frames.parquet").read_table().num_rows == 3
    words = ("--labels", data / "labels", "--taxonomy", "camvid11", "--out", data / "mine.yaml")
    json_of("init", data / "day", data / "night", *words)
    json_of("check", data / "mine.yaml")
    assert not {path.name for path in tmp_path.iterdir()}, "nothing is written here"
