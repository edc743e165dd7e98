"""UNIT: two autoencoders, one a domain, whose latent spaces are made to agree (arXiv 1703.00848, MUNIT-style variant).

Written from the published description and measured facts of the 2018 network; default arguments give exactly that
network: 5,385,856 + 5,754,627 parameters a generator, 8,271,171 a discriminator (8,276,547 with layer norm).

Letters in tensor names: B batch, 3 RGB, H height, W width of the image; C channels, h = H / 4, w = W / 4 of the latent.
Images are float32 in [-1, 1]; height and width must be multiples of 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nightseg.networks.model_folder import load_tensors
from nightseg.networks.weights import check_names_and_shapes
from nightseg.storage import Location, UserError

KIND = "unit"  # of the model card
DISCRIMINATORS = "discriminators."  # before the names of their tensors in a model; the generators' have no prefix
STRIDE = 4
IMAGE_MEAN = 127.5  # uint8 [0, 255] -> [-1, 1]; the mean and the half-width of the range are the same number
NORM_EPSILON = 1e-5
LEAK = 0.2
DISCRIMINATOR_LAYERS = 4
DISCRIMINATOR_DEVIATION = 0.02
# Rows: the three source pixels i-1, i, i+1; columns: the five kernel taps that fall on them after nearest upsampling.
EVEN_TAPS = ((1, 1, 0, 0, 0), (0, 0, 1, 1, 0), (0, 0, 0, 0, 1))
ODD_TAPS = ((1, 0, 0, 0, 0), (0, 1, 1, 0, 0), (0, 0, 0, 1, 1))


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 [0, 255] of any shape -> float32 [-1, 1]."""
    return images.to(torch.float32).div(IMAGE_MEAN).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Float [-1, 1] of any shape -> uint8 [0, 255], rounded to nearest, clamped."""
    return images.to(torch.float32).add(1.0).mul_(IMAGE_MEAN).round_().clamp_(0.0, 255.0).to(torch.uint8)


def _convolution(channels_in: int, channels_out: int, kernel: int, stride: int = 1, padding: int = 0) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel, stride, padding, padding_mode="reflect")


class LayerNorm(nn.Module):
    """Normalises over channel, height and width of each sample; gain and shift a channel (arXiv 1607.06450).

    The reference divides by (unbiased standard deviation + 1e-5). Group norm of one group, 8 times faster on a CPU, is
    the same to float32 with sqrt((n - 1) / n) put into the gain.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, features_BCHW: Tensor) -> Tensor:
        count = features_BCHW.shape[1:].numel()
        gain = self.gain * math.sqrt((count - 1) / count)
        return F.group_norm(features_BCHW, 1, gain, self.shift, eps=NORM_EPSILON**2)


class InstanceNorm(nn.Module):
    """Zero mean and unit variance a channel and image; nothing is learnt (arXiv 1607.08022).

    It is the batch norm of one image; on a CPU PyTorch's own is a fifth as fast, because it leaves channels last.
    """

    def forward(self, features_BCHW: Tensor) -> Tensor:
        if features_BCHW.device.type != "cpu":
            return F.instance_norm(features_BCHW, eps=NORM_EPSILON)
        samples = [
            F.batch_norm(sample_1CHW, None, None, training=True, eps=NORM_EPSILON)
            for sample_1CHW in features_BCHW.tensor_split(len(features_BCHW))
        ]
        return samples[0] if len(samples) == 1 else torch.cat(samples)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with instance norm around a skip; no activation after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _convolution(channels, channels, 3, padding=1),
            InstanceNorm(),
            nn.ReLU(inplace=True),
            _convolution(channels, channels, 3, padding=1),
            InstanceNorm(),
        )

    def forward(self, features_BCHW: Tensor) -> Tensor:
        output: Tensor = features_BCHW + self.layers(features_BCHW)
        return output


