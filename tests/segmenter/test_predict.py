"""A model folder as a callable: known logits give known labels, sizes and order are kept, bad frames are named."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from nightseg import load_model
from nightseg.cluster.settings import MapCompute
from nightseg.data.class_list import taxonomy
from nightseg.data.images import decode_image, decode_label, encode_png
from nightseg.data.stored_labels import StoredLabel, upsampled
from nightseg.data.table import frame_table
from nightseg.data.taxonomy import Taxonomy
from nightseg.networks.model_folder import save_model
from nightseg.networks.normaliser import Normaliser
from nightseg.segmenter import predict
from nightseg.segmenter.augment import resize_image
from nightseg.segmenter.network import build_semantic_fpn, upsample_logits
from nightseg.segmenter.pictures import PICTURES, overlay, picture
from nightseg.segmenter.predict import (
    WHOLE_FRAME,
    RowSegmenter,
    Segmented,
    Segmenter,
    check_classes,
)
from nightseg.segmenter.self_training import confidence_bins
from nightseg.segmenter.settings import Inference, Network
from nightseg.storage import Location, UserError, sha256_of
from tests.rounding import assert_near, in_float64

INTERPOLATED = 32
"""Roundings from the logits of a network (around 1) to a mean probability: two interpolations, a softmax, a mean."""

CLASSES = Taxonomy("three", ("road", "sky", "car"), ((128, 64, 128), (70, 130, 180), (0, 0, 142)), {})
CARD = {
    "kind": "semantic_fpn",
    "encoder": "resnet18",
    "num_classes": 3,
    "taxonomy": {"name": "three", "classes": list(CLASSES.classes), "palette": [list(c) for c in CLASSES.palette]},
    "input_size": [32, 64],
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "pyramid_channels": 8,
    "head_channels": 8,
    "parents": [],
}
normalise = Normaliser(CARD["mean"], CARD["std"])  # type: ignore[arg-type]


def save(folder: Path, constant: bool = False, **card: object) -> Location:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = build_semantic_fpn(Network(encoder="resnet18", pyramid_channels=8, head_channels=8), num_classes=3)
    if constant:
        with torch.no_grad():
            network.head.predictor.weight.zero_()
            network.head.predictor.bias.copy_(torch.tensor([0.0, np.log(3), 0.0]))
    save_model(Location.of(folder), network.state_dict(), CARD | card)
    return Location.of(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Location:
    return save(tmp_path_factory.mktemp("model"))


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_constant_logits_give_their_softmax_at_the_size_of_the_image(tmp_path: Path) -> None:
    segmenter = load_model(save(tmp_path / "model", constant=True).local)
    labels, confidence = segmenter(image(50, 70))
    assert labels.shape == confidence.shape == (50, 70)
    assert labels.dtype == np.uint8 and confidence.dtype == np.float32
    assert (labels == 1).all()
    assert_near(confidence, np.full((50, 70), 3 / 5), INTERPOLATED)
    assert segmenter.taxonomy == CLASSES


@pytest.mark.parametrize("input_size", [[32, 64], None])
def test_labels_and_confidence_are_those_of_the_softmax_at_native_size(
    tmp_path: Path, input_size: list[int] | None
) -> None:
    """The plain way: resize, normalise, logits, up to the input, up to the frame, softmax, maximum."""
    segmenter = Segmenter(save(tmp_path / "model", input_size=input_size), "cpu")
    pixels = image(45, 77)  # neither side is a multiple of 4
    tensor_BCHW = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    if input_size is not None:
        tensor_BCHW = resize_image(tensor_BCHW[0], input_size)[None]  # the last bit of bytes depends on the processor
    with torch.inference_mode():
        logits_BKhw = segmenter._network(normalise(tensor_BCHW))
        logits_BKHW = upsample_logits(logits_BKhw, *tensor_BCHW.shape[2:])
        wanted = F.interpolate(logits_BKHW, (45, 77), mode="bilinear").softmax(dim=1).max(dim=1)
    labels, confidence = segmenter(pixels)
    assert (labels == wanted.indices[0].numpy()).mean() > 0.999  # where two are as good as equal, rounding decides
    assert_near(confidence, wanted.values[0], INTERPOLATED)


def test_a_batch_of_mixed_sizes_is_what_the_frames_are_alone(model: Location) -> None:
    segmenter = Segmenter(model, "cpu")
    in_float64(segmenter._network)  # libraries choose their convolution by the size of the batch
    images = [image(40, 60, 1), image(32, 64, 2), image(40, 60, 3)]
    for together, alone in zip(segmenter.batch(images), map(segmenter, images), strict=True):
        assert (together.labels == alone.labels).mean() > 0.999
        assert_near(together.confidence, alone.confidence, INTERPOLATED)
    assert segmenter.batch([]) == []


@pytest.mark.parametrize("modes", [{}, {"flip": True}, {"window": (32, 32)}])
def test_stored_at_stride_labels_are_those_of_the_frame_wherever_one_class_is_near(
    tmp_path: Path, modes: dict[str, object]
) -> None:
    """Where four logits have one class on top, it is on top of all that is interpolated between them."""
    segment = Segmenter(save(tmp_path / "m", input_size=None), "cpu").using(**modes)
    images = [image(75, 90, seed=1), image(64, 64, seed=2)]
    for found, whole in zip(segment.batch_at_stride(images), segment.batch(images), strict=True):
        stored = StoredLabel(found.labels, confidence_bins(found.confidence), found.covered)
        labels_HW, scores_HW = upsampled(stored, whole.labels.shape)
        assert labels_HW.shape == scores_HW.shape == whole.labels.shape
        near_hw = np.pad(found.labels, 1, mode="edge")
        high, wide = found.labels.shape
        pure_hw = np.logical_and.reduce(
            [near_hw[y : y + high, x : x + wide] == found.labels for y in range(3) for x in range(3)]
        )
        pure_HW = pure_hw.repeat(4, axis=0).repeat(4, axis=1)[: whole.labels.shape[0], : whole.labels.shape[1]]
        assert pure_HW.any()
        if not modes:  # several passes are averaged as probabilities, and tiles at full size
            assert (labels_HW == whole.labels)[pure_HW].all()


def test_normalisation_is_the_cards(tmp_path: Path) -> None:
    """A model that was trained on other statistics sees other numbers: the card decides, not the code."""
    usual, other = save(tmp_path / "a"), save(tmp_path / "b", mean=[0.1, 0.9, 0.5], std=[1.0, 0.5, 0.2])
    pixels = image(32, 64)
    assert not np.array_equal(Segmenter(usual, "cpu")(pixels).confidence, Segmenter(other, "cpu")(pixels).confidence)


def test_other_modes_share_the_weights_and_are_those_of_the_plain_loop(tmp_path: Path) -> None:
    """Scales are factors of the input size, each from the frame's own pixels; probabilities are averaged."""
    segmenter = Segmenter(save(tmp_path / "model"), "cpu")
    careful = segmenter.using(flip=True, scales=(0.5, 1.0, 1.5))
    assert careful._network is segmenter._network and segmenter.inference == WHOLE_FRAME
    pixels = image(45, 77)
    total = torch.zeros(3, 45, 77)
    for size in ([16, 32], [32, 64], [48, 96]):
        seen_1CHW = resize_image(torch.from_numpy(pixels).permute(2, 0, 1), size)[None]
        for mirrored in (False, True):
            inputs_1CHW = seen_1CHW.flip(-1) if mirrored else seen_1CHW
            with torch.inference_mode():
                logits_1Khw = segmenter._network(normalise(inputs_1CHW))
            logits_1KHW = upsample_logits(logits_1Khw, *size)
            logits_1KHW = F.interpolate(logits_1KHW.flip(-1) if mirrored else logits_1KHW, (45, 77), mode="bilinear")
            total += logits_1KHW.softmax(dim=1)[0]
    wanted = (total / 6).max(dim=0)
    labels, confidence = careful(pixels)
    assert_near(confidence, wanted.values, INTERPOLATED)
    assert (labels == wanted.indices.numpy()).mean() > 0.999
    windowed = careful.using(window=(16, 16), overlap=0.5, flip=False)
    assert windowed.inference == Inference(window=(16, 16), overlap=0.5, scales=(0.5, 1.0, 1.5))
    assert windowed(pixels).labels.shape == (45, 77)
    with pytest.raises(UserError, match=r"inference\.overlap: Input should be less than 1, not 2"):
        segmenter.using(overlap=2)


