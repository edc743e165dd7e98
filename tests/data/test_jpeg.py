"""JPEG files with damage that libjpeg decodes in silence are refused; odd ones that are whole keep Pillow's pixels."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from nightseg.data import jpeg
from nightseg.data.images import BadFrame, decode_image

EOI = b"\xff\xd9"


def street(mode: str = "RGB", height: int = 200, width: int = 264) -> Image.Image:
    """Gradients, edges and noise: data of many lengths, a few kB of it."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    red = 128 + 80 * np.sin(columns / 9) + rng.normal(0, 12, (height, width))
    green = np.where((rows // 24 + columns // 40) % 2, 200, 60) + rng.normal(0, 8, (height, width))
    pixels = np.stack([red, green, rows / height * 255], axis=-1).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def saved(mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    street(mode).save(buffer, format="JPEG", quality=85, **options)
    return buffer.getvalue()


KINDS = {
    "baseline 4:2:0": saved(subsampling=2),
    "baseline 4:4:4": saved(subsampling=0),
    "baseline 4:2:2": saved(subsampling=1),
    "optimised tables": saved(optimize=True),
    "progressive": saved(progressive=True),
    "restart intervals": saved(restart_marker_rows=1),
    "restart every block": saved(restart_marker_blocks=1),
    "progressive with restarts": saved(progressive=True, restart_marker_rows=2),
    "grey": saved("L"),
    "cmyk": saved("CMYK"),
    "rgb without a transform": saved(keep_rgb=True),
}


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data), formats=("JPEG",)).convert("RGB"))


def pixels_start(data: bytes) -> int:
    """Where the entropy-coded data of the first scan begins."""
    header = data.index(b"\xff\xda")
    return header + 2 + int.from_bytes(data[header + 2 : header + 4], "big")


@pytest.mark.parametrize("kind", KINDS)
def test_sound_files_have_the_pixels_of_pillow(kind: str) -> None:
    decoded = decode_image(KINDS[kind])
    np.testing.assert_array_equal(decoded, by_pillow(KINDS[kind]))
    assert decoded.flags.writeable


# -- damage ----------------------------------------------------------------------------------------------------------


def is_refused(data: bytes) -> bool:
    try:
        decode_image(data)
    except BadFrame as fault:
        assert fault.reason == "truncated", fault
        return True
    return False


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [0.02, 0.3, 0.66, 0.95])
def test_a_cut_with_an_end_marker_is_refused(kind: str, part: float) -> None:
    data = KINDS[kind]
    start = pixels_start(data)
    cut = data[: start + int(part * (len(data) - start))].rstrip(b"\xff")
    assert is_refused(cut)
    assert is_refused(cut + EOI)
    assert is_refused(cut + bytes(len(data) - len(cut) - 2) + EOI), "the rest of the file never arrived"
    assert is_refused(cut + bytes(len(data) - len(cut)))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("progressive")])
def test_a_progressive_file_without_its_last_scans_is_refused(kind: str) -> None:
    data = KINDS[kind]
    starts = [place for place in range(len(data)) if data.startswith(b"\xff\xda", place)]
    assert len(starts) > 4
    assert all(is_refused(data[:start] + EOI) for start in starts[1:])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "restart every block"])
@pytest.mark.parametrize("size", [100, 512, 2000])
def test_holes_are_refused_wherever_they_are(kind: str, size: int) -> None:
    data = KINDS[kind]
    start = pixels_start(data)
    for part in (0.0, 0.2, 0.4, 0.6, 0.8):
        at = start + int(part * (len(data) - size - start - 2))
        assert is_refused(data[:at] + bytes(size) + data[at + size :]), f"zeros at {part}"
        assert is_refused(data[:at] + b"\xff" * size + data[at + size :]), f"ones at {part}"


def test_too_many_scans_are_refused_before_they_are_decoded() -> None:
    data = KINDS["progressive"]
    last = data.rindex(b"\xff\xda")
    many = data[:-2] + data[last:-2] * 600 + EOI
    with pytest.raises(BadFrame, match="500 scans"):
        decode_image(many)
    np.testing.assert_array_equal(decode_image(data + b"\xff\xda" * 600), decode_image(data))  # a film after the image


# -- odd, but whole --------------------------------------------------------------------------------------------------


def before(marker: bytes, junk: bytes) -> Callable[[bytes], bytes]:
    return lambda data: junk.join([data[: (place := data.rindex(marker))], data[place:]])


