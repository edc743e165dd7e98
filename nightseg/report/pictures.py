"""Small pictures inside the page: data URIs of frames, label maps and both mixed. HW = height and width."""

from __future__ import annotations

import base64
import io
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from nightseg.data import table as frame
from nightseg.data.images import BadFrame, read_image, read_label
from nightseg.data.labels import train_ids_of
from nightseg.data.stored_labels import read_stored
from nightseg.data.taxonomy import IGNORE, TRAIN_IDS, Taxonomy
from nightseg.report.run import Row
from nightseg.storage import Location

UInt8 = npt.NDArray[np.uint8]

THUMBNAIL = 320  # pixels of most pictures
WIDTH = 480  # pixels: twice the width of most places, for sharp screens
_DIMMED = 0.38  # brightness of a frame where its pseudo-label is ignored
_TINT = 0.72  # share of the class colour where it is not


def frame_pixels(uri: str | None) -> UInt8 | None:
    """The frame as uint8 RGB (H, W, 3), or None when it is not there or damaged: a report shows what is left."""
    if uri is None:
        return None
    try:
        return read_image(Location.of(uri))
    except BadFrame:
        return None


def label_pixels(uri: str | None, encoding: str | None, classes: Taxonomy) -> UInt8 | None:
    """Train ids (H, W) of a label file, or None as in `frame_pixels`."""
    if uri is None or encoding is None or encoding not in classes.encodings:
        return None
    try:
        return classes.to_train_ids(read_label(Location.of(uri)), encoding)
    except BadFrame:
        return None


def label_of(row: Row, classes: Taxonomy) -> UInt8 | None:
    """Train ids (H, W) of the label of a row, or None as in `frame_pixels`."""
    try:
        return train_ids_of(row, classes)
    except BadFrame:
        return None


def confidence(row: Row, caption: str, width: int = THUMBNAIL) -> Picture | None:
    """How sure the teacher of a row is, white = certain; None where its labels are gone."""
    try:
        bins_hw = read_stored(row[frame.LABEL_URI], row[frame.LABEL_SHA256]).bins_hw
    except BadFrame:
        return None
    return Picture(photo_uri(np.repeat(bins_hw[..., None], 3, axis=2), width), caption, "white = certain")


class Picture(NamedTuple):
    """One picture: data URI, what it is, a detail below, and whether it is a label map (drawn with hard edges)."""

    src: str
    caption: str
    detail: str = ""
    is_label: bool = False


def photo(uri: str | None, caption: str, detail: str = "", width: int = THUMBNAIL) -> Picture | None:
    """A frame, or None where its file is gone."""
    pixels = frame_pixels(uri)
    return None if pixels is None else Picture(photo_uri(pixels, width), caption, detail)


def mask(row: Row | None, classes: Taxonomy, caption: str, detail: str = "", width: int = THUMBNAIL) -> Picture | None:
    """The prediction in a row, or None where there is no row or its file is gone."""
    label = label_pixels(row["prediction_uri"], TRAIN_IDS, classes) if row else None
    return None if label is None else Picture(label_map_uri(label, classes, width), caption, detail, True)


def tinted_photo(
    uri: str, label: UInt8 | None, classes: Taxonomy, caption: str, detail: str, width: int = THUMBNAIL
) -> Picture | None:
    """A frame in the colours of its train ids, or None where either is gone."""
    image = frame_pixels(uri)
    if image is None or label is None:
        return None
    return Picture(photo_uri(tinted(image, label, classes), width), caption, detail)


def there(*pictures: Picture | None) -> list[Picture]:
    """Those whose files are there."""
    return [picture for picture in pictures if picture]


def photo_uri(image_HWC: UInt8, width: int = WIDTH) -> str:
    """A JPEG of at most `width` pixels."""
    return _data_uri(_fit(Image.fromarray(image_HWC), width, Image.Resampling.LANCZOS), "JPEG", quality=84)


def label_map_uri(label_HW: UInt8, classes: Taxonomy, width: int = WIDTH) -> str:
    """A PNG in the classes' colours; ignored pixels are transparent."""
    palette = np.zeros((256, 3), dtype=np.uint8)
    palette[: classes.num_classes] = classes.palette
    picture = Image.fromarray(label_HW)
    picture.putpalette(palette.tobytes())
    return _data_uri(_fit(picture, width, Image.Resampling.NEAREST), "PNG", transparency=IGNORE)


def tinted(image_HWC: UInt8, label_HW: UInt8, classes: Taxonomy) -> UInt8:
    """The frame in the colours of its label; where the label is ignored the frame shows through, dimmed and grey."""
    pixels_HWC = image_HWC.astype(np.float32)
    colours = classes.colourize(label_HW).astype(np.float32)
    grey = np.repeat(pixels_HWC.mean(axis=2, keepdims=True), 3, axis=2) * _DIMMED
    mixed = np.where((label_HW == IGNORE)[..., None], grey, _TINT * colours + (1 - _TINT) * pixels_HWC)
    picture: UInt8 = np.rint(mixed).astype(np.uint8)
    return picture


def _fit(picture: Image.Image, width: int, resampling: Image.Resampling) -> Image.Image:
    if picture.width <= width:
        return picture
    return picture.resize((width, max(1, round(picture.height * width / picture.width))), resampling)


def _data_uri(picture: Image.Image, kind: str, **options: int) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
