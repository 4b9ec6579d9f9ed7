"""The colours of a decoded picture: any mode, depth and profile to 8-bit sRGB, and masks to their levels.

- an embedded ICC profile is applied (RGB, grey, CMYK); one that is sRGB in all but name changes nothing
- a PNG's gamma is honoured where neither a profile nor an sRGB mark says otherwise
- 16-bit grey is rounded; of 16-bit colour Pillow gives the high byte, at most one level of 255 away
- transparency is kept as it is stored: straight alpha, a transparent colour, palettes
- a profile that is damaged or made for other channels is passed over, as browsers do
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

NO_GAMMA = 0.05  # a gamma this near to that of sRGB is a manner of speaking; libpng's own threshold
SRGB_GAMMA = 1 / 2.2
NO_TABLE = 0x0100  # a flag of littlecms; its table for greys is too coarse in the shadows
CHANNELS = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # a profile's colour space: the mode it applies to


def to_srgb(image: Image.Image) -> Image.Image:
    """8-bit sRGB of an image of any mode: RGB, or RGBA where something can be transparent."""
    profile, gamma = image.info.get("icc_profile"), _gamma(image)
    colours, alpha = _without_alpha(image, gamma)
    if profile:
        colours = _managed(colours, profile)
    elif gamma and colours.mode in ("L", "RGB") and not _has_16_bits(image):
        colours = colours.point(_levels(256, gamma).tolist() * len(colours.getbands()))
    if colours.mode != "RGB":
        colours = colours.convert("RGB")
    if alpha is not None:
        colours.putalpha(alpha)
    return colours


def to_levels(image: Image.Image) -> Image.Image:
    """The first channel as stored, mode L: what a mask says. No colour management, transparency does not count."""
    colours, _ = _without_alpha(image)
    return colours.getchannel(0) if colours.mode in ("L", "RGB") else colours.convert("RGB").getchannel(0)


def check_mode(image: Image.Image) -> None:
    """ValueError for pixels that cannot be told to be any colours."""
    if image.mode in ("I", "F") and not _has_16_bits(image):
        raise ValueError("its pixels have 32 bits, of unknown range; 8 or 16 are supported")
    if image.mode == "LAB":
        raise ValueError("its pixels are CIELAB: save it as RGB")


def _has_16_bits(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")  # as older Pillows have it


def _gamma(image: Image.Image) -> float:
    """The gamma that has to be undone, 0 for none."""
    gamma = image.info.get("gamma") or 0.0
    marked = "icc_profile" in image.info or "srgb" in image.info
    return 0.0 if marked or gamma <= 0 or abs(gamma / SRGB_GAMMA - 1) <= NO_GAMMA else gamma


@lru_cache(maxsize=16)
def _levels(count: int, gamma: float = 0.0) -> np.ndarray:
    """8-bit level of each of ``count`` stored levels v; with a gamma, sRGB's level for the light v^(1/gamma)."""
    values = np.arange(count) / (count - 1)
    if gamma:
        light = values ** (1 / gamma)
        values = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(255 * values).astype(np.uint8)


def _without_alpha(image: Image.Image, gamma: float = 0.0) -> tuple[Image.Image, Image.Image | None]:
    """8-bit colours of mode L, RGB or CMYK, and the alpha channel."""
    key = image.info.get("transparency")
    if _has_16_bits(image):  # convert("RGB") would cut every level above 255
        stored = np.asarray(image)
        grey = Image.fromarray(_levels(65536, gamma)[stored])
        return grey, None if key is None else Image.fromarray(np.where(stored == key, 0, 255).astype(np.uint8))
    if isinstance(key, tuple) and max(key) > 255:  # of 16-bit colour, which Pillow has cut to its high bytes
        image = image.copy()
        image.info["transparency"] = tuple(level >> 8 for level in key)
    if key is not None or image.getbands()[-1] in ("A", "a"):
        pixels = image.convert("RGBA")
        colours = pixels.getchannel(0) if image.mode[0] == "L" else pixels.convert("RGB")
        return colours, pixels.getchannel("A")
    if image.mode in ("L", "RGB", "CMYK"):
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None


def _managed(colours: Image.Image, profile: bytes) -> Image.Image:
    """sRGB of what ``profile`` says the numbers mean."""
    transform = _transform(profile, colours.mode)
    if transform is None and colours.mode == "L":  # a grey picture in a colour space is grey of that space
        transform = _transform(profile, "RGB")
        colours = colours if transform is None else colours.convert("RGB")
    if transform is None:
        return colours
    return ImageCms.applyTransform(colours, transform) or colours


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None when it is not for this mode, or moves no colour by more than a level."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if CHANNELS.get(source.profile.xcolor_space.strip()) != mode:
            return None
        flags = NO_TABLE if mode == "L" else 0
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", flags=flags)  # type: ignore[arg-type]
    except (OSError, ImageCms.PyCMSError):
        return None
    if mode == "CMYK":
        return transform
    colours = _every_colour(mode)
    moved = np.asarray(ImageCms.applyTransform(colours, transform)).astype(np.int16)
    return None if np.abs(moved - np.asarray(colours.convert("RGB"))).max() <= 1 else transform


def _every_colour(mode: str) -> Image.Image:
    """All greys, or 18 steps of each channel."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3))
