"""Windows, mirrors and scales against answers that are known, and no K x H x W of a large frame in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nightseg.segmenter import predict
from nightseg.segmenter.network import build_semantic_fpn, upsample_logits
from nightseg.segmenter.predict import (
    WHOLE_FRAME,
    TiledLogits,
    classify,
    classify_at_stride,
    frame_rows,
    inference_settings,
    tiled_logits,
    window_starts,
)
from nightseg.segmenter.settings import Inference, Network
from nightseg.storage import UserError
from tests.rounding import assert_near, in_float64, rounding

NUM_CLASSES = 3
INTERPOLATED = 32
"""Roundings from the logits of a network to a mean probability: two interpolations, a softmax, means, no long sum."""


def per_pixel(images_BCHW: Tensor) -> Tensor:
    """Logits that depend on the pixel alone, whole numbers: their sums and means are exact."""
    red, green, blue = images_BCHW.float().unbind(dim=1)
    return torch.stack([red + green, 2 * blue - red, 255 - green], dim=1)


@pytest.fixture(scope="module")
def network() -> Any:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made = build_semantic_fpn(Network(encoder="resnet18", pyramid_channels=8, head_channels=8), NUM_CLASSES)
    made.head.predictor.weight.data.mul_(8)  # so that classes differ
    return in_float64(made.eval().requires_grad_(False))  # rounded to float32 after it


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same_answer(labels_HW: Tensor, confidence_HW: Tensor, wanted: Any) -> None:
    """`wanted`: values and indices. Where classes are as good as equal, rounding decides between them.

    A logit that is off by d changes a probability p by no more than d p; the logits here are below 10.
    """
    assert_near(confidence_HW, wanted.values, INTERPOLATED, magnitude=10.0)
    assert (labels_HW == wanted.indices).float().mean() > 0.999


def whole_logits(one: TiledLogits, size: tuple[int, int], stride: int) -> Tensor:
    return frame_rows(one, size, 0, size[0], stride)


# -- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "window", "overlap", "starts"),
    [
        (10, 4, 0.5, [0, 2, 4, 6]),  # fits exactly
        (9, 4, 0.5, [0, 2, 4, 5]),  # the last one is shifted inwards
        (9, 4, 0.0, [0, 4, 5]),
        (8, 4, 0.0, [0, 4]),
        (4, 4, 0.5, [0]),
        (3, 4, 0.5, [0]),  # smaller than the window
        (1, 1, 0.0, [0]),
        (5, 2, 0.9, [0, 1, 2, 3]),  # at least one pixel further
        (2048, 768, 0.25, [0, 576, 1152, 1280]),
    ],
)
def test_windows_begin_where_they_should(length: int, window: int, overlap: float, starts: list[int]) -> None:
    assert window_starts(length, window, overlap) == starts


@pytest.mark.parametrize("size", [(16, 24), (17, 23), (1, 30), (30, 1), (5, 6), (1, 1)])
@pytest.mark.parametrize(("window", "overlap"), [((8, 8), 0.5), ((5, 7), 0.25), ((64, 64), 0.5), ((4, 64), 0.0)])
def test_windows_of_a_network_that_sees_single_pixels_change_nothing(
    size: tuple[int, int], window: tuple[int, int], overlap: float
) -> None:
    inputs_BCHW = pixels(2, 3, *size)
    passes = tiled_logits(per_pixel, inputs_BCHW, Inference(window=window, overlap=overlap), mirrored=False)
    for one, image_CHW in zip(passes, inputs_BCHW, strict=True):
        assert torch.equal(whole_logits(one, size, stride=1), per_pixel(image_CHW[None])[0])
    (whole,) = tiled_logits(per_pixel, inputs_BCHW[:1], WHOLE_FRAME, mirrored=False)
    for one, other in zip(classify([passes[0]], size, 1), classify([whole], size, 1), strict=True):
        assert torch.equal(one, other)


def test_where_windows_overlap_their_logits_are_averaged_evenly() -> None:
    """Each window answers with the number of its own column, so every average can be written down."""

    def column(images_BCHW: Tensor) -> Tensor:
        return torch.arange(images_BCHW.shape[3]).float().expand(len(images_BCHW), 2, images_BCHW.shape[2], -1)

    (one,) = tiled_logits(column, pixels(1, 3, 1, 7), Inference(window=(1, 4), overlap=0.5), mirrored=False)
    assert [(tile.left, tile.width) for tile in one.tiles] == [(0, 4), (2, 4), (3, 4)]
    #   0 1 2 3
    #       0 1 2 3
    #         0 1 2 3
    wanted = [0, 1, (2 + 0) / 2, (3 + 1 + 0) / 3, (2 + 1) / 2, (3 + 2) / 2, 3]
    assert_near(whole_logits(one, (1, 7), stride=1)[0, 0], wanted, terms=1)  # sums of whole numbers, one quotient


def test_windows_of_a_real_network_are_those_of_the_plain_loop(network: Any) -> None:
    """The plain way: a sum and a count of the frame's size, every window at full size, one after another."""
    height, width, high, wide = 70, 93, 64, 32
    image_1CHW = noise(1, 3, height, width)
    total_KHW, count_HW = torch.zeros(NUM_CLASSES, height, width), torch.zeros(height, width)
    for top in (0, 6):
        for left in (0, 16, 32, 48, 61):
            part = image_1CHW[:, :, top : top + high, left : left + wide]
            total_KHW[:, top : top + high, left : left + wide] += upsample_logits(network(part), high, wide)[0]
            count_HW[top : top + high, left : left + wide] += 1
    (one,) = tiled_logits(network, image_1CHW, Inference(window=(high, wide), overlap=0.5), mirrored=False)
    assert_near(whole_logits(one, (height, width), stride=4), total_KHW / count_HW, INTERPOLATED)
    labels_HW, confidence_HW = classify([one], (height, width))
    wanted = (total_KHW / count_HW).softmax(dim=0).max(dim=0)
    assert_same_answer(labels_HW, confidence_HW, wanted)


