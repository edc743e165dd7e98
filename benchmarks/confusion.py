"""Confusion matrix of large frames: nightseg against the formula that most segmentation code uses (`fast_hist`).

The formula masks the labelled pixels, makes one 64-bit number a pixel from label and prediction, and counts. It was
published with the FCN code (score.py, 2015) and is found in nearly every evaluation script since.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from benchmarks.contest import Contest, Size
from nightseg.measures.confusion import confusion_matrix

NUM_CLASSES, IGNORE = 19, 255
SHAPES: dict[Size, tuple[int, int, int]] = {  # frames, height, width
    "tiny": (2, 32, 64), "default": (4, 1024, 2048), "full": (16, 1024, 2048),
}  # fmt: skip
BLOCK = 16  # pixels: labels are areas, not noise


def contest(size: Size) -> Contest:
    num_frames, height, width = SHAPES[size]
    random = np.random.default_rng(0)
    frames = [_frame(random, height, width) for _ in range(num_frames)]

    def check(ours: npt.NDArray[np.int64], peer: npt.NDArray[np.int64]) -> str:
        assert np.array_equal(ours, peer), "confusion: the matrices differ"
        return "equal"

    return Contest(
        name="confusion",
        work=f"confusion matrix, {num_frames} frames of {width} x {height}, {NUM_CLASSES} classes",
        peer=f"fast_hist formula, numpy {np.__version__}",
        run_ours=lambda: sum(confusion_matrix(label, guess, NUM_CLASSES) for label, guess in frames),
        run_peer=lambda: sum(fast_hist(label, guess) for label, guess in frames),
        check=check,
    )


def fast_hist(label: npt.NDArray[np.uint8], guess: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    valid = label < NUM_CLASSES
    codes = NUM_CLASSES * label[valid].astype(np.int64) + guess[valid]
    return np.bincount(codes, minlength=NUM_CLASSES**2).reshape(NUM_CLASSES, NUM_CLASSES)


def _frame(random: np.random.Generator, height: int, width: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """A label with some ignored areas, and a prediction that is right in most of it; uint8 HW."""
    coarse = random.integers(0, NUM_CLASSES, (height // BLOCK, width // BLOCK), dtype=np.uint8)
    other = random.integers(0, NUM_CLASSES, coarse.shape, dtype=np.uint8)
    guess = np.where(random.random(coarse.shape) < 0.8, coarse, other)
    label = np.where(random.random(coarse.shape) < 0.1, np.uint8(IGNORE), coarse)
    area = np.ones((BLOCK, BLOCK), dtype=np.uint8)
    return np.kron(label, area), np.kron(guess, area)
