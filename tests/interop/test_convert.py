"""detectron2's checkpoints as model folders and back, on disk and on the command line."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from PIL import Image
from torch import Tensor

from nightseg import load_model
from nightseg.cli.main import main
from nightseg.data.class_list import taxonomy
from nightseg.interop.detectron2 import ORIGINAL_CONV1
from nightseg.networks.model_folder import CARD, load_tensors, save_model
from nightseg.segmenter.detectron2 import their_name
from nightseg.segmenter.network import build_semantic_fpn, upsample_logits
from nightseg.segmenter.predict import input_size
from nightseg.segmenter.settings import Network
from nightseg.storage import Location, sha256_of

ZOO = ["--channels", "BGR", "--pixel-mean", "103.53,116.28,123.675", "--pixel-std", "1,1,1", "--stride-in-3x3"]
CONFIG = {
    "MODEL": {
        "META_ARCHITECTURE": "PanopticFPN",
        "BACKBONE": {"NAME": "build_resnet_fpn_backbone"},
        "RESNETS": {"DEPTH": 18, "RES2_OUT_CHANNELS": 64},
        "FPN": {"IN_FEATURES": ["res2", "res3", "res4", "res5"]},
    }
}


def nightseg(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def json_of(*words: object) -> dict[str, Any]:
    result = nightseg(*words, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert isinstance(answer, dict)
    return answer


def refused(*words: object) -> str:
    result = nightseg(*words)
    assert result.exit_code == 2, result.output
    return result.output


@pytest.fixture(scope="module")
def theirs() -> dict[str, Tensor]:
    """A PanopticFPN of detectron2 on a narrow ResNet-18, 11 classes."""
    torch.manual_seed(0)
    small = Network(encoder="resnet18", pyramid_channels=8, head_channels=32, norm="frozen")
    network = build_semantic_fpn(small, num_classes=11)
    tensors = {their_name(name): tensor.clone() for name, tensor in network.state_dict().items()}
    tensors["backbone.bottom_up.stem.conv1.weight"] /= 50  # about what bytes need
    return tensors | {"roi_heads.box_head.fc1.weight": torch.zeros(2), "pixel_mean": torch.zeros(3, 1, 1)}


@pytest.fixture
def checkpoint(tmp_path: Path, theirs: dict[str, Tensor]) -> Path:
    (tmp_path / "out").mkdir()
    torch.save({"model": theirs, "iteration": 9}, tmp_path / "out" / "model_final.pth")
    (tmp_path / "out" / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path / "out" / "model_final.pth"


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].numpy().tobytes() == tensor.numpy().tobytes() for name, tensor in expected.items()
    )


def kept(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in theirs.items() if not name.startswith(("roi_heads", "pixel_"))}


def test_there_predicts_and_back_is_bit_for_bit(checkpoint: Path, theirs: dict[str, Tensor], tmp_path: Path) -> None:
    model, config = tmp_path / "model", checkpoint.parent / "config.yaml"
    words = ("convert", "detectron2", checkpoint, model, "--config", config, "--taxonomy", "camvid11")
    answer = json_of(*words)
    assert answer["left_out"] == {"roi_heads": 1, "pixel_mean": 1}
    assert (answer["encoder"], answer["norm"], answer["freeze_at"], answer["num_classes"]) == (
        "resnet18",
        "frozen",
        2,
        11,
    )
    assert answer["sha256"] == sha256_of(checkpoint.read_bytes())

    tensors, card = load_tensors(Location.of(model))
    assert card["detectron2"]["source"]["sha256"] == answer["sha256"]
    assert card["detectron2"]["source"]["config_sha256"] == sha256_of(config.read_bytes())
    assert card["detectron2"]["config"]["channels"] == "BGR"
    assert card["stride_in_1x1"] is False
    assert len(tensors) == len(kept(theirs))
    labels, confidence = load_model(model)(np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8))
    assert labels.shape == confidence.shape == (45, 70)
    assert load_model(model).taxonomy.classes == taxonomy("camvid11").classes

    back = json_of("convert", "to-detectron2", model, tmp_path / "back.pth")
    written = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert same(written, kept(theirs))
    assert back["tensors"] == len(written)
    again = json_of("convert", "detectron2", back["checkpoint"], tmp_path / "again", "--config", back["config"])
    assert same(load_tensors(Location.of(tmp_path / "again"))[0], tensors)
    assert again["taxonomy"] == "numbers11"


def shortest_edge(height: int, width: int, least: int, most: int) -> tuple[int, int]:
    """ResizeShortestEdge.get_output_shape (detectron2/data/transforms/augmentation_impl.py), line by line."""
    size = least * 1.0
    scale = size / min(height, width)
    if height < width:
        newh, neww = size, scale * width
    else:
        newh, neww = scale * height, size
    if max(newh, neww) > most:
        scale = most * 1.0 / max(newh, neww)
        newh = newh * scale
        neww = neww * scale
    return int(newh + 0.5), int(neww + 0.5)


def predictor(theirs: Mapping[str, Tensor], image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """detectron2's DefaultPredictor and SemanticSegmentor on an RGB image, its input BGR bytes less their mean."""
    network = build_semantic_fpn(
        Network(encoder="resnet18", pyramid_channels=8, head_channels=32, norm="frozen"), num_classes=11
    ).eval()
    network.load_state_dict({name: theirs[their_name(name)] for name in network.state_dict()})
    resized = np.asarray(Image.fromarray(image[:, :, ::-1]).resize(size[::-1], Image.Resampling.BILINEAR))
    seen = torch.from_numpy(resized.astype("float32").transpose(2, 0, 1))[None]
    with torch.no_grad():
        logits = network(seen - torch.tensor([103.53, 116.28, 123.675]).view(1, 3, 1, 1))
    result = upsample_logits(logits, *size)
    whole = torch.nn.functional.interpolate(result, size=image.shape[:2], mode="bilinear", align_corners=False)
    return whole[0].argmax(dim=0).numpy()


