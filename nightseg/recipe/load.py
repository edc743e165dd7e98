"""From YAML text and overrides `a.b=c` to a checked `Recipe`, or to one message that names every error.

The graph and the folders are checked on the raw mapping: a misspelt key does not hide an unknown name or a cycle.
What a recipe leaves to its base, to presets and, of a model, to the whole recipe is filled in there, too: inherit.py.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path, PurePath
from typing import Any, Final, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from nightseg.errors import closest, together
from nightseg.recipe.checks import Problem, recipe_problems
from nightseg.recipe.inherit import differences, inherit, over, preset_kind, presets, unmerge
from nightseg.recipe.reference import allowed_keys, allowed_values
from nightseg.recipe.renamed import new_name
from nightseg.recipe.types import Recipe, is_name
from nightseg.recipe.unions import fitting, in_words
from nightseg.storage import Location, UserError
from nightseg.storage.credentials import hide_credentials, refuse_credentials
from nightseg.storage.yaml import kind_of, parse_value, read_yaml

Settings = TypeVar("Settings", bound=BaseModel)
Lines = dict[tuple[str, ...], str]
NOTHING: Final[Mapping[str, str]] = {}


class RecipeError(UserError):
    """Everything that is wrong with a recipe, in one message."""


class Source(NamedTuple):
    """The raw mapping, where each of its keys was written, and what to call the file in messages."""

    data: dict[str, Any]
    places: Lines
    file: str
    problems: list[Problem]
    origins: dict[tuple[str, ...], tuple[str, ...]]  # what a model was given -> the recipe's key that it is from


def load_recipe(
    file: str | Path | Location | Mapping[str, Any], overrides: Sequence[str] = (), *, elsewhere: bool = False
) -> Recipe:
    """Read, override and check a recipe, a file or its content; raises `RecipeError` with all errors at once.

    `elsewhere`: it is for other machines, so that folders of datasets and models are not looked for here.
    """
    source = _whole(file, overrides)
    # Nothing is looked for at an address with credentials.
    return _typed(Recipe, source, recipe_problems(source.data, elsewhere or any(_secrets(source.data))))


def written(file: str | Path | Location, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a recipe and its bases say, with overrides, as plain data: one that needs no other file."""
    return _written(file, overrides).data


def _whole(file: str | Path | Location | Mapping[str, Any], overrides: Sequence[str]) -> Source:
    """The recipe with all that it does not say, unchecked."""
    source = _written(file, overrides)
    _fill_roots(source)
    models = _entries(source, "models")
    _fill_presets(source, [("training",), *(("translators", name) for name in _entries(source, "translators"))])
    source.origins.update(inherit(source.data))
    _fill_presets(source, [("models", name, "training") for name in models])
    return source


def _written(file: str | Path | Location | Mapping[str, Any], overrides: Sequence[str]) -> Source:
    source = _given(file) if isinstance(file, Mapping) else _read_recipe(Location.of(file), str(file))
    _override(source, overrides)
    return source


def load_settings(kind: type[Settings], file: str | Path | Location, overrides: Sequence[str] = ()) -> Settings:
    """Read another YAML file of strict settings (a search) with the same care and the same messages."""
    source = _read(Location.of(file), str(file), kind.__name__.lower())
    _override(source, overrides)
    return _typed(kind, source, [])


def _typed(kind: type[Settings], source: Source, more_problems: list[Problem]) -> Settings:
    problems = [*source.problems, *_secrets(source.data)]
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
        raise RecipeError(_message(source, _where_written(source, problems)))
    return settings


def _secrets(value: Any, path: tuple[str, ...] = ()) -> Iterator[Problem]:
    """Addresses with credentials: recipes are stored with their runs, and shown in reports."""
    if isinstance(value, str):
        try:
            refuse_credentials(value)
        except UserError as error:
            yield Problem(path, str(error))
    elif isinstance(value, Mapping | list):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _secrets(item, (*path, str(key)))


