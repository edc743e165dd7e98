"""UNIT's networks: exact sizes, exact shapes, and the fast layers against their plain definitions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nightseg.networks.checkpoint import save_model
from nightseg.networks.unit import (
    Decoder,
    Discriminator,
    Discriminators,
    Encoder,
    Generators,
    LatentNoise,
    LayerNorm,
    UpsamplingConvolution,
    build_generators,
    load_generators,
    smallest_discriminated_side,
    to_uint8,
    to_unit_range,
)
from nightseg.storage import Location, UserError


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_default_networks_have_exactly_the_published_number_of_parameters() -> None:
    assert num_parameters(Encoder()) == 5_385_856
    assert num_parameters(Decoder()) == 5_754_627
    assert num_parameters(Discriminator()) == 8_271_171
    assert num_parameters(Discriminator(norm="layer")) == 8_276_547
    assert num_parameters(Generators()) + num_parameters(Discriminators()) == 38_823_308


def test_shapes_of_a_narrow_network() -> None:
    images_B3HW = torch.rand(2, 3, 64, 96) * 2 - 1
    latent_BChw = Encoder(width=4, res_blocks=1)(images_B3HW)
    assert latent_BChw.shape == (2, 16, 16, 24)
    decoded_B3HW = Decoder(width=4, res_blocks=1)(latent_BChw)
    assert decoded_B3HW.shape == (2, 3, 64, 96)
    assert decoded_B3HW.abs().max() <= 1
    scores = Discriminator(width=4)(images_B3HW)
    assert [tuple(score.shape) for score in scores] == [(2, 1, 4, 6), (2, 1, 2, 3), (2, 1, 1, 1)]


def test_start_values_are_those_of_unit() -> None:
    discriminator = Discriminator(width=32, scales=1)
    weights = torch.cat([layer.weight.flatten() for layer in discriminator.modules() if isinstance(layer, nn.Conv2d)])
    assert weights.std().item() == pytest.approx(0.02, rel=0.02)
    encoder = Encoder(width=32, res_blocks=1)
    for layer in encoder.modules():
        if isinstance(layer, nn.Conv2d):
            fan_in = layer.weight[0].numel()
            assert layer.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)
            assert layer.bias is not None and not layer.bias.any()


def test_norm_and_padding_are_those_of_unit() -> None:
    for module in (Encoder(4, 1), Decoder(4, 1), Discriminator(4)):
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d) and layer.padding != (0, 0):
                assert layer.padding_mode == "reflect"
            if isinstance(layer, nn.InstanceNorm2d):
                assert not layer.affine and not layer.track_running_stats


@pytest.mark.parametrize("size", [(2, 2), (2, 5), (5, 7), (8, 3)])
def test_upsampling_convolution_equals_its_plain_form_and_gradients(size: tuple[int, int]) -> None:
    layer = UpsamplingConvolution(3, 4).double()
    features = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)

    def plain() -> Tensor:
        wide = F.interpolate(features, scale_factor=2, mode="nearest")
        return F.conv2d(F.pad(wide, (2, 2, 2, 2), mode="reflect"), layer.weight, layer.bias)

    torch.testing.assert_close(layer(features), plain(), rtol=1e-12, atol=1e-12)
    inputs = (features, layer.weight, layer.bias)
    ours = torch.autograd.grad(layer(features).pow(3).sum(), inputs)
    theirs = torch.autograd.grad(plain().pow(3).sum(), inputs)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


def test_upsampling_convolution_refuses_a_single_row() -> None:
    with pytest.raises(ValueError, match="2x2"):
        UpsamplingConvolution(1, 1)(torch.zeros(1, 1, 1, 4))


def test_layer_norm_divides_by_the_unbiased_deviation_of_each_sample() -> None:
    features = torch.randn(3, 4, 5, 6) * torch.tensor([0.5, 2.0, 30.0]).view(3, 1, 1, 1) + 7
    norm = LayerNorm(4)
    with torch.no_grad():
        norm.shift.copy_(torch.arange(4.0))
    for index, sample in enumerate(features):
        expected = (sample - sample.mean()) / (sample.std() + 1e-5) * norm.gain[:, None, None] + norm.shift[
            :, None, None
        ]
        torch.testing.assert_close(norm(features)[index], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(norm(torch.ones(1, 4, 2, 2)), torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 2, 2))


def test_coarse_scales_average_only_real_pixels() -> None:
    discriminator = Discriminator(width=2, scales=2)
    assert torch.equal(discriminator(torch.ones(1, 3, 64, 64))[1], discriminator.scales[1](torch.ones(1, 3, 32, 32)))


@pytest.mark.parametrize("scales", [1, 2, 3])
def test_smallest_discriminated_side_is_the_smallest(scales: int) -> None:
    side = smallest_discriminated_side(scales)
    discriminator = Discriminator(width=2, scales=scales)
    assert [score.shape[-1] for score in discriminator(torch.zeros(1, 3, side, side))][-1] == 1
    with pytest.raises(RuntimeError):
        discriminator(torch.zeros(1, 3, side - 2**scales, side))


def test_generators_pass_equals_its_parts() -> None:
    generators = Generators(width=4, res_blocks=1)
    day, night = torch.rand(2, 3, 16, 16) * 2 - 1, torch.rand(2, 3, 16, 16) * 2 - 1
    noise = LatentNoise(*torch.randn(4, 2, 16, 4, 4))
    made = generators(day, night, noise)
    day_code = generators.day_encoder(day)
    night_from_day = generators.night_decoder(day_code + noise.day)
    again = generators.night_encoder(night_from_day)
    torch.testing.assert_close(made.latent_day, day_code)
    torch.testing.assert_close(made.day_from_day, generators.day_decoder(day_code + noise.day))
    torch.testing.assert_close(made.night_from_day, night_from_day)
    torch.testing.assert_close(made.latent_day_again, again)
    torch.testing.assert_close(made.day_cycled, generators.day_decoder(again + noise.day_again))
    other = generators.day_decoder(generators.night_encoder(night) + noise.night)
    torch.testing.assert_close(made.day_from_night, other)
    assert generators(day, night, noise, cycle=False).day_cycled is None


def test_translate_keeps_any_size_and_adds_no_noise() -> None:
    generators = Generators(width=4, res_blocks=1).eval()
    images = torch.rand(1, 3, 33, 18) * 2 - 1
    with torch.no_grad():
        night, again = generators.translate(images, "night"), generators.translate(images, "night")
        day = generators.translate(images, "day")
        whole = generators.translate(images[:, :, :32, :16], "night")
    assert night.shape == day.shape == images.shape
    assert torch.equal(night, again)
    assert not torch.equal(night, day)
    expected = generators.night_decoder(generators.day_encoder(images[:, :, :32, :16]))
    torch.testing.assert_close(whole, expected)


def test_ranges_round_trip_exactly() -> None:
    bytes_256 = torch.arange(256, dtype=torch.uint8)
    unit = to_unit_range(bytes_256)
    assert unit[0] == -1 and unit[255] == 1
    assert torch.equal(to_uint8(unit), bytes_256)
    assert to_uint8(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]


def test_a_model_folder_brings_the_translator_back(tmp_path: Path) -> None:
    generators = Generators(width=4, res_blocks=1)
    folder = Location.of(tmp_path / "model")
    save_model(folder, generators.state_dict(), {"kind": "unit", "width": 4, "res_blocks": 1})
    images = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            load_generators(folder).translate(images, "day"), generators.translate(images, "day")
        )


def test_wrong_model_folders_are_refused(tmp_path: Path) -> None:
    folder = Location.of(tmp_path / "model")
    save_model(folder, {"a": torch.zeros(1)}, {"kind": "semantic_fpn"})
    with pytest.raises(UserError, match="semantic_fpn"):
        load_generators(folder)
    with pytest.raises(UserError, match="width 8"):
        build_generators(8, 1, Generators(4, 1).state_dict())
