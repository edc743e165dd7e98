"""Labelled frames of a table as training batches: decoded once, drawn in an order that follows from the seed alone.

B images, H x W pixels, K classes, N frames. A training set is put together from parts, each with its share of the
samples, and some rendered anew (in other light) every time that a frame is drawn. Which frames a step sees, and how
each is augmented, is a function of (seed, epoch, frame): not of how many workers or threads, nor of what is cached.
torch's DataLoader gives this for whole batches only, from processes that would each hold the decoded frames; here
threads read ahead: decoders and resampling free Python's lock.
"""

from __future__ import annotations

import os
import struct
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import PIL
import pyarrow as pa
import torch
from torch import Tensor

from nightseg.data import table as frame
from nightseg.data.images import BadFrame, decode_image
from nightseg.data.labels import train_ids_of
from nightseg.data.prefetch import prefetch
from nightseg.data.taxonomy import IGNORE, Taxonomy
from nightseg.segmenter.augment import Wanted, augment, resize_image, resize_label, sample_rng
from nightseg.segmenter.settings import Augmentation, ClassSampling, Training
from nightseg.storage import Location, UserError, hash_of, inputs, sha256_of
from nightseg.storage.scratch import Scratch

BATCHES_AHEAD: Final = 2
MOST_THREADS: Final = 8  # more only wait for Python's lock
SHARE_OF_MEMORY: Final = 0.25  # of the machine, for the decoded frames of all its processes
_CONTAINER_LIMITS: Final = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_HEADER: Final = struct.Struct("<8s4I")  # height and width of the image, height and width of the label
_MAGIC: Final = b"nsframe1"

Bytes = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]


# -- frames -----------------------------------------------------------------------------------------------------------


def _label_columns(rows: pa.Table) -> list[str]:
    """What a label follows from, where its rows have it."""
    known = (frame.LABEL_SHA256, frame.LABEL_ENCODING, frame.LABEL_KEPT)
    return [name for name in known if name in rows.column_names]


class Decoded(NamedTuple):
    """image uint8 H x W x 3 (RGB), label uint8 H' x W' of train ids and 255; both contiguous."""

    image: Bytes
    label: Bytes


class LabelledFrames:
    """Random access to decoded frames: (image uint8 3 x H x W, label uint8 H x W). Safe to use from several threads.

    Images are resized to `size` = (height, width), None keeps them native; labels too when `resize_labels`. A frame
    that is not in the `cache` is decoded, and put there. The tensors may be views of it: change nothing in them.
    A row without label has zeros for one: in a view of it 0 is a pixel of the frame, and 255 padding.
    Raises UserError for a frame that is missing, damaged, or not the file that was collected: the stage's key stands
    for these very frames, so training on fewer would be a different result under the same name.
    """

    def __init__(
        self, rows: pa.Table, classes: Taxonomy, *, size: Sequence[int] | None, resize_labels: bool, cache: FrameCache
    ) -> None:
        needed = [frame.FRAME_ID, frame.URI, frame.SHA256, frame.LABEL_URI, *_label_columns(rows)]
        self._rows: list[dict[str, Any]] = rows.select(needed).to_pylist()
        self.classes = classes
        self._size = size
        self._resize_labels = resize_labels
        self._cache = cache
        # However the training ends, files go when nobody holds the frames any more; a killed one leaves them.
        self.close = weakref.finalize(self, cache.close)

    def __len__(self) -> int:
        return len(self._rows)

    def frame_id(self, index: int) -> str:
        return str(self._rows[index][frame.FRAME_ID])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        decoded = self._cache.get(index)
        if decoded is None:
            decoded = self._decode(self._rows[index])
            self._cache.put(index, decoded)
        return torch.from_numpy(decoded.image).permute(2, 0, 1), torch.from_numpy(decoded.label)

    def _decode(self, row: dict[str, Any]) -> Decoded:
        try:
            pixels = decode_image(_read(row))
            if row[frame.LABEL_URI] is None:
                return self._resized(pixels, np.zeros(pixels.shape[:2], np.uint8))
            train_ids = train_ids_of(row, self.classes, (pixels.shape[0], pixels.shape[1]))
            assert train_ids is not None, row
        except BadFrame as bad:
            raise UserError(
                f"{row[frame.FRAME_ID]}: {bad}\n  image {row[frame.URI]}\n  label {row[frame.LABEL_URI]}\n"
                "  The frame was good when it was collected",
                cure="restore the files, or start a new run folder to collect what is there now",
            ) from bad
        return self._resized(pixels, train_ids)

    def _resized(self, pixels: Bytes, train_ids: Bytes) -> Decoded:
        image_3HW = resize_image(torch.from_numpy(pixels).permute(2, 0, 1), self._size)
        label_HW = torch.from_numpy(train_ids)
        if self._resize_labels:
            label_HW = resize_label(label_HW, self._size)
        return Decoded(image_3HW.permute(1, 2, 0).contiguous().numpy(), label_HW.contiguous().numpy())


