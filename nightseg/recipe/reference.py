"""The recipe's types as people and editors read them: keys and words allowed at a place, all keys, a schema.

All of them walk the JSON schema that pydantic makes of the types.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel

from nightseg.data.settings import Dataset
from nightseg.recipe.types import AnyTranslator, Recipe
from nightseg.selection.settings import Extraction

Schema = dict[str, Any]
Path = Sequence[int | str]

# pydantic puts the tag of a kind of dataset or translator into the path of an error.
_TAGS: dict[str | int, str] = {
    get_args(kind)[1].tag: get_args(kind)[0].__name__
    for union in (Dataset, AnyTranslator)
    for kind in get_args(get_args(union)[0])
}


def allowed_keys(kind: type[BaseModel], path: Path) -> list[str]:
    """The keys of the mapping at `path` (pydantic's own path, tags included), in the order of the types."""
    return list(dict.fromkeys(key for schema in _at(kind, path) for key in schema.get("properties", {})))


def allowed_values(kind: type[BaseModel], path: Path) -> list[str]:
    """The words allowed at `path`, over all kinds of thing that may stand there (a layout of any kind of dataset)."""
    found = _at(kind, [part for index, part in enumerate(path) if index != 2 or part not in _TAGS])
    return list(dict.fromkeys(str(word) for schema in found for word in _words(schema)))


def _at(kind: type[BaseModel], path: Path) -> list[Schema]:
    """The alternatives that the types allow at `path`."""
    whole = kind.model_json_schema()
    found = _alternatives(whole, whole.get("$defs", {}))
    for part in path:
        tagged = [one for one in found if part in _TAGS and one.get("title") == _TAGS[part]] if len(found) > 1 else []
        below = [inner for schema in found if (inner := _below(schema, str(part))) is not None]
        found = tagged or [one for schema in below for one in _alternatives(schema, whole.get("$defs", {}))] or found
    return found


def _below(schema: Schema, part: str) -> Schema | None:
    """What a schema says of one of its keys or items."""
    named = schema.get("properties", {}).get(part) or next(iter(schema.get("patternProperties", {}).values()), None)
    if named is not None:
        return dict(named)
    for inside in ("additionalProperties", "items"):
        if isinstance(schema.get(inside), dict):
            return dict(schema[inside])
    return None


def _alternatives(schema: Schema, definitions: Schema) -> list[Schema]:
    if "$ref" in schema:
        return _alternatives(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    members = schema.get("anyOf") or schema.get("oneOf")
    return [one for member in members for one in _alternatives(member, definitions)] if members else [schema]


def _words(schema: Schema) -> list[Any]:
    return [schema["const"]] if "const" in schema else list(schema.get("enum", []))


# -- editors -----------------------------------------------------------------------------------------------------------

_HOW_TO = (
    "Editors that know the YAML language server check a recipe that begins with the line "
    "`# yaml-language-server: $schema=recipe.schema.json`, where this file lies under that name beside it."
)


def editor_schema() -> Schema:
    """The JSON schema (draft 2020-12) of a recipe file. Where there is a base, nothing is required, and what has a name
    may be null."""
    whole = Recipe.model_json_schema()
    definitions = whole.pop("$defs")
    name = Extraction.__name__  # the one mapping of settings that may be written as a word
    definitions[name] = {"anyOf": [{"type": "string"}, definitions[name]]}
    changes = {f"{name}Changes": _as_changes(definition) for name, definition in definitions.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": _HOW_TO,
        "title": "A recipe of nightseg",
        "type": "object",
        "if": {"required": ["base"]},
        "then": {"$ref": "#/$defs/RecipeChanges"},
        "else": {"$ref": "#/$defs/Recipe"},
        "$defs": {"Recipe": whole, **definitions, "RecipeChanges": _as_changes(whole), **changes},
    }


def _as_changes(schema: Any) -> Any:
    """A schema without what is required: of a mapping that only says what it changes."""
    if isinstance(schema, list):
        return [_as_changes(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {key: _as_changes(part) for key, part in schema.items() if key not in ("required", "minProperties")}
    if isinstance(changed.get("$ref"), str):
        changed["$ref"] += "Changes"
    if "oneOf" in changed:  # without what they require, kinds of one thing are not told apart
        changed["anyOf"] = changed.pop("oneOf")
    if isinstance(names := changed.get("patternProperties"), dict):
        changed["patternProperties"] = {key: {"anyOf": [part, {"type": "null"}]} for key, part in names.items()}
    return changed


# -- all keys ----------------------------------------------------------------------------------------------------------


class Key(NamedTuple):
    """A key of a recipe in words; NAME in its place stands for a name that the user chooses."""

    key: str
    type: str
    default: str
    description: str


def all_keys() -> list[Key]:
    """Every key of a recipe, settings that stand at several places with the first of them."""
    whole = Recipe.model_json_schema()
    definitions = whole["$defs"]
    known: dict[str, str] = {}
    found = _keys(whole, "")
    for place, name in _sections(whole, definitions, ()):
        if name not in known:
            known[name] = place
            found += _keys(definitions[name], f"{place}.")
        elif place != known[name]:
            found.append(Key(f"{place}.*", "", "", f"as {known[name]}.*"))
    return list(dict.fromkeys(found))


def _keys(schema: Schema, place: str) -> list[Key]:
    return [
        Key(place + key, _kind(value, str).replace("`", ""), _default(schema, key), value.get("description", ""))
        for key, value in schema["properties"].items()
        if "$ref" not in value
    ]


# -- docs/recipe.md --------------------------------------------------------------------------------------------------

_HEAD = """# The recipe, key by key

Made from the types that check a recipe (`nightseg.recipe.reference.render_reference`); a test compares the two. A key
without default is required. NAME is a name that you choose: letters, digits, `_` and `-`, beginning with a letter.
`nightseg recipe` prints the same, `nightseg recipe RECIPE` a recipe with all that it does not say.

## What need not be said

- A **model** says of `network`, `loss`, `training` and `self_training.inference` what is different for it; all else is
  the recipe's. So the override `training.epochs=3` reaches every model that does not say its epochs.
- A recipe with a **base** (`base: other.yaml`, relative to it; that one may have a base, too) says what it changes.
  A dataset or translator of another kind than that of the base replaces it. Errors name the file that they are in.
- A **preset** says all that the presets of its kind say; nothing of that is taken from the recipe or the base.

This goes for mappings of settings and of named things, at every depth. Lists are replaced, and so are mappings that
are one value: `taxonomy`, `map`, `train`, `mix`, `class_weights`, `never_below`. `null` is a value like any other
(`ohem: null` = none); in a recipe with a base, `models: {NAME: null}` takes that model away, and so with all that has a
name, test sets of a model included. `null` for the whole `training` of a model means: as the recipe says.

YAML's own merges keep their meaning: `training: {<<: *training, augmentation: {flip: 0}}` replaces the augmentation.
What is merged or repeated (`*training`) from the recipe's own section counts as not said.
"""


def render_reference() -> str:
    """All sections of a recipe as Markdown: key, type, default and description of everything that may be written."""
    whole = Recipe.model_json_schema()
    definitions = whole["$defs"]
    places: dict[str, list[str]] = {}
    for place, name in _sections(whole, definitions, ()):
        places.setdefault(name, []).append(f"`{place}`")
    parts = [_HEAD, _table(whole)]
    for name, found in places.items():
        text = " ".join(definitions[name].get("description", "").split())
        parts.append(f"## {name}\n\nAt {', '.join(dict.fromkeys(found))}. {text}\n\n{_table(definitions[name])}")
    return "\n".join(parts)


def _sections(schema: Schema, definitions: Schema, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(dotted place, definition) of every mapping of settings, from the top down."""
    inner = [(key, value, (*path, key)) for key, value in schema.get("properties", {}).items()]
    for value in schema.get("patternProperties", {}).values():
        inner.append(("NAME", value, (*path, "NAME")))
    for _, value, place in inner:
        yield from _sections(value, definitions, place) if "patternProperties" in value else ()
        for member in (value, value.get("items", {}), *value.get("anyOf", ()), *value.get("oneOf", ())):
            if "$ref" in member:
                name = member["$ref"].rpartition("/")[2]
                yield ".".join(place), name
                yield from _sections(definitions[name], definitions, place)
            elif member is not value:
                yield from _sections(member, definitions, place)


def _table(schema: Schema) -> str:
    rows = ["| key | type | default | what it is |", "|---|---|---|---|"]
    for key, value in schema["properties"].items():
        default = _default(schema, key)
        default = default if default in ("", "required") else f"`{default}`"
        cells = (f"`{key}`", _kind(value), default, value.get("description", ""))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _default(schema: Schema, key: str) -> str:
    """ "" of a mapping of settings, which have defaults of their own."""
    if "$ref" in (value := schema["properties"][key]):
        return ""
    return "required" if key in schema.get("required", []) else _shown(value.get("default"))


def _shown(value: Any) -> str:
    return json.dumps(value).replace('"', "") if isinstance(value, dict | list) else str(json.dumps(value)).strip('"')


def _linked(name: str) -> str:
    return f"[{name}](#{name.lower()})"


def _kind(schema: Schema, link: Callable[[str], str] = _linked) -> str:
    """The type of a value in words; `link` shows the name of other settings."""
    if "$ref" in schema:
        return link(schema["$ref"].rpartition("/")[2])
    if members := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(_kind(member, link) for member in members))
    if words := _words(schema):
        return ", ".join(f"`{word}`" for word in words)
    match schema.get("type"):
        case "array":
            items = schema.get("prefixItems")
            one = "" if items else _kind(schema["items"], link)
            return f"[{', '.join(_kind(item, link) for item in items)}]" if items else f"list of {one}"
        case "object":
            named = schema.get("patternProperties")
            inner = next(iter(named.values())) if named else schema["additionalProperties"]
            words = _words(schema.get("propertyNames", {}))
            key = ", ".join(words) if words else "NAME" if named else "text"
            return f"mapping of {key} to {_kind(inner, link)}"
        case "integer" | "number" as name:
            return f"{name}{_bounds(schema)}"
        case "string":
            return "name" if "pattern" in schema and "A-Z" in schema["pattern"] else "text"
        case "boolean":
            return "true or false"
    return str(schema.get("type", "any"))


def _bounds(schema: Schema) -> str:
    signs = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
    told = [f"{sign} {schema[key]}" for key, sign in signs if key in schema]
    told += [f"multiple of {schema['multipleOf']}"] if "multipleOf" in schema else []
    return f" {', '.join(told)}" if told else ""
