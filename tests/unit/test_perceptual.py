"""Perceptual features: the right layers, frozen, normalised, and errors that name the cure."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torchvision.models import vgg16

from nightseg.networks.downloads import ALLOW_DOWNLOAD
from nightseg.storage import UserError
from nightseg.unit import perceptual
from nightseg.unit.perceptual import build_perceptual, smallest_perceived
from tests.rounding import assert_near, depth


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def test_lite0_features_are_frozen_and_normalised_a_channel() -> None:
    features = build_perceptual("efficientnet_lite0")
    images = (torch.rand(2, 3, 64, 64) * 2 - 1).requires_grad_()
    maps = features(images)
    assert [tuple(each.shape) for each in maps] == [(2, 40, 8, 8), (2, 112, 4, 4)]
    for each in maps:
        assert each.mean((2, 3)).abs().max() < 1e-4
        assert each.var((2, 3), correction=0).median().item() == pytest.approx(1.0, abs=1e-2)
    maps[0].pow(3).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in features.parameters())
    assert not any(module.training for module in features.modules())


def test_lite0_weights_see_the_same_street_by_day_and_by_night() -> None:
    """With trained weights a darkened image stays closer to its source than another image is."""
    features = build_perceptual("efficientnet_lite0")
    image = torch.nn.functional.interpolate(torch.rand(2, 3, 8, 8), 64, mode="bicubic").clamp(0, 1)
    bright, other, dark = image[:1] * 2 - 1, image[1:] * 2 - 1, image[:1] * 0.5 - 1

    def distance(first: torch.Tensor, second: torch.Tensor) -> float:
        pairs = zip(features(first), features(second), strict=True)
        return sum(float((a - b).square().mean()) for a, b in pairs)

    assert distance(bright, dark) < 0.5 * distance(bright, other)


def vgg_file(folder: Path) -> Path:
    """Random VGG16 convolutions in a file as torchvision's, without its half gigabyte of classifier."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in vgg16(weights=None).features.state_dict().items()}
    state = {f"features.{name}": torch.randn(shape) * 0.05 for name, shape in shapes.items()}
    torch.save(state, folder / "vgg16.pth")
    return folder / "vgg16.pth"


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_vgg16_is_cut_after_relu5_3_and_runs_conv5_at_an_eighth(tmp_path: Path) -> None:
    file = vgg_file(tmp_path)
    features = build_perceptual("vgg16", str(file), sha256=sha256(file))
    images = torch.rand(1, 3, 32, 48) * 2 - 1
    (relu5_3,) = features(images)
    assert relu5_3.shape == (1, 512, 4, 6)

    whole = vgg16(weights=None, init_weights=False).features
    state = torch.load(file, weights_only=True)
    whole.load_state_dict({name.removeprefix("features."): value for name, value in state.items()})
    plain = (images + 1) / 2
    plain = (plain - torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        1, 3, 1, 1
    )
    for index, layer in enumerate(whole[:30]):
        if index != 23:
            plain = layer(plain)
    expected = torch.nn.functional.instance_norm(plain)
    assert_near(relu5_3, expected, depth(whole))


def test_missing_or_wrong_weights_name_the_cure(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no weights file .*Cure: check perceptual_weights"):
        build_perceptual("vgg16", str(tmp_path / "absent.pth"))
    text, part, listed = tmp_path / "text.pth", tmp_path / "part.pth", tmp_path / "list.pth"
    text.write_text("hello")
    with pytest.raises(UserError, match=r"text\.pth is not a file of PyTorch weights.*Cure: .*perceptual_weights"):
        build_perceptual("vgg16", str(text), sha256=sha256(text))
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, part)
    with pytest.raises(UserError, match=r"features\.0\.bias"):
        build_perceptual("vgg16", str(part), sha256=sha256(part))
    torch.save([1], listed)
    with pytest.raises(UserError, match="not a dictionary of tensors"):
        build_perceptual("vgg16", str(listed), sha256=sha256(listed))


def test_a_file_is_torchvisions_or_has_the_sha256_that_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = vgg_file(tmp_path)
    with pytest.raises(UserError, match=rf"sha256 {sha256(file)} does not begin with 397923af.*perceptual_sha256"):
        build_perceptual("vgg16", str(file))
    with pytest.raises(UserError, match=f"does not begin with {'0' * 64}"):
        build_perceptual("vgg16", str(file), sha256="0" * 64)
    # As if that file were torchvision's: what lies in the hub folder is checked too.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    kept = tmp_path / "home" / "hub" / "checkpoints" / "vgg16-397923af.pth"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="or is damaged"):
        build_perceptual("vgg16")
    monkeypatch.setattr(perceptual, "VGG16_SHA256_PREFIX", sha256(file)[:8])
    assert len(build_perceptual("vgg16")(torch.zeros(1, 3, 32, 32))) == 1


def test_layers_are_a_choice(tmp_path: Path) -> None:
    file = vgg_file(tmp_path)
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    several = build_perceptual("vgg16", str(file), sha256=sha256(file), layers=["relu4_2", "relu1_1", "relu2_2"])
    assert [tuple(each.shape[1:]) for each in several(images)] == [(64, 64, 64), (128, 32, 32), (512, 8, 8)]
    (deepest,) = build_perceptual("vgg16", str(file), sha256=sha256(file), layers=["relu4_2"])(images)
    assert torch.equal(deepest, several(images)[2])
    lite = build_perceptual("efficientnet_lite0", layers=["stride_2", "stride_32"])
    assert [each.shape[-1] for each in lite(images)] == [32, 2]
    assert smallest_perceived("vgg16") == smallest_perceived("efficientnet_lite0") == 32
    assert smallest_perceived("efficientnet_lite0", ["stride_32", "stride_2"]) == 64


def test_offline_download_names_the_file_and_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv(ALLOW_DOWNLOAD, "1")
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(UserError, match=r"(?s)vgg16-397923af\.pth.*no route to host.*perceptual_weights"):
        build_perceptual("vgg16")
