"""What stages hand on: to the workers of a pass, and to the loop of a training. Neither is run on a cluster here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, NamedTuple
from unittest.mock import ANY

import numpy as np
import pyarrow as pa
import pytest
import torch

from nightseg.cluster.settings import MapCompute, TrainCompute
from nightseg.cluster.train import LocalSession
from nightseg.data.class_list import taxonomy
from nightseg.data.settings import ScenesDataset
from nightseg.data.table import frame_table
from nightseg.networks.model_folder import load_tensors
from nightseg.progress import SilentProgress
from nightseg.recipe.types import Evaluation
from nightseg.segmenter.predict import RowSegmenter
from nightseg.segmenter.settings import Inference, Loss
from nightseg.segmenter.start import starting_network
from nightseg.selection.features import identify
from nightseg.selection.settings import Extraction
from nightseg.stages import (
    collect,
    evaluate,
    label,
    predict,
    score,
    split,
    train_segmenter,
    train_translator,
    translate,
)
from nightseg.storage import Attempt, Commit, Location
from nightseg.translators.settings import PhotometricTranslator
from nightseg.unit.loss import TERMS
from tests.stages.test_train_segmenter import NETWORK, TRAINING, write_frames
from tests.stages.test_train_translator import attempt_in
from tests.unit.test_train import TINY
from tests.unit.test_train import frames as noise

CLASSES: Final = taxonomy("camvid11")
INFERENCE: Final = Inference(flip=True)
EVALUATION: Final = Evaluation(boundary=0.1)
LITE0: Final = Extraction(name="efficientnet_lite0")
OPTICS: Final = PhotometricTranslator(kind="photometric")
FRAMES: Final = frame_table(
    {"frame_id": f"d/{i}", "uri": f"/d/{i}.png", "label_uri": f"/l/{i}.png", "label_encoding": "train_ids"}
    for i in range(2)
)


class Handed(Exception):  # noqa: N818 (what is wanted)
    """Ends the stage when its pass would begin."""


class Pass(NamedTuple):
    """A call of a stage, and what its workers have to be given."""

    stage: Callable[..., Commit]
    inputs: tuple[Any, ...]
    settings: dict[str, Any]
    worker: str
    arguments: dict[str, Any]
    title: str


@pytest.fixture
def passes(model_commit: Callable[..., Commit]) -> Callable[[MapCompute], dict[str, Pass]]:
    """By name."""
    model = model_commit(CLASSES)
    folder, named = model.folder / "model", {"name": "x", "taxonomy": "camvid11"}

    def made(compute: MapCompute) -> dict[str, Pass]:
        segmenter = {"by": RowSegmenter(folder, compute, INFERENCE)}
        device = "cuda" if compute.gpus_per_actor else "cpu"
        extractor = {"extraction": LITE0, "precision": "float32", "weights_sha256": identify(LITE0).weights_sha256}
        return {
            "scenes": Pass(
                collect.collect,
                (ScenesDataset(layout="scenes", count=2, size=(8, 16), scene_seed=4),),
                named,
                "SceneWriter",
                {"dataset": "x", "scene_seed": 4, "height": 8, "width": 16, "palette": CLASSES.palette},
                "collect x",
            ),
            "split": Pass(split.split, (FRAMES,), {"margin": 0.2}, "HistogramFrames", {}, "split"),
            "translate": Pass(
                translate.translate,
                (FRAMES, OPTICS),
                {**named, "to": "night"},
                "TranslateUntrained",
                {"translate": ANY, "name": "x", "to": "night"},
                "translate x",
            ),
            "translate by UNIT": Pass(
                translate.translate,
                (FRAMES, model),
                {**named, "to": "night"},
                "TranslateFrames",
                {"model": folder, "batch": 3, "tile": None, "device": device, "name": "x", "to": "night"},
                "translate x",
            ),
            "score": Pass(
                score.score,
                (FRAMES, LITE0),
                {"positions": True},
                "ScoreFrames",
                {**extractor, "batch": 3, "positions": True, "spatial_reference": None, "device": device},
                "score by efficientnet_lite0",
            ),
            "label": Pass(
                label.label,
                (FRAMES, model),
                {"taxonomy": "camvid11", "inference": INFERENCE},
                "Labeller",
                segmenter,
                "labels of teacher",
            ),
            "evaluate": Pass(
                evaluate.evaluate,
                ({"night": FRAMES}, model),
                {**named, "evaluation": EVALUATION, "inference": INFERENCE},
                "Evaluator",
                {**segmenter, "classes": CLASSES, "evaluation": EVALUATION},
                "evaluate x",
            ),
            "folders": Pass(
                evaluate.evaluate_folders,
                (pa.table({"prediction_uri": ["/p/0.png"], "label_uri": ["/l/0.png"]}),),
                {"taxonomy": "camvid11", "label_encoding": "camvid12", "evaluation": EVALUATION},
                "PairCounter",
                {
                    "classes": CLASSES,
                    "encodings": ["camvid12"],
                    "evaluation": EVALUATION,
                    "threads": 1,
                    "skips_bad": True,
                },
                "evaluate",
            ),
            "predict": Pass(
                predict.predict,
                (FRAMES, model),
                {
                    "name": "x",
                    "save": ["overlay", "mask"],
                    "inference": INFERENCE,
                    "out": Location.of("/out"),
                    "legend": True,
                },
                "Predictor",
                {**segmenter, "save": ("mask", "overlay"), "out": Location.of("/out"), "legend": True},
                "predict x",
            ),
            "predict on a device": Pass(
                predict.predict,
                (FRAMES, folder),
                {"name": "x", "device": "cuda:1"},
                "Predictor",
                {
                    "by": RowSegmenter(folder, compute, Inference(), "cuda:1"),
                    "save": predict.PICTURES,
                    "out": None,
                    "legend": False,
                },
                "predict x",
            ),
        }

    return made


@pytest.mark.parametrize("gpus", [0.0, 0.5])
@pytest.mark.parametrize(
    "name",
    (
        *("scenes", "split", "translate", "translate by UNIT", "score", "label", "evaluate", "folders"),
        *("predict", "predict on a device"),
    ),
)
def test_a_pass_is_given_what_its_stage_is_given(
    passes: Callable[[MapCompute], dict[str, Pass]],
    work: Callable[..., Attempt],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    gpus: float,
) -> None:
    found: dict[str, Any] = {}

    def map_shards(rows: pa.Table, worker: Any, arguments: Mapping[str, Any], **more: Any) -> None:
        inspect.signature(worker).bind(**arguments)
        plain = {key: part.tolist() if isinstance(part, np.ndarray) else part for key, part in arguments.items()}
        found.update(more, worker=worker.__name__, arguments=plain)
        raise Handed

    compute = MapCompute(actors=2, cpus_per_actor=3.0, gpus_per_actor=gpus, batch=3, shard_rows=5)
    wanted = passes(compute)[name]
    monkeypatch.setattr(inspect.getmodule(wanted.stage), "map_shards", map_shards)
    given = {"compute": compute, "progress": SilentProgress(), "attempt": work("stage")}
    limit = {"max_bad_fraction": 0.5} if name != "folders" else {}
    with pytest.raises(Handed):
        wanted.stage(*wanted.inputs, **wanted.settings, **given, **limit)
    expected = given | limit | {"worker": wanted.worker, "arguments": wanted.arguments, "title": wanted.title}
    assert found == expected


# -- trainings --------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`fit` in this process; what it was given."""
    found: dict[str, Any] = {}

    def fit(loop: Any, settings: dict[str, Any], *, folder: Location, name: str, **more: Any) -> SimpleNamespace:
        found.update(more, folder=folder, name=name, plan=settings["plan"])
        session = LocalSession(folder / name)
        loop(session, settings)
        return SimpleNamespace(load=session.restore)

    torch.set_num_threads(1)
    for stage in (train_segmenter, train_translator):
        monkeypatch.setattr(stage, "fit", fit)
    return found


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_a_segmenter_is_trained_as_the_recipe_says_and_committed_with_its_history(
    trained: dict[str, Any], work: Callable[..., Attempt], tmp_path: Path, ema_decay: float
) -> None:
    rows, attempt = write_frames(Location.of(tmp_path) / "frames", 3), work("train_segmenter", "m")
    changes = {"ema_decay": ema_decay, "steps_per_epoch": 1, "warmup_steps": 1, "validate_every": 2}
    training, loss, progress = TRAINING.model_copy(update=changes), Loss(kind="combined"), SilentProgress()
    compute = TrainCompute(cpus_per_worker=2.0)
    commit = train_segmenter.train_segmenter(
        {"toy": rows},
        rows.slice(2),
        name="m",
        network=NETWORK,
        loss=loss,
        training=training,
        start="scratch",
        taxonomy="camvid11",
        seed=3,
        attempt=attempt,
        compute=compute,
        progress=progress,
    )
    plan = trained.pop("plan")
    assert trained == {
        "folder": attempt.folder / "trainer", "name": "m", "compute": compute, "progress": progress,
        "title": "train m", "total": plan.total_steps, "unit": "steps",
    }  # fmt: skip
    assert (plan.train, plan.validate, plan.seed, plan.classes) == (rows, rows.slice(2), 3, CLASSES)
    assert (plan.network, plan.loss, plan.training) == (NETWORK, loss, training)
    assert plan.curves == attempt.folder / "tensorboard"
    assert (commit.rows_in, commit.rows_out, commit.seconds > 0) == (3, 3, True)
    assert [output.path for output in commit.outputs] == ["history.json", "model/model.json", "model/model.safetensors"]
    history = commit.json("history.json")
    assert [record["epoch"] for record in history] == [1, 2]
    assert commit.summary["steps"] == plan.total_steps == 2 and commit.summary["last"] == history[1]
    tensors, card = load_tensors(commit.folder / "model")
    kept = card["weights"], card["start"], card["parents"], card["key"], card["seed"]
    assert kept == ("EMA, decay 0.5" if ema_decay else "last", "scratch", [], attempt.key, 3)
    assert not (attempt.folder / "trainer").exists() and not (attempt.folder / "start").exists()
    assert tensors.keys() == starting_network("scratch", NETWORK, CLASSES, seed=3).state_dict().keys()