@pytest.mark.parametrize("size", [(1, 50), (33, 1), (1, 1), (40, 65)])
def test_frames_smaller_than_the_window_are_taken_whole(network: Any, size: tuple[int, int]) -> None:
    inputs_BCHW = noise(2, 3, *size)
    windowed = tiled_logits(network, inputs_BCHW, Inference(window=(64, 128), overlap=0.5), mirrored=False)
    whole = tiled_logits(network, inputs_BCHW, WHOLE_FRAME, mirrored=False)
    for one, other in zip(windowed, whole, strict=True):
        assert torch.equal(one.tiles[0].logits, other.tiles[0].logits)
        labels_HW, confidence_HW = classify([one], size)
        assert labels_HW.shape == confidence_HW.shape == size
        assert float(confidence_HW.min()) >= 1 / NUM_CLASSES and float(confidence_HW.max()) <= 1


# -- passes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 64), (37, 50)])  # the second is padded, and not a multiple of the stride
def test_a_mirrored_frame_has_the_mirrored_answer(network: Any, size: tuple[int, int]) -> None:
    def answer(image_CHW: Tensor) -> tuple[Tensor, Tensor]:
        passes = [
            tiled_logits(network, image_CHW[None], WHOLE_FRAME, mirrored=mirrored)[0] for mirrored in (False, True)
        ]
        return classify(passes, size)

    image_CHW = noise(3, *size)
    labels_HW, confidence_HW = answer(image_CHW)
    mirrored_labels_HW, mirrored_confidence_HW = answer(image_CHW.flip(-1))
    wanted = torch.return_types.max((confidence_HW.flip(-1), labels_HW.flip(-1)))
    assert_same_answer(mirrored_labels_HW, mirrored_confidence_HW, wanted)


def test_passes_are_averaged_as_probabilities() -> None:
    """One pass has logits in the hundreds for class 0, two have small ones for class 1: the majority decides."""

    def constant(*logits: float) -> TiledLogits:
        tile = predict.Tile(0, 0, 1, 1, torch.tensor(logits).view(-1, 1, 1))
        return TiledLogits(1, 1, False, [tile])

    labels_HW, confidence_HW = classify([constant(300.0, 0.0), constant(0.0, 3.0), constant(0.0, 3.0)], (1, 1), 1)
    quiet = 1 / (1 + torch.exp(torch.tensor(-3.0)).item())
    assert labels_HW.tolist() == [[1]]
    assert confidence_HW.item() == pytest.approx(2 * quiet / 3, rel=rounding(INTERPOLATED))


@pytest.mark.parametrize("window", [None, (32, 48)])
def test_passes_of_several_sizes_are_those_of_the_plain_loop(network: Any, window: tuple[int, int] | None) -> None:
    size, passes, total = (45, 77), [], torch.zeros(NUM_CLASSES, 45, 77)
    for seed, seen in enumerate([(34, 58), (45, 77), (56, 96)]):
        inputs_1CHW = noise(1, 3, *seen, seed=seed)
        for mirrored in (False, True):
            (one,) = tiled_logits(network, inputs_1CHW, Inference(window=window), mirrored=mirrored)
            passes.append(one)
            logits_1KHW = whole_logits(one, seen, stride=4)[None]  # windows have their own test
            if window is None:
                plain_1KHW = upsample_logits(network(inputs_1CHW.flip(-1) if mirrored else inputs_1CHW), *seen)
                assert_near(logits_1KHW, plain_1KHW.flip(-1) if mirrored else plain_1KHW, INTERPOLATED)
            total += F.interpolate(logits_1KHW, size, mode="bilinear").softmax(dim=1)[0]
    labels_HW, confidence_HW = classify(passes, size)
    assert_same_answer(labels_HW, confidence_HW, (total / 6).max(dim=0))


