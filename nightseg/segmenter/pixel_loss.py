"""The loss of a batch from the logits as the network gives them: classes weighed, hard pixels chosen, memory spared.

B images, K classes, H x W pixels, h x w = a quarter of that (rounded up).

Logits at full size are what a step has most of: 40 MB for 19 classes at 512 x 1024, and cross-entropy holds them three
times over. Upsampling is linear, so a strip of rows can be upsampled, reduced to its loss and to its gradient at a
quarter of the size, and forgotten before the next one: the same loss and gradient from a small part of the memory. The
idea is that of fused losses of language models (Liger, arXiv 2410.10989; cut cross-entropy, arXiv 2411.09009), here
for an interpolation instead of a matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nightseg.segmenter.hard_pixels import HardPixels, hard_pixels
from nightseg.segmenter.loss import LossSum, Mixture, combined_loss_sum, is_graph_kept, mixed_sum, surprise
from nightseg.segmenter.network import COMMON_STRIDE, upsample_logits


class PixelLoss(NamedTuple):
    """What a segmenter is trained to make small. `class_weights`: one a class, None = 1 each.

    `strip_rows`: rows of the full size that are held at a time, a multiple of 4; None = all of them.
    """

    terms: Mixture
    class_weights: tuple[float, ...] | None = None
    hard: HardPixels | None = None
    strip_rows: int | None = None


def pixel_loss_sum(logits_BKhw: Tensor, target_BHW: Tensor, loss: PixelLoss, ignore: int = 255) -> LossSum:
    """The loss of logits at a quarter of the target's size, summed over the pixels that count, and their weight.

    `logits_BKhw` any floating type, computed in float32 also under autocast; `target_BHW` integers, 0 .. K-1 or
    `ignore`. Both forms (strips or not) give the same loss and gradient but for the order of additions.
    """
    assert loss.strip_rows is None or loss.strip_rows % COMMON_STRIDE == 0, loss.strip_rows
    # Class by class in memory: upsampling and softmax of channels-last logits take twice as long.
    logits_BKhw = logits_BKhw.contiguous()
    with torch.autocast(logits_BKhw.device.type, enabled=False):
        if loss.strip_rows is None:
            logits_BKHW = upsample_logits(logits_BKhw, *target_BHW.shape[-2:])
            if loss.hard is None:
                weight_BHW = _class_weights(target_BHW, loss, ignore)
                return combined_loss_sum(logits_BKHW, target_BHW, *loss.terms, ignore, weight_BHW)
            surprise_BHW = surprise(logits_BKHW, target_BHW, ignore)
            weight_BHW = _pixel_weights(surprise_BHW.detach(), target_BHW, loss, loss.hard, ignore)
            return LossSum(mixed_sum(surprise_BHW, weight_BHW, loss.terms), weight_BHW.sum())

        if loss.hard is None:
            weight_BHW = _class_weights(target_BHW, loss, ignore)
        else:
            surprise_BHW = _surprise_by_strips(logits_BKhw.detach(), target_BHW, loss.strip_rows, ignore)
            weight_BHW = _pixel_weights(surprise_BHW, target_BHW, loss, loss.hard, ignore)
        total: Tensor = _StripSum.apply(logits_BKhw, target_BHW, weight_BHW, loss.terms, loss.strip_rows, ignore)
        weight = (target_BHW != ignore).sum().float() if weight_BHW is None else weight_BHW.sum()
        return LossSum(total, weight)


def _class_weights(target_BHW: Tensor, loss: PixelLoss, ignore: int) -> Tensor | None:
    """float32 weight of the class of each pixel, 0 where it is `ignore`; None if all classes weigh 1."""
    if loss.class_weights is None:
        return None
    table = torch.zeros(256, dtype=torch.float32)  # labels are bytes
    table[: len(loss.class_weights)] = torch.tensor(loss.class_weights)
    table[ignore] = 0.0
    return table.to(target_BHW.device, non_blocking=True)[target_BHW.long()]


def _pixel_weights(surprise_BHW: Tensor, target_BHW: Tensor, loss: PixelLoss, hard: HardPixels, ignore: int) -> Tensor:
    """Class weights of the hard pixels, 0 everywhere else."""
    kept_BHW = hard_pixels(surprise_BHW, target_BHW != ignore, hard)
    weight_BHW = _class_weights(target_BHW, loss, ignore)
    return kept_BHW.float() if weight_BHW is None else weight_BHW * kept_BHW


class _Strip(NamedTuple):
    """Rows `top` .. `bottom` of the full size, and the rows `first` .. `last` of the logits they are made from."""

    top: int
    bottom: int
    first: int
    last: int

    def upsample(self, logits_BKhw: Tensor, width: int) -> Tensor:
        """These rows of the upsampled float32 logits, bit for bit: each depends on its two nearest rows only."""
        above = COMMON_STRIDE * self.first
        full = F.interpolate(logits_BKhw, scale_factor=COMMON_STRIDE, mode="bilinear", align_corners=False)
        return full[:, :, self.top - above : self.bottom - above, :width]


def _strips(height: int, num_rows: int, rows: int) -> Iterator[_Strip]:
    """All strips of `height` rows that come from `num_rows` rows of logits."""
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        # One row more on each side: what lies half between two rows of logits is made from both.
        yield _Strip(top, bottom, max(0, top // COMMON_STRIDE - 1), min(num_rows, -(-bottom // COMMON_STRIDE) + 1))


@torch.no_grad()
def _surprise_by_strips(logits_BKhw: Tensor, target_BHW: Tensor, rows: int, ignore: int) -> Tensor:
    height, width = target_BHW.shape[-2:]
    parts = [
        surprise(
            strip.upsample(logits_BKhw[:, :, strip.first : strip.last].float(), width),
            target_BHW[:, strip.top : strip.bottom],
            ignore,
        )
        for strip in _strips(height, logits_BKhw.shape[2], rows)
    ]
    return torch.cat(parts, dim=1)


class _StripSum(torch.autograd.Function):
    """The summed loss strip by strip; the gradient is made in the same pass, so nothing of full size is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_BKhw: Tensor,
        target_BHW: Tensor,
        weight_BHW: Tensor | None,
        terms: Mixture,
        rows: int,
        ignore: int,
    ) -> Tensor:
        height, width = target_BHW.shape[-2:]
        wants_gradient = ctx.needs_input_grad[0]
        gradient_BKhw = torch.zeros_like(logits_BKhw, dtype=torch.float32) if wants_gradient else None
        total = torch.zeros((), device=logits_BKhw.device)
        for strip in _strips(height, logits_BKhw.shape[2], rows):
            part_BKhw = logits_BKhw[:, :, strip.first : strip.last].detach().float().requires_grad_(wants_gradient)
            with torch.set_grad_enabled(wants_gradient):
                surprise_BHW = surprise(
                    strip.upsample(part_BKhw, width), target_BHW[:, strip.top : strip.bottom], ignore
                )
                weights = None if weight_BHW is None else weight_BHW[:, strip.top : strip.bottom]
                loss = mixed_sum(surprise_BHW, weights, terms)
            total += loss.detach()
            if gradient_BKhw is not None:
                gradient_BKhw[:, :, strip.first : strip.last] += torch.autograd.grad(loss, part_BKhw)[0]
        if gradient_BKhw is not None:
            ctx.save_for_backward(gradient_BKhw.to(logits_BKhw.dtype))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient_BKhw,) = ctx.saved_tensors
        scaled = gradient * gradient_BKhw if is_graph_kept() else gradient_BKhw.mul_(gradient)
        return scaled, None, None, None, None, None
