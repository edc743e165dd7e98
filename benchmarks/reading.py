"""Frames into a training: nightseg's reader against torch DataLoader with the usual transforms of PIL images.

Both draw the same scale, crop, flip and colours for each frame, read the same files with as many workers (threads here,
processes there), and end with the same uint8 batches: the peer scales the whole frame by a factor of 0.5 to 2, cuts out
the crop, mirrors it and changes its colours. Its crop begins at a whole pixel of the scaled frame and ours at a whole
pixel of the frame, so the two lie up to half a pixel apart; `check` allows for that.
"""

from __future__ import annotations

import atexit
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as transform

from benchmarks.contest import Contest, Size
from nightseg.data.class_list import taxonomy
from nightseg.data.images import encode_png
from nightseg.data.scenes import scene
from nightseg.data.table import frame_table
from nightseg.segmenter.augment import sample_rng
from nightseg.segmenter.data import Batch, LabelledFrames, OnDisk, Part, Reading, Sample, Sampler, training_batches
from nightseg.segmenter.settings import Augmentation, Training
from nightseg.storage import sha256_of
from nightseg.storage.scratch import Scratch

SEED, EPOCH, BATCH = 0, 0, 4
COLOURS = 0.3
AUGMENTATION = Augmentation(scale=(0.5, 2.0), flip=0.5, brightness=COLOURS, contrast=COLOURS, saturation=COLOURS)
MOST_APART, LEAST_EQUAL = 6.0, 0.93  # mean of grey levels, share of labels; small frames have more edges


class Shape(NamedTuple):
    frames: int
    distinct: int
    height: int
    width: int

    @property
    def crop(self) -> tuple[int, int]:
        """A quarter of the frame, which it fills whatever the scale."""
        return self.height // 2, self.width // 2


SHAPES: dict[Size, Shape] = {
    "tiny": Shape(4, 2, 64, 128), "default": Shape(24, 6, 1024, 2048), "full": Shape(96, 12, 1024, 2048),
}  # fmt: skip


def first_epoch(size: Size) -> Contest:
    """Every frame is decoded, and kept in a file."""
    return _contest(size, "input_first_epoch", "first epoch", fresh=True)


def later_epochs(size: Size) -> Contest:
    """Frames come from memory-mapped files."""
    return _contest(size, "input_later_epochs", "later epochs", fresh=False)


def _contest(size: Size, name: str, words: str, fresh: bool) -> Contest:
    shape = SHAPES[size]
    rows = _rows(shape)
    order = Sampler([Part.whole(shape.frames)]).epoch(shape.frames, SEED, EPOCH)
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    files = Path(tempfile.mkdtemp(prefix="nightseg-benchmark-"))
    number = itertools.count()
    held: list[LabelledFrames] = []

    def ours() -> list[Batch]:
        if fresh or not held:
            held.append(_labelled(rows, files, next(number)))
        found = list(_our_batches(held[-1], order, shape.crop, workers))
        if fresh:
            held.pop().close()
        return found

    loader: Any = DataLoader(
        PlainFrames(rows.to_pylist(), shape),
        batch_sampler=[order[start : start + BATCH] for start in range(0, len(order), BATCH)],
        num_workers=workers,
        persistent_workers=True,  # their start is not measured
    )
    loaders = [loader]
    del loader

    def close() -> None:
        loaders.clear()
        while held:
            held.pop().close()
        shutil.rmtree(files, ignore_errors=True)

    height, width = shape.crop
    return Contest(
        name=name,
        work=f"{words}: {shape.frames} JPEG frames {shape.width} x {shape.height} to crops {width} x {height}, "
        f"{workers} threads",
        peer=f"torch {torch.__version__} DataLoader, transforms of PIL images, {workers} processes",
        run_ours=ours,
        run_peer=lambda: [Batch(images, labels) for images, labels in loaders[0]],
        check=_agreement,
        elsewhere=True,
        close=close,
    )


def _agreement(ours: list[Batch], peer: list[Batch]) -> str:
    assert len(ours) == len(peer)
    apart = max(float((a.images.float() - b.images).abs().mean()) for a, b in zip(ours, peer, strict=True))
    equal = min(float((a.labels == b.labels).float().mean()) for a, b in zip(ours, peer, strict=True))
    assert apart < MOST_APART and equal > LEAST_EQUAL, f"crops {apart:.1f} grey levels apart, {equal:.1%} equal labels"
    return f"crops {apart:.1f} grey levels apart at most, {equal:.1%} of labels equal at least"


