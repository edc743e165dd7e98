"""How a frame goes through a network: whole or in windows, mirrored, at several scales; and what comes of it.

A look is one way to see the whole frame: at one scale, mirrored or not, in one piece or in overlapping tiles. Only the
network's own logits are kept of it, at a quarter of its height and width. They reach the frame's size in strips of
rows, so that no K x H x W of a large frame is ever in memory, whatever the number of looks.

Two kinds of averages, for two reasons. Where tiles of one look overlap, their *logits* are averaged with even weights:
one network at one scale gives them, so they mean the same, and the mean is still what upsampling works on. Over looks,
*softmax probabilities* are averaged: networks shout at one scale and whisper at another, and the mean of the logits
would let the loudest look decide alone; the mean of probabilities stays a probability, which is what the thresholds of
pseudo-labels compare.

B = batch, K = classes, H W = height and width of a frame or of the network's input, h w = of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nightseg.segmenter.network import COMMON_STRIDE
from nightseg.storage import UserError

STRIP_VALUES = 2**23
"""Logits of a strip at full size: 32 MiB. Below about 2 MiB (16 rows of a Cityscapes frame) strips cost speed."""

LARGEST_SCALE: Final = 4.0
DEFAULT_OVERLAP: Final = 0.25
Network = Callable[[Tensor], Tensor]
Size = tuple[int, int]


@dataclass(frozen=True)
class Inference:
    """How frames are looked at. The default is one pass over the whole frame.

    window: (height, width) of the tiles in pixels of the network's input; None = the whole frame at once. A frame that
        is smaller in a direction is taken whole in that direction.
    overlap: the share of a window that the next one covers again, in [0, 1).
    flip: look at the mirrored frame as well.
    scales: factors of the network's input size, one look each; (0, 4].
    precision: bfloat16 computes the network under autocast; whatever follows the logits stays float32.
    """

    window: Size | None = None
    overlap: float = DEFAULT_OVERLAP
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        """Raises UserError for what cannot be meant."""
        if self.window is not None and (len(self.window) != 2 or min(self.window) < 1):
            raise UserError(f"window {self.window}: it is (height, width) in pixels, for example (512, 1024)")
        if not 0 <= self.overlap < 1:
            raise UserError(f"overlap {self.overlap}: it is the share of a window that the next one covers, in [0, 1)")
        if not self.scales or not all(0 < scale <= LARGEST_SCALE for scale in self.scales):
            raise UserError(f"scales {self.scales}: one or more factors above 0, at most {LARGEST_SCALE:g}")
        if len(set(self.scales)) != len(self.scales):
            raise UserError(f"scales {self.scales}: a scale stands there twice, which would count its look double")
        if self.precision not in ("float32", "bfloat16"):
            raise UserError(f"precision {self.precision!r}: it is float32 or bfloat16")


WHOLE_FRAME: Final = Inference()


class Tile(NamedTuple):
    """Logits (K, h, w) of a part of the network's input; top, left, height, width are pixels of that input."""

    top: int
    left: int
    height: int
    width: int
    logits: Tensor


class Look(NamedTuple):
    """All tiles of one way to see a frame. height, width: of the network's input; mirrored: it was turned around."""

    height: int
    width: int
    mirrored: bool
    tiles: Sequence[Tile]


# -- into the network ------------------------------------------------------------------------------------------------


def looks_at(network: Network, inputs_BCHW: Tensor, inference: Inference, *, mirrored: bool) -> list[Look]:
    """One look at each of B frames of one size. The network sees B tiles, or B whole frames, at a time.

    network: inputs_BCHW of any size -> logits_BKhw; the inputs are passed to it as they are, or cut, or mirrored.
    """
    height, width = inputs_BCHW.shape[-2:]
    seen_BCHW = inputs_BCHW.flip(-1) if mirrored else inputs_BCHW
    tiles: list[list[Tile]] = [[] for _ in range(len(inputs_BCHW))]
    high, wide = inference.window or (height, width)
    high, wide = min(high, height), min(wide, width)
    for top in window_starts(height, high, inference.overlap):
        for left in window_starts(width, wide, inference.overlap):
            with torch.autocast(seen_BCHW.device.type, torch.bfloat16, enabled=inference.precision == "bfloat16"):
                logits_BKhw = network(seen_BCHW[:, :, top : top + high, left : left + wide])
            for place, logits_Khw in enumerate(logits_BKhw):
                tiles[place].append(Tile(top, left, high, wide, logits_Khw))
    return [Look(height, width, mirrored, parts) for parts in tiles]


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """Where windows begin along one side: every (1 - overlap) of a window, and the last one ends where the side ends.

    So every pixel is covered, nothing is padded, and only the last window is shifted inwards.
    """
    stride = max(1, round(window * (1 - overlap)))
    return [*range(0, length - window, stride), length - window] if window < length else [0]


# -- out of it -------------------------------------------------------------------------------------------------------


