"""Image files: which types can be read, how large a picture is once it is upright, and its plain RGB pixels.

- Exif and XMP orientation in every format, also where a PNG keeps it behind its pixels
- transparency onto white, palettes, greyscale, 16-bit greyscale, CMYK; the first frame of an animation
"""

from __future__ import annotations

import os
import struct
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
OTHER_IMAGE_TYPES = (".heic", ".heif", ".jxl", ".psd", ".svg", ".tga", ".jp2", ".exr", ".hdr", ".raw", ".dng", ".ico")
SIDEWAYS = (5, 6, 7, 8)  # Exif orientations that swap width and height


@cache
def image_types() -> frozenset[str]:
    """The file types that this Pillow can read, lower case with the dot."""
    return frozenset(IMAGE_TYPES) & frozenset(Image.registered_extensions())


def decode(path: str | Path) -> Image.Image:
    """The upright picture in 8-bit RGB; any exception when it is damaged."""
    with Image.open(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


def oriented_size(path: Path) -> tuple[int, int]:
    """(width, height) after Exif orientation, from the header where the header tells."""
    with Image.open(path) as image:
        if image.format == "TIFF" or (image.format == "PNG" and _png_needs_decoding(path)):
            ImageOps.exif_transpose(image, in_place=True)
            return image.size
        # the base class's method: PNG's own decodes the whole image to look for Exif behind the pixels (36× slower)
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        return image.size[::-1] if orientation in SIDEWAYS else image.size


def _png_needs_decoding(path: Path) -> bool:
    """Whether a PNG has metadata behind its pixels, where some editors write it, or is cut short."""
    with open(path, "rb") as file:
        file.seek(8)
        seen_pixels = False
        while len(header := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", header)
            if kind == b"IEND":
                return False
            if seen_pixels and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                return True
            seen_pixels |= kind == b"IDAT"
            file.seek(length + 4, os.SEEK_CUR)
    return True


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image of any mode, transparency laid onto white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        levels = np.asarray(image)  # convert("RGB") would cut every level above 255
        grey = np.round(levels.astype(np.float32) / 257).astype(np.uint8)
        if "transparency" in image.info:
            grey[levels == image.info["transparency"]] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits, of unknown range; 8 or 16 are supported")
    if "transparency" in image.info or image.getbands()[-1] in ("A", "a"):
        pixels = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels).convert("RGB")
    return image.convert("RGB")
