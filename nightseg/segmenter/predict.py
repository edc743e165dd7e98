"""A model folder as a callable: frames in, train ids and confidence out, at the frames' own size.

A frame goes through the network whole or in overlapping tiles, and with test-time augmentation also mirrored and at
several scales; each such pass is a `TiledLogits`. Only the network's own logits are kept of it, at a quarter of its
height and width. They reach the frame's size in chunks of rows, so that no K x H x W of a large frame is ever in
memory, whatever the number of passes. (MONAI's sliding_window_inference holds all of it.)

Where the tiles of a pass overlap, their *logits* are averaged with even weights: one network at one scale gives them,
and the mean is still what upsampling works on. Over passes, *softmax probabilities* are averaged: logits differ in
size from scale to scale, and the largest would decide alone; the mean of probabilities stays a probability, which is
what the thresholds of pseudo-labels compare.

B = batch, C = colours, K = classes, H W = height and width of a frame or of the network's input, h w = of the logits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import PurePath
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F
from PIL import Image as Pixels
from pydantic import ValidationError
from torch import Tensor

from nightseg.cluster.settings import MapCompute
from nightseg.data import table as frame
from nightseg.data.images import BadFrame, rgb_pixels
from nightseg.data.prefetch import prefetch
from nightseg.data.sources import Source, find_source
from nightseg.data.taxonomy import Taxonomy
from nightseg.data.video import need_av
from nightseg.networks.devices import usable_device
from nightseg.networks.model_folder import load_card, load_tensors
from nightseg.networks.normaliser import Normaliser
from nightseg.segmenter.augment import resize_image
from nightseg.segmenter.given import READERS, images_of, is_many, opened, read_row, warn
from nightseg.segmenter.network import (
    COMMON_STRIDE,
    SemanticFPN,
    check_kind,
    open_semantic_fpn,
    rows_needed,
    upsample_logits,
)
from nightseg.segmenter.settings import Inference
from nightseg.storage import Location, UserError

CHUNK_VALUES = 2**23  # logits of a chunk at full size: 32 MiB; below about 2 MiB chunks cost speed
WHOLE_FRAME: Final = Inference()
_BATCH: Final = 8  # frames of many that are in memory at a time
SHORTEST_EDGE: Final = "shortest_edge"  # of a model card: see `input_size`
_MOST_SHOWN: Final = 4  # classes of a frame

Image = npt.NDArray[np.uint8]
Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Segmented:
    """The prediction for one frame; `labels, confidence = segmented`."""

    labels: npt.NDArray[np.uint8]  # (H, W) train ids
    confidence: npt.NDArray[np.float32]  # (H, W) softmax probability of that id, in (0, 1]
    image: Image | None = None  # the frame, uint8 RGB (H, W, 3)
    classes: Taxonomy | None = None  # whose train ids these are
    name: str = ""  # of a frame that was read: its place below the folder, `<video>/000007`, or its path

    def __iter__(self) -> Iterator[Any]:
        return iter((self.labels, self.confidence))

    @property
    def shares(self) -> dict[str, float]:
        """The share of the pixels of each class that is there, the largest first."""
        if self.classes is None:
            return {}
        counts = np.bincount(self.labels.reshape(-1), minlength=self.classes.num_classes)
        order = np.argsort(-counts[: self.classes.num_classes], kind="stable")
        return {self.classes.classes[k]: float(counts[k] / self.labels.size) for k in order if counts[k]}

    def __repr__(self) -> str:
        found = list(self.shares.items())
        shown = ", ".join(f"{name} {100 * share:.0f} %" for name, share in found[:_MOST_SHOWN])
        more = f", {len(found) - _MOST_SHOWN} more" if len(found) > _MOST_SHOWN else ""
        height, width = self.labels.shape
        what = f"{self.name or 'a frame'}, {height} x {width}"
        sure = f"mean confidence {float(self.confidence.mean(dtype=np.float64)):.2f}"
        return f"Segmented({what}{': ' if shown else ''}{shown}{more}; {sure})"


class AtStride(NamedTuple):
    """The prediction for one frame at the stride of the logits. covered: how many of them high and wide the frame is;
    the last ones may lie partly or wholly beyond it."""

    labels: npt.NDArray[np.uint8]  # (h, w) train ids
    confidence: npt.NDArray[np.float32]  # (h, w) softmax probability of that id, in (0, 1]
    covered: tuple[float, float]


def inference_settings(**changes: Any) -> Inference:
    """`Inference` from values that did not come through a recipe. Raises UserError for impossible ones."""
    try:
        return Inference(**changes)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(("inference", *map(str, first["loc"])))
        known = ", ".join(Inference.model_fields)
        raise UserError(
            f"{where}: {first['msg'].removeprefix('Value error, ')}, not {first['input']!r}",
            cure=f"give valid values for {known}: see `inference` in the recipe reference",
        ) from None


class Segmenter:
    """The segmenter of a model folder, in evaluation mode; it resizes, normalises and scales back as its card says.

    A callable: uint8 RGB image (H, W, 3) -> (uint8 train ids (H, W), float32 confidence (H, W) in (0, 1]). `device` is
    "cpu" or "cuda"; by default CUDA where there is one. Raises UserError for a folder without a segmenter.
    """

    def __init__(self, folder: Location, device: str | None = None, inference: Inference = WHOLE_FRAME) -> None:
        tensors, card = load_tensors(folder)
        check_kind(folder, card)
        self.folder = folder
        self.card: Mapping[str, Any] = card
        self.device = usable_device(device)
        self.inference = inference
        # In two steps: `Module.to` has no signature for both at once.
        self._network = open_semantic_fpn(tensors, card).to(self.device).to(memory_format=torch.channels_last)
        self._normalise = Normaliser(card["mean"], card["std"]).to(self.device)

    def using(self, **changes: Any) -> Segmenter:
        """The same network with other inference settings: `segment.using(flip=True, scales=(0.75, 1.0, 1.25))`.

        `changes` are fields of `settings.Inference`; the others stay. Copies no weights. Raises UserError.
        """
        other = copy.copy(self)
        other.inference = inference_settings(**self.inference.model_dump() | changes)
        return other

    @property
    def network(self) -> SemanticFPN:
        """In evaluation mode, on `device`: normalised images to logits at stride 4. Leave it as it is."""
        return self._network

    @property
    def taxonomy(self) -> Taxonomy:
        """The class list the model was trained with; it has names and colours, and no label encodings."""
        return card_taxonomy(self.card)

    def __repr__(self) -> str:
        name, classes = self.card["taxonomy"]["name"], self.card["taxonomy"]["classes"]
        size = self.card["input_size"]
        seen = f"frames resized to {size[0]} x {size[1]}" if size else "frames at their own size"
        if not size and self.card.get(SHORTEST_EDGE):
            seen = f"frames with the shorter side {self.card[SHORTEST_EDGE][0]}"
        told = [f"{key}={value}" for key, value in self.inference if value != getattr(WHOLE_FRAME, key)]
        parts = [self.card["encoder"], f"{len(classes)} classes of {name}", seen, *told, str(self.device)]
        return f"Segmenter({self.folder}: {', '.join(parts)})"

    def __call__(self, given: Any) -> Any:
        """One frame -> `Segmented`: labels uint8 (H, W) and confidence float32 (H, W) at its size. Many -> `frames`.

        A frame is uint8 RGB (H, W, 3), an image of Pillow, a tensor (`data.images.rgb_pixels`), or the path of an image
        file. UserError names the shape of anything else. Nobody can see the order of colours: OpenCV reads BGR, so give
        `image[..., ::-1]`. Many frames are a list, a tuple, an iterator, a folder, a pattern, a frame table, a video.
        """
        if isinstance(given, str | PurePath | Location):
            source, place = find_source(str(given), warn), Location.of(str(given))
            if place.exists() and [row[frame.URI] for row in source.images] == [place.uri]:
                return self.batch([opened(given)])[0]
            return self._of_source(source, _BATCH)
        return self.frames(given) if is_many(given) else self.batch([given])[0]

    def frames(self, given: Any, batch: int = _BATCH) -> Iterator[Segmented]:
        """Segments many frames one after the other, `batch` at a time; never more of them are in memory.

        given: a folder, a quoted pattern, a frame table or a video (`data.sources.find_source`), or a list or iterator
            of frames as a call takes them. A frame that a listing found and that cannot be used is left out with a
            warning, as in `nightseg predict`; one that was named is an error. Raises UserError.
        """
        if batch < 1:
            raise UserError(f"batch: {batch} frames at a time", cure="at least 1")
        if isinstance(given, str | PurePath | Location):
            return self._of_source(find_source(str(given), warn), batch)
        if not is_many(given):
            raise UserError(
                f"frames: it is {type(given).__name__}, not many frames", cure="give a list of frames, or call with one"
            )
        named = ((str(one) if isinstance(one, str | PurePath) else "", one) for one in given)
        images = ((name, opened(one, f"image {number}")) for number, (name, one) in enumerate(named))
        return self._in_batches(images, batch)

    def _of_source(self, source: Source, batch: int) -> Iterator[Segmented]:
        if source.videos:
            need_av()
        return self._in_batches(images_of(source, batch), batch)

    def _in_batches(self, images: Iterator[tuple[str, Image]], batch: int) -> Iterator[Segmented]:
        while some := list(islice(images, batch)):
            for (name, _), segmented in zip(some, self.batch([image for _, image in some]), strict=True):
                yield replace(segmented, name=name)

    @torch.inference_mode()
    def batch(self, given: Sequence[object]) -> list[Segmented]:
        """Several frames, of mixed sizes if need be; those that reach the network in one size share a pass.

        On a GPU everything is queued, and waited for once, at the end.
        """
        images = [rgb_pixels(image) for image in given]
        passes = self._passes(images)
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        parts = self._on_host([classify(seen, size) for seen, size in zip(passes, sizes, strict=True)])
        classes = self.taxonomy
        return [
            Segmented(labels_HW, sure_HW, image, classes)
            for (labels_HW, sure_HW), image in zip(parts, images, strict=True)
        ]

    @torch.inference_mode()
    def batch_at_stride(self, images: Sequence[Image]) -> list[AtStride]:
        """What `batch` says of frames, a value for each logit instead of each pixel: a sixteenth of the work after the
        network and of the memory."""
        found = [classify_at_stride(seen) for seen in self._passes(images)]
        parts = self._on_host([(labels_hw, sure_hw) for labels_hw, sure_hw, _ in found])
        return [AtStride(*part, covered) for part, (_, _, covered) in zip(parts, found, strict=True)]

    def _passes(self, images: Sequence[Image]) -> list[list[TiledLogits]]:
        """Each frame at every scale, and mirrored, through the network."""
        passes: list[list[TiledLogits]] = [[] for _ in images]
        for scale in self.inference.scales:
            inputs = [self._input(image, scale) for image in images]
            groups: dict[tuple[int, ...], list[int]] = {}
            for index, input_CHW in enumerate(inputs):
                groups.setdefault(tuple(input_CHW.shape), []).append(index)
            for members in groups.values():
                inputs_BCHW = torch.stack([inputs[index] for index in members])
                for mirrored in (False, True) if self.inference.flip else (False,):
                    found = tiled_logits(self._logits, inputs_BCHW, self.inference, mirrored=mirrored)
                    for index, logits in zip(members, found, strict=True):
                        passes[index].append(logits)
        return passes

    def _logits(self, inputs_BCHW: Tensor) -> Tensor:
        logits_BKhw: Tensor = self._network(self._normalise(inputs_BCHW))
        return logits_BKhw

    def _input(self, image_HWC: Image, scale: float) -> Tensor:
        high, wide = (max(1, round(side * scale)) for side in input_size(self.card, image_HWC.shape[:2]))
        # On the CPU as in training: another device may round the resized bytes differently.
        if self.card.get(SHORTEST_EDGE):
            pixels_HWC = np.asarray(Pixels.fromarray(image_HWC).resize((wide, high), Pixels.Resampling.BILINEAR))
            resized_CHW = torch.from_numpy(np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1)))
        else:
            image_CHW = torch.from_numpy(np.ascontiguousarray(image_HWC.transpose(2, 0, 1)))
            resized_CHW = resize_image(image_CHW, (high, wide))
        return (resized_CHW.pin_memory() if self.device.type == "cuda" else resized_CHW).to(
            self.device, non_blocking=True
        )

    def _on_host(self, found: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Any, Any]]:
        if self.device.type != "cuda":
            return [(labels_HW.cpu().numpy(), sure_HW.cpu().numpy()) for labels_HW, sure_HW in found]
        pinned = [tuple(torch.empty_like(part, device="cpu", pin_memory=True) for part in pair) for pair in found]
        for pair, there in zip(found, pinned, strict=True):
            for part, copied in zip(pair, there, strict=True):
                copied.copy_(part, non_blocking=True)
        torch.cuda.current_stream(self.device).synchronize()
        # Copied once more: results that somebody keeps must not keep pinned memory, which the whole machine shares.
        return [(labels_HW.numpy().copy(), sure_HW.numpy().copy()) for labels_HW, sure_HW in pinned]


def input_size(card: Mapping[str, Any], size: Sequence[int]) -> Size:
    """(height, width) in which a frame of `size` reaches the network of a model card.

    `shortest_edge` [least, most] is detectron2's ResizeShortestEdge (`get_output_shape`, with its rounding): the
    shorter side becomes `least` long, and both less where the longer one would exceed `most`; never 0.
    """
    height, width = card["input_size"] or size
    if not card.get(SHORTEST_EDGE):
        return int(height), int(width)
    least, most = card[SHORTEST_EDGE]
    scale = least * 1.0 / min(height, width)
    high, wide = (least * 1.0, scale * width) if height < width else (scale * height, least * 1.0)
    if max(high, wide) > most:
        scale = most * 1.0 / max(high, wide)
        high, wide = high * scale, wide * scale
    return max(1, int(high + 0.5)), max(1, int(wide + 0.5))


def card_taxonomy(card: Mapping[str, Any]) -> Taxonomy:
    """The class list of a model card: names and colours, no label encodings."""
    part = card["taxonomy"]
    palette = tuple((red, green, blue) for red, green, blue in part["palette"])
    return Taxonomy(part["name"], tuple(part["classes"]), palette, {})


def check_classes(folder: Location, classes: Taxonomy) -> None:
    """Raise UserError unless the folder holds a segmenter of exactly these classes. Reads the card only."""
    card = load_card(folder)
    check_kind(folder, card)
    known = tuple(card["taxonomy"]["classes"])
    if known != classes.classes:
        raise UserError(
            f"model {folder.uri}: it predicts the {len(known)} classes of {card['taxonomy']['name']}, but the labels "
            f"here have the {classes.num_classes} of {classes.name}: their ids mean different things",
            cure="use the model's taxonomy, or a model trained with this one",
        )


# -- a frame through the network --------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """Logits (K, h, w) of a part of the network's input; top, left, height, width are pixels of that input."""

    top: int
    left: int
    height: int
    width: int
    logits: Tensor


