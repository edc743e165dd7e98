"""Places in a run folder, as `run:stages/...` where they are stored and absolute where they are read.

So what stages say to each other depends neither on where the folder lies nor on whether it was moved meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from nightseg.storage.paths import Location

IN_RUN: Final = "run:"  # begins a path that is relative to the run folder


def portable(table: pa.Table, root: Location) -> pa.Table:
    """The table with the places below the run folder in its columns of places (`uri`, `..._uri`) as `run:...`."""
    return _with(table, f"{root.uri}/", IN_RUN)


def absolute(table: pa.Table, root: Location) -> pa.Table:
    return _with(table, IN_RUN, f"{root.uri}/")


def portable_json(obj: Any, root: Location) -> Any:
    """The same for every text in something that is JSON."""
    return _with_in_json(obj, f"{root.uri}/", IN_RUN)


def absolute_json(obj: Any, root: Location) -> Any:
    return _with_in_json(obj, IN_RUN, f"{root.uri}/")


def _with(table: pa.Table, start: str, instead: str) -> pa.Table:
    for index, name in enumerate(table.column_names):
        column, is_place = table[name], name == "uri" or name.endswith("_uri")
        if is_place and pa.types.is_string(column.type) and pc.any(pc.starts_with(column, start)).as_py():
            rest = pc.utf8_slice_codeunits(column, len(start))
            moved = pc.binary_join_element_wise(instead, rest, "")
            table = table.set_column(index, name, pc.if_else(pc.starts_with(column, start), moved, column))
    return table


def _with_in_json(obj: Any, start: str, instead: str) -> Any:
    match obj:
        case str():
            return instead + obj.removeprefix(start) if obj.startswith(start) else obj
        case Mapping():
            return {key: _with_in_json(value, start, instead) for key, value in obj.items()}
        case list() | tuple():
            return [_with_in_json(value, start, instead) for value in obj]
    return obj