class UpsamplingConvolution(nn.Module):
    """Nearest upsampling by 2, then a 5x5 convolution with reflect padding, at 36 % of the multiplications.

    The five taps of a row or column fall on three source pixels, so each of the four output phases is a 3x3 convolution
    of the small image with summed weights. Only the outermost ring sees the reflection differently; it is computed from
    two-pixel strips.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        plain = nn.Conv2d(channels_in, channels_out, 5)
        self.weight, self.bias = plain.weight, plain.bias
        self.register_buffer("taps", torch.tensor([EVEN_TAPS, ODD_TAPS], dtype=torch.float32), persistent=False)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        if min(features_BCHW.shape[2:]) < 2:
            raise ValueError(f"UpsamplingConvolution needs at least 2x2 features, got {tuple(features_BCHW.shape)}")
        assert self.bias is not None
        taps = self.get_buffer("taps")
        phases = torch.einsum("pty,qux,oiyx->opqitu", taps, taps, self.weight).flatten(0, 2)
        output = F.pixel_shuffle(F.conv2d(_replicated(features_BCHW), phases, self.bias.repeat_interleave(4)), 2)
        top = self._edge(features_BCHW[:, :, :2], self.weight)
        bottom = self._edge(features_BCHW[:, :, -2:].flip(2), self.weight.flip(2))
        columns, weight = features_BCHW.transpose(2, 3), self.weight.transpose(2, 3)
        left = self._edge(columns[:, :, :2], weight)
        right = self._edge(columns[:, :, -2:].flip(2), weight.flip(2))
        pasted: Tensor = _PasteRing.apply(output, top, bottom, left, right)
        return pasted

    def _edge(self, strip_BC2W: Tensor, weight: Tensor) -> Tensor:
        """First output row: the reflected taps 0..4 fall on source rows 1, 0, 0, 0, 1."""
        rows = torch.stack((weight[:, :, 1:4].sum(2), weight[:, :, 0] + weight[:, :, 4]), dim=2)
        wide = F.pad(strip_BC2W.repeat_interleave(2, dim=3), (2, 2, 0, 0), mode="reflect")
        return F.conv2d(wide, rows, self.bias)[:, :, 0]


def _replicated(features_BCHW: Tensor) -> Tensor:
    """One more pixel on every side, the same as its neighbour."""
    if not torch.compiler.is_compiling():
        return F.pad(features_BCHW, (1, 1, 1, 1), mode="replicate")
    # The compiler of PyTorch 2.14 takes the gradient of that padding for contiguous, and stops when it is not.
    for axis in (2, 3):
        first, last = features_BCHW.narrow(axis, 0, 1), features_BCHW.narrow(axis, -1, 1)
        features_BCHW = torch.cat((first, features_BCHW, last), axis)
    return features_BCHW


class _PasteRing(torch.autograd.Function):
    """Overwrites the outermost rows and columns; autograd's own slice assignment copies the image for each of them."""

    @staticmethod
    def forward(
        ctx: Any, output_BCHW: Tensor, top_BCW: Tensor, bottom_BCW: Tensor, left_BCH: Tensor, right_BCH: Tensor
    ) -> Tensor:
        ctx.mark_dirty(output_BCHW)
        output_BCHW[:, :, 0], output_BCHW[:, :, -1] = top_BCW, bottom_BCW
        output_BCHW[:, :, :, 0], output_BCHW[:, :, :, -1] = left_BCH, right_BCH  # these own the corners
        return output_BCHW

    @staticmethod
    def backward(ctx: Any, gradient_BCHW: Tensor) -> tuple[Tensor, ...]:
        inner_BCHW = gradient_BCHW.clone()
        inner_BCHW[:, :, :, 0] = inner_BCHW[:, :, :, -1] = 0.0
        rows = (inner_BCHW[:, :, 0].clone(), inner_BCHW[:, :, -1].clone())
        inner_BCHW[:, :, 0] = inner_BCHW[:, :, -1] = 0.0
        return inner_BCHW, *rows, gradient_BCHW[:, :, :, 0], gradient_BCHW[:, :, :, -1]


