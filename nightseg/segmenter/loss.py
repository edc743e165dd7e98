"""The loss of a segmentation step: cross-entropy and focal loss from one log-softmax, hard pixels, memory spared.

B images, K classes, H x W pixels, N of them in a frame, h x w of the logits as the network gives them (a quarter,
rounded up). With nll = -log p_t, p_t the probability of the true class, and y_t the weight of that class:

    loss per pixel = y_t [alpha + (1 - alpha) w (1 - p_t)^gamma] nll          1 - p_t = -expm1(-nll)

alpha = 1 is cross-entropy, alpha = 0 the focal loss (arXiv 1708.02002, equation 4) with weight w, between them lies the
thesis's combined loss. The mean divides by the weights of the pixels that count, as F.cross_entropy does.

A training calls `segmentation_loss`. The formula stands in `mixed_sum` and knows of a pixel its nll and weight; what
needs more of the logits comes in where nll is made of them: in `segmentation_loss` for whole frames, in `_ChunkedSum`
for chunks of rows.

The kernels are our own because torch's take 1.6 times as long and twice the memory (benchmarks/loss.py). Logits at full
size are most of the memory of a step. Upsampling is linear, so a chunk of rows can be upsampled, reduced to its loss
and to its gradient at a quarter of the size, and freed before the next one (as Liger, arXiv 2410.10989, for language).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nightseg.segmenter.network import COMMON_STRIDE, rows_needed, upsample_logits
from nightseg.segmenter.settings import Loss, Ohem

# Below this 1 - p_t the focal factor has no gradient. For gamma < 1 its derivative gamma (1 - p_t)^(gamma - 1) is
# infinite at p_t = 1, and infinity times nll = 0 would be NaN where the true limit is 0.
_LEAST_ERROR: Final = 1e-12


class LossSum(NamedTuple):
    """The loss over some pixels: `total` (float32, with gradient), and `weight`, what a mean has to divide it by.

    The weight is the sum of the weights of the pixels that count: without weights of classes or pixels their number.
    """

    total: Tensor
    weight: Tensor

    def mean(self) -> Tensor:
        """Mean over the pixels that count; 0 with gradient 0 when there is none."""
        return self.total / divisor(self.weight)


def segmentation_loss(
    logits_BKhw: Tensor,
    target_BHW: Tensor,
    loss: Loss,
    class_weights: Sequence[float] | None = None,
    ignore: int = 255,
    pixel_weights_BHW: Tensor | None = None,
) -> LossSum:
    """The loss of logits at a quarter of the target's size, summed over the pixels that count, and their weight.

    `logits_BKhw` any floating type, computed in float32 also under autocast; `target_BHW` integers, 0 .. K-1 or
    `ignore`; `class_weights` those of `loss`, one a class, None = 1 each; `pixel_weights_BHW` float32, at least 0,
    times those of the classes, None = 1 each. With and without chunks the loss and the gradient are the same but for
    the order of additions. Under DDP, which averages gradients over W processes, the
    mean over all valid pixels of all processes is `total * W / (weight summed over the processes)`.
    """
    rows = loss.loss_chunk_rows
    # Class by class in memory: upsampling and softmax of channels-last logits take twice as long.
    logits_BKhw = logits_BKhw.contiguous()
    with torch.autocast(logits_BKhw.device.type, enabled=False):
        weight_BHW = _class_weights(target_BHW, class_weights, ignore)
        if pixel_weights_BHW is not None:
            counts_BHW = target_BHW != ignore if weight_BHW is None else weight_BHW
            weight_BHW = pixel_weights_BHW * counts_BHW
        nll_BHW = None
        if rows is None:
            nll_BHW = negative_log_likelihood(upsample_logits(logits_BKhw, *target_BHW.shape[-2:]), target_BHW, ignore)
        elif loss.ohem is not None:
            chunks = _chunks(target_BHW, logits_BKhw.shape[2], rows)
            parts = [_nll_of_chunk(logits_BKhw[:, :, s].detach(), target_BHW, c, s, ignore) for c, s in chunks]
            nll_BHW = torch.cat(parts, dim=1)
        if loss.ohem is not None and nll_BHW is not None:
            kept_BHW = hard_pixels(nll_BHW.detach(), target_BHW != ignore, loss.ohem)
            weight_BHW = kept_BHW.float() if weight_BHW is None else weight_BHW * kept_BHW
        if rows is None and nll_BHW is not None:
            total = mixed_sum(nll_BHW, weight_BHW, loss)
        else:
            total = _ChunkedSum.apply(logits_BKhw, target_BHW, weight_BHW, loss, rows, ignore)
        weight = (target_BHW != ignore).sum().to(total.dtype) if weight_BHW is None else weight_BHW.sum()
        return LossSum(total, weight)


def combined_loss(
    logits_BKHW: Tensor,
    target_BHW: Tensor,
    alpha: float,
    gamma: float,
    focal_weight: float = 1.0,
    ignore: int = 255,
) -> Tensor:
    """alpha cross-entropy + (1 - alpha) focal_weight focal loss of logits of the target's size: the formula alone.

    For callers from outside, tests and benchmarks; a training calls `segmentation_loss`. `logits_BKHW` any floating
    type (computed in float32, float64 stays; also under autocast); `target_BHW` integers, classes 0 .. K-1 or `ignore`.
    Returns the mean over the valid pixels, a scalar; a batch without one gives 0 with gradient 0.
    """
    loss = Loss(kind="combined", alpha=alpha, gamma=gamma, focal_weight=focal_weight)
    with torch.autocast(logits_BKHW.device.type, enabled=False):
        total = mixed_sum(negative_log_likelihood(logits_BKHW, target_BHW, ignore), None, loss)
        return LossSum(total, (target_BHW != ignore).sum().to(total.dtype)).mean()


def negative_log_likelihood(logits_BKHW: Tensor, target_BHW: Tensor, ignore: int = 255) -> Tensor:
    """-log p_t of every pixel, 0 where the target is `ignore`; float32, or float64 for float64 logits."""
    exact = logits_BKHW if logits_BKHW.dtype == torch.float64 else logits_BKHW.float()
    nll_BHW: Tensor = _NegativeLogLikelihood.apply(exact, target_BHW, ignore)
    return nll_BHW


def mixed_sum(nll_BHW: Tensor, weight_BHW: Tensor | None, loss: Loss) -> Tensor:
    """Sum over the pixels of weight [alpha + (1 - alpha) w (1 - p_t)^gamma] nll, a scalar.

    Ignored pixels need no mask: there nll is 0, and `negative_log_likelihood` hands no gradient on.
    """
    if loss.cross_entropy_share < 1:
        total: Tensor = _FocalSum.apply(nll_BHW, weight_BHW, loss)
        return total
    return nll_BHW.sum() if weight_BHW is None else (nll_BHW * weight_BHW).sum()


def divisor(weight: Tensor) -> Tensor:
    """`weight`, or 1 where it is 0: the sum over no pixel is 0, and so is its mean."""
    return torch.where(weight > 0, weight, torch.ones_like(weight))


def _class_weights(target_BHW: Tensor, class_weights: Sequence[float] | None, ignore: int) -> Tensor | None:
    """float32 weight of the class of each pixel, 0 where it is `ignore`; None if all classes weigh 1."""
    if class_weights is None:
        return None
    table = torch.zeros(256, dtype=torch.float32)  # labels are bytes
    table[: len(class_weights)] = torch.tensor(class_weights)
    table[ignore] = 0.0
    return table.to(target_BHW.device, non_blocking=True)[target_BHW.long()]


# -- online hard example mining ---------------------------------------------------------------------------------------


def hard_pixels(nll_BHW: Tensor, valid_BHW: Tensor, ohem: Ohem) -> Tensor:
    """bool BHW: the hard ones among the valid pixels. No wait for the device.

    Chosen frame by frame, so it does not depend on how a batch is split; equal pixels are all kept or all left out.
    """
    nll_BN = nll_BHW.flatten(1).masked_fill(~valid_BHW.flatten(1), -1.0)  # of a valid pixel it is never negative
    num_valid_B = valid_BHW.flatten(1).sum(dim=1)
    if ohem.share is not None:
        wanted_B = (num_valid_B.double() * ohem.share).round().long().clamp_min(1)
        limit_B1 = _largest(nll_BN, wanted_B.minimum(num_valid_B))
    else:
        assert ohem.confidence is not None
        limit_B1 = _largest(nll_BN, num_valid_B.clamp_max(ohem.min_kept)).clamp_max(-math.log(ohem.confidence))
    kept_BN: Tensor = (nll_BN >= limit_B1) & valid_BHW.flatten(1)
    return kept_BN.view_as(valid_BHW)


def _largest(values_BN: Tensor, count_B: Tensor) -> Tensor:
    """The `count`-th largest value of each row as B x 1; infinity where the count is 0: nothing is as large."""
    place_B1 = (count_B - 1).clamp_min(0)[:, None]
    found_B1 = values_BN.sort(dim=1, descending=True).values.gather(1, place_B1)
    return found_B1.masked_fill(count_B[:, None] == 0, math.inf)


# -- kernels with exact gradients -------------------------------------------------------------------------------------


class _NegativeLogLikelihood(torch.autograd.Function):
    """Cross-entropy of every pixel, its gradient made in the memory of the log-probabilities: new memory is slow."""

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
        p_BKHW = log_p_BKHW.exp() if _is_graph_kept() else log_p_BKHW.exp_()
        return p_BKHW.mul_(gradient_B1HW).scatter_add_(1, true_B1HW, -gradient_B1HW), None, None


def _is_graph_kept() -> bool:
    """Whether what this backward pass saved may be asked for again (`retain_graph`); yes if torch does not say."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


