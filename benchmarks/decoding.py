"""Decoding with all checks for damage, against Pillow alone, which has next to none: the same files, the same pixels.

What strictness costs is the ratio. PNGs of photographs and of labels, WebP and TIFF without compression; JPEG is
decoded by simplejpeg here, which is faster than Pillow, so there strictness costs less than nothing.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import PIL
from PIL import Image

from benchmarks.contest import Contest, Size
from nightseg.data.images import decode_image, decode_label, encode_png
from nightseg.data.scenes import scene

SHAPES: dict[Size, tuple[int, int]] = {"tiny": (64, 128), "default": (512, 1024), "full": (1024, 2048)}
FRAMES = 4
SAVED: dict[str, dict[str, Any]] = {"JPEG": {"quality": 90}, "PNG": {}, "WEBP": {"quality": 90}, "TIFF": {}}


def _contest(kind: str, size: Size) -> Contest:
    """The frames of four scenes, with the noise of a sensor; `label`: their labels as PNG."""
    height, width = SHAPES[size]
    scenes = [scene(0, index, "night", height, width) for index in range(FRAMES)]
    decode: Callable[[bytes], np.ndarray] = decode_image
    if kind == "label":
        decode, mode, files = decode_label, "L", [encode_png(one.label) for one in scenes]
    else:
        noise = np.random.default_rng(0).normal(0, 3, (height, width, 3))
        frames = [(one.image + noise).clip(0, 255).astype(np.uint8) for one in scenes]
        mode, files = "RGB", [_saved(frame, kind) for frame in frames]
    return Contest(
        name=f"decode_{kind.lower()}",
        work=f"{FRAMES} files of {width} x {height} as {kind}, decoded with all checks",
        peer=f"Pillow {PIL.__version__}",
        run_ours=lambda: [decode(data) for data in files],
        run_peer=lambda: [np.array(Image.open(io.BytesIO(data)).convert(mode)) for data in files],
        check=_check,
    )


def _saved(frame: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format=kind, **SAVED[kind])
    return buffer.getvalue()


def _check(ours: list[np.ndarray], peer: list[np.ndarray]) -> str:
    for one, other in zip(ours, peer, strict=True):
        assert np.array_equal(one, other), "the pixels differ"
    return "every pixel"


jpeg, png, label, webp, tiff = (partial(_contest, kind) for kind in ("JPEG", "PNG", "label", "WEBP", "TIFF"))