class Encoder(nn.Module):
    """Image -> mean of the latent code, `4 * width` channels at a quarter of the size.

    UNIT's posterior has unit variance, so the mean is all there is to predict; training adds N(0, 1) noise to it.
    """

    def __init__(self, width: int = 64, res_blocks: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _convolution(3, width, 7, padding=3),
            InstanceNorm(),
            nn.ReLU(inplace=True),
            _convolution(width, 2 * width, 4, stride=2, padding=1),
            InstanceNorm(),
            nn.ReLU(inplace=True),
            _convolution(2 * width, 4 * width, 4, stride=2, padding=1),
            InstanceNorm(),
            nn.ReLU(inplace=True),
            *(ResidualBlock(4 * width) for _ in range(res_blocks)),
        )
        _initialise(self)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 4 width, H / 4, W / 4)."""
        latent_BChw: Tensor = self.layers(images_B3HW)
        return latent_BChw


class Decoder(nn.Module):
    """Latent code -> image in [-1, 1]."""

    def __init__(self, width: int = 64, res_blocks: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(ResidualBlock(4 * width) for _ in range(res_blocks)),
            UpsamplingConvolution(4 * width, 2 * width),
            LayerNorm(2 * width),
            nn.ReLU(inplace=True),
            UpsamplingConvolution(2 * width, width),
            LayerNorm(width),
            nn.ReLU(inplace=True),
            _convolution(width, 3, 7, padding=3),
            nn.Tanh(),
        )
        _initialise(self)

    def forward(self, latent_BChw: Tensor) -> Tensor:
        """(B, 4 width, h, w) -> (B, 3, 4 h, 4 w) in [-1, 1]."""
        images_B3HW: Tensor = self.layers(latent_BChw)
        return images_B3HW


class Discriminator(nn.Module):
    """Scores patches of an image as real or translated, at several scales, each half the one before."""

    def __init__(self, width: int = 64, scales: int = 3, norm: Literal["none", "layer"] = "none") -> None:
        super().__init__()
        self.scales = nn.ModuleList(_patch_scorer(width, norm) for _ in range(scales))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, DISCRIMINATOR_DEVIATION)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> one (B, 1, H / 16 / 2^s, W / 16 / 2^s) map of scores a scale s; real aims at 1, fake at 0."""
        scores = []
        for index, scorer in enumerate(self.scales):
            if index > 0:
                images_B3HW = F.avg_pool2d(images_B3HW, 3, stride=2, padding=1, count_include_pad=False)
            scores.append(scorer(images_B3HW))
        return scores


def smallest_discriminated_side(scales: int) -> int:
    """Fewest pixels a side of an image needs: the last stride-2 layer of the coarsest scale reflects 2 pixels."""
    return 1 << (DISCRIMINATOR_LAYERS + scales - 1)


def _patch_scorer(width: int, norm: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels_in = 3
    for index in range(DISCRIMINATOR_LAYERS):
        channels_out = width * 2**index
        layers.append(_convolution(channels_in, channels_out, 4, stride=2, padding=1))
        if norm == "layer" and index > 0:
            layers.append(LayerNorm(channels_out))
        layers.append(nn.LeakyReLU(LEAK, inplace=True))
        channels_in = channels_out
    layers.append(nn.Conv2d(channels_in, 1, 1))
    return nn.Sequential(*layers)


def _initialise(part: nn.Module) -> None:
    """Kaiming normal by fan-in, biases 0."""
    for layer in part.modules():
        if isinstance(layer, nn.Conv2d | UpsamplingConvolution):
            nn.init.kaiming_normal_(layer.weight, a=0.0, mode="fan_in")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)


class LatentNoise(NamedTuple):
    """N(0, 1) draws of the latent's shape; `again` for the second encoding, of the translated images."""

    day: Tensor
    night: Tensor
    day_again: Tensor
    night_again: Tensor


class Translation(NamedTuple):
    """All that one pass of both generators makes. `a_from_b`: domain a decoded from the code of a frame of b."""

    day_from_day: Tensor
    night_from_night: Tensor
    night_from_day: Tensor
    day_from_night: Tensor
    latent_day: Tensor
    latent_night: Tensor
    day_cycled: Tensor | None  # day -> night -> day; None when the cycle is left out
    night_cycled: Tensor | None
    latent_day_again: Tensor | None  # code of night_from_day
    latent_night_again: Tensor | None