def after_each_interval(junk: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        for number in range(8):
            data = data.replace(bytes([0xFF, 0xD0 + number]), junk + bytes([0xFF, 0xD0 + number]))
        return data

    return change


def patched(marker: bytes, offset: int, value: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        place = data.index(marker) + offset
        return data[:place] + value + data[place + len(value) :]

    return change


ODD: dict[str, Callable[[bytes], bytes]] = {
    "zeros before the end": before(EOI, bytes(37)),
    "many zeros before the end": before(EOI, bytes(5000)),
    "fill bytes before the end": before(EOI, b"\xff" * 20),
    "a few bytes before the end": before(EOI, b"\x12\x34\x56"),
    "bytes before the tables": before(b"\xff\xdb", b"\0\x07junk"),
    "zeros before the scan": before(b"\xff\xda", bytes(100)),
    "fill bytes before the scan": before(b"\xff\xda", b"\xff\xff\xff"),
    "a camera's notes after the end": lambda data: data + bytes(3000) + b"\xff\xda\xff\xd8 more",
    "jfif revision": patched(b"JFIF\0", 5, b"\x09"),
    "parameters of the scan": patched(b"\xff\xda", 11, b"\x01\x02\x03"),
    "unknown adobe transform": lambda data: data[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\x07" + data[2:],
    "bad icc profile": lambda data: data[:2] + b"\xff\xe2\0\x12ICC_PROFILE\0\x09\x01ab" + data[2:],
    "a comment of zeros": lambda data: data[:2] + b"\xff\xfe\x04\x02" + bytes(1024) + data[2:],
    "a thumbnail": lambda data: data[:2] + b"\xff\xe1\x20\x02" + KINDS["grey"][:8192].ljust(8192) + data[2:],
}  # fmt: skip


@pytest.mark.parametrize("oddity", ODD)
def test_oddities_that_cost_no_pixel_are_accepted(oddity: str) -> None:
    data = ODD[oddity](KINDS["baseline 4:2:0"])
    np.testing.assert_array_equal(decode_image(data), by_pillow(KINDS["baseline 4:2:0"]))


@pytest.mark.parametrize("junk", [b"\0", bytes(9), b"\x81", b"\x12\x34\x56\x78"])
def test_bytes_that_cameras_leave_between_restart_intervals_are_accepted(junk: bytes) -> None:
    whole = KINDS["restart intervals"]
    data = after_each_interval(junk)(whole)
    assert len(data) > len(whole) + 10 * len(junk)
    np.testing.assert_array_equal(decode_image(data), by_pillow(whole))
    assert is_refused(after_each_interval(bytes(range(1, 40)))(whole)), "more than filler"


def test_zeros_in_the_progressive_scans_of_cameras_are_accepted() -> None:
    whole = KINDS["progressive"]
    data = before(b"\xff\xda", bytes(12))(before(EOI, bytes(12))(whole))
    np.testing.assert_array_equal(decode_image(data), by_pillow(whole))


def test_flat_images_are_no_holes() -> None:
    for mode in ("L", "RGB"):
        for options in ({}, {"optimize": True}, {"progressive": True}):
            for value in (0, 128, 255):
                buffer = io.BytesIO()
                Image.new("RGB", (640, 480), (value,) * 3).convert(mode).save(buffer, format="JPEG", **options)
                np.testing.assert_array_equal(decode_image(buffer.getvalue()), by_pillow(buffer.getvalue()))


def test_several_pictures_in_one_file_are_the_first_of_them() -> None:
    buffer = io.BytesIO()
    street().save(buffer, format="MPO", save_all=True, append_images=[street("L").convert("RGB")], quality=85)
    np.testing.assert_array_equal(decode_image(buffer.getvalue()), by_pillow(buffer.getvalue()))


def with_sampling(factors: int, scan: bytes) -> bytes:
    """32 x 16 pixels; Y sampled so, Cb and Cr once; standard tables: luma block `001010`, chroma block `0000`."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 16)).save(buffer, format="JPEG", subsampling=0)
    header = bytearray(buffer.getvalue()[: pixels_start(buffer.getvalue())])
    header[header.index(b"\xff\xc0") + 11] = factors
    return bytes(header) + scan + EOI


def test_samplings_that_the_strict_decoder_does_not_know_are_followed_code_by_code() -> None:
    whole = int("001010" * 8 + "0000" * 2, 2).to_bytes(7, "big")  # 4:1:0, one MCU: 4 x 2 luma blocks and two more
    data = with_sampling(0x42, whole)
    np.testing.assert_array_equal(decode_image(data), np.full((16, 32, 3), 128))
    assert is_refused(with_sampling(0x42, whole[:-2]))
    assert is_refused(with_sampling(0x42, whole + whole * 2))
    assert is_refused(with_sampling(0x42, b"\xfe" + whole[1:])), "no code begins so"
    np.testing.assert_array_equal(decode_image(with_sampling(0x42, whole + bytes(20))), decode_image(data))


def test_the_size_of_the_header_bounds_what_is_decoded() -> None:
    data = KINDS["grey"]
    with pytest.raises(jpeg.DamagedFile):
        jpeg.decode_jpeg(data, 100, 264, "GRAY")
    with pytest.raises(jpeg.DamagedFile, match="sizes"):
        jpeg.decode_jpeg(data, 264, 200, "GRAY")