def _where_written(source: Source, problems: Sequence[Problem]) -> Iterator[Problem]:
    """What a model has from the recipe is told of the recipe, once; of what it changed, where the rest is from."""
    known = {(problem.path, problem.message) for problem in problems}
    for problem in problems:
        for length in range(len(problem.path), 0, -1):
            if origin := source.origins.get(problem.path[:length]):
                yield problem._replace(path=(*origin, *problem.path[length:]))
                break
        else:
            depth = len(problem.path)
            inside = [(path[depth:], of) for path, of in source.origins.items() if path[:depth] == problem.path]
            section = next((of[: -len(rest)] for rest, of in inside if len(rest) < len(of)), None)
            if section is None:
                yield problem
            elif (section, problem.message) not in known:
                rest = f"what it does not say is that of {'.'.join(section)}: null takes a key of it away"
                yield problem._replace(message=f"{problem.message}; {rest}")


_SECTIONS: Final = {
    "dataset": "datasets",
    "model": "models",
    "translator": "translators",
    "translation": "translations",
}


@contextmanager
def told_of(file: str | Path | Location | Mapping[str, Any], overrides: Sequence[str] = ()) -> Iterator[None]:
    """Say of errors about a thing of this recipe in which file, line and key it stands."""
    try:
        yield
    except RecipeError:
        raise
    except UserError as error:
        source = _written(file, overrides)
        placed = [_placed(source, problem) for problem in error.problems or [error]]
        if [str(problem) for problem in placed] == [str(problem) for problem in error.problems or [error]]:
            raise
        raise together(placed) from error


def _placed(source: Source, problem: UserError) -> UserError:
    """With the place of the key that it names of a dataset, model or translator, or of this thing."""
    found = re.match(rf"({'|'.join(_SECTIONS)}) ([\w-]+)", problem.what)
    owner = (_SECTIONS[found[1]], found[2]) if found else ()
    if not found or owner not in source.places:
        return problem
    named = re.search(r"\b(?:[a-z]\w*\.)*[a-z]\w*", problem.what[found.end() :].lstrip(": "))
    keys = tuple(named[0].split(".")) if named else ()
    places = [*(((*owner, *keys[:n])) for n in range(len(keys), 0, -1)), keys, owner]
    path = next(path for path in places if path in source.places and (path != keys or len(keys) > 1))
    what = f"{source.file}: {source.places[path]}: {'.'.join(path)}: {problem.what}"
    return UserError(what, cure=problem.cure)


def save_recipe(recipe: Recipe, file: Location) -> None:
    """Write the whole recipe (defaults and bases included) as YAML that `load_recipe` reads back.

    Of models it says what differs from the recipe, so that overrides of the recipe reach them again.
    """
    content = recipe.model_dump(mode="json")
    differences(content)
    file.write_bytes(as_yaml(content).encode())


def as_it_is(recipe: Recipe) -> dict[str, Any]:
    """All that holds, defaults included, as JSON: of each model also what it has from the recipe."""
    content = recipe.model_dump(mode="json", exclude={"base"})
    for model in content["models"].values():
        for key in () if model["adapt_norms"] else ("network", "loss", "training"):
            model[key] = model[key] or deepcopy(content[key])
        if model["self_training"] and model["self_training"]["mode"] == "offline":
            model["self_training"]["inference"] = model["self_training"]["inference"] or deepcopy(content["inference"])
    return content


def as_yaml(content: dict[str, Any]) -> str:
    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))


def _read(file: Location, shown: str, what: str, is_base: bool = False) -> Source:
    """Parse the file, keeping the line of every key. `what` it is stands in the messages."""
    parsed = read_yaml(file, shown, what, RecipeError)
    within = f"{shown}: " if is_base else ""
    message = "this key stands twice in the same mapping"
    problems = [Problem(path, message, line=f"{within}line {line}") for path, line in parsed.twice]
    unmerge(parsed.data, parsed.marks)
    places = {path: f"{within}line {line}" for path, line in parsed.lines.items()}
    return Source(parsed.data, places, shown, problems, {})


def _given(content: Mapping[str, Any]) -> Source:
    """A recipe that is no file: what Python has for YAML's values is taken, and a base is relative to where we are."""
    data = _plain(content)
    if (base := data.pop("base", None)) is not None:
        data = over(_read_recipe(Location.of(str(base)), str(base), {"": "recipe"}).data, data)
    return Source(data, {}, "recipe", [], {})