class _FocalSum(torch.autograd.Function):
    """`mixed_sum` with its derivative computed on the way: autograd would keep and read back ten maps of this size.

    With c = nll, e = 1 - p_t, so that de/dc = 1 - e, s = (1 - alpha) w and g = alpha + s e^gamma:
    f(c) = c g,  f'(c) = g + s gamma (e^(gamma - 1) - e^gamma) c.
    """

    @staticmethod
    def forward(ctx: Any, nll_BHW: Tensor, weight_BHW: Tensor | None, loss: Loss) -> Tensor:
        alpha, gamma = loss.cross_entropy_share, loss.gamma
        share = (1 - alpha) * loss.focal_weight
        error_BHW = torch.expm1(-nll_BHW).neg_().clamp_min_(_LEAST_ERROR)
        focal_BHW = error_BHW**gamma
        gradient_factor_BHW = error_BHW.pow_(gamma - 1).sub_(focal_BHW) if ctx.needs_input_grad[0] else None
        factor_BHW = focal_BHW.mul_(share).add_(alpha)
        if gradient_factor_BHW is not None:
            slope_BHW = torch.addcmul(factor_BHW, gradient_factor_BHW, nll_BHW, value=share * gamma)
            ctx.save_for_backward(slope_BHW if weight_BHW is None else slope_BHW.mul_(weight_BHW))
        loss_BHW = factor_BHW.mul_(nll_BHW)
        return (loss_BHW if weight_BHW is None else loss_BHW.mul_(weight_BHW)).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slope_BHW,) = ctx.saved_tensors
        return gradient * slope_BHW, None, None


