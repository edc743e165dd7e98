"""From YAML text and overrides `a.b=c` to a checked `Recipe`, or to one message that names every error.

The graph and the folders are checked on the raw mapping: a misspelt key does not hide an unknown name or a cycle.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from nightseg.errors import closest
from nightseg.recipe.checks import Problem, recipe_problems
from nightseg.recipe.reference import allowed_keys, allowed_values, dotted
from nightseg.recipe.renamed import new_name
from nightseg.recipe.types import Recipe, is_name
from nightseg.storage import Location, UserError
from nightseg.storage.yaml import Loader, kind_of, read_yaml

Settings = TypeVar("Settings", bound=BaseModel)
Lines = dict[tuple[str, ...], str]


class RecipeError(UserError):
    """Everything that is wrong with a recipe, in one message."""


class Source(NamedTuple):
    """The raw mapping, where each of its keys was written, and what to call the file in messages."""

    data: dict[str, Any]
    places: Lines
    file: str
    problems: list[Problem]


def load_recipe(file: str | Path | Location, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe; raises `RecipeError` with all errors at once."""
    source = read_source(file, overrides, "recipe")
    _fill_roots(source)
    _fill_presets(source)
    return _typed(Recipe, source, recipe_problems(source.data))


def load_settings(kind: type[Settings], file: str | Path | Location, overrides: Sequence[str] = ()) -> Settings:
    """Read another YAML file of strict settings (a search) with the same care and the same messages."""
    return _typed(kind, read_source(file, overrides, kind.__name__.lower()), [])


def _typed(kind: type[Settings], source: Source, more_problems: list[Problem]) -> Settings:
    problems = list(source.problems)
    settings: Settings | None = None
    try:
        # JSON mode is strict about types and still takes a list where a tuple is meant.
        settings = kind.model_validate_json(json.dumps(source.data, allow_nan=True))
    except ValidationError as error:
        problems += _typed_problems(kind, error, source)
    except (TypeError, ValueError) as error:  # dates, bytes, sets: YAML values that no recipe key takes
        problems.append(Problem((), f"a value is not a number, text, list or mapping: {error}"))
    problems += more_problems
    if problems or settings is None:
        raise RecipeError(_message(source, problems))
    return settings


def save_recipe(recipe: Recipe, file: Location) -> None:
    """Write the resolved recipe (defaults included) as YAML that `load_recipe` reads back."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    file.write_bytes(text.encode())


def read_source(file: str | Path | Location, overrides: Sequence[str], what: str) -> Source:
    """Parse the file, keeping the line of every key, and override. `what` it is stands in the messages."""
    parsed = read_yaml(Location.of(file), str(file), what, RecipeError)
    message = "this key stands twice in the same mapping"
    problems = [Problem(path, message, line=f"line {line}") for path, line in parsed.twice]
    source = Source(parsed.data, {path: f"line {line}" for path, line in parsed.lines.items()}, str(file), problems)
    for text in overrides:
        _override(source, text)
    return source


def _override(source: Source, text: str) -> None:
    """Apply one `a.b=c`; the value is read as YAML."""
    key, equals, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        source.problems.append(Problem((), f"set {text}: write it as key.key=value"))
        return
    try:
        parsed = yaml.load(value, Loader=Loader)  # noqa: S506 - Loader is a SafeLoader
    except yaml.YAMLError as error:
        source.problems.append(Problem(path, f"set {text}: the value is not valid YAML ({error})"))
        return
    path = _steps(source.data, path)
    target: Any = source.data
    for depth, part in enumerate(path):
        is_last = depth == len(path) - 1
        inside = ".".join(path[:depth])
        if isinstance(target, list) and part.isdigit() and int(part) < len(target):
            place: Any = int(part)
        elif isinstance(target, dict):
            place = part
        else:
            what = f"a list of {len(target)}" if isinstance(target, list) else kind_of(target)
            source.problems.append(Problem(path, f"set {text}: {inside} is {what}, it has no {part!r}"))
            return
        if is_last:
            target[place] = parsed
        elif isinstance(target, dict) and target.get(place) is None:
            target[place] = {}
        target = target[place]
    source.places[path] = f"set {text}"


def _steps(data: Any, path: tuple[str, ...]) -> tuple[str, ...]:
    """The keys of a path. One that is written with dots, like those of a search's space, is one key."""
    for length in range(len(path) if isinstance(data, dict) else 0, 0, -1):
        key = ".".join(path[:length])
        if key in data:
            return (key, *_steps(data[key], path[length:]))
    if isinstance(data, list) and path and path[0].isdigit() and int(path[0]) < len(data):
        return (path[0], *_steps(data[int(path[0])], path[1:]))
    return path


