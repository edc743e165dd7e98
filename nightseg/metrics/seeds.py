"""Mean and spread over the seeds of a training, and differences of two models. Spread = sample standard deviation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

METRICS = ("pa", "ca", "miou", "fwiou")

Values = Sequence[float | None]


def mean(values: Values) -> float | None:
    """None where one of the values is not defined."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def deviation(values: Values) -> float | None:
    """The sample standard deviation (divided by n - 1); None for one value, or where one is not defined."""
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) == len(values) > 1 else None


def over_seeds(records: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of one test set by seed -> mIoU by seed, `mean` and `std` of each metric and of each class's IoU."""

    def summed_up(summary: Callable[[Values], float | None]) -> dict[str, Any]:
        some = next(iter(records.values()))
        values = {key: summary([record[key] for record in records.values()]) for key in METRICS if key in some}
        return values | {"iou": {n: summary([record["iou"][n] for record in records.values()]) for n in some["iou"]}}

    return {
        "seeds": {str(seed): record["miou"] for seed, record in records.items()},
        "mean": summed_up(mean),
        "std": summed_up(deviation),
    }


class Difference(NamedTuple):
    """A model over another: of means, and its spread (None where one of the two has one seed)."""

    mean: float
    std: float | None
    is_paired: bool  # seed by seed: the spread is that of the differences, else the root of the sum of squares


def least_gain(ours: Mapping[str, float], theirs: Mapping[str, float]) -> float | None:
    """What a difference must exceed to be more than another draw of the seeds would bring: its standard deviation.

    A model with one seed is taken to spread as the other does; None where both have one: nothing is known of others.
    """
    found = difference(ours, theirs).std
    known = [spread for values in (ours, theirs) if (spread := deviation([*values.values()])) is not None]
    return math.sqrt(2) * known[0] if found is None and known else found


def difference(ours: Mapping[str, float], theirs: Mapping[str, float]) -> Difference:
    """Values by seed of two models; over the same seeds they are paired, since these share starts and sample orders."""
    if ours.keys() == theirs.keys():
        pairs = [ours[seed] - theirs[seed] for seed in ours]
        return Difference(statistics.fmean(pairs), deviation(pairs), True)
    spreads = deviation([*ours.values()]), deviation([*theirs.values()])
    gain = statistics.fmean(ours.values()) - statistics.fmean(theirs.values())
    known = [spread for spread in spreads if spread is not None]
    return Difference(gain, math.hypot(*known) if len(known) == 2 else None, False)
