"""Shards of frames through a translator that needs no training: one by one, or all at once by a program.

A way takes the rows of a shard and gives each back with its translated image, or with the reason why there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nightseg.data import table as frame
from nightseg.data.images import BadFrame, encode_png, read_image
from nightseg.data.taxonomy import Taxonomy, train_ids_of
from nightseg.storage import Location, sha256_of
from nightseg.translators.command import Program, translate_by
from nightseg.translators.photometric import LitIds, night_of
from nightseg.translators.settings import PhotometricTranslator
from nightseg.translators.style_images import LenderReader, Palette

LENDER: Final = "style_image"  # column: the frame whose light or colours a frame was given; null = it was given none

Domain = Literal["day", "night"]
Pixels = npt.NDArray[np.uint8]
Row = Mapping[str, Any]


class Changed(NamedTuple):
    """A translated frame, and the id of the frame whose look it was given."""

    image: Pixels
    lender: str | None = None


Change = Callable[[Pixels, Row], Changed]
Way = Callable[[Iterable[Row]], Iterator[tuple[Row, Changed | BadFrame]]]


class TranslateRows:
    """Translates the frames of a shard in the way of an untrained translator; bad frames go to the quarantine table."""

    def __init__(self, way: Way, name: str, to: Domain) -> None:
        self.way = way
        self.name = name
        self.to: Domain = to

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        good: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        for row, changed in self.way(rows.to_pylist()):
            if isinstance(changed, BadFrame):
                bad.append(frame.quarantined(row, changed))
            else:
                written = write_translated(row, changed.image, folder, self.name, self.to)
                good.append(written | {LENDER: changed.lender})
        frames = frame.frame_table(good, extra={LENDER: pa.string()})
        return {"frames": frames, "quarantine": frame.quarantine_table(bad)}


def each(change: Change, rows: Iterable[Row]) -> Iterator[tuple[Row, Changed | BadFrame]]:
    """One frame at a time, so one is in memory."""
    for row in rows:
        try:
            yield row, change(read_image(Location.of(row[frame.URI])), row)
        except BadFrame as fault:
            yield row, fault


def by_program(rows: Iterable[Row], *, program: Program, classes: Taxonomy) -> Iterator[tuple[Row, Changed | BadFrame]]:
    for row, image in translate_by(program, list(rows), classes):
        yield row, image if isinstance(image, BadFrame) else Changed(image)


def by_optics(image: Pixels, row: Row, *, optics: PhotometricTranslator, classes: Taxonomy, seed: int) -> Changed:
    label = train_ids_of(row, classes, image.shape[:2])
    lit = LitIds.of(optics.classes, classes.classes)
    return Changed(night_of(image, label, optics=optics, lit=lit, seed=seed, frame_id=row[frame.FRAME_ID]))


class Lent:
    """Gives a frame the look of a lender."""

    def __init__(self, palette: Palette, transfer: Callable[[Pixels, Pixels], Pixels]) -> None:
        self.palette = palette
        self.transfer = transfer
        self.read = LenderReader()

    def __call__(self, image: Pixels, row: Row) -> Changed:
        lender = self.palette.choose(image, row[frame.FRAME_ID])
        return Changed(self.transfer(image, self.read(lender)), lender.frame_id)


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
