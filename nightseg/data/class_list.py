"""Class lists: those that come with nightseg, by name, anybody's as a file, and those that stand in a recipe."""

from __future__ import annotations

import colorsys
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import PurePosixPath
from typing import Any

from pydantic import ValidationError

from nightseg.data.settings import ClassList, ListedClass
from nightseg.data.taxonomy import COLORS, FROM_ONE, IDS, IGNORE, OTHER_COLORS, TRAIN_IDS, Colour, Taxonomy, packed
from nightseg.errors import UserError, closest, first_of
from nightseg.storage.paths import Location
from nightseg.storage.yaml import kind_of, read_yaml

NO_CLASS = frozenset({"void", "unlabeled", "unlabelled", "ignore", "ignored", "unknown", "none"})
"""Names that files of other programs give to pixels without a class."""

FILES = (".yaml", ".yml", ".json", ".csv", ".txt")


def known_taxonomies() -> list[str]:
    """The names of the class lists that come with nightseg (taxonomies/*.yaml)."""
    folder = resources.files("nightseg.data") / "taxonomies"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir())


def taxonomy(name_file_or_list: str | ClassList) -> Taxonomy:
    """A class list by name (`known_taxonomies`), from a file, or as it stands in a recipe. Raises UserError.

    Files: YAML as in `ClassList`, or a recipe for its `taxonomy`; what other programs write, in the order of their ids:
    CSV with a column `name` (and r, g, b, id), JSON (Mapillary's config_*.json, a list of names, id -> name), text (a
    name a line, CVAT's labelmap, `r g b name`).
    The encodings `train_ids` (0..K-1 and 255) and `ids_from_one` (0 is void, 1..K, 255) are always there, and so are
    the colours of the palette, with black for no class unless it is the colour of one.
    """
    if isinstance(name_file_or_list, ClassList):
        return _taxonomy(name_file_or_list, f"class list {name_file_or_list.name}")
    name, known = name_file_or_list, known_taxonomies()
    if name in known:
        file = str(resources.files("nightseg.data") / "taxonomies" / f"{name}.yaml")
        return _taxonomy(_read(Location.of(file), where := f"taxonomy {name}"), where)
    if not name.lower().endswith(FILES):
        raise UserError(
            f"unknown taxonomy {name!r}{closest(name, known)}; known: {', '.join(known)}",
            cure=f"use one of these, the path of a file ({', '.join(FILES)}), or list the `classes` in the recipe",
        )
    location = Location.of(name)
    return _taxonomy(_read(location, where := f"taxonomy file {location.uri}"), where)


def mapped(
    own: str | ClassList, names: Mapping[str, str | None], classes: Taxonomy
) -> tuple[Taxonomy, list[str], list[str]]:
    """Labels of another class list as those of `classes`: the taxonomy to read them by; which classes of theirs have
    no counterpart, so that their pixels are ignored; which of ours have none. Raises UserError: a name that is none."""
    theirs = taxonomy(own)
    for what, name, known in (
        *(("map", name, theirs) for name in names),
        *((f"map.{key}", name, classes) for key, name in names.items() if name is not None),
    ):
        if name not in known.classes:
            raise UserError(
                f"{what}: {known.name} has no class {name!r}{closest(name, known.classes)}",
                cure=f"its classes are {', '.join(known.classes)}",
            )
    read_by = theirs.onto(classes, names)
    found = read_by.encodings[TRAIN_IDS]
    dropped = [name for index, name in enumerate(theirs.classes) if found[index] == IGNORE and name not in names]
    missing = [name for index, name in enumerate(classes.classes) if index not in found.values()]
    if len(missing) == classes.num_classes:
        raise UserError(
            f"map: no class of {theirs.name} is one of {classes.name}",
            cure=f"say which is which: map: {{{theirs.classes[0]}: {classes.classes[0]}, ...}}; "
            f"theirs are {', '.join(theirs.classes)}; the run's are {', '.join(classes.classes)}",
        )
    return read_by, dropped, missing


# -- from a list to a taxonomy -----------------------------------------------------------------------------------------


def _taxonomy(listed: ClassList, where: str) -> Taxonomy:
    names = tuple(one.name for one in listed.classes)
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{where}: the class name {twice[0]!r} is given twice", cure="give each class its name")
    encodings = {TRAIN_IDS: {**{index: index for index in range(len(names))}, IGNORE: IGNORE}}
    colors: dict[int, int] = {}
    for train_id, one in enumerate(listed.classes):
        for encoding, raw_ids in _by_encoding(one.ids):
            known = colors if encoding == COLORS else encodings.setdefault(encoding, {})
            _add_ids(f"{where}: classes.{train_id}.ids.{encoding}", known, encoding, raw_ids, train_id)
    for encoding, raw_ids in _by_encoding(listed.ignore):
        known = colors if encoding == COLORS else encodings.setdefault(encoding, {})
        _add_ids(f"{where}: ignore.{encoding}", known, encoding, raw_ids, IGNORE)
    if IDS in encodings:
        if not any(encoding == IDS for one in listed.classes for encoding, _ in _by_encoding(one.ids)):
            _add_train_ids(where, encodings[IDS], names)
        encodings[IDS].setdefault(IGNORE, IGNORE)
    if len(names) < IGNORE - 1:
        encodings.setdefault(FROM_ONE, {0: IGNORE, **{index + 1: index for index in range(len(names))}, IGNORE: IGNORE})
    palette = _palette(listed)
    for train_id, colour in enumerate(palette):
        if palette.count(colour) == 1:  # else nobody can tell which of them a pixel is
            colors.setdefault(packed(colour), train_id)
    colors.setdefault(packed((0, 0, 0)), IGNORE)
    return Taxonomy(listed.name, names, palette, encodings, colors)


