"""Decode and encode images and labels, and say why a frame is bad.

Files come from users and are hostile until decoded: the format is restricted to six decoders, the size is checked
from the header before a pixel is decoded, and whatever Pillow raises becomes a `BadFrame` with one of `REASONS`.
`ImageFile.LOAD_TRUNCATED_IMAGES` stays off: a cut file is a bad frame, not a frame with a grey lower half.
"""

from __future__ import annotations

import errno
import io
import struct
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from nightseg.data.intact import PNG_SIGNATURE, check_rows, check_stored
from nightseg.data.jpeg import Colours, DamagedFile, decode_jpeg
from nightseg.storage import Location, UserError, inputs

UInt8 = NDArray[np.uint8]
Ids = UInt8 | NDArray[np.uint32]
Pixels = TypeVar("Pixels", UInt8, Ids)

REASONS = (
    "missing",  # the table names a file that is not there
    "unreadable",  # there, but its permissions or name do not let us open it, or its content has changed since
    "zero_bytes",
    "not_an_image",  # none of the accepted formats
    "truncated",  # the header is fine, the pixels are cut short or damaged
    "decompression_bomb",  # the header claims more pixels than are accepted
    "wrong_mode",  # 16-bit, float, or a label with more than one channel
    "label_missing",
    "label_size",  # label and upright image differ in height or width
    "label_orientation",  # image and label are turned differently by their EXIF, and the sizes do not tell how
    "label_value",  # ids that the label's encoding does not know
)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")  # the nine of pytorch-fid
LABEL_SUFFIXES = (".bmp", ".pgm", ".png", ".tif", ".tiff")  # of formats that keep every id
MAX_PIXELS = 64_000_000
MOST_COLORS = 1024  # of a label in colours

_FOREIGN = (  # (place, bytes there, what such a file is)
    (0, b"GIF8", "a GIF"),
    (4, b"ftypheic", "an HEIC photograph"),
    (4, b"ftypmif1", "an HEIC photograph"),
    (4, b"ftypavif", "an AVIF"),
    (4, b"jP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL \r\n\x87\n", "JPEG XL"),
    (0, b"8BPS", "a Photoshop document"),
    (0, b"v/1\x01", "OpenEXR"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"FLV", "an FLV video"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "a WMV video"),
    (4, b"ftyp", "an MP4 or QuickTime video"),
    (0, b"\x1a\x45\xdf\xa3", "a Matroska or WebM video"),
    (8, b"AVI ", "an AVI video"),
    (0, b"%PDF", "a PDF"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"version https://git-lfs", "a pointer of Git LFS, the file itself was not fetched (git lfs pull)"),
    (0, b"<!DOCTYPE", "a web page, as of a download that failed"),
    (0, b"<html", "a web page, as of a download that failed"),
    (0, b"<?xml", "an XML or SVG document"),
    (0, b"<svg", "an SVG document"),
)
_PNG_HEADER = PNG_SIGNATURE + b"\0\0\0\rIHDR"
_IMAGE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
# Grey PNGs of 2 and 4 bits are stretched to 0..255 by Pillow; labels need the stored ids back.
_LABEL_STRETCH = {"L": 1, "P": 1, "P;1": 1, "P;2": 1, "P;4": 1, "1": 1, "L;2": 85, "L;4": 17}
_LABEL_FORMATS = ("PNG", "TIFF", "BMP", "PPM")
_LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")  # what Pillow calls these compressions
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_JPEG_COLOURS: Mapping[str, Colours] = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
# `catch_warnings` changes process-wide state, so headers are read by one thread at a time; pixels are not.
_HEADER_LOCK = threading.Lock()


class StoredLabel(NamedTuple):
    """A label file: raw ids, HW, upright by its own EXIF `orientation` (1 to 8); its palette, uint8 (256, 3).

    Raw ids are uint8; of a label in colours uint32, 65536 red + 256 green + blue.
    """

    ids: Ids
    palette: UInt8 | None
    orientation: int