def test_a_translator_is_trained_as_the_recipe_says_and_committed_with_its_history(
    trained: dict[str, Any], tmp_path: Path
) -> None:
    day, night = noise(tmp_path, "day", 2, 100, 255), noise(tmp_path, "night", 3, 0, 60)
    attempt, progress, compute = attempt_in(tmp_path), SilentProgress(), TrainCompute(cpus_per_worker=4.0)
    commit = train_translator.train_translator(
        TINY, day, night, seed=5, attempt=attempt, compute=compute, progress=progress
    )
    plan = trained.pop("plan")
    assert trained == {
        "folder": attempt.folder / "trainer", "name": "unit", "compute": compute, "progress": progress,
        "title": "train unit", "total": 7, "unit": "iterations",
    }  # fmt: skip
    assert ([frame.frame_id for frame in plan.day], len(plan.night)) == (["day/0", "day/1"], 3)
    assert (plan.settings, plan.seed, plan.threads, plan.log) == (TINY, 5, 3, attempt.folder)
    assert (commit.rows_in, commit.rows_out, commit.seconds > 0) == (5, 5, True)
    assert [output.path for output in commit.outputs] == [
        *("history.json", "model/model.json", "model/model.safetensors", "samples.png")
    ]
    last = commit.json("history.json")[-1]
    assert last["iteration"] == 7
    assert commit.summary == {"day": 2, "night": 3, "iteration": 7, **{term: last[term] for term in TERMS}}
    card = commit.json("model/model.json")
    assert (card["kind"], card["directions"], card["key"], card["seed"]) == ("unit", ["night", "day"], attempt.key, 5)
    assert (card["width"], card["res_blocks"], card["shared_blocks"], card["parents"]) == (2, 1, 0, [])
    assert card["training"]["iterations"] == 7 and not card["training"].keys() & {"width", "perceptual_weights", "tile"}
    assert not (attempt.folder / "trainer").exists()


@pytest.mark.parametrize(("cpus", "threads"), [(0.5, 1), (1.0, 1), (4.0, 3), (20.0, 8)])
def test_a_translator_decodes_beside_its_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cpus: float, threads: int
) -> None:
    def fit(loop: Any, settings: dict[str, Any], **_: Any) -> None:
        assert settings["plan"].threads == threads
        raise Handed

    monkeypatch.setattr(train_translator, "fit", fit)
    frames = noise(tmp_path, "day", 1, 100, 255)
    compute, progress = TrainCompute(cpus_per_worker=cpus), SilentProgress()
    with pytest.raises(Handed):
        train_translator.train_translator(
            TINY, frames, frames, seed=5, attempt=attempt_in(tmp_path), compute=compute, progress=progress
        )
