"""Unpaired crops of day and night frames: the batches UNIT learns from.

All randomness is a function of (seed, position in the global batch stream), so workers, threads and restarts change
nothing. Frames are decoded once when they fit in memory.

Letters in tensor names: B batch, 3 RGB, H, W crop size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nightseg.data.images import BadFrame, read_image
from nightseg.data.prefetch import prefetch
from nightseg.storage import Location, UserError

Pixels = NDArray[np.uint8]

IN_MEMORY_BYTES = 2 << 30  # decoded frames a worker keeps, both domains together
BATCHES_AHEAD = 4  # decoded ahead of the training step when frames are read on demand


class Stream:
    """Names of the independent random streams of one translator; the second number of every mixed seed."""

    DAY_ORDER, NIGHT_ORDER, DAY_CROP, NIGHT_CROP, NOISE, WEIGHTS = range(6)


def mix_seed(seed: int, stream: int, first: int = 0, second: int = 0) -> int:
    """One 64-bit seed from four non-negative integers below 2^32, well spread (numpy's SeedSequence)."""
    return int(np.random.SeedSequence((seed, stream, first, second)).generate_state(1, np.uint64)[0])


class FrameRef(NamedTuple):
    """Where one frame is, and its size in pixels."""

    frame_id: str
    uri: str
    height: int
    width: int
    sha256: str | None = None  # of the file


class FrameReader:
    """Frames resized so that the shorter side is `short_side` (None: native), and at least as large as the crop.

    A frame smaller than the crop is enlarged until the crop fits; aspect ratios are kept.
    """

    def __init__(self, frames: Sequence[FrameRef], *, short_side: int | None, crop: tuple[int, int]) -> None:
        self.frames = frames
        self.short_side = short_side
        self.crop = crop
        self._decoded: list[Pixels] | None = None

    def __len__(self) -> int:
        return len(self.frames)

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) a frame of the given size is resized to."""
        scale = 1.0 if self.short_side is None else self.short_side / min(height, width)
        scale = max(scale, self.crop[0] / height, self.crop[1] / width)
        return max(self.crop[0], round(height * scale)), max(self.crop[1], round(width * scale))

    def is_too_small(self, height: int, width: int) -> bool:
        """Whether a frame must be made larger than the recipe asks for, because the crop does not fit into it."""
        scale = 1.0 if self.short_side is None else self.short_side / min(height, width)
        return round(height * scale) < self.crop[0] or round(width * scale) < self.crop[1]

    def num_bytes(self) -> int:
        """Memory that all decoded frames need."""
        return sum(3 * h * w for h, w in (self.target_size(frame.height, frame.width) for frame in self.frames))

    def decode_all(self, pool: ThreadPoolExecutor) -> None:
        """Decode every frame once and keep it."""
        self._decoded = list(pool.map(self.read, range(len(self.frames))))

    def image(self, index: int) -> Pixels:
        """uint8 HWC RGB; from memory after `decode_all`."""
        return self.read(index) if self._decoded is None else self._decoded[index]

    def read(self, index: int) -> Pixels:
        """uint8 HWC RGB, decoded and resized now. UserError names a frame that cannot be read."""
        frame = self.frames[index]
        try:
            image = read_image(Location.of(frame.uri), frame.sha256)
        except BadFrame as error:
            raise UserError(
                f"frame {frame.frame_id} ({frame.uri}) cannot be read any more: {error}",
                cure="restore the file, or delete the dataset's commit so that it is collected again",
            ) from error
        height, width = self.target_size(*image.shape[:2])
        if (height, width) == image.shape[:2]:
            return image
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(resized)


class UnpairedCrops:
    """Batches of day and night crops for one worker: slots rank, rank + world_size, ... of every global batch.

    `batch` counts crops of each domain in the global batch. Every frame is used once an epoch of its domain; epochs of
    the two domains end independently. A crop is mirrored with probability 1/2.
    """

    def __init__(
        self, day: FrameReader, night: FrameReader, *, seed: int, batch: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.readers = (day, night)
        self.seed = seed
        self.batch = batch
        self.slots = range(rank, batch, world_size)

    def keep_in_memory(self, threads: int) -> bool:
        """Decode all frames once if they fit in IN_MEMORY_BYTES; returns whether they do."""
        if sum(reader.num_bytes() for reader in self.readers) > IN_MEMORY_BYTES:
            return False
        with ThreadPoolExecutor(max(1, threads)) as pool:
            for reader in self.readers:
                reader.decode_all(pool)
        return True

    def at(self, iteration: int) -> tuple[Tensor, Tensor]:
        """uint8 (B, 3, H, W) day and night crops of one iteration, channels last in memory."""
        day, night = (
            torch.from_numpy(np.stack([self._crop(domain, iteration * self.batch + slot) for slot in self.slots]))
            for domain in (0, 1)
        )
        return day.permute(0, 3, 1, 2), night.permute(0, 3, 1, 2)

    def batches(self, start: int, stop: int, threads: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`at(start)`, ..., `at(stop - 1)`; with `threads` > 0 they are prepared ahead of their use."""
        if threads <= 0:
            yield from map(self.at, range(start, stop))
            return
        with ThreadPoolExecutor(threads) as pool:
            yield from prefetch(pool, self.at, range(start, stop), ahead=BATCHES_AHEAD)

    def _crop(self, domain: int, position: int) -> Pixels:
        reader = self.readers[domain]
        epoch, place = divmod(position, len(reader))
        image = reader.image(_order(mix_seed(self.seed, Stream.DAY_ORDER + domain, epoch), len(reader))[place])
        random = np.random.default_rng(mix_seed(self.seed, Stream.DAY_CROP + domain, *divmod(position, 2**32)))
        crop_height, crop_width = reader.crop
        top = random.integers(image.shape[0] - crop_height + 1)
        left = random.integers(image.shape[1] - crop_width + 1)
        crop = image[top : top + crop_height, left : left + crop_width]
        return crop[:, ::-1] if random.random() < 0.5 else crop


@lru_cache(maxsize=8)  # the current epoch of both domains, and the next one while a batch straddles them
def _order(seed: int, count: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).permutation(count).tolist())
