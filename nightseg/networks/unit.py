"""UNIT: two autoencoders, one a domain, whose latent spaces are made to agree (arXiv 1703.00848, MUNIT-style variant).

Written from the published description and measured facts of the 2018 network; default arguments give exactly that
network: 5,385,856 + 5,754,627 parameters a generator, 8,271,171 a discriminator (8,276,547 with layer norm).

Letters in tensor names: B batch, 3 RGB, H height, W width of the image; C channels, h = H / 4, w = W / 4 of the latent.
Images are float32 in [-1, 1]; height and width must be multiples of 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nightseg.networks.checkpoint import load_tensors
from nightseg.storage import Location, UserError

KIND = "unit"  # of the model card
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

    The reference divides by (unbiased standard deviation + 1e-5). One-group group normalisation is 8 times faster on a
    CPU, so it is used with the bias factor sqrt((n - 1) / n) put into the gain; the epsilon then differs by a relative
    1e-5 / deviation, below what float32 keeps for any image.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, features_BCHW: Tensor) -> Tensor:
        count = features_BCHW.shape[1:].numel()
        gain = self.gain * math.sqrt((count - 1) / count)
        return F.group_norm(features_BCHW, 1, gain, self.shift, eps=NORM_EPSILON**2)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with instance norm around a skip; no activation after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _convolution(channels, channels, 3, padding=1),
            nn.InstanceNorm2d(channels),
            nn.ReLU(inplace=True),
            _convolution(channels, channels, 3, padding=1),
            nn.InstanceNorm2d(channels),
        )

    def forward(self, features_BCHW: Tensor) -> Tensor:
        output: Tensor = features_BCHW + self.layers(features_BCHW)
        return output


class UpsamplingConvolution(nn.Module):
    """Nearest upsampling by 2, then a 5x5 convolution with reflect padding, at 36 % of the multiplications.

    After nearest upsampling the five taps of a row or column fall on three source pixels, so each of the four output
    phases is a 3x3 convolution of the small image with summed weights. Only the outermost ring of output pixels sees
    the reflection differently; it is computed from two-pixel strips. The result equals the plain form to rounding.
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
        padded = F.pad(features_BCHW, (1, 1, 1, 1), mode="replicate")
        output = F.pixel_shuffle(F.conv2d(padded, phases, self.bias.repeat_interleave(4)), 2)
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
            nn.InstanceNorm2d(width),
            nn.ReLU(inplace=True),
            _convolution(width, 2 * width, 4, stride=2, padding=1),
            nn.InstanceNorm2d(2 * width),
            nn.ReLU(inplace=True),
            _convolution(2 * width, 4 * width, 4, stride=2, padding=1),
            nn.InstanceNorm2d(4 * width),
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


def _initialise(generator: nn.Module) -> None:
    """Kaiming normal by fan-in, biases 0."""
    for layer in generator.modules():
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
    """An encoder and a decoder for day, and for night; one module, so that one gradient exchange covers them all."""

    def __init__(self, width: int = 64, res_blocks: int = 4) -> None:
        super().__init__()
        self.day_encoder = Encoder(width, res_blocks)
        self.day_decoder = Decoder(width, res_blocks)
        self.night_encoder = Encoder(width, res_blocks)
        self.night_decoder = Decoder(width, res_blocks)

    def forward(self, day_B3HW: Tensor, night_B3HW: Tensor, noise: LatentNoise, cycle: bool = True) -> Translation:
        """Each image is encoded once, and each decoder runs once over both codes: reconstruction and translation."""
        latent_day, latent_night = self.day_encoder(day_B3HW), self.night_encoder(night_B3HW)
        codes_2B = torch.cat((latent_day + noise.day, latent_night + noise.night))
        day_from_day, day_from_night = self.day_decoder(codes_2B).tensor_split(2)
        night_from_day, night_from_night = self.night_decoder(codes_2B).tensor_split(2)
        day_cycled = night_cycled = day_again = night_again = None
        if cycle:
            day_again, night_again = self.night_encoder(night_from_day), self.day_encoder(day_from_night)
            day_cycled = self.day_decoder(day_again + noise.day_again)
            night_cycled = self.night_decoder(night_again + noise.night_again)
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

    def translate(self, images_B3HW: Tensor, to: Literal["day", "night"]) -> Tensor:
        """(B, 3, H, W) of the other domain -> the same scene in domain `to`, without noise, at the same size.

        Sides that are no multiple of 4 are reflected up to one and cropped back.
        """
        height, width = images_B3HW.shape[2:]
        padded = F.pad(images_B3HW, (0, -width % STRIDE, 0, -height % STRIDE), mode="reflect")
        if to == "night":
            translated = self.night_decoder(self.day_encoder(padded))
        else:
            translated = self.day_decoder(self.night_encoder(padded))
        cropped: Tensor = translated[:, :, :height, :width]
        return cropped


class Discriminators(nn.Module):
    """One discriminator a domain, in one module for the same reason as `Generators`."""

    def __init__(self, width: int = 64, scales: int = 3, norm: Literal["none", "layer"] = "none") -> None:
        super().__init__()
        self.day = Discriminator(width, scales, norm)
        self.night = Discriminator(width, scales, norm)

    def forward(self, day_B3HW: Tensor, night_B3HW: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Scores of day images by the day judge, and of night images by the night judge; see `Discriminator`."""
        return self.day(day_B3HW), self.night(night_B3HW)


def build_generators(width: int, res_blocks: int, tensors: Mapping[str, Tensor]) -> Generators:
    """Generators with the given tensors, for translation only. UserError when they belong to another architecture."""
    generators = Generators(width, res_blocks)
    try:
        generators.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise UserError(
            f"these are not the tensors of a UNIT of width {width} with {res_blocks} blocks: {error}"
        ) from error
    return generators.requires_grad_(False).eval().to(memory_format=torch.channels_last)


def load_generators(folder: Location) -> Generators:
    """The translator of a model folder whose card has kind "unit", on the CPU, ready to translate."""
    tensors, card = load_tensors(folder)
    if card.get("kind") != KIND:
        raise UserError(
            f"{folder.uri} holds a model of kind {card.get('kind')!r}; translation needs one of kind {KIND!r}"
        )
    return build_generators(int(card["width"]), int(card["res_blocks"]), tensors)