class Generators(nn.Module):
    """An encoder and a decoder for day, and for night; one module, so that one gradient exchange covers them all.

    The last `shared_blocks` of the `res_blocks` residual blocks of both encoders are one and the same, and so are the
    first ones of both decoders: UNIT's weight sharing (section 3 of the paper), which its 2018 network gave up (0).
    """

    def __init__(self, width: int = 64, res_blocks: int = 4, shared_blocks: int = 0) -> None:
        super().__init__()
        if not 0 <= shared_blocks <= res_blocks:
            raise ValueError(f"shared_blocks {shared_blocks} of {res_blocks} residual blocks")
        self.res_blocks = res_blocks
        own_blocks = res_blocks - shared_blocks
        self.day_encoder = Encoder(width, own_blocks)
        self.day_decoder = Decoder(width, own_blocks)
        self.night_encoder = Encoder(width, own_blocks)
        self.night_decoder = Decoder(width, own_blocks)
        self.shared_encoding = nn.Sequential(*(ResidualBlock(4 * width) for _ in range(shared_blocks)))
        self.shared_decoding = nn.Sequential(*(ResidualBlock(4 * width) for _ in range(shared_blocks)))
        _initialise(self.shared_encoding)
        _initialise(self.shared_decoding)

    def forward(self, day_B3HW: Tensor, night_B3HW: Tensor, noise: LatentNoise, cycle: bool = True) -> Translation:
        """Each image is encoded once, and each decoder runs once over both codes: reconstruction and translation."""
        latent_day, latent_night = _both(
            self.shared_encoding, self.day_encoder(day_B3HW), self.night_encoder(night_B3HW)
        )
        codes_2B = self.shared_decoding(torch.cat((latent_day + noise.day, latent_night + noise.night)))
        day_from_day, day_from_night = self.day_decoder(codes_2B).tensor_split(2)
        night_from_day, night_from_night = self.night_decoder(codes_2B).tensor_split(2)
        day_cycled = night_cycled = day_again = night_again = None
        if cycle:
            day_again, night_again = _both(
                self.shared_encoding, self.night_encoder(night_from_day), self.day_encoder(day_from_night)
            )
            codes = _both(self.shared_decoding, day_again + noise.day_again, night_again + noise.night_again)
            day_cycled, night_cycled = self.day_decoder(codes[0]), self.night_decoder(codes[1])
        return Translation(
            day_from_day=day_from_day,
            night_from_night=night_from_night,
            night_from_day=night_from_day,
            day_from_night=day_from_night,
            latent_day=latent_day,
            latent_night=latent_night,
            day_cycled=day_cycled,
            night_cycled=night_cycled,
            latent_day_again=day_again,
            latent_night_again=night_again,
        )

    def translate(
        self, images_B3HW: Tensor, to: Literal["day", "night"], tile: tuple[int, int] | None = None
    ) -> Tensor:
        """(B, 3, H, W) of the other domain -> the same scene in domain `to`, at the same size.

        Without noise, so a sequence does not flicker. Sides that are no multiple of 4 are reflected up to one and
        cropped back; those under 8, which the network cannot see, are repeated up to 8. `tile` (height, width): larger
        images go through in tiles whose overlaps, `seam_width` pixels, are blended; norms then see a tile's statistics,
        not the image's.
        """
        height, width = images_B3HW.shape[2:]
        below, right = (max(2 * STRIDE, side + -side % STRIDE) - side for side in (height, width))
        mode = "reflect" if below < height and right < width else "replicate"
        padded = F.pad(images_B3HW, (0, right, 0, below), mode=mode)
        encoder, decoder = (
            (self.day_encoder, self.night_decoder) if to == "night" else (self.night_encoder, self.day_decoder)
        )

        def whole(images_B3hw: Tensor) -> Tensor:
            made: Tensor = decoder(self.shared_decoding(self.shared_encoding(encoder(images_B3hw))))
            return made

        made = whole(padded) if tile is None else tiled(whole, padded, tile, seam_width(self.res_blocks))
        return made[:, :, :height, :width]


