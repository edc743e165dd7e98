"""Predictions as pictures: files of masks, colours, overlays and confidence, and an overlay to look at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image as Pixels

from nightseg.data.images import BadFrame, decode_label, encode_jpeg, encode_png, read_bytes
from nightseg.data.overlay import mixed, with_legend
from nightseg.data.taxonomy import Taxonomy
from nightseg.segmenter.given import Image, opened
from nightseg.segmenter.predict import Segmented
from nightseg.storage import Location, UserError

Picture = Literal["mask", "color", "overlay", "confidence"]
PICTURES: tuple[Picture, ...] = ("mask", "color", "overlay", "confidence")
PICTURE_SUFFIX: Mapping[Picture, str] = {"mask": ".png", "color": ".png", "overlay": ".jpg", "confidence": ".png"}


def picture(kind: Picture, image_HWC: Image, segmented: Segmented, classes: Taxonomy, legend: bool = False) -> bytes:
    """A prediction as a file at the frame's size: `mask` is a palette PNG of train ids, `color` an RGB PNG in the
    classes' colours, `overlay` a JPEG of image and colours mixed evenly, `confidence` a grey PNG (255 = certain).
    With `legend`, `color` and `overlay` are higher: the classes stand below."""
    if kind == "mask":
        return encode_png(segmented.labels, classes.palette)
    if kind == "confidence":
        return encode_png(np.rint(segmented.confidence * 255).astype(np.uint8))
    colours = classes.colourize(segmented.labels)
    shown = mixed(image_HWC, colours) if kind == "overlay" else colours
    shown = with_legend(shown, classes) if legend else shown
    return encode_jpeg(shown) if kind == "overlay" else encode_png(shown)


def overlay(
    image: Any,
    labels: Any = None,
    classes: Taxonomy | None = None,
    *,
    legend: bool = False,
    opacity: float = 0.5,
) -> Pixels.Image:
    """See `nightseg.overlay`."""
    if isinstance(image, Segmented) and labels is None:
        image, labels = image.image, image
    if isinstance(labels, Segmented):
        labels, classes = labels.labels, classes or labels.classes
    if image is None or labels is None:
        raise UserError("overlay: a frame and its labels are needed", cure="overlay(image, segment(image))")
    if classes is None:
        raise UserError("overlay: labels are numbers; whose classes are they?", cure="name their taxonomy")
    if not 0 <= opacity <= 1:
        raise UserError(f"overlay: opacity {opacity} of the colours", cure="a number from 0 to 1")
    image_HWC, label_HW = opened(image), _label(labels)
    if label_HW.shape != image_HWC.shape[:2]:
        raise UserError(
            f"overlay: the labels have the shape {label_HW.shape}, the image {image_HWC.shape[:2]}",
            cure="give labels of the image's size",
        )
    shown = mixed(image_HWC, classes.colourize(label_HW), opacity)
    return Pixels.fromarray(with_legend(shown, classes) if legend else shown)


def _label(given: Any) -> npt.NDArray[np.uint8]:
    """Train ids (H, W), also from a mask file that `predict` wrote."""
    if isinstance(given, str | PurePath | Location):
        try:
            return decode_label(read_bytes(Location.of(str(given))))
        except BadFrame as fault:
            raise UserError(f"{given}: {fault.reason} ({fault.detail})", cure="give a mask of train ids") from fault
    label_HW = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given)
    if label_HW.ndim != 2 or label_HW.dtype.kind not in "iu" or (label_HW.size and not 0 <= label_HW.min() <= 255):
        raise UserError(
            f"labels: they are {label_HW.dtype} of shape {label_HW.shape}, not train ids (height, width)",
            cure="give uint8 train ids, 255 where there is no class",
        )
    return label_HW.astype(np.uint8)
