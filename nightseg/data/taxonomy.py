"""Class lists: names, palette, and how the raw ids of a label file become train ids.

Train ids are 0..K-1 in the order of `Taxonomy.classes`; 255 (`IGNORE`) is a pixel without a class. An encoding maps
the raw ids of one kind of label file to train ids. A raw id outside the map is an error, never silently ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nightseg.data.images import BadFrame
from nightseg.errors import closest
from nightseg.storage import UserError

IGNORE = 255
TRAIN_IDS = "train_ids"
FROM_ONE = "ids_from_one"  # 0 is void, k + 1 is class k: never guessed, for whoever says so

Colour = tuple[int, int, int]
UInt8 = NDArray[np.uint8]

_UNKNOWN = 256  # above all train ids


@dataclass(frozen=True)
class Taxonomy:
    """A class list. `palette` holds one RGB triple in [0, 255] a class; `encodings` raw id -> train id or 255."""

    name: str
    classes: tuple[str, ...]
    palette: tuple[Colour, ...]
    encodings: Mapping[str, Mapping[int, int]]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def tried(self) -> list[str]:
        """The encodings that labels may have without anybody saying so."""
        return [name for name in self.encodings if name != FROM_ONE]

    def lut(self, encoding: str) -> tuple[UInt8, NDArray[np.bool_]]:
        """(train id of each raw id, uint8[256]; whether the raw id is known, bool[256])."""
        if encoding not in self.encodings:
            hint, listed = closest(encoding, self.encodings), ", ".join(sorted(self.encodings))
            raise UserError(
                f"the taxonomy {self.name} has no label encoding {encoding!r}{hint}; known: {listed}",
                cure="choose the one that says what the raw ids of the label files mean, or add it to the taxonomy's "
                "YAML file",
            )
        train_ids = np.full(256, IGNORE, dtype=np.uint8)
        known = np.zeros(256, dtype=np.bool_)
        for raw_id, train_id in self.encodings[encoding].items():
            train_ids[raw_id] = train_id
            known[raw_id] = True
        return train_ids, known

    def to_train_ids(self, raw_label: UInt8, encoding: str) -> UInt8:
        """uint8 HW raw ids -> uint8 HW train ids. Raises BadFrame("label_value") that lists the unknown ids."""
        train_ids, known = self.lut(encoding)
        mapped = np.take(np.where(known, train_ids, np.uint16(_UNKNOWN)), raw_label)
        if mapped.max(initial=0) == _UNKNOWN:
            counts = np.bincount(raw_label.reshape(-1), minlength=256)
            unknown = np.flatnonzero((counts > 0) & ~known)
            found = ", ".join(f"{raw_id} ({counts[raw_id]} pixels)" for raw_id in unknown[:8])
            more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
            raise BadFrame(
                "label_value", f"ids {found}{more} are not in the encoding {encoding} of the taxonomy {self.name}"
            )
        return mapped.astype(np.uint8)

    def per_class(self, values: Mapping[str, float] | Sequence[float], default: float) -> tuple[float, ...]:
        """One value a class: from a list in the order of the classes, or by name, the others having `default`.

        Raises UserError for a name that is no class, and a list of another length.
        """
        if not isinstance(values, Mapping):
            if len(values) != self.num_classes:
                raise UserError(
                    f"{len(values)} values for the {self.num_classes} classes of {self.name}",
                    cure=f"give one a class, in the order {', '.join(self.classes)}, or name them: "
                    f"{{{self.classes[0]}: 2.0}}",
                )
            return tuple(float(value) for value in values)
        for name in values:
            if name not in self.classes:
                known = ", ".join(self.classes)
                hint = closest(name, self.classes)
                raise UserError(f"{self.name} has no class {name!r}{hint}", cure=f"use one of {known}")
        return tuple(float(values.get(name, default)) for name in self.classes)

    def colourize(self, label: UInt8) -> UInt8:
        """uint8 HW train ids -> uint8 HWC RGB; everything outside 0..K-1 is black."""
        colours = np.zeros((256, 3), dtype=np.uint8)
        colours[: self.num_classes] = self.palette
        return colours[label]
