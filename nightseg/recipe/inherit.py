"""What a recipe does not have to say: it is taken from its base, from presets, and of a model from the whole recipe.

One rule for all of them: a mapping says only what it changes, at every depth. Lists, and mappings of classes, domains
or datasets to something, are one value; null is a value, too, and takes away what has a name. docs/recipe.md says it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Any, Final

import yaml

from nightseg.storage.yaml import Loader

Path = tuple[str, ...]

OF_MODELS: Final[Mapping[Path, str]] = {
    ("network",): "network",
    ("loss",): "loss",
    ("training",): "training",
    ("self_training", "inference"): "inference",
}
"""Keys of a model, and the section of the recipe that holds where they say nothing."""

_NAMED: Final = ("roots", "datasets", "translators", "models", "test_sets", "predictions", "translations", "claims")
_VALUES: Final = (
    "taxonomy",
    "map",
    "train",
    "mix",
    "class_weights",
    "never_below",
)  # mappings that are one value


class Whole(dict[str, Any]):
    """A mapping that stands in the place of another one beside a YAML merge: nothing in it is inherited."""


@cache
def presets(kind: str) -> dict[str, dict[str, Any]]:
    """The settings known by a name of a kind of section (training, unit): the files in presets/KIND."""
    files = (resources.files("nightseg.recipe") / "presets" / kind).iterdir()
    texts = {file.name.removesuffix(".yaml"): file.read_text("utf-8") for file in files}
    return {name: yaml.load(texts[name], Loader=Loader) for name in sorted(texts)}  # noqa: S506 - a SafeLoader


def preset_kind(path: Path) -> str:
    """Of the presets that a section at this place may name; "" if it may name none."""
    if path == ("training",) or (path[:1] == ("models",) and path[2:] == ("training",)):
        return "training"
    return "unit" if path[:1] == ("translators",) and len(path) == 2 else ""


def over(below: Mapping[str, Any], written: Mapping[str, Any], path: Path = ()) -> dict[str, Any]:
    """`below` with what was written over it. `path`: where both stand in a recipe."""
    if written.get("preset") is not None and (kind := preset_kind(path)):  # it says all that presets say
        said = {key for preset in presets(kind).values() for key in preset}
        below = {key: value for key, value in below.items() if key not in said}
    merged = Whole(below) if isinstance(below, Whole) else dict(below)
    for key, value in written.items():
        place, other = (*path, str(key)), merged.get(key)
        if key == "extractor" and isinstance(other, str):  # the one mapping of settings that may be written as a word
            other = {"name": other}
        if value is None and key in merged and _is_named(place):
            del merged[key]
        elif isinstance(value, dict) and isinstance(other, dict) and not _is_instead(place, value, other):
            merged[key] = over(other, value, place)
        else:
            merged[key] = value
    return merged


def _is_named(path: Path) -> bool:
    """Whether a thing of the recipe with a name of its own lies there: a dataset, a model, a test set of a model."""
    return (len(path) == 2 and path[0] in _NAMED) or (len(path) == 4 and path[0] == "models" and path[2] == "test")


def _is_instead(path: Path, value: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a mapping replaces another one: it is one value, or a dataset or translator of another kind."""
    if isinstance(value, Whole) or path[-1] in _VALUES:
        return True
    if path[0] == "translators" and len(path) == 2:
        return value.get("kind") is not None and value["kind"] != other.get("kind", "unit")
    kinds = [_kind_of_dataset(entry) for entry in (value, other)] if path[0] == "datasets" and len(path) == 2 else [""]
    return all(kinds) and len(set(kinds)) > 1


def _kind_of_dataset(entry: Mapping[str, Any]) -> str:
    """ "": it does not say."""
    if "layout" in entry:
        return "scenes" if entry["layout"] == "scenes" else "folder"
    return next((key for key in ("translate", "join", "keep") if key in entry), "")


# -- models ------------------------------------------------------------------------------------------------------------


def _written(data: Mapping[str, Any]) -> Iterator[tuple[Path, dict[str, Any], str]]:
    """Where a model says something of a section, the mapping that it stands in, and the name of the section."""
    models = data.get("models")
    for name, model in models.items() if isinstance(models, dict) else ():
        for place, section in OF_MODELS.items():
            owner = model
            for key in place[:-1]:
                owner = owner.get(key) if isinstance(owner, dict) else None
            if isinstance(owner, dict) and isinstance(owner.get(place[-1]), dict):
                yield ("models", str(name), *place), owner, section


def inherit(data: Mapping[str, Any]) -> dict[Path, Path]:
    """Give models what they do not say of a section; returns whose each key is that they were given."""
    origins: dict[Path, Path] = {}
    for path, owner, section in _written(data):
        if isinstance(below := data.get(section), dict):
            said = owner[path[-1]]
            owner[path[-1]] = over(below, said, path)
            origins |= _origins(owner[path[-1]], said, path, (section,))
    return origins


def _origins(merged: Any, said: Any, path: Path, origin: Path) -> dict[Path, Path]:
    if said is merged or not isinstance(merged, dict):
        return {}
    found: dict[Path, Path] = {}
    for key in merged:
        place, source = (*path, str(key)), (*origin, str(key))
        found |= _origins(merged[key], said[key], place, source) if key in said else {place: source}
    return found


def unmerge(data: Mapping[str, Any], marks: Mapping[Path, int]) -> None:
    """Leave out of models what YAML's aliases and merges copied there from the recipe: it is inherited, so what changes
    the recipe reaches it. What a merge replaced it still replaces."""
    for path, owner, section in _written(data):
        if isinstance(data.get(section), dict):
            owner[path[-1]] = _said(owner[path[-1]], path, (section,), marks)


def _said(written: dict[str, Any], path: Path, origin: Path, marks: Mapping[Path, int]) -> dict[str, Any]:
    def is_copy(key: str) -> bool:
        mark = marks.get((*path, key))
        return mark is not None and mark == marks.get((*origin, key))

    said = {key: value for key, value in written.items() if not is_copy(str(key))}
    for key, value in said.items():
        if isinstance(value, dict):
            inner = _said(value, (*path, str(key)), (*origin, str(key)), marks)
            said[key] = Whole(value) if len(said) < len(written) and len(inner) == len(value) else inner
    return said


def differences(data: dict[str, Any]) -> None:
    """Leave out of the models of a whole recipe what they have in common with it, so that it is inherited again."""
    for path, owner, section in _written(data):
        owner[path[-1]] = _difference(owner[path[-1]], data[section], path)


def _difference(value: Mapping[str, Any], below: Mapping[str, Any], path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, part in value.items():
        other, place = below.get(key), (*path, key)
        if part != other and isinstance(part, dict) and isinstance(other, dict) and not _is_instead(place, part, other):
            found[key] = _difference(part, other, place)
        elif part != other:
            found[key] = part
    return found
