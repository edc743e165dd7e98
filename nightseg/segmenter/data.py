"""Labelled frames of a table as training batches: decoded once, drawn in an order that follows from the seed alone.

B images, H x W pixels. Which frames a step sees, and how each is augmented, is a function of (seed, epoch, frame): not
of the number of workers or threads, nor of what is kept decoded.

Threads of this process read ahead of the training. Decoders, resampling and colour work release Python's lock, so they
run side by side; each of them works on one core, or every one of them would start a team of PyTorch's threads.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from nightseg.data import table as frame
from nightseg.data.images import BadFrame, decode_image, decode_label
from nightseg.data.taxonomy import Taxonomy
from nightseg.segmenter.augment import Augmentation, augment, resize_image, resize_label, sample_rng
from nightseg.segmenter.decoded import Decoded, Kept
from nightseg.storage import Location, UserError, sha256_of

BATCHES_AHEAD: Final = 2
MOST_THREADS: Final = 8  # more only wait for Python's lock


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

    @property
    def images_per_second(self) -> float:
        """Frames that went through the training, 0 before the first epoch has ended."""
        return self.frames / self.seconds if self.seconds else 0.0

    @property
    def waiting_share(self) -> float:
        """Share in [0, 1] of the time in which the training waited for frames."""
        return self.waiting_seconds / self.seconds if self.seconds else 0.0


def reading_threads(cpus: int, device_type: str) -> int:
    """Threads that read ahead of a training that has `cpus` cores.

    A GPU leaves the cores free, but for one that feeds it. On a CPU the training needs all of them: reading, a few
    percent of the work, must not make its parallel loops wait for a thread that has lost its core.
    """
    free = cpus - 1 if device_type == "cuda" else cpus // 4
    return max(1, min(MOST_THREADS, free))


def sample_order(num_frames: int, num_samples: int, seed: int, epoch: int) -> list[Sample]:
    """The samples of one epoch: permutation after permutation of all frames, cut at `num_samples`."""
    rng = np.random.default_rng((seed, epoch))
    samples: list[Sample] = []
    repeat = 0
    while len(samples) < num_samples:
        samples += [Sample(int(row), repeat) for row in rng.permutation(num_frames)]
        repeat += 1
    return samples[:num_samples]


class LabelledFrames:
    """Random access to decoded frames: (image uint8 3 x H x W, label uint8 H x W). Safe to use from several threads.

    Images are resized to `size` = (height, width), None keeps them native; labels too when `resize_labels`. `kept` is
    where decoded frames stay; one that is not there is decoded, and put there. The tensors may be views of it: change
    nothing in them.
    Raises UserError for a frame that is missing, damaged, or not the file that was collected: the stage's key stands
    for these very frames, so training on fewer would be a different result under the same name.
    """

    def __init__(
        self, rows: pa.Table, classes: Taxonomy, *, size: Sequence[int] | None, resize_labels: bool, kept: Kept
    ) -> None:
        self._rows: list[dict[str, Any]] = rows.select(
            [frame.FRAME_ID, frame.URI, frame.LABEL_URI, frame.LABEL_ENCODING, frame.SHA256, frame.LABEL_SHA256]
        ).to_pylist()
        self._classes = classes
        self._size = size
        self._resize_labels = resize_labels
        self._kept = kept
        # However the training ends, files go when nobody holds the frames any more; a killed one leaves them.
        self.close = weakref.finalize(self, kept.close)

    def __len__(self) -> int:
        return len(self._rows)

    def frame_id(self, index: int) -> str:
        return str(self._rows[index][frame.FRAME_ID])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        decoded = self._kept.get(index)
        if decoded is None:
            decoded = self._decode(self._rows[index])
            self._kept.put(index, decoded)
        return torch.from_numpy(decoded.image).permute(2, 0, 1), torch.from_numpy(decoded.label)

    def _decode(self, row: dict[str, Any]) -> Decoded:
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
        image_3HW = resize_image(torch.from_numpy(pixels).permute(2, 0, 1), self._size)
        label_HW = torch.from_numpy(train_ids)
        if self._resize_labels:
            label_HW = resize_label(label_HW, self._size)
        return Decoded(image_3HW.permute(1, 2, 0).contiguous().numpy(), label_HW.contiguous().numpy())


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

    `threads` decode and augment up to two batches ahead of the training, straight into the batch.
    """

    def load(sample: Sample, image_HW3: Tensor, label_HW: Tensor) -> None:
        rng = sample_rng(seed, epoch, sample.repeat, sample.row)
        image, label = augment(*frames[sample.row], rng, crop=crop, settings=augmentation, fill=fill)
        image_HW3.copy_(image.permute(1, 2, 0))
        label_HW.copy_(label)

    def begin(pool: ThreadPoolExecutor, samples: Sequence[Sample]) -> tuple[Batch, list[Future[None]]]:
        images_BHW3 = torch.empty((len(samples), *crop, 3), dtype=torch.uint8, pin_memory=pin_memory)
        labels_BHW = torch.empty((len(samples), *crop), dtype=torch.uint8, pin_memory=pin_memory)
        places = zip(samples, images_BHW3, labels_BHW, strict=True)
        return Batch(images_BHW3.permute(0, 3, 1, 2), labels_BHW), [pool.submit(load, *place) for place in places]

    mine = [order[start : start + batch][rank::world_size] for start in range(0, len(order), batch)]
    with _reading(threads) as pool:
        waiting: deque[tuple[Batch, list[Future[None]]]] = deque()
        for samples in mine:
            waiting.append(begin(pool, samples))
            if len(waiting) > BATCHES_AHEAD:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())


def _finished(batch: Batch, parts: Sequence[Future[None]]) -> Batch:
    for part in parts:
        part.result()
    return batch


@contextmanager
def _reading(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads whose PyTorch works on one core each. What this thread and later ones use stays as it is."""
    own = torch.get_num_threads()
    ready = threading.Barrier(threads + 1)

    def prepare() -> None:
        torch.get_num_threads()  # a thread takes over the common number when it first asks: now, not later
        torch.set_num_threads(1)  # of this thread, but also the common number
        ready.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="frames")
    try:
        started = [pool.submit(prepare) for _ in range(threads)]
        ready.wait()
        for thread in started:
            thread.result()
        torch.set_num_threads(own)
        yield pool
    finally:
        ready.abort()  # had a thread not started, the others would wait for it for ever
        # An error, or a training that stopped: what has not begun is dropped.
        pool.shutdown(wait=True, cancel_futures=True)