@pytest.mark.parametrize(
    ("frame", "least", "most", "seen"),
    [
        ((48, 64), 80, 133, (80, 107)),  # 106.67
        ((48, 128), 80, 133, (50, 133)),  # capped: 133 / 213.3
        ((90, 40), 32, 200, (72, 32)),
        ((120, 160), 64, 1333, (64, 85)),  # smaller than the frame
        ((48, 64), 0, 0, (48, 64)),
        ((33, 31), 32, 33, (33, 31)),  # 34.06 capped: 32 becomes 31
        ((2, 300), 80, 133, (1, 133)),  # 0.89
    ],
)
def test_labels_are_those_of_detectron2s_predictor(
    checkpoint: Path,
    theirs: dict[str, Tensor],
    tmp_path: Path,
    frame: tuple[int, int],
    least: int,
    most: int,
    seen: tuple[int, int],
) -> None:
    config = CONFIG | {"INPUT": {"MIN_SIZE_TEST": least, "MAX_SIZE_TEST": most}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    json_of("convert", "detectron2", checkpoint, tmp_path / "model", "--config", tmp_path / "config.yaml")
    if least:
        assert shortest_edge(*frame, least, most) == seen
    image = np.random.default_rng(0).integers(0, 256, (*frame, 3), dtype=np.uint8)
    segment = load_model(tmp_path / "model", "cpu")
    assert input_size(segment.card, frame) == seen
    found = segment(image).labels
    # The first convolution is folded, which rounds: where two classes are equally likely that decides.
    assert (found == predictor(theirs, image, seen)).mean() > 0.995
    if seen != frame and least:
        assert (found == predictor(theirs, image, frame)).mean() < 0.98  # so the size does matter here


def test_sizes_are_detectron2s_for_all_frames() -> None:
    rng = np.random.default_rng(0)
    for least, most in ((800, 1333), (512, 1024), (1, 7), (1024, 2048), (333, 334)):
        card = {"input_size": None, "shortest_edge": [least, most]}
        for height, width in rng.integers(1, 3000, (400, 2)).tolist():
            wanted = shortest_edge(height, width, least, most)
            assert input_size(card, (height, width)) == tuple(max(1, side) for side in wanted)


def test_the_size_of_frames_goes_back_to_detectron2(checkpoint: Path, tmp_path: Path) -> None:
    def sizes(model: Path) -> tuple[int, int]:
        answer = json_of("convert", "to-detectron2", model, tmp_path / "out.pth")
        seen = yaml.safe_load(Path(answer["config"]).read_text())["INPUT"]
        return seen["MIN_SIZE_TEST"], seen["MAX_SIZE_TEST"]

    answer = json_of("convert", "detectron2", checkpoint, tmp_path / "zoo", *ZOO)
    assert answer["frames"].startswith("resized to a shorter side of 800, a longer one of at most 1333; not said")
    assert sizes(tmp_path / "zoo") == (800, 1333)
    json_of("convert", "detectron2", checkpoint, tmp_path / "own", *ZOO, "--min-size-test", 0)
    assert sizes(tmp_path / "own") == (0, 1333)
    json_of("convert", "detectron2", checkpoint, tmp_path / "a", *ZOO, "--min-size-test", 512, "--max-size-test", 2048)
    assert sizes(tmp_path / "a") == (512, 2048)
    for size, wanted in ((None, (0, 1333)), ([240, 320], (240, 320)), ([320, 240], (240, 320))):
        card = json.loads((tmp_path / "own" / CARD).read_text())
        card["input_size"] = size
        del card["detectron2"], card["sha256"]  # a model that was trained here
        card.pop("shortest_edge", None)
        (tmp_path / "trained").mkdir(exist_ok=True)
        (tmp_path / "trained" / CARD).write_text(json.dumps(card))
        (tmp_path / "trained" / "model.safetensors").write_bytes((tmp_path / "own" / "model.safetensors").read_bytes())
        assert sizes(tmp_path / "trained") == wanted


def test_what_a_config_says_of_training_is_kept_and_an_ignored_class_is_said(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads(json.dumps(CONFIG))
    config["MODEL"]["SEM_SEG_HEAD"] = {"IGNORE_VALUE": 3, "LOSS_WEIGHT": 0.5, "NUM_CLASSES": 11}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    answer = json_of("convert", "detectron2", checkpoint, tmp_path / "model", "--config", tmp_path / "config.yaml")
    assert answer["ignored_class"] == "class 3"
    json_of("convert", "to-detectron2", tmp_path / "model", tmp_path / "out.pth")
    head = yaml.safe_load((tmp_path / "out.yaml").read_text())["MODEL"]["SEM_SEG_HEAD"]
    assert (head["IGNORE_VALUE"], head["LOSS_WEIGHT"], head["NUM_CLASSES"]) == (3, 0.5, 11)


@pytest.mark.parametrize(
    ("section", "key", "part"),
    [
        ("SEM_SEG_HEAD", "NUM_CLASSES", "NUM_CLASSES is 54, but the tensors are made for 11"),
        ("SEM_SEG_HEAD", "CONVS_DIM", "CONVS_DIM is 54, but the tensors are made for 32"),
        ("FPN", "OUT_CHANNELS", "OUT_CHANNELS is 54, but the tensors are made for 8"),
    ],
)
def test_a_config_of_other_sizes_is_refused(
    checkpoint: Path, tmp_path: Path, section: str, key: str, part: str
) -> None:
    config = json.loads(json.dumps(CONFIG))
    config["MODEL"].setdefault(section, {})[key] = 54
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    words = ("convert", "detectron2", checkpoint, tmp_path / "model", "--config", tmp_path / "config.yaml")
    assert part in refused(*words)


def test_the_answer_to_people_says_what_was_done(checkpoint: Path, tmp_path: Path) -> None:
    result = nightseg("convert", "detectron2", checkpoint, tmp_path / "model", *ZOO)
    assert result.exit_code == 0, result.output
    assert "left_out: roi_heads 1, pixel_mean 1" in result.stdout
    assert "folded into the first convolution" in result.stdout


def test_a_pickle_of_the_zoo_gives_the_same_model(checkpoint: Path, theirs: dict[str, Tensor], tmp_path: Path) -> None:
    arrays = {name: tensor.numpy() for name, tensor in theirs.items()}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "them"}, protocol=2))
    json_of("convert", "detectron2", checkpoint, tmp_path / "first", *ZOO)
    json_of("convert", "detectron2", tmp_path / "zoo.pkl", tmp_path / "second", *ZOO)
    first, second = (load_tensors(Location.of(tmp_path / name))[0] for name in ("first", "second"))
    assert same(first, second)


