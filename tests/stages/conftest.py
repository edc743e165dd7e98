"""Models whose answers are known, and the shards of a pass."""

from __future__ import annotations

import pickle
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from nightseg.cluster import map as map_module
from nightseg.data.taxonomy import Taxonomy
from nightseg.networks.model_folder import CARD, TENSORS, save_model
from nightseg.segmenter import predict
from nightseg.segmenter.network import build_semantic_fpn, model_card
from nightseg.segmenter.predict import AtStride, Segmented
from nightseg.segmenter.settings import Network
from nightseg.storage import Attempt, Commit, Location, ShardRecord, Workspace


@pytest.fixture(scope="session")
def model_commit(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Taxonomy], Commit]:
    """The commit of a tiny random segmenter of some classes, made once; only read it."""
    made: dict[str, Commit] = {}

    def commit(classes: Taxonomy) -> Commit:
        if classes.name not in made:
            made[classes.name] = build(classes)
        return made[classes.name]

    def build(classes: Taxonomy) -> Commit:
        torch.set_num_threads(1)
        torch.manual_seed(1)
        # One group norm needs more than a pixel of the coarsest map.
        settings = Network(encoder="resnet18", pyramid_channels=8, head_channels=8, input_size=(64, 96))
        network = build_semantic_fpn(settings, classes.num_classes)
        card = model_card(settings, classes, network.body.mean, network.body.std)
        workspace = Workspace(tmp_path_factory.mktemp("models"))
        attempt = workspace.stage("train_segmenter", "teacher", version=1, recipe={}, inputs={}, seed=0).open()
        save_model(attempt.folder / "model", network.state_dict(), card)
        return attempt.finish(rows_in=1, rows_out=1, outputs=[f"model/{TENSORS}", f"model/{CARD}"])

    return commit


@pytest.fixture
def reads_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every segmenter answers what the frame says: class = red, confidence = green / 256; it has a logit a pixel."""

    def batch(self: predict.Segmenter, images: list[np.ndarray]) -> list[Segmented]:
        return [Segmented(image[..., 0].copy(), image[..., 1].astype(np.float32) / 256) for image in images]

    def at_stride(self: predict.Segmenter, images: list[np.ndarray]) -> list[AtStride]:
        return [AtStride(*found, image.shape[:2]) for found, image in zip(batch(self, images), images, strict=True)]

    monkeypatch.setattr(predict.Segmenter, "batch", batch)
    monkeypatch.setattr(predict.Segmenter, "batch_at_stride", at_stride)


@pytest.fixture
def shards_done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that passes of this process finish. What they hand to their workers is pickled, as for an actor."""
    done: list[str] = []
    begin, write = map_module._Shards.__init__, Attempt.write_shard

    def pickled(self: Any, worker: Any, arguments: Mapping[str, Any], attempt: Attempt) -> None:
        begin(self, *pickle.loads(pickle.dumps((worker, arguments, attempt))))

    def noted(self: Attempt, index: int, *args: Any, **kwargs: Any) -> ShardRecord:
        record = write(self, index, *args, **kwargs)
        done.append(f"{self.folder.name} {index}")
        return record

    monkeypatch.setattr(map_module._Shards, "__init__", pickled)
    monkeypatch.setattr(Attempt, "write_shard", noted)
    return done


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def run_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """On a disk; in the slow tier also in an object store."""
    if request.param == "s3":
        return cast(Location, request.getfixturevalue("s3").place(f"run-{secrets.token_hex(4)}"))
    return Location.of(tmp_path / "run")


@pytest.fixture
def work(run_folder: Location) -> Callable[..., Attempt]:
    """The open attempt of a stage; the same one again when it is asked for again."""

    def open_attempt(stage: str, name: str = "x") -> Attempt:
        return Workspace(run_folder).stage(stage, name, version=1, recipe={}, inputs={}, seed=0).open()

    return open_attempt


@pytest.fixture
def frame_file(tmp_path: Path) -> Callable[..., Location]:
    """Write bytes as a file of a data set."""

    def write(name: str, data: bytes) -> Location:
        place = Location.of(tmp_path / "data") / name
        place.write_bytes(data)
        return place

    return write