def _add_train_ids(where: str, known: dict[int, int], names: Sequence[str]) -> None:
    """A list that says which ids are ignored, and of no class what its ids are."""
    for train_id, name in enumerate(names):
        if known.setdefault(train_id, train_id) != train_id:
            raise UserError(
                f"{where}: ignore: {train_id} is the train id of {name}", cure="give the classes their `ids:`, too"
            )


def _by_encoding(ids: Any) -> list[tuple[str, Any]]:
    """Ids without the name of an encoding are `ids`, colours without one `colors`."""
    if isinstance(ids, dict):
        return list(ids.items())
    is_colours = isinstance(ids, list) and bool(ids) and not isinstance(ids[0], int)
    return [(COLORS if is_colours else IDS, ids)]


def _add_ids(where: str, known: dict[int, int], encoding: str, raw_ids: Any, train_id: int) -> None:
    if encoding == TRAIN_IDS:
        raise UserError(f"{where}: {TRAIN_IDS} is built in", cure="give the encoding another name")
    if raw_ids == "rest":
        raw_ids = [OTHER_COLORS] if encoding == COLORS else [raw_id for raw_id in range(256) if raw_id not in known]
    elif encoding == COLORS:
        colours = (
            [raw_ids] if isinstance(raw_ids, list) and len(raw_ids) == 3 and isinstance(raw_ids[0], int) else raw_ids
        )
        if not isinstance(colours, list) or any(isinstance(colour, int) for colour in colours):
            raise UserError(f"{where}: {raw_ids} is no colour", cure="write [red, green, blue], or a list of these")
        raw_ids = [packed(colour) for colour in colours]
    elif isinstance(raw_ids, list) and any(not isinstance(raw_id, int) for raw_id in raw_ids):
        raise UserError(f"{where}: {raw_ids} are colours", cure=f"call the encoding {COLORS}, or give ids")
    for raw_id in raw_ids if isinstance(raw_ids, list) else [raw_ids]:
        if raw_id in known:
            what = f"{where}: the raw id {raw_id} already means something else in this encoding"
            raise UserError(what, cure="list each id once")
        known[raw_id] = train_id


def _palette(listed: ClassList) -> tuple[Colour, ...]:
    """The colours of the list; a class without one gets one that no other has, whatever others there are."""
    used = {one.color for one in listed.classes} | {(0, 0, 0)}
    palette: list[Colour] = []
    for index, one in enumerate(listed.classes):
        colour: Colour | None = one.color
        turn = index
        while colour is None or (one.color is None and colour in used):
            red, green, blue = colorsys.hsv_to_rgb(
                turn * 0.618034 % 1, 0.45 + 0.45 * (turn % 2), 0.95 - 0.3 * (turn % 3 == 2)
            )
            colour, turn = (round(255 * red), round(255 * green), round(255 * blue)), turn + len(listed.classes)
        used.add(colour)
        palette.append(colour)
    return tuple(palette)


# -- files -------------------------------------------------------------------------------------------------------------


def class_list(file: Location) -> ClassList:
    """The class list of a file, as it stands there. Raises UserError."""
    return _read(file, f"taxonomy file {file.uri}")


def _read(file: Location, where: str, may_be_recipe: bool = True) -> ClassList:
    suffix = PurePosixPath(file.uri).suffix.lower()
    if suffix in (".yaml", ".yml"):
        parsed = read_yaml(file, where, "taxonomy")
        for path, line in parsed.twice:
            raise UserError(f"{where}: line {line}: {'.'.join(path)}: this key stands twice", cure="remove one of them")
        if may_be_recipe and isinstance(parsed.data, dict) and "taxonomy" in parsed.data:
            return _of_recipe(parsed.data["taxonomy"], where)
        return _valid(parsed.data, where)
    try:
        text = file.read_bytes().decode("utf-8-sig")
        rows = {".json": _json_rows, ".csv": _csv_rows, ".txt": _text_rows}[suffix](text)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"{where}: there is no such taxonomy file", cure="give the path of a file") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        kind = {".json": "names, or mappings with name, color and id", ".csv": "a column `name`, and r, g, b, id"}
        wanted = kind.get(suffix, "a name a line, CVAT's name:r,g,b::, or `r g b name`")
        raise UserError(f"{where}: no class list: {error}", cure=f"a {suffix[1:]} file holds {wanted}") from error
    classes, ignored = [], []
    for place, (name, colour, raw_id) in enumerate(rows):
        raw_id = place if raw_id is None else raw_id
        if name.casefold() in NO_CLASS:
            ignored.append((raw_id, colour))
        else:
            classes.append({"name": name, "color": colour, "ids": raw_id})
    has_colours = [colour for _, colour in ignored if colour is not None]
    ignore = {IDS: [raw_id for raw_id, _ in ignored], **({COLORS: has_colours} if has_colours else {})}
    name = PurePosixPath(file.uri).stem
    return _valid({"name": name, "classes": classes, **({"ignore": ignore} if ignored else {})}, where)


