"""Where files lie, as people write it: a folder, `left/**/*.jpg`, or a template `masks/{city}/{name}_gt.png`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from nightseg.errors import UserError

NAME = "name"  # the placeholder that may hold folders: what is left of a path

_TOKEN = re.compile(r"\*\*/|\*\*|\*|\?|\[[^\]/]+\]|\{(\w+)\}")
_SPECIAL = re.compile(r"[*?\[{]")


class Pattern(NamedTuple):
    """Files below a folder (relative, "" = where it starts); `places` are the placeholders of a template."""

    text: str
    folder: str
    rest: str  # below the folder; "" = all files
    places: tuple[str, ...]

    def match(self, name: str) -> dict[str, str] | None:
        """What the placeholders stand for in the name of a file below the folder; None if it does not fit."""
        if not self.rest:
            return {}
        found = re.fullmatch(_expression(self.rest), name)
        return None if found is None else found.groupdict()

    def filled(self, values: Mapping[str, str]) -> str:
        """The name of a file below the folder, as the template says it."""
        return re.sub(r"\{(\w+)\}", lambda place: values[place[1]], self.rest)


EVERYTHING = Pattern("", "", "", ())


def pattern_of(text: str) -> Pattern:
    """Take a pattern apart. Raises UserError: a brace that is not closed, a placeholder without a name."""
    if re.sub(r"\{\w+\}", "", text).count("{") or re.sub(r"\{\w+\}", "", text).count("}"):
        raise UserError(f"{text!r}: a brace without a placeholder", cure="write placeholders as {name} or {city}")
    parts = text.strip("/").split("/") if text.strip("/") else []
    fixed = next((index for index, part in enumerate(parts) if _SPECIAL.search(part)), len(parts))
    start = "/" if text.startswith("/") else ""
    return Pattern(
        text,
        start + "/".join(parts[:fixed]),
        "/".join(parts[fixed:]),
        tuple(dict.fromkeys(re.findall(r"\{(\w+)\}", text))),
    )


def _expression(text: str) -> str:
    parts: list[str] = []
    seen: set[str] = set()
    at = 0
    for token in _TOKEN.finditer(text):
        parts.append(re.escape(text[at : token.start()]))
        at = token.end()
        match token[0]:
            case "**/":
                parts.append("(?:.*/)?")
            case "**":
                parts.append(".*")
            case "*":
                parts.append("[^/]*")
            case "?":
                parts.append("[^/]")
            case bracket if bracket.startswith("["):
                parts.append(bracket.replace("[!", "[^"))
            case _:
                name = token[1]
                inside = ".+" if name == NAME else "[^/]+"
                parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>{inside})")
                seen.add(name)
    parts.append(re.escape(text[at:]))
    last = text.rpartition("/")[2]
    if not re.search(r"\.(\w+|\*|\{\w+\})$", last) and not last.endswith("*"):
        parts.append(r"(?:\.[^./]+)?")  # any suffix
    return "".join(parts)
