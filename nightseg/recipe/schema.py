"""What the recipe's types allow at a place: for error messages that show the keys one may write."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Tag

from nightseg.recipe.types import Recipe

Path = Sequence[int | str]


def dotted(path: Path, data: Any) -> tuple[str, ...]:
    """The place of an error as the user wrote it: without the tags that pydantic adds for kinds of things."""
    words = [str(part) for part in path if part != "[key]"]
    section = Recipe.model_fields.get(words[0]) if words else None
    tags = {tag for kind in _members(section.annotation) for tag in _tags(kind)} if section else set()
    if len(words) > 2 and words[2] in tags:
        del words[2]
    return tuple(words)


def allowed_keys(kind: type[BaseModel], path: Path) -> list[str]:
    """The keys of the mapping at `path` (pydantic's own path, tags included), in the order of the types."""
    current: Any = kind
    for part in path:
        current = _step(current, part)
    models = [kind for kind in _members(current) if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return list(dict.fromkeys(key for model in models for key in model.model_fields))


def allowed_values(kind: type[BaseModel], path: Path) -> list[str]:
    """The words allowed at `path`, over all kinds of thing that may stand there (a layout of any kind of dataset)."""
    current: Any = kind
    for part in path[:-1]:
        if not _is_dict(current) and part in {tag for kind in _members(current) for tag in _tags(kind)}:
            continue
        current = _step(current, part)
    words: list[str] = []
    for kind in _members(current):
        bare = _bare(kind)
        if isinstance(bare, type) and issubclass(bare, BaseModel) and path[-1] in bare.model_fields:
            for choice in _members(bare.model_fields[str(path[-1])].annotation):
                words += [str(word) for word in get_args(choice)] if get_origin(choice) is Literal else []
    return list(dict.fromkeys(words))


def _step(current: Any, part: int | str) -> Any:
    if _is_dict(current):  # a name, even if it is also that of a kind
        return get_args(_bare(current))[1]
    for kind in _members(current):
        if part in _tags(kind):
            return get_args(kind)[0]
        bare = _bare(kind)
        if isinstance(bare, type) and issubclass(bare, BaseModel) and part in bare.model_fields:
            field = bare.model_fields[str(part)]
            return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        if get_origin(bare) is dict:
            return get_args(bare)[1]
        if get_origin(bare) in (list, tuple):
            return get_args(bare)[0]
    return current


def _is_dict(kind: Any) -> bool:
    return get_origin(_bare(kind)) is dict


def _bare(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _tags(kind: Any) -> set[str]:
    return (
        {extra.tag for extra in get_args(kind)[1:] if isinstance(extra, Tag)}
        if get_origin(kind) is Annotated
        else set()
    )


def _members(kind: Any) -> list[Any]:
    """The alternatives of a union (tagged ones keep their tag), or of a dict's values, or the type itself."""
    if get_origin(kind) is Annotated and not _tags(kind):
        return _members(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [member for alternative in get_args(kind) for member in _members(alternative)]
    if get_origin(kind) is dict and any(_tags(member) for member in _members(get_args(kind)[1])):
        return _members(get_args(kind)[1])
    return [kind]
