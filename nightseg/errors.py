"""The one error that is the user's to solve, and the words that often solve it."""

import difflib
from collections.abc import Iterable, Sequence

MOST_NAMED = 5
_MOST_TOGETHER = 10


class UserError(ValueError):
    """The request cannot be done as it stands. Read by people as `WHERE: WHAT. Cure: CURE.`

    `what` begins with where it is wrong (file, line, dotted key, dataset, model) and a colon; `cure` is what to do.
    """

    def __init__(self, what: str, *, cure: str = "") -> None:
        super().__init__(f"{what.rstrip('.')}. Cure: {cure.removesuffix('.')}." if cure else what)
        self.what, self.cure = what, cure
        self.problems: list[UserError] = []  # of several in one, each


def closest(word: str, known: Iterable[str]) -> str:
    """`, did you mean 'x'?` to put behind a word that is not known, if a known one resembles it; else nothing."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {matches[0]!r}?" if matches else ""


def first_of(names: Sequence[str]) -> str:
    """The first names of a list that may be long, in words."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def together(problems: Sequence[UserError]) -> UserError:
    """Several as one, each once, so that all can be mended before the next try.

    Of many the first of each kind, which is known by its cure, and some more.
    """
    single = [one for problem in problems for one in problem.problems or [problem]]
    single = list({str(one): one for one in single}.values())
    if len(single) == 1:
        return single[0]
    kinds = {one.cure: one for one in reversed(single)}
    chosen = {id(one) for one in [*kinds.values(), *single[:_MOST_TOGETHER]]}
    shown = [str(one) for one in single if id(one) in chosen]
    shown += [f"and {len(single) - len(shown)} more like these"] if len(shown) < len(single) else []
    what = "\n- ".join([f"{len(single)} problems:", *shown])
    error = UserError(what, cure="all of these, then the same command")
    error.problems = single
    return error
