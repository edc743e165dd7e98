"""The loss of one segmentation step: cross-entropy and focal loss from a single log-softmax.

B images, K classes, H x W pixels. With c = -log p_t, p_t the probability of the true class:

    loss per pixel = [alpha + (1 - alpha) w (1 - p_t)^gamma] c          1 - p_t = -expm1(-c)

alpha = 1 is cross-entropy, alpha = 0 the focal loss (arXiv 1708.02002, equation 4) with weight w, and what lies between
is the thesis's combined loss. 1 - p_t through expm1 loses no digits where p_t is close to 1.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Below this 1 - p_t the focal weight has no gradient. For gamma < 1 its derivative gamma (1 - p_t)^(gamma - 1) is
# infinite at p_t = 1, and infinity times c = 0 would be NaN where the true limit is 0.
_LEAST_DOUBT: Final = 1e-12


class LossSum(NamedTuple):
    """The loss over some pixels: `total` (float32, with gradient) and `num_valid`, the pixels (float32)."""

    total: Tensor
    num_valid: Tensor

    def mean(self) -> Tensor:
        """Mean over the valid pixels; 0 with gradient 0 when there is none."""
        return self.total / self.num_valid.clamp_min(1)


def combined_loss_sum(
    logits_BKHW: Tensor,
    target_BHW: Tensor,
    alpha: float,
    gamma: float,
    focal_weight: float = 1.0,
    ignore: int = 255,
) -> LossSum:
    """Sum of the loss over the valid pixels, and their number, for a mean over several batches or processes.

    `logits_BKHW` any floating type (computed in float32, also under autocast); `target_BHW` integers, classes 0 .. K-1
    or `ignore`. Under DDP, which averages gradients over W processes, the mean over all valid pixels of all processes
    is `total * W / (num_valid summed over the processes)`.
    """
    with torch.autocast(logits_BKHW.device.type, enabled=False):
        surprise_BHW = F.cross_entropy(logits_BKHW.float(), target_BHW.long(), ignore_index=ignore, reduction="none")
        weighted_BHW = surprise_BHW
        if alpha < 1:
            doubt_BHW = (-torch.expm1(-surprise_BHW)).clamp_min(_LEAST_DOUBT)
            weighted_BHW = surprise_BHW * (alpha + (1 - alpha) * focal_weight * doubt_BHW**gamma)
        # cross_entropy leaves 0 at ignored pixels, and 0 times any focal weight is 0: no mask is needed.
        return LossSum(weighted_BHW.sum(), (target_BHW != ignore).sum().float())


def combined_loss(
    logits_BKHW: Tensor,
    target_BHW: Tensor,
    alpha: float,
    gamma: float,
    focal_weight: float = 1.0,
    ignore: int = 255,
) -> Tensor:
    """alpha cross-entropy + (1 - alpha) focal_weight focal loss, mean over the valid pixels of the batch.

    Returns a float32 scalar; a batch without a valid pixel gives 0 with gradient 0. See `combined_loss_sum` for types.
    """
    return combined_loss_sum(logits_BKHW, target_BHW, alpha, gamma, focal_weight, ignore).mean()


class Mixture(NamedTuple):
    """The parameters of `combined_loss` for a named loss."""

    alpha: float
    gamma: float
    focal_weight: float


def mixture(kind: str, alpha: float, gamma: float, focal_weight: float) -> Mixture:
    """`cross_entropy`, `focal` or `combined` as parameters of the one loss (a pure kind overrules `alpha`)."""
    match kind:
        case "cross_entropy":
            return Mixture(1.0, gamma, focal_weight)
        case "focal":
            return Mixture(0.0, gamma, focal_weight)
        case "combined":
            return Mixture(alpha, gamma, focal_weight)
    raise AssertionError(f"unknown loss {kind!r}")
