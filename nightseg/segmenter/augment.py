"""Joint image and label transforms for training, drawn from an explicit random generator.

Images are uint8 tensors 3 x H x W (RGB, [0, 255]), labels uint8 tensors H x W of train ids. Whatever moves pixels moves
both; a label is never interpolated.

The crop is cut out before it is scaled, so work follows the crop's size and not the frame's. Labels are those of a
frame scaled as a whole and then cropped; images differ by a grey level of rounding, and more in the outermost pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transform

from nightseg.data.taxonomy import IGNORE
from nightseg.segmenter.settings import Augmentation

CHUNK_ROWS = 64  # of a crop: its floats fit into the cache of one core


def sample_rng(seed: int, epoch: int, repeat: int, index: int) -> np.random.Generator:
    """The generator of one sample: frame `index`, drawn for the `repeat`-th time in `epoch`. Workers do not matter."""
    return np.random.default_rng((seed, epoch, repeat, index))


def resize_image(image_3HW: Tensor, size: Sequence[int] | None) -> Tensor:
    """To `size` = (height, width), antialiased bilinear; None keeps the native size.

    The one rule by which frames reach a network's input size, in training and in inference.
    """
    if size is None or tuple(image_3HW.shape[-2:]) == tuple(size):
        return image_3HW
    resized: Tensor = transform.resize(image_3HW, list(size), InterpolationMode.BILINEAR, antialias=True)
    return resized


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


def _draw_span(length: int, crop: int, scale: float, rng: np.random.Generator) -> _Span:
    place = rng.random()
    wanted = max(1, round(crop / scale))
    if wanted <= length:
        return _Span(int(place * (length - wanted + 1)), wanted, crop, 0, 0)
    scaled = min(crop, max(1, round(length * scale)))
    before = int(place * (crop - scaled + 1))
    return _Span(0, length, scaled, before, crop - scaled - before)


def augment(
    image_3HW: Tensor,
    label_HW: Tensor,
    rng: np.random.Generator,
    *,
    crop: tuple[int, int],
    settings: Augmentation,
    fill: tuple[int, int, int] = (0, 0, 0),
) -> tuple[Tensor, Tensor]:
    """A random view of a frame, exactly `crop` = (height, width) large.

    A frame that is smaller than the crop is padded at a random place: the image with `fill` (the mean colour of the
    encoder, which normalises to zero), the label with 255. The same draws are made whatever the settings, so turning
    one transform off does not change the others.
    """
    scale, flip, brightness, contrast, saturation = rng.random(5)
    low, high = settings.scale
    factor = low + scale * (high - low)
    rows = _draw_span(image_3HW.shape[1], crop[0], factor, rng)
    columns = _draw_span(image_3HW.shape[2], crop[1], factor, rng)

    taken = (slice(rows.start, rows.start + rows.length), slice(columns.start, columns.start + columns.length))
    image = resize_image(image_3HW[(slice(None), *taken)], (rows.scaled, columns.scaled))
    label = resize_label(label_HW[taken], (rows.scaled, columns.scaled))
    strengths, draws = (settings.brightness, settings.contrast, settings.saturation), (brightness, contrast, saturation)
    image = _coloured(image, *(1 + s * (2 * draw - 1) if s else None for s, draw in zip(strengths, draws, strict=True)))
    if flip < settings.flip:
        image, label = image.flip(-1), label.flip(-1)
    strength, noise_seed = rng.random(), int(rng.integers(2**63))
    if settings.noise:
        image = _noisy(image, 255 * settings.noise * strength, noise_seed)
    return _pad(image, label, rows, columns, fill)


def _coloured(image_3HW: Tensor, brightness: float | None, contrast: float | None, saturation: float | None) -> Tensor:
    """Brightness, contrast and saturation times a factor (None: as it is), bit for bit as torchvision's functions.

    Done in chunks of rows, so that the floats between two bytes stay in the processor's cache.
    """
    chunks = [slice(top, top + CHUNK_ROWS) for top in range(0, image_3HW.shape[1], CHUNK_ROWS)]
    found = image_3HW if brightness is contrast is saturation is None else torch.empty_like(image_3HW)
    grey_HW = torch.empty(image_3HW.shape[1:]) if contrast is not None else None
    for chunk in chunks if brightness is not None or contrast is not None else ():
        part = image_3HW[:, chunk]
        if brightness is not None:
            part = part.mul(brightness).clamp_(0, 255).to(torch.uint8)
        if grey_HW is not None:
            grey_HW[chunk] = _grey(part)
        found[:, chunk] = part
    bright = image_3HW if brightness is None and contrast is None else found
    mean = torch.zeros(()) if grey_HW is None else grey_HW.mean()
    for chunk in chunks if contrast is not None or saturation is not None else ():
        part = bright[:, chunk]
        if contrast is not None:
            part = part.mul(contrast).add_(mean, alpha=1 - contrast).clamp_(0, 255).to(torch.uint8)
        if saturation is not None:
            part = part.mul(saturation).add_(_grey(part), alpha=1 - saturation).clamp_(0, 255).to(torch.uint8)
        found[:, chunk] = part
    return found


def _grey(image_3HW: Tensor) -> Tensor:
    """ITU-R 601 luma of bytes, cut to whole levels: float32 (H, W)."""
    red, green, blue = image_3HW.unbind(0)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def _noisy(image_3HW: Tensor, deviation: float, seed: int) -> Tensor:
    """Gaussian noise of a standard deviation in grey levels: what a sensor adds when there is little light."""
    noise = torch.randn(image_3HW.shape, generator=torch.Generator().manual_seed(seed))
    return noise.mul_(deviation).add_(image_3HW).round_().clamp_(0, 255).to(torch.uint8)


def _pad(
    image_3HW: Tensor, label_HW: Tensor, rows: _Span, columns: _Span, fill: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    height, width = rows.before + rows.scaled + rows.after, columns.before + columns.scaled + columns.after
    if tuple(label_HW.shape) == (height, width):
        return image_3HW.contiguous(), label_HW.contiguous()
    inside = (slice(rows.before, rows.before + rows.scaled), slice(columns.before, columns.before + columns.scaled))
    image = torch.tensor(fill, dtype=torch.uint8)[:, None, None].repeat(1, height, width)
    label = torch.full((height, width), IGNORE, dtype=torch.uint8)
    image[(slice(None), *inside)] = image_3HW
    label[inside] = label_HW
    return image, label
