"""Translate frames to the other domain: a frame table and a translator in, images at native size and their table out.

Translation does not move anything, so every translated frame refers to the label of its source.
Letters in tensor names: B batch, 3 RGB, H, W frame size.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from nightseg.cluster.map import ShardWorker, map_shards
from nightseg.cluster.settings import MapCompute
from nightseg.data import table as frame
from nightseg.data.images import BadFrame, read_image
from nightseg.data.taxonomy import taxonomy
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


class Untrained(NamedTuple):
    """A translator that needs no training, with what it is given besides the frames."""

    settings: UntrainedTranslator
    style_images: pa.Table | None  # frames of the domain `to`, absolute uris; None = this kind takes none
    style_dataset: str  # their name
    taxonomy: str


class Opened(NamedTuple):
    """The worker that does the shards of a translation, its arguments, a line of the summary, files already there."""

    worker: type[ShardWorker]
    arguments: Mapping[str, Any]
    summary: Mapping[str, Any]
    outputs: tuple[str, ...] = ()


def translate(
    source: pa.Table,
    translator: Commit | Untrained,
    *,
    name: str,
    to: Domain,
    attempt: Attempt,
    progress: Progress,
    compute: MapCompute,
    max_bad_fraction: float,
    tile: tuple[int, int] | None = None,
) -> Commit:
    """Commit `frames` (PNGs under `images/`, domain `to`, dataset and id prefix `name`) and `quarantine`; of kinds
    that have style images their ids as style_images.json.

    `source` is a frame table with absolute uris; frames already of domain `to` are refused (UserError). UNIT (a commit)
    translates without noise, so a sequence does not flicker, and frames larger than `tile` (height, width) in tiles
    with blended seams, in the memory of one tile; what other kinds draw follows from the attempt's seed and the frame's
    id. So the same frame, translator, seed and hardware give the same bytes, however the frames are cut into shards. A
    program of the user is deterministic if it says so.
    """
    _check(name, source, to)
    pixels = {"batch": compute.batch, "tile": tile}
    opened = open_translator(translator, pixels, name=name, to=to, attempt=attempt, progress=progress)
    shards = map_shards(
        source,
        opened.worker,
        opened.arguments,
        attempt=attempt,
        compute=compute,
        progress=progress,
        title=f"translate {name}",
    )
    return shards.finish(
        "frames",
        max_bad_fraction=max_bad_fraction,
        outputs=opened.outputs,
        summary={"to": to, **opened.summary},
    )


def open_translator(
    translator: Commit | Untrained,
    pixels: Mapping[str, Any],
    *,
    name: str,
    to: Domain,
    attempt: Attempt,
    progress: Progress,
) -> Opened:
    """The worker of a kind of translator; `pixels`: how many a network takes at once.

    Raises UserError: no style image, or one this attempt began with, can be read.
    """
    where, seed = {"name": name, "to": to}, attempt.seed
    if isinstance(translator, Commit):
        model, tile = translator.folder / "model", pixels["tile"]
        if tile is not None:
            check_tile(tile, int(load_card(model)["res_blocks"]))
        arguments = {"model": model, **where, **pixels}
        return Opened(TranslateFrames, arguments, {"translator": translator.name})
    settings, classes = translator.settings, taxonomy(translator.taxonomy)
    shard: TranslateShard
    outputs: tuple[str, ...] = ()
    match settings:
        case PhotometricTranslator():
            shard = partial(one_by_one, partial(by_optics, optics=settings, classes=classes, seed=seed))
        case FourierTranslator() | ColourTranslator():
            images = _style_images(translator, settings, attempt, progress)
            shard, outputs = partial(one_by_one, StyleTransfer(images, _transfer(settings))), (STYLE_IMAGES,)
        case CommandTranslator():
            program = Program(tuple(settings.argv), to, seed, settings.timeout_seconds)
            progress.say(f"{name}: the recipe runs a program on every shard: {shlex.join(settings.argv)}")
            shard = partial(by_program, program=program, classes=classes)
    return Opened(TranslateUntrained, {"translate": shard, **where}, {"translator": settings.kind}, outputs)


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

    def __init__(self, model: Location, name: str, to: Domain, batch: int, tile: tuple[int, int] | None = None) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.generators = load_generators(model).to(self.device)
        self.name = name
        self.to: Domain = to
        self.batch = batch
        self.tile = tile

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
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
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
    image = read_image(Location.of(row[frame.URI]))
    if min(image.shape[:2]) < SMALLEST_SIDE:
        raise BadFrame(
            "not_an_image", f"{image.shape[1]} x {image.shape[0]} pixels; UNIT needs {SMALLEST_SIDE} pixels a side"
        )
    return image


# -- translators that need no training --------------------------------------------------------------------------------


def _transfer(settings: FourierTranslator | ColourTranslator) -> Callable[[Pixels, Pixels], Pixels]:
    if isinstance(settings, FourierTranslator):
        return partial(swap_low_amplitudes, beta=settings.beta)
    return reinhard if settings.method == "reinhard" else match_histograms


def _style_images(
    translator: Untrained, settings: FourierTranslator | ColourTranslator, attempt: Attempt, progress: Progress
) -> StyleImages:
    """Drawn once, and noted: what continues this attempt has to use the same ones."""
    frames, what = translator.style_images, f"dataset {translator.style_dataset}"
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
