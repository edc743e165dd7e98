"""Where decoded frames are kept, so that each is decoded once: memory, or memory-mapped files of this machine.

What is kept is a pair of uint8 arrays: the image H x W x 3, and its label H' x W' of train ids. Nothing that is learnt
depends on what is kept: a frame that is not is decoded again, to the same bytes.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import PIL
import pyarrow as pa
import torch

from nightseg.data import table as frame
from nightseg.data.taxonomy import Taxonomy
from nightseg.storage import hash_of
from nightseg.storage.scratch import Scratch

_CONTAINER_LIMITS: Final = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
SHARE_OF_MEMORY: Final = 0.25  # of the machine, for the frames of all its processes

_HEADER: Final = struct.Struct("<8s4I")  # height and width of the image, height and width of the label
_MAGIC: Final = b"nsframe1"

Bytes = npt.NDArray[np.uint8]


class Decoded(NamedTuple):
    """image uint8 H x W x 3 (RGB), label uint8 H' x W' of train ids and 255; both contiguous."""

    image: Bytes
    label: Bytes


class Kept(Protocol):
    """A place for decoded frames, by row number. Threads may use it at the same time."""

    def get(self, row: int) -> Decoded | None:
        """The frame, if it is here."""

    def put(self, row: int, decoded: Decoded) -> None:
        """Keep the frame, if there is room for it."""

    def close(self) -> None:
        """Nothing of it is needed any more."""


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


def _name(row: int) -> str:
    return f"{row:07d}.frame"


def place_for(
    rows: pa.Table, classes: Taxonomy, *, size: Sequence[int] | None, resize_labels: bool, sharers: int, workers: int
) -> Kept:
    """The best place for the frames of a table.

    `sharers` tables of decoded frames live on this machine in all, `workers` of them are this one. A single worker
    whose frames fit into its share of a quarter of the memory keeps them there. Several workers share files: else each
    would decode every frame, and hold it. So does one that has more frames than memory: the system keeps in memory what
    it can of the files, and a crop reads its own rows only. Frames without a hash, and machines without a private
    temporary folder, are left with memory: nobody could say whose pixels a file holds.
    """
    room = memory_share(sharers)
    needed = decoded_bytes(rows, size=size, resize_labels=resize_labels)
    if workers == 1 and needed is not None and needed <= room:
        return InMemory(room)
    hashes = rows.select([frame.SHA256, frame.LABEL_SHA256, frame.LABEL_ENCODING])
    if any(column.null_count for column in hashes.columns):
        return InMemory(room)
    encodings = sorted(set(hashes[frame.LABEL_ENCODING].to_pylist()))
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