def seam_width(res_blocks: int) -> int:
    """Pixels that a pixel of a translation depends on in each direction, norms left aside, rounded up to the stride.

    First and last convolution 3 each; the two strided ones 2 and 4; upsampling twice 2 + 4 and 1 + 2; a residual block
    two latent positions, in the encoder and in the decoder.
    """
    reach = 3 + 2 + 4 + 2 * 2 * STRIDE * res_blocks + (2 + 4) + (1 + 2) + 3
    return -(-reach // STRIDE) * STRIDE


def check_tile(tile: tuple[int, int], res_blocks: int) -> None:
    """UserError unless some of a tile is no seam and tiles stay in phase with the strides."""
    smallest = 2 * seam_width(res_blocks) + STRIDE
    if min(tile) < smallest or any(side % STRIDE for side in tile):
        raise UserError(
            f"tile: with {res_blocks} residual blocks a pixel depends on {seam_width(res_blocks)} around it, so "
            f"{tuple(tile)} must be multiples of {STRIDE}, {smallest} or more",
            cure="set it so, or to null for whole frames",
        )


def _both(blocks: nn.Sequential, day_BChw: Tensor, night_BChw: Tensor) -> tuple[Tensor, Tensor]:
    """What the blocks make of each; in one pass, because they are the same for both domains."""
    if len(blocks) == 0:
        return day_BChw, night_BChw
    day, night = blocks(torch.cat((day_BChw, night_BChw))).tensor_split(2)
    return day, night


class Discriminators(nn.Module):
    """One discriminator a domain, in one module for the same reason as `Generators`."""

    def __init__(self, width: int = 64, scales: int = 3, norm: Literal["none", "layer"] = "none") -> None:
        super().__init__()
        self.day = Discriminator(width, scales, norm)
        self.night = Discriminator(width, scales, norm)

    def forward(self, day_B3HW: Tensor, night_B3HW: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Scores of day images by the day discriminator, of night images by the night discriminator."""
        return self.day(day_B3HW), self.night(night_B3HW)


def build_generators(width: int, res_blocks: int, tensors: Mapping[str, Tensor], shared_blocks: int = 0) -> Generators:
    """Generators with the given tensors, for translation only. UserError when they belong to another architecture."""
    generators = Generators(width, res_blocks, shared_blocks)
    name = f"a UNIT of width {width} with {res_blocks} residual blocks, {shared_blocks} of them shared"
    check_names_and_shapes(name, "this model", generators.state_dict(), tensors)
    generators.load_state_dict(dict(tensors))
    return generators.requires_grad_(False).eval().to(memory_format=torch.channels_last)


def split_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those of the generators, and those of the discriminators, of a model; each under the network's own names."""
    is_of = {name: name.startswith(DISCRIMINATORS) for name in tensors}
    return (
        {name: tensor for name, tensor in tensors.items() if not is_of[name]},
        {name.removeprefix(DISCRIMINATORS): tensor for name, tensor in tensors.items() if is_of[name]},
    )


def load_generators(folder: Location) -> Generators:
    """The translator of a model folder whose card has kind "unit", on the CPU, ready to translate."""
    tensors, card = load_tensors(folder)
    if card.get("kind") != KIND:
        raise UserError(
            f"{folder.uri}: it holds a model of kind {card.get('kind')!r}", cure=f"give a model folder of kind {KIND}"
        )
    width, res_blocks, shared_blocks = (int(card[name]) for name in ("width", "res_blocks", "shared_blocks"))
    return build_generators(width, res_blocks, split_tensors(tensors)[0], shared_blocks)


# -- large images, a tile at a time ------------------------------------------------------------------------------------


def tiled(apply: Callable[[Tensor], Tensor], images_BCHW: Tensor, tile: tuple[int, int], overlap: int) -> Tensor:
    """`apply(images)` for an `apply` that keeps the size, from tiles of `tile` = (height, width) pixels; float32.

    Neighbours overlap by `overlap` pixels or more and are blended there linearly. A stride that divides image, tile and
    overlap stays in phase. An axis along which the image is no larger than the tile is not cut.
    """
    batch, _, height, width = images_BCHW.shape
    rows, columns = spans(height, tile[0], overlap), spans(width, tile[1], overlap)
    if len(rows) == len(columns) == 1:
        return apply(images_BCHW).float()
    sums_BCHW: Tensor | None = None
    shares_HW = torch.zeros(height, width, device=images_BCHW.device)
    for top, bottom in rows:
        for left, right in columns:
            made_BChw = apply(images_BCHW[:, :, top:bottom, left:right]).float()
            share_hw = _ramp(top, bottom, height, overlap).view(-1, 1) * _ramp(left, right, width, overlap)
            share_hw = share_hw.to(made_BChw.device)
            if sums_BCHW is None:
                sums_BCHW = made_BChw.new_zeros(batch, made_BChw.shape[1], height, width)
            sums_BCHW[:, :, top:bottom, left:right] += made_BChw * share_hw
            shares_HW[top:bottom, left:right] += share_hw
    assert sums_BCHW is not None
    return sums_BCHW / shares_HW


def spans(size: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """(begin, end) of tiles that cover `size` pixels, all `tile` long, the last one moved back to end with them."""
    if not 0 <= overlap < tile:
        raise ValueError(f"tiles of {tile} pixels cannot overlap by {overlap}")
    if size <= tile:
        return [(0, size)]
    return [(begin, begin + tile) for begin in (*range(0, size - tile, tile - overlap), size - tile)]


def _ramp(begin: int, end: int, size: int, overlap: int) -> Tensor:
    """Share of a tile along one axis: 1 in the middle and at the image's own border, falling in the overlaps."""
    positions = torch.arange(end - begin, dtype=torch.float32) + 0.5
    share = torch.ones(end - begin)
    if overlap:
        share = share if begin == 0 else torch.minimum(share, positions / overlap)
        share = share if end == size else torch.minimum(share, positions.flip(0) / overlap)
    return share
