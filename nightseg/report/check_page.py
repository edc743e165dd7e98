"""The page of a check: what was found, and frames with their labels over them. One file, no network."""

from __future__ import annotations

from collections.abc import Sequence

from nightseg.data.taxonomy import Taxonomy
from nightseg.report.pictures import Picture, frame_pixels, label_pixels, photo_uri, tinted
from nightseg.report.templates import template


def overlay(uri: str, label_uri: str, encoding: str, classes: Taxonomy, caption: str) -> Picture | None:
    """A frame in the colours of its label, dimmed and grey where that is ignored; None where a file is gone."""
    image, label = frame_pixels(uri), label_pixels(label_uri, encoding, classes)
    if image is None or label is None or image.shape[:2] != label.shape:
        return None
    return Picture(photo_uri(tinted(image, label, classes)), caption)


def check_page(
    title: str, found: Sequence[str], warnings: Sequence[str], overlays: Sequence[Picture], classes: Taxonomy
) -> str:
    """HTML that needs no other file."""
    page = template("check_page.html.j2")
    return page.render(title=title, found=found, warnings=warnings, overlays=overlays, classes=classes)
