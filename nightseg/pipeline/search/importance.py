"""How much each searched value explains of the scores alone.

Optuna's measures need more trials than a search of a training has: with a dozen, PED-ANOVA names another value for
each share of best trials that it is asked about, and fANOVA needs scikit-learn for a forest that has nothing to learn
from. An analysis of variance with three groups is defined for few. Chance remains: of twelve trials, a value that
decides nothing is said to explain more than 27 % in one search of ten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from nightseg.pipeline.search.settings import Search

_LEAST: Final = 6  # trials


def importance(search: Search, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Key -> the share (0 to 1) of the spread of the scores that its value explains, largest first.

    Of the finished trials; empty where there are too few, or all have the same score. Shares need not add up to 1:
    values act together and within a group, and what the seed of a training does is explained by none.
    """
    done = [row for row in rows if row["end"] == "done"]
    scores = np.array([row[search.metric] for row in done], dtype=np.float64)
    if len(done) < _LEAST or np.ptp(scores) == 0:
        return {}
    shares = {key: explained(groups([row["values"][key] for row in done]), scores) for key in search.space}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def groups(values: Sequence[Any]) -> npt.NDArray[np.int64]:
    """(N,) the group of each value: a group a value where there are few, else low, middle and high by their mean rank.

    Equal values are in one group, whatever the others are, and the groups of a list are those of its mirror.
    """
    distinct, places = np.unique([repr(value) for value in values], return_inverse=True)
    is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if len(distinct) <= 3 or not is_number:
        return places.astype(np.int64)
    numbers = np.array(values, dtype=np.float64)
    below_N = (numbers[:, None] > numbers).sum(axis=1)
    rank_N = below_N + (numbers[:, None] == numbers).sum(axis=1) / 2  # from 0 to N, in the middle of equal ones
    found: npt.NDArray[np.int64] = (3 * rank_N >= len(numbers)).astype(np.int64) + (3 * rank_N > 2 * len(numbers))
    return found


def explained(groups_N: npt.NDArray[np.int64], scores_N: npt.NDArray[np.float64]) -> float:
    """Epsilon squared (Kelley, Proc. Natl. Acad. Sci. 21, 1935): the share of the variance of the scores that lies
    between the groups, less what groups by chance would have; not below 0."""
    parts = [scores_N[groups_N == group] for group in np.unique(groups_N)]
    total = float(((scores_N - scores_N.mean()) ** 2).sum())
    within = float(sum(((part - part.mean()) ** 2).sum() for part in parts))
    freedom = len(scores_N) - len(parts)
    if freedom < 1 or total == 0:
        return 0.0
    return max(0.0, 1 - (within / freedom) * (len(scores_N) - 1) / total)