@pytest.mark.parametrize("modes", [{}, {"flip": True, "scales": (0.25, 1.0)}, {"window": (8, 8)}])
def test_frames_of_one_pixel_and_one_row(tmp_path: Path, modes: dict[str, object]) -> None:
    segmenter = Segmenter(save(tmp_path / "model", input_size=None), "cpu").using(**modes)
    for shape, (labels, confidence) in zip(
        shapes := [(1, 1), (1, 40), (33, 1)], segmenter.batch([image(*shape) for shape in shapes]), strict=True
    ):
        assert labels.shape == confidence.shape == shape
        assert (confidence > 0).all() and (confidence <= 1).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_is_waited_for_once_a_batch(model: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter = Segmenter(model, "cuda").using(flip=True, window=(16, 32), scales=(1.0, 0.5))
    images = [image(40, 60, 1), image(32, 64, 2)]
    wanted = segmenter.batch(images)  # also warms up what is set up once
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    monkeypatch.setattr(Segmenter, "_on_host", lambda self, results: found.extend(results) or [])
    torch.cuda.set_sync_debug_mode("error")
    try:
        segmenter.batch(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (labels_HW, _), alone in zip(found, wanted, strict=True):
        assert (labels_HW.cpu().numpy() == alone.labels).all()


@pytest.mark.parametrize(
    "wrong", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((3, 4, 4), np.uint8)]
)
def test_what_is_no_image_is_refused(model: Location, wrong: np.ndarray) -> None:
    with pytest.raises(UserError, match="uint8 RGB"):
        Segmenter(model, "cpu")(wrong)


def test_wrong_models_are_refused(tmp_path: Path, model: Location) -> None:
    with pytest.raises(UserError, match=r"model\.json"):
        load_model(tmp_path / "nothing")
    save_model(Location.of(tmp_path / "unit"), {"x": torch.zeros(1)}, {"kind": "unit"})
    with pytest.raises(UserError, match="kind 'unit'"):
        load_model(tmp_path / "unit")
    check_classes(model, CLASSES)
    with pytest.raises(UserError, match="3 classes of three, but the labels here have the 11 of camvid11"):
        check_classes(model, taxonomy("camvid11"))


def test_rows_keep_their_order_and_bad_frames_do_not_stop_the_rest(tmp_path: Path, model: Location) -> None:
    rows = []
    for index, data in enumerate([encode_png(image(32, 64, 1)), b"", encode_png(image(20, 30, 2)), b"text"]):
        file = tmp_path / f"{index}.png"
        file.write_bytes(data)
        rows.append({"frame_id": f"f/{index}", "uri": str(file), "sha256": sha256_of(data)})
    changed = {"frame_id": "f/changed", "uri": str(tmp_path / "0.png"), "sha256": "0" * 64}
    rows += [changed, {"frame_id": "f/gone", "uri": str(tmp_path / "gone.png")}]
    bad: list[dict[str, Any]] = []
    good = list(RowSegmenter(model, MapCompute(batch=2)).segment(frame_table(rows), bad))
    assert [result.row["frame_id"] for result in good] == ["f/0", "f/2"]
    assert [result.segmented.labels.shape for result in good] == [(32, 64), (20, 30)]
    assert good[0].image.shape == (32, 64, 3)
    assert [row["frame_id"] for row in bad] == ["f/1", "f/3", "f/changed", "f/gone"]
    assert [row["reason"] for row in bad] == ["zero_bytes", "not_an_image", "unreadable", "missing"]
    assert bad[2]["detail"] == "the file has changed since it was collected (sha256)"


@pytest.mark.parametrize(
    ("gpus", "asked", "used"), [(0.0, None, "cpu"), (0.5, None, "cuda"), (0.0, "cuda:1", "cuda:1"), (1.0, "cpu", "cpu")]
)
def test_rows_are_segmented_on_the_gpu_of_the_pass(
    monkeypatch: pytest.MonkeyPatch, gpus: float, asked: str | None, used: str
) -> None:
    monkeypatch.setattr(predict, "Segmenter", lambda *opened: opened)
    inference, compute = Inference(flip=True), MapCompute(gpus_per_actor=gpus)
    by = RowSegmenter(Location.of("/model"), compute, inference, asked)
    assert by.segmenter == (Location.of("/model"), used, inference)  # type: ignore[comparison-overlap]


def test_pictures_show_what_they_say() -> None:
    pixels = np.full((2, 3, 3), 101, dtype=np.uint8)
    labels = np.array([[0, 1, 2], [2, 1, 0]], dtype=np.uint8)
    segmented = Segmented(labels, np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3))
    made = {kind: picture(kind, pixels, segmented, CLASSES) for kind in PICTURES}
    assert (decode_label(made["mask"]) == labels).all()
    assert decode_image(made["color"])[0].tolist() == [list(colour) for colour in CLASSES.palette]
    assert decode_label(made["confidence"]).tolist() == [[0, 51, 102], [153, 204, 255]]
    assert decode_image(made["overlay"]).shape == (2, 3, 3)


