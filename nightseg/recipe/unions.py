"""Errors of pydantic as the user has to read them, where a value may be of several types.

Pydantic reports what is wrong with a value for every type that it might be of, and puts the name of that type into the
place of the error: `models.m.train.list[constrained-str]` and `models.m.train.dict[...].day` for one wrong weight.
Here the place is what was written, and of several types the one counts that the value is meant for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

Place = tuple[str, ...]

_KINDS: Final = {  # what a value of that type is called in YAML
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "dataclass_type": "a mapping",
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "none_required": "null",
}


def fitting(errors: Sequence[Any], data: Any) -> Iterator[tuple[Any, Place]]:
    """The errors (pydantic's) that are about `data` as it is meant, each with its place: the keys from the top.

    Of a value that none of the types can be meant by there is one error, of the type `no_member`.
    """
    written = json.loads(json.dumps(data, default=str))
    yield from _meant([_placed(error, written) for error in errors])


class _Placed(NamedTuple):
    """An error, the keys to its value, and on the way there the values of several types: their keys, and the type."""

    error: Any
    path: Place
    members: tuple[tuple[Place, str], ...]


def _meant(errors: Sequence[_Placed], depth: int = 0) -> Iterator[tuple[Any, Place]]:
    values: dict[Place, dict[str, list[_Placed]]] = {}
    for one in errors:
        if len(one.members) == depth:
            yield one.error, one.path
        else:
            at, member = one.members[depth]
            values.setdefault(at, {}).setdefault(member, []).append(one)
    for at, members in values.items():
        groups = list(members.values())
        fit = [group for group in groups if not any(one.path == at and _is_other(one.error) for one in group)]
        if fit or len(groups) == 1:
            yield from _meant(min(fit or groups, key=len), depth + 1)
        else:
            words = dict.fromkeys(_kind(one.error) for group in groups for one in group if one.path == at)
            yield {**groups[0][0].error, "type": "no_member", "msg": f"Input should be {' or '.join(words)}"}, at


def in_words(error: Any) -> str:
    """What a value should be, with YAML's words."""
    wanted = (
        f"Input should be {_KINDS[error['type']]}" if error["type"] in ("list_type", "tuple_type", "dict_type") else ""
    )
    message = wanted or error["msg"]
    return f"{message[0].lower()}{message[1:]}"


def _placed(error: Any, data: Any) -> _Placed:
    """What stands in pydantic's path and is not in the data is the name of a type, but for a key that is missing."""
    path: Place = ()
    members = []
    parts = [part for part in error["loc"] if part != "[key]"]
    for number, part in enumerate(parts, 1):
        is_key = part in data if isinstance(data, dict) else isinstance(part, int)
        if is_key or (number == len(parts) and error["type"] == "missing"):
            path = (*path, str(part))
            is_there = is_key and (isinstance(data, dict) or (isinstance(data, list) and part < len(data)))
            data = data[part] if is_there else None
        else:
            members.append((path, str(part)))
    return _Placed(error, path, tuple(members))


def _is_other(error: Any) -> bool:
    """Whether it says that the value is of another type altogether."""
    return error["type"] in _KINDS or error["type"] == "literal_error"


def _kind(error: Any) -> str:
    return _KINDS.get(error["type"]) or str(error["msg"]).removeprefix("Input should be ")
