"""Semantic FPN: shapes at any size, detectron2's parameter names, detectron2's numbers."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nightseg.networks.encoders import normalise
from nightseg.networks.semantic_fpn import NormedConvolution, SemanticFPN, build_semantic_fpn, upsample_logits

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"


@pytest.fixture(scope="module")
def small() -> SemanticFPN:
    return build_semantic_fpn(encoder="resnet18", num_classes=5, pyramid_channels=16, head_channels=8).eval()


@pytest.mark.parametrize(("height", "width"), [(64, 96), (33, 50), (32, 31)])
def test_logits_have_a_quarter_of_the_size_and_full_logits_all_of_it(
    small: SemanticFPN, height: int, width: int
) -> None:
    with torch.no_grad():
        logits = small(torch.rand(2, 3, height, width))
    assert logits.shape == (2, 5, -(-height // 4), -(-width // 4))
    assert upsample_logits(logits, height, width).shape == (2, 5, height, width)


def test_padding_happens_inside_and_is_zero_after_normalisation(small: SemanticFPN) -> None:
    image = torch.rand(1, 3, 40, 50)
    padded = torch.zeros(1, 3, 64, 64)
    padded[:, :, :40, :50] = image
    with torch.no_grad():
        assert torch.equal(small(image), small(padded)[:, :, :10, :13])


def test_upsampled_logits_are_float32_and_bilinear_without_aligned_corners() -> None:
    logits = torch.tensor([[[[0.0, 8.0]]]], dtype=torch.bfloat16)
    full = upsample_logits(logits, 4, 8)
    assert full.dtype == torch.float32
    assert full[0, 0, 0].tolist() == [0, 0, 1, 3, 5, 7, 8, 8]


def test_head_has_detectron2_names_and_structure() -> None:
    head = build_semantic_fpn(encoder="resnet18", num_classes=5, pyramid_channels=64, head_channels=32).head
    convolutions = ["p2.0", "p3.0", "p4.0", "p4.2", "p5.0", "p5.2", "p5.4"]
    expected = {f"{c}.{leaf}" for c in convolutions for leaf in ("weight", "norm.weight", "norm.bias")}
    assert set(head.state_dict()) == expected | {"predictor.weight", "predictor.bias"}


@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (128, 32), (64, 32), (48, 12), (8, 2), (31, 1)])
def test_a_narrow_head_gets_groups_that_divide_it(channels: int, groups: int) -> None:
    assert NormedConvolution(8, channels).norm.num_groups == groups


def _golden_tensor(name: str, shape: list[int]) -> Tensor:
    rng, count = np.random.default_rng(zlib.crc32(name.encode())), int(np.prod(shape))
    if name.endswith(("norm.running_var", "norm.weight")):
        values = rng.uniform(0.5, 1.5, count)
    elif name.endswith(("norm.running_mean", ".bias")):
        values = rng.normal(0, 0.1, count)
    else:
        values = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])) * 0.7, count)
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def _our_name(name: str) -> str:
    """Parameter names of detectron2 to ours: torchvision's ResNet and pyramid, detectron2's head."""
    name = name.replace("sem_seg_head.", "head.").replace("backbone.bottom_up.", "body.").replace("body.stem.", "body.")
    name = re.sub(r"^backbone\.fpn_lateral(\d)\.", lambda m: f"fpn.inner_blocks.{int(m[1]) - 2}.0.", name)
    name = re.sub(r"^backbone\.fpn_output(\d)\.", lambda m: f"fpn.layer_blocks.{int(m[1]) - 2}.0.", name)
    name = re.sub(r"^body\.res(\d)\.", lambda m: f"body.layer{int(m[1]) - 1}.", name)
    name = re.sub(r"^(body\..*)conv(\d)\.norm\.", r"\1bn\2.", name)
    return name.replace("shortcut.norm.", "downsample.1.").replace("shortcut.weight", "downsample.0.weight")


@pytest.mark.skipif(not GOLDEN.exists(), reason="the golden files of detectron2 are not on this machine")
def test_logits_are_those_of_detectron2() -> None:
    with np.load(GOLDEN / "d2_semantic_fpn_r50.npz", allow_pickle=False) as golden:
        logits = torch.from_numpy(golden["logits"])
        shapes = {
            str(key): [int(n) for n in re.findall(r"\d+", str(shape))]
            for key, shape in zip(golden["keys"], golden["shapes"], strict=True)
        }
    network = build_semantic_fpn(encoder="resnet50", num_classes=19).eval()
    tensors = {_our_name(name): _golden_tensor(name, shape) for name, shape in shapes.items() if "pixel_" not in name}
    missing, unexpected = network.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    image = torch.from_numpy(np.random.default_rng(7).integers(0, 256, (1, 3, 96, 160), dtype=np.uint8))
    with torch.no_grad():
        ours = upsample_logits(network(normalise(image, network.body.mean, network.body.std)), 96, 160)[0]
    assert (ours - logits).abs().max() <= 1e-4