def _chunks(target_BHW: Tensor, num_rows: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Rows of the target, `rows` at a time, and of the `num_rows` rows of logits those they are made from."""
    for top in range(0, target_BHW.shape[1], rows):
        bottom = min(top + rows, target_BHW.shape[1])
        yield slice(top, bottom), rows_needed(top, bottom, num_rows)


def _nll_of_chunk(part_BKrw: Tensor, target_BHW: Tensor, chunk: slice, source: slice, ignore: int) -> Tensor:
    """`negative_log_likelihood` of the rows `chunk` of the target from the rows `source` of the logits."""
    target_BrW = target_BHW[:, chunk]
    height, width = target_BrW.shape[1:]
    logits_BKrW = upsample_logits(part_BKrw, height, width, chunk.start - COMMON_STRIDE * source.start)
    return negative_log_likelihood(logits_BKrW, target_BrW, ignore)


class _ChunkedSum(torch.autograd.Function):
    """The summed loss chunk by chunk; the gradient is made in the same pass, so nothing of full size is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_BKhw: Tensor,
        target_BHW: Tensor,
        weight_BHW: Tensor | None,
        loss: Loss,
        rows: int,
        ignore: int,
    ) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        gradient_BKhw = torch.zeros_like(logits_BKhw, dtype=torch.float32) if wants_gradient else None
        total = torch.zeros((), device=logits_BKhw.device)
        for chunk, source in _chunks(target_BHW, logits_BKhw.shape[2], rows):
            part_BKrw = logits_BKhw[:, :, source].detach().float().requires_grad_(wants_gradient)
            with torch.set_grad_enabled(wants_gradient):
                nll_BrW = _nll_of_chunk(part_BKrw, target_BHW, chunk, source, ignore)
                part = mixed_sum(nll_BrW, None if weight_BHW is None else weight_BHW[:, chunk], loss)
            total += part.detach()
            if gradient_BKhw is not None:
                gradient_BKhw[:, :, source] += torch.autograd.grad(part, part_BKrw)[0]
        if gradient_BKhw is not None:
            ctx.save_for_backward(gradient_BKhw.to(logits_BKhw.dtype))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_BKhw,) = ctx.saved_tensors
        scaled = gradient * gradient_BKhw if _is_graph_kept() else gradient_BKhw.mul_(gradient)
        return (scaled, *(None for _ in ctx.needs_input_grad[1:]))