class TiledLogits(NamedTuple):
    """All tiles of one pass over a frame. height, width: of the network's input, which was flipped if `mirrored`."""

    height: int
    width: int
    mirrored: bool
    tiles: Sequence[Tile]


def tiled_logits(
    network: Callable[[Tensor], Tensor], inputs_BCHW: Tensor, inference: Inference, *, mirrored: bool
) -> list[TiledLogits]:
    """One pass over each of B frames of one size. The network sees B tiles, or B whole frames, at a time.

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
            for index, logits_Khw in enumerate(logits_BKhw):
                tiles[index].append(Tile(top, left, high, wide, logits_Khw))
    return [TiledLogits(height, width, mirrored, parts) for parts in tiles]


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """Where windows begin along one side: every (1 - overlap) of a window, and the last one ends where the side ends.

    So every pixel is covered, nothing is padded, and only the last window is shifted inwards.
    """
    stride = max(1, round(window * (1 - overlap)))
    return [*range(0, length - window, stride), length - window] if window < length else [0]


# -- logits to labels -------------------------------------------------------------------------------------------------


def classify(passes: Sequence[TiledLogits], size: Size, stride: int = COMMON_STRIDE) -> tuple[Tensor, Tensor]:
    """Passes over one frame -> (uint8 train ids (H, W), float32 confidence (H, W) in (0, 1]), on the logits' device.

    The confidence is the probability of the predicted class: softmax of one pass, the mean of the softmaxes of several.
    `size` is the frame's (height, width); `stride` the pixels of the input a logit stands for, COMMON_STRIDE or 1.
    """
    height = size[0]
    sample = passes[0].tiles[0].logits
    labels_HW = torch.empty(size, dtype=torch.uint8, device=sample.device)
    confidence_HW = torch.empty(size, dtype=torch.float32, device=sample.device)
    rows = _rows_of_a_chunk(passes, size)
    for start in range(0, height, rows):
        stop = min(height, start + rows)
        if len(passes) == 1:
            logits_KrW = frame_rows(passes[0], size, start, stop, stride)
            highest_rW, winner_rW = logits_KrW.max(dim=0)
            # The softmax of the winner alone, exp(u_max - u_max) = 1 over the sum: no K probabilities are kept.
            sure_rW = torch.exp(logits_KrW - highest_rW).sum(dim=0).reciprocal()
        else:
            total_KrW = frame_rows(passes[0], size, start, stop, stride).softmax(dim=0)
            for one in passes[1:]:
                total_KrW += frame_rows(one, size, start, stop, stride).softmax(dim=0)
            highest_rW, winner_rW = total_KrW.max(dim=0)
            sure_rW = (highest_rW / len(passes)).clamp(max=1.0)
        labels_HW[start:stop] = winner_rW
        confidence_HW[start:stop] = sure_rW
    return labels_HW, confidence_HW


def classify_at_stride(passes: Sequence[TiledLogits]) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """`classify` with a value for each logit: train ids (h, w), confidence (h, w), and `AtStride.covered`.

    Logits of one pass over the whole frame are taken as they are; what several passes or tiles say is brought to the
    stride of the largest.
    """
    first = passes[0]
    if len(passes) == len(first.tiles) == 1 and not first.mirrored:
        covered = first.height / COMMON_STRIDE, first.width / COMMON_STRIDE
        # One beyond the frame, where the network's input was padded: its last pixels are interpolated from it, too.
        height, width = (math.ceil(side) + 1 for side in covered)
        logits_Khw = first.tiles[0].logits[:, :height, :width]
        height, width = logits_Khw.shape[1:]
        whole = TiledLogits(height, width, False, [Tile(0, 0, height, width, logits_Khw)])
        return *classify([whole], (height, width), stride=1), covered
    height = math.ceil(max(one.height for one in passes) / COMMON_STRIDE)
    width = math.ceil(max(one.width for one in passes) / COMMON_STRIDE)
    return *classify(passes, (height, width)), (height, width)


def _rows_of_a_chunk(passes: Sequence[TiledLogits], size: Size) -> int:
    """As many rows of the frame as keep a chunk within CHUNK_VALUES, in every pass and at the frame's own size."""
    height, width = size
    num_classes = len(passes[0].tiles[0].logits)
    values = max(one.width * max(1.0, one.height / height) for one in passes)
    return max(1, int(CHUNK_VALUES / (num_classes * max(values, width))))


