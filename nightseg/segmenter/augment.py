"""Joint image and label transforms for training, drawn from an explicit random generator.

Images are uint8 tensors 3 x H x W (RGB, [0, 255]), labels uint8 tensors H x W of train ids. Whatever moves pixels moves
both; a label is never interpolated.

The crop is cut out before it is scaled, so work follows the crop's size and not the frame's. Labels are those of a
frame scaled as a whole and then cropped; images differ by a grey level of rounding, and more in the outermost pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transform

from nightseg.data.taxonomy import IGNORE
from nightseg.segmenter.settings import Augmentation

LEAST_BLUR: Final = 0.2  # pixels: less changes no grey level


def sample_rng(seed: int, epoch: int, repeat: int, index: int) -> np.random.Generator:
    """The generator of one sample: entry `index` of the training set, drawn for the `repeat`-th time in `epoch`.

    Workers do not matter.
    """
    return np.random.default_rng((seed, epoch, repeat, index))


def resize_image(image_3HW: Tensor, size: Sequence[int] | None) -> Tensor:
    """To `size` = (height, width), antialiased bilinear; None keeps the native size.

    The one rule by which frames reach a network's input size, in training and in inference.
    """
    if size is None or tuple(image_3HW.shape[-2:]) == tuple(size):
        return image_3HW
    # PyTorch's way for bytes stops at a single pixel (2.14: it takes the memory of 3 x 1 x 1 for channels last).
    image_3HW = image_3HW.float() if tuple(size) == (1, 1) else image_3HW
    resized: Tensor = transform.resize(image_3HW, list(size), InterpolationMode.BILINEAR, antialias=True)
    return resized.round().to(torch.uint8) if resized.is_floating_point() else resized


def resize_label(label_HW: Tensor, size: Sequence[int] | None) -> Tensor:
    """Nearest by pixel centres, where the bilinear image resize puts them (plain "nearest" is half a pixel off)."""
    if size is None or tuple(label_HW.shape) == tuple(size):
        return label_HW
    resized: Tensor = transform.resize(label_HW[None], list(size), InterpolationMode.NEAREST_EXACT)[0]
    return resized


class _Span(NamedTuple):
    """One axis of a scaled crop: the pixels taken, the pixels they become, the pixels of padding before and after."""

    start: int
    length: int
    scaled: int
    before: int
    after: int

    @property
    def taken(self) -> slice:
        return slice(self.start, self.start + self.length)


def _draw_span(length: int, crop: int, scale: float, rng: np.random.Generator) -> _Span:
    place = rng.random()
    wanted = max(1, round(crop / scale))
    if wanted <= length:
        return _Span(int(place * (length - wanted + 1)), wanted, crop, 0, 0)
    scaled = min(crop, max(1, round(length * scale)))
    before = int(place * (crop - scaled + 1))
    return _Span(0, length, scaled, before, crop - scaled - before)


class Wanted(NamedTuple):
    """A class that a crop should show, on at least this share of its pixels."""

    train_id: int
    min_share: float


CROPS_TRIED: Final = 10  # as DAFormer (arXiv 2111.14887)


def augment(
    image_3HW: Tensor,
    label_HW: Tensor,
    rng: np.random.Generator,
    *,
    crop: tuple[int, int],
    settings: Augmentation,
    fill: tuple[int, int, int] = (0, 0, 0),
    shows: Wanted | None = None,
) -> tuple[Tensor, Tensor]:
    """A random view of a frame, exactly `crop` = (height, width) large; one that `shows` a class if ten draws find it.

    A frame that is smaller than the crop is padded at a random place: the image with `fill` (the mean colour of the
    encoder, which normalises to zero), the label with 255. The same draws are made whatever the settings, so turning
    one transform off does not change the others.
    """
    scale, flip, brightness, contrast, saturation = rng.random(5)
    low, high = settings.scale
    factor = low + scale * (high - low)
    rows = _draw_span(image_3HW.shape[1], crop[0], factor, rng)
    columns = _draw_span(image_3HW.shape[2], crop[1], factor, rng)
    strength, noise_seed = rng.random(), int(rng.integers(2**63))
    gamma, blur, hue = rng.random(3)
    for _ in range(CROPS_TRIED - 1):
        if shows is None or _shows(label_HW[rows.taken, columns.taken], shows):
            break
        rows = _draw_span(image_3HW.shape[1], crop[0], factor, rng)
        columns = _draw_span(image_3HW.shape[2], crop[1], factor, rng)

    image = resize_image(image_3HW[:, rows.taken, columns.taken], (rows.scaled, columns.scaled))
    label = resize_label(label_HW[rows.taken, columns.taken], (rows.scaled, columns.scaled))
    if settings.gamma:
        image = _curve(2.0 ** (settings.gamma * (2 * gamma - 1)))[image.long()]
    if settings.brightness:
        image = transform.adjust_brightness(image, 1 + settings.brightness * (2 * brightness - 1))
    if settings.contrast:
        image = transform.adjust_contrast(image, 1 + settings.contrast * (2 * contrast - 1))
    if settings.saturation:
        image = transform.adjust_saturation(image, 1 + settings.saturation * (2 * saturation - 1))
    if settings.hue:
        image = transform.adjust_hue(image, settings.hue * (hue - 0.5))
    reach = min(math.ceil(2 * settings.blur * blur), rows.scaled - 1, columns.scaled - 1)  # edges are reflected
    if settings.blur * blur > LEAST_BLUR and reach > 0:
        image = transform.gaussian_blur(image, 2 * reach + 1, settings.blur * blur)
    if flip < settings.flip:
        image, label = image.flip(-1), label.flip(-1)
    if settings.noise:
        image = _noisy(image, 255 * settings.noise * strength, noise_seed)
    edges = [columns.before, rows.before, columns.after, rows.after]
    if any(edges):
        image, label = transform.pad(image, edges, list(fill)), transform.pad(label[None], edges, IGNORE)[0]
    return image.contiguous(), label.contiguous()


def _shows(label_HW: Tensor, wanted: Wanted) -> bool:
    return int((label_HW == wanted.train_id).sum()) >= max(1.0, wanted.min_share * label_HW.numel())


def _curve(exponent: float) -> Tensor:
    """uint8 256: what each grey level becomes, white and black stay."""
    return (255 * (torch.arange(256, dtype=torch.float64) / 255) ** exponent).round().to(torch.uint8)


def _noisy(image_3HW: Tensor, deviation: float, seed: int) -> Tensor:
    """Gaussian noise of a standard deviation in grey levels: what a sensor adds when there is little light."""
    noise = torch.randn(image_3HW.shape, generator=torch.Generator().manual_seed(seed))
    return noise.mul_(deviation).add_(image_3HW).round_().clamp_(0, 255).to(torch.uint8)
