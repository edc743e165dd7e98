"""The one error that is the user's to solve, and the words that often solve it."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

MOST_NAMED = 5
_MOST_ALIKE = 3
_MOST_KINDS = 10


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
    by_lower = {one.lower(): one for one in known}  # what differs in case alone is the closest of all
    matches = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f", did you mean {by_lower[matches[0]]!r}?" if matches else ""


def first_of(names: Sequence[str]) -> str:
    """The first names of a list that may be long, in words."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def together(problems: Sequence[UserError]) -> UserError:
    """Several as one, each once, so that all can be mended before the next try.

    Those of one kind, which is known by its cure, stand together: the first of them, how many more, and the cure once.
    """
    single = [one for problem in problems for one in problem.problems or [problem]]
    single = list({str(one): one for one in single}.values())
    placed = {(rest, one.cure) for one in single for rest in _after_its_place(one)}
    single = [one for one in single if (one.what.rstrip("."), one.cure) not in placed]
    if len(single) == 1:
        return single[0]
    kinds: dict[str, list[UserError]] = {}
    for one in single:
        kinds.setdefault(one.cure, []).append(one)
    of_all = next(iter(kinds)) if len(kinds) == 1 else ""
    shown = [_of_kind(cure if len(kinds) > 1 else "", alike) for cure, alike in kinds.items()]
    rest = sum(len(alike) for alike in list(kinds.values())[_MOST_KINDS:])
    shown = [*shown[:_MOST_KINDS], *([f"and {rest} more"] if rest else [])]
    what = "\n- ".join([f"{len(single)} problems:", *shown])
    error = UserError(what, cure=of_all or "all of these, then the same command")
    error.problems = single
    return error


def all_of(*steps: Callable[[], Any]) -> list[Any]:
    """What each step returns; if any raises UserError, the others are tried still, and all problems are one."""
    found: list[Any] = []
    problems: list[UserError] = []
    for step in steps:
        with kept(problems):
            found.append(step())
    if problems:
        raise together(problems)
    return found


@contextmanager
def kept(problems: list[UserError]) -> Iterator[None]:
    """A UserError of the body goes to `problems`, which `together` raises later."""
    try:
        yield
    except UserError as error:
        problems.append(error)


def _after_its_place(one: UserError) -> Iterator[str]:
    """What the problem says without the places before it: somebody who did not know them may have told it, too."""
    parts = one.what.rstrip(".").split(": ")
    return (": ".join(parts[first:]) for first in range(1, len(parts)))


def _of_kind(cure: str, alike: Sequence[UserError]) -> str:
    more = f"and {len(alike) - _MOST_ALIKE} more like these" if len(alike) > _MOST_ALIKE else ""
    told = [one.what.rstrip(".") for one in alike[:_MOST_ALIKE]] + [more] * bool(more)
    return str(UserError("\n- ".join(told), cure=cure))
