"""The classes of a frame in their colours, over the frame, and a legend that says which is which."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from nightseg.data.taxonomy import Taxonomy

UInt8 = npt.NDArray[np.uint8]

_TEXT_SHARE = 1 / 40  # height of the legend's text over the picture's width
_LEAST_TEXT, _MOST_TEXT = 10, 28  # pixels
_NARROWEST = 64  # a legend needs some width, however narrow the picture is


def mixed(image_HWC: UInt8, colours_HWC: UInt8, opacity: float = 0.5) -> UInt8:
    """`opacity` of the colours, the rest of the image, rounded to nearest: uint8 (H, W, 3)."""
    if opacity == 0.5:
        return ((image_HWC.astype(np.uint16) + colours_HWC + 1) // 2).astype(np.uint8)
    return np.floor(image_HWC * (1 - opacity) + colours_HWC * opacity + 0.5).astype(np.uint8)


def legend(classes: Taxonomy, width: int) -> UInt8:
    """A patch and the name of every class, in their order, in rows: uint8 (h, width, 3) on white."""
    width = max(width, _NARROWEST)
    size = round(min(max(width * _TEXT_SHARE, _LEAST_TEXT), _MOST_TEXT))
    font, gap = ImageFont.load_default(size), size // 2
    row, places = size + gap, list[tuple[int, int]]()
    left, top = gap, gap
    for name in classes.classes:
        needed = size + gap // 2 + round(font.getlength(name)) + 2 * gap
        if left > gap and left + needed > width:
            left, top = gap, top + row
        places.append((left, top))
        left += needed
    sheet = Image.new("RGB", (width, top + row), "white")
    draw = ImageDraw.Draw(sheet)
    for name, colour, (left, top) in zip(classes.classes, classes.palette, places, strict=True):
        draw.rectangle((left, top, left + size - 1, top + size - 1), fill=colour, outline=(128, 128, 128))
        draw.text((left + size + gap // 2, top + size / 2), name, fill="black", font=font, anchor="lm")
    return np.asarray(sheet)


def with_legend(picture_HWC: UInt8, classes: Taxonomy) -> UInt8:
    """The picture, and the legend of all classes below it: pictures of one size stay of one size."""
    below = legend(classes, picture_HWC.shape[1])
    height, width = picture_HWC.shape[:2]
    sheet = np.full((height + below.shape[0], below.shape[1], 3), 255, np.uint8)
    sheet[:height, :width] = picture_HWC
    sheet[height:] = below
    return sheet