class BadFrame(Exception):  # noqa: N818 a property of the data, not a fault of the program
    """A frame that cannot be used. `reason` is one of `REASONS`; `detail` says what was found, without addresses."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS, reason
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> UInt8:
    """Upright uint8 HWC RGB in [0, 255], writable. Grey, palette, alpha (dropped) and CMYK files are accepted.

    Raises BadFrame: zero_bytes, not_an_image, truncated, decompression_bomb, wrong_mode.
    """
    return decode_turned(data, max_pixels)[0]


def decode_turned(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[UInt8, int]:
    """`decode_image`, and the EXIF orientation that was undone: 1 (stored upright) to 8."""
    image = _open(data, max_pixels)
    rawmode = _rawmode(image)
    if image.mode not in _IMAGE_MODES or ";16" in rawmode:
        raise BadFrame("wrong_mode", f"mode {image.mode} ({rawmode}) has no 8-bit colour; convert the file to 8 bits")
    if image.format in ("JPEG", "MPO"):
        pixels_HWC = _strict_jpeg(image, data)
        if pixels_HWC is not None:
            upright, orientation = _upright(Image.fromarray(pixels_HWC), _orientation(image))
            return (pixels_HWC if orientation == 1 else np.array(upright)), orientation
    upright, orientation = _load_upright(image, data)
    return _rgb(upright), orientation


def _rgb(upright: Image.Image) -> UInt8:
    # With transparency left in, Pillow warns about palettes whose entries have their own alpha.
    upright.info.pop("transparency", None)
    return np.array(upright.convert("RGB"), dtype=np.uint8)


def rgb_pixels(image: object) -> UInt8:
    """What a caller has in memory as uint8 HWC RGB, where it can mean one thing only.

    Taken: uint8 RGB (H, W, 3) of any strides, read-only too; tensors of PyTorch (H, W, 3) or (3, H, W), on any device;
    Pillow's images of 8 bits, as their file would be read: turned upright, alpha dropped. Refused, with a UserError
    that names the shape: the rest, such as (H, W), which a mask has too.
    """
    if isinstance(image, Image.Image):
        if image.mode not in (*_IMAGE_MODES, "HSV", "LAB"):
            raise UserError(
                f"image: mode {image.mode} of Pillow has no 8-bit colour; its size is {image.width} x {image.height}",
                cure="bring its values to 0..255 in a way that suits them, then image.convert('RGB')",
            )
        try:
            pixels = image.copy()
        except (OSError, ValueError, SyntaxError) as error:  # a cut file, a closed one
            raise UserError(f"image: cannot be decoded ({error})", cure="open an intact file anew") from error
        return _rgb(_upright(pixels, _orientation(image))[0])
    try:
        array = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
    except (TypeError, ValueError) as error:  # bfloat16, which NumPy does not have; lists of unequal lengths
        raise UserError(f"image: no array of pixels ({error})", cure="give uint8 RGB (height, width, 3)") from error
    if array.dtype.kind not in "biuf":
        raise UserError(
            f"image: it is {type(image).__name__}, not pixels", cure="open a file with PIL.Image.open first"
        )
    found = f"image: it is {array.dtype} of shape {array.shape}, not uint8 RGB (height, width, 3)"
    if array.ndim == 4:
        raise UserError(f"{found}: a batch", cure="give one image, or all of them to `batch` as a list")
    if array.dtype != np.uint8:
        extent = f"; its values are {array.min():g} to {array.max():g}" if array.size else ""
        cure = "bring it to bytes: (255 * image).round().astype(numpy.uint8) if it is in [0, 1]"
        if array.dtype.kind in "iu":
            cure = "image.astype(numpy.uint8) if its values are 0 to 255"
        raise UserError(f"{found}{extent}", cure=cure)
    if array.ndim == 3 and array.shape[0] == 3 and hasattr(image, "detach"):
        if array.shape[2] == 3:
            raise UserError(f"{found}: its channels may be first or last", cure="give it as a NumPy array")
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != 3 or not array.size:
        cures = {
            2: "numpy.stack([image] * 3, axis=2) if it is grey",
            3: "image.transpose(1, 2, 0) if channels are first, image[..., :3] if the last is alpha",
        }
        raise UserError(found, cure=cures.get(array.ndim, "give an image"))
    return np.ascontiguousarray(array)


def decode_label(data: bytes, max_pixels: int = MAX_PIXELS) -> UInt8:
    """Raw label ids, uint8 HW, writable: the values of a grey file, the indices (not the colours) of a palette file.

    Raises BadFrame as `decode_image`; wrong_mode also for more than one channel and for lossy formats.
    """
    return decode_stored_label(data, max_pixels).ids.astype(np.uint8, copy=False)


def decode_stored_label(data: bytes, max_pixels: int = MAX_PIXELS, colors: bool = False) -> StoredLabel:
    """`decode_label`, with what else the file says of its ids and of how they lie.

    `colors`: the colours are what is meant, of RGB, RGBA (alpha is dropped) and palette files.
    """
    image = _open(data, max_pixels)
    if colors:
        return _colors(image, data)
    rawmode = _label_rawmode(image, data)
    upright, orientation = _load_upright(image, data, is_label=True)
    colours = np.array(image.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3) if image.mode == "P" else None
    palette = None if colours is None else np.vstack([colours, np.zeros((256 - len(colours), 3), np.uint8)])
    ids = np.array(upright, dtype=np.uint8) // np.uint8(_LABEL_STRETCH[rawmode])
    return StoredLabel(ids, palette, orientation)


def _colors(image: ImageFile.ImageFile, data: bytes) -> StoredLabel:
    if image.format not in _LABEL_FORMATS or image.info.get("compression") in _LOSSY_TIFF:
        raise BadFrame("wrong_mode", f"a label as {image.format}, which changes its colours: save it as PNG")
    if image.mode not in ("RGB", "RGBA", "P", "L", "1") or ";16" in _rawmode(image):
        raise BadFrame("wrong_mode", f"a label in colours is RGB of 8 bits, this is {image.format} mode {image.mode}")
    upright, orientation = _load_upright(image, data, is_label=True)
    ids = np.zeros((upright.height, upright.width), np.uint32)
    for channel in np.moveaxis(_rgb(upright), 2, 0):
        ids = ids << np.uint32(8) | channel
    if len(found := np.unique(ids)) > MOST_COLORS:
        what = f"{len(found)} different colours, which no class list has"
        raise BadFrame("wrong_mode", f"{what}: a photograph, or a label that was scaled with interpolation or blended")
    return StoredLabel(ids, None, orientation)


def holds_colors(data: bytes) -> bool:
    """Whether a file has several channels, by its header."""
    try:
        return _open(data, MAX_PIXELS).mode in ("RGB", "RGBA")
    except BadFrame:
        return False


def may_be_label(data: bytes) -> bool:
    """Whether a file holds one value a pixel, by its header. True of what is damaged, which decoding tells."""
    try:
        _label_rawmode(_open(data, MAX_PIXELS), data)
    except BadFrame as fault:
        return fault.reason != "wrong_mode"
    return True


def _label_rawmode(image: ImageFile.ImageFile, data: bytes) -> str:
    rawmode = _rawmode(image)
    if image.info.get("compression") in _LOSSY_TIFF:
        raise BadFrame("wrong_mode", f"a label as {image.info['compression']} inside TIFF: its ids are changed by it")
    # Pillow stretches the values of a PGM whose largest is not 255, and misreads grey BMPs of less than 8 bits.
    is_stretched = image.format == "PPM" and image.tile[0][0] != "raw"
    bits = 24 if data[14:15] == b"\x0c" else 28  # where the bits of a pixel stand in a BMP's old and all later headers
    is_small = image.format == "BMP" and image.mode == "L" and data[bits] != 8
    is_known = image.mode in ("1", "L", "P") and rawmode in _LABEL_STRETCH and image.format in _LABEL_FORMATS
    if not is_known or is_stretched or is_small:
        raise BadFrame(
            "wrong_mode",
            f"a label is an 8-bit grey or palette PNG, this is {image.format} mode {image.mode} ({rawmode})",
        )
    return rawmode


def turned(array: Pixels, orientation: int) -> Pixels:
    """An array HW or HWC as it is shown if its file has this EXIF orientation, 1 to 8."""
    across = np.swapaxes(array, 0, 1) if orientation >= 5 else array  # 5 is the transposition alone
    return across[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]


def read_image(location: Location, sha256: str | None = None) -> UInt8:
    """`decode_image` of a file. Raises BadFrame, also with missing and unreadable."""
    return decode_image(read_bytes(location, sha256=sha256))


def read_label(location: Location) -> UInt8:
    """`decode_label` of a file. Raises BadFrame, also with label_missing and unreadable."""
    return decode_label(read_bytes(location, missing="label_missing"))


def read_bytes(location: Location, missing: str = "missing", sha256: str | None = None) -> bytes:
    """The bytes of one file. Faults of the file are a BadFrame; faults of the machine (a dead disk) are not.

    sha256: of the file, as its table says; with it, what lies in a store may be kept on this node. It is not checked.
    """
    try:
        if location.is_local and location.local.exists() and not location.local.is_file():
            raise BadFrame("unreadable", f"{location.uri} is no file of bytes")  # reading a pipe would wait for ever
        return inputs.read(location, sha256)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadFrame(missing, f"{location.uri} is not there") from error
    except (PermissionError, IsADirectoryError) as error:
        raise BadFrame("unreadable", f"{location.uri} cannot be opened: {type(error).__name__}") from error
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise BadFrame("unreadable", f"{location.uri} is a link that leads to itself") from error


def image_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) in pixels of the upright image, from the header only. Raises BadFrame as `decode_image`."""
    image = _open(data, max_pixels)
    width, height = image.size
    is_turned = image.format != "TIFF" and _orientation(image) >= 5  # of a TIFF Pillow tells the upright size
    return (width, height) if is_turned else (height, width)


