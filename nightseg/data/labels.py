"""The label of a row of a frame table, as train ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from nightseg.data import table as frame
from nightseg.data.images import BadFrame, UInt8, decode_label, read_bytes
from nightseg.data.taxonomy import Taxonomy
from nightseg.storage.paths import Location, sha256_of


class Label(NamedTuple):
    """The label of a frame, as it was read."""

    train_ids: UInt8  # HW, 255 = ignored
    sha256: str  # of the file


def label_of(row: Mapping[str, Any], classes: Taxonomy, size: tuple[int, ...] | None = None) -> Label:
    """Read and check the label of a row of a frame table that has one.

    Raises BadFrame: label_missing, unreadable (it has changed since it was collected), label_value, label_size if it is
    not `size` = (height, width), and what `decode_label` raises. Each names the label's file, because the uri of a
    quarantine row is the image.
    """
    uri = row[frame.LABEL_URI]
    try:
        data = read_bytes(Location.of(uri), missing="label_missing")
        sha256 = sha256_of(data)
        if row.get(frame.LABEL_SHA256) not in (None, sha256):
            raise BadFrame("unreadable", "it has changed since it was collected (sha256)")
        label_HW = decode_label(data)
        if size is not None and label_HW.shape != tuple(size):
            found, wanted = (f"{width} x {height}" for height, width in (label_HW.shape, size))
            raise BadFrame("label_size", f"{found} pixels, but the upright image is {wanted}")
        return Label(classes.to_train_ids(label_HW, row[frame.LABEL_ENCODING]), sha256)
    except BadFrame as fault:
        named = fault.detail if uri in fault.detail else f"{uri}: {fault.detail}"
        raise BadFrame(fault.reason, f"label {named}") from fault


def train_ids_of(row: Mapping[str, Any], classes: Taxonomy, size: tuple[int, ...] | None = None) -> UInt8 | None:
    """`label_of` as uint8 HW train ids; None for a row without label."""
    if row.get(frame.LABEL_URI) is None or row.get(frame.LABEL_ENCODING) is None:
        return None
    return label_of(row, classes, size).train_ids