def _read(row: dict[str, Any]) -> bytes:
    try:
        data = inputs.read(Location.of(row[frame.URI]), row[frame.SHA256])
    except FileNotFoundError as error:
        raise BadFrame("missing", f"there is no file {row[frame.URI]}") from error
    if row[frame.SHA256] is not None and sha256_of(data) != row[frame.SHA256]:
        raise BadFrame("unreadable", f"the content of {row[frame.URI]} has changed (sha256)")
    return data


# -- batches ----------------------------------------------------------------------------------------------------------


Render = Callable[[Bytes, Bytes, int], Bytes]
"""A frame in other light: (image uint8 H x W x 3, train ids uint8 H x W, seed) to an image of the same size."""


@dataclass(frozen=True)
class Part:
    """Frames that a training set is put together from: rows of its table, and how they are drawn."""

    rows: tuple[int, ...]
    weight: float | None = None  # share of the samples as against other parts; None = every frame of all parts alike
    render: Render | None = None  # drawn anew with every sample

    @classmethod
    def whole(cls, num_frames: int) -> Part:
        """All frames of a table, as they are."""
        return cls(tuple(range(num_frames)))


class Sample(NamedTuple):
    """Row `row` of the frame table, drawn for the `repeat`-th time in its epoch as entry `entry` of the training set:
    of all parts laid end to end. `shows`: a class that its crop should have."""

    row: int
    repeat: int
    entry: int
    part: int = 0
    shows: int | None = None


class Batch(NamedTuple):
    """images uint8 B x 3 x H x W in channels-last memory, labels uint8 B x H x W of train ids and 255, and how much
    each pixel counts, float32 B x H x W; None = all alike."""

    images: Tensor
    labels: Tensor
    weights: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        images, labels, weights = (None if part is None else part.to(device, non_blocking=True) for part in self)
        assert images is not None and labels is not None
        return Batch(images, labels, weights)


class PoolBatch(NamedTuple):
    """Two views of the same pixels of P unlabelled frames, uint8 P x 3 x H x W: the teacher's, and the student's in
    other light; and where they are padding, bool P x H x W."""

    weak: Tensor
    strong: Tensor
    padding: Tensor

    def to(self, device: torch.device) -> PoolBatch:
        return PoolBatch(*(part.to(device, non_blocking=True) for part in self))


