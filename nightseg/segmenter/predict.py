"""A model folder as a callable: frames in, train ids and confidence out, at the frames' own size.

B = batch, C = colours, H W = height and width of a frame or of the network's input, h w = of the logits (stride 4).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from nightseg.data import table as frame
from nightseg.data.images import BadFrame, decode_image, encode_jpeg, encode_png, read_bytes
from nightseg.data.taxonomy import Taxonomy
from nightseg.networks.model_folder import load_card, load_tensors
from nightseg.networks.normaliser import Normaliser
from nightseg.segmenter.augment import resize_image
from nightseg.segmenter.inference import WHOLE_FRAME, Inference, Look, classify, looks_at
from nightseg.segmenter.network import SemanticFPN, open_semantic_fpn
from nightseg.storage import Location, UserError, sha256_of

_READERS = 2  # threads that decode ahead; the decoders of Pillow leave the interpreter to others
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
    """A segmenter in evaluation mode. It resizes, normalises and scales back by what its model card says.

    `inference` says how frames are looked at: whole by default, or in windows, mirrored, at several scales.
    """

    def __init__(self, folder: Location, device: str | None = None, inference: Inference = WHOLE_FRAME) -> None:
        tensors, card = load_tensors(folder)
        check_kind(folder, card)
        self.card: Mapping[str, Any] = card
        self.device = usable_device(device)
        self.inference = inference
        network = open_semantic_fpn(tensors, card)
        # In two steps: `Module.to` has no signature for both at once.
        self._network = network.eval().to(self.device).to(memory_format=torch.channels_last)
        self._normalise = Normaliser(card["mean"], card["std"]).to(self.device)

    def using(self, **modes: Any) -> Segmenter:
        """The same network with other modes: `segment.using(flip=True, scales=(0.75, 1, 1.25))`. Copies no weights.

        `modes` are fields of `Inference`; those that are not named stay. Raises UserError for what cannot be meant.
        """
        other = copy.copy(self)
        other.inference = replace(self.inference, **modes)
        return other

    @property
    def network(self) -> SemanticFPN:
        """In evaluation mode, on `device`: normalised images to logits at stride 4. Leave it as it is."""
        return self._network

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
        """Several frames, of mixed sizes if need be; those that reach the network in one size share a pass.

        On a GPU everything is queued, and waited for once, at the end.
        """
        looks: list[list[Look]] = [[] for _ in images]
        for scale in self.inference.scales:
            inputs = [self._input(image, scale) for image in images]
            groups: dict[tuple[int, ...], list[int]] = {}
            for place, input_CHW in enumerate(inputs):
                groups.setdefault(tuple(input_CHW.shape), []).append(place)
            for places in groups.values():
                inputs_BCHW = torch.stack([inputs[place] for place in places])
                for mirrored in (False, True) if self.inference.flip else (False,):
                    found = looks_at(self._logits, inputs_BCHW, self.inference, mirrored=mirrored)
                    for place, look in zip(places, found, strict=True):
                        looks[place].append(look)
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        return self._on_host([classify(seen, size) for seen, size in zip(looks, sizes, strict=True)])

    def _logits(self, inputs_BCHW: Tensor) -> Tensor:
        logits_BKhw: Tensor = self._network(self._normalise(inputs_BCHW))
        return logits_BKhw

    def _input(self, image_HWC: Image, scale: float) -> Tensor:
        if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3:
            raise UserError(
                f"an image must be uint8 RGB of shape (height, width, 3), this one is {image_HWC.dtype} "
                f"{tuple(image_HWC.shape)}; convert it first, grey images by repeating the channel"
            )
        size = self.card["input_size"] or image_HWC.shape[:2]
        # On the CPU like in training: another device may round the resized bytes differently.
        image_CHW = torch.from_numpy(np.ascontiguousarray(image_HWC.transpose(2, 0, 1)))
        resized_CHW = resize_image(image_CHW, [max(1, round(side * scale)) for side in size])
        return (resized_CHW.pin_memory() if self.device.type == "cuda" else resized_CHW).to(
            self.device, non_blocking=True
        )

    def _on_host(self, found: Sequence[tuple[Tensor, Tensor]]) -> list[Segmented]:
        if self.device.type != "cuda":
            return [Segmented(labels_HW.cpu().numpy(), sure_HW.cpu().numpy()) for labels_HW, sure_HW in found]
        pinned = [tuple(torch.empty_like(part, device="cpu", pin_memory=True) for part in pair) for pair in found]
        for pair, there in zip(found, pinned, strict=True):
            for part, copied in zip(pair, there, strict=True):
                copied.copy_(part, non_blocking=True)
        torch.cuda.current_stream(self.device).synchronize()
        # Copied once more: results that somebody keeps must not keep pinned memory, which the whole machine shares.
        return [Segmented(labels_HW.numpy().copy(), sure_HW.numpy().copy()) for labels_HW, sure_HW in pinned]


def usable_device(name: str | None) -> torch.device:
    """The named device, or CUDA where there is one, or the CPU. Raises UserError if the named one is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r}: unknown; known: cpu, cuda, cuda:0, ...") from error
    if device.type == "cuda" and not 0 <= (device.index or 0) < torch.cuda.device_count():
        raise UserError(
            f"device {name!r}: PyTorch sees {torch.cuda.device_count()} CUDA GPUs here. Cure: --device cpu, or a "
            "machine and an installation of PyTorch with CUDA"
        )
    return device


def check_classes(folder: Location, classes: Taxonomy) -> None:
    """Raise UserError unless the folder holds a segmenter of exactly these classes. Reads the card only."""
    card = load_card(folder)
    check_kind(folder, card)
    known = tuple(card["taxonomy"]["classes"])
    if known != classes.classes:
        raise UserError(
            f"the model {folder.uri} predicts the {len(known)} classes of {card['taxonomy']['name']}, but the labels "
            f"here have the {classes.num_classes} of {classes.name}: their ids mean different things. Use the model's "
            "taxonomy, or a model trained with this one"
        )


def check_kind(folder: Location, card: Mapping[str, Any]) -> None:
    """Raise UserError unless the card is a segmenter's."""
    if card["kind"] != "semantic_fpn":
        raise UserError(
            f"{folder.uri} holds a model of kind {card['kind']!r}, but a segmenter (semantic_fpn) is needed; "
            "give the model folder of a train_segmenter stage"
        )


# -- rows of a frame table -------------------------------------------------------------------------------------------


def segment_rows(segmenter: Segmenter, rows: pa.Table, batch: int) -> Iterator[SegmentedRow | UnreadRow]:
    """Read and segment the frames of a resolved table, in its order; a frame that cannot be used does not stop it."""
    for read in _read_ahead(rows, batch):
        found = iter(segmenter.batch([image for _, image in read if not isinstance(image, BadFrame)]))
        for row, image in read:
            yield UnreadRow(row, image) if isinstance(image, BadFrame) else SegmentedRow(row, image, next(found))


def _read_ahead(rows: pa.Table, batch: int) -> Iterator[list[tuple[dict[str, Any], Image | BadFrame]]]:
    """The frames of one batch after another; the next is read while the present one is worked on."""
    with ThreadPoolExecutor(_READERS, thread_name_prefix="nightseg-read") as readers:
        waiting: list[Future[tuple[dict[str, Any], Image | BadFrame]]] = []
        for start in range(0, rows.num_rows, batch):
            coming = [readers.submit(_read, row) for row in rows.slice(start, batch).to_pylist()]
            if waiting:
                yield [future.result() for future in waiting]
            waiting = coming
        yield [future.result() for future in waiting]


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
