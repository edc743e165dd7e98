"""Class lists: names, palette, and how the raw ids of a label file become train ids.

Train ids are 0..K-1 in the order of `Taxonomy.classes`; 255 (`IGNORE`) is a pixel without a class. An encoding maps
the raw ids of one kind of label file to train ids. A raw id outside the map is an error, never silently ignored.
The raw id of a pixel of a label in colours is 65536 red + 256 green + blue.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from nightseg.data.images import BadFrame
from nightseg.errors import closest
from nightseg.storage import UserError

IGNORE = 255
TRAIN_IDS = "train_ids"
FROM_ONE = "ids_from_one"  # 0 is void, k + 1 is class k: never guessed, for whoever says so
IDS = "ids"  # what a class list calls the ids that it gives without saying of which encoding they are
COLORS = "colors"  # labels in colours: of the palette, and others that the class list names
OTHER_COLORS = -1  # stands for every colour that is not listed

Colour = tuple[int, int, int]
UInt8 = NDArray[np.uint8]
UInt32 = NDArray[np.uint32]

_UNKNOWN = 256  # above all train ids


@dataclass(frozen=True)
class Taxonomy:
    """A class list. `palette` holds one RGB triple in [0, 255] a class; `encodings` raw id -> train id or 255.

    `colors`: of labels in colours, raw id -> train id or 255; OTHER_COLORS, if it is there, stands for all others.
    """

    name: str
    classes: tuple[str, ...]
    palette: tuple[Colour, ...]
    encodings: Mapping[str, Mapping[int, int]]
    colors: Mapping[int, int] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def tried(self) -> list[str]:
        """The encodings that labels may have without anybody saying so."""
        return [name for name in self.encodings if name != FROM_ONE]

    def lut(self, encoding: str) -> tuple[UInt8, NDArray[np.bool_]]:
        """(train id of each raw id, uint8[256]; whether the raw id is known, bool[256])."""
        self.need(encoding)
        train_ids = np.full(256, IGNORE, dtype=np.uint8)
        known = np.zeros(256, dtype=np.bool_)
        for raw_id, train_id in self.encodings[encoding].items():
            train_ids[raw_id] = train_id
            known[raw_id] = True
        return train_ids, known

    def need(self, encoding: str) -> None:
        """Raise UserError unless labels may have this encoding."""
        if encoding not in (*self.encodings, COLORS):
            hint, listed = closest(encoding, [*self.encodings, COLORS]), ", ".join(sorted([*self.encodings, COLORS]))
            raise UserError(
                f"the taxonomy {self.name} has no label encoding {encoding!r}{hint}; known: {listed}",
                cure="choose the one that says what the raw ids of the label files mean, or add it to the taxonomy's "
                "YAML file",
            )

    def usual(self, encoding: str) -> str:
        """The encoding that a layout's labels have; of a list that names none of its own, `ids` or train ids."""
        if encoding in self.encodings:
            return encoding
        if IDS in self.encodings:
            return IDS
        return TRAIN_IDS if encoding == IDS or self.encodings.keys() <= {TRAIN_IDS, FROM_ONE} else encoding

    def knows(self, raw_ids: Iterable[int], encoding: str) -> bool:
        """Whether an encoding, or `colors`, says of all of these ids what they are."""
        known = self.colors if encoding == COLORS else self.encodings[encoding]
        return OTHER_COLORS in known or known.keys() >= set(raw_ids)

    def of_colors(self, found: Collection[int]) -> Taxonomy:
        """With the colours as its one encoding; those `found` that no class has are known where others are ignored."""
        others = dict.fromkeys(found, IGNORE) if OTHER_COLORS in self.colors else {}
        return replace(self, encodings={COLORS: {**others, **self.colors}})

    def onto(self, other: Taxonomy, names: Mapping[str, str | None]) -> Taxonomy:
        """The classes of `other`, with the encodings of this list: what `names` says (None: no class) or what is called
        alike but for case and spaces is that class, the rest has none."""
        alike = {_plain(name): index for index, name in enumerate(other.classes)}
        to = {index: alike.get(_plain(name), IGNORE) for index, name in enumerate(self.classes)} | {IGNORE: IGNORE}
        for name, target in names.items():
            to[self.classes.index(name)] = IGNORE if target is None else other.classes.index(target)
        encodings = {
            name: {raw_id: to[train_id] for raw_id, train_id in ids.items()} for name, ids in self.encodings.items()
        }
        colors = {colour: to[train_id] for colour, train_id in self.colors.items()}
        return replace(other, name=f"{self.name} as {other.name}", encodings=encodings, colors=colors)

    def to_train_ids(self, raw_label: UInt8 | UInt32, encoding: str) -> UInt8:
        """HW raw ids -> uint8 HW train ids. Raises BadFrame("label_value") that lists the unknown ids or colours."""
        if encoding == COLORS:
            return self._colors_to_train_ids(raw_label)
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

    def _colors_to_train_ids(self, raw_label: UInt8 | UInt32) -> UInt8:
        known = np.array(sorted(set(self.colors) - {OTHER_COLORS}), np.int64)
        train_ids = np.array([self.colors[int(colour)] for colour in known], np.uint8)
        place = np.searchsorted(known, raw_label).clip(max=len(known) - 1)
        is_known = known[place] == raw_label
        if not is_known.all() and OTHER_COLORS not in self.colors:
            unknown, counts = np.unique(raw_label[~is_known], return_counts=True)
            order = np.argsort(-counts, kind="stable")[:8]
            found = ", ".join(f"{in_words(int(unknown[one]), COLORS)} ({counts[one]} pixels)" for one in order)
            more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
            raise BadFrame("label_value", f"colours {found}{more} are not in the taxonomy {self.name}")
        return np.where(is_known, train_ids[place], np.uint8(IGNORE))

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


def packed(colour: Sequence[int]) -> int:
    """The raw id of a colour."""
    red, green, blue = colour
    return red << 16 | green << 8 | blue


def unpacked(raw_id: int) -> Colour:
    """The colour of a raw id."""
    return raw_id >> 16, raw_id >> 8 & 255, raw_id & 255


def in_words(raw_id: int, encoding: str) -> str:
    """A raw id as people write it: colours as [red, green, blue]."""
    return str(list(unpacked(raw_id))) if encoding == COLORS else str(raw_id)


def _plain(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())
