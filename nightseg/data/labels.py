"""The label of a row of a frame table, as train ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nightseg.data import table as frame
from nightseg.data.images import BadFrame, StoredLabel, UInt8, decode_stored_label, holds_colors, read_bytes, turned
from nightseg.data.stored_labels import Kept, kept_label, read_stored
from nightseg.data.taxonomy import COLORS, Taxonomy
from nightseg.errors import UserError
from nightseg.storage.paths import Location, sha256_of

_LOOKED_AT = 4  # label files of a set, by which colours are told from ids


class LabelOfRow(NamedTuple):
    """The label of a row as its file holds it."""

    stored: StoredLabel
    sha256: str  # of the file


def stored_label(
    row: Mapping[str, Any], size: tuple[int, ...] | None = None, orientation: int | None = None
) -> LabelOfRow:
    """Read the label file of a row of a frame table that has one, and check how it lies on its image.

    Raises BadFrame: label_missing, unreadable (it has changed since it was collected), label_size if it is not `size` =
    (height, width), what `decode_label` raises, and, for an image stored with this EXIF `orientation`, what
    `check_orientation` raises. Each names the label's file, because the uri of a quarantine row is the image.
    """
    with _named(row[frame.LABEL_URI]):
        data = read_bytes(Location.of(row[frame.LABEL_URI]), "label_missing", row.get(frame.LABEL_SHA256))
        sha256 = sha256_of(data)
        if row.get(frame.LABEL_SHA256) not in (None, sha256):
            raise BadFrame("unreadable", "it has changed since it was collected (sha256)")
        label = decode_stored_label(data, colors=row.get(frame.LABEL_ENCODING) == COLORS)
        if size is not None and label.ids.shape != tuple(size):
            found, wanted = (f"{width} x {height}" for height, width in (label.ids.shape, size))
            raise BadFrame("label_size", f"{found} pixels, but the upright image is {wanted}")
        if size is not None and orientation is not None:
            check_orientation(label, size, orientation)
        return LabelOfRow(label, sha256)


def to_train_ids(row: Mapping[str, Any], label: StoredLabel, classes: Taxonomy) -> UInt8:
    """uint8 HW train ids, 255 = ignored. Raises BadFrame("label_value")."""
    with _named(row[frame.LABEL_URI]):
        return classes.to_train_ids(label.ids, row[frame.LABEL_ENCODING])


@contextmanager
def _named(uri: str) -> Iterator[None]:
    try:
        yield
    except BadFrame as fault:
        named = fault.detail if uri in fault.detail else f"{uri}: {fault.detail}"
        raise BadFrame(fault.reason, f"label {named}") from fault


def check_orientation(label: StoredLabel, size: tuple[int, ...], orientation: int, other: str = "image") -> None:
    """Refuse a label that may lie in two ways on an upright image of `size`, stored with this EXIF `orientation`.

    Raises BadFrame("label_orientation"): the file of one is turned by EXIF, that of the other is not or differently,
    the sizes do not tell whether the label was drawn on the upright or on the stored image, and it would matter.
    """
    if label.orientation == orientation:
        return
    back = {6: 8, 8: 6}.get(label.orientation, label.orientation)
    stored = turned(label.ids, back)
    for lies in (stored, turned(stored, orientation)):
        if lies.shape == tuple(size) and not np.array_equal(lies, label.ids):
            raise BadFrame(
                "label_orientation",
                f"the EXIF orientation of the {other} is {orientation}, of the label {label.orientation}, and their "
                "sizes fit either way: save both upright, without that tag, or give both the same one",
            )


def are_in_colors(uris: Sequence[str]) -> bool:
    """Whether label files hold colours and no ids, by the headers of a few of them."""
    some = uris[:: max(1, len(uris) // _LOOKED_AT)][:_LOOKED_AT]
    return bool(some) and all(map(_is_in_colors, some))


def _is_in_colors(uri: str) -> bool:
    try:
        return holds_colors(read_bytes(Location.of(uri)))
    except BadFrame:
        return False


def check_labelled(frames: pa.Table, where: str, cure: str) -> None:
    """Raise UserError if a frame of the table has no label."""
    bare = frames.filter(pc.or_(pc.is_null(frames[frame.LABEL_URI]), pc.is_null(frames[frame.LABEL_ENCODING])))
    if bare.num_rows:
        first = bare[frame.FRAME_ID][0].as_py()
        what = f"{where}: {bare.num_rows} of {frames.num_rows} frames have no label (first {first})"
        raise UserError(what, cure=cure)


def train_ids_of(row: Mapping[str, Any], classes: Taxonomy, size: tuple[int, ...] | None = None) -> UInt8 | None:
    """The label of a row as uint8 HW train ids; None for a row without label. Raises BadFrame as `stored_label`.

    `size`: (height, width) of the frame; that of the row where the label is one of a teacher, stored at stride.
    """
    if (kept := row.get(frame.LABEL_KEPT)) is not None:
        label = read_stored(row[frame.LABEL_URI], row[frame.LABEL_SHA256])
        return kept_label(label, Kept.of(kept), size or (row[frame.HEIGHT], row[frame.WIDTH]))
    if row.get(frame.LABEL_URI) is None or row.get(frame.LABEL_ENCODING) is None:
        return None
    return to_train_ids(row, stored_label(row, size).stored, classes)


def pixels_by_class(train_ids_HW: UInt8, num_classes: int) -> list[int]:
    """How many pixels of a label have each class, K numbers; ignored ones count for none."""
    counts: list[int] = np.bincount(train_ids_HW.reshape(-1), minlength=num_classes)[:num_classes].tolist()
    return counts
