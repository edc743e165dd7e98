"""Frames that lend their light or colours: which of them a frame is paired with.

A frame is described by where its structure lies: the root of its luminance, reduced to at most 128 pixels, and the mean
length of the gradient of that in a grid of 4 x 8 cells, shifted and scaled to mean 0 and deviation 1. Brightness itself
would not do: the sky is the brightest part by day and the darkest by night, but it is the emptiest under both.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from nightseg.data.images import BadFrame, read_image
from nightseg.errors import UserError
from nightseg.storage import Location
from nightseg.translators.rng import frame_generator

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

GRID: Final = (4, 8)
_LONG_SIDE: Final = 128
_KEPT_BYTES: Final = 64_000_000  # of decoded lenders, in one process


class Lender(NamedTuple):
    """A frame that lends its look. `layout`: float32 (32,)."""

    frame_id: str
    uri: str
    layout: Floats


class Palette(NamedTuple):
    """The lenders of one translation and the rule of choice. Picklable; holds no pixels."""

    lenders: tuple[Lender, ...]
    among: int | None
    seed: int

    def choose(self, image_HW3: Pixels, frame_id: str) -> Lender:
        """One of the `among` lenders whose layout is nearest, drawn by seed and frame; of all if `among` is None.

        A frame never borrows from itself, nor does a translation from its source, unless there is no other lender: on
        the way back that would not be translating but handing out the answer.
        """
        own = [place for place, lender in enumerate(self.lenders) if f"/{frame_id}".endswith(f"/{lender.frame_id}")]
        near = [place for place in range(len(self.lenders)) if place not in own] or own
        if self.among is not None:
            mine = layout(image_HW3)
            apart = [float(np.sum((lender.layout - mine) ** 2)) for lender in self.lenders]
            near = sorted(near, key=lambda place: apart[place])[: self.among]
        return self.lenders[near[int(frame_generator(self.seed, frame_id, "lender").integers(len(near)))]]


def layout(image_HW3: Pixels) -> Floats:
    """Where the structure of a uint8 frame lies: float32 (32,), mean 0 and deviation 1; zeros for an empty frame."""
    grey = Image.fromarray(image_HW3).convert("L")
    shrink = min(1.0, _LONG_SIDE / max(grey.size))
    rows, columns = (max(2 * cells, round(side * shrink)) for cells, side in zip(GRID, grey.size[::-1], strict=True))
    small_HW = np.sqrt(np.asarray(grey.resize((columns, rows), Image.Resampling.BOX), dtype=np.float32))
    down_HW, across_HW = np.gradient(small_HW)
    structure = Image.fromarray(np.hypot(down_HW, across_HW).astype(np.float32))
    cells = np.asarray(structure.resize(GRID[::-1], Image.Resampling.BOX), dtype=np.float32).reshape(-1)
    spread = float(cells.std())
    if spread < 1e-6:
        return np.zeros_like(cells)
    described: Floats = (cells - cells.mean()) / np.float32(spread)
    return described


def open_palette(frames: Sequence[tuple[str, str]], *, count: int, among: int | None, seed: int, what: str) -> Palette:
    """At most `count` of (frame_id, uri), drawn by the seed whatever their order, without those that cannot be read.

    They are read and described here, one at a time. `what` names the dataset in errors. UserError: none can be read.
    """
    drawn = sorted(frames, key=lambda named: hashlib.sha256(f"{seed}\0{named[0]}".encode()).digest())[:count]
    lenders, faults = [], []
    for frame_id, uri in drawn:
        try:
            lenders.append(Lender(frame_id, uri, layout(read_image(Location.of(uri)))))
        except BadFrame as fault:
            faults.append(f"{uri}: {fault}")
    if not lenders:
        first = f" (the first of {len(faults)}: {faults[0]})" if faults else ""
        raise UserError(
            f"{what}: no frame of it can be read, so there is no style image{first}", cure="look at its counts"
        )
    return Palette(tuple(lenders), among, seed)


class LenderReader:
    """Decoded lenders of one process, the latest ones kept."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Pixels] = OrderedDict()

    def __call__(self, lender: Lender) -> Pixels:
        """uint8 HW3. Raises UserError: a lender that could be read when the translation began cannot be read now."""
        if lender.uri in self._kept:
            self._kept.move_to_end(lender.uri)
            return self._kept[lender.uri]
        try:
            image = read_image(Location.of(lender.uri))
        except BadFrame as fault:
            raise UserError(
                f"{lender.uri}: this node cannot read the style image: {fault}",
                cure="keep the dataset where every node reads it",
            ) from fault
        self._kept[lender.uri] = image
        while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > _KEPT_BYTES:
            self._kept.popitem(last=False)
        return image
