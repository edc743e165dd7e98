"""Style images: which frame's light or colours a frame is given.

Frames are compared by layout: the mean gradient of the root of the luminance in 4 x 8 cells, standardised. Not by
brightness: the sky is the brightest part by day and the darkest by night, but it is the emptiest under both.
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
_KEPT_BYTES: Final = 64_000_000  # of decoded style images, in one process


class StyleImage(NamedTuple):
    """`layout`: float32 (32,)."""

    frame_id: str
    uri: str
    layout: Floats


class StyleImages(NamedTuple):
    """The style images of one translation and the rule of choice. Picklable; holds no pixels."""

    images: tuple[StyleImage, ...]
    nearest: int | None
    seed: int

    def choose(self, image_HW3: Pixels, frame_id: str) -> StyleImage:
        """One of the `nearest` images by layout, drawn by seed and frame; of all if `nearest` is None.

        Not the frame itself, nor the source of a translation (translated back, that would hand out the answer), unless
        there is no other.
        """
        others = [image for image in self.images if not f"/{frame_id}".endswith(f"/{image.frame_id}")]
        near = others or list(self.images)
        if self.nearest is not None:
            mine = layout(image_HW3)
            near = sorted(near, key=lambda image: float(np.sum((image.layout - mine) ** 2)))[: self.nearest]
        # The stream's name seeds the draws: another one would change which frame is paired with which.
        return near[int(frame_generator(self.seed, frame_id, "lender").integers(len(near)))]


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


def draw_style_images(
    frames: Sequence[tuple[str, str]], *, count: int, nearest: int | None, seed: int, what: str
) -> StyleImages:
    """At most `count` of (frame_id, uri), drawn by the seed whatever their order, without those that cannot be read.

    `what` names the dataset in errors. UserError: none can be read.
    """
    drawn = sorted(frames, key=lambda named: hashlib.sha256(f"{seed}\0{named[0]}".encode()).digest())[:count]
    images, faults = [], []
    for frame_id, uri in drawn:
        try:
            images.append(StyleImage(frame_id, uri, layout(read_image(Location.of(uri)))))
        except BadFrame as fault:
            faults.append(f"{uri}: {fault}")
    if not images:
        first = f" (the first of {len(faults)}: {faults[0]})" if faults else ""
        raise UserError(
            f"{what}: no frame of it can be read, so there is no style image{first}", cure="look at its counts"
        )
    return StyleImages(tuple(images), nearest, seed)


class StyleImageReader:
    """Decoded style images of one process, the latest ones kept."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Pixels] = OrderedDict()

    def __call__(self, uri: str) -> Pixels:
        """uint8 HW3. Raises UserError: what could be read when the translation began cannot be read now."""
        if uri in self._kept:
            self._kept.move_to_end(uri)
            return self._kept[uri]
        try:
            image = read_image(Location.of(uri))
        except BadFrame as fault:
            raise UserError(
                f"{uri}: this node cannot read the style image: {fault}",
                cure="keep the dataset where every node reads it",
            ) from fault
        self._kept[uri] = image
        while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > _KEPT_BYTES:
            self._kept.popitem(last=False)
        return image
