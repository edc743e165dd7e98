"""A look at a translator: both directions on a few frames, as one picture."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nightseg.unit.data import FrameReader
from nightseg.unit.network import Generators, to_uint8, to_unit_range

SAMPLE_ROWS: Final = 4
SAMPLE_SIZE: Final = (256, 512)  # (height, width) of the largest tile of the sample sheet
SAMPLE_GAP: Final = 2


def sample_sheet(generators: Generators, day: FrameReader, night: FrameReader) -> NDArray[np.uint8]:
    """uint8 HWC RGB: rows of day, night made from it, night, day made from it; frames spread over both tables.

    The generators may be on any device and stay as they are.
    """
    device = next(generators.parameters()).device
    tiles = [_tiles(reader) for reader in (day, night)]
    height, width = (min(tile.shape[axis] for side in tiles for tile in side) for axis in (0, 1))
    columns = []
    for side, to in zip(tiles, ("night", "day"), strict=True):
        images_B3HW = torch.from_numpy(np.stack([_centre(tile, height, width) for tile in side])).permute(0, 3, 1, 2)
        with torch.inference_mode():
            made = [generators.translate(to_unit_range(image[None].to(device)), to) for image in images_B3HW]  # type: ignore[arg-type]
        columns += [images_B3HW, to_uint8(torch.cat(made)).cpu()]
    rows = min(len(column) for column in columns)
    sheet = nn.functional.pad(torch.stack([column[:rows] for column in columns], 1), (0, SAMPLE_GAP, 0, SAMPLE_GAP))
    grid = sheet.permute(0, 3, 1, 4, 2).reshape(rows * (height + SAMPLE_GAP), 4 * (width + SAMPLE_GAP), 3)
    return np.ascontiguousarray(grid[:-SAMPLE_GAP, :-SAMPLE_GAP].numpy())


def _tiles(reader: FrameReader) -> list[NDArray[np.uint8]]:
    indices = np.unique(np.linspace(0, len(reader) - 1, SAMPLE_ROWS).round().astype(int))
    return [_centre(reader.read(int(index)), *SAMPLE_SIZE) for index in indices]


def _centre(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    top, left = max(0, (image.shape[0] - height) // 2), max(0, (image.shape[1] - width) // 2)
    return image[top : top + height, left : left + width]
