"""Models whose answers are known, and a pass over shards without a cluster."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from nightseg.data.taxonomy import Taxonomy
from nightseg.networks.model_folder import CARD, TENSORS, save_model
from nightseg.segmenter import predict
from nightseg.segmenter.network import build_semantic_fpn
from nightseg.segmenter.predict import Segmented
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
        sizes = {"num_classes": classes.num_classes, "pyramid_channels": 8, "head_channels": 8}
        network = build_semantic_fpn(encoder="resnet18", **sizes)
        card = sizes | {
            "kind": "semantic_fpn",
            "encoder": "resnet18",
            "taxonomy": {
                "name": classes.name,
                "classes": list(classes.classes),
                "palette": [list(colour) for colour in classes.palette],
            },
            "input_size": [64, 96],  # one group norm needs more than a pixel of the coarsest map
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        }
        workspace = Workspace(tmp_path_factory.mktemp("models"))
        attempt = workspace.stage("train_segmenter", "teacher", version=1, recipe={}, inputs={}, seed=0).open()
        save_model(attempt.folder / "model", network.state_dict(), card)
        return attempt.finish(rows_in=1, rows_out=1, outputs=[f"model/{TENSORS}", f"model/{CARD}"])

    return commit


@pytest.fixture
def reads_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every segmenter answers what the frame says: class = red, confidence = green / 256."""

    def batch(self: predict.Segmenter, images: list[np.ndarray]) -> list[Segmented]:
        return [Segmented(image[..., 0].copy(), image[..., 1].astype(np.float32) / 256) for image in images]

    monkeypatch.setattr(predict.Segmenter, "batch", batch)


@pytest.fixture
def serial(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`map_shards` of my stages in this process, with the same protocol; the titles of the shards that were done."""
    from nightseg.stages import evaluate, evaluate_translation, predict, pseudo_label, translate

    done: list[str] = []

    def map_shards(
        rows: pa.Table,
        worker: Any,
        arguments: Mapping[str, Any],
        *,
        attempt: Attempt,
        shard_rows: int,
        title: str,
        **_: Any,
    ) -> list[ShardRecord]:
        num_shards, built = attempt.plan(rows.num_rows, shard_rows), None
        worker, arguments, attempt = pickle.loads(pickle.dumps((worker, dict(arguments), attempt)))  # as to an actor
        for index in range(num_shards):
            if attempt.shard(index) is None:
                built = built or worker(**arguments)
                part = rows.slice(index * shard_rows, shard_rows)
                attempt.write_shard(index, built(part, attempt.folder), rows_in=part.num_rows, seconds=0.0)
                done.append(f"{title} {index}")
        return [record for index in range(num_shards) if (record := attempt.shard(index))]

    for module in (evaluate, evaluate_translation, predict, pseudo_label, translate):
        monkeypatch.setattr(module, "map_shards", map_shards)
    return done


@pytest.fixture
def work(tmp_path: Path) -> Callable[..., Attempt]:
    """The open attempt of a stage; the same one again when it is asked for again."""

    def open_attempt(stage: str, name: str = "x") -> Attempt:
        return Workspace(tmp_path / "run").stage(stage, name, version=1, recipe={}, inputs={}, seed=0).open()

    return open_attempt


@pytest.fixture
def frame_file(tmp_path: Path) -> Callable[..., Location]:
    """Write bytes as a file of a data set."""

    def write(name: str, data: bytes) -> Location:
        place = Location.of(tmp_path / "data") / name
        place.write_bytes(data)
        return place

    return write
