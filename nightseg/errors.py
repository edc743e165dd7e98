"""The one error that is the user's to solve, and the hint that often solves it."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The request cannot be done as it stands; the message says what, where, why and the cure."""


def closest(word: str, known: Iterable[str]) -> str:
    """`, did you mean 'x'?` to put behind a word that is not known, if a known one resembles it; else nothing."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {matches[0]!r}?" if matches else ""
