"""YAML of settings: duplicate keys are found, alias bombs refused, `1e-4` is a number, and every key has its line."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import yaml

from nightseg.errors import UserError
from nightseg.storage.paths import Location

MAX_NODES = 100_000  # after aliases are followed: settings are few, an alias bomb is not
_TAG = "tag:yaml.org,2002:"
_MOST_SHOWN = 40  # characters of a value

Path = tuple[str, ...]


class Parsed(NamedTuple):
    """The mapping of a file, the line of each of its keys, and the keys that stand twice in one mapping.

    `marks`: where in the file each key is written. What aliases and merges (`<<`) repeat has the mark of the original.
    """

    data: dict[str, Any]
    lines: dict[Path, int]
    twice: list[tuple[Path, int]]
    marks: dict[Path, int]


class _Key(NamedTuple):
    path: Path
    line: int
    mark: int
    is_twice: bool  # it repeats an earlier one of its mapping


class Loader(yaml.SafeLoader):
    """SafeLoader that reads floats as YAML 1.2 does: YAML 1.1 takes `1e-4` for a string. Dates are text: none is meant.

    Raises yaml.YAMLError, with the line, also for scalars that Python cannot hold or that are none of their tag.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int):
                str(value)  # Python writes none of thousands of digits, and messages and JSON would
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as fault:
            text = node.value if isinstance(node, yaml.ScalarNode) else type(node.value).__name__
            shown = f"{text[:_MOST_SHOWN]!r}{'...' if len(text) > _MOST_SHOWN else ''}"
            problem = f"{shown} is no {node.tag.removeprefix(_TAG)} (in quotes it is text)"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from fault
        return value


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag not in (f"{_TAG}float", f"{_TAG}timestamp")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(
        r"^[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)$|^[-+]?\.(?:inf|nan)$", re.I
    ),
    list("-+0123456789."),
)


def read_yaml(file: Location, shown: str, what: str, error: type[UserError] = UserError) -> Parsed:
    """Parse a file that is one mapping. Raises `error`; it calls the file `shown`, and what it holds `what`."""
    with _told_of(shown, error):
        loader = Loader(_text_of(file, shown, what, error))
        return _parsed(loader, loader.get_single_node(), shown, what, error)


def read_documents(file: Location, shown: str, what: str, error: type[UserError] = UserError) -> list[Parsed]:
    """The same of a file that may be several mappings, divided by `---`. Those without content are left out."""
    found: list[Parsed] = []
    with _told_of(shown, error):
        loader = Loader(_text_of(file, shown, what, error))
        while loader.check_node():
            node = loader.get_node()
            if not (isinstance(node, yaml.ScalarNode) and node.tag == f"{_TAG}null"):
                found.append(_parsed(loader, node, shown, what, error))
    return found


def parse_value(text: str | bytes) -> Any:
    """What stands behind a key, as in a file; also a whole one of another program. Raises yaml.YAMLError."""
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if sum(1 for _ in islice(_walk(node, ()), MAX_NODES + 1)) > MAX_NODES:
            raise yaml.YAMLError(f"more than {MAX_NODES} entries once aliases are followed")
        return None if node is None else _unshared(loader.construct_document(node))
    except RecursionError as fault:
        raise yaml.YAMLError("it is nested too deeply") from fault


def _text_of(file: Location, shown: str, what: str, error: type[UserError]) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise error(f"{shown}: there is no such {what} file", cure="give the path of a YAML file") from None
    except UnicodeDecodeError as fault:
        found = f"{shown}: the {what} is not UTF-8 text ({fault.reason} at byte {fault.start})"
        raise error(found, cure="save it as UTF-8") from None


@contextmanager
def _told_of(shown: str, error: type[UserError]) -> Iterator[None]:
    try:
        yield
    except (yaml.YAMLError, RecursionError) as fault:
        mark = getattr(fault, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        found = f"{shown}: {where}not valid YAML: {getattr(fault, 'problem', None) or fault}"
        raise error(found, cure="mend the file there") from None


def _parsed(loader: Loader, node: yaml.Node | None, shown: str, what: str, error: type[UserError]) -> Parsed:
    lines: dict[Path, int] = {}
    twice: list[tuple[Path, int]] = []
    marks: dict[Path, int] = {}
    for count, key in enumerate(_walk(node, ())):
        if count > MAX_NODES:
            many = f"{shown}: more than {MAX_NODES} entries once aliases are followed"
            raise error(many, cure="use fewer aliases")
        if key.is_twice:
            twice.append((key.path, key.line))
        lines.setdefault(key.path, key.line)
        marks.setdefault(key.path, key.mark)
    data = loader.construct_document(node) if node is not None else {}
    if not isinstance(data, dict):
        raise error(f"{shown}: a {what} is a mapping, not {kind_of(data)}", cure="write keys (name: ...) and values")
    return Parsed(_unshared(data), lines, twice, marks)


def _unshared(value: Any) -> Any:
    """Without aliases: what an override changes in one place does not change in another."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _walk(node: yaml.Node | None, path: Path, known: Collection[str] = ()) -> Iterator[_Key]:
    """Every key below a node, what is written before what is merged; without those that are `known` of its mapping."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        merged: list[yaml.Node] = []
        for key, value in node.value:
            name = str(key.value)
            if key.tag == f"{_TAG}merge":
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
            elif name not in known:
                yield _Key((*path, name), key.start_mark.line + 1, key.start_mark.index, name in seen)
                yield from _walk(value, (*path, name))
            seen.add(name)
        for source in merged:
            yield from _walk(source, path, {*seen, *known})
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield _Key((*path, str(index)), value.start_mark.line + 1, value.start_mark.index, False)
            yield from _walk(value, (*path, str(index)))


def kind_of(value: Any) -> str:
    """A value in words, for messages."""
    match value:
        case None:
            return "nothing (null)"
        case bool():
            return f"{str(value).lower()} (true or false)"
        case str():
            return f"the text {value!r}"
        case int() | float():
            return f"the number {value}"
        case list():
            return "a list"
        case dict():
            return "a mapping"
        case _:
            return f"{type(value).__name__} {value!r}"
