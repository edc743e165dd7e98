"""A model folder as a callable: frames in, train ids and confidence out, at the frames' own size.

B = batch, K = classes, H W = height and width of a frame or of the network's input, h w = of the logits (stride 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from nightseg.frames import table as frame
from nightseg.frames.augment import resize_image
from nightseg.frames.images import BadFrame, decode_image, encode_jpeg, encode_png, read_bytes
from nightseg.frames.taxonomy import Taxonomy
from nightseg.networks.checkpoint import load_card, load_tensors
from nightseg.networks.encoders import normalise
from nightseg.networks.semantic_fpn import open_semantic_fpn, upsample_logits
from nightseg.storage import Location, UserError, sha256_of

Image = npt.NDArray[np.uint8]
Picture = Literal["mask", "color", "overlay", "confidence"]
PICTURES: tuple[Picture, ...] = ("mask", "color", "overlay", "confidence")
PICTURE_SUFFIX: Mapping[Picture, str] = {"mask": ".png", "color": ".png", "overlay": ".jpg", "confidence": ".png"}


class Segmented(NamedTuple):
    """The prediction for one frame."""

    labels: npt.NDArray[np.uint8]  # (H, W) train ids
    confidence: npt.NDArray[np.float32]  # (H, W) softmax probability of that id, in (0, 1]


class SegmentedRow(NamedTuple):
    """One row of a frame table with its upright image and prediction."""

    row: dict[str, Any]
    image: Image
    segmented: Segmented


class UnreadRow(NamedTuple):
    """One row of a frame table whose image could not be used, and why."""

    row: dict[str, Any]
    fault: BadFrame


def load_model(path: str | Path | Location, device: str | None = None) -> Segmenter:
    """Open a model folder (`model.safetensors` and `model.json`), local or a URI.

    Returns a callable: uint8 RGB image (H, W, 3) -> (uint8 train ids (H, W), float32 confidence (H, W) in (0, 1]).
    `device` is "cpu" or "cuda"; by default CUDA where there is one. Raises UserError for a folder without a segmenter.
    """
    return Segmenter(Location.of(path), device)


class Segmenter:
    """A segmenter in evaluation mode. It resizes, normalises and scales back by what its model card says."""

    def __init__(self, folder: Location, device: str | None = None) -> None:
        tensors, card = load_tensors(folder)
        _check_kind(folder, card)
        self.card: Mapping[str, Any] = card
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        network = open_semantic_fpn(tensors, card)
        # In two steps: `Module.to` has no signature for both at once.
        self._network = network.to(self.device).to(memory_format=torch.channels_last)

    @property
    def taxonomy(self) -> Taxonomy:
        """The class list the model was trained with; it has names and colours, and no label encodings."""
        part = self.card["taxonomy"]
        palette = tuple((red, green, blue) for red, green, blue in part["palette"])
        return Taxonomy(part["name"], tuple(part["classes"]), palette, {})

    def __call__(self, image_HWC: Image) -> Segmented:
        """uint8 RGB (H, W, 3) -> (labels uint8 (H, W), confidence float32 (H, W)), at the image's size."""
        return self.batch([image_HWC])[0]

    @torch.inference_mode()
    def batch(self, images: Sequence[Image]) -> list[Segmented]:
        """Several frames, of mixed sizes if need be; those that reach the network in one size share a pass."""
        inputs = [self._input(image) for image in images]
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, input_CHW in enumerate(inputs):
            groups.setdefault(tuple(input_CHW.shape), []).append(place)
        results: dict[int, Segmented] = {}
        for (_, height, width), places in groups.items():
            inputs_BCHW = torch.stack([inputs[place] for place in places])
            logits_BKhw = self._network(normalise(inputs_BCHW, self.card["mean"], self.card["std"]))
            for place, logits_Khw in zip(places, logits_BKhw, strict=True):
                logits_1KHW = upsample_logits(logits_Khw[None], height, width)
                results[place] = _segment(_to_size(logits_1KHW, images[place].shape[:2]))
        return [results[place] for place in range(len(images))]

    def _input(self, image_HWC: Image) -> Tensor:
        if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3:
            raise UserError(
                f"an image must be uint8 RGB of shape (height, width, 3), this one is {image_HWC.dtype} "
                f"{tuple(image_HWC.shape)}; convert it first, grey images by repeating the channel"
            )
        # On the CPU like in training: another device may round the resized bytes differently.
        image_CHW = torch.from_numpy(np.ascontiguousarray(image_HWC.transpose(2, 0, 1)))
        return resize_image(image_CHW, self.card["input_size"]).to(self.device)