def encode_png(array: UInt8, palette: Sequence[Sequence[int]] | None = None) -> bytes:
    """PNG of a uint8 HW label (grey; with `palette`, K RGB triples, indexed) or a uint8 HWC RGB image.

    The bytes depend on the arguments only. Indices from K to 255 are black: 255 is "ignored" in every label.
    """
    _check_pixels(array)
    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(array))
    if palette is not None:
        assert array.ndim == 2, f"a palette goes with a HW label, not with shape {array.shape}"
        colours = np.zeros((256, 3), dtype=np.uint8)  # all 256, or Pillow stores fewer bits and cuts index 255
        colours[: len(palette)] = palette
        image.putpalette(colours.tobytes())
    # Level 6 takes four times as long as level 1 and makes photographs a fifth smaller; labels are small and worth it.
    image.save(buffer, format="PNG", compress_level=6 if array.ndim == 2 else 1)
    return buffer.getvalue()


def encode_jpeg(image: UInt8, quality: int = 95) -> bytes:
    """JPEG of a uint8 HWC RGB image, without metadata."""
    _check_pixels(image)
    assert image.ndim == 3, f"expected HWC RGB, got shape {image.shape}"
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def _check_pixels(array: UInt8) -> None:
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if array.dtype != np.uint8 or not fits:
        raise ValueError(f"expected uint8 HW or HWC RGB, got {array.dtype} of shape {array.shape}")