def test_an_image_of_pillow_gives_what_its_pixels_give(tmp_path: Path) -> None:
    segment = Segmenter(save(tmp_path / "model"), "cpu")
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    wanted = segment(image)
    for given in (Image.fromarray(image), torch.from_numpy(image).permute(2, 0, 1)):
        found = segment(given)
        assert np.array_equal(found.labels, wanted.labels) and np.array_equal(found.confidence, wanted.confidence)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 700), (900, 2)])
@pytest.mark.parametrize("input_size", [[32, 64], None])
def test_frames_smaller_than_a_stride_of_the_network_are_segmented(
    tmp_path: Path, size: tuple[int, int], input_size: list[int] | None
) -> None:
    segment = Segmenter(save(tmp_path / "model", constant=True, input_size=input_size), "cpu")
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for modes in ({}, {"scales": (0.01, 1.0)}, {"window": (8, 16)} if max(size) < 9 else {}, {"flip": True}):
        found = segment.using(**modes)(image)
        assert found.labels.shape == size and (found.labels == 1).all()
        # logits 0, log 3, 0: the softmax of the second is 3 / 5; 1e-6 is several steps of float32 there
        np.testing.assert_allclose(found.confidence, 0.6, atol=1e-6)


# -- many frames, pictures, what stands in a notebook ------------------------------------------------------------------


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """Three frames: a.png, deep/b.png, deep/c.png, of two sizes."""
    (tmp_path / "frames/deep").mkdir(parents=True)
    for number, name in enumerate(("a", "deep/b", "deep/c")):
        (tmp_path / f"frames/{name}.png").write_bytes(encode_png(image(20 + number, 30, number)))
    return tmp_path / "frames"


