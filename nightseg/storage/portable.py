"""Places in a run folder, as `run:stages/...` where they are stored and absolute where they are read.

So what stages say to each other depends neither on where the folder lies nor on whether it was moved meanwhile. A trial
of a search (`SEARCH/trials/NAME`) borrows from `SEARCH/shared` and from other trials; these move along with it, and are
`search:shared/stages/...` and `search:trials/NAME/stages/...`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from nightseg.storage.paths import Location

IN_RUN: Final = "run:"  # begins a path that is relative to the run folder
IN_SEARCH: Final = "search:"  # to the folder of the search that the run is a trial of


class _Rule(NamedTuple):
    """Of a text that begins with `start` and goes on with `then`, the start is replaced."""

    start: str
    then: str
    instead: str

    @property
    def pattern(self) -> str:
        return f"^{re.escape(self.start)}({self.then})"


def portable(table: pa.Table, root: Location) -> pa.Table:
    """The table with the places below the run folder in its columns of places (`uri`, `..._uri`) as `run:...`."""
    return _with(table, _to_store(root))


def absolute(table: pa.Table, root: Location) -> pa.Table:
    return _with(table, _to_read(root))


def portable_json(obj: Any, root: Location) -> Any:
    """The same for every text in something that is JSON."""
    return _with_in_json(obj, _replacing(_to_store(root)))


def absolute_json(obj: Any, root: Location) -> Any:
    return _with_in_json(obj, _replacing(_to_read(root)))


def _to_store(root: Location) -> list[_Rule]:
    search = _search_of(root)
    of_others = [_Rule(f"{search}/", "(?:shared|trials/[^/]+)/stages/", IN_SEARCH)] if search else []
    return [_Rule(f"{root.uri}/", "", IN_RUN), *of_others]


def _to_read(root: Location) -> list[_Rule]:
    search = _search_of(root)
    return [_Rule(IN_RUN, "", f"{root.uri}/"), *([_Rule(IN_SEARCH, "", f"{search}/")] if search else [])]


def _search_of(root: Location) -> str | None:
    search, *rest = root.uri.rsplit("/", 2)
    return search if len(rest) == 2 and rest[0] == "trials" else None


def _with(table: pa.Table, rules: list[_Rule]) -> pa.Table:
    for index, name in enumerate(table.column_names):
        if (name != "uri" and not name.endswith("_uri")) or not pa.types.is_string(table[name].type):
            continue
        for rule in rules:
            column = table[name]
            fits = pc.match_substring_regex(column, rule.pattern) if rule.then else pc.starts_with(column, rule.start)
            if pc.any(fits).as_py():
                rest = pc.utf8_slice_codeunits(column, len(rule.start))
                moved = pc.binary_join_element_wise(rule.instead, rest, "")
                table = table.set_column(index, name, pc.if_else(fits, moved, column))
    return table


def _replacing(rules: list[_Rule]) -> Callable[[str], str]:
    def replaced(text: str) -> str:
        for rule in rules:
            if text.startswith(rule.start) and re.match(rule.then, text[len(rule.start) :]):
                return rule.instead + text[len(rule.start) :]
        return text

    return replaced


def _with_in_json(obj: Any, replaced: Callable[[str], str]) -> Any:
    match obj:
        case str():
            return replaced(obj)
        case Mapping():
            return {key: _with_in_json(value, replaced) for key, value in obj.items()}
        case list() | tuple():
            return [_with_in_json(value, replaced) for value in obj]
    return obj