class Sampler:
    """Which samples an epoch draws, a function of (seed, epoch).

    Without weights: permutation after permutation of all frames, cut at the number of samples. With weights: of every
    part its share of the samples, in random order, each part permutation after permutation. With `classes`, in a part
    whose labels are counted, a class is drawn first, the rarer the likelier, and then one of the frames that show it
    (rare class sampling, arXiv 2111.14887).

    `pixels_NK`: pixels of the label of each row by class, a row of -1 where they are not counted.
    """

    def __init__(
        self, parts: Sequence[Part], classes: ClassSampling | None = None, pixels_NK: Counts | None = None
    ) -> None:
        self.parts = list(parts)
        self._rows = [row for part in parts for row in part.rows]
        self._first = np.cumsum([0, *(len(part.rows) for part in parts)]).tolist()
        self._classes = classes
        self._likely_K: npt.NDArray[np.float64] = np.empty(0)
        self._showing: list[list[npt.NDArray[np.intp]]] = [[] for _ in parts]  # part -> class -> places in the part
        if classes is not None and pixels_NK is not None:
            self._likely_K = likely_classes(pixels_NK[self._rows], classes.temperature)
            shares_NK = pixels_NK / np.maximum(pixels_NK.sum(axis=1, keepdims=True), 1)
            shows_NK = (pixels_NK > 0) & (shares_NK >= classes.min_share)
            self._showing = [
                [np.flatnonzero(column) for column in shows_NK[list(part.rows)].T]
                if (pixels_NK[list(part.rows)] >= 0).all()
                else []  # frames without counts would never be drawn
                for part in parts
            ]

    @property
    def knows_classes(self) -> bool:
        """Whether there is a part that samples by class can be drawn from."""
        return any(self._showing)

    @property
    def num_frames(self) -> int:
        return len(self._rows)

    def epoch(self, num_samples: int, seed: int, epoch: int) -> list[Sample]:
        rng = np.random.default_rng((seed, epoch))
        samples: list[tuple[int, int, int | None]]
        if self._classes is None and all(part.weight is None for part in self.parts):
            entries = _permutations(self.num_frames, num_samples, rng)
            part_of = np.searchsorted(self._first, entries, side="right") - 1
            samples = [(entry, part, None) for entry, part in zip(entries.tolist(), part_of.tolist(), strict=True)]
        else:
            samples = self._mixed(num_samples, rng)
        drawn: dict[int, int] = {}
        order = []
        for entry, part, shows in samples:
            repeat = drawn.get(entry, 0)
            order.append(Sample(self._rows[entry], repeat, entry, part, shows))
            drawn[entry] = repeat + 1
        return order

    def _mixed(self, num_samples: int, rng: np.random.Generator) -> list[tuple[int, int, int | None]]:
        """(entry, part, class shown) of each sample."""
        weights = [len(part.rows) if part.weight is None else part.weight for part in self.parts]
        part_of = rng.permutation(np.repeat(np.arange(len(weights)), shares_of(num_samples, weights)))
        counts = np.bincount(part_of, minlength=len(weights))
        streams = [iter(self._of_part(part, int(count), rng)) for part, count in enumerate(counts)]
        drawn = ((part, *next(streams[part])) for part in part_of.tolist())
        return [(self._first[part] + place, part, shows) for part, place, shows in drawn]

    def _of_part(self, part: int, count: int, rng: np.random.Generator) -> list[tuple[int, int | None]]:
        """(place in the part, class shown) of `count` samples of a part."""
        showing = self._showing[part]
        likely_K = self._likely_K * [bool(len(places)) for places in showing] if showing else np.zeros(0)
        if not likely_K.any():
            return [(int(place), None) for place in _permutations(len(self.parts[part].rows), count, rng)]
        wanted = rng.choice(len(likely_K), size=count, p=likely_K / likely_K.sum())
        return [(int(rng.choice(showing[shows])), int(shows)) for shows in wanted]


def label_pixels(rows: pa.Table, num_classes: int) -> Counts:
    """Pixels of the labels by class, int64 N x K, as they were counted; a row of -1 where they were not."""
    known = frame.LABEL_PIXELS in rows.column_names
    counted = rows[frame.LABEL_PIXELS].to_pylist() if known else [None] * rows.num_rows
    return np.array([pixels or [-1] * num_classes for pixels in counted], dtype=np.int64).reshape(-1, num_classes)


def likely_classes(pixels_NK: Counts, temperature: float) -> npt.NDArray[np.float64]:
    """How likely each class is drawn, K numbers that add up to 1: softmax of (1 - share of the pixels) / temperature
    (arXiv 2111.14887, equation 12). A class without a pixel is never drawn; all zeros without any pixel."""
    counts_K = pixels_NK.clip(min=0).sum(axis=0)
    if not counts_K.any():
        return np.zeros(len(counts_K))
    frequency_K, present_K = counts_K / counts_K.sum(), counts_K > 0
    likely_K: npt.NDArray[np.float64] = np.zeros(len(counts_K))
    likely_K[present_K] = np.exp((frequency_K[present_K].min() - frequency_K[present_K]) / temperature)
    likely_K /= likely_K.sum()
    return likely_K


def shares_of(count: int, weights: Sequence[float]) -> npt.NDArray[np.intp]:
    """`count` shared out by weight in whole numbers (largest remainders; of equal ones the first)."""
    exact = count * np.asarray(weights, dtype=np.float64) / np.sum(weights)
    shares: npt.NDArray[np.intp] = np.floor(exact + 1e-9).astype(np.intp)
    late = np.argsort(shares - exact, kind="stable")[: count - int(shares.sum())]
    shares[late] += 1
    return shares


