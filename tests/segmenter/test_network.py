"""Semantic FPN: shapes at any size, detectron2's parameter names, detectron2's numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nightseg.data.class_list import taxonomy
from nightseg.segmenter import detectron2
from nightseg.segmenter.detectron2 import their_name
from nightseg.segmenter.encoders import Norm
from nightseg.segmenter.network import (
    NormedConvolution,
    SemanticFPN,
    build_semantic_fpn,
    check_architecture,
    model_card,
    network_of,
    open_semantic_fpn,
    upsample_logits,
)
from nightseg.segmenter.settings import Network
from nightseg.storage import UserError
from tests.rounding import assert_near, in_float64

SMALL = Network(encoder="resnet18", pyramid_channels=16, head_channels=8)


def small_network(**changed: Any) -> SemanticFPN:
    return build_semantic_fpn(SMALL.model_copy(update=changed), num_classes=5)


@pytest.fixture(scope="module")
def small() -> SemanticFPN:
    return small_network().eval()


@pytest.mark.parametrize(("height", "width"), [(64, 96), (33, 50), (32, 31)])
def test_logits_have_a_quarter_of_the_padded_size_and_full_logits_all_of_the_image(
    small: SemanticFPN, height: int, width: int
) -> None:
    with torch.no_grad():
        logits = small(torch.rand(2, 3, height, width))
    assert logits.shape == (2, 5, 8 * -(-height // 32), 8 * -(-width // 32))
    assert upsample_logits(logits, height, width).shape == (2, 5, height, width)


def test_padding_happens_inside_and_is_zero_after_normalisation(small: SemanticFPN) -> None:
    image = torch.rand(1, 3, 40, 50)
    padded = torch.zeros(1, 3, 64, 64)
    padded[:, :, :40, :50] = image
    with torch.no_grad():
        assert torch.equal(small(image), small(padded))


def test_the_last_pixels_are_made_from_the_logits_behind_the_border_too(small: SemanticFPN) -> None:
    """As in detectron2, which crops after the upsampling; what is cropped before it repeats the last logit instead."""
    image = torch.rand(1, 3, 40, 64)  # 40 is a multiple of 4, not of 32
    with torch.no_grad():
        logits = small(image)
    whole = torch.nn.functional.interpolate(logits, scale_factor=4, mode="bilinear")
    assert_near(upsample_logits(logits, 40, 64), whole[:, :, :40], terms=8)  # four products
    early = upsample_logits(logits[:, :, :10], 40, 64)
    assert_near(early[:, :, :38], whole[:, :, :38], terms=8)
    assert (early[:, :, 38:] - whole[:, :, 38:40]).abs().max() > 0.01 * whole.abs().max()


def test_upsampled_logits_are_float32_and_bilinear_without_aligned_corners() -> None:
    logits = torch.tensor([[[[0.0, 8.0]]]], dtype=torch.bfloat16)
    full = upsample_logits(logits, 4, 8)
    assert full.dtype == torch.float32
    assert full[0, 0, 0].tolist() == [0, 0, 1, 3, 5, 7, 8, 8]


def test_head_has_detectron2_names_and_structure() -> None:
    head = small_network(pyramid_channels=64, head_channels=32).head
    convolutions = ["p2.0", "p3.0", "p4.0", "p4.2", "p5.0", "p5.2", "p5.4"]
    expected = {f"{c}.{leaf}" for c in convolutions for leaf in ("weight", "norm.weight", "norm.bias")}
    assert set(head.state_dict()) == expected | {"predictor.weight", "predictor.bias"}


@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (128, 32), (64, 32), (48, 12), (8, 2), (31, 1)])
def test_a_narrow_head_gets_groups_that_divide_it(channels: int, groups: int) -> None:
    assert NormedConvolution(8, channels).norm.num_groups == groups


@pytest.mark.parametrize(("name", "encoder"), [("r50", "resnet50"), ("r101", "resnet101")])
def test_logits_are_those_of_detectron2(golden: Callable[[str], Any], name: str, encoder: str) -> None:
    expected = golden(name)
    network = build_semantic_fpn(Network(encoder=encoder), num_classes=19).eval()
    ours = {ours: expected.tensors[their_name(ours)] for ours in network.state_dict() if "num_batches" not in ours}
    assert len(ours) == len(expected.tensors)
    network.load_state_dict(ours)
    with torch.no_grad():  # in float64: what is left is the rounding of the file, the same on every machine
        logits = upsample_logits(in_float64(network)(network.normalise(expected.image)), 96, 160)[0]
    assert (logits - expected.logits).abs().max() <= 1e-4


def test_where_the_stride_lies_changes_no_shape_but_the_numbers() -> None:
    ours, msra = (small_network(encoder="resnet50", stride_in_1x1=stride).eval() for stride in (False, True))
    msra.load_state_dict(ours.state_dict())
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        first, second = ours(image), msra(image)
    assert first.shape == second.shape
    assert (first - second).abs().max() > 0.01 * first.abs().max()
    assert msra.body.get_submodule("layer2.0.conv1").stride == (2, 2)
    assert msra.body.get_submodule("layer2.0.conv2").stride == (1, 1)


@pytest.mark.parametrize(("freeze_at", "frozen"), [(0, ""), (1, "conv1 bn1"), (3, "conv1 bn1 layer1 layer2")])
@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_frozen_stages_do_not_learn_and_the_others_do(freeze_at: int, frozen: str, norm: Norm) -> None:
    network = small_network(norm=norm, freeze_at=freeze_at).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        network(torch.rand(2, 3, 64, 64)).square().mean().backward()
        optimizer.step()
    moved = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    still = {name for name in before if name.startswith(tuple(f"body.{part}." for part in frozen.split()))}
    norms = {name for name in before if re.search(r"bn\d|downsample\.1", name)} if norm == "frozen" else set()
    assert moved.isdisjoint(still | norms)
    assert moved == set(before) - still - norms


def test_one_state_dict_fits_every_kind_of_norm() -> None:
    networks = [
        in_float64(small_network(norm=norm, freeze_at=freeze_at).eval())
        for norm, freeze_at in (("batch", 0), ("batch", 2), ("frozen", 0), ("sync", 0))
    ]
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = networks[0](image)
        for network in networks[1:]:
            network.load_state_dict(dict(networks[0].state_dict()))
            torch.testing.assert_close(network(image), expected)
            networks[0].load_state_dict(dict(network.state_dict()))


def test_settings_that_an_encoder_does_not_have_are_refused() -> None:
    for settings, part in (
        ({"encoder": "resnet34", "stride_in_1x1": True}, "stride_in_1x1 is for resnet50"),
        ({"encoder": "efficientnet_lite0", "freeze_at": 1}, "stages of resnet18"),
        ({"encoder": "efficientnet_lite0", "backend": "detectron2"}, "backend detectron2 computes resnet18"),
        ({"encoder": "resnet19"}, "did you mean 'resnet18'"),
    ):
        with pytest.raises(ValueError, match=part):
            Network(**settings)  # type: ignore[arg-type]


def test_a_card_says_what_the_network_is_and_opens_it(small: SemanticFPN) -> None:
    classes = taxonomy("camvid11")
    chosen = Network(encoder="resnet50", norm="frozen", freeze_at=2, stride_in_1x1=True, input_size=(8, 9))
    card = model_card(chosen, classes, small.body.mean, small.body.std)
    assert network_of(json.loads(json.dumps(card))) == chosen.model_copy(update={"input_size": None})
    assert (card["num_classes"], card["input_size"], card["taxonomy"]["name"]) == (11, [8, 9], "camvid11")
    opened = open_semantic_fpn(small.state_dict(), {**model_card(SMALL, classes, (), ()), "num_classes": 5})
    assert not opened.training
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(opened(image), small(image))


def test_a_model_of_detectron2_opens_without_it_and_that_is_said(
    small: SemanticFPN, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(detectron2, "is_installed", lambda: False)
    card = model_card(SMALL.model_copy(update={"backend": "detectron2"}), taxonomy("camvid11"), (), ())
    open_semantic_fpn(small.state_dict(), {**card, "num_classes": 5})
    assert "detectron2, which is not installed" in caplog.text


def test_the_backend_detectron2_is_refused_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detectron2, "is_installed", lambda: False)
    network = Network(encoder="resnet18", backend="detectron2")
    for build in (check_architecture, partial(build_semantic_fpn, num_classes=2)):
        with pytest.raises(UserError) as caught:
            build(network)
        assert "pip install --no-build-isolation" in str(caught.value)
        assert detectron2.COMMIT in str(caught.value)


def test_the_requirements_file_pins_the_same_commit() -> None:
    lines = (Path(__file__).parents[2] / "requirements" / "detectron2.txt").read_text().splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    assert len(pinned) == 1
    assert pinned[0] in detectron2.INSTALL
    assert len(detectron2.COMMIT) == 40


def test_checking_an_architecture_draws_no_random_number_and_takes_no_memory() -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    check_architecture(Network(encoder="resnet101", pyramid_channels=8192, head_channels=8192))
    assert torch.equal(torch.rand(2), expected)
