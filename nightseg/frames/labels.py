"""The label of one row of a frame table as train ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from nightseg.frames import table as frame
from nightseg.frames.images import BadFrame, decode_label, read_bytes
from nightseg.frames.taxonomy import Taxonomy
from nightseg.storage import Location, sha256_of


def train_ids_of(
    row: Mapping[str, Any], classes: Taxonomy, size: tuple[int, ...] | None = None
) -> npt.NDArray[np.uint8] | None:
    """uint8 HW train ids, 255 = ignored; None for a row without label.

    Raises BadFrame: label_missing, unreadable (it has changed since it was collected), label_value, label_size if it is
    not `size` = (height, width), and what `decode_label` raises.
    """
    if row.get(frame.LABEL_URI) is None or row.get(frame.LABEL_ENCODING) is None:
        return None
    data = read_bytes(Location.of(row[frame.LABEL_URI]), missing="label_missing")
    if row.get(frame.LABEL_SHA256) not in (None, sha256_of(data)):
        raise BadFrame("unreadable", f"the label {row[frame.LABEL_URI]} has changed since it was collected (sha256)")
    label_HW = decode_label(data)
    if size is not None and label_HW.shape != tuple(size):
        raise BadFrame("label_size", f"the label is {label_HW.shape}, the image {tuple(size)} (height, width)")
    return classes.to_train_ids(label_HW, row[frame.LABEL_ENCODING])
