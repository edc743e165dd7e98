"""Videos as frames and frames as a video, through PyAV: the extra `video`.

PyAV rather than torchcodec: its wheels bring FFmpeg along, it follows no version of PyTorch, and it writes as well.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nightseg.data.images import MAX_PIXELS, BadFrame
from nightseg.storage import Location, UserError

UInt8 = NDArray[np.uint8]

# A video comes from a stranger. FFmpeg also "plays" lists of other files and addresses; these containers hold pictures.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts"
_ENCODERS = ("libx264", "mpeg4")  # the better one is not part of every FFmpeg
_USUAL_RATE = Fraction(25)


class Clip(NamedTuple):
    """An open video."""

    frames: Iterator[UInt8]  # upright uint8 (H, W, 3) RGB, in the order they are shown
    length: int | None  # about how many, as the file says; None if it does not
    rate: Fraction  # frames a second, the mean if it varies


@contextmanager
def open_video(file: Location) -> Iterator[Clip]:
    """The frames of a video, decoded as they are asked for. Damage in the middle is a BadFrame from `frames`.

    Raises UserError without PyAV; BadFrame: missing, unreadable (no video, no picture in it), decompression_bomb.
    """
    av = need_av()
    try:
        with file.open_input() as stream, av.open(stream, options={"format_whitelist": _FORMATS}) as container:
            if not container.streams.video:
                raise BadFrame("unreadable", f"{file.name} holds no picture")
            video = container.streams.video[0]
            video.thread_type = "AUTO"
            _check_size(video.codec_context.width * video.codec_context.height)
            yield Clip(_decoded(container, video), _length(container, video), video.average_rate or _USUAL_RATE)
    except FileNotFoundError as error:
        raise BadFrame("missing", f"{file} is not there") from error
    except av.error.FFmpegError as error:
        raise BadFrame("unreadable", f"no intact video: {error.strerror}") from error


def _decoded(container: Any, video: Any) -> Iterator[UInt8]:
    import av

    num_frames = 0
    try:
        for picture in container.decode(video):
            _check_size(picture.width * picture.height)
            yield upright(picture.to_ndarray(format="rgb24"), picture.rotation)
            num_frames += 1
    except av.error.FFmpegError as error:
        raise BadFrame("truncated", f"damaged after {num_frames} frames: {error.strerror}") from error
    if num_frames == 0:
        raise BadFrame("truncated", "there is no frame in it")
    if num_frames < (video.frames or 0):
        raise BadFrame("truncated", f"the video ends after {num_frames} of {video.frames} frames")


def upright(image_HWC: UInt8, degrees: int) -> UInt8:
    """Turned counterclockwise, as a player shows a film that was taken with the camera held on its side."""
    return np.ascontiguousarray(np.rot90(image_HWC, round(degrees / 90)))


def _length(container: Any, video: Any) -> int | None:
    """What the file says, or what follows from its length; good for a progress bar, not for a promise."""
    if video.frames:
        return int(video.frames)
    if not container.duration or not video.average_rate:
        return None
    seconds = Fraction(container.duration, 1_000_000)
    return round(seconds * Fraction(video.average_rate))


def _check_size(num_pixels: int) -> None:
    if num_pixels > MAX_PIXELS:
        raise BadFrame("decompression_bomb", f"frames of {num_pixels} pixels, at most {MAX_PIXELS} are accepted")


@contextmanager
def new_video(file: Location, rate: Fraction) -> Iterator[Callable[[UInt8], None]]:
    """Write an MP4 (H.264 where FFmpeg has it) frame by frame: `add(image_HWC)` with uint8 RGB of one size.

    The file appears, whole, when the body ends without an error. Raises UserError without PyAV.
    """
    av = need_av()
    with tempfile.TemporaryDirectory(prefix="nightseg-video-") as folder:
        place = Path(folder) / "video.mp4"
        with av.open(str(place), mode="w") as container:
            stream = container.add_stream(_encoder(av), rate=rate)
            stream.pix_fmt = "yuv420p"

            def add(image_HWC: UInt8) -> None:
                height, width = image_HWC.shape[:2]
                # Colour is stored for two pixels at a time, so sides are even.
                even_HWC = np.pad(image_HWC, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                if not stream.codec_context.is_open:
                    stream.height, stream.width = even_HWC.shape[:2]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(even_HWC, format="rgb24")))

            yield add
            if stream.codec_context.is_open:
                container.mux(stream.encode())
        if place.stat().st_size:
            with (
                place.open("rb") as written,
                mmap.mmap(written.fileno(), 0, access=mmap.ACCESS_READ) as data,
                memoryview(data) as view,
            ):
                file.write_bytes(view)


def _encoder(av: Any) -> str:
    return next(name for name in _ENCODERS if name in av.codecs_available)


def need_av() -> Any:
    """PyAV. Raises UserError, with the line that installs it, where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise UserError(
            "videos are read and written with PyAV, which is not installed here",
            cure="pip install av (or the extra `video` of nightseg)",
        ) from error
    return av
