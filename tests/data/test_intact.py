"""Holes and missing rows in PNG, TIFF, WebP and raw pixels are refused; sound files that are flat or dark are not."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from nightseg.data.images import BadFrame, decode_image, decode_label

HEIGHT, WIDTH = 200, 300


def scene() -> np.ndarray:
    """A gradient with noise, without 0, 170 and 255: no run of any byte."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack([columns / 3 + 20, rows / 2 + 30, 90 + 40 * np.sin(columns / 9)], axis=-1)
    return (pixels + rng.normal(0, 6, pixels.shape)).clip(1, 160).astype(np.uint8)


def saved(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind, **options)
    return buffer.getvalue()


STORED = {
    "WEBP": {"quality": 90},
    "WEBP lossless": {"lossless": True},
    "TIFF lzw": {"compression": "tiff_lzw"},
    "TIFF packbits": {"compression": "packbits"},
    "TIFF deflate": {"compression": "tiff_adobe_deflate"},
    "TIFF jpeg": {"compression": "jpeg"},
    "TIFF raw": {},
    "BMP": {},
    "PPM": {},
}


@pytest.mark.parametrize("fill", [b"\0", b"\xff", b"\xaa"], ids=["zeros", "ones", "pattern"])
@pytest.mark.parametrize("kind", STORED)
def test_a_hole_in_the_pixels_is_refused(kind: str, fill: bytes) -> None:
    """It begins and ends in the middle of rows where pixels are raw; such files have no other sign of it."""
    data = saved(scene(), kind.split()[0], **STORED[kind])
    assert decode_image(data).shape == (HEIGHT, WIDTH, 3)
    start, row = len(data) // 3, 3 * WIDTH
    if kind in ("TIFF raw", "BMP", "PPM"):
        start = len(data) - 150 * row + row // 2
    end = start + max(3 * row, len(data) // 5) // row * row
    with pytest.raises(BadFrame) as caught:
        decode_image(data[:start] + fill * (end - start) + data[end:])
    assert caught.value.reason == "truncated" or kind == "TIFF jpeg"


def test_lost_pages_of_raw_pixels_are_refused_of_labels_too() -> None:
    """4,096 bytes of zeros where a file system has its pages: the chance of a black area to lie so is 1 in 4096^2."""
    label = np.random.default_rng(1).integers(1, 11, (HEIGHT, WIDTH), dtype=np.uint8)
    data = bytearray(saved(label, "TIFF"))
    data[8192:12288] = bytes(4096)
    with pytest.raises(BadFrame, match="truncated: TIFF: its pixels have a hole of 4096 bytes"):
        decode_label(bytes(data))


def flat(kind: str) -> np.ndarray:
    rng = np.random.default_rng(2)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    pixels = rng.integers(1, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    areas = {
        "black": rows >= 0,
        "black below": rows > 90,
        "black above": rows < 90,
        "a black box": (abs(rows - 100) < 60) & (abs(columns - 150) < 100),
        "a black disc": (rows - 100) ** 2 + (columns - 150) ** 2 < 80**2,
        "black, tilted": 20 * (rows - 90) > columns,
    }
    if kind == "dark noise":
        return rng.normal(0, 4, pixels.shape).clip(0, 255).astype(np.uint8)
    pixels[areas[kind.replace("white", "black")]] = 255 if "white" in kind else 0
    return pixels


@pytest.mark.parametrize(
    "area",
    [
        "black",
        "black below",
        "black above",
        "white above",
        "a black box",
        "a black disc",
        "black, tilted",
        "dark noise",
    ],
)
def test_flat_and_dark_areas_are_no_holes(area: str) -> None:
    """Runs of one byte as well: of up to 100,000 in lossless WebP."""
    pixels = flat(area)
    for kind, options in STORED.items():
        for method in (0, 4) if kind.startswith("WEBP") else (None,):
            extra = {} if method is None else {"method": method, "quality": 0}
            found = decode_image(saved(pixels, kind.split()[0], **(options | extra)))
            if kind in ("WEBP lossless", "TIFF lzw", "TIFF packbits", "TIFF deflate", "TIFF raw", "BMP", "PPM"):
                assert np.array_equal(found, pixels)


def test_deflate_in_tiff_has_a_checksum_of_each_strip() -> None:
    """Pillow stops at the last pixel. One flipped bit in any place of the pixels; several strips."""
    label = np.random.default_rng(3).integers(0, 11, (600, WIDTH), dtype=np.uint8)
    data = saved(label, "TIFF", compression="tiff_adobe_deflate")
    tags = Image.open(io.BytesIO(data)).tag_v2  # type: ignore[attr-defined]
    assert len(tags[273]) > 1
    for strip, length in zip(tags[273], tags[279], strict=True):
        for place in np.random.default_rng(4).integers(strip, strip + length, 20):
            flipped = bytearray(data)
            flipped[place] ^= 1 << int(place) % 8
            with pytest.raises(BadFrame, match="truncated"):
                decode_label(bytes(flipped))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(pixels: np.ndarray, num_rows: int, interlaced: bool = False, depth: int = 8) -> bytes:
    """A grey PNG that says the height of `pixels` and holds so many of its rows, every checksum right."""
    height, width = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, interlaced)
    parts = [pixels[:num_rows]]
    if interlaced:  # seven passes
        passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
        parts = [pixels[top::down, left::across] for top, left, down, across in passes][:num_rows]
    rows = b"".join(b"\0" + row.tobytes() for part in parts for row in part if part.size)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("decode", [decode_image, decode_label])
def test_a_png_with_too_few_rows_is_refused(decode: Callable[[bytes], np.ndarray]) -> None:
    """Its stream ends, with its checksum, before the last row: Pillow leaves the rest at 0."""
    pixels = np.random.default_rng(5).integers(1, 11, (21, 33), dtype=np.uint8)
    whole = decode(png(pixels, 21))
    assert np.array_equal(whole if whole.ndim == 2 else whole[..., 0], pixels)
    for num_rows in (0, 1, 20):
        with pytest.raises(BadFrame, match="truncated"):
            decode(png(pixels, num_rows))
    assert decode(png(pixels, 7, interlaced=True)).shape[:2] == pixels.shape
    for num_passes in (1, 6):
        with pytest.raises(BadFrame, match="truncated"):
            decode(png(pixels, num_passes, interlaced=True))


def test_a_png_whose_last_rows_are_0_is_whole() -> None:
    pixels = np.zeros((21, 33), np.uint8)
    assert not decode_label(png(pixels, 21)).any()
    assert not decode_label(png(pixels, 7, interlaced=True)).any()
    with pytest.raises(BadFrame, match="its pixels are 680 of 714 bytes"):
        decode_label(png(pixels, 20))