def same(found: Segmented, wanted: Segmented) -> bool:
    return np.array_equal(found.labels, wanted.labels) and np.array_equal(found.confidence, wanted.confidence)


def test_paths_folders_patterns_and_lists_give_what_their_frames_give(model: Location, frames: Path) -> None:
    segment = Segmenter(model, "cpu")
    pixels = [image(20 + number, 30, number) for number in range(3)]
    wanted = dict(zip(("a", "deep/b", "deep/c"), segment.batch(pixels), strict=True))
    for one in (frames / "a.png", str(frames / "a.png")):
        assert same(segment(one), segment(pixels[0]))
    for many in (frames, str(frames / "**/*.png")):
        found = list(segment(many))
        assert [one.name for one in found] == list(wanted) and all(same(one, wanted[one.name]) for one in found)
    mixture = [frames / "a.png", image(21, 30, 1), Image.fromarray(image(22, 30, 2))]
    for many in (mixture, tuple(mixture), iter(mixture), segment.frames(mixture, batch=3)):
        found = list(many if hasattr(many, "gi_frame") else segment(many))
        assert len(found) == 3 and all(map(same, found, wanted.values()))
    assert [one.name for one in segment(mixture)] == [str(frames / "a.png"), "", ""]
    assert list(segment([])) == []
    Location.of(frames / "t.parquet").write_table(pa.table({"frame_id": ["x"], "uri": [str(frames / "a.png")]}))
    (found_in_table,) = segment(frames / "t.parquet")
    assert found_in_table.name == "x" and same(found_in_table, segment(pixels[0]))


def test_many_frames_are_never_all_in_memory(model: Location) -> None:
    taken: list[int] = []

    def given() -> Any:
        for number in range(100):
            taken.append(number)
            yield image(8, 8, number)

    found = Segmenter(model, "cpu").frames(given(), batch=3)
    assert taken == [], "nothing is read before it is asked for"
    next(found)
    assert taken == [0, 1, 2]


