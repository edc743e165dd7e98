"""The verbs that need no recipe: what they ask of the work behind them, and how they answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nightseg.cluster.settings import MapCompute
from nightseg.data.class_list import taxonomy
from nightseg.data.images import encode_png
from nightseg.interop import onnx as export_module
from nightseg.networks.model_folder import save_model
from nightseg.pipeline import single
from nightseg.recipe.types import Evaluation
from nightseg.segmenter.network import build_semantic_fpn
from nightseg.segmenter.settings import Inference, Network
from nightseg.selection.frechet import Statistics, write_statistics
from nightseg.selection.settings import Extraction, Selection
from nightseg.storage import Location
from tests.command_line import forbid_ray, good, json_of, refused


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_ray(monkeypatch)


def test_fid_of_two_files_of_statistics_needs_no_frame(tmp_path: Path) -> None:
    for name, mean in (("a", 0.0), ("b", 2.0)):
        made = Statistics(np.full(3, mean), np.eye(3), 10, "efficientnet_lite0", "clean", "")
        write_statistics(Location.of(tmp_path / f"{name}.npz"), made)
    answer = json_of("fid", tmp_path / "a.npz", tmp_path / "b.npz")
    assert answer["fid"] == pytest.approx(12.0)
    assert (answer["n_a"], answer["extractor"], answer["resize"]) == (10, "efficientnet_lite0", "clean")
    assert "fid: 12\n" in good("fid", tmp_path / "a.npz", tmp_path / "b.npz").stdout


def test_fid_of_what_does_not_compare_is_refused_before_a_frame_is_read(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"images/{name}.png").write_bytes(encode_png(np.full((8, 8, 3), 90, np.uint8)))
    made = Statistics(np.zeros(3), np.eye(3), 10, "inception", "pytorch-fid", "")
    write_statistics(Location.of(tmp_path / "a.npz"), made)
    words = ("fid", tmp_path / "images", tmp_path / "a.npz", "--extractor", "efficientnet_lite0")
    assert "do not compare" in refused(*words)
    assert "no such folder" in refused("fid", tmp_path / "images", tmp_path / "gone")


@pytest.fixture
def masks(tmp_path: Path) -> tuple[Path, Path]:
    """Two predictions and their labels: class 0 right in 3 of 4 pixels, class 3 in all of 4."""
    label = np.array([[0, 0, 3, 3], [0, 0, 3, 3]], dtype=np.uint8)
    guess = label.copy()
    guess[0, 0] = 3
    for folder, array in (("predictions", guess), ("labels", label)):
        (tmp_path / folder).mkdir()
        for name in ("a", "b"):
            (tmp_path / folder / f"{name}.png").write_bytes(encode_png(array))
    return tmp_path / "predictions", tmp_path / "labels"


def test_evaluate_gives_fractions_in_json_and_percent_to_people(masks: tuple[Path, Path]) -> None:
    answer = json_of("evaluate", *masks, "--taxonomy", "camvid11")
    assert answer["pa"] == pytest.approx(7 / 8)
    assert answer["iou"]["sky"] == pytest.approx(3 / 4) and answer["iou"]["road"] == pytest.approx(4 / 5)
    assert answer["iou"]["car"] is None and answer["frames"] == 2
    out = good("evaluate", *masks, "--taxonomy", "camvid11").stdout
    assert "2 frames, percent" in out and "75.0" in out and "77.5" in out and "boundary" not in out


def test_evaluate_says_what_it_takes_labels_for_and_asks_in_doubt(masks: tuple[Path, Path]) -> None:
    answer = json_of("evaluate", *masks, "--taxonomy", "camvid11")
    assert answer["label_encoding"] == "train_ids" and answer["labels"]["why"] == "by their ids"
    assert "labels read as train_ids" in good("evaluate", *masks, "--taxonomy", "camvid11").stdout
    for folder, ids in zip(masks, ((0, 1), (7, 8)), strict=True):  # road and sidewalk, or sign and vegetation
        for file in folder.iterdir():
            file.write_bytes(encode_png(np.array([ids], np.uint8)))
    told = refused("evaluate", *masks, "--taxonomy", "cityscapes19")
    assert "may be train_ids or label_ids" in told
    assert "Cure: say what the ids mean by --label-encoding train_ids or label_ids" in told
    words = ("evaluate", *masks, "--taxonomy", "cityscapes19", "--label-encoding", "label_ids")
    assert json_of(*words)["miou"] == 1.0
    (masks[1] / "lonely.png").write_bytes(encode_png(np.array([[7, 8]], np.uint8)))
    told = refused("evaluate", *masks, "--taxonomy", "cityscapes19")
    assert "lonely.png" in told and "--label-encoding train_ids or label_ids" in told, "both in one message"


def test_evaluate_measures_boundaries_and_takes_an_encoding(masks: tuple[Path, Path]) -> None:
    words = ("evaluate", *masks, "--taxonomy", "camvid11", "--boundary", "--label-encoding", "camvid12")
    answer = json_of(*words)
    assert answer["boundary"]["distance"] == 0.02 and answer["label_encoding"] == "camvid12"
    assert answer["boundary"]["iou"]["sky"] == pytest.approx(3 / 4)  # so few pixels are all boundary
    assert json_of(*words, "--boundary-distance", "0.3")["boundary"]["distance"] == 0.3
    assert "boundary IoU" in good(*words).stdout
    assert all("is not in the range" in refused(*words, "--boundary-distance", edge) for edge in ("0", "1"))
    assert "no label encoding 'camvid', did you mean 'camvid12'" in refused(*words[:-1], "camvid")


def test_predict_writes_masks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classes = taxonomy("camvid11")
    card = {
        "kind": "semantic_fpn",
        "encoder": "resnet18",
        "num_classes": 11,
        "pyramid_channels": 8,
        "head_channels": 8,
        "input_size": [32, 64],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
        "taxonomy": {
            "name": classes.name,
            "classes": list(classes.classes),
            "palette": [list(colour) for colour in classes.palette],
        },
    }
    network = build_semantic_fpn(Network(encoder="resnet18", pyramid_channels=8, head_channels=8), num_classes=11)
    save_model(Location.of(tmp_path / "model"), network.state_dict(), card)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(encode_png(np.full((32, 64, 3), 90, np.uint8)))
    (tmp_path / "images/empty.jpg").write_bytes(b"")
    words = ("predict", tmp_path / "model", tmp_path / "images", "--out", tmp_path / "masks", "--save", "color, mask")
    answer = json_of(*words)
    assert (answer["written"], answer["quarantined"], answer["save"]) == (1, 1, ["mask", "color"])
    assert (tmp_path / "masks/a.png").exists()
    assert "quarantined: 1\n" in good(*words).stdout
    gone = refused("predict", tmp_path / "model", tmp_path / "gone", "--out", tmp_path / "o")
    assert "no such file or folder" in gone


def test_predict_passes_on_what_it_was_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def predict_frames(model: Location, source: str, out: Location, **more: Any) -> dict[str, Any]:
        asked.update(more, source=source, out=out)
        return {"written": 3}

    monkeypatch.setattr(single, "predict_frames", predict_frames)
    (tmp_path / "model.json").write_text("{}")
    words = ("predict", tmp_path, "drives/**/*.jpg", "--out", "o")
    assert json_of(*words) == {"written": 3}
    del asked["progress"]
    assert asked == {
        "source": "drives/**/*.jpg", "out": Location.of("o"), "save": ("mask",), "inference": Inference(),
        "device": None, "overlay_video": False, "legend": False, "max_bad_fraction": 1.0,
        "compute": MapCompute(actors=0),
    }  # fmt: skip
    looks = (
        "--window",
        "512x1024",
        "--overlap",
        "0.5",
        "--flip",
        "--scales",
        "0.75, 1,1.25",
        "--precision",
        "bfloat16",
    )
    rest = ("--batch", "3", "--device", "cpu", "--actors", "2", "--overlay-video", "--save", "color")
    json_of(*words, *looks, *rest)
    del asked["progress"]
    assert asked == {
        "source": "drives/**/*.jpg", "out": Location.of("o"), "save": ("color",), "device": "cpu",
        "inference": Inference(
            window=(512, 1024), overlap=0.5, flip=True, scales=(0.75, 1.0, 1.25), precision="bfloat16"
        ),
        "overlay_video": True, "legend": False, "compute": MapCompute(actors=2, batch=3), "max_bad_fraction": 1.0,
    }  # fmt: skip


def test_export_shows_the_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check = {"batch": 2, "height": 65, "width": 93, "max_abs_difference": 1.5e-6}
    check |= {"label_agreement": 1.0, "segmenter_agreement": 0.9965}
    asked: dict[str, Any] = {}

    def export_onnx(model: Location, out: Location, **more: Any) -> dict[str, Any]:
        asked.update(more)
        return {"out": "night.onnx", "checks": [check]}

    monkeypatch.setattr(export_module, "export_onnx", export_onnx)
    (tmp_path / "model.json").write_text("{}")
    words = (
        "export",
        tmp_path,
        "--out",
        "night.onnx",
        "--size",
        "512x1024",
        "--output",
        "logits",
        "--tolerance",
        "1e-5",
    )
    assert json_of(*words) == {"out": "night.onnx", "checks": [check]}
    assert asked == {"size": (512, 1024), "output": "logits", "tolerance": 1e-5}
    out = good(*words).stdout
    assert "2 x 65 x 93" in out and "1.5e-06" in out and "100.000" in out and "99.650" in out


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        (
            "split_folder",
            ("split", "pool", "--out", "f.parquet", "--margin", "0.1", "--actors", "5"),
            {
                "0": "pool",
                "1": "f.parquet",
                "margin": 0.1,
                "max_bad_fraction": 1.0,
                "compute": MapCompute(actors=5),
            },
        ),
        (
            "select_frames",
            (
                *("select", "p", "--reference", "r", "--count", "3", "--out", "o", "--seed", "4", "--quota", "2"),
                *("--method", "pooled", "--gap", "6", "--duplicates", "0.9", "--extractor", "resnet18", "--fast"),
                *("--resize", "clean", "--weights", "w.pth"),
            ),
            {
                "0": "p",
                "1": "r",
                "2": "o",
                "seed": 4,
                "max_bad_fraction": 1.0,
                "compute": MapCompute(actors=0),
                "selection": Selection(
                    method="pooled",
                    count=3,
                    quota=2,
                    gap=6,
                    duplicates=0.9,
                    extractor=Extraction(name="resnet18", weights="w.pth", resize="clean", mode="fast"),
                ),
            },
        ),
        (
            "evaluate_folders",
            (
                *("evaluate", "p", "l", "--taxonomy", "camvid11", "--label-encoding", "camvid12", "--boundary"),
                *("--boundary-distance", "0.1", "--absent-class", "detectron2", "--actors", "2", "--work", "w"),
            ),
            {
                "0": Location.of("p"),
                "1": Location.of("l"),
                "2": "camvid11",
                "label_encoding": "camvid12",
                "evaluation": Evaluation(boundary=0.1, absent_class="detectron2"),
                "max_bad_fraction": 0.0,
                "compute": MapCompute(actors=2),
                "work": Location.of("w"),
            },
        ),
    ],
)
def test_verbs_pass_on_what_they_were_given(
    monkeypatch: pytest.MonkeyPatch, name: str, words: tuple[str, ...], expected: dict[str, Any]
) -> None:
    asked: dict[str, Any] = {}

    def step(*arguments: Any, **named: Any) -> dict[str, Any]:
        asked.update({str(place): value for place, value in enumerate(arguments)} | named)
        return {"frames": 3}

    monkeypatch.setattr(single, name, step)
    assert json_of(*words) == {"frames": 3}
    del asked["progress"]
    assert asked == expected


def test_fid_passes_on_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def distance(*sides: str, **named: Any) -> dict[str, Any]:
        asked.update(named, sides=sides)
        return {"fid": 1.0}

    monkeypatch.setattr(single, "distance", distance)
    words = ("fid", "a", "b", "--extractor", "resnet18", "--weights", "w.pth", "--resize", "clean", "--fast")
    assert json_of(*words, "--save-a", "a.npz", "--save-b", "b.npz", "--work", "w", "--actors", "4")["fid"] == 1.0
    del asked["progress"]
    assert asked == {
        "sides": ("a", "b"), "insist": True, "max_bad_fraction": 0.01, "work": Location.of("w"),
        "save_statistics": ("a.npz", "b.npz"), "compute": MapCompute(actors=4),
        "extraction": Extraction(name="resnet18", weights="w.pth", resize="clean", mode="fast"),
    }  # fmt: skip
    json_of("fid", "a", "b")
    assert (asked["insist"], asked["work"], asked["extraction"]) == (False, None, Extraction(name="inception"))


@pytest.mark.parametrize("verb", ["split", "fid", "select", "predict"])
def test_every_verb_that_reads_frames_says_how_many_may_be_bad(verb: str) -> None:
    assert "--max-bad-fraction" in good(verb, "--help").stdout
