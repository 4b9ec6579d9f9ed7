"""Image files: what a header tells, and the upright 8-bit picture.

- PNG, JPEG, WebP, AVIF, BMP, TIFF and GIF, told by their content whatever the file is called; the first frame
- Exif and XMP orientation in every format, also where a PNG keeps it behind its pixels; damaged metadata is no obstacle
- colours as ``colour`` has them: profiles, gamma, 16 bits, CMYK, palettes
- a large JPEG is decoded at half, a quarter or an eighth of its size where that still covers what is needed
- empty files, web pages, archives, bombs and files cut short are errors that say so: never a picture with a grey half,
  whatever other code has set Pillow to. Damage in the middle of a JPEG is invisible: its decoder does not report it
- the file is closed before anything is decoded

Errors are clauses about the file ("it is empty"); who calls knows its name.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile

from .colour import check_mode, to_levels, to_srgb
from .model import Header, Size

IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
OTHER_IMAGE_TYPES = (".heic", ".heif", ".jxl", ".psd", ".svg", ".tga", ".jp2", ".exr", ".hdr", ".raw", ".dng", ".ico")
VIDEO_TYPES = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v", ".mpg", ".mpeg", ".wmv", ".gifv")
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "DIB", "TIFF", "GIF", "MPO")  # Pillow's names; nothing else is opened
MOST_PIXELS = 178_956_970  # Pillow's own limit, here whatever Pillow is set to
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by Exif orientation
TAIL = 1024  # bytes at the end of a file in which its end mark is looked for
SIDEWAYS = (5, 6, 7, 8)  # Exif orientations that swap width and height
# what files begin with that are no pictures for us: (bytes, where, what)
OTHERS = (
    (b"<!DOCTYPE html", 0, "an HTML page"),
    (b"<html", 0, "an HTML page"),
    (b"<svg", 0, "an SVG drawing"),
    (b"<?xml", 0, "an XML file, perhaps an SVG drawing"),
    (b"{", 0, "a JSON text"),
    (b"version https://git-lfs", 0, "a Git LFS pointer to a file that was not fetched"),
    (b"PK\x03\x04", 0, "a zip archive"),
    (b"\x1f\x8b", 0, "a gzip archive"),
    (b"7z\xbc\xaf", 0, "a 7z archive"),
    (b"Rar!", 0, "a rar archive"),
    (b"%PDF", 0, "a PDF"),
    (b"8BPS", 0, "a Photoshop file"),
    (b"\xff\x0a", 0, "a JPEG XL picture"),
    (b"\x00\x00\x00\x0cJXL ", 0, "a JPEG XL picture"),
    (b"ftyphei", 4, "an HEIC picture"),
    (b"ftyphev", 4, "an HEIC picture"),
    (b"ftypmif1", 4, "an HEIF picture"),
    (b"ftypavi", 4, "an AVIF picture, which this Pillow cannot read"),
    (b"ftyp", 4, "a video"),
    (b"\x1a\x45\xdf\xa3", 0, "a video"),
    (b"AVI ", 8, "a video"),
)
# quantisation of brightness at quality 50, in the JPEG standard's appendix K
JPEG_TABLE = np.array(
    [16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51]
    + [87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120]
    + [101, 72, 92, 95, 98, 112, 100, 103, 99]
)


@cache
def image_types() -> frozenset[str]:
    """The file types that this Pillow can read, lower case with the dot."""
    return frozenset(IMAGE_TYPES) & frozenset(Image.registered_extensions())


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def read_header(path: str | Path) -> Header:
    """What the header tells; an OSError where the end of the file is missing, a ValueError for unknown colours.

    Of the pixels nothing is read, save for a PNG with metadata behind them and a file that seems to be cut short.
    """
    with open(path, "rb") as file:
        image = _open(file)
        if image.format == "TIFF":
            tags = image.tag_v2  # type: ignore[attr-defined]
            (width, height), orientation = (tags[256], tags[257]), tags.get(ExifTags.Base.Orientation, 1)
        else:
            if image.format == "PNG" and _png_has_late_metadata(file):
                image.load()
            (width, height), orientation = image.size, _orientation(image)
        if orientation in SIDEWAYS:
            width, height = height, width
        key = image.info.get("transparency")
        see_through = min(key, default=255) < 255 if isinstance(key, bytes) else key is not None
        header = Header(
            width,
            height,
            format=_format(image),
            mode=image.mode,
            orientation=orientation if orientation in UPRIGHT else 1,
            transparent=see_through or image.getbands()[-1] in ("A", "a"),
            animated=image.format != "MPO" and getattr(image, "is_animated", False),
            bits=_bits(image, file),
            jpeg_quality=_jpeg_quality(image),
        )
        cut_short = _seems_cut_short(image, file)
    if cut_short:
        upright(path)  # says whether it is
    return header


def decode(path: str | Path, least: Size | None = None) -> Image.Image:
    """The upright picture in 8-bit sRGB: RGB, or RGBA where something can be transparent."""
    return to_srgb(upright(path, least)[0])


def decode_mask(path: str | Path) -> Image.Image:
    """The levels of a mask as they are stored, upright, mode L: its first channel, unmanaged."""
    return to_levels(upright(path)[0])


def upright(path: str | Path, least: Size | None = None) -> tuple[Image.Image, Size]:
    """The upright picture as stored, and its full size; an OSError or ValueError when it is damaged.

    With ``least``, a JPEG may come smaller, but no smaller than that.
    """
    source = _Source(Path(path).read_bytes())
    image = _open(source)
    full = None  # the size after loading is the full one, except for
    if image.format in ("JPEG", "MPO"):
        sideways = _orientation(image) in SIDEWAYS
        full = image.size[::-1] if sideways else image.size
        if least is not None:
            image.draft(None, least[::-1] if sideways else least)
    if image.format == "PNG" and ImageFile.LOAD_TRUNCATED_IMAGES:  # then Pillow overlooks what it would report
        _check_png(source)
    source.complete = True
    try:
        image.load()
    except OSError:
        raise
    except Exception as error:  # decoders raise nearly anything
        raise OSError(f"it is damaged: {error}") from error
    picture: Image.Image = image
    if (orientation := _orientation(image)) in UPRIGHT:
        picture = image.transpose(UPRIGHT[orientation])
        picture.info, picture.format = image.info, image.format
    return picture, full or picture.size


class _Source(io.BytesIO):
    """The bytes of a file; once it has to be ``complete``, reading on at its end is an error.

    Pillow can be told to fill what is missing with grey, and other code in the process may have told it so.
    """

    complete = False

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if self.complete and not data and size != 0:
            raise OSError("it is truncated: its end is missing")
        return data


def _open(file: BinaryIO) -> ImageFile.ImageFile:
    """The image with its header read, of the supported formats only; a ValueError says what it is instead."""
    try:
        image = Image.open(file, formats=_formats())
    except Image.DecompressionBombError as error:
        raise ValueError(f"it has too many pixels: {error}") from error
    except Exception as error:  # not recognised, or nearly anything where a header is damaged
        file.seek(0)
        raise ValueError(_what_else(file.read(64))) from error
    width, height = image.size
    if width * height > MOST_PIXELS:
        limit = MOST_PIXELS // 10**6
        raise ValueError(f"it has too many pixels: {width} × {height}, at most {limit} megapixels are read")
    check_mode(image)
    return image  # type: ignore[return-value]


def _what_else(head: bytes) -> str:
    if not head:
        return "it is empty, 0 bytes"
    if not head.strip(b"\0"):
        return "it is filled with zeros, as after a failed copy"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for start, place, what in OTHERS:
        if (text if place == 0 else head.lower()).startswith(start.lower(), place):
            return f"it is {what}"
    if any(accept and accept(head) for _, accept in (Image.OPEN[name] for name in _formats())):
        return "its header is damaged or cut short"
    return "it is a text" if _is_text(head) else "it is no image of a supported type"


def _is_text(head: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\r\n" for byte in head)


def _format(image: Image.Image) -> str:
    return {"MPO": "JPEG", "DIB": "BMP"}.get(str(image.format), str(image.format))  # a phone's JPEG with extras is one


def _orientation(image: Image.Image) -> int:
    """By Exif or XMP; 1 where they are damaged.

    The base class's method: PNG's own decodes the whole image to look for Exif behind the pixels (36× slower).
    """
    try:
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # the parser raises nearly anything
        return 1


def _bits(image: ImageFile.ImageFile, file: BinaryIO) -> int:
    """Bits of a channel of a pixel."""
    if image.format == "PNG":
        file.seek(24)
        depth, colour = file.read(2)
        return 8 if colour == 3 else depth  # a palette's colours have 8
    if image.format == "TIFF" and image.mode != "P":
        return image.tag_v2.get(258, (1,))[0]  # type: ignore[attr-defined]
    if image.format == "AVIF":
        file.seek(0)
        place = (head := file.read(4096)).find(b"av1C")
        flags = head[place + 6] if 0 <= place < len(head) - 6 else 0
        return 12 if flags & 0x20 else 10 if flags & 0x40 else 8
    return 1 if image.mode == "1" else 8


@cache
def _jpeg_tables() -> np.ndarray:
    """The table at each quality from 1 to 100, as libjpeg scales it."""
    quality = np.arange(1, 101)[:, None]
    scale = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    return np.clip((JPEG_TABLE * scale + 50) // 100, 1, 255)


def _jpeg_quality(image: Image.Image) -> int | None:
    """The quality whose standard table is nearest to the file's: exact for libjpeg's, an estimate for others."""
    tables = getattr(image, "quantization", None)
    if not tables or len(tables.get(0, ())) != 64:
        return None
    return int(np.abs(_jpeg_tables() - np.array(tables[0])).sum(1).argmin()) + 1


def _seems_cut_short(image: Image.Image, file: BinaryIO) -> bool:
    """Whether the end of the file is missing, as far as lengths and end marks tell; of PNGs ``_png_chunks`` tells."""
    size = file.seek(0, io.SEEK_END)
    if image.format in ("JPEG", "MPO"):
        file.seek(max(0, size - TAIL))
        return b"\xff\xd9" not in file.read()
    if image.format == "GIF":
        file.seek(max(0, size - TAIL))
        return not file.read().rstrip(b"\0").endswith(b";")
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        pairs = [(tags.get(places, ()), tags.get(lengths, ())) for places, lengths in ((273, 279), (324, 325))]
        return any(place + length > size for pair in pairs for place, length in zip(*pair, strict=False))
    if image.format == "AVIF":
        return _end_of_boxes(file, size) > size
    file.seek(0)
    head = file.read(8)
    if image.format == "WEBP":
        return int.from_bytes(head[4:8], "little") + 8 > size
    return image.format == "BMP" and int.from_bytes(head[2:6], "little") > size


def _end_of_boxes(file: BinaryIO, size: int) -> int:
    """Where the last box of an AVIF ends by its own account."""
    place = 0
    while place < size:
        file.seek(place)
        head = file.read(16)
        length = int.from_bytes(head[8:16] if head[:4] == b"\0\0\0\1" else head[:4], "big")
        place = place + length if length >= 8 else size  # 0: to the end
    return place


def _png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """(kind, length) of each chunk, the file standing at its content; an error when the last one is missing."""
    place = 8
    while True:
        file.seek(place)
        if len(header := file.read(8)) < 8:
            raise OSError("it is truncated: its end is missing")
        length, kind = struct.unpack(">I4s", header)
        yield kind, length
        if kind == b"IEND":
            return
        place += length + 12


def _png_has_late_metadata(file: BinaryIO) -> bool:
    """Whether a PNG has metadata behind its pixels, where some editors write it."""
    seen_pixels = late = False
    place = file.tell()
    for kind, _ in _png_chunks(file):
        late |= seen_pixels and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
        seen_pixels |= kind == b"IDAT"
    file.seek(place)
    return late


def _check_png(file: BinaryIO) -> None:
    """That the pixels are all there and unharmed."""
    place = file.tell()
    for kind, length in _png_chunks(file):
        if kind in (b"IDAT", b"IEND"):
            data, checksum = file.read(length), file.read(4)
            if zlib.crc32(kind + data).to_bytes(4, "big") != checksum:
                raise OSError("it is damaged: a checksum does not fit")
    file.seek(place)
