"""Labelled frames of a table as training batches: decoded once, drawn in an order that follows from the seed alone.

B images, H x W pixels. Which frames a step sees, and how each is augmented, is a function of (seed, epoch, frame): not
of the number of workers or threads, nor of what is cached.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from nightseg.frames import table as frame
from nightseg.frames.augment import Augmentation, augment, resize_image, resize_label, sample_rng
from nightseg.frames.images import BadFrame, decode_image, decode_label
from nightseg.frames.taxonomy import Taxonomy
from nightseg.storage import Location, UserError, sha256_of

BATCHES_AHEAD: Final = 2
CACHE_SHARE_OF_MEMORY: Final = 0.25

Item = TypeVar("Item")
Result = TypeVar("Result")


class Sample(NamedTuple):
    """Row `row` of the frame table, drawn for the `repeat`-th time in its epoch."""

    row: int
    repeat: int


class Batch(NamedTuple):
    """images uint8 B x 3 x H x W in channels-last memory, labels uint8 B x H x W of train ids and 255."""

    images: Tensor
    labels: Tensor


@dataclass
class Pace:
    """How fast a training went: `waiting_seconds` is the part of `seconds` in which no batch was ready."""

    seconds: float = 0.0
    waiting_seconds: float = 0.0
    frames: int = 0

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; time spent waiting for them is counted."""
        stream = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(stream, None)
            self.waiting_seconds += time.perf_counter() - asked
            if batch is None:
                return
            yield batch


def sample_order(num_frames: int, num_samples: int, seed: int, epoch: int) -> list[Sample]:
    """The samples of one epoch: permutation after permutation of all frames, cut at `num_samples`."""
    rng = np.random.default_rng((seed, epoch))
    samples: list[Sample] = []
    repeat = 0
    while len(samples) < num_samples:
        samples += [Sample(int(row), repeat) for row in rng.permutation(num_frames)]
        repeat += 1
    return samples[:num_samples]


def cache_bytes(share_of: int) -> int:
    """Bytes one of `share_of` processes may keep decoded frames in: a quarter of this machine's memory, shared."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(memory * CACHE_SHARE_OF_MEMORY) // share_of


class LabelledFrames:
    """Random access to decoded frames: (image uint8 3 x H x W, label uint8 H x W). Safe to use from several threads.

    Images are resized to `size` = (height, width), None keeps them native; labels too when `resize_labels`. Frames stay
    in memory until `cache` bytes are full; later ones are decoded each time.
    Raises UserError for a frame that is missing, damaged, or not the file that was collected: the stage's key stands
    for these very frames, so training on fewer would be a different result under the same name.
    """

    def __init__(
        self, rows: pa.Table, classes: Taxonomy, *, size: Sequence[int] | None, resize_labels: bool, cache: int
    ) -> None:
        self._rows: list[dict[str, Any]] = rows.select(
            [frame.FRAME_ID, frame.URI, frame.LABEL_URI, frame.LABEL_ENCODING, frame.SHA256, frame.LABEL_SHA256]
        ).to_pylist()
        self._classes = classes
        self._size = size
        self._resize_labels = resize_labels
        self._room = cache
        self._lock = threading.Lock()
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def frame_id(self, index: int) -> str:
        return str(self._rows[index][frame.FRAME_ID])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index in self._kept:
            return self._kept[index]
        decoded = self._decode(self._rows[index])
        with self._lock:
            needed = decoded[0].nbytes + decoded[1].nbytes
            if index not in self._kept and needed <= self._room:
                self._room -= needed
                self._kept[index] = decoded
        return decoded

    def _decode(self, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
        try:
            pixels = decode_image(_read(row, frame.URI, frame.SHA256))
            raw_label = decode_label(_read(row, frame.LABEL_URI, frame.LABEL_SHA256))
            if raw_label.shape != pixels.shape[:2]:
                raise BadFrame("label_size", f"label {raw_label.shape}, image {pixels.shape[:2]} (height, width)")
            train_ids = self._classes.to_train_ids(raw_label, row[frame.LABEL_ENCODING])
        except BadFrame as bad:
            raise UserError(
                f"{row[frame.FRAME_ID]}: {bad}\n  image {row[frame.URI]}\n  label {row[frame.LABEL_URI]}\n"
                f"  The frame was sound when it was collected: restore the files, or start a new run folder to collect "
                f"what is there now."
            ) from bad
        image = resize_image(torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), self._size)
        label = torch.from_numpy(train_ids)
        return image, resize_label(label, self._size) if self._resize_labels else label


def _read(row: dict[str, Any], uri: str, sha256: str) -> bytes:
    try:
        data = Location.of(row[uri]).read_bytes()
    except FileNotFoundError as error:
        raise BadFrame("missing", f"there is no file {row[uri]}") from error
    if row[sha256] is not None and sha256_of(data) != row[sha256]:
        raise BadFrame("unreadable", f"the content of {row[uri]} has changed (sha256)")
    return data


def training_batches(
    frames: LabelledFrames,
    order: Sequence[Sample],
    *,
    batch: int,
    rank: int,
    world_size: int,
    seed: int,
    epoch: int,
    crop: tuple[int, int],
    augmentation: Augmentation,
    fill: tuple[int, int, int],
    threads: int,
    pin_memory: bool,
) -> Iterator[Batch]:
    """This rank's part of every global batch of `batch` samples (rows rank, rank + world_size, ... of it).

    `threads` decode and augment up to two batches ahead of the training.
    """

    def load(sample: Sample) -> tuple[Tensor, Tensor]:
        rng = sample_rng(seed, epoch, sample.repeat, sample.row)
        return augment(*frames[sample.row], rng, crop=crop, settings=augmentation, fill=fill)

    mine = [order[start : start + batch][rank::world_size] for start in range(0, len(order), batch)]
    for views in _ahead(load, mine, threads):
        images = torch.stack([image for image, _ in views]).contiguous(memory_format=torch.channels_last)
        labels = torch.stack([label for _, label in views])
        yield Batch(images.pin_memory(), labels.pin_memory()) if pin_memory else Batch(images, labels)


def _ahead(load: Callable[[Item], Result], groups: Sequence[Sequence[Item]], threads: int) -> Iterator[list[Result]]:
    """`[load(item) for item in group]` for each group, in order, computed by threads a few groups ahead."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="frames")
    waiting: deque[list[Future[Result]]] = deque()
    try:
        for group in groups:
            waiting.append([pool.submit(load, item) for item in group])
            if len(waiting) > BATCHES_AHEAD:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        # An error, or a training that stopped: what has not begun is dropped.
        pool.shutdown(wait=True, cancel_futures=True)
