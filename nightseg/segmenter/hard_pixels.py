"""Online hard example mining: of each frame, the pixels the network is least sure of (arXiv 1604.03540, for pixels).

B images, H x W pixels. The choice is made frame by frame, so it does not depend on how a batch is shared between
workers or parts; and by comparison with a value, so equal pixels are all kept or all left out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class HardPixels(NamedTuple):
    """Which pixels are learned from: exactly one of `share` and `confidence` is given.

    `share`: this share of a frame's valid pixels, the hardest, in (0, 1]. `confidence`: those whose true class has at
    most this probability, and if these are fewer than `least`, the `least` hardest.
    """

    share: float | None
    confidence: float | None
    least: int


def hard_pixels(surprise_BHW: Tensor, valid_BHW: Tensor, choice: HardPixels) -> Tensor:
    """bool BHW: the hard ones among the valid pixels, by `surprise_BHW` = -log p_t. No wait for the device."""
    surprise_BN = surprise_BHW.flatten(1).masked_fill(~valid_BHW.flatten(1), -1.0)  # a surprise is never negative
    num_valid_B = valid_BHW.flatten(1).sum(dim=1)
    if choice.share is not None:
        wanted_B = (num_valid_B.double() * choice.share).round().long().clamp_min(1)
        limit_B1 = _largest(surprise_BN, wanted_B.minimum(num_valid_B))
    else:
        assert choice.confidence is not None
        limit_B1 = _largest(surprise_BN, num_valid_B.clamp_max(choice.least))
        limit_B1 = limit_B1.clamp_max(_surprise_at(choice.confidence))
    kept_BN: Tensor = (surprise_BN >= limit_B1) & valid_BHW.flatten(1)
    return kept_BN.view_as(valid_BHW)


def _surprise_at(confidence: float) -> float:
    return -math.log(confidence) if confidence > 0 else math.inf


def _largest(values_BN: Tensor, count_B: Tensor) -> Tensor:
    """The `count`-th largest value of each row as B x 1; infinity where the count is 0: nothing is as large."""
    place_B1 = (count_B - 1).clamp_min(0)[:, None]
    found_B1 = values_BN.sort(dim=1, descending=True).values.gather(1, place_B1)
    return found_B1.masked_fill(count_B[:, None] == 0, math.inf)