def test_a_value_for_each_logit_is_that_of_the_logits_as_they_are(network: Any) -> None:
    """45 x 77 pixels are 11.25 x 19.25 logits; one more is needed for the last pixels, and the padding has it."""
    inputs_1CHW = noise(1, 3, 45, 77)
    (one,) = tiled_logits(network, inputs_1CHW, Inference(), mirrored=False)
    labels_hw, confidence_hw, covered = classify_at_stride([one])
    wanted = network(inputs_1CHW)[0, :, :13, :21].softmax(dim=0).max(dim=0)
    assert covered == (11.25, 19.25) and labels_hw.shape == (13, 21)
    assert_same_answer(labels_hw, confidence_hw, wanted)


@pytest.mark.parametrize("window", [None, (32, 48)])
def test_several_passes_meet_at_the_stride_of_the_largest(network: Any, window: tuple[int, int] | None) -> None:
    passes = [
        one
        for size in [(34, 58), (45, 77)]
        for mirrored in (False, True)
        for one in tiled_logits(network, noise(1, 3, *size), Inference(window=window), mirrored=mirrored)
    ]
    labels_hw, confidence_hw, covered = classify_at_stride(passes)
    assert covered == labels_hw.shape == (12, 20)
    wanted = classify(passes, (12, 20))
    assert torch.equal(labels_hw, wanted[0]) and torch.equal(confidence_hw, wanted[1])
    (tiled,) = tiled_logits(network, noise(1, 3, 45, 77), Inference(window=(32, 48)), mirrored=False)
    assert classify_at_stride([tiled])[2] == (12, 20)


def test_the_network_sees_bfloat16_only_if_asked() -> None:
    network = build_semantic_fpn(Network(encoder="resnet18", pyramid_channels=8, head_channels=8), NUM_CLASSES).eval()

    def kind(asked: Inference) -> torch.dtype:
        (one,) = tiled_logits(network, noise(1, 3, 32, 32), asked, mirrored=False)
        assert classify([one], (32, 32))[1].dtype == torch.float32
        return one.tiles[0].logits.dtype

    assert kind(WHOLE_FRAME) == torch.float32
    assert kind(Inference(precision="bfloat16")) == torch.bfloat16


# -- memory -----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The number of values of the largest K x rows x columns that an operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.dim() > 2:
                self.values = max(self.values, tensor.numel())
        return out


def passes_of(
    network: Any, size: tuple[int, int], scales: tuple[float, ...], window: tuple[int, int]
) -> list[TiledLogits]:
    return [
        tiled_logits(
            network, noise(1, 3, *(round(side * scale) for side in size)), Inference(window=window), mirrored=m
        )[0]
        for scale in scales
        for m in (False, True)
    ]


@pytest.mark.parametrize("scales", [(1.0,), (0.75, 1.0, 1.5), (1.3,)])
@pytest.mark.parametrize("rows", [1, 3, 10])
def test_chunks_give_what_the_whole_frame_gives(
    network: Any, monkeypatch: pytest.MonkeyPatch, scales: tuple[float, ...], rows: int
) -> None:
    size = (61, 46)
    passes = passes_of(network, size, scales, (40, 46))[: 1 if len(scales) == 1 else None]
    labels_HW, confidence_HW = classify(passes, size)
    widest = max(one.width * max(1, one.height / size[0]) for one in passes)
    monkeypatch.setattr(predict, "CHUNK_VALUES", int(rows * NUM_CLASSES * widest) + 1)
    chunk_labels_HW, chunk_confidence_HW = classify(passes, size)
    assert_same_answer(chunk_labels_HW, chunk_confidence_HW, torch.return_types.max((confidence_HW, labels_HW)))


def test_no_logits_of_the_frames_size_are_ever_in_memory(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    height, width, rows = 192, 40, 8
    monkeypatch.setattr(predict, "CHUNK_VALUES", int(rows * NUM_CLASSES * width * 1.5**2))
    passes = passes_of(network, (height, width), (0.5, 1.0, 1.5), (96, 48))
    with Largest() as largest:
        labels_HW, confidence_HW = classify(passes, (height, width))
    # A chunk of the largest pass, and a few rows around it that bilinear interpolation reads.
    assert largest.values <= NUM_CLASSES * 1.5 * width * (1.5 * rows + 3 * 4)
    assert largest.values < NUM_CLASSES * height * width / 4
    assert labels_HW.shape == confidence_HW.shape == (height, width)


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": (0, 5)}, r"window\.0: .* greater than or equal to 1"),
        ({"window": (5,)}, r"window\.1: Field required"),
        ({"overlap": 1.0}, "overlap: .* less than 1"),
        ({"overlap": -0.1}, "overlap: .* greater than or equal to 0"),
        ({"scales": ()}, "scales: .* at least 1 item"),
        ({"scales": (1.0, 0.0)}, r"scales\.1: .* greater than 0"),
        ({"scales": (5.0,)}, r"scales\.0: .* less than or equal to 4"),
        ({"scales": (1.0, 1.0)}, "given twice"),
        ({"precision": "float16"}, "precision: .* 'float32' or 'bfloat16'"),
        ({"flipped": True}, "flipped: .*window, overlap, flip, scales, precision"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        inference_settings(**wrong)
