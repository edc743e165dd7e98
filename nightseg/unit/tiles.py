"""Large images through a network a tile at a time: tiles overlap, and their overlaps are blended.

Letters in tensor names: B batch, C channels, H, W image size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def tiled(apply: Callable[[Tensor], Tensor], images_BCHW: Tensor, tile: tuple[int, int], overlap: int) -> Tensor:
    """`apply(images)` for an `apply` that keeps the size, from tiles of `tile` = (height, width) pixels; float32.

    Neighbours share `overlap` pixels or more, in which the share of each falls linearly towards its border. Where
    `apply` looks no further than `overlap` pixels, everything but the overlaps equals `apply(images)`; whatever it
    takes from a whole image (the statistics of an instance norm) it takes from the tile instead. Tiles begin at
    multiples of what divides the image, the tile and the overlap: a stride that divides all three stays in phase.
    An axis along which the image is no larger than the tile is not cut.
    """
    batch, _, height, width = images_BCHW.shape
    rows, columns = spans(height, tile[0], overlap), spans(width, tile[1], overlap)
    if len(rows) == len(columns) == 1:
        return apply(images_BCHW).float()
    sums_BCHW: Tensor | None = None
    shares_HW = torch.zeros(height, width, device=images_BCHW.device)
    for top, bottom in rows:
        for left, right in columns:
            made_BChw = apply(images_BCHW[:, :, top:bottom, left:right]).float()
            share_hw = _ramp(top, bottom, height, overlap).view(-1, 1) * _ramp(left, right, width, overlap)
            share_hw = share_hw.to(made_BChw.device)
            if sums_BCHW is None:
                sums_BCHW = made_BChw.new_zeros(batch, made_BChw.shape[1], height, width)
            sums_BCHW[:, :, top:bottom, left:right] += made_BChw * share_hw
            shares_HW[top:bottom, left:right] += share_hw
    assert sums_BCHW is not None
    return sums_BCHW / shares_HW


def spans(size: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """(begin, end) of tiles that cover `size` pixels, all `tile` long, the last one moved back to end with them."""
    if not 0 <= overlap < tile:
        raise ValueError(f"tiles of {tile} pixels cannot overlap by {overlap}")
    if size <= tile:
        return [(0, size)]
    return [(begin, begin + tile) for begin in _begins(size, tile, overlap)]


def _begins(size: int, tile: int, overlap: int) -> Iterator[int]:
    yield from range(0, size - tile, tile - overlap)
    yield size - tile


def _ramp(begin: int, end: int, size: int, overlap: int) -> Tensor:
    """Share of a tile along one axis: 1 in the middle and at the image's own border, falling in the overlaps."""
    positions = torch.arange(end - begin, dtype=torch.float32) + 0.5
    share = torch.ones(end - begin)
    if overlap:
        share = share if begin == 0 else torch.minimum(share, positions / overlap)
        share = share if end == size else torch.minimum(share, positions.flip(0) / overlap)
    return share