def frame_rows(logits: TiledLogits, size: Size, start: int, stop: int, stride: int = COMMON_STRIDE) -> Tensor:
    """Logits_KrW float32 of the frame's rows [start, stop): bilinear, by pixel centres, from the network's input."""
    height, width = size
    if (logits.height, logits.width) == size:
        return _input_rows(logits, start, stop, stride)
    if (start, stop) == (0, height):
        return _to_size(_input_rows(logits, 0, logits.height, stride), size)
    # The same two rows with the same weights as if the whole frame were interpolated at once.
    source_r = torch.arange(start, stop, dtype=torch.float64).add(0.5).mul(logits.height / height).sub(0.5).clamp(min=0)
    above_r = source_r.floor().to(torch.int64).clamp(max=logits.height - 1)
    below_r = (above_r + 1).clamp(max=logits.height - 1)
    first, last = int(above_r[0]), int(below_r[-1])
    rows_KrW = _input_rows(logits, first, last + 1, stride)
    weight_r1 = (source_r - above_r).to(torch.float32).to(rows_KrW.device, non_blocking=True)[:, None]
    above_r, below_r = ((part - first).to(rows_KrW.device, non_blocking=True) for part in (above_r, below_r))
    return _to_size(torch.lerp(rows_KrW[:, above_r], rows_KrW[:, below_r], weight_r1), (stop - start, width))