def _plain(value: Any) -> Any:
    match value:
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case PurePath() | Location():
            return str(value)
    return value


def _read_recipe(file: Location, shown: str, above: Mapping[str, str] = NOTHING) -> Source:
    """The file over its base, if it has one. `above`: the files that it is the base of -> how they are shown."""
    source = _read(file, shown, "recipe", bool(above))
    base = source.data.pop("base", None)
    if base is None:
        return source
    above = {**above, _identity(file): shown}
    below = file.beside(base) if isinstance(base, str) and base else None
    if below is None:
        wrong = f"give the recipe file that this one changes, relative to it, not {kind_of(base)}"
    elif (identity := _identity(below)) in above:
        names = list(above.values())[list(above).index(identity) :]
        wrong = f"a circle, so none of them can be read first: {' has the base '.join([*names, names[0]])}"
    elif not below.exists() or below.is_folder():
        wrong = f"there is no recipe file {base!r}; the path is relative to the file that it stands in: {below}"
    else:
        name = str(below) if str(below) == base else os.path.join(os.path.dirname(shown), base)
        found = _read_recipe(below, name, above)
        places, problems = found.places | source.places, found.problems + source.problems
        return Source(over(found.data, source.data), places, shown, problems, {})
    source.problems.append(Problem(("base",), wrong, source.places[("base",)]))
    return source


def _identity(file: Location) -> str:
    return os.path.realpath(file.uri) if file.is_local else file.uri


def _override(source: Source, overrides: Sequence[str]) -> None:
    for text in overrides:
        _set(source, text)


def _set(source: Source, text: str) -> None:
    """Apply one `a.b=c`; the value is read as YAML."""
    key, equals, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        source.problems.append(Problem((), f"set {text}: write it as key.key=value"))
        return
    if path == ("base",):
        source.problems.append(Problem((), f"set {text}: a base is read before anything is set: write it in a recipe"))
        return
    try:
        parsed = parse_value(value)
    except yaml.YAMLError as error:
        why = getattr(error, "problem", None) or error
        source.problems.append(Problem(path, f"set {text}: the value is not valid YAML ({why})"))
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


def _entries(source: Source, section: str) -> list[str]:
    entries = source.data.get(section)
    return [str(name) for name in entries] if isinstance(entries, dict) else []


def _fill_presets(source: Source, places: Sequence[tuple[str, ...]]) -> None:
    """Replace `preset` of a training or of a UNIT translator by the settings it names; what stands beside it wins."""
    for path in places:
        owner: Any = source.data
        for key in path[:-1]:
            owner = owner.get(key) if isinstance(owner, dict) else None
        written = owner.get(path[-1]) if isinstance(owner, dict) else None
        kind = preset_kind(path)
        if not isinstance(written, dict) or written.get("preset") is None or written.get("kind", kind) != kind:
            continue
        name, known = written.pop("preset"), presets(kind)
        if isinstance(name, str) and name in known:
            owner[path[-1]] = over(known[name], written)
        else:
            message = f"{name!r} is not allowed{closest(str(name), known)}; allowed: {', '.join(known)}"
            source.problems.append(Problem((*path, "preset"), message))


def _typed_problems(kind: type[BaseModel], error: ValidationError, source: Source) -> Iterator[Problem]:
    for item, path in fitting(error.errors(), source.data):
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
            yield Problem(path, f"{in_words(item)}, got {kind_of(got)}{number}")


def _message(source: Source, problems: Iterator[Problem]) -> str:
    unique = list(dict.fromkeys(problems))
    head = f"{source.file}: {len(unique)} error{'s' if len(unique) > 1 else ''}; nothing was started."
    return hide_credentials("\n".join([head, *(f"  {_where(source, one)}{one.message}" for one in unique)]))


def _where(source: Source, problem: Problem) -> str:
    place = problem.line
    for length in range(len(problem.path), 0, -1):  # the key itself, or the nearest written one that encloses it
        if place:
            break
        place = source.places.get(problem.path[:length], "")
    words = [word for word in (place, ".".join(problem.path)) if word]
    return ": ".join([*words, ""])