def _open(data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    """Header only: format, mode and size are known and accepted, no pixel is decoded yet."""
    if not data:
        raise BadFrame("zero_bytes", "the file is empty")
    if data.startswith(_PNG_HEADER) and len(data) >= 24:
        # Pillow reads on to the pixels before it tells the size, and never tells that of a header alone.
        width, height = struct.unpack(">II", data[16:24])
        _check_size(width, height, max_pixels)
    try:
        with _HEADER_LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # complaints about metadata, which nobody reads
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadFrame("decompression_bomb", str(error)) from error
    except UnidentifiedImageError as error:  # its own message holds a memory address
        known = (what for place, start, what in _FOREIGN if data.startswith(start, place))
        found = next(known, "") or f"no intact header, the file starts with {data[:8]!r}"
        raise BadFrame("not_an_image", f"{found}; accepted are {', '.join(FORMATS)}") from error
    except Exception as error:  # hostile headers raise OSError, ValueError, OverflowError, zlib.error, ...
        reason = "truncated" if "runcated" in str(error) else "not_an_image"
        raise BadFrame(reason, _describe(error)) from error
    _check_size(*image.size, max_pixels)
    return image


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadFrame("decompression_bomb", f"{width} x {height} pixels, at most {max_pixels} are accepted")


def _load(image: ImageFile.ImageFile, data: bytes, is_label: bool) -> None:
    """Decode the pixels. The header was good, so any fault from here on is damaged data."""
    kind = image.format
    try:
        check_stored(image, data, is_label)
        image.load()
        if kind == "PNG":
            check_rows(image, data)
    except DamagedFile as error:
        raise BadFrame("truncated", f"{kind}: {error}") from error
    except Exception as error:  # as above: the decoders raise what they like
        raise BadFrame("truncated", _describe(error)) from error


def _strict_jpeg(image: ImageFile.ImageFile, data: bytes) -> UInt8 | None:
    """RGB as stored, or None where Pillow has to decode; BadFrame for what Pillow would decode without a word."""
    width, height = image.size
    try:
        pixels_HWC = decode_jpeg(data, height, width, _JPEG_COLOURS[image.mode])
    except DamagedFile as error:
        raise BadFrame("truncated", f"JPEG: {error}") from error
    if pixels_HWC is None or image.mode == "CMYK":
        return None
    return pixels_HWC if image.mode == "RGB" else np.repeat(pixels_HWC, 3, axis=2)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _rawmode(image: ImageFile.ImageFile) -> str:
    """How the pixels lie in the file; 16-bit colour shows only here, Pillow reports it as plain RGB."""
    if not image.tile:
        return image.mode  # WebP decodes as a whole
    arguments = image.tile[0].args
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) and first else image.mode


def _load_upright(image: ImageFile.ImageFile, data: bytes, is_label: bool = False) -> tuple[Image.Image, int]:
    """The decoded image, upright, and the orientation that it is stored in."""
    told = _orientation(image) if image.format == "TIFF" else 1  # which Pillow turns as it decodes
    _load(image, data, is_label)
    upright, orientation = _upright(image, _orientation(image))  # only now: in a PNG it may stand behind the pixels
    return upright, orientation if told == 1 else told


def _upright(image: Image.Image, orientation: int) -> tuple[Image.Image, int]:
    method = _UPRIGHT.get(orientation)
    return (image if method is None else image.transpose(method)), orientation


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8; 1 when there is none or the metadata is damaged."""
    with _HEADER_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # The plain method: the one of PNG decodes all pixels to read what follows them.
            value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        except Exception:  # damaged metadata of an image that decodes: the pixels are still good
            return 1
    return value if isinstance(value, int) and value in _UPRIGHT else 1