def _to_size(logits_KHW: Tensor, size: Size) -> Tensor:
    if tuple(logits_KHW.shape[1:]) == size:
        return logits_KHW
    return F.interpolate(logits_KHW[None], size, mode="bilinear", align_corners=False)[0]


def _input_rows(logits: TiledLogits, start: int, stop: int, stride: int) -> Tensor:
    """Logits_KrW float32 of the rows [start, stop) of the network's input, flipped back if it was mirrored."""
    if len(logits.tiles) == 1:
        rows_KrW = _tile_rows(logits.tiles[0], start, stop, stride)
    else:
        rows_KrW = _mean_of_tiles(logits, start, stop, stride)
    return rows_KrW.flip(-1) if logits.mirrored else rows_KrW


def _mean_of_tiles(logits: TiledLogits, start: int, stop: int, stride: int) -> Tensor:
    sample = logits.tiles[0].logits
    total_KrW = torch.zeros(len(sample), stop - start, logits.width, dtype=torch.float32, device=sample.device)
    count_rW = torch.zeros(stop - start, logits.width, dtype=torch.float32, device=sample.device)
    for tile in logits.tiles:
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
    rows = rows_needed(start, stop, tile.logits.shape[1])
    return upsample_logits(tile.logits[None, :, rows], stop - start, tile.width, top=start - stride * rows.start)[0]


