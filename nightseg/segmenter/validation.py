"""How good a network in training is: the confusion matrix on labelled frames, at the labels' own size.

B images, K classes, H x W pixels of the label.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nightseg.metrics.confusion import Counts, confusion_matrix, scores
from nightseg.segmenter.data import LabelledFrames
from nightseg.segmenter.encoders import normalise
from nightseg.segmenter.network import SemanticFPN, upsample_logits


@torch.no_grad()
def validation_confusion(
    network: SemanticFPN,
    frames: LabelledFrames,
    indices: Sequence[int],
    *,
    batch: int,
    device: torch.device,
) -> Tensor:
    """int64 K x K (rows: label, columns: prediction) over the given frames; the network is left in evaluation mode."""
    network.eval()
    total = np.zeros((network.num_classes, network.num_classes), dtype=np.int64)
    waiting: list[tuple[Tensor, Tensor]] = []
    for index in indices:
        image, label = frames[index]
        if waiting and (len(waiting) == batch or waiting[-1][0].shape != image.shape):
            total += _confusion(network, waiting, device)
            waiting = []
        waiting.append((image, label))
    if waiting:
        total += _confusion(network, waiting, device)
    return torch.from_numpy(total)


@torch.no_grad()
def share_statistics(network: SemanticFPN, rank: int, sum_over_workers: Callable[[Tensor], Tensor]) -> None:
    """Rank 0's batch norm statistics for every worker: each has its own after a step, and rank 0's are those saved."""
    buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    if not buffers:
        return
    mine = torch.cat([buffer.flatten() for buffer in buffers])
    shared = sum_over_workers(mine if rank == 0 else torch.zeros_like(mine))
    begin = 0
    for buffer in buffers:
        buffer.copy_(shared[begin : begin + buffer.numel()].view_as(buffer))
        begin += buffer.numel()


def described(matrix: Counts, classes: Sequence[str]) -> dict[str, Any]:
    """The scores of a confusion matrix as the history has them: fractions, null where undefined; `iou` by class."""
    found = scores(matrix, "cityscapes")
    iou = {name: _or_null(value) for name, value in zip(classes, found.iou, strict=True)}
    return {key: _or_null(getattr(found, key)) for key in ("pa", "ca", "miou", "fwiou")} | {"iou": iou}


def _or_null(fraction: float) -> float | None:
    return None if math.isnan(fraction) else float(fraction)


def _confusion(network: SemanticFPN, views: list[tuple[Tensor, Tensor]], device: torch.device) -> Counts:
    images_B3HW = torch.stack([image for image, _ in views]).to(device)
    logits_BKhw = network(normalise(images_B3HW, network.body.mean, network.body.std))
    total = np.zeros((network.num_classes, network.num_classes), dtype=np.int64)
    for logits_Khw, (image, label) in zip(logits_BKhw, views, strict=True):
        logits_1KHW = upsample_logits(logits_Khw[None], *image.shape[-2:])
        if logits_1KHW.shape[-2:] != label.shape:
            logits_1KHW = F.interpolate(logits_1KHW, tuple(label.shape), mode="bilinear", align_corners=False)
        prediction = logits_1KHW[0].argmax(dim=0).to(torch.uint8).cpu().numpy()
        total += confusion_matrix(label.numpy(), prediction, network.num_classes)
    return total
