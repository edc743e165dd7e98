"""When a training of UNIT has gone wrong: terms that are no numbers, or a discriminator that teaches nothing.

A discriminator teaches nothing in two ways. It has won when its loss is below a thousandth of what it would be if it
could not tell real from translated: every patch is judged with certainty, and what the generators get is noise. It is
dead when it gives every patch of every image the same score. Either may pass, so it must last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

WON_SHARE: Final = 1e-3  # of the loss of a coin
DEAD_GAP: Final = 1e-4  # between scores that aim at 0 and 1

Row = Mapping[str, float]  # "iteration", and the mean of every loss term since the row before


def not_finite(row: Row) -> list[str]:
    """The terms of a row that are infinite or not a number."""
    return [name for name, value in row.items() if not math.isfinite(value)]


def ailing(row: Row, coin: float) -> str | None:
    """Which discriminator teaches nothing in this row, and how; None if both do.

    `coin` is the loss, over all scales, of a discriminator that cannot tell (`loss_of_a_coin` times the scales).
    """
    for domain in ("day", "night"):
        if row[f"discriminator_{domain}"] < WON_SHARE * coin:
            loss = f"its loss is below {WON_SHARE * coin:.2g}, a thousandth of a coin's"
            return f"the {domain} discriminator has won: {loss}"
        if row[f"discriminator_gap_{domain}"] < DEAD_GAP:
            return f"the {domain} discriminator is dead: it gives every patch the same score, to {DEAD_GAP:g}"
    return None


def collapsed(history: Sequence[Row], *, lasting: int, coin: float) -> str | None:
    """The ailment of all rows of the last `lasting` iterations, if they all have the same; not before as many."""
    if not history or history[-1]["iteration"] < lasting:
        return None
    begin = history[-1]["iteration"] - lasting
    ailments = {ailing(row, coin) for row in history if row["iteration"] > begin}
    if len(ailments) > 1:
        return None
    (ailment,) = ailments
    return None if ailment is None else f"{ailment}, in all of the last {lasting} iterations"
