"""The portable form against the segmenter it comes from; the graph against both, where onnxruntime is installed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nightseg.data.class_list import taxonomy
from nightseg.data.scenes import scene
from nightseg.interop import onnx
from nightseg.interop.onnx import Check, HalvingConvolution, PortableSegmenter, export_onnx, fixed_padding
from nightseg.networks.model_folder import save_model
from nightseg.segmenter.encoders import build_encoder
from nightseg.segmenter.network import build_semantic_fpn
from nightseg.segmenter.predict import Segmenter
from nightseg.segmenter.settings import Network
from nightseg.storage import Location, UserError
from tests.rounding import assert_near, depth, in_float64, rounding

CLASSES = taxonomy("camvid11")
SIZES = {"num_classes": 11, "pyramid_channels": 8, "head_channels": 8}


def save(folder: Path, input_size: list[int] | None = None) -> Location:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = build_semantic_fpn(Network(encoder="resnet18", pyramid_channels=8, head_channels=8), num_classes=11)
    network.head.predictor.weight.data.mul_(4)  # so that classes differ
    card = SIZES | {
        "kind": "semantic_fpn",
        "encoder": "resnet18",
        "taxonomy": {
            "name": CLASSES.name,
            "classes": list(CLASSES.classes),
            "palette": [list(colour) for colour in CLASSES.palette],
        },
        "input_size": input_size,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    save_model(Location.of(folder), network.state_dict(), card)
    return Location.of(folder)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Location:
    return save(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def resizing(tmp_path_factory: pytest.TempPathFactory) -> Location:
    return save(tmp_path_factory.mktemp("resizing"), [64, 96])


def streets(batch: int, height: int, width: int) -> np.ndarray:
    whole = [scene(1, number, "day", max(32, height), max(32, width)).image for number in range(batch)]
    return np.stack([image[:height, :width] for image in whole])


# -- the module -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(2, 64, 96), (1, 45, 77), (1, 1, 40), (1, 31, 1)])
def test_the_portable_form_is_the_segmenter(native: Location, size: tuple[int, int, int]) -> None:
    segmenter = Segmenter(native, "cpu")
    in_float64(segmenter.network)
    images = streets(*size)
    with torch.inference_mode():
        labels, confidence = PortableSegmenter(segmenter, "labels", None)(torch.from_numpy(images))
        (logits,) = PortableSegmenter(segmenter, "logits", None)(torch.from_numpy(images))
    wanted = segmenter.batch(list(images))
    assert labels.dtype == torch.uint8 and labels.shape == size
    assert (labels.numpy() == np.stack([found.labels for found in wanted])).mean() > 0.999
    # Two interpolations and a softmax, of logits below 10.
    assert_near(confidence, np.stack([found.confidence for found in wanted]), terms=32, magnitude=10.0)
    assert logits.shape == (size[0], 11, *size[1:])
    assert_near(logits.softmax(dim=1).max(dim=1).values, confidence, terms=32, magnitude=10.0)


def test_resizing_is_inside_unless_the_frames_have_the_size(resizing: Location) -> None:
    """The graph resizes in floats, the segmenter in whole bytes: nearly the same, and the check counts the rest."""
    segmenter = Segmenter(resizing, "cpu")
    images = streets(1, 80, 128)
    with torch.inference_mode():
        labels, _ = PortableSegmenter(segmenter, "labels", None)(torch.from_numpy(images))
    assert labels.shape == (1, 80, 128)
    assert (labels.numpy()[0] == segmenter(images[0]).labels).mean() > 0.98
    assert PortableSegmenter(segmenter, "labels", (64, 96)).input_size is None
    assert PortableSegmenter(segmenter, "labels", (80, 128)).input_size == (64, 96)


def test_padding_that_follows_from_no_size_is_the_same_padding() -> None:
    torch.manual_seed(0)
    network = build_encoder("efficientnet_lite0").eval()
    fixed = fixed_padding(copy.deepcopy(network))
    num_halvings = sum(isinstance(module, HalvingConvolution) for module in fixed.modules())
    assert num_halvings == 5  # strides 2, 4, 8, 16, 32
    images = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        for found, wanted in zip(fixed(images), network(images), strict=True):
            assert torch.equal(found, wanted)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_missing_packages_are_named_with_the_line_that_installs_them(
    native: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "PACKAGES", ("onnx_that_is_not_there", "json"))
    with pytest.raises(UserError, match=r"not installed: onnx_that_is_not_there\. Cure: pip install onnx_that"):
        export_onnx(native, Location.of(tmp_path / "x.onnx"))


@pytest.mark.parametrize(
    ("difference", "agreement", "segmenter_agreement", "is_kept"),
    [
        (9e-4, 1.0, 1.0, True),
        (2e-3, 1.0, 1.0, False),
        (0.0, 0.99, 1.0, False),
        (0.0, 1.0, 0.99, False),
        (float("nan"), 1.0, 1.0, False),
    ],
)
def test_a_graph_that_differs_is_not_kept(
    native: Location,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    difference: float,
    agreement: float,
    segmenter_agreement: float,
    is_kept: bool,
) -> None:
    class Proto:
        metadata_props: Any = type("Entries", (list,), {"add": lambda self: type("Entry", (), {})()})()
        opset_import: Any = (type("Opset", (), {"domain": "", "version": 20})(),)

        def SerializeToString(self) -> bytes:  # noqa: N802 (protobuf's name)
            return b"graph"

    monkeypatch.setattr(onnx, "PACKAGES", ())
    monkeypatch.setattr(onnx, "_exported", lambda *_: Proto())
    checks = [Check(1, 64, 96, 0.0, 1.0, 1.0), Check(2, 65, 93, difference, agreement, segmenter_agreement)]
    monkeypatch.setattr(onnx, "check_graph", lambda *_: checks)
    file = Location.of(tmp_path / "x.onnx")
    if is_kept:
        assert export_onnx(native, file)["max_abs_difference"] == difference and file.read_bytes() == b"graph"
        return
    with pytest.raises(RuntimeError, match=r"on 2 frames of 65 x 93 by .*No file is written"):
        export_onnx(native, file)
    assert not file.exists()


def test_a_file_of_another_kind_is_refused(native: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "PACKAGES", ())
    with pytest.raises(UserError, match=r"Cure: use a name that ends in \.onnx"):
        export_onnx(native, Location.of(tmp_path / "x.pt"))
    with pytest.raises(UserError, match="not a model folder"):
        export_onnx(Location.of(tmp_path), Location.of(tmp_path / "x.onnx"))


# -- the graph --------------------------------------------------------------------------------------------------------


def run(file: Location, images: np.ndarray) -> list[np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, {"image": images})
    return found


def metadata(file: Location) -> dict[str, str]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    found: dict[str, str] = session.get_modelmeta().custom_metadata_map
    return found


@pytest.mark.timeout(600)
class TestOnnx:
    @pytest.fixture(autouse=True)
    def packages(self) -> None:
        for name in onnx.PACKAGES:
            pytest.importorskip(name)

    def test_one_file_takes_any_batch_and_size(self, resizing: Location, tmp_path: Path) -> None:
        file = Location.of(tmp_path / "x.onnx")
        made = export_onnx(resizing, file)
        assert made["max_abs_difference"] <= 1e-4 and made["label_agreement"] > 0.999
        assert made["segmenter_agreement"] > 0.98 and made["bytes"] == file.size()
        assert len({(check["batch"], check["height"], check["width"]) for check in made["checks"]}) == 4
        segmenter = Segmenter(resizing, "cpu")
        for size in [(3, 40, 150), (1, 200, 64)]:  # neither exported nor checked with these
            images = streets(*size)
            labels, confidence = run(file, images)
            wanted = segmenter.batch(list(images))
            assert labels.dtype == np.uint8 and confidence.dtype == np.float32
            assert (labels == np.stack([found.labels for found in wanted])).mean() > 0.98
        told = metadata(file)
        assert json.loads(told["classes"]) == list(CLASSES.classes) and told["taxonomy"] == "camvid11"
        assert json.loads(told["palette"]) == [list(colour) for colour in CLASSES.palette]
        assert json.loads(told["mean"]) == [0.485, 0.456, 0.406] and json.loads(told["std"]) == [0.229, 0.224, 0.225]
        assert told["input_size"] == "[64, 96]" and told["input"] == "image uint8 [batch, height, width, 3] RGB"
        assert str(Path(torch.__file__).parent).encode() not in file.read_bytes()  # no paths of this machine

    def test_logits_of_a_fixed_size(self, native: Location, tmp_path: Path) -> None:
        file = Location.of(tmp_path / "x.onnx")
        made = export_onnx(native, file, size=(45, 77), output="logits")
        assert made["max_abs_difference"] <= rounding(depth(Segmenter(native, "cpu").network))  # logits are around 1
        images = streets(3, 45, 77)
        (logits,) = run(file, images)
        assert logits.shape == (3, 11, 45, 77)
        labels = np.stack([found.labels for found in Segmenter(native, "cpu").batch(list(images))])
        assert (logits.argmax(axis=1) == labels).mean() > 0.999
        with pytest.raises(Exception, match="Got invalid dimensions"):
            run(file, streets(1, 64, 96))


def test_a_size_that_follows_from_the_frames_is_computed_for_a_fixed_one(tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    card = (model / "model.json").read_json() | {"shortest_edge": [48, 100]}
    del card["sha256"]
    (model / "model.json").write_json({key: value for key, value in card.items() if key != "sha256"})
    segmenter = Segmenter(model, "cpu")
    assert PortableSegmenter(segmenter, "labels", (64, 128)).input_size == (48, 96)
    assert PortableSegmenter(segmenter, "labels", (48, 100)).input_size is None
    with pytest.raises(UserError, match=r"MIN_SIZE_TEST.*Cure: fix the size"):
        PortableSegmenter(segmenter, "labels", None)
