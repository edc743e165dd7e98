"""The scores are those of cityscapesScripts, and of detectron2's rule, with ignored and with absent classes.

cityscapesScripts is an optional peer: pip install -e '.[peers]'.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from nightseg.cluster.settings import MapCompute
from nightseg.data.class_list import taxonomy
from nightseg.data.images import encode_png
from nightseg.metrics.confusion import add_up, confusion_matrix, scores
from nightseg.pipeline.single import evaluate_folders
from nightseg.progress import SilentProgress
from nightseg.recipe.types import Evaluation
from nightseg.storage import Location

Map = npt.NDArray[np.uint8]
TRAIN, BUS, TRUCK = 31, 28, 27  # label ids of Cityscapes
STATIC, OUT_OF_ROI = 4, 3  # two that are ignored


def street(seed: int) -> tuple[Map, Map]:
    """Label and prediction in label ids, 48 x 96: areas, a prediction that is right in most, ignored areas in both.

    No label has a train, but some predictions have; buses are nowhere; trucks are never predicted.
    """
    rng = np.random.default_rng(seed)
    ids = [raw for raw, train_id in taxonomy("cityscapes19").encodings["label_ids"].items() if train_id != 255]
    labelled = [raw for raw in ids if raw not in (TRAIN, BUS)]
    coarse = rng.choice(labelled, (12, 24))
    other = rng.choice([raw for raw in ids if raw not in (BUS, TRUCK)], coarse.shape)
    guess = np.where((rng.random(coarse.shape) < 0.7) & (coarse != TRUCK), coarse, other)
    guess = np.where(rng.random(coarse.shape) < 0.05, STATIC, guess)
    label = np.where(rng.random(coarse.shape) < 0.1, rng.choice([STATIC, OUT_OF_ROI, 0], coarse.shape), coarse)
    label_HW, guess_HW = (np.kron(area, np.ones((4, 4), np.int64)).astype(np.uint8) for area in (label, guess))
    return label_HW, np.roll(guess_HW, rng.integers(0, 3, 2), (0, 1))


def cityscapes_scripts(folder: Path, frames: list[tuple[Map, Map]]) -> dict[str, Any]:
    """Their evaluation of label ids in files; without instances, which need files of their own."""
    module = pytest.importorskip(
        "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling", reason="pip install -e '.[peers]'"
    )
    files: tuple[list[str], list[str]] = ([], [])
    for index, frame in enumerate(frames):
        for names, kind, array in zip(files, ("gt", "pred"), frame, strict=True):
            names.append(str(folder / f"{kind}{index}.png"))
            Path(names[-1]).write_bytes(encode_png(array))
    settings = module.args
    settings.evalInstLevelScore, settings.evalPixelAccuracy = False, False
    settings.JSONOutput, settings.quiet = False, True
    return dict(module.evaluateImgLists(files[1], files[0], settings))


@pytest.mark.parametrize("count", [1, 4])
def test_scores_are_those_of_cityscapes_scripts(tmp_path: Path, count: int) -> None:
    frames = [street(seed) for seed in range(count)]
    theirs = cityscapes_scripts(tmp_path, frames)
    classes = taxonomy("cityscapes19")
    to_train_ids = classes.lut("label_ids")[0]
    for index, (label, guess) in enumerate(frames):
        (Location.of(tmp_path) / f"labels/frame{index}_gtFine_labelIds.png").write_bytes(encode_png(label))
        (Location.of(tmp_path) / f"guesses/frame{index}.png").write_bytes(encode_png(to_train_ids[guess]))
    ours = evaluate_folders(
        Location.of(tmp_path / "guesses"),
        Location.of(tmp_path / "labels"),
        "cityscapes19",
        evaluation=Evaluation(),
        compute=MapCompute(actors=0),
        progress=SilentProgress(),
    )
    assert ours["miou"] == pytest.approx(theirs["averageScoreClasses"], abs=1e-9)
    for name, iou in ours["iou"].items():
        peer = theirs["classScores"][name]
        assert (iou is None) == math.isnan(peer)
        assert iou is None or iou == pytest.approx(peer, abs=1e-9)
    assert ours["iou"]["train"] == 0.0 and ours["iou"]["bus"] is None and ours["iou"]["truck"] == 0.0
    matrix = add_up([confusion_matrix(to_train_ids[label], to_train_ids[guess], 19) for label, guess in frames], 19)
    assert scores(matrix).miou == ours["miou"]


def detectron2_rule(label: Map, guess: Map, num_classes: int) -> dict[str, Any]:
    """SemSegEvaluator's figures from masks: accuracy and IoU of the classes that the labels have, and their means."""
    label, guess = label[label != 255], guess[label != 255]
    iou = dict.fromkeys(range(num_classes), math.nan)
    accuracy, share = [], {}
    for index in range(num_classes):
        in_label, in_guess = label == index, guess == index
        if in_label.any():
            both = np.count_nonzero(in_label & in_guess)
            iou[index] = both / np.count_nonzero(in_label | in_guess)
            accuracy.append(both / np.count_nonzero(in_label))
            share[index] = np.count_nonzero(in_label) / label.size
    return {
        "pa": np.count_nonzero(label == guess) / label.size,
        "ca": sum(accuracy) / len(accuracy),
        "miou": sum(iou[index] for index in share) / len(share),
        "fwiou": sum(iou[index] * share[index] for index in share),
        "iou": list(iou.values()),
    }


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_detectron2s_rule(seed: int) -> None:
    to_train_ids = taxonomy("cityscapes19").lut("label_ids")[0]
    frames = []
    for number in range(3):
        label, guess = street(10 * seed + number)
        guess = np.where(guess == STATIC, 7, guess)  # its networks always choose a class
        frames.append((to_train_ids[label], to_train_ids[guess]))
    expected = detectron2_rule(*(np.concatenate(part) for part in zip(*frames, strict=True)), num_classes=19)
    found = scores(add_up([confusion_matrix(*frame, 19) for frame in frames], 19), "detectron2")
    for key in ("pa", "ca", "miou", "fwiou"):
        assert getattr(found, key) == pytest.approx(expected[key], abs=1e-9)
    assert found.iou == pytest.approx(expected["iou"], abs=1e-9, nan_ok=True)
    train = taxonomy("cityscapes19").classes.index("train")
    assert math.isnan(found.iou[train])  # only predicted: left out here, 0 in Cityscapes
