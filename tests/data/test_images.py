"""Every kind of file a user may have: decoded upright and in RGB, or refused with the right reason."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from nightseg.data import images
from nightseg.data.images import (
    BadFrame,
    decode_image,
    decode_label,
    encode_jpeg,
    encode_png,
    image_size,
    may_be_label,
    rgb_pixels,
)
from nightseg.storage import Location, UserError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def noise(height: int = 24, width: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG written by hand: what Pillow cannot write (16-bit colour, 4-bit grey, absurd sizes)."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def reason_of(data: bytes, decode=decode_image, **options: object) -> str:
    with pytest.raises(BadFrame) as caught:
        decode(data, **options)
    assert "0x" not in caught.value.detail, "an address would make two runs differ"
    return caught.value.reason


# -- images ----------------------------------------------------------------------------------------------------------


def test_png_and_lossless_webp_give_back_the_pixels() -> None:
    pixels = noise()
    for data in (encode_png(pixels), saved(Image.fromarray(pixels), "WEBP", lossless=True)):
        decoded = decode_image(data)
        np.testing.assert_array_equal(decoded, pixels)
        assert decoded.flags.writeable, "torch.from_numpy warns about read-only arrays"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_formats_decode_to_rgb(kind: str) -> None:
    decoded = decode_image(saved(Image.new("RGB", (5, 3), (200, 100, 50)), kind))
    assert decoded.shape == (3, 5, 3) and decoded.dtype == np.uint8
    np.testing.assert_allclose(decoded.mean(axis=(0, 1)), (200, 100, 50), atol=3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_modes_that_hold_8_bit_colour_are_accepted(mode: str) -> None:
    white = decode_image(saved(Image.new("RGB", (4, 2), (255, 255, 255)).convert(mode)))
    np.testing.assert_array_equal(white, np.full((2, 4, 3), 255))


def test_cmyk_jpeg_is_accepted() -> None:
    decoded = decode_image(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    np.testing.assert_allclose(decoded[0, 0], RED, atol=4)


def test_alpha_is_dropped_not_blended() -> None:
    np.testing.assert_array_equal(decode_image(saved(Image.new("RGBA", (1, 1), (10, 20, 30, 0)))), [[[10, 20, 30]]])


def test_a_palette_with_its_own_alpha_decodes_without_a_warning() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putdata([0, 1])
    decoded = decode_image(saved(image, transparency=bytes([7, 255])))
    np.testing.assert_array_equal(decoded, [[RED, GREEN]])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "top_left"), [(1, RED), (2, GREEN), (3, BLUE), (4, RED), (5, RED), (6, RED), (7, BLUE), (8, GREEN)]
)
def test_photographs_are_turned_upright(kind: str, orientation: int, top_left: tuple[int, int, int]) -> None:
    # stored: red left column, green top right, blue bottom right; 32 x 48 pixels
    stored = np.zeros((32, 48, 3), dtype=np.uint8)
    stored[:, :16], stored[:16, 16:], stored[16:, 16:] = RED, GREEN, BLUE
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(stored), kind, exif=exif, quality=100)
    decoded = decode_image(data)
    assert decoded.shape == ((48, 32, 3) if orientation >= 5 else (32, 48, 3))
    assert image_size(data) == decoded.shape[:2]
    np.testing.assert_allclose(decoded[2, 2], top_left, atol=12)


def test_damaged_metadata_does_not_cost_the_frame() -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0" + b"\x1a\x01\x05\0\xff\xff\xff\x7f\xff\xff\xff\x7f"
    decoded = decode_image(saved(Image.new("RGB", (8, 8), RED), "JPEG", exif=exif, quality=100))
    np.testing.assert_allclose(decoded[0, 0], RED, atol=4)
    assert decode_image(saved(Image.new("RGB", (8, 8)), "TIFF")).shape == (8, 8, 3)


# -- bad files -------------------------------------------------------------------------------------------------------


def test_empty_text_and_foreign_files() -> None:
    assert reason_of(b"") == "zero_bytes"
    assert reason_of(b"this is a text file\n") == "not_an_image"
    assert reason_of(b"%!PS-Adobe-3.0 EPSF-3.0\n") == "not_an_image", "formats that run programs are not tried"
    assert reason_of(saved(Image.new("RGB", (4, 4)), "GIF")) == "not_an_image"
    assert reason_of(b"\x89PNG\r\n\x1a\n") in ("not_an_image", "truncated")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (saved(Image.new("RGB", (4, 4)), "GIF"), "a GIF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "an HEIC photograph"),
        (b"\0\0\0\x20ftypisom\0\0\2\0", "an MP4 or QuickTime video"),
        (b"FLV\1\5\0\0\0\t", "an FLV video"),
        (bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"), "a WMV video"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (b"\0" * 4096, "no intact header, the file starts with b'"),
    ],
)
def test_what_a_foreign_file_is_is_said(data: bytes, what: str) -> None:
    with pytest.raises(BadFrame, match=what) as caught:
        decode_image(data)
    assert caught.value.reason == "not_an_image" and caught.value.detail.endswith(
        "accepted are JPEG, PNG, WEBP, BMP, TIFF, PPM"
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "PPM", "WEBP"])
@pytest.mark.parametrize("part", [0.3, 0.5, 0.9])
def test_a_cut_file_is_refused(kind: str, part: float) -> None:
    data = saved(Image.fromarray(noise(64, 64)), kind)
    assert reason_of(data[: int(len(data) * part)]) in ("truncated", "not_an_image")


def test_a_cut_jpeg_and_a_damaged_png_are_called_truncated() -> None:
    assert reason_of(saved(Image.fromarray(noise(64, 64)), "JPEG")[:-300]) == "truncated"
    data = bytearray(encode_png(noise(64, 64)))
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    assert reason_of(bytes(data)) == "truncated"


def test_no_flipped_bit_of_a_png_changes_its_pixels() -> None:
    """Smooth labels of few bytes: Pillow alone stops at the last pixel, before the checksum at the end of the data."""
    label = (np.add.outer(np.arange(60), np.arange(70)) % 250).astype(np.uint8)
    whole, refused = encode_png(label), 0
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        try:
            np.testing.assert_array_equal(decode_label(bytes(data)), label)
        except BadFrame:
            refused += 1
    assert refused > 0.7 * 8 * len(whole), "all but what follows the pixels"
    np.testing.assert_array_equal(decode_label(whole + b"a camera's notes"), label)


def test_truncated_images_stay_errors() -> None:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_bombs_are_refused_from_the_header() -> None:
    for side in (8001, 10_000, 20_000, 2**31 - 1):  # over ours, over Pillow's warning, over Pillow's error, absurd
        whole = png(side, side, 8, 2, b"")
        assert reason_of(whole) == reason_of(whole[:33]) == "decompression_bomb", "also a header and nothing else"
    for kind in ("BMP", "TIFF", "PPM"):
        data = saved(Image.new("1", (9000, 9000)), kind)
        assert reason_of(data) == reason_of(data, decode_label) == "decompression_bomb"
    assert reason_of(encode_png(noise(10, 10)), max_pixels=99) == "decompression_bomb"
    assert decode_image(encode_png(noise(10, 10)), max_pixels=100).shape == (10, 10, 3)


def test_more_than_8_bits_are_refused() -> None:
    sixteen = Image.fromarray(np.arange(6, dtype=np.uint16).reshape(2, 3))
    assert reason_of(saved(sixteen)) == "wrong_mode"
    assert reason_of(png(1, 1, 16, 2, bytes(7))) == "wrong_mode", "Pillow shows 16-bit colour as plain RGB"
    assert reason_of(saved(Image.fromarray(np.zeros((2, 2), dtype=np.float32)), "TIFF")) == "wrong_mode"


def test_bad_frame_survives_the_way_to_another_process() -> None:
    fault = pickle.loads(pickle.dumps(BadFrame("truncated", "12 bytes short")))
    assert (fault.reason, fault.detail, str(fault)) == ("truncated", "12 bytes short", "truncated: 12 bytes short")


# -- labels ----------------------------------------------------------------------------------------------------------


def test_label_round_trip_grey_and_palette() -> None:
    label = np.array([[0, 1, 18], [255, 11, 3]], dtype=np.uint8)
    palette = [(index, 2 * index, 255 - index) for index in range(19)]
    for data in (encode_png(label), encode_png(label, palette)):
        np.testing.assert_array_equal(decode_label(data), label)
    coloured = Image.open(io.BytesIO(encode_png(label, palette)))
    assert coloured.mode == "P"
    expected = [[palette[0], palette[1], palette[18]], [(0, 0, 0), palette[11], palette[3]]]
    np.testing.assert_array_equal(np.asarray(coloured.convert("RGB")), expected)


def test_small_palettes_and_low_bit_depths_keep_their_ids() -> None:
    image = Image.new("P", (4, 1))
    image.putpalette([*RED, *GREEN, *BLUE, 9, 9, 9])
    image.putdata([0, 1, 2, 3])
    for bits in (2, 4, 8):
        np.testing.assert_array_equal(decode_label(saved(image, bits=bits)), [[0, 1, 2, 3]])
    np.testing.assert_array_equal(decode_label(png(4, 1, 4, 0, b"\0\x01\xaf")), [[0, 1, 10, 15]])
    np.testing.assert_array_equal(decode_label(png(4, 1, 2, 0, b"\0\x1b")), [[0, 1, 2, 3]])
    np.testing.assert_array_equal(decode_label(png(8, 1, 1, 0, b"\0\xa1")), [[1, 0, 1, 0, 0, 0, 0, 1]])


def test_labels_of_other_formats_keep_their_ids() -> None:
    label = np.array([[0, 1, 18], [255, 11, 3]], dtype=np.uint8)
    for kind in ("BMP", "TIFF", "PPM"):
        np.testing.assert_array_equal(decode_label(saved(Image.fromarray(label), kind)), label)
    for kind in ("BMP", "TIFF"):
        coloured = Image.open(io.BytesIO(encode_png(label, [(index, 0, 9) for index in range(19)])))
        np.testing.assert_array_equal(decode_label(saved(coloured, kind)), label)
    for largest in (18, 65535):  # Pillow stretches the values of the first to 0..255
        assert reason_of(b"P5 2 1 %d\n\0\1\0\1" % largest, decode_label) == "wrong_mode"
    grey = b"".join(bytes((index, index, index, 0)) for index in range(16))  # which Pillow reads as 8 bits a pixel
    header = struct.pack("<IiiHHIIiiII", 40, 4, 1, 1, 4, 0, 4, 0, 0, 16, 0)
    four_bits = b"BM" + struct.pack("<IHHI", 122, 0, 0, 118) + header + grey + b"\x01\x23\0\0"
    assert reason_of(four_bits, decode_label) == "wrong_mode"
    assert may_be_label(encode_png(label)) and may_be_label(b"cut") and not may_be_label(encode_png(noise()))


def test_labels_with_several_channels_or_lossy_or_16_bit_are_refused() -> None:
    assert reason_of(encode_png(noise()), decode_label) == "wrong_mode"
    assert reason_of(saved(Image.new("LA", (2, 2))), decode_label) == "wrong_mode"
    assert reason_of(saved(Image.new("L", (8, 8)), "JPEG"), decode_label) == "wrong_mode"
    tiff = io.BytesIO()
    Image.new("L", (8, 8)).save(tiff, format="TIFF", compression="jpeg")
    assert reason_of(tiff.getvalue(), decode_label) == "wrong_mode"
    assert reason_of(saved(Image.fromarray(np.zeros((2, 2), dtype=np.uint16))), decode_label) == "wrong_mode"
    assert reason_of(encode_png(noise()[..., 0])[:-60], decode_label) == "truncated"


# -- files and encoders ----------------------------------------------------------------------------------------------


def test_reading_names_what_is_missing(tmp_path: Path) -> None:
    place = Location.of(tmp_path)
    (place / "a.png").write_bytes(encode_png(noise()))
    np.testing.assert_array_equal(images.read_image(place / "a.png"), noise())
    (place / "l.png").write_bytes(encode_png(noise()[..., 0]))
    np.testing.assert_array_equal(images.read_label(place / "l.png"), noise()[..., 0])
    for read, location, reason in (
        (images.read_image, place / "b.png", "missing"),
        (images.read_image, place / "a.png/b.png", "missing"),
        (images.read_label, place / "b.png", "label_missing"),
        (images.read_image, place, "unreadable"),
    ):
        with pytest.raises(BadFrame, match=f"^{reason}: .*{location.name}"):
            read(location)


def test_what_is_no_file_of_bytes_is_a_bad_frame(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "circle.png").symlink_to(tmp_path / "circle.png")
    for name in ("pipe.png", "circle.png"):
        with pytest.raises(BadFrame) as caught:
            images.read_image(Location.of(tmp_path / name))
        assert caught.value.reason == "unreadable"


def test_encoders_are_deterministic_and_check_their_input() -> None:
    assert encode_png(noise()) == encode_png(noise())
    assert encode_jpeg(noise()) == encode_jpeg(noise())
    smooth = np.dstack(np.broadcast_arrays(np.arange(64)[:, None], np.arange(64)[None], 128)).astype(np.uint8)
    assert np.abs(decode_image(encode_jpeg(smooth)).astype(int) - smooth).mean() < 3
    np.testing.assert_array_equal(decode_image(encode_png(smooth[::2, ::-1])), smooth[::2, ::-1])
    for wrong in (noise().astype(np.float32), noise()[..., :2], noise()[None]):
        with pytest.raises(ValueError, match="expected uint8"):
            encode_png(wrong)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(["JPEG", "PNG", "BMP", "TIFF", "PPM", "WEBP"]), st.data())
def test_damaged_bytes_are_decoded_or_refused_never_anything_else(kind: str, data: st.DataObject) -> None:
    damaged = bytearray(saved(Image.fromarray(noise()), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, min(len(damaged), 400) - 1))
        damaged[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    for decode in (decode_image, decode_label, image_size):
        try:
            decode(bytes(damaged))
        except BadFrame as fault:
            assert fault.reason in images.REASONS


# -- what a caller has in memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_an_image_of_pillow_is_what_pillow_converts_it_to(mode: str) -> None:
    rgb = Image.fromarray(noise())
    made = rgb.convert("RGBA").convert(mode) if mode in ("LA", "PA") else rgb.convert(mode) if mode != "LAB" else None
    image = made or Image.merge("LAB", [rgb.getchannel(index) for index in range(3)])
    assert np.array_equal(rgb_pixels(image), np.asarray(image.convert("RGB")))


def test_an_image_of_pillow_is_turned_as_its_file_is() -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = saved(Image.fromarray(noise()), exif=exif)
        image = Image.open(io.BytesIO(data))
        assert np.array_equal(rgb_pixels(image), decode_image(data))
        assert image.getexif()[0x0112] == orientation  # the caller's image stays as it is


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_an_image_of_pillow_with_more_than_8_bits_is_refused(mode: str) -> None:
    with pytest.raises(UserError, match=rf"mode {mode} of Pillow.* 8 x 6"):
        rgb_pixels(Image.new(mode, (8, 6)))


def test_arrays_that_mean_one_image_are_that_image() -> None:
    image = noise()
    held = image.copy()
    held.setflags(write=False)
    for given_image, wanted in (
        (image, image),
        (held, image),
        (image[::-1, ::2, ::-1], image[::-1, ::2, ::-1]),  # mirrored, every second column, BGR turned to RGB
        (np.asfortranarray(image), image),
        (torch.from_numpy(image), image),
        (torch.from_numpy(image).permute(2, 0, 1), image),
        (noise(3, 3), noise(3, 3)),  # an array has its channels last
        (noise(3, 7), noise(3, 7)),
    ):
        found = rgb_pixels(given_image)
        assert found.dtype == np.uint8 and found.flags.c_contiguous and np.array_equal(found, wanted)


@pytest.mark.parametrize(
    ("given_image", "part"),
    [
        (np.zeros((2, 4, 5, 3), np.uint8), r"\(2, 4, 5, 3\).*a batch"),
        (torch.zeros(1, 3, 4, 5, dtype=torch.uint8), r"\(1, 3, 4, 5\).*a batch"),
        (np.ones((4, 5, 3)), r"float64 of shape \(4, 5, 3\).* 1 to 1"),
        (np.full((4, 5, 3), 300, np.uint16), r"uint16 of shape \(4, 5, 3\).* 300 to 300"),
        (np.zeros((4, 5), bool), r"bool of shape \(4, 5\)"),
        (torch.zeros(3, 4, 5, dtype=torch.bfloat16), "no array of pixels"),
        (np.zeros((4, 5, 4), np.uint8), r"\(4, 5, 4\).*alpha"),
        (np.zeros((4, 5), np.uint8), r"\(4, 5\).*if it is grey"),
        (np.zeros((4, 5, 1), np.uint8), r"\(4, 5, 1\)"),
        (np.zeros((3, 4, 5), np.uint8), r"\(3, 4, 5\).*channels are first"),
        (np.zeros((4, 5, 2), np.uint8), r"\(4, 5, 2\)"),
        (np.zeros((0, 5, 3), np.uint8), r"\(0, 5, 3\)"),
        (np.zeros(7, np.uint8), r"\(7,\)"),
        (torch.zeros(3, 5, 3, dtype=torch.uint8), "channels may be first or last"),
        ("night.png", "it is str"),
        (Path("night.png"), "it is PosixPath"),
        (b"\x89PNG", "it is bytes"),
        (None, "it is NoneType"),
        ([[1, 2], [3]], "no array of pixels"),
    ],
)
def test_what_may_mean_several_things_is_refused_with_its_shape(given_image: object, part: str) -> None:
    with pytest.raises(UserError, match=part):
        rgb_pixels(given_image)
