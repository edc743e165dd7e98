"""Rank correlation."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation of pairs, in [-1, 1]; equal values share their mean rank.

    None where it is not defined: fewer than two pairs, or all values of one side are equal.
    """
    ranks = [_ranks(first), _ranks(second)]
    if len(first) < 2 or any(len(set(part)) < 2 for part in ranks):
        return None
    return statistics.correlation(*ranks)


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) + 1) / 2 for value in values]