def _fill_roots(source: Source) -> None:
    """Replace `{name}` in the roots of datasets by what `roots` says, so that one override moves many datasets."""
    roots, datasets = source.data.get("roots"), source.data.get("datasets")
    known = {str(name): root for name, root in roots.items()} if isinstance(roots, dict) else {}
    for name, entry in datasets.items() if isinstance(datasets, dict) else ():
        if not isinstance(entry, dict) or not isinstance(entry.get("root"), str):
            continue
        for word in re.findall(r"\{([^{}]*)\}", entry["root"]):
            if isinstance(known.get(word), str):
                entry["root"] = entry["root"].replace(f"{{{word}}}", known[word])
            else:
                names = ", ".join(known) or "none"
                message = f"there is no root {word!r}{closest(word, list(known))}; known: {names}"
                source.problems.append(Problem(("datasets", str(name), "root"), message))


def presets(kind: str) -> dict[str, dict[str, Any]]:
    """The settings known by a name of a kind of section (training, unit): the files in presets/KIND."""
    files = (resources.files("nightseg.recipe") / "presets" / kind).iterdir()
    texts = {file.name.removesuffix(".yaml"): file.read_text("utf-8") for file in files}
    return {name: yaml.load(texts[name], Loader=Loader) for name in sorted(texts)}  # noqa: S506 - a SafeLoader


def _fill_presets(source: Source) -> None:
    """Replace `preset` of a training or of a UNIT translator by the settings it names; what stands beside it wins."""
    models, translators = (source.data.get(section) for section in ("models", "translators"))
    places: list[tuple[tuple[str, ...], Any, str, str]] = [(("training",), source.data, "training", "training")]
    for name, model in models.items() if isinstance(models, dict) else ():
        places.append((("models", str(name), "training"), model, "training", "training"))
    for name, settings in translators.items() if isinstance(translators, dict) else ():
        if isinstance(settings, dict) and settings.get("kind", "unit") == "unit":
            places.append((("translators", str(name)), translators, name, "unit"))
    for path, owner, key, kind in places:
        written = owner.get(key) if isinstance(owner, dict) else None
        if not isinstance(written, dict) or written.get("preset") is None:
            continue
        name, known = written.pop("preset"), presets(kind)
        if isinstance(name, str) and name in known:
            owner[key] = _over(known[name], written)
        else:
            message = f"{name!r} is not allowed{closest(str(name), known)}; allowed: {', '.join(known)}"
            source.problems.append(Problem((*path, "preset"), message))


def _over(values: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with what was written over them, mapping by mapping."""
    merged = dict(values)
    for key, value in written.items():
        below = merged.get(key)
        merged[key] = _over(below, value) if isinstance(below, Mapping) and isinstance(value, dict) else value
    return merged


def _typed_problems(kind: type[BaseModel], error: ValidationError, source: Source) -> Iterator[Problem]:
    for item in error.errors():
        path = dotted(item["loc"])
        fault, got = item["type"], item.get("input")
        if fault == "extra_forbidden":
            allowed, renamed = allowed_keys(kind, item["loc"][:-1]), new_name(path)
            hint = f"; {path[-1]} is called {renamed} now" if renamed else closest(path[-1], allowed)
            yield Problem(path, f"unknown key{hint}; allowed: {', '.join(allowed)}")
        elif fault == "missing":
            yield Problem(path, "this key is required")
        elif fault == "literal_error":
            allowed = allowed_values(kind, item["loc"])
            yield Problem(path, f"{got!r} is not allowed{closest(str(got), allowed)}; allowed: {', '.join(allowed)}")
        elif fault == "union_tag_invalid":
            got, allowed = item["ctx"]["tag"], re.findall(r"'([^']*)'", item["ctx"]["expected_tags"])
            hint = closest(got, allowed)
            yield Problem((*path, "kind"), f"{got!r} is not allowed{hint}; allowed: {', '.join(allowed)}")
        elif fault == "string_pattern_mismatch" and not is_name(str(got)):
            yield Problem(path, f"{got!r} is not a name: letters, digits, _ and -, beginning with a letter")
        elif fault == "value_error":
            yield Problem(path, str(item["ctx"]["error"]))
        else:
            number = " (not a finite number)" if isinstance(got, float) and not math.isfinite(got) else ""
            yield Problem(path, f"{item['msg'][0].lower()}{item['msg'][1:]}, got {kind_of(got)}{number}")


def _message(source: Source, problems: Sequence[Problem]) -> str:
    unique = list(dict.fromkeys(problems))
    head = f"{source.file}: {len(unique)} error{'s' if len(unique) > 1 else ''}; nothing was started."
    return "\n".join([head, *(f"  {_where(source, problem)}{problem.message}" for problem in unique)])


def _where(source: Source, problem: Problem) -> str:
    place = problem.line
    for length in range(len(problem.path), 0, -1):  # the key itself, or the nearest written one that encloses it
        if place:
            break
        place = source.places.get(problem.path[:length], "")
    words = [word for word in (place, ".".join(problem.path)) if word]
    return ": ".join([*words, ""])