def _labelled(rows: pa.Table, files: Path, number: int) -> LabelledFrames:
    scratch = Scratch.open(f"benchmark {number}", files)
    assert scratch is not None
    return LabelledFrames(rows, taxonomy("camvid11"), size=None, resize_labels=True, cache=OnDisk(scratch))


def _our_batches(frames: LabelledFrames, order: list[Sample], crop: tuple[int, int], threads: int) -> Iterator[Batch]:
    return training_batches(
        frames,
        [Part.whole(len(frames))],
        order,
        Training(batch=BATCH, crop=crop, augmentation=AUGMENTATION),
        Reading(0, 1, SEED, EPOCH, fill=(0, 0, 0), threads=threads, pin_memory=False),
    )


class PlainFrames(Dataset[tuple[Tensor, Tensor]]):
    """What one writes for torch: open, scale, crop, mirror, colours, tensor."""

    def __init__(self, rows: list[dict[str, Any]], shape: Shape) -> None:
        self.rows = rows
        self.shape = shape

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, sample: Sample) -> tuple[Tensor, Tensor]:
        row = self.rows[sample.row]
        rng = sample_rng(SEED, EPOCH, sample.repeat, sample.entry)
        scale, flip, *colours = rng.random(5)
        factor = AUGMENTATION.scale[0] + scale * (AUGMENTATION.scale[1] - AUGMENTATION.scale[0])
        (height, top), (width, left) = (
            _scaled(length, cut, factor, rng.random())
            for length, cut in zip((self.shape.height, self.shape.width), self.shape.crop, strict=True)
        )
        box = (left, top, left + self.shape.crop[1], top + self.shape.crop[0])
        with Image.open(row["uri"]) as file:
            image = file.convert("RGB").resize((width, height), Image.Resampling.BILINEAR).crop(box)
        with Image.open(row["label_uri"]) as file:
            label = file.resize((width, height), Image.Resampling.NEAREST).crop(box)
        brightness, contrast, saturation = (1 + COLOURS * (2 * draw - 1) for draw in colours)
        image = transform.adjust_brightness(image, brightness)
        image = transform.adjust_contrast(image, contrast)
        image = transform.adjust_saturation(image, saturation)
        if flip < AUGMENTATION.flip:
            image, label = transform.hflip(image), transform.hflip(label)
        return transform.pil_to_tensor(image), transform.pil_to_tensor(label)[0]


def _scaled(length: int, cut: int, factor: float, place: float) -> tuple[int, int]:
    """One side of the scaled frame, and where the crop begins in it: nearest to the region that ours takes."""
    taken = round(cut / factor)
    start = int(place * (length - taken + 1))
    scaled = round(length * cut / taken)
    return scaled, min(round(start * cut / taken), scaled - cut)


@cache
def _rows(shape: Shape) -> pa.Table:
    """JPEG frames of made-up streets and their labels; streets take time to draw, so they recur."""
    folder = Path(tempfile.mkdtemp(prefix="nightseg-benchmark-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    rows = []
    for index in range(shape.distinct):
        drawn = scene(0, index, "day", shape.height, shape.width)
        Image.fromarray(drawn.image).save(folder / f"{index}.jpg", quality=90)
        (folder / f"{index}.png").write_bytes(encode_png(drawn.label))
    for index in range(shape.frames):
        files = {}
        for suffix in ("jpg", "png"):
            files[suffix] = folder / f"frame{index}.{suffix}"
            os.link(folder / f"{index % shape.distinct}.{suffix}", files[suffix])
        rows.append(
            {
                "frame_id": f"frame{index}",
                "uri": str(files["jpg"]),
                "label_uri": str(files["png"]),
                "label_encoding": "train_ids",
                "sha256": sha256_of(files["jpg"].read_bytes()),
                "label_sha256": sha256_of(files["png"].read_bytes()),
                "height": shape.height,
                "width": shape.width,
            }
        )
    return frame_table(rows)
