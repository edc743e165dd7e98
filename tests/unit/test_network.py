"""UNIT's networks: exact sizes, exact shapes, and the fast layers against their plain definitions."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nightseg.networks.model_folder import save_model
from nightseg.storage import Location, UserError
from nightseg.unit.network import (
    Decoder,
    Discriminator,
    Discriminators,
    Encoder,
    Generators,
    InstanceNorm,
    LatentNoise,
    LayerNorm,
    UpsamplingConvolution,
    build_generators,
    check_tile,
    load_generators,
    seam_width,
    smallest_discriminated_side,
    spans,
    tiled,
    to_uint8,
    to_unit_range,
)
from tests.rounding import assert_near, rounding


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


SHAPES_AT_256 = {
    Encoder: [
        *[(64, 256, 256)] * 3,  # convolution, norm, ReLU
        *[(128, 128, 128)] * 3,
        *[(256, 64, 64)] * (3 + 4 * 5),  # and four residual blocks of five layers
    ],
    Decoder: [
        *[(256, 64, 64)] * (4 * 5),
        *[(128, 128, 128)] * 3,
        *[(64, 256, 256)] * 3,
        *[(3, 256, 256)] * 2,
    ],
    Discriminator: [
        shape
        for side in (256, 128, 64)
        for shape in (
            *[(64, side // 2, side // 2)] * 2,
            *[(128, side // 4, side // 4)] * 2,
            *[(256, side // 8, side // 8)] * 2,
            *[(512, side // 16, side // 16)] * 2,
            (1, side // 16, side // 16),
        )
    ],
}


@pytest.mark.parametrize("network", list(SHAPES_AT_256))
def test_every_layer_has_the_shape_it_has_in_unit_at_256_x_256(network: type[nn.Module]) -> None:
    found: list[tuple[int, ...]] = []
    with torch.device("meta"):  # shapes need no arithmetic
        module = network()
        for layer in module.modules():
            if not list(layer.children()):
                layer.register_forward_hook(lambda _, __, output: found.append(tuple(output.shape)))
        module(torch.zeros(1, 256, 64, 64) if network is Decoder else torch.zeros(1, 3, 256, 256))
    assert found == [(1, *shape) for shape in SHAPES_AT_256[network]]


def test_padding_reflects() -> None:
    """A convolution that copies one neighbour shows what lies beyond the edge."""
    for module in (Encoder(4, 1), Decoder(4, 1), Discriminator(4)):
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d) and layer.padding != (0, 0):
                assert layer.padding_mode == "reflect"
    layer = Encoder(1, 1).layers[-1].layers[0]
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, 0, 1, 0] = 1.0  # the left neighbour
    row = torch.arange(4.0).expand(1, 4, 4, 4)
    assert layer(row)[0, 0, 0].tolist() == [1.0, 0.0, 1.0, 2.0]


def test_instance_norm_is_that_of_pytorch_and_leaves_channels_last() -> None:
    features = (torch.randn(3, 4, 5, 6).double() * 3 + 1).to(memory_format=torch.channels_last).requires_grad_()
    plain = features.detach().clone().requires_grad_()
    ours, expected = InstanceNorm()(features), nn.InstanceNorm2d(4)(plain)
    torch.testing.assert_close(ours, expected)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    weights = torch.randn(3, 4, 5, 6)
    (ours * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(features.grad, plain.grad)
    assert not list(InstanceNorm().parameters())


def test_layer_norm_divides_by_the_unbiased_deviation_of_each_sample() -> None:
    features = torch.randn(3, 4, 5, 6).double() * torch.tensor([0.5, 2.0, 30.0]).view(3, 1, 1, 1) + 7
    norm = LayerNorm(4).double()
    with torch.no_grad():
        norm.shift.copy_(torch.arange(4.0))
    for index, sample in enumerate(features):
        expected = (sample - sample.mean()) / (sample.std() + 1e-5) * norm.gain[:, None, None] + norm.shift[
            :, None, None
        ]
        # Ours divides by sqrt(variance + 1e-10): a deviation of 0.4 or more without the 1e-5, of values up to 4.
        torch.testing.assert_close(norm(features)[index], expected, rtol=0, atol=4 * 1e-5 / 0.4)
    flat = norm.float()(torch.ones(1, 4, 2, 2))
    assert torch.equal(flat, torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 2, 2))


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
    generators = Generators(width=4, res_blocks=1).double()
    day, night = torch.rand(2, 2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    noise = LatentNoise(*torch.randn(4, 2, 16, 4, 4, dtype=torch.float64))
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


@pytest.mark.parametrize("cycle", [True, False])
def test_shared_blocks_are_one_module_for_both_domains(cycle: bool) -> None:
    generators = Generators(width=4, res_blocks=3, shared_blocks=2).double()
    block = num_parameters(generators.shared_encoding[0])
    assert num_parameters(generators) == num_parameters(Generators(4, 3)) - 2 * 2 * block
    day, night = torch.rand(2, 1, 3, 16, 16, dtype=torch.float64)
    noise = LatentNoise(*torch.randn(4, 1, 16, 4, 4, dtype=torch.float64))
    made = generators(day, night, noise, cycle)
    code = generators.shared_encoding(generators.day_encoder(day))
    torch.testing.assert_close(made.latent_day, code)
    night_from_day = generators.night_decoder(generators.shared_decoding(code + noise.day))
    torch.testing.assert_close(made.night_from_day, night_from_day)
    if cycle:
        again = generators.shared_encoding(generators.night_encoder(night_from_day))
        torch.testing.assert_close(made.latent_day_again, again)
        decoded = generators.day_decoder(generators.shared_decoding(again + noise.day_again))
        torch.testing.assert_close(made.day_cycled, decoded)
    torch.testing.assert_close(
        generators.translate(day, "night"), generators.night_decoder(generators.shared_decoding(code))
    )
    names = [name for name, _ in generators.named_parameters()]
    assert len(names) == len(set(names)) and any(name.startswith("shared_encoding") for name in names)


def test_more_shared_blocks_than_there_are_are_refused() -> None:
    with pytest.raises(ValueError, match="shared_blocks 3 of 2"):
        Generators(4, 2, 3)


def without_norms(module: nn.Module) -> nn.Module:
    """The same network without norms, and not saturated: what a pixel then depends on is what its kernels reach."""
    for child in module.modules():
        for name, layer in child.named_children():
            if isinstance(layer, InstanceNorm | LayerNorm | nn.Tanh):
                setattr(child, name, nn.Identity())
            elif isinstance(layer, nn.ReLU):
                setattr(child, name, nn.LeakyReLU(0.9))  # nothing dies
    return module


@pytest.mark.parametrize("res_blocks", [1, 2])
def test_seams_are_as_wide_as_a_pixel_reaches(res_blocks: int) -> None:
    generators = without_norms(Generators(width=1, res_blocks=res_blocks)).double()
    side = 4 * seam_width(res_blocks) + 8
    image = torch.rand(1, 3, side, side, dtype=torch.float64, requires_grad=True)
    reach = 0
    for pixel in range(side // 2, side // 2 + 4):  # the four places that a pixel can have in a stride
        made = generators.translate(image, "night")
        (gradient,) = torch.autograd.grad(made[0, :, pixel, pixel].sum(), image)
        touched = gradient[0].abs().amax(0).amax(0).nonzero().flatten()
        reach = max(reach, pixel - int(touched.min()), int(touched.max()) - pixel)
    assert seam_width(res_blocks) - 8 < reach <= seam_width(res_blocks)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (2, 3), (4, 4), (3, 9)])
def test_images_smaller_than_the_network_sees_are_repeated_up_to_it(size: tuple[int, int]) -> None:
    generators = Generators(width=2, res_blocks=1)
    images = torch.rand(1, 3, *size)
    below, right = (max(8, side + -side % 4) - side for side in size)
    padded = torch.nn.functional.pad(images, (0, right, 0, below), mode="replicate")
    with torch.inference_mode():
        found = generators.translate(images, "night")
        assert torch.equal(found, generators.translate(padded, "night")[:, :, : size[0], : size[1]])


def test_tiles_equal_the_whole_image_but_for_the_norms_and_the_seams() -> None:
    generators = without_norms(Generators(width=2, res_blocks=1)).double()
    seam = seam_width(1)
    tile = (2 * seam + 4, 2 * seam + 12)
    check_tile(tile, 1)
    images = torch.rand(2, 3, 2 * tile[0] + 3, 2 * tile[1] - 5, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        whole = generators.translate(images, "night").float()
        tiles = generators.translate(images, "night", tile)
        assert torch.equal(generators.translate(images, "night", (4000, 4000)), whole)  # never cut
    assert tiles.shape == images.shape
    apart = (whole - tiles).abs().amax((0, 1))
    padded = [-(-size // 4) * 4 for size in images.shape[2:]]
    in_a_seam = torch.zeros(padded[0], padded[1], dtype=torch.bool)
    for axis, size in enumerate(padded):
        for begin, end in spans(size, tile[axis], seam):
            lines = in_a_seam if axis == 0 else in_a_seam.T
            lines[begin : begin + seam] |= begin > 0
            lines[end - seam : end] |= end < size
    free = ~in_a_seam[: images.shape[2], : images.shape[3]]
    assert free.float().mean() > 0.02
    assert_near(apart[free], torch.zeros_like(apart[free]), terms=32, magnitude=float(whole.abs().max()))  # of tiles
    assert apart.max() > 1e-3  # the padding of a tile shows in its seams


@pytest.mark.parametrize("tile", [(80, 200), (200, 80), (86, 200)])
def test_tiles_that_are_all_seam_or_out_of_phase_are_refused(tile: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=r"1 residual blocks a pixel depends on 40 .*multiples of 4, 84 or more"):
        check_tile(tile, 1)


def test_tiles_of_an_even_texture_look_like_the_whole() -> None:
    """With norms: a tile that is a fair sample of the image has nearly its statistics."""
    generators = Generators(width=2, res_blocks=1)
    images = F.avg_pool2d(torch.rand(1, 3, 302, 302), 7, 1, 0)[:, :, :296, :296] * 2 - 1
    with torch.no_grad():
        whole, tiles = generators.translate(images, "night"), generators.translate(images, "night", (160, 160))
    assert (whole - tiles).abs().mean() < 0.1 * whole.std()


def test_translate_keeps_any_size_and_adds_no_noise() -> None:
    generators = Generators(width=4, res_blocks=1).double().eval()
    images = torch.rand(1, 3, 33, 18, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        night, again = generators.translate(images, "night"), generators.translate(images, "night")
        day = generators.translate(images, "day")
        whole = generators.translate(images[:, :, :32, :16], "night")
    assert night.shape == day.shape == images.shape
    assert torch.equal(night, again)
    assert not torch.equal(night, day)
    expected = generators.night_decoder(generators.day_encoder(images[:, :, :32, :16]))
    torch.testing.assert_close(whole, expected.float() if whole.dtype == torch.float32 else expected)


def test_ranges_round_trip_exactly() -> None:
    bytes_256 = torch.arange(256, dtype=torch.uint8)
    unit = to_unit_range(bytes_256)
    assert unit[0] == -1 and unit[255] == 1
    assert torch.equal(to_uint8(unit), bytes_256)
    assert to_uint8(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]


def test_a_model_folder_brings_the_translator_back(tmp_path: Path) -> None:
    generators = Generators(width=4, res_blocks=1)
    folder = Location.of(tmp_path / "model")
    save_model(folder, generators.state_dict(), {"kind": "unit", "width": 4, "res_blocks": 1, "shared_blocks": 0})
    images = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():  # in float64: their memory has another order
        found = load_generators(folder).double().translate(images, "day")
        torch.testing.assert_close(found, generators.double().translate(images, "day"))


def test_wrong_model_folders_are_refused(tmp_path: Path) -> None:
    folder = Location.of(tmp_path / "model")
    save_model(folder, {"a": torch.zeros(1)}, {"kind": "semantic_fpn"})
    with pytest.raises(UserError, match="semantic_fpn"):
        load_generators(folder)
    with pytest.raises(UserError, match="a UNIT of width 8"):
        build_generators(8, 1, Generators(4, 1).state_dict())


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


# -- tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "tile", "overlap", "expected"),
    [
        (10, 10, 4, [(0, 10)]),
        (7, 10, 4, [(0, 7)]),
        (11, 10, 4, [(0, 10), (1, 11)]),
        (16, 10, 4, [(0, 10), (6, 16)]),
        (17, 10, 4, [(0, 10), (6, 16), (7, 17)]),
        (20, 10, 0, [(0, 10), (10, 20)]),
    ],
)
def test_spans(size: int, tile: int, overlap: int, expected: list[tuple[int, int]]) -> None:
    assert spans(size, tile, overlap) == expected


def test_neighbours_share_the_overlap_or_more() -> None:
    for size in range(21, 90):
        places = spans(size, 20, 6)
        assert places[0][0] == 0 and places[-1][1] == size
        assert all(end - begin == 20 for begin, end in places)
        assert all(last[1] - first[0] >= 6 for last, first in itertools.pairwise(places))


def test_a_tile_as_large_as_the_overlap_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot overlap"):
        spans(100, 10, 10)


def test_identity_comes_back_whatever_the_tiles() -> None:
    images = torch.rand(2, 3, 33, 47)
    for tile in ((8, 8), (10, 47), (40, 9), (33, 47)):
        assert_near(tiled(lambda part: part, images, tile, 4), images, terms=32)  # up to nine weighted tiles


def test_outside_the_seams_a_local_operation_is_exact_and_inside_the_nearer_tile_counts_more() -> None:
    images, kernel = torch.rand(1, 1, 30, 30), torch.rand(1, 1, 5, 5)
    least = rounding(32) * 25  # of sums of 25 products below 1

    def blur(part: torch.Tensor) -> torch.Tensor:  # looks two pixels far, and puts zeros beyond the border
        return F.conv2d(part, kernel, padding=2)

    apart = (tiled(blur, images, (30, 18), 6) - blur(images))[0, 0].abs().amax(0)
    seam = range(12, 18)  # tiles are columns 0 .. 17 and 12 .. 29
    assert all((value > least) == (column in (12, 13, 16, 17)) for column, value in enumerate(apart.tolist()))
    assert set(seam) > {12, 13, 16, 17}
    wrong = F.conv2d(images[..., :18], kernel, padding=2)[..., 17] - blur(images)[..., 17]
    aim = wrong.abs().max() * 0.5 / 6 / (0.5 / 6 + 5.5 / 6)
    assert_near(apart[17], aim, terms=32, magnitude=25.0)
