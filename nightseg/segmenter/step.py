"""One step of a segmenter: its parts forward and backward, one gradient over all workers, one move of the weights.

B images, K classes, H x W pixels of the crop, h x w of the logits (a quarter).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nightseg.segmenter.encoders import normalise
from nightseg.segmenter.loss import divisor
from nightseg.segmenter.pixel_loss import PixelLoss, pixel_loss_sum

NORM_GUARD = 1e-6  # torch.nn.utils.clip_grad_norm_ has the same


class StepFigures(NamedTuple):
    """float32 scalars on the device: mean loss over the pixels of all workers, norm of the gradient before clipping."""

    loss: Tensor
    gradient_norm: Tensor


class Part(NamedTuple):
    """Some frames of a step, on the device: images uint8 B x 3 x H x W, labels uint8 B x H x W."""

    images: Tensor
    labels: Tensor


def parts_of(images_B3HW: Tensor, labels_BHW: Tensor, count: int) -> list[Part]:
    """A batch in `count` parts of equal size."""
    return [Part(*pair) for pair in zip(images_B3HW.chunk(count), labels_BHW.chunk(count), strict=True)]


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parts: Sequence[Part],
    loss: PixelLoss,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    precision: torch.dtype = torch.float32,
    clip_norm: float | None = None,
    world_size: int = 1,
    sum_over_workers: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> StepFigures:
    """Learn from the parts as if they were one batch; nothing here waits for the device.

    Sums are added up over parts and workers, and divided once, by the weight of all pixels that count: so a step is the
    same however its frames are shared (but for batch norms, whose statistics are those of a part). `model` takes
    normalised images (`mean`, `std` of the encoder) to logits at a quarter of their size; it may be wrapped for several
    workers, then `sum_over_workers` adds a tensor up over them. `clip_norm` limits the norm of the whole gradient.
    """
    optimizer.zero_grad(set_to_none=True)
    sums = []
    for number, (images_B3HW, labels_BHW) in enumerate(parts):
        # Of several parts only the last one exchanges gradients: all that were added up by then.
        with _without_exchange(model) if number < len(parts) - 1 else nullcontext():
            with torch.autocast(images_B3HW.device.type, dtype=precision, enabled=precision != torch.float32):
                logits_BKhw = model(normalise(images_B3HW, mean, std))
            total, weight = pixel_loss_sum(logits_BKhw, labels_BHW, loss)
            torch.autograd.backward(total)
        sums.append(torch.stack([total.detach(), weight]))
    all_total, all_weight = sum_over_workers(torch.stack(sums).sum(dim=0))
    gradients = [
        parameter.grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    scale = world_size / divisor(all_weight)  # the exchange has averaged over the workers
    norm = torch.nn.utils.get_total_norm(gradients) * scale
    if clip_norm is not None:
        scale = scale * (clip_norm / (norm + NORM_GUARD)).clamp_max(1.0)
    torch._foreach_mul_(gradients, scale)
    optimizer.step()
    return StepFigures(all_total / divisor(all_weight), norm)


def _without_exchange(model: nn.Module) -> AbstractContextManager[None]:
    """DistributedDataParallel's `no_sync`; nothing where there is one worker."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return nullcontext()
