"""Shards of frames through a translator that needs no training: one by one, or all at once by a program.

Apart from the stage, whose module imports torch: actors that run this start without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nightseg.data import table as frame
from nightseg.data.images import BadFrame, encode_png
from nightseg.data.labels import train_ids_of
from nightseg.data.taxonomy import Taxonomy
from nightseg.storage import Location, sha256_of
from nightseg.translators.command import Program, translate_by
from nightseg.translators.photometric import LitIds, night_of
from nightseg.translators.settings import PhotometricTranslator
from nightseg.translators.style_images import StyleImageReader, StyleImages

STYLE_IMAGE: Final = "style_image"  # column: id of the frame whose light or colours a frame was given, or null

Domain = Literal["day", "night"]
Pixels = npt.NDArray[np.uint8]
Row = Mapping[str, Any]


class Translated(NamedTuple):
    """A translated frame, and the id of its style image."""

    image: Pixels
    style_image: str | None = None


TranslateFrame = Callable[[Pixels, Row], Translated]
TranslateShard = Callable[[Iterable[Row]], Iterator[tuple[Row, Translated | BadFrame]]]


@dataclass
class TranslateUntrained:
    """Translates the frames of a shard by `translate`. A frame that cannot be read goes to the quarantine table."""

    translate: TranslateShard
    name: str
    to: Domain

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        good: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        for row, result in self.translate(rows.to_pylist()):
            if isinstance(result, BadFrame):
                bad.append(frame.quarantined(row, result))
            else:
                written = write_translated(row, result.image, folder, self.name, self.to)
                good.append(written | {STYLE_IMAGE: result.style_image})
        frames = frame.frame_table(good, extra={STYLE_IMAGE: pa.string()})
        return {"frames": frames, "quarantine": frame.quarantine_table(bad)}


def one_by_one(translate: TranslateFrame, rows: Iterable[Row]) -> Iterator[tuple[Row, Translated | BadFrame]]:
    """One frame at a time is in memory."""
    for row in rows:
        try:
            yield row, translate(frame.image_of(row), row)
        except BadFrame as fault:
            yield row, fault


def by_program(
    rows: Iterable[Row], *, program: Program, classes: Taxonomy
) -> Iterator[tuple[Row, Translated | BadFrame]]:
    for row, image in translate_by(program, list(rows), classes):
        yield row, image if isinstance(image, BadFrame) else Translated(image)


def by_optics(image: Pixels, row: Row, *, optics: PhotometricTranslator, classes: Taxonomy, seed: int) -> Translated:
    label = train_ids_of(row, classes, image.shape[:2])
    lit = LitIds.of(optics.classes, classes.classes)
    return Translated(night_of(image, label, optics=optics, lit=lit, seed=seed, frame_id=row[frame.FRAME_ID]))


class StyleTransfer:
    """Gives a frame the light or colours of a style image."""

    def __init__(self, style_images: StyleImages, transfer: Callable[[Pixels, Pixels], Pixels]) -> None:
        self.style_images = style_images
        self.transfer = transfer
        self.read = StyleImageReader()

    def __call__(self, image: Pixels, row: Row) -> Translated:
        chosen = self.style_images.choose(image, row[frame.FRAME_ID])
        return Translated(self.transfer(image, self.read(chosen.uri)), chosen.frame_id)


def write_translated(row: Row, image: Pixels, folder: Location, name: str, to: Domain) -> dict[str, Any]:
    """Write the translated image; returns its row of the frame table."""
    frame_id = f"{name}/{row[frame.FRAME_ID]}"
    uri = f"images/{frame.file_name(frame_id, '.png')}"
    data = encode_png(image)
    (folder / uri).write_bytes(data)
    kept = {column: row.get(column) for column in frame.FRAME_SCHEMA.names}
    return kept | {
        frame.FRAME_ID: frame_id,
        frame.URI: uri,
        frame.DATASET: name,
        frame.DOMAIN: to,
        frame.HEIGHT: image.shape[0],
        frame.WIDTH: image.shape[1],
        frame.BYTES: len(data),
        frame.SHA256: sha256_of(data),
    }