def test_what_cannot_be_used_is_said(model: Location, frames: Path) -> None:
    segment = Segmenter(model, "cpu")
    (frames / "deep/b.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"deep/b.png: not_an_image .*; left out"):
        assert [one.name for one in segment(frames)] == ["a", "deep/c"]
    with pytest.raises(UserError, match=r"b.png: not_an_image"):
        segment(frames / "deep/b.png")
    with pytest.raises(UserError, match=r"b.png: not_an_image"):
        list(segment([frames / "a.png", frames / "deep/b.png"]))
    with pytest.raises(UserError, match="image 1: it is uint8 of shape \\(5, 5\\)"):
        list(segment([image(5, 5), image(5, 5)[..., 0]]))
    for wrong, why in (
        (frames / "gone.png", "there is no such file"),
        (image(5, 5)[None], "a batch"),
        (b"bytes", "not pixels"),
        (None, "not pixels"),
        ({"a": 1}, "not pixels"),
    ):
        with pytest.raises(UserError, match=why):
            segment(wrong)
    with pytest.raises(UserError, match="not many frames"):
        segment.frames(image(5, 5))
    with pytest.raises(UserError, match="batch: 0"):
        segment.frames([], batch=0)


def test_models_and_frames_say_what_they_are(tmp_path: Path) -> None:
    segment = Segmenter(save(tmp_path / "model", constant=True), "cpu")
    told = repr(segment.using(flip=True))
    for part in (str(tmp_path / "model"), "resnet18", "3 classes of three", "resized to 32 x 64", "flip=True", "cpu"):
        assert part in told, told
    assert "flip" not in repr(segment) and len(repr(segment).splitlines()) == 1
    found = segment(image(50, 70))
    assert repr(found) == "Segmented(a frame, 50 x 70: sky 100 %; mean confidence 0.60)"  # 3 / (3 + 1 + 1)
    assert found.shares == {"sky": 1.0} and found.image is not None and found.image.shape == (50, 70, 3)
    labels, confidence = found
    assert labels is found.labels and confidence is found.confidence
    assert repr(Segmented(labels, confidence)) == "Segmented(a frame, 50 x 70; mean confidence 0.60)"


def test_an_overlay_is_of_what_it_is_given(tmp_path: Path) -> None:
    segment = Segmenter(save(tmp_path / "model", constant=True), "cpu")
    pixels = image(50, 70)
    found = segment(pixels)
    wanted = (pixels.astype(int) + CLASSES.palette[1] + 1) // 2
    file, mask = tmp_path / "a.png", tmp_path / "mask.png"
    file.write_bytes(encode_png(pixels))
    mask.write_bytes(picture("mask", pixels, found, CLASSES))
    for given in ((found,), (pixels, found), (str(file), found), (Image.fromarray(pixels), found)):
        assert np.array_equal(np.asarray(overlay(*given)), wanted)
    for labels in (found.labels, mask, torch.from_numpy(found.labels), found.labels.astype(np.int64)):
        assert np.array_equal(np.asarray(overlay(pixels, labels, CLASSES)), wanted)
    assert np.array_equal(np.asarray(overlay(found, opacity=0)), pixels)
    longer = np.asarray(overlay(found, legend=True))
    assert longer.shape[0] > 50 and np.array_equal(longer[:50], wanted)
    for words, why in (
        ((pixels,), "a frame and its labels"),
        ((pixels, found.labels), "whose classes"),
        ((pixels[:20], found), "the labels have the shape"),
        ((pixels, pixels, CLASSES), "not train ids"),
        ((pixels, found.confidence, CLASSES), "not train ids"),
    ):
        with pytest.raises(UserError, match=why):
            overlay(*words)
    with pytest.raises(UserError, match="opacity 2"):
        overlay(found, opacity=2)


def test_pictures_with_a_legend_are_higher_and_masks_are_not() -> None:
    pixels, labels = np.full((40, 80, 3), 101, np.uint8), np.zeros((40, 80), np.uint8)
    segmented = Segmented(labels, np.ones((40, 80), np.float32))
    plain = {kind: decode_image(picture(kind, pixels, segmented, CLASSES)) for kind in PICTURES}
    longer = {kind: decode_image(picture(kind, pixels, segmented, CLASSES, True)) for kind in PICTURES}
    for kind in PICTURES:
        assert (len(longer[kind]) > 40) == (kind in ("color", "overlay"))
    assert np.array_equal(longer["color"][:40], plain["color"])
