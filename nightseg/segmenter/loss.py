"""The loss of one segmentation step: cross-entropy and focal loss from a single log-softmax.

B images, K classes, H x W pixels, h x w of the logits as the network gives them (a quarter). With c = -log p_t, p_t
the probability of the true class, and y_t the weight of that class:

    loss per pixel = y_t [alpha + (1 - alpha) w (1 - p_t)^gamma] c          1 - p_t = -expm1(-c)

alpha = 1 is cross-entropy, alpha = 0 the focal loss (arXiv 1708.02002, equation 4) with weight w, and what lies between
is the thesis's combined loss. 1 - p_t through expm1 loses no digits where p_t is close to 1. The mean divides by the
weights of the pixels that count, as F.cross_entropy does.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Below this 1 - p_t the focal weight has no gradient. For gamma < 1 its derivative gamma (1 - p_t)^(gamma - 1) is
# infinite at p_t = 1, and infinity times c = 0 would be NaN where the true limit is 0.
_LEAST_DOUBT: Final = 1e-12


class LossSum(NamedTuple):
    """The loss over some pixels: `total` (float32, with gradient), and `weight`, what a mean has to divide it by.

    The weight is the sum of the class weights of the pixels that count: without class weights their number.
    """

    total: Tensor
    weight: Tensor

    def mean(self) -> Tensor:
        """Mean over the pixels that count; 0 with gradient 0 when there is none."""
        return self.total / divisor(self.weight)


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


def combined_loss_sum(
    logits_BKHW: Tensor,
    target_BHW: Tensor,
    alpha: float,
    gamma: float,
    focal_weight: float = 1.0,
    ignore: int = 255,
    weight_BHW: Tensor | None = None,
) -> LossSum:
    """Sum of the loss over the valid pixels, and their weight, for a mean over several batches or processes.

    `logits_BKHW` any floating type (computed in float32, float64 stays; also under autocast); `target_BHW` integers,
    classes 0 .. K-1 or `ignore`; `weight_BHW` multiplies each pixel's loss and must be 0 where the target is `ignore`,
    None means 1. Under DDP, which averages gradients over W processes, the mean over all valid pixels of all processes
    is `total * W / (weight summed over the processes)`.
    """
    with torch.autocast(logits_BKHW.device.type, enabled=False):
        surprise_BHW = surprise(logits_BKHW, target_BHW, ignore)
        total = mixed_sum(surprise_BHW, weight_BHW, Mixture(alpha, gamma, focal_weight))
        weight = (target_BHW != ignore).sum().to(total.dtype) if weight_BHW is None else weight_BHW.sum()
        return LossSum(total, weight)


def surprise(logits_BKHW: Tensor, target_BHW: Tensor, ignore: int = 255) -> Tensor:
    """c_BHW = -log p_t of every pixel, 0 where the target is `ignore`; float32, or float64 for float64 logits."""
    exact = logits_BKHW if logits_BKHW.dtype == torch.float64 else logits_BKHW.float()
    found: Tensor = _Surprise.apply(exact, target_BHW, ignore)
    return found


def mixed_sum(surprise_BHW: Tensor, weight_BHW: Tensor | None, terms: Mixture) -> Tensor:
    """Sum over the pixels of weight [alpha + (1 - alpha) w (1 - p_t)^gamma] c, a scalar.

    Ignored pixels need no mask: there c is 0, and cross-entropy hands no gradient on.
    """
    if terms.alpha < 1:
        total: Tensor = _FocalSum.apply(surprise_BHW, weight_BHW, terms)
        return total
    return surprise_BHW.sum() if weight_BHW is None else (surprise_BHW * weight_BHW).sum()


def divisor(weight: Tensor) -> Tensor:
    """`weight`, or 1 where it is 0: the sum over no pixel is 0, and so is its mean."""
    return torch.where(weight > 0, weight, torch.ones_like(weight))


class _Surprise(torch.autograd.Function):
    """Cross-entropy of every pixel, whose gradient is made in the memory of the log-probabilities.

    Autograd would write two more maps of all classes on the way back, and new memory is what costs there: on a CPU this
    takes 0.6 of the time of F.cross_entropy, and half of its memory.
    """

    @staticmethod
    def forward(ctx: Any, logits_BKHW: Tensor, target_BHW: Tensor, ignore: int) -> Tensor:
        log_p_BKHW = F.log_softmax(logits_BKHW, dim=1)
        ctx.save_for_backward(log_p_BKHW, target_BHW)
        ctx.ignore = ignore
        return F.nll_loss(log_p_BKHW, target_BHW.long(), ignore_index=ignore, reduction="none")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_BHW: Tensor) -> tuple[Tensor, None, None]:
        log_p_BKHW, target_BHW = ctx.saved_tensors
        is_ignored_BHW = target_BHW == ctx.ignore
        gradient_B1HW = gradient_BHW.masked_fill(is_ignored_BHW, 0.0)[:, None]
        true_B1HW = target_BHW.masked_fill(is_ignored_BHW, 0).long()[:, None]
        p_BKHW = log_p_BKHW.exp() if is_graph_kept() else log_p_BKHW.exp_()
        return p_BKHW.mul_(gradient_B1HW).scatter_add_(1, true_B1HW, -gradient_B1HW), None, None


def is_graph_kept() -> bool:
    """Whether what this backward pass saved may be asked for again (`retain_graph`); yes if torch does not say."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


class _FocalSum(torch.autograd.Function):
    """`mixed_sum` with its derivative computed on the way: autograd would keep and read back ten maps of this size.

    With d = 1 - p_t, so that dd/dc = 1 - d, s = (1 - alpha) w and g = alpha + s d^gamma:
    f(c) = c g,  f'(c) = g + s gamma (d^(gamma - 1) - d^gamma) c.
    """

    @staticmethod
    def forward(ctx: Any, surprise_BHW: Tensor, weight_BHW: Tensor | None, terms: Mixture) -> Tensor:
        share = (1 - terms.alpha) * terms.focal_weight
        doubt_BHW = torch.expm1(-surprise_BHW).neg_().clamp_min_(_LEAST_DOUBT)
        focal_BHW = doubt_BHW**terms.gamma
        steepness_BHW = doubt_BHW.pow_(terms.gamma - 1).sub_(focal_BHW) if ctx.needs_input_grad[0] else None
        factor_BHW = focal_BHW.mul_(share).add_(terms.alpha)
        if steepness_BHW is not None:
            slope_BHW = torch.addcmul(factor_BHW, steepness_BHW, surprise_BHW, value=share * terms.gamma)
            ctx.save_for_backward(slope_BHW if weight_BHW is None else slope_BHW.mul_(weight_BHW))
        loss_BHW = factor_BHW.mul_(surprise_BHW)
        return (loss_BHW if weight_BHW is None else loss_BHW.mul_(weight_BHW)).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slope_BHW,) = ctx.saved_tensors
        return gradient * slope_BHW, None, None
