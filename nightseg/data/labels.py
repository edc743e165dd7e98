"""The label of one row of a frame table as train ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from nightseg.data import table as frame
from nightseg.data.images import BadFrame, decode_label, read_bytes
from nightseg.data.taxonomy import Taxonomy
from nightseg.storage import Location, sha256_of


def train_ids_of(
    row: Mapping[str, Any], classes: Taxonomy, size: tuple[int, ...] | None = None
) -> npt.NDArray[np.uint8] | None:
    """uint8 HW train ids, 255 = ignored; None for a row without label.

    Raises BadFrame: label_missing, unreadable (it has changed since it was collected), label_value, label_size if it is
    not `size` = (height, width), and what `decode_label` raises. Each names the label's file, because the uri of a
    quarantine row is the image.
    """
    uri = row.get(frame.LABEL_URI)
    if uri is None or row.get(frame.LABEL_ENCODING) is None:
        return None
    try:
        data = read_bytes(Location.of(uri), missing="label_missing")
        if row.get(frame.LABEL_SHA256) not in (None, sha256_of(data)):
            raise BadFrame("unreadable", "it has changed since it was collected (sha256)")
        label_HW = decode_label(data)
        if size is not None and label_HW.shape != tuple(size):
            raise BadFrame("label_size", f"it is {label_HW.shape}, the image {tuple(size)} (height, width)")
        return classes.to_train_ids(label_HW, row[frame.LABEL_ENCODING])
    except BadFrame as fault:
        named = fault.detail if uri in fault.detail else f"{uri}: {fault.detail}"
        raise BadFrame(fault.reason, f"label {named}") from fault
