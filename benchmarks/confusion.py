"""Confusion matrix of large frames: nightseg against what segmentation code uses.

`fast_hist`: masks the labelled pixels, makes one 64-bit number a pixel from label and prediction, and counts. It was
published with the FCN code (score.py, 2015) and is found in nearly every evaluation script since.

`histc`: the three areas of mmsegmentation's IoUMetric, each a torch.histc over floats of the labelled pixels; written
from the description of the metric (intersection, prediction, label; union = prediction + label - intersection).

torchmetrics: its MulticlassConfusionMatrix, and its MeanIoU, which makes one-hot tensors and cannot ignore pixels.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.contest import Contest, PeerMissing, Size
from nightseg.metrics.confusion import confusion_matrix, scores

NUM_CLASSES, IGNORE = 19, 255
SHAPES: dict[Size, tuple[int, int, int]] = {  # frames, height, width
    "tiny": (2, 32, 64), "default": (4, 1024, 2048), "full": (16, 1024, 2048),
}  # fmt: skip
BLOCK = 16  # pixels: labels are areas, not noise

Map = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]


class Areas(NamedTuple):
    """Pixels of each class, int64 (K,), over the labelled pixels."""

    both: Counts
    predicted: Counts
    labelled: Counts


def contest(size: Size) -> Contest:
    frames = _frames(size)

    return Contest(
        name="confusion",
        work=_work(size),
        peer=f"fast_hist formula, numpy {np.__version__}",
        run_ours=lambda: _ours(frames),
        run_peer=lambda: sum(fast_hist(label, guess) for label, guess in frames),
        check=_equal,
    )


def against_histc(size: Size) -> Contest:
    frames = _frames(size)
    tensors = [(torch.from_numpy(label), torch.from_numpy(guess)) for label, guess in frames]

    def check(ours: Counts, peer: Areas) -> str:
        found = Areas(np.diagonal(ours), ours.sum(axis=0), ours.sum(axis=1))
        assert all(np.array_equal(*pair) for pair in zip(found, peer, strict=True)), "confusion: the areas differ"
        return "areas equal"

    return Contest(
        name="confusion_histc",
        work=_work(size),
        peer=f"three histc as in mmsegmentation's IoUMetric, torch {torch.__version__}",
        run_ours=lambda: _ours(frames),
        run_peer=lambda: Areas(*(sum(part) for part in zip(*(histc(*pair) for pair in tensors), strict=True))),
        check=check,
    )


def against_torchmetrics(size: Size) -> Contest:
    metrics = _torchmetrics()
    frames = _frames(size)
    tensors = [(torch.from_numpy(label).long(), torch.from_numpy(guess).long()) for label, guess in frames]

    def run_peer() -> Counts:
        metric = metrics.classification.MulticlassConfusionMatrix(NUM_CLASSES, ignore_index=IGNORE, validate_args=False)
        for label, guess in tensors:
            metric.update(guess, label)
        return np.asarray(metric.compute().numpy(), dtype=np.int64)

    return Contest(
        name="confusion_torchmetrics",
        work=_work(size),
        peer=f"torchmetrics {version('torchmetrics')} MulticlassConfusionMatrix",
        run_ours=lambda: _ours(frames),
        run_peer=run_peer,
        check=_equal,
    )


def against_one_hot(size: Size) -> Contest:
    metrics = _torchmetrics()
    frames = _frames(size, ignored=0.0)
    tensors = [(torch.from_numpy(label).long()[None], torch.from_numpy(guess).long()[None]) for label, guess in frames]

    def run_peer() -> list[npt.NDArray[np.float32]]:
        return [
            metrics.functional.segmentation.mean_iou(guess, label, NUM_CLASSES, per_class=True, input_format="index")[0]
            .numpy()
            for label, guess in tensors
        ]  # fmt: skip

    def check(ours: list[Counts], peer: list[npt.NDArray[np.float32]]) -> str:
        iou = [np.nan_to_num(scores(matrix).iou, nan=-1.0) for matrix in ours]
        apart = max(float(np.abs(mine - theirs).max()) for mine, theirs in zip(iou, peer, strict=True))
        assert apart < 1e-6, f"confusion: IoU {apart:.2g} apart"
        return f"IoU of each frame and class {apart:.1g} apart"

    return Contest(
        name="confusion_one_hot",
        work=_work(size),
        peer=f"torchmetrics {version('torchmetrics')} mean_iou (one-hot)",
        run_ours=lambda: [confusion_matrix(label, guess, NUM_CLASSES) for label, guess in frames],
        run_peer=run_peer,
        check=check,
    )


def _equal(ours: Counts, peer: Counts) -> str:
    assert np.array_equal(ours, peer), "confusion: the matrices differ"
    return "equal"


def fast_hist(label: Map, guess: Map) -> Counts:
    valid = label < NUM_CLASSES
    codes = NUM_CLASSES * label[valid].astype(np.int64) + guess[valid]
    return np.bincount(codes, minlength=NUM_CLASSES**2).reshape(NUM_CLASSES, NUM_CLASSES)


def histc(label: torch.Tensor, guess: torch.Tensor) -> Areas:
    valid = label != IGNORE
    label, guess = label[valid], guess[valid]
    parts = (guess[guess == label], guess, label)
    counted = [torch.histc(part.float(), bins=NUM_CLASSES, min=0, max=NUM_CLASSES - 1) for part in parts]
    return Areas(*(part.numpy().astype(np.int64) for part in counted))


def _ours(frames: list[tuple[Map, Map]]) -> Counts:
    matrices = [confusion_matrix(label, guess, NUM_CLASSES) for label, guess in frames]
    return np.asarray(np.sum(matrices, axis=0, dtype=np.int64))


def _torchmetrics() -> Any:
    try:
        import torchmetrics
        import torchmetrics.functional.segmentation
    except ImportError:
        raise PeerMissing("torchmetrics") from None
    return torchmetrics


def _work(size: Size) -> str:
    num_frames, height, width = SHAPES[size]
    return f"confusion matrix, {num_frames} frames of {width} x {height}, {NUM_CLASSES} classes"


def _frames(size: Size, ignored: float = 0.1) -> list[tuple[Map, Map]]:
    """Labels with some ignored areas, and predictions that are right in most of them; uint8 HW."""
    num_frames, height, width = SHAPES[size]
    random = np.random.default_rng(0)
    return [_frame(random, height, width, ignored) for _ in range(num_frames)]


def _frame(random: np.random.Generator, height: int, width: int, ignored: float) -> tuple[Map, Map]:
    coarse = random.integers(0, NUM_CLASSES, (height // BLOCK, width // BLOCK), dtype=np.uint8)
    other = random.integers(0, NUM_CLASSES, coarse.shape, dtype=np.uint8)
    guess = np.where(random.random(coarse.shape) < 0.8, coarse, other)
    label = np.where(random.random(coarse.shape) < ignored, np.uint8(IGNORE), coarse)
    area = np.ones((BLOCK, BLOCK), dtype=np.uint8)
    return np.kron(label, area), np.kron(guess, area)