def test_a_model_that_was_never_detectron2s_goes_there_as_rgb(checkpoint: Path, tmp_path: Path) -> None:
    json_of("convert", "detectron2", checkpoint, tmp_path / "model", *ZOO)
    card = json.loads((tmp_path / "model" / CARD).read_text())
    del card["detectron2"], card["sha256"]
    (tmp_path / "model" / CARD).write_text(json.dumps(card))
    (tmp_path / "model" / ORIGINAL_CONV1).unlink()
    json_of("convert", "to-detectron2", tmp_path / "model", tmp_path / "out.pth")
    config = yaml.safe_load((tmp_path / "out.yaml").read_text())
    assert config["INPUT"]["FORMAT"] == "RGB"
    assert config["MODEL"]["PIXEL_STD"] == [58.395, 57.12, 57.375]
    written = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    ours = load_tensors(Location.of(tmp_path / "model"))[0]
    assert torch.equal(written["backbone.bottom_up.stem.conv1.weight"], ours["body.conv1.weight"])


def test_a_original_conv1_of_other_weights_is_not_taken(checkpoint: Path, tmp_path: Path) -> None:
    """A folder whose tensors were replaced by later ones: they win."""
    json_of("convert", "detectron2", checkpoint, tmp_path / "model", *ZOO)
    tensors, card = load_tensors(Location.of(tmp_path / "model"))
    tensors["body.conv1.weight"] *= 3
    save_model(Location.of(tmp_path / "model"), tensors, card)
    json_of("convert", "to-detectron2", tmp_path / "model", tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    original = torch.load(checkpoint, weights_only=True)["model"]
    name = "backbone.bottom_up.stem.conv1.weight"
    torch.testing.assert_close(written[name], 3 * original[name])


def test_the_config_is_never_guessed(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    message = refused("convert", "detectron2", checkpoint, out)
    assert f"--config {checkpoint.parent / 'config.yaml'}" in message.replace("\n", "")
    (checkpoint.parent / "config.yaml").unlink()
    assert "--channels BGR" in refused("convert", "detectron2", checkpoint, out)
    assert "missing: --pixel-std, --stride-in-1x1" in refused("convert", "detectron2", checkpoint, out, *ZOO[:4])
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--config", "gone.yaml"], "there is no config file"),
        (["--config", "gone.yaml", *ZOO], "exclude each other"),
        ([*ZOO[:-1], "--stride-in-1x1"], "blocks of resnet18"),
        ([*ZOO, "--taxonomy", "cityscapes19"], "predicts 11 classes"),
        ([*ZOO, "--taxonomy", "cityscape"], "unknown taxonomy"),
        ([*ZOO, "--pixel-mean", "1,2"], "not three numbers"),
        ([*ZOO, "--pixel-mean", "1,2,nan"], "not three numbers"),
        ([*ZOO, "--pixel-mean", "1,2,3"], "pads with zeros"),
        ([*ZOO, "--channels", "GRB"], "GRB"),
    ],
)
def test_requests_that_cannot_be_are_refused_and_leave_nothing(
    checkpoint: Path, tmp_path: Path, words: list[str], part: str
) -> None:
    assert part in refused("convert", "detectron2", checkpoint, tmp_path / "model", *words)
    assert not (tmp_path / "model").exists()


