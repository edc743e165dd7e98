"""The loss of a training step, forward and backward: against PyTorch's cross-entropy, and against another focal loss.

loss          CE + focal against F.cross_entropy alone, which does less
loss_chunks   upsampling and cross-entropy in chunks of rows against both at once: peak memory, and the same gradient
focal         against the softmax focal loss of segmentation-models-pytorch, same logits
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contest import Contest, PeerMissing, Size
from benchmarks.memory import peak_bytes
from nightseg.segmenter.loss import combined_loss, segmentation_loss
from nightseg.segmenter.settings import Loss

NUM_CLASSES, IGNORE, STRIDE = 19, 255, 4
SIZES: dict[Size, tuple[int, int]] = {"tiny": (64, 128), "default": (512, 1024), "full": (1024, 2048)}
ALPHA, GAMMA = 0.5, 2.0
MIXED = Loss(kind="combined", alpha=ALPHA, gamma=GAMMA)
CHUNK_ROWS = 16
GRADIENT_TOLERANCE = 1e-5  # relative to the largest entry
FOCAL_TOLERANCE = 1e-6

Answer = tuple[Tensor, Tensor]  # loss, gradient of the logits


def contest(size: Size) -> Contest:
    logits, target = _inputs(size)
    labels = target.to(torch.uint8)

    def check(ours: Answer, peer: Answer) -> str:
        plain = _run(logits, lambda leaf: combined_loss(leaf, labels, 1.0, 0.0))
        apart = _apart(plain, peer)
        both = _run(logits, lambda leaf: _formula(leaf, target))
        with_focal = _apart(ours, both)
        assert max(apart, with_focal) < GRADIENT_TOLERANCE, (apart, with_focal)
        return f"its CE {apart:.1g} apart; CE + focal {with_focal:.1g} from the formula by autograd"

    return Contest(
        name="loss",
        work=f"CE + focal, forward and backward, {NUM_CLASSES} x {_shape(size)}",
        peer=f"F.cross_entropy alone, torch {torch.__version__}",
        run_ours=lambda: _run(logits, lambda leaf: combined_loss(leaf, labels, MIXED.alpha, MIXED.gamma)),
        run_peer=lambda: _run(logits, lambda leaf: F.cross_entropy(leaf, target, ignore_index=IGNORE)),
        check=check,
    )


def chunks(size: Size) -> Contest:
    def check(ours: Answer, peer: Answer) -> str:
        apart = _apart(ours, peer)
        assert apart < GRADIENT_TOLERANCE, apart
        return f"loss and gradient {apart:.1g} apart"

    return Contest(
        name="loss_chunks",
        work=f"upsampling x{STRIDE} and CE in chunks of {CHUNK_ROWS} rows, {NUM_CLASSES} x {_shape(size)}",
        peer=f"F.interpolate and F.cross_entropy, torch {torch.__version__}",
        run_ours=chunks_of_ours(size),
        run_peer=chunks_of_peer(size),
        check=check,
        peaks=lambda: (
            peak_bytes("benchmarks.loss", "chunks_of_ours", size),
            peak_bytes("benchmarks.loss", "chunks_of_peer", size),
        ),
    )


def chunks_of_ours(size: Size) -> Callable[[], Answer]:
    logits, target = _inputs(size, STRIDE)
    labels, loss = target.to(torch.uint8), Loss(loss_chunk_rows=CHUNK_ROWS)
    return lambda: _run(logits, lambda leaf: segmentation_loss(leaf, labels, loss).mean())


def chunks_of_peer(size: Size) -> Callable[[], Answer]:
    logits, target = _inputs(size, STRIDE)

    def upsampled(leaf: Tensor) -> Tensor:
        full = F.interpolate(leaf, scale_factor=STRIDE, mode="bilinear", align_corners=False)
        return F.cross_entropy(full, target, ignore_index=IGNORE)

    return lambda: _run(logits, upsampled)


def focal(size: Size) -> Contest:
    try:
        from segmentation_models_pytorch.losses._functional import softmax_focal_loss_with_logits
    except ImportError:
        raise PeerMissing("segmentation-models-pytorch") from None
    logits, target = _inputs(size)
    target = target.masked_fill(target == IGNORE, 0)  # the peer knows no ignored pixels

    def check(ours: Answer, peer: Answer) -> str:
        value = abs(float(ours[0]) / float(peer[0]) - 1)
        gradient = float((ours[1] - peer[1]).abs().max() / peer[1].abs().max())
        assert max(value, gradient) < FOCAL_TOLERANCE, (value, gradient)
        return f"loss {value:.1g}, gradient {gradient:.1g} apart"

    return Contest(
        name="focal",
        work=f"focal loss, gamma {GAMMA:g}, forward and backward, {NUM_CLASSES} x {_shape(size)}",
        peer=f"softmax_focal_loss_with_logits, segmentation-models-pytorch {version('segmentation-models-pytorch')}",
        run_ours=lambda: _run(logits, lambda leaf: combined_loss(leaf, target, 0.0, GAMMA)),
        run_peer=lambda: _run(logits, lambda leaf: softmax_focal_loss_with_logits(leaf, target, gamma=GAMMA)),
        check=check,
    )


def _shape(size: Size) -> str:
    return " x ".join(str(side) for side in SIZES[size])


def _inputs(size: Size, stride: int = 1) -> tuple[Tensor, Tensor]:
    """float32 logits 1 x K x h x w, int64 target 1 x H x W with a tenth ignored."""
    height, width = SIZES[size]
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(1, NUM_CLASSES, height // stride, width // stride, generator=random)
    target = torch.randint(0, NUM_CLASSES, (1, height, width), generator=random)
    target[:, : height // 10] = IGNORE
    return logits, target


def _run(logits: Tensor, loss: Callable[[Tensor], Tensor]) -> Answer:
    leaf = logits.detach().requires_grad_()  # no copy
    value = loss(leaf)
    torch.autograd.backward(value)
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def _formula(leaf: Tensor, target: Tensor) -> Tensor:
    nll = F.cross_entropy(leaf, target, ignore_index=IGNORE, reduction="none")
    error = 1 - torch.exp(-nll)
    return (nll * (ALPHA + (1 - ALPHA) * error**GAMMA)).sum() / (target != IGNORE).sum()


def _apart(ours: Answer, peer: Answer) -> float:
    """The larger of the relative differences of loss and gradient."""
    gradient = (ours[1] - peer[1]).abs().max() / peer[1].abs().max()
    return max(float(gradient), abs(float(ours[0]) / float(peer[0]) - 1))