def _of_recipe(data: Any, where: str) -> ClassList:
    """The class list that a recipe has or names."""
    if not isinstance(data, str):
        return _valid(data, f"{where}: taxonomy")
    if data in known_taxonomies():
        return _read(Location.of(str(resources.files("nightseg.data") / "taxonomies" / f"{data}.yaml")), where)
    if not data.lower().endswith(FILES):
        raise UserError(f"{where}: taxonomy: {data!r} is no class list by name", cure="give the file of the classes")
    return _read(Location.of(data), f"{where}: taxonomy: {data}", may_be_recipe=False)


def _valid(data: Any, where: str) -> ClassList:
    try:
        return ClassList.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise UserError(f"{where}: {_fault(error)}", cure="mend the file there") from error
    except (TypeError, ValueError) as error:  # dates, bytes, sets
        raise UserError(f"{where}: a value is not a number, text, list or mapping: {error}", cure="mend it") from error


_Row = tuple[str, list[int] | None, int | None]  # name, colour, id


def _json_rows(text: str) -> list[_Row]:
    data = json.loads(text)
    if isinstance(data, dict):
        listed = next((data[key] for key in ("labels", "classes", "categories") if key in data), data)
    else:
        listed = data
    if isinstance(listed, dict):  # id -> name, or id -> mapping
        listed = [
            {"id": int(key), **(value if isinstance(value, dict) else {"name": value})} for key, value in listed.items()
        ]
    rows: list[_Row] = []
    for one in listed:
        if isinstance(one, str):
            rows.append((one, None, None))
            continue
        name = one.get("readable") or one["name"]
        is_void = one.get("evaluate") is False or one.get("ignoreInEval") is True
        raw_id = one.get("id")
        rows.append(("void" if is_void else name, one.get("color"), None if raw_id is None else int(raw_id)))
    return rows


def _csv_rows(text: str) -> list[_Row]:
    sample = text.splitlines()[0] if text.strip() else ""
    rows = csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=sample.count), skipinitialspace=True)
    columns = {(column or "").strip().casefold(): column for column in rows.fieldnames or []}

    def column(*names: str) -> str | None:
        return next((columns[name] for name in names if name in columns), None)

    name = column("name", "class", "class_name", "label", "category")
    if name is None:
        raise ValueError(f"none of the columns {', '.join(columns)} is `name`")
    rgb = [column("r", "red"), column("g", "green"), column("b", "blue")]
    raw_id = column("id", "ids", "index", "label_id", "value", "pixel")
    found: list[_Row] = []
    for row in rows:
        colour = None if None in rgb else [int(row[one or ""]) for one in rgb]
        found.append((row[name].strip(), colour, None if raw_id is None else int(row[raw_id])))
    return found


def _text_rows(text: str) -> list[_Row]:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    rows: list[_Row] = []
    for line in lines:
        cvat = re.fullmatch(r"([^:]+):(\d+),(\d+),(\d+):[^:]*:.*", line)
        camvid = re.fullmatch(r"(\d+)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(\S.*)", line)
        if camvid:
            rows.append((camvid[4], [int(camvid[1]), int(camvid[2]), int(camvid[3])], None))
        elif cvat:
            rows.append((cvat[1], [int(cvat[2]), int(cvat[3]), int(cvat[4])], None))
        else:
            rows.append((line, None, None))
    if any(Counter(name for name, _, _ in rows)[name] > 1 for name, _, _ in rows):
        raise ValueError(f"names stand there twice: {first_of([name for name, _, _ in rows])}")
    return rows


def _fault(error: ValidationError) -> str:
    """The fault that says most, at its place: `classes.0.color`."""
    first = max(error.errors(), key=lambda fault: (fault["type"] == "extra_forbidden", len(fault["loc"])))
    key = str(first["loc"][-1])
    place = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part.isidentifier())
    match first["type"]:
        case "extra_forbidden":
            keys = [*ClassList.model_fields, *ListedClass.model_fields]
            return f"{place}: unknown key {key!r}{closest(key, keys)}"
        case "missing":
            return f"{place}: this key is missing"
        case "string_type":
            return f"{place}: got {kind_of(first['input'])}; quote words that YAML reads as something else, as no or 1"
    return f"{place}: {first['msg']}, got {kind_of(first['input'])}"
