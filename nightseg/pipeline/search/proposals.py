"""The values of the next trial: a function of the search, of the trial's number and of the trials before it.

Nothing is kept between two calls, so nothing can be lost: whoever knows the same trials proposes the same values, also
after a kill. Optuna's sampler is made anew for every trial, with a seed of its own, and told all that is known.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, Final

from nightseg.pipeline.search.settings import Dimension, Search
from nightseg.storage import hash_of

_ATTEMPTS: Final = 50  # at values that no trial has had yet, before one of those that are left is taken
_DIGITS: Final = 4  # of a real number, at least: what is shown is what is run
_STEPS: Final = 1000  # of a range, at least: where it is narrow, numbers have more digits


def propose(search: Search, number: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Values that none of `rows` (in the order of their numbers) has; None if there are none left."""
    known = {hash_of(row["values"]) for row in rows}
    if len(known) >= search.size:
        return None
    if search.sampler != "grid":
        for attempt in range(_ATTEMPTS):
            values = _asked(search, int(hash_of([search.seed, number, attempt])[:8], 16), rows)
            if hash_of(values) not in known:
                return values
    if math.isinf(search.size):
        return None
    order = random.Random(search.seed)  # noqa: S311 (not a secret)
    while True:
        values = {key: one.value(order.randrange(int(one.size))) for key, one in search.space.items()}
        if hash_of(values) not in known:
            return values


def _asked(search: Search, seed: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    begin = 1 + 2 * len(search.space)  # trials at random before TPE has something to learn from
    sampler: Any = (
        optuna.samplers.RandomSampler(seed=seed)
        if search.sampler == "random"
        else optuna.samplers.TPESampler(seed=seed, n_startup_trials=begin, constant_liar=True)
    )
    asked = study(search, rows, sampler).ask(distributions(search)).params
    return {key: _rounded(search.space[key], value) for key, value in asked.items()}


def _rounded(dimension: Dimension, value: Any) -> Any:
    """A real number in so few digits that 0.2345 is one, and in so many that any range has many values."""
    if dimension.range is None or not isinstance(value, float) or value == 0:
        return value
    low, high = dimension.range
    step = (abs(value) * math.log(high / low) if dimension.is_log else high - low) / _STEPS
    decimals = max(_DIGITS - 1 - math.floor(math.log10(abs(value))), -math.floor(math.log10(step) + 1e-9))
    return min(max(round(value, decimals), low), high)


def study(search: Search, rows: Sequence[Mapping[str, Any]], sampler: Any = None) -> Any:
    """An Optuna study that knows these trials. One that is at work counts as begun, one that failed as such."""
    import optuna
    from optuna.trial import TrialState

    states = {"done": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}
    made = optuna.create_study(direction="maximize" if search.mode == "max" else "minimize", sampler=sampler)
    for row in rows:
        made.add_trial(
            optuna.trial.create_trial(
                state=states.get(row["end"], TrialState.RUNNING),
                params=row["values"],
                distributions=distributions(search),
                value=row[search.metric] if row["end"] == "done" else None,
                intermediate_values=dict(row["curve"]) if row["end"] == "stopped" else None,
            )
        )
    return made


def distributions(search: Search) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    def distribution(one: Dimension) -> Any:
        if one.range is None:
            return CategoricalDistribution(one.choice)
        return (IntDistribution if one.is_whole else FloatDistribution)(*one.range, log=one.is_log)

    return {key: distribution(one) for key, one in search.space.items()}