def _permutations(num_frames: int, count: int, rng: np.random.Generator) -> npt.NDArray[np.intp]:
    rounds = [rng.permutation(num_frames) for _ in range(-(-count // num_frames) if count else 0)]
    return np.concatenate([np.empty(0, dtype=np.intp), *rounds])[:count].astype(np.intp)


class Reading(NamedTuple):
    """How a worker reads its part of every global batch: of B samples those at `rank`, `rank` + `world_size`, ...

    `threads` decode and augment up to two batches ahead of the training. `fill` is the colour of what lies outside of a
    frame. `seed` and `epoch` are those of the order: augmentation follows from them, too.
    """

    rank: int
    world_size: int
    seed: int
    epoch: int
    fill: tuple[int, int, int]
    threads: int
    pin_memory: bool

    def mine(self, order: Sequence[Sample], batch: int) -> list[Sequence[Sample]]:
        """This worker's samples, batch by batch."""
        return [order[start : start + batch][self.rank :: self.world_size] for start in range(0, len(order), batch)]

    def ahead(self, batch: int) -> int:
        """Samples that are read ahead."""
        return BATCHES_AHEAD * -(-batch // self.world_size)


def training_batches(
    frames: LabelledFrames,
    parts: Sequence[Part],
    order: Sequence[Sample],
    training: Training,
    reading: Reading,
) -> Iterator[Batch]:
    """This worker's part of every global batch of `training.batch` samples, decoded straight into the batch."""
    mine, fill = reading.mine(order, training.batch), reading.fill

    def places() -> Iterator[tuple[Batch, Sample, Tensor, Tensor]]:
        for samples in mine:
            shape = (len(samples), *training.crop)
            images_BHW3 = torch.empty((*shape, 3), dtype=torch.uint8, pin_memory=reading.pin_memory)
            labels_BHW = torch.empty(shape, dtype=torch.uint8, pin_memory=reading.pin_memory)
            batch = Batch(images_BHW3.permute(0, 3, 1, 2), labels_BHW)
            for place in zip(samples, images_BHW3, labels_BHW, strict=True):
                yield batch, *place

    def load(place: tuple[Batch, Sample, Tensor, Tensor]) -> Batch:
        batch, sample, image_HW3, label_HW = place
        draw = (reading.seed, reading.epoch, sample.repeat, sample.entry)
        image, label = frames[sample.row]
        render = parts[sample.part].render
        if render is not None:
            light = int(np.random.SeedSequence(draw).generate_state(1, np.uint32)[0])
            rendered_HW3 = render(image.permute(1, 2, 0).numpy(), label.numpy(), light)
            image = torch.from_numpy(rendered_HW3).permute(2, 0, 1)
        shows = None
        if sample.shows is not None and training.class_sampling is not None:
            shows = Wanted(sample.shows, training.class_sampling.min_share)
        view = augment(
            image, label, sample_rng(*draw), crop=training.crop, settings=training.augmentation, fill=fill, shows=shows
        )
        image_HW3.copy_(view[0].permute(1, 2, 0))
        label_HW.copy_(view[1])
        return batch

    with _single_core_threads(reading.threads) as pool:
        loaded = prefetch(pool, load, places(), ahead=reading.ahead(training.batch))
        for samples in mine:
            yield [next(loaded) for _ in samples][-1]


def pool_batches(
    frames: LabelledFrames,
    order: Sequence[Sample],
    augmentation: Augmentation,
    reading: Reading,
    *,
    batch: int,
    crop: tuple[int, int],
) -> Iterator[PoolBatch]:
    """`training_batches` of unlabelled frames: this rank's part of every `batch` samples. Both views have the scale,
    place and flip that `augmentation` draws, only the strong one its light and noise."""
    mine, fill = reading.mine(order, batch), reading.fill
    geometry = Augmentation(scale=augmentation.scale, flip=augmentation.flip)
    light = augmentation.model_copy(update={"scale": (1.0, 1.0), "flip": 0.0})

    def load(sample: Sample) -> tuple[Tensor, ...]:
        rng = sample_rng(reading.seed, reading.epoch, sample.repeat, sample.entry)
        weak, label = augment(*frames[sample.row], rng, crop=crop, settings=geometry, fill=fill)
        strong, _ = augment(weak, label, rng, crop=crop, settings=light, fill=fill)
        return weak, strong, label == IGNORE

    with _single_core_threads(reading.threads) as pool:
        samples = (sample for one in mine for sample in one)
        loaded = prefetch(pool, load, samples, ahead=reading.ahead(batch))
        for one in mine:
            parts = zip(*(next(loaded) for _ in one), strict=True)
            stacked = PoolBatch(*(torch.stack(part) for part in parts))
            yield PoolBatch(*(part.pin_memory() for part in stacked)) if reading.pin_memory else stacked


def reading_threads(cpus: int, device_type: str) -> int:
    """Threads that read ahead of a training that has `cpus` cores.

    A GPU leaves the cores free, but for one that feeds it. On a CPU reading must not take a core from parallel loops.
    """
    free = cpus - 1 if device_type == "cuda" else cpus // 4
    return max(1, min(MOST_THREADS, free))


@contextmanager
def _single_core_threads(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads whose PyTorch works on one core each, not a team of threads each. What other threads use stays."""
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


# -- caches of decoded frames -----------------------------------------------------------------------------------------


class InMemory:
    """Frames in the memory of this process, up to `room` bytes; the first come stay."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._lock = threading.Lock()
        self._frames: dict[int, Decoded] = {}

    def get(self, row: int) -> Decoded | None:
        return self._frames.get(row)

    def put(self, row: int, decoded: Decoded) -> None:
        needed = decoded.image.nbytes + decoded.label.nbytes
        with self._lock:
            if row not in self._frames and needed <= self._room:
                self._room -= needed
                self._frames[row] = decoded

    def close(self) -> None:
        self._frames.clear()


class OnDisk:
    """Frames as memory-mapped files, shared by all processes of this machine that train on the same table.

    A file is written whole or not at all, so a killed process leaves no torn frame; a file whose size is not that of
    its frame is not there. Frames are kept while a tenth of the disk, or 4 GiB, stays free.
    """

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch

    def get(self, row: int) -> Decoded | None:
        mapped = self._scratch.map(_name(row))
        if mapped is None or len(mapped) < _HEADER.size:
            return None
        magic, height, width, label_height, label_width = _HEADER.unpack_from(mapped)
        middle = _HEADER.size + 3 * height * width
        if magic != _MAGIC or len(mapped) != middle + label_height * label_width:
            return None
        pixels = np.frombuffer(mapped, np.uint8, 3 * height * width, _HEADER.size)
        label = np.frombuffer(mapped, np.uint8, label_height * label_width, middle)
        return Decoded(pixels.reshape(height, width, 3), label.reshape(label_height, label_width))

    def put(self, row: int, decoded: Decoded) -> None:
        header = _HEADER.pack(_MAGIC, *decoded.image.shape[:2], *decoded.label.shape)
        self._scratch.write(_name(row), [header, decoded.image.data, decoded.label.data])

    def close(self) -> None:
        self._scratch.close()


FrameCache = InMemory | OnDisk  # decoded frames by row number; threads may use one at the same time


def _name(row: int) -> str:
    return f"{row:07d}.frame"


def cache_for(
    rows: pa.Table, classes: Taxonomy, *, size: Sequence[int] | None, resize_labels: bool, sharers: int, workers: int
) -> FrameCache:
    """The best cache for the frames of a table.

    `sharers` tables of decoded frames lie on this machine in all, `workers` of them are this one. A single worker
    whose frames fit into its share of a quarter of the memory keeps them there; several workers, or more frames than
    memory, share memory-mapped files. Without hashes of the frames, or a private temporary folder, only memory is left.
    """
    room = memory_share(sharers)
    needed = decoded_bytes(rows, size=size, resize_labels=resize_labels)
    if workers == 1 and needed is not None and needed <= room:
        return InMemory(room)
    labelled = rows[frame.LABEL_URI].null_count < rows.num_rows
    hashes = rows.select([frame.SHA256, *(_label_columns(rows) if labelled else ())])
    if any(hashes[name].null_count for name in hashes.column_names if name != frame.LABEL_KEPT):
        return InMemory(room)
    encodings = sorted(set(hashes[frame.LABEL_ENCODING].to_pylist())) if labelled else []
    key = {
        "frames": hash_of(hashes.to_pylist()),
        "ids": {name: classes.lut(name)[0].tolist() for name in encodings},
        "size": None if size is None else list(size),
        "resize_labels": resize_labels,
        "made by": [_MAGIC.decode(), torch.__version__, PIL.__version__],  # another resize, another decoder
    }
    scratch = Scratch.open(hash_of(key))
    return InMemory(room) if scratch is None else OnDisk(scratch)


def memory_share(sharers: int) -> int:
    """Bytes that one of `sharers` tables may keep in memory: a quarter of this machine's, shared evenly."""
    return int(_memory() * SHARE_OF_MEMORY) // sharers


def _memory() -> int:
    """Bytes of this machine, or of the container that is all this process may use of it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in _CONTAINER_LIMITS:
        if file.exists() and (text := file.read_text().strip()).isdecimal():  # "max" where there is no limit
            limits.append(int(text))
    return min(limits)


def decoded_bytes(rows: pa.Table, *, size: Sequence[int] | None, resize_labels: bool) -> int | None:
    """Bytes that all frames of the table take when decoded; None if it does not tell the size of each."""
    wanted = None if size is None else size[0] * size[1]
    total = 0
    for width, height in zip(rows[frame.WIDTH].to_pylist(), rows[frame.HEIGHT].to_pylist(), strict=True):
        native = None if width is None or height is None else width * height
        pixels, label = (wanted or native), (wanted if wanted and resize_labels else native)
        if pixels is None or label is None:
            return None
        total += 3 * pixels + label
    return total
