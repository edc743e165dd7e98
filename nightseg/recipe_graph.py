"""The names of a recipe as a graph: unknown names, cycles, missing folders, settings that contradict each other.

Works on the raw mapping and skips whatever has the wrong shape: the types (`config.py`) report that themselves.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from nightseg.storage import Location, UserError

STARTS = ("imagenet", "scratch")
Key = tuple[str, str]  # section, name


class Problem(NamedTuple):
    """One thing that is wrong, at a dotted path."""

    path: tuple[str, ...]
    message: str
    line: str = ""


class Reference(NamedTuple):
    """`owner` cannot be made before the thing of `section` that `name` names."""

    owner: Key
    path: tuple[str, ...]
    section: str
    name: str


def graph_problems(data: Mapping[str, Any]) -> list[Problem]:
    """All problems of the graph, in the order of the recipe."""
    references = list(_references(data))
    problems = [problem for reference in references if (problem := _unknown(data, reference))]
    problems += _cycles(references)
    problems += _contradictions(data)
    problems += _missing_folders(data)
    return problems


def _section(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = data.get(name)
    return {str(key): entry for key, entry in value.items()} if isinstance(value, Mapping) else {}


def _references(data: Mapping[str, Any]) -> Iterator[Reference]:
    for name, entry in _section(data, "datasets").items():
        yield from _named(("datasets", name), entry, {"translate": "datasets", "by": "translators", "join": "datasets"})
        if isinstance(entry, Mapping) and "layout" not in entry:
            yield from _named(("datasets", name), entry, {"split": "datasets"})
    for name, entry in _section(data, "translators").items():
        yield from _named(("translators", name), entry, {"day": "datasets", "night": "datasets"})
    for name, entry in _section(data, "models").items():
        owner = ("models", name)
        yield from _named(owner, entry, {"train": "datasets", "validate_on": "datasets"})
        if not isinstance(entry, Mapping):
            continue
        if isinstance(entry.get("start"), str) and entry["start"] not in STARTS:
            yield Reference(owner, (*owner, "start"), "models", entry["start"])
        learning = entry.get("self_training")
        if isinstance(learning, Mapping):
            yield from _named(owner, learning, {"pool": "datasets", "teacher": "models"}, "self_training")
            yield from _named(owner, learning.get("select"), {"reference": "datasets"}, "self_training", "select")
        if isinstance(entry.get("test"), Mapping):
            for test in entry["test"]:
                yield Reference(("evaluations", name), (*owner, "test", str(test)), "test_sets", str(test))
    for name, entry in _section(data, "test_sets").items():
        if isinstance(entry, str):
            yield Reference(("test_sets", name), ("test_sets", name), "datasets", entry)
    for name, entry in _section(data, "predictions").items():
        yield from _named(("predictions", name), entry, {"dataset": "datasets", "model": "models"})


def _named(owner: Key, entry: Any, keys: Mapping[str, str], *inside: str) -> Iterator[Reference]:
    if not isinstance(entry, Mapping):
        return
    for key, section in keys.items():
        value = entry.get(key)
        path = (*owner, *inside, key)
        if isinstance(value, str):
            yield Reference(owner, path, section, value)
        elif isinstance(value, list):
            yield from (
                Reference(owner, (*path, str(index)), section, item)
                for index, item in enumerate(value)
                if isinstance(item, str)
            )


def _unknown(data: Mapping[str, Any], reference: Reference) -> Problem | None:
    known = sorted(_section(data, reference.section))
    if reference.name in known:
        return None
    offered = [*STARTS, *known] if reference.path[-1] == "start" else known
    close = difflib.get_close_matches(reference.name, offered, n=1)
    hint = f", did you mean {close[0]!r}?" if close else ""
    kind = reference.section.replace("_", " ").rstrip("s")
    return Problem(
        reference.path, f"there is no {kind} {reference.name!r}{hint}; known: {', '.join(offered) or 'none'}"
    )


def _cycles(references: list[Reference]) -> list[Problem]:
    needs: dict[Key, list[Reference]] = {}
    for reference in references:
        needs.setdefault(reference.owner, []).append(reference)
    finished: set[Key] = set()
    problems: list[Problem] = []

    def visit(key: Key, trail: list[Key]) -> None:
        if key in finished:
            return
        if key in trail:
            loop = [*trail[trail.index(key) :], key]
            shown = " needs ".join(f"{section[:-1]} {name}" for section, name in loop)
            problems.append(Problem(key, f"a cycle, so none of them can be made first: {shown}"))
            return
        for reference in needs.get(key, []):
            visit((reference.section, reference.name), [*trail, key])
        finished.add(key)

    for key in list(needs):
        visit(key, [])
    return problems


def _contradictions(data: Mapping[str, Any]) -> Iterator[Problem]:
    datasets = _section(data, "datasets")
    for name, entry in _section(data, "models").items():
        if not isinstance(entry, Mapping):
            continue
        path = ("models", name)
        learning = entry.get("self_training")
        if not isinstance(learning, Mapping):
            if entry.get("rounds", 1) != 1:
                yield Problem((*path, "rounds"), "rounds repeat a self-training, and this model has none")
            continue
        start = entry.get("start", "imagenet")
        if start in STARTS and not learning.get("teacher"):
            yield Problem(
                (*path, "self_training"), f"starting from {start} needs a teacher: the model that labels the pool"
            )
        select = learning.get("select")
        if not isinstance(select, Mapping) or select.get("method", "pooled") == "random" or select.get("reference"):
            continue
        train = entry.get("train") if isinstance(entry.get("train"), list) else []
        if not any(isinstance(datasets.get(item), Mapping) and "translate" in datasets[item] for item in train):
            yield Problem(
                (*path, "self_training", "select", "reference"),
                "no train set of this model is translated, so say which dataset the chosen frames should be close to",
            )


def _missing_folders(data: Mapping[str, Any]) -> Iterator[Problem]:
    for name, entry in _section(data, "datasets").items():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("root"), str) or "{" in entry["root"]:
            continue
        path = ("datasets", name, "root")
        try:
            if not Location.of(entry["root"]).is_folder():
                yield Problem(path, f"there is no folder {entry['root']!r}; give it with --set roots.NAME=FOLDER or --set {'.'.join(path)}=FOLDER")
        except (UserError, OSError) as error:
            yield Problem(path, f"cannot look into {entry['root']!r}: {error}")
