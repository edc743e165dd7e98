"""Class lists: names, palette, and how the raw ids of a label file become train ids.

Train ids are 0..K-1 in the order of `Taxonomy.classes`; 255 (`IGNORE`) is a pixel without a class. An encoding maps
the raw ids of one kind of label file to train ids. A raw id outside the map is an error, never silently ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from nightseg.data import table as frame
from nightseg.data.images import BadFrame, decode_label, read_bytes
from nightseg.errors import closest
from nightseg.storage import Location, UserError, sha256_of

IGNORE = 255
TRAIN_IDS = "train_ids"

Colour = tuple[int, int, int]
UInt8 = NDArray[np.uint8]

_MAX_YAML_BYTES = 1_000_000
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

    def lut(self, encoding: str) -> tuple[UInt8, NDArray[np.bool_]]:
        """(train id of each raw id, uint8[256]; whether the raw id is known, bool[256])."""
        if encoding not in self.encodings:
            hint, listed = closest(encoding, self.encodings), ", ".join(sorted(self.encodings))
            raise UserError(
                f"the taxonomy {self.name} has no label encoding {encoding!r}{hint}; known: {listed}",
                cure="set label_encoding of the dataset to what the raw ids of its label files mean, or add that"
                " encoding to the taxonomy's YAML file",
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


def taxonomy(name_or_yaml_path: str) -> Taxonomy:
    """cityscapes19, camvid11 (taxonomies/*.yaml), or a YAML file of the same form. Raises UserError.

    {name, classes: [{name, color: [r, g, b], ids: {encoding: id or [ids]}}], ignore: {encoding: [ids]}}: `train_ids`
    (0..K-1 and 255) is always there; raw ids that carry no class are listed in `ignore`, or "rest" says that every
    other id is such a one.
    """
    folder = resources.files("nightseg.data") / "taxonomies"
    known = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir())
    if name_or_yaml_path in known:
        return _parsed(f"taxonomy {name_or_yaml_path}", (folder / f"{name_or_yaml_path}.yaml").read_bytes())
    if not re.search(r"\.ya?ml$", name_or_yaml_path, re.IGNORECASE):
        raise UserError(
            f"unknown taxonomy {name_or_yaml_path!r}{closest(name_or_yaml_path, known)}; known: {', '.join(known)}",
            cure="set taxonomy to one of these, or to the path of a .yaml file with name and classes",
        )
    location = Location.of(name_or_yaml_path)
    where = f"taxonomy file {location.uri}"
    try:
        return _parsed(where, location.read_bytes())
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{where}: no such file", cure="check the path of the taxonomy") from error


def _train_ids(num_classes: int) -> dict[int, int]:
    return {**{index: index for index in range(num_classes)}, IGNORE: IGNORE}


# -- YAML ------------------------------------------------------------------------------------------------------------


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses what YAML would silently resolve: duplicate keys, aliases (exponential expansion)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(None, None, "aliases are not accepted here", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' is given twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _parsed(where: str, data: bytes) -> Taxonomy:
    if len(data) > _MAX_YAML_BYTES:
        raise UserError(f"{where}: {len(data)} bytes", cure=f"a class list has at most {_MAX_YAML_BYTES}")
    try:
        content = yaml.load(data, Loader=_StrictLoader)  # noqa: S506 a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid YAML: {error}", cure="mend the file there") from error
    _check_keys(where, content, required={"name": str, "classes": list}, optional={"ignore": dict})
    classes = content["classes"]
    if not 2 <= len(classes) <= 255:
        raise UserError(f"{where}: classes: there are {len(classes)}", cure="between 2 and 255 classes are possible")
    encodings: dict[str, dict[int, int]] = {TRAIN_IDS: _train_ids(len(classes))}
    names: list[str] = []
    palette: list[Colour] = []
    for train_id, entry in enumerate(classes):
        path = f"{where}: classes[{train_id}]"
        _check_keys(path, entry, required={"name": str, "color": list}, optional={"ids": dict})
        if entry["name"] in names:
            raise UserError(f"{path}: the class name '{entry['name']}' is given twice", cure="give each class its name")
        names.append(entry["name"])
        palette.append(_colour(path, entry["color"]))
        for encoding, raw_ids in entry.get("ids", {}).items():
            _add_ids(f"{path}.ids.{encoding}", encodings, encoding, raw_ids, train_id)
    for encoding, raw_ids in content.get("ignore", {}).items():
        listed = _rest(encodings.get(encoding, {})) if raw_ids == "rest" else raw_ids
        _add_ids(f"{where}: ignore.{encoding}", encodings, encoding, listed, IGNORE)
    return Taxonomy(content["name"], tuple(names), tuple(palette), encodings)


def _check_keys(where: str, value: Any, *, required: dict[str, type], optional: dict[str, type]) -> None:
    if not isinstance(value, dict):
        keys = ", ".join(required)
        raise UserError(f"{where}: expected a mapping, got {type(value).__name__}", cure=f"write one with {keys}")
    for key in value:
        if key not in required and key not in optional:
            hint, keys = closest(str(key), [*required, *optional]), ", ".join([*required, *optional])
            raise UserError(f"{where}: unknown key '{key}'{hint}", cure=f"the keys here are {keys}")
    for key, kind in (required | optional).items():
        if key not in value and key in required:
            raise UserError(f"{where}: the key '{key}' is missing", cure="add it")
        if key in value and not isinstance(value[key], kind):
            cure = "quote names that YAML reads as something else, such as no or 1" if kind is str else "mend the value"
            raise UserError(f"{where}: {key}: expected {kind.__name__}, got {value[key]!r}", cure=cure)


def _colour(where: str, value: list[Any]) -> Colour:
    if len(value) != 3 or not all(_is_byte(channel) for channel in value):
        raise UserError(f"{where}.color: got {value!r}", cure="write [red, green, blue] with values 0..255")
    return (value[0], value[1], value[2])


def _add_ids(where: str, encodings: dict[str, dict[int, int]], encoding: Any, raw_ids: Any, train_id: int) -> None:
    if not isinstance(encoding, str) or encoding == TRAIN_IDS:
        raise UserError(f"{where}: an encoding called {encoding!r}", cure=f"use a word; {TRAIN_IDS} is built in")
    for raw_id in raw_ids if isinstance(raw_ids, list) else [raw_ids]:
        if not _is_byte(raw_id):
            raise UserError(f"{where}: got {raw_id!r}", cure="list raw ids 0..255 of an 8-bit label file")
        ids = encodings.setdefault(encoding, {})
        if raw_id in ids:
            what = f"{where}: the raw id {raw_id} already means something else in this encoding"
            raise UserError(what, cure="list each id once")
        ids[raw_id] = train_id


def _rest(taken: Mapping[int, int]) -> list[int]:
    return [raw_id for raw_id in range(256) if raw_id not in taken]


def _is_byte(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255
