"""Encoders of timm: four maps at the right strides or a reason; every weight found or an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from nightseg.networks.downloads import ALLOW_DOWNLOAD
from nightseg.segmenter.encoders import build_encoder
from nightseg.segmenter.network import build_semantic_fpn
from nightseg.segmenter.settings import Network
from nightseg.segmenter.start import imagenet_weights
from nightseg.storage import UserError

SMALL = "resnet10t"


@pytest.mark.parametrize(
    ("model", "channels"), [("resnet10t", (64, 128, 256, 512)), ("convnext_atto", (40, 80, 160, 320))]
)
def test_a_semantic_fpn_on_an_encoder_of_timm(model: str, channels: tuple[int, ...]) -> None:
    network = build_semantic_fpn(
        Network(encoder=f"timm/{model}", pyramid_channels=8, head_channels=8), num_classes=4
    ).eval()
    assert network.body.channels == channels
    assert network.body.mean == tuple(timm.get_pretrained_cfg(model).mean)
    assert network.body.std == tuple(timm.get_pretrained_cfg(model).std)
    with torch.no_grad():
        assert [maps.shape[-1] for maps in network.body(torch.zeros(1, 3, 64, 96))] == [24, 12, 6, 3]
        assert network(torch.zeros(1, 3, 40, 50)).shape == (1, 4, 16, 16)


@pytest.mark.parametrize(
    ("model", "part"),
    [
        ("levit_128", "strides 16, 32, 64; .* has no 4, 8"),
        ("swin_tiny_patch4_window7_224", "frames of any size"),
        ("resnet50.nobody", "Invalid pretrained tag"),
        ("resnet5", "did you mean 'resnet50'"),
    ],
)
def test_networks_without_such_maps_are_refused_with_the_reason(model: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        build_encoder(f"timm/{model}")


def test_looking_at_a_network_draws_no_random_number() -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with pytest.raises(UserError):
        build_encoder("timm/swin_tiny_patch4_window7_224")
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("model", ["resnet10t", "convnext_atto", "efficientnet_lite0", "dla46_c"])
def test_weights_of_the_whole_network_lie_where_they_belong(tmp_path: Path, model: str, ending: str) -> None:
    torch.manual_seed(0)
    whole = timm.create_model(model, pretrained=False).eval()
    file = tmp_path / f"weights{ending}"
    if ending == ".pth":
        torch.save(whole.state_dict(), file)
    else:
        safetensors.torch.save_file(whole.state_dict(), file)
    encoder = build_encoder(f"timm/{model}").eval()
    encoder.load_state_dict(imagenet_weights(f"timm/{model}", file))
    image = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        deepest = encoder.double()(image)[-1]
        features = whole.double().forward_intermediates(image, intermediates_only=True)
    if model != "efficientnet_lite0":
        torch.testing.assert_close(deepest, features[-1])  # in float64
    shared = {name.replace("features.", "").replace("_", ".") for name in encoder.state_dict()}
    known = {name.replace("_", "."): value for name, value in whole.state_dict().items()}
    assert shared <= set(known)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, known[name.replace("features.", "").replace("_", ".")])


def test_pretrained_weights_come_through_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    trained, create = timm.create_model(SMALL, pretrained=False), timm.create_model
    asked = []

    def offline(name: str, pretrained: bool = False, **settings: object) -> torch.nn.Module:
        asked.append((name, pretrained))
        return trained if pretrained else create(name, pretrained=False, **settings)

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setenv(ALLOW_DOWNLOAD, "1")
    weights = imagenet_weights(f"timm/{SMALL}.c3_in1k")
    assert (f"{SMALL}.c3_in1k", True) in asked
    assert torch.equal(weights["features.layer4.0.conv1.weight"], trained.layer4[0].conv1.weight)


@pytest.mark.parametrize("error", [OSError("no route"), RuntimeError("No pretrained weights exist"), KeyError("x")])
def test_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **settings: object) -> torch.nn.Module:
        if pretrained:
            raise error
        return create(name, pretrained=False, **settings)

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setenv(ALLOW_DOWNLOAD, "1")
    with pytest.raises(UserError) as caught:
        imagenet_weights(f"timm/{SMALL}")
    for part in (SMALL, "network.encoder_weights", "start: scratch", str(error)):
        assert part in str(caught.value)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    tensors = dict(timm.create_model(SMALL, pretrained=False).state_dict())
    torch.save({name: tensor for name, tensor in tensors.items() if name != "layer3.0.conv1.weight"}, tmp_path / "part")
    torch.save(tensors | {"layer3.0.conv1.weight": torch.zeros(1)}, tmp_path / "shape")
    torch.save(timm.create_model("convnext_atto", pretrained=False).state_dict(), tmp_path / "other")
    for file, part in (
        ("part", r"features\.layer3\.0\.conv1\.weight is missing"),
        ("shape", r"layer3\.0\.conv1\.weight is \(1,\)"),
        ("other", r"is missing; .* more"),
        ("none", "no weights file"),
    ):
        with pytest.raises(UserError, match=part):
            imagenet_weights(f"timm/{SMALL}", tmp_path / file)