def test_a_model_is_not_written_over(checkpoint: Path, tmp_path: Path) -> None:
    words = ("convert", "detectron2", checkpoint, tmp_path / "model", *ZOO)
    json_of(*words)
    before = (tmp_path / "model" / CARD).read_bytes()
    assert "is a model folder already" in refused(*words)
    assert (tmp_path / "model" / CARD).read_bytes() == before


def test_what_is_not_there_and_what_is_no_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    assert "no checkpoint" in refused("convert", "detectron2", tmp_path / "gone.pth", tmp_path / "model", *ZOO)
    (tmp_path / "text.pth").write_text("hello")
    assert "damaged" in refused("convert", "detectron2", tmp_path / "text.pth", tmp_path / "model", *ZOO)
    assert "neither a model folder" in refused("convert", "to-detectron2", tmp_path, tmp_path / "out.pth")
    json_of("convert", "detectron2", checkpoint, tmp_path / "model", *ZOO)
    assert "ends with .pth" in refused("convert", "to-detectron2", tmp_path / "model", tmp_path / "out.pkl")


def test_unfrozen_norms_go_back_as_trainable_ones(checkpoint: Path, tmp_path: Path) -> None:
    assert json_of("convert", "detectron2", checkpoint, tmp_path / "model", *ZOO, "--unfreeze")["norm"] == "batch"
    json_of("convert", "to-detectron2", tmp_path / "model", tmp_path / "out.pth")
    assert yaml.safe_load((tmp_path / "out.yaml").read_text())["MODEL"]["RESNETS"]["NORM"] == "BN"
    written = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert "backbone.bottom_up.stem.conv1.norm.num_batches_tracked" in written
