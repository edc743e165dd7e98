"""detectron2's tensors as ours and back: the golden logits, bit for bit, and every tensor accounted for."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nightseg.interop.detectron2 import CONV1, fold, from_detectron2, read_checkpoint, to_detectron2, unfold
from nightseg.interop.detectron2_config import OURS, Detectron2Config
from nightseg.networks.normaliser import Normaliser
from nightseg.segmenter.network import network_of, open_semantic_fpn, upsample_logits
from nightseg.storage import UserError
from tests.rounding import assert_near, in_float64

ZOO = Detectron2Config("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), stride_in_1x1=True)
STEM = "backbone.bottom_up.stem.conv1.weight"
Make = Callable[..., dict[str, Tensor]]


def small(make: Make, encoder: str = "resnet18", **settings: Any) -> dict[str, Tensor]:
    return make(encoder, **settings)


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["r50", "r101"])
@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_converted_weights_give_detectron2s_logits(golden: Callable[[str], Any], name: str, channels: str) -> None:
    """As BGR the same network is fed with bytes less their mean: what its first convolution was for RGB, undone."""
    expected = golden(name)
    tensors, config = dict(expected.tensors), OURS
    if channels == "BGR":
        std = torch.tensor([58.395, 57.12, 57.375]).view(1, 3, 1, 1)
        tensors[STEM] = (tensors[STEM] / std).flip(1)
        config = ZOO._replace(stride_in_1x1=False)
    found = from_detectron2(tensors, config, "golden")
    assert found.architecture["encoder"] == f"resnet{name[1:]}"
    assert found.architecture["norm"] == "frozen"
    assert (found.left_out, found.added) == ({}, 0)
    network = open_semantic_fpn(found.tensors, found.architecture)
    with torch.no_grad():  # in float64: what is left is the rounding of the file and of the folded weights
        logits = upsample_logits(in_float64(network)(network.normalise(expected.image)), 96, 160)[0]
    difference = float((logits - expected.logits).abs().max())
    print(f"{name}, checkpoint fed with {channels}: {difference:.2e}")  # shown by -s
    assert difference <= 1e-4


def test_folding_undoes_what_the_other_input_does() -> None:
    """On pixels: conv1 on (BGR bytes - mean) equals the folded conv1 on normalised RGB, at the padded border, too."""
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (1, 3, 20, 24), dtype=torch.uint8)
    conv1 = torch.randn(4, 3, 7, 7, dtype=torch.float64).float() / 100
    theirs = pixels.flip(1).double() - torch.tensor(ZOO.pixel_mean, dtype=torch.float64).view(1, 3, 1, 1)
    ours = Normaliser((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(pixels).double()
    expected = torch.nn.functional.conv2d(theirs, conv1.double(), stride=2, padding=3)
    found = torch.nn.functional.conv2d(ours, fold(conv1, ZOO).double(), stride=2, padding=3)
    # The weights and the pixels are float32, each rounded a few times, in sums of 3 * 7 * 7 of up to 255 * 3 / 100.
    assert_near(found.float(), expected.float(), terms=147, magnitude=147.0)


def test_the_fold_is_its_formula() -> None:
    conv1 = torch.randn(2, 3, 1, 1)
    folded = fold(conv1, ZOO)
    for red_green_blue, std in enumerate((0.229, 0.224, 0.225)):
        torch.testing.assert_close(folded[:, red_green_blue], conv1[:, 2 - red_green_blue] * 255 * std)
    torch.testing.assert_close(unfold(folded, ZOO), conv1)


def test_without_another_scale_folding_only_moves_channels() -> None:
    conv1 = torch.randn(2, 3, 7, 7)
    flipped = OURS._replace(channels="BGR", pixel_mean=OURS.pixel_mean[::-1], pixel_std=OURS.pixel_std[::-1])
    assert torch.equal(fold(conv1, OURS), conv1)
    assert torch.equal(fold(conv1, flipped), conv1.flip(1))
    assert torch.equal(unfold(fold(conv1, flipped), flipped), conv1)


# -- there and back ---------------------------------------------------------------------------------------------------

DEPTHS = [
    (encoder, stride)
    for encoder in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
    for stride in ((False, True) if encoder not in ("resnet18", "resnet34") else (False,))
]


@pytest.mark.parametrize(("encoder", "stride_in_1x1"), DEPTHS)
@pytest.mark.parametrize("folded", [False, True])
def test_there_and_back_is_bit_for_bit(
    detectron2_tensors: Make, encoder: str, stride_in_1x1: bool, folded: bool
) -> None:
    config = (ZOO if folded else OURS)._replace(stride_in_1x1=stride_in_1x1)
    theirs = detectron2_tensors(encoder)
    found = from_detectron2(theirs, config, "here")
    assert found.architecture["stride_in_1x1"] == stride_in_1x1
    conv1 = found.conv1 if folded else None
    back = to_detectron2(found.tensors, found.architecture, config, conv1, "here")
    assert back.keys() == theirs.keys()
    assert all(same_bits(back[name], tensor) for name, tensor in theirs.items())
    assert same_bits(found.tensors[CONV1], theirs[STEM]) != folded


@pytest.mark.parametrize("norm", ["frozen", "batch", "sync"])
@pytest.mark.parametrize("freeze_at", [0, 2])
def test_norms_that_count_and_norms_that_do_not_come_back(detectron2_tensors: Make, norm: str, freeze_at: int) -> None:
    theirs = small(detectron2_tensors, norm=norm, freeze_at=freeze_at)
    found = from_detectron2(theirs, ZOO._replace(stride_in_1x1=False, norm=norm, freeze_at=freeze_at), "here")  # type: ignore[arg-type]
    assert (found.architecture["norm"], found.architecture["freeze_at"]) == (norm, freeze_at)
    open_semantic_fpn(found.tensors, found.architecture)
    back = to_detectron2(found.tensors, found.architecture, ZOO, found.conv1, "here")
    assert back.keys() == theirs.keys()
    assert all(same_bits(back[name], tensor) for name, tensor in theirs.items())


def test_a_first_convolution_that_has_learned_since_is_unfolded(detectron2_tensors: Make) -> None:
    config = ZOO._replace(stride_in_1x1=False)
    found = from_detectron2(small(detectron2_tensors), config, "here")
    found.tensors[CONV1] = found.tensors[CONV1] * 2
    back = to_detectron2(found.tensors, found.architecture, config, found.conv1, "here")
    torch.testing.assert_close(back[STEM], found.conv1 * 2)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()


# -- every tensor accounted for ---------------------------------------------------------------------------------------


def test_other_branches_are_left_out_and_counted(detectron2_tensors: Make) -> None:
    theirs = small(detectron2_tensors) | {
        "proposal_generator.rpn_head.conv.weight": torch.zeros(1),
        "proposal_generator.anchor_generator.cell_anchors.0": torch.zeros(1),
        "roi_heads.box_head.fc1.weight": torch.full((1,), torch.nan),  # not ours to judge
        "roi_heads.mask_head.predictor.bias": torch.zeros(1),
        "pixel_mean": torch.zeros(3),
        "pixel_std": torch.zeros(3),
    }
    found = from_detectron2(theirs, OURS, "here")
    assert found.left_out == {"proposal_generator": 2, "roi_heads": 2, "pixel_mean": 1, "pixel_std": 1}
    assert len(found.tensors) == len(theirs) - 6


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "ema."])
def test_a_wrapped_network_is_unwrapped(detectron2_tensors: Make, prefix: str) -> None:
    theirs = small(detectron2_tensors)
    found = from_detectron2({prefix + name: tensor for name, tensor in theirs.items()}, OURS, "here")
    assert found.tensors.keys() == from_detectron2(theirs, OURS, "here").tensors.keys()


def test_norms_without_statistics_become_a_scale_and_a_shift(detectron2_tensors: Make) -> None:
    theirs = {name: tensor for name, tensor in small(detectron2_tensors).items() if "running_" not in name}
    found = from_detectron2(theirs, OURS, "here")
    assert found.added == 2 * 20  # norms of a ResNet-18
    network: Any = open_semantic_fpn(found.tensors, found.architecture)
    weight, bias = (theirs[f"backbone.bottom_up.stem.conv1.norm.{part}"] for part in ("weight", "bias"))
    maps = torch.randn(1, 64, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(
        network.body.bn1.double()(maps), maps * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
    )


def test_frozen_norms_learn_only_when_that_is_asked(detectron2_tensors: Make) -> None:
    theirs = small(detectron2_tensors)
    kept, unfrozen = (from_detectron2(theirs, OURS, "here", unfreeze=unfreeze) for unfreeze in (False, True))
    assert (kept.architecture["norm"], unfrozen.architecture["norm"]) == ("frozen", "batch")
    first, second = (open_semantic_fpn(found.tensors, found.architecture) for found in (kept, unfrozen))
    assert isinstance(second.body.get_submodule("bn1"), torch.nn.BatchNorm2d)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(in_float64(first)(image), in_float64(second)(image))


def test_counts_that_older_versions_forgot_are_zero(detectron2_tensors: Make) -> None:
    theirs = small(detectron2_tensors, norm="batch", freeze_at=2)
    forgotten = [name for name in theirs if "num_batches" in name and (".stem." in name or ".res2." in name)]
    found = from_detectron2(
        {n: t for n, t in theirs.items() if n not in forgotten}, OURS._replace(norm="batch"), "here"
    )
    assert found.added == len(forgotten) == 5


@pytest.mark.parametrize(
    ("name", "change", "part"),
    [
        ("sem_seg_head.p3.0.weight", None, r"sem_seg_head\.p3\.0\.weight is missing"),
        ("backbone.bottom_up.res3.1.conv2.norm.running_var", None, "running_var is missing"),
        ("sem_seg_head.predictor.weight", None, "no sem_seg_head.predictor.weight"),
        ("backbone.bottom_up.res3.9.conv1.weight", torch.zeros(1), r"blocks \[2, 3, 2, 2\]"),
        ("sem_seg_head.p4.4.weight", torch.zeros(1), "is not part of a Semantic FPN, did you mean"),
        ("optimizer", torch.zeros(1), "optimizer is not part"),
        ("backbone.fpn_output3.bias", torch.zeros(9), r"is \(9,\), it must be \(8,\)"),
        ("backbone.fpn_output3.bias", torch.zeros(8, dtype=torch.float64), "float64, it must be torch.float32"),
        ("backbone.fpn_output3.bias", torch.full((8,), torch.nan), "fpn_output3.bias is not finite"),
        ("backbone.fpn_output3.bias", torch.full((8,), torch.inf), "fpn_output3.bias is not finite"),
        ("sem_seg_head.p2.0.weight", torch.zeros(24, 8, 3, 3), "24 channels, which 32 groups cannot share"),
    ],
)
def test_tensors_too_few_too_many_or_wrong_are_named(
    detectron2_tensors: Make, name: str, change: Tensor | None, part: str
) -> None:
    theirs = small(detectron2_tensors)
    if change is None:
        del theirs[name]
    else:
        theirs[name] = change
    with pytest.raises(UserError, match=part):
        from_detectron2(theirs, OURS, "model_final.pth")


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (OURS._replace(depth=34), "holds a resnet18, but its config says MODEL.RESNETS.DEPTH 34"),
        (OURS._replace(norm="batch"), "holds frozen batch norms, but its config says"),
        (OURS._replace(stride_in_1x1=True), "blocks of resnet18 have no 1x1"),
    ],
)
def test_a_config_of_another_checkpoint_is_noticed(
    detectron2_tensors: Make, config: Detectron2Config, part: str
) -> None:
    with pytest.raises(UserError, match=part):
        from_detectron2(small(detectron2_tensors), config, "here")


def test_a_backbone_alone_is_no_segmenter() -> None:
    with pytest.raises(UserError, match="looks like an ImageNet backbone"):
        from_detectron2({"stem.conv1.weight": torch.zeros(64, 3, 7, 7)}, OURS, "R-50.pkl")


@pytest.mark.parametrize(
    ("card", "part"),
    [
        ({"encoder": "efficientnet_lite0", "pyramid_channels": 8, "head_channels": 32}, "no efficientnet_lite0"),
        ({"encoder": "resnet18", "pyramid_channels": 8, "head_channels": 48}, "multiple of 32"),
    ],
)
def test_networks_that_detectron2_does_not_have_stay_here(card: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part):
        to_detectron2({}, network_of(card).model_dump(), OURS, None, "model")


# -- files ------------------------------------------------------------------------------------------------------------


def as_torch(content: Any, old: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


@pytest.mark.parametrize("shape", ["model", "bare"])
@pytest.mark.parametrize("kind", ["pth", "old pth", "pkl", "old pkl"])
def test_both_kinds_of_file_in_both_shapes(kind: str, shape: str) -> None:
    tensors = {"a": torch.randn(2, 3), "n": torch.tensor(3)}
    extra = {"__author__": "me", "iteration": 7, "optimizer": {"state": {0: {"step": 1}}}}
    if kind.endswith("pkl"):
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        content: Any = {"model": arrays, **extra} if shape == "model" else arrays
        data = pickle.dumps(content, protocol=0 if kind.startswith("old") else 2)
    else:
        content = {"model": tensors, **extra} if shape == "model" else tensors
        data = as_torch(content, old=kind.startswith("old"))
    found = read_checkpoint(data, "file")
    assert found.keys() == tensors.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("exit 1",)


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (pickle.dumps({"model": {"a": Runs()}}), r"asks for \w+\.system"),
        (as_torch({"model": {"a": Runs()}}), r"asks for \w+\.system"),
        (as_torch({"model": {"a": Runs()}}, old=True), r"asks for \w+\.system"),
        (pickle.dumps({"blobs": {"conv1_w": 1}}), "Detectron1"),
        (pickle.dumps([1]), "holds list"),
        (pickle.dumps({"model": {}}), "not a dictionary of tensors"),
        (pickle.dumps({"model": {"a": "b"}}), "'a' is str, not a tensor"),
        (as_torch({"a": torch.zeros(9)})[:200], "damaged"),
        (b"", "damaged"),
        (b"PK", "damaged"),
    ],
)
def test_files_that_hold_anything_else_are_refused(data: bytes, part: str) -> None:
    with pytest.raises(UserError, match=part):
        read_checkpoint(data, "model_final.pkl")
