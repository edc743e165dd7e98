"""Rank correlation."""

from __future__ import annotations

from collections.abc import Sequence


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation of pairs, in [-1, 1]; equal values share their mean rank.

    None where it is not defined: fewer than two pairs, or all values of one side are equal.
    """
    from scipy import stats  # as slow to import as a whole run without changes

    if len(first) < 2 or any(len(set(part)) < 2 for part in (first, second)):
        return None
    return float(stats.spearmanr(first, second).statistic)
