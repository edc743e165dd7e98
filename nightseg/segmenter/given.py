"""Frames as a caller gives them, one or many: arrays, images, paths, folders, videos."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from nightseg.data import table as frame
from nightseg.data.images import BadFrame, decode_image, read_bytes, rgb_pixels
from nightseg.data.prefetch import prefetch
from nightseg.data.sources import Source
from nightseg.data.video import open_video
from nightseg.storage import Location, UserError, sha256_of

READERS: Final = 2  # threads that decode ahead; Pillow's decoders release the interpreter's lock

Image = npt.NDArray[np.uint8]


def is_many(given: object) -> bool:
    """Lists and what yields one after the other; arrays, tensors and images are one frame, or refused as such."""
    return isinstance(given, list | tuple | Iterator) or (
        isinstance(given, Iterable) and not hasattr(given, "__array__") and not isinstance(given, bytes | Mapping | Set)
    )


def opened(given: Any, what: str = "image") -> Image:
    """The pixels of one frame. Raises UserError that says which of several it is about."""
    try:
        if isinstance(given, str | PurePath | Location):
            return decode_image(read_bytes(Location.of(str(given))))
        return rgb_pixels(given)
    except BadFrame as fault:
        raise UserError(f"{given}: {fault.reason} ({fault.detail})", cure="give an intact image file") from fault
    except UserError as error:
        raise UserError(error.what.replace("image:", f"{what}:", 1), cure=error.cure) from error


def images_of(source: Source, batch: int) -> Iterator[tuple[str, Image]]:
    for row in source.bad:
        warn(f"{row[frame.URI]}: {row[frame.DETAIL]}; left out")
    with ThreadPoolExecutor(READERS, thread_name_prefix="nightseg-read") as readers:
        for row, image in prefetch(readers, read_row, source.images, ahead=batch):
            if isinstance(image, BadFrame):
                warn(f"{row[frame.URI]}: {image.reason} ({image.detail}); left out")
            else:
                yield row[frame.FRAME_ID], image
    for video in source.videos:
        try:
            with open_video(video.file) as clip:
                for number, image in enumerate(clip.frames):
                    yield f"{video.name}/{number:06d}", image
        except BadFrame as fault:
            warn(f"{video.file}: {fault.reason} ({fault.detail}); the rest of it is left out")


def warn(note: str) -> None:
    warnings.warn(note, stacklevel=3)


def read_row(row: dict[str, Any]) -> tuple[dict[str, Any], Image | BadFrame]:
    try:
        data = read_bytes(Location.of(row[frame.URI]), sha256=row.get(frame.SHA256))
        if row.get(frame.SHA256) not in (None, sha256_of(data)):
            raise BadFrame("unreadable", "the file has changed since it was collected (sha256)")
        return row, decode_image(data)
    except BadFrame as fault:
        return row, fault
