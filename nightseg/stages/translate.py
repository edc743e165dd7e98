"""Translate frames to the other domain: a frame table and a translator in, images at native size and their table out.

Translation does not move anything, so every translated frame refers to the label of its source.
Letters in tensor names: B batch, 3 RGB, H, W frame size.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Final, Literal, Unpack

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from nightseg.cluster.map import ShardWorker, Work, map_shards
from nightseg.data import table as frame
from nightseg.data.class_list import taxonomy as load_taxonomy
from nightseg.data.images import BadFrame
from nightseg.data.settings import AnyTaxonomy
from nightseg.data.taxonomy import Taxonomy
from nightseg.networks.devices import usable_device
from nightseg.networks.model_folder import load_card
from nightseg.progress import Progress
from nightseg.storage import Attempt, Commit, Location, UserError
from nightseg.translators.colour import match_histograms, reinhard, swap_low_amplitudes
from nightseg.translators.command import Program
from nightseg.translators.settings import (
    ColourTranslator,
    CommandTranslator,
    FourierTranslator,
    PhotometricTranslator,
    UntrainedTranslator,
)
from nightseg.translators.shards import (
    StyleTransfer,
    TranslateShard,
    TranslateUntrained,
    by_optics,
    by_program,
    one_by_one,
    write_translated,
)
from nightseg.translators.style_images import StyleImages, draw_style_images
from nightseg.unit.network import STRIDE, check_tile, load_generators, to_uint8, to_unit_range

VERSION = 3

PIXELS_AT_ONCE: Final = 1 << 20  # of one forward pass: about 1 GB at width 64; a larger frame goes alone
SMALLEST_SIDE: Final = 2 * STRIDE  # the latent needs two rows to reflect one

STYLE_IMAGES: Final = "style_images.json"  # their ids

Domain = Literal["day", "night"]
Pixels = NDArray[np.uint8]


def translate(
    source: pa.Table,
    translator: Commit | UntrainedTranslator,
    *,
    name: str,
    to: Domain,
    tile: tuple[int, int] | None = None,
    style_images: pa.Table | None = None,
    style_dataset: str = "",
    taxonomy: AnyTaxonomy,
    **work: Unpack[Work],
) -> Commit:
    """Commit `frames` (PNGs under `images/`, domain `to`, dataset and id prefix `name`) and `quarantine`; of kinds
    that have style images their ids as style_images.json.

    `source` and `style_images` (of the dataset `style_dataset`) are frame tables with absolute uris. UNIT (a commit)
    takes frames larger than `tile` (height, width) in tiles with blended seams. The same frame, translator, seed and
    hardware give the same bytes, whatever the shards; a program of the user has to see to it itself.

    Raises UserError: frames of domain `to`; no style image, or not one that this attempt began with, can be read.
    """
    _check(name, source, to)
    attempt, progress = work["attempt"], work["progress"]
    worker: type[ShardWorker]
    arguments: dict[str, Any]
    if isinstance(translator, Commit):
        model, kind = translator.folder / "model", translator.name
        if tile is not None:
            check_tile(tile, int(load_card(model)["res_blocks"]))
        compute = work["compute"]
        worker = TranslateFrames
        arguments = {"model": model, "batch": compute.batch, "tile": tile, "device": compute.device}
    else:
        kind, images = translator.kind, None
        if isinstance(translator, FourierTranslator | ColourTranslator):
            images = _style_images(translator, style_images, f"dataset {style_dataset}", attempt, progress)
        if isinstance(translator, CommandTranslator):
            progress.say(f"{name}: the recipe runs a program on every shard: {shlex.join(translator.argv)}")
        shard = _shard(translator, images, load_taxonomy(taxonomy), to, attempt.seed)
        worker, arguments = TranslateUntrained, {"translate": shard}
    shards = map_shards(source, worker, arguments | {"name": name, "to": to}, title=f"translate {name}", **work)
    outputs = () if style_images is None else [STYLE_IMAGES]
    return shards.finish("frames", outputs=outputs, summary={"to": to, "translator": kind})


def _check(name: str, source: pa.Table, to: Domain) -> None:
    if source.num_rows == 0:
        raise UserError(
            f"dataset {name}: there is no frame to translate", cure="look at the counts of its source dataset"
        )
    already = source.filter(pc.equal(source[frame.DOMAIN], to))
    if already.num_rows:
        raise UserError(
            f"dataset {name}: {already.num_rows} of {source.num_rows} frames are {to} frames already (first "
            f"{already[frame.FRAME_ID][0].as_py()}) and cannot be translated to {to}",
            cure=f"translate a dataset of the other domain, or set `to: {'day' if to == 'night' else 'night'}`",
        )


class TranslateFrames:
    """Translates the frames of a shard. A frame that cannot be read goes to the quarantine table."""

    def __init__(
        self,
        model: Location,
        name: str,
        to: Domain,
        batch: int,
        tile: tuple[int, int] | None = None,
        device: str = "cpu",
    ) -> None:
        self.device = usable_device(device)
        self.generators = load_generators(model).to(self.device)
        self.name, self.to, self.batch, self.tile = name, to, batch, tile

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        good: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        for group in self._groups(rows.to_pylist(), bad):
            translated = self.translate([image for _, image in group])
            for (row, _), image in zip(group, translated, strict=True):
                good.append(write_translated(row, image, folder, self.name, self.to))
        return {"frames": frame.frame_table(good), "quarantine": frame.quarantine_table(bad)}

    def translate(self, images: list[Pixels]) -> list[Pixels]:
        """uint8 HWC RGB images of one size -> the same in domain `to`."""
        images_B3HW = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(self.device)
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"),
        ):
            made_B3HW = to_uint8(self.generators.translate(to_unit_range(images_B3HW), self.to, self.tile))
        return list(made_B3HW.permute(0, 2, 3, 1).contiguous().cpu().numpy())

    def _groups(
        self, rows: list[dict[str, Any]], bad: list[dict[str, Any]]
    ) -> Iterator[list[tuple[dict[str, Any], Pixels]]]:
        """Neighbouring frames of one size, at most `batch` and PIXELS_AT_ONCE; unreadable ones are added to `bad`."""
        group: list[tuple[dict[str, Any], Pixels]] = []
        for row in rows:
            try:
                image = _read(row)
            except BadFrame as error:
                bad.append(frame.quarantined(row, error))
                continue
            fits = len(group) < self.batch and (len(group) + 1) * image.shape[0] * image.shape[1] <= PIXELS_AT_ONCE
            if group and (not fits or image.shape != group[0][1].shape):
                yield group
                group = []
            group.append((row, image))
        if group:
            yield group


def _read(row: dict[str, Any]) -> Pixels:
    image = frame.image_of(row)
    if min(image.shape[:2]) < SMALLEST_SIDE:
        raise BadFrame(
            "not_an_image", f"{image.shape[1]} x {image.shape[0]} pixels; UNIT needs {SMALLEST_SIDE} pixels a side"
        )
    return image


# -- translators that need no training --------------------------------------------------------------------------------


def _shard(
    translator: UntrainedTranslator, images: StyleImages | None, classes: Taxonomy, to: Domain, seed: int
) -> TranslateShard:
    match translator:
        case PhotometricTranslator():
            return partial(one_by_one, partial(by_optics, optics=translator, classes=classes, seed=seed))
        case CommandTranslator():
            program = Program(tuple(translator.argv), to, seed, translator.timeout_seconds)
            return partial(by_program, program=program, classes=classes)
        case FourierTranslator():
            transfer: Callable[[Pixels, Pixels], Pixels] = partial(swap_low_amplitudes, beta=translator.beta)
        case ColourTranslator():
            transfer = reinhard if translator.method == "reinhard" else match_histograms
    assert images is not None
    return partial(one_by_one, StyleTransfer(images, transfer))


def _style_images(
    settings: FourierTranslator | ColourTranslator,
    frames: pa.Table | None,
    what: str,
    attempt: Attempt,
    progress: Progress,
) -> StyleImages:
    """Drawn once, and noted: what continues this attempt has to use the same ones."""
    assert frames is not None, f"a {settings.kind} translator without style images"
    named = list(zip(frames[frame.FRAME_ID].to_pylist(), frames[frame.URI].to_pylist(), strict=True))
    note = attempt.folder / STYLE_IMAGES
    begun = note.read_json() if note.exists() else None
    if begun is not None:
        named = [pair for pair in named if pair[0] in set(begun)]
    count = settings.style_images
    images = draw_style_images(named, count=count, nearest=settings.nearest, seed=attempt.seed, what=what)
    drawn, wanted = [image.frame_id for image in images.images], min(count, len(named))
    if begun is None:
        note.write_json(drawn)
        if len(drawn) < wanted:
            progress.say(f"{what}: {wanted - len(drawn)} of {wanted} style images cannot be read")
    elif drawn != begun:
        gone = next(frame_id for frame_id in begun if frame_id not in drawn)
        raise UserError(
            f"{what}: {gone} is a style image of this translation, and it cannot be read any more",
            cure=f"restore the file, or delete {attempt.folder} to start again",
        )
    return images
