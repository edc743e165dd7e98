"""Translate frames to the other domain: a frame table and a translator in, images at native size and their table out.

Translation does not move anything, so every translated frame refers to the label of its source.
Letters in tensor names: B batch, 3 RGB, H, W frame size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from nightseg.compute.inference import map_shards
from nightseg.config import MapCompute
from nightseg.frames import table as frame
from nightseg.frames.images import BadFrame, encode_png, read_image
from nightseg.networks.checkpoint import load_card
from nightseg.networks.unit import STRIDE, check_tile, load_generators, to_uint8, to_unit_range
from nightseg.progress import Progress
from nightseg.storage import Location, UserError, sha256_of
from nightseg.workspace import Attempt, Commit

VERSION = 2

PIXELS_AT_ONCE: Final = 1 << 20  # of one forward pass: about 1 GB at width 64; a larger frame goes alone
SMALLEST_SIDE: Final = 2 * STRIDE  # the latent needs two rows to reflect one

Domain = Literal["day", "night"]
Pixels = NDArray[np.uint8]


def translate(
    source: pa.Table,
    translator: Commit,
    *,
    name: str,
    to: Domain,
    attempt: Attempt,
    progress: Progress,
    compute: MapCompute,
    max_bad_fraction: float,
    tile: tuple[int, int] | None = None,
) -> Commit:
    """Commit `frames` (PNGs under `images/`, domain `to`, dataset and id prefix `name`) and `quarantine`.

    `source` is a frame table with absolute uris; frames already of domain `to` are refused (UserError). Without noise,
    so the same frame, translator and hardware give the same bytes, and the frames of a sequence do not flicker.
    Frames larger than `tile` (height, width) are translated in tiles with blended seams, in the memory of one tile.
    """
    begun = time.monotonic()
    _check(name, source, to)
    if tile is not None:
        check_tile(tile, int(load_card(translator.folder / "model")["res_blocks"]))
    shards = map_shards(
        source,
        TranslateFrames,
        {"model": translator.folder / "model", "name": name, "to": to, "batch": compute.batch, "tile": tile},
        attempt=attempt,
        shard_rows=compute.shard_rows,
        actors=compute.actors,
        cpus_per_actor=compute.cpus_per_actor,
        gpus_per_actor=compute.gpus_per_actor,
        progress=progress,
        title=f"translate {name}",
    )
    return attempt.finish(
        rows_in=source.num_rows,
        rows_out=sum(shard.rows("frames") for shard in shards),
        quarantined=sum(shard.rows("quarantine") for shard in shards),
        max_bad_fraction=max_bad_fraction,
        num_shards=len(shards),
        summary={"to": to, "translator": translator.name},
        seconds=time.monotonic() - begun,
    )


def _check(name: str, source: pa.Table, to: Domain) -> None:
    if source.num_rows == 0:
        raise UserError(f"dataset {name}: there is no frame to translate; look at the counts of its source dataset")
    already = source.filter(pc.equal(source[frame.DOMAIN], to))
    if already.num_rows:
        raise UserError(
            f"dataset {name}: {already.num_rows} of {source.num_rows} frames are {to} frames already (first "
            f"{already[frame.FRAME_ID][0].as_py()}) and cannot be translated to {to}; translate a dataset of the other "
            f"domain, or set `to: {'day' if to == 'night' else 'night'}`"
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
            good.extend(self._write(row, image, folder) for (row, _), image in zip(group, translated, strict=True))
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
                keep = {column: row[column] for column in (frame.FRAME_ID, frame.URI)}
                bad.append({**keep, frame.REASON: error.reason, frame.DETAIL: error.detail})
                continue
            fits = len(group) < self.batch and (len(group) + 1) * image.shape[0] * image.shape[1] <= PIXELS_AT_ONCE
            if group and (not fits or image.shape != group[0][1].shape):
                yield group
                group = []
            group.append((row, image))
        if group:
            yield group

    def _write(self, row: dict[str, Any], image: Pixels, folder: Location) -> dict[str, Any]:
        frame_id = f"{self.name}/{row[frame.FRAME_ID]}"
        uri = f"images/{frame.file_name(frame_id, '.png')}"
        data = encode_png(image)
        (folder / uri).write_bytes(data)
        kept = {column: row.get(column) for column in frame.FRAME_SCHEMA.names}
        return kept | {
            frame.FRAME_ID: frame_id,
            frame.URI: uri,
            frame.DATASET: self.name,
            frame.DOMAIN: self.to,
            frame.HEIGHT: image.shape[0],
            frame.WIDTH: image.shape[1],
            frame.BYTES: len(data),
            frame.SHA256: sha256_of(data),
        }


def _read(row: dict[str, Any]) -> Pixels:
    image = read_image(Location.of(row[frame.URI]))
    if min(image.shape[:2]) < SMALLEST_SIDE:
        raise BadFrame(
            "not_an_image", f"{image.shape[1]} x {image.shape[0]} pixels; UNIT needs {SMALLEST_SIDE} pixels a side"
        )
    return image
