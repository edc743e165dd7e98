"""Taxonomies as YAML files: those that come with nightseg, by name, and anybody's, by path."""

from __future__ import annotations

import json
import re
from importlib import resources
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from nightseg.data.taxonomy import FROM_ONE, IGNORE, TRAIN_IDS, Taxonomy
from nightseg.errors import UserError, closest
from nightseg.settings import Strict
from nightseg.storage.paths import Location
from nightseg.storage.yaml import kind_of, read_yaml

Byte = Annotated[int, Field(ge=0, le=255)]
RawIds = Byte | list[Byte]  # of an 8-bit label file


class ListedClass(Strict):
    """A class: colour (red, green, blue), and raw ids in each encoding. Its place in the list is its train id."""

    name: str
    color: tuple[Byte, Byte, Byte]
    ids: dict[str, RawIds] = Field(default={})


class ClassList(Strict):
    """What a taxonomy's file holds. `ignore`: raw ids without a class; "rest": every id that no class has."""

    name: str
    classes: Annotated[list[ListedClass], Field(min_length=2, max_length=255)]
    ignore: dict[str, RawIds | Literal["rest"]] = Field(default={})


def taxonomy(name_or_yaml_path: str) -> Taxonomy:
    """cityscapes19, camvid11 (taxonomies/*.yaml), or a YAML file of the same form: see `ClassList`. Raises UserError.

    The encodings `train_ids` (0..K-1 and 255) and `ids_from_one` (0 is void, 1..K, 255) are always there.
    """
    folder = resources.files("nightseg.data") / "taxonomies"
    known = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir())
    if name_or_yaml_path in known:
        return _read(Location.of(str(folder / f"{name_or_yaml_path}.yaml")), f"taxonomy {name_or_yaml_path}")
    if not re.search(r"\.ya?ml$", name_or_yaml_path, re.IGNORECASE):
        raise UserError(
            f"unknown taxonomy {name_or_yaml_path!r}{closest(name_or_yaml_path, known)}; known: {', '.join(known)}",
            cure="use one of these, or the path of a .yaml file with name and classes",
        )
    location = Location.of(name_or_yaml_path)
    return _read(location, f"taxonomy file {location.uri}")


def _read(file: Location, where: str) -> Taxonomy:
    parsed = read_yaml(file, where, "taxonomy")
    for path, line in parsed.twice:
        raise UserError(f"{where}: line {line}: {'.'.join(path)}: this key stands twice", cure="remove one of them")
    try:
        listed = ClassList.model_validate_json(json.dumps(parsed.data))
    except ValidationError as error:
        raise UserError(f"{where}: {_fault(error)}", cure="mend the file there") from error
    except (TypeError, ValueError) as error:  # dates, bytes, sets
        raise UserError(f"{where}: a value is not a number, text, list or mapping: {error}", cure="mend it") from error
    names = tuple(one.name for one in listed.classes)
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{where}: the class name {twice[0]!r} is given twice", cure="give each class its name")
    encodings = {TRAIN_IDS: {**{index: index for index in range(len(names))}, IGNORE: IGNORE}}
    for train_id, one in enumerate(listed.classes):
        for encoding, raw_ids in one.ids.items():
            _add_ids(f"{where}: classes.{train_id}.ids.{encoding}", encodings, encoding, raw_ids, train_id)
    for encoding, ignored in listed.ignore.items():
        _add_ids(f"{where}: ignore.{encoding}", encodings, encoding, ignored, IGNORE)
    if len(names) < IGNORE - 1:
        encodings.setdefault(FROM_ONE, {0: IGNORE, **{index + 1: index for index in range(len(names))}, IGNORE: IGNORE})
    return Taxonomy(listed.name, names, tuple(one.color for one in listed.classes), encodings)


def _add_ids(where: str, encodings: dict[str, dict[int, int]], encoding: str, raw_ids: Any, train_id: int) -> None:
    if encoding == TRAIN_IDS:
        raise UserError(f"{where}: {TRAIN_IDS} is built in", cure="give the encoding another name")
    known = encodings.setdefault(encoding, {})
    if raw_ids == "rest":
        raw_ids = [raw_id for raw_id in range(256) if raw_id not in known]
    for raw_id in raw_ids if isinstance(raw_ids, list) else [raw_ids]:
        if raw_id in known:
            what = f"{where}: the raw id {raw_id} already means something else in this encoding"
            raise UserError(what, cure="list each id once")
        known[raw_id] = train_id


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
