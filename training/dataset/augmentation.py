"""What chance does to a picture: where it is cropped, mirrored, turned, and how its colours change.

- ``view_of`` draws everything of one variation, from the seed, the sample, its bucket and the variation alone
- the crop: centre, anywhere, around the focus box, or so many times as large as the focus box
- mirroring: every other variation, so that exactly half of an even number are; which half is drawn per sample
- turning: about the crop's centre, the picture enlarged just enough for the crop's corners to stay inside
- colours, in this order, each clamped to [0, 1], with grey = 0.299 R + 0.587 G + 0.114 B:
  brightness f·x; contrast m + f·(x − m), m the mean grey of the crop; saturation grey + f·(x − grey); the hue in HSV
  shifted by h, f drawn in [1 − strength, 1 + strength] and h in [−strength, strength]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .draws import Draws
from .model import Box, ImageOptions, Sample, Size

if TYPE_CHECKING:
    from .batches import Item

GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class View:
    """One variation: the picture scaled to ``resized``, ``crop`` (left, top) of it, and what is done to that."""

    bucket: Size
    resized: Size
    crop: tuple[int, int]
    margin: tuple[int, int] = (0, 0)  # what turning needs around the crop, horizontally and vertically
    degrees: float = 0.0  # anticlockwise
    mirrored: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0

    @property
    def shown_crop(self) -> tuple[int, int]:
        """Where the crop lies in the resized picture as the viewer sees it, mirrored if it is."""
        left, top = self.crop
        return (self.resized[0] - self.bucket[0] - left, top) if self.mirrored else (left, top)


def view_of(sample: Sample, item: Item, options: ImageOptions, variation: int, seed: int) -> View:
    """The variation of a sample at one resolution."""

    def draws(purpose: str) -> Draws:
        return Draws(seed, purpose, sample.id, item.bucket, variation)

    def factor(purpose: str) -> float:
        strength = getattr(options, purpose)
        return draws(purpose).uniform(1 - strength, 1 + strength)

    degrees = draws("rotate").uniform(-options.rotate, options.rotate)
    margin = turning_margin(item.bucket, degrees)
    zoomed = options.zoom is not None and sample.focus is not None
    resized = _zoomed(sample, item, options.zoom, draws("zoom")) if zoomed else item.resized  # type: ignore[arg-type]
    resized = _with_room(resized, (item.bucket[0] + 2 * margin[0], item.bucket[1] + 2 * margin[1]))
    return View(
        item.bucket,
        resized,
        _crop(sample, item, options, resized, margin, zoomed, draws("crop")),
        margin,
        degrees,
        mirrored=options.flip and (variation + Draws(seed, "flip", sample.id, item.bucket).below(2)) % 2 == 1,
        brightness=factor("brightness"),
        contrast=factor("contrast"),
        saturation=factor("saturation"),
        hue=draws("hue").uniform(-options.hue, options.hue),
    )


def turning_margin(bucket: Size, degrees: float) -> tuple[int, int]:
    """How far a crop reaches beyond itself when turned: its bounding box is w·cos + h·sin by w·sin + h·cos."""
    (width, height), angle = bucket, math.radians(abs(degrees))
    wide = width * math.cos(angle) + height * math.sin(angle)
    tall = width * math.sin(angle) + height * math.cos(angle)
    return max(0, math.ceil((wide - width) / 2)), max(0, math.ceil((tall - height) / 2))


def _with_room(resized: Size, least: Size) -> Size:
    """The same aspect, at least as large as ``least``."""
    scale = max(1.0, least[0] / resized[0], least[1] / resized[1])
    return max(least[0], round(resized[0] * scale)), max(least[1], round(resized[1] * scale))


def _zoomed(sample: Sample, item: Item, zoom: tuple[float, float], draws: Draws) -> Size:
    """The size at which the bucket's short side is so many times the focus box's long side, drawn between the two.

    The bucket stays covered, and nothing is enlarged beyond the picture's own size for it.
    """
    assert sample.focus is not None
    left, top, right, bottom = sample.focus
    width, height = sample.size
    long = max((right - left) * width, (bottom - top) * height, 1.0)
    cover = max(item.bucket[0] / width, item.bucket[1] / height)
    smallest, largest = (min(max(cover, min(item.bucket) / (long * times)), max(cover, 1.0)) for times in zoom[::-1])
    scale = draws.uniform(smallest, largest)
    return max(item.bucket[0], round(width * scale)), max(item.bucket[1], round(height * scale))


def _crop(
    sample: Sample,
    item: Item,
    options: ImageOptions,
    resized: Size,
    margin: tuple[int, int],
    zoomed: bool,
    draws: Draws,
) -> tuple[int, int]:
    """(left, top), at least ``margin`` away from the borders."""
    left_top = []
    for axis in (0, 1):
        length, size = item.bucket[axis], resized[axis]
        least, most = margin[axis], size - length - margin[axis]
        if options.crop == "random" and not zoomed:
            place: float = least + draws.below(most - least + 1)
        elif sample.focus is not None and (zoomed or options.crop == "focus"):
            place = _around(sample.focus, axis, length, size, draws if options.crop == "random" else None)
        elif resized == item.resized:
            place = item.crop[axis]
        else:
            place = (size - length) // 2
        left_top.append(min(max(round(place), least), most))
    return left_top[0], left_top[1]


def _around(focus: Box, axis: int, length: int, size: int, draws: Draws | None) -> float:
    """The crop centred on the box; with ``draws``, anywhere that shows all of the box, or nothing but the box."""
    start, end = focus[axis] * size, focus[axis + 2] * size
    return (start + end - length) / 2 if draws is None else draws.uniform(*sorted((end - length, start)))


def turn(tile: Tensor, bucket: Size, degrees: float) -> Tensor:
    """The middle of ``tile`` (1, channels, height, width), ``bucket`` large, turned anticlockwise; bicubic."""
    height, width = tile.shape[-2:]
    angle = math.radians(degrees)
    x = (torch.arange(bucket[0]) + 0.5 - bucket[0] / 2)[None]
    y = (torch.arange(bucket[1]) + 0.5 - bucket[1] / 2)[:, None]
    across, down = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
    places = torch.stack([across * 2 / width, down * 2 / height], -1)[None]
    turned = F.grid_sample(tile, places, mode="bicubic", padding_mode="border", align_corners=False)
    return turned.clamp_(0, 1)


def recolour(image: Tensor, view: View) -> Tensor:
    """(height, width, 3) in [0, 1] with the colours of a view; the same tensor where nothing changes."""
    if view.brightness != 1:
        image = (image * view.brightness).clamp_(0, 1)
    if view.contrast != 1:
        mean = grey(image).mean()
        image = (mean + view.contrast * (image - mean)).clamp_(0, 1)
    if view.saturation != 1:
        plain = grey(image)
        image = (plain + view.saturation * (image - plain)).clamp_(0, 1)
    return shift_hue(image, view.hue) if view.hue else image


def grey(image: Tensor) -> Tensor:
    """(height, width, 1)"""
    return (image * image.new_tensor(GREY)).sum(-1, keepdim=True)


def shift_hue(image: Tensor, part: float) -> Tensor:
    """The hue moved by a part of the circle; value and saturation as in HSV stay."""
    value, which = image.max(-1)
    chroma = value - image.min(-1).values
    red, green, blue = image.unbind(-1)
    # in sixths of the circle, by the largest channel
    sixths = torch.stack([green - blue, blue - red, red - green], -1).gather(-1, which[..., None])[..., 0]
    hue = sixths / chroma.clamp(min=1e-9) + 2 * which + 6 * part
    # each channel falls from the value by the chroma, as far as the hue is away from it
    places = (hue[..., None] + image.new_tensor([5.0, 3.0, 1.0])) % 6
    away = torch.minimum(places, 4 - places).clamp_(0, 1)
    return value[..., None] - chroma[..., None] * away