def check_classes(folder: Location, classes: Taxonomy) -> None:
    """Raise UserError unless the folder holds a segmenter of exactly these classes. Reads the card only."""
    card = load_card(folder)
    _check_kind(folder, card)
    known = tuple(card["taxonomy"]["classes"])
    if known != classes.classes:
        raise UserError(
            f"the model {folder.uri} predicts the {len(known)} classes of {card['taxonomy']['name']}, but the labels "
            f"here have the {classes.num_classes} of {classes.name}: their ids mean different things. Use the model's "
            "taxonomy, or a model trained with this one"
        )


def _check_kind(folder: Location, card: Mapping[str, Any]) -> None:
    if card["kind"] != "semantic_fpn":
        raise UserError(
            f"{folder.uri} holds a model of kind {card['kind']!r}, but a segmenter (semantic_fpn) is needed; "
            "give the model folder of a train_segmenter stage"
        )


def _to_size(logits_1KHW: Tensor, size: tuple[int, ...]) -> Tensor:
    """Logits of the network's input -> (K, H, W) at the frame's own size, bilinear; one frame, to bound the memory."""
    if tuple(logits_1KHW.shape[2:]) != size:
        logits_1KHW = F.interpolate(logits_1KHW, size, mode="bilinear", align_corners=False)
    return logits_1KHW[0]


def _segment(logits_KHW: Tensor) -> Segmented:
    highest_HW, labels_HW = logits_KHW.max(dim=0)
    # The softmax of the winner alone, exp(u_max - u_max) = 1 over the sum: no K probabilities are kept.
    confidence_HW = torch.exp(logits_KHW - highest_HW).sum(dim=0).reciprocal()
    return Segmented(labels_HW.to(torch.uint8).cpu().numpy(), confidence_HW.cpu().numpy())


# -- rows of a frame table -------------------------------------------------------------------------------------------


def segment_rows(segmenter: Segmenter, rows: pa.Table, batch: int) -> Iterator[SegmentedRow | UnreadRow]:
    """Read and segment the frames of a resolved table, in its order; a frame that cannot be used does not stop it."""
    for start in range(0, rows.num_rows, batch):
        read = [_read(row) for row in rows.slice(start, batch).to_pylist()]
        found = iter(segmenter.batch([image for _, image in read if not isinstance(image, BadFrame)]))
        for row, image in read:
            yield UnreadRow(row, image) if isinstance(image, BadFrame) else SegmentedRow(row, image, next(found))


def _read(row: dict[str, Any]) -> tuple[dict[str, Any], Image | BadFrame]:
    try:
        data = read_bytes(Location.of(row[frame.URI]))
        if row.get(frame.SHA256) not in (None, sha256_of(data)):
            raise BadFrame("unreadable", "the file has changed since it was collected (sha256)")
        return row, decode_image(data)
    except BadFrame as fault:
        return row, fault


def quarantined(row: Mapping[str, Any], fault: BadFrame) -> dict[str, Any]:
    """The row of the quarantine table for a frame that could not be used."""
    return {
        frame.FRAME_ID: row[frame.FRAME_ID],
        frame.URI: row[frame.URI],
        frame.REASON: fault.reason,
        frame.DETAIL: fault.detail,
    }


# -- pictures --------------------------------------------------------------------------------------------------------


def picture(kind: Picture, image_HWC: Image, segmented: Segmented, classes: Taxonomy) -> bytes:
    """What people and tools look at, at the frame's size: `mask` is a palette PNG of train ids, `color` an RGB PNG in
    the classes' colours, `overlay` a JPEG of both mixed evenly, `confidence` a grey PNG (255 = certain)."""
    match kind:
        case "mask":
            return encode_png(segmented.labels, classes.palette)
        case "color":
            return encode_png(classes.colourize(segmented.labels))
        case "overlay":
            return encode_jpeg(overlay(image_HWC, classes.colourize(segmented.labels)))
        case "confidence":
            return encode_png(np.rint(segmented.confidence * 255).astype(np.uint8))


def overlay(image_HWC: Image, colours_HWC: Image) -> Image:
    """Half image, half colours, rounded to nearest: uint8 (H, W, 3)."""
    return ((image_HWC.astype(np.uint16) + colours_HWC + 1) // 2).astype(np.uint8)