def classify(looks: Sequence[Look], size: Size, stride: int = COMMON_STRIDE) -> tuple[Tensor, Tensor]:
    """Looks at one frame -> (uint8 train ids (H, W), float32 confidence (H, W) in (0, 1]), on the looks' device.

    The confidence is the probability of the winner: softmax of one look, the mean of the softmaxes of several.
    `size` is the frame's (height, width); `stride` the pixels of the input that one logit stands for.
    """
    height = size[0]
    sample = looks[0].tiles[0].logits
    labels_HW = torch.empty(size, dtype=torch.uint8, device=sample.device)
    confidence_HW = torch.empty(size, dtype=torch.float32, device=sample.device)
    rows = _rows_of_a_strip(looks, size)
    for start in range(0, height, rows):
        stop = min(height, start + rows)
        if len(looks) == 1:
            logits_KrW = frame_rows(looks[0], size, start, stop, stride)
            highest_rW, winner_rW = logits_KrW.max(dim=0)
            # The softmax of the winner alone, exp(u_max - u_max) = 1 over the sum: no K probabilities are kept.
            sure_rW = torch.exp(logits_KrW - highest_rW).sum(dim=0).reciprocal()
        else:
            total_KrW = frame_rows(looks[0], size, start, stop, stride).softmax(dim=0)
            for look in looks[1:]:
                total_KrW += frame_rows(look, size, start, stop, stride).softmax(dim=0)
            highest_rW, winner_rW = total_KrW.max(dim=0)
            sure_rW = (highest_rW / len(looks)).clamp(max=1.0)
        labels_HW[start:stop] = winner_rW
        confidence_HW[start:stop] = sure_rW
    return labels_HW, confidence_HW


def _rows_of_a_strip(looks: Sequence[Look], size: Size) -> int:
    """As many rows of the frame as keep a strip within STRIP_VALUES, in every look and at the frame's own size."""
    height, width = size
    num_classes = len(looks[0].tiles[0].logits)
    values = max(look.width * max(1.0, look.height / height) for look in looks)
    return max(1, int(STRIP_VALUES / (num_classes * max(values, width))))


def frame_rows(look: Look, size: Size, start: int, stop: int, stride: int = COMMON_STRIDE) -> Tensor:
    """Logits_KrW float32 of the frame's rows [start, stop): bilinear, by pixel centres, from the network's input."""
    height, width = size
    if (look.height, look.width) == size:
        return _look_rows(look, start, stop, stride)
    if (start, stop) == (0, height):
        return _to_size(_look_rows(look, 0, look.height, stride), size)
    # The same two rows with the same weights as if the whole frame were interpolated at once.
    source_r = torch.arange(start, stop, dtype=torch.float64).add(0.5).mul(look.height / height).sub(0.5).clamp(min=0)
    above_r = source_r.floor().to(torch.int64).clamp(max=look.height - 1)
    below_r = (above_r + 1).clamp(max=look.height - 1)
    first, last = int(above_r[0]), int(below_r[-1])
    rows_KrW = _look_rows(look, first, last + 1, stride)
    weight_r1 = (source_r - above_r).to(torch.float32).to(rows_KrW.device, non_blocking=True)[:, None]
    above_r, below_r = ((part - first).to(rows_KrW.device, non_blocking=True) for part in (above_r, below_r))
    return _to_size(torch.lerp(rows_KrW[:, above_r], rows_KrW[:, below_r], weight_r1), (stop - start, width))


def _to_size(logits_KHW: Tensor, size: Size) -> Tensor:
    if tuple(logits_KHW.shape[1:]) == size:
        return logits_KHW
    return F.interpolate(logits_KHW[None], size, mode="bilinear", align_corners=False)[0]


def _look_rows(look: Look, start: int, stop: int, stride: int) -> Tensor:
    """Logits_KrW float32 of the rows [start, stop) of the network's input, turned back if it was mirrored."""
    if len(look.tiles) == 1:
        rows_KrW = _tile_rows(look.tiles[0], start, stop, stride)
    else:
        rows_KrW = _mean_of_tiles(look, start, stop, stride)
    return rows_KrW.flip(-1) if look.mirrored else rows_KrW


def _mean_of_tiles(look: Look, start: int, stop: int, stride: int) -> Tensor:
    sample = look.tiles[0].logits
    total_KrW = torch.zeros(len(sample), stop - start, look.width, dtype=torch.float32, device=sample.device)
    count_rW = torch.zeros(stop - start, look.width, dtype=torch.float32, device=sample.device)
    for tile in look.tiles:
        first, last = max(start, tile.top), min(stop, tile.top + tile.height)
        if first < last:
            across = slice(tile.left, tile.left + tile.width)
            down = slice(first - start, last - start)
            total_KrW[:, down, across] += _tile_rows(tile, first - tile.top, last - tile.top, stride)
            count_rW[down, across] += 1
    return total_KrW.div_(count_rW)


def _tile_rows(tile: Tile, start: int, stop: int, stride: int) -> Tensor:
    """Logits_KrW float32 of rows of a tile: what `upsample_logits` gives for them, without the other rows."""
    if stride == 1:
        return tile.logits[:, start:stop].float()
    # One more row of logits on either side: bilinear upsampling looks half a stride around.
    first, last = max(0, start // stride - 1), min(tile.logits.shape[1], (stop - 1) // stride + 2)
    part_1Khw = tile.logits[None, :, first:last].float()
    full_KHW = F.interpolate(part_1Khw, scale_factor=stride, mode="bilinear", align_corners=False)[0]
    return full_KHW[:, start - first * stride : stop - first * stride, : tile.width]