# -- rows of a frame table --------------------------------------------------------------------------------------------


class SegmentedRow(NamedTuple):
    """One row of a frame table with its upright image and prediction."""

    row: dict[str, Any]
    image: Image
    segmented: Segmented


class RowAtStride(NamedTuple):
    """One row of a frame table, the size (height, width) of its upright image, and its prediction."""

    row: dict[str, Any]
    size: Size
    found: AtStride


@dataclass(frozen=True)
class RowSegmenter:
    """What the worker of a pass is given to segment by. The model is opened in its process, when it is first used."""

    model: Location
    compute: MapCompute
    inference: Inference = WHOLE_FRAME
    device: str | None = None  # None: CUDA if the pass has GPUs

    @cached_property
    def segmenter(self) -> Segmenter:
        return Segmenter(self.model, self.device or self.compute.device, self.inference)

    def segment(self, rows: pa.Table, bad: list[dict[str, Any]]) -> Iterator[SegmentedRow]:
        """Read and segment the frames of a resolved table, in its order. For those that cannot be used rows of the
        quarantine table are added to `bad`."""
        for good in self._batches(rows, bad):
            found = self.segmenter.batch([image for _, image in good])
            for (row, image), segmented in zip(good, found, strict=True):
                yield SegmentedRow(row, image, segmented)

    def at_stride(self, rows: pa.Table, bad: list[dict[str, Any]]) -> Iterator[RowAtStride]:
        """`segment` at the stride of the logits."""
        for good in self._batches(rows, bad):
            found = self.segmenter.batch_at_stride([image for _, image in good])
            for (row, image), one in zip(good, found, strict=True):
                yield RowAtStride(row, (image.shape[0], image.shape[1]), one)

    def _batches(self, rows: pa.Table, bad: list[dict[str, Any]]) -> Iterator[list[tuple[dict[str, Any], Image]]]:
        with ThreadPoolExecutor(READERS, thread_name_prefix="nightseg-read") as readers:
            reading = prefetch(readers, read_row, rows.to_pylist(), ahead=self.compute.batch)
            while read := list(islice(reading, self.compute.batch)):
                bad += [frame.quarantined(row, image) for row, image in read if isinstance(image, BadFrame)]
                yield [(row, image) for row, image in read if not isinstance(image, BadFrame)]
