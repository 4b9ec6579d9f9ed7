"""Pictures as tensors: the whole of one, or the very crop that one presentation is trained on.

- scaled with an antialiased bicubic kernel, the same as Pillow's, in both directions; what the graph made stays in
  floating point throughout
- transparency is laid onto the background before anything is scaled, so that hidden colours never show
- the loss mask: a mask picture's first channel, the transparency, or both multiplied; it goes through the same scaling,
  crop, turn and mirror as the picture
- ``load_many`` decodes ahead in threads, in order, and holds no more than it has to
"""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor
from torch import Tensor

from .augmentation import View, recolour, turn, view_of
from .colour import to_srgb
from .images import MOST_PIXELS, decode_mask, upright
from .model import Dataset, DatasetError, FilePicture, GraphPicture, ImageOptions, Picture, Sample, Size

if TYPE_CHECKING:
    from .batches import Item

ASPECT_TOLERANCE = 0.01


@dataclass(frozen=True, eq=False)
class Pixels:
    """(height, width, 3) in [0, 1], float32 on the CPU, and (height, width) weights of the loss where there are any.

    ``crop`` is (left, top) of what is shown in the picture scaled to ``resized``.
    """

    image: Tensor
    mask: Tensor | None
    resized: Size
    crop: tuple[int, int] = (0, 0)


def load(dataset: Dataset, item: Item, variation: int, seed: int) -> Pixels:
    """One variation of a sample at its bucket's size, exactly as trained; a DatasetError names the file at fault."""
    sample = dataset.samples[item.sample]
    options = dataset.of(sample).images
    view = view_of(sample, item, options, variation, seed)
    _check_scaled(sample, view)
    image, alpha = _flat(sample.picture, options.background, view.resized, sample.id)
    masks = _masks(sample, alpha if options.alpha_mask else None)
    mask = _weights(masks, options, view)
    if options.crop == "random" and _is_empty(mask):
        view = _moved_onto(masks[0], options, view)  # a crop beside the mask would teach nothing
        mask = _weights(masks, options, view)
    if _is_empty(mask):
        raise _nothing_to_learn(sample)
    shown = _shown(image, view)[0].permute(1, 2, 0).contiguous()
    return Pixels(recolour(shown, view), mask, view.resized, view.shown_crop)


def whole(picture: Picture, background: str = "#ffffff") -> Pixels:
    """The upright picture at its full size; the mask is its transparency (1 is opaque) where it has any."""
    image, alpha = _flat(picture, background)
    size = image.shape[3], image.shape[2]
    return Pixels(_unit(image)[0].permute(1, 2, 0).contiguous(), None if alpha is None else _unit(alpha)[0, 0], size)


def load_many(
    dataset: Dataset, requests: Iterable[tuple[Item, int]], seed: int, workers: int | None = None
) -> Iterator[Pixels]:
    """``load`` of each (item, variation), in order. At most ``workers`` + 1 pictures are ahead of who consumes them."""
    workers = workers or min(4, os.cpu_count() or 1)
    ahead: deque[Future[Pixels]] = deque()
    pool = ThreadPoolExecutor(workers, "pictures")
    try:
        for item, variation in requests:
            ahead.append(pool.submit(load, dataset, item, variation, seed))
            if len(ahead) > workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# -- from a picture to (1, channels, height, width), uint8 of a file and floating point of the graph


def _flat(
    picture: Picture, background: str, least: Size | None = None, name: str = "the picture"
) -> tuple[Tensor, Tensor | None]:
    """RGB on the background, and the transparency where there is any; upright, of full size or at least ``least``."""
    try:
        colour = ImageColor.getrgb(background)[:3]
    except ValueError as error:
        raise DatasetError(f"background is {background!r}, expected a colour such as #ffffff") from error
    if isinstance(picture, GraphPicture):
        return _flat_of_graph(picture, colour, name)
    try:
        stored, size = upright(picture.path, least)
        image = to_srgb(stored)
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise _undecodable(picture, error) from error
    _check_size(picture, size)
    if image.mode == "RGB":
        return _tensor(image), None
    alpha = image.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return _tensor(image.convert("RGB")), None
    flat = Image.new("RGBA", image.size, colour)
    flat.alpha_composite(image)
    return _tensor(flat.convert("RGB")), _tensor(alpha)


def _flat_of_graph(picture: GraphPicture, colour: tuple[int, ...], name: str) -> tuple[Tensor, Tensor | None]:
    pixels = _channels_first(picture.pixels.detach().float().clamp(0, 1))
    channels = pixels.shape[1]
    if channels not in (1, 3, 4):
        raise DatasetError(f"{name} has {channels} channels, expected 1, 3 or 4")
    if channels < 4:
        return pixels.expand(1, 3, -1, -1), None
    image, alpha = pixels[:, :3], pixels[:, 3:]
    if bool((alpha == 1).all()):
        return image, None
    behind = pixels.new_tensor(colour)[:, None, None] / 255
    return behind + alpha * (image - behind), alpha


def _tensor(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image))
    return pixels[None, None] if pixels.ndim == 2 else _channels_first(pixels)


def _channels_first(pixels: Tensor) -> Tensor:
    """(1, channels, height, width) over the memory of (height, width, channels).

    In this order of calls the strides are those that torch takes for channels-last, and scales twice as fast.
    """
    return pixels[None].permute(0, 3, 1, 2)


def _unit(pixels: Tensor) -> Tensor:
    """float32 in [0, 1]"""
    return pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels


def _scaled(pixels: Tensor, size: Size) -> Tensor:
    """Bicubic (a = −0.5) with antialiasing; uint8 saturates by itself."""
    if (pixels.shape[3], pixels.shape[2]) == size:
        return pixels
    scaled = F.interpolate(pixels, size=size[::-1], mode="bicubic", antialias=True)
    return scaled if scaled.dtype == torch.uint8 else scaled.clamp_(0, 1)


def _shown(pixels: Tensor, view: View) -> Tensor:
    """Scaled, cropped, turned and mirrored; floating point, the caller's own where it is not the graph's."""
    (width, height), (left, top), (across, down) = view.bucket, view.crop, view.margin
    pixels = _scaled(pixels, view.resized)
    tile = _unit(pixels[..., top - down : top + height + down, left - across : left + width + across])
    if view.degrees:
        tile = turn(tile, view.bucket, view.degrees)
    return tile.flip(-1) if view.mirrored else tile


# -- masks


def _masks(sample: Sample, alpha: Tensor | None) -> list[Tensor]:
    """Those of the whole picture, each (1, 1, height, width) of any size; the mask picture's first."""
    own = None if sample.mask is None else _mask_picture(sample, sample.mask)
    return [mask for mask in (own, alpha) if mask is not None]


def _weights(masks: list[Tensor], options: ImageOptions, view: View) -> Tensor | None:
    """Weights of the loss: floor + (1 − floor) · mask. ``invert_mask`` is about the mask picture, if there is one."""
    if not masks:
        return None
    shown = [_shown(mask, view)[0, 0] for mask in masks]
    first = 1 - shown[0] if options.invert_mask else shown[0]
    mask = first if len(shown) == 1 else first * shown[1]
    return (options.mask_floor + (1 - options.mask_floor) * mask).contiguous()


def _is_empty(mask: Tensor | None) -> bool:
    """Less than half a level anywhere is what rounding leaves of black."""
    return mask is not None and float(mask.max()) < 0.5 / 255 and float(mask.min()) < 1e-6


def _moved_onto(mask: Tensor, options: ImageOptions, view: View) -> View:
    """The view with its crop around the first of the places that count most."""
    levels = mask[0, 0]
    place = int(levels.argmin() if options.invert_mask else levels.argmax())
    at = place % levels.shape[1] / levels.shape[1], place // levels.shape[1] / levels.shape[0]
    crop = []
    for axis in (0, 1):
        least, most = view.margin[axis], view.resized[axis] - view.bucket[axis] - view.margin[axis]
        crop.append(min(max(round(at[axis] * view.resized[axis] - view.bucket[axis] / 2), least), most))
    return dataclasses.replace(view, crop=(crop[0], crop[1]))


def _nothing_to_learn(sample: Sample) -> DatasetError:
    whose = f"the mask {_name(sample.mask, sample.id)}" if sample.mask else f"the transparency of {sample.id}"
    return DatasetError(
        f"{whose} leaves nothing of {sample.id} to learn in the part that is trained: check the mask and "
        f"invert_mask, set mask_floor above 0, or choose a crop that shows what is masked"
    )


def _mask_picture(sample: Sample, mask: Picture) -> Tensor:
    if isinstance(mask, GraphPicture):
        levels = mask.pixels.detach().float().clamp(0, 1)[..., 0][None, None]
    else:
        try:
            levels = _tensor(decode_mask(mask.path))
        except Exception as error:  # as above
            raise _undecodable(mask, error) from error
        _check_size(mask, (levels.shape[3], levels.shape[2]))
    (width, height), (wide, tall) = sample.size, (mask.width, mask.height)
    if abs(wide * height - tall * width) > max(ASPECT_TOLERANCE * tall * width, max(width, height)):  # or one pixel
        names = _name(mask, "from the graph"), _name(sample.picture, sample.id)
        raise DatasetError(
            f"the mask {names[0]} is {wide}×{tall} and its picture {names[1]} is {width}×{height}: they have to show "
            f"the same part; scale or crop the mask to the picture's aspect"
        )
    return levels


# -- what goes wrong


def _name(picture: Picture | None, otherwise: str) -> str:
    return picture.path if isinstance(picture, FilePicture) else otherwise


def _undecodable(picture: FilePicture, error: Exception) -> DatasetError:
    return DatasetError(f"{picture.path} cannot be decoded ({error}): save it again or remove it")


def _check_scaled(sample: Sample, view: View) -> None:
    """A thread of a picture would be scaled to gigabytes, of which next to nothing is shown."""
    (width, height), (wide, tall), bucket = sample.size, view.resized, view.bucket
    if wide * tall > MOST_PIXELS:
        raise DatasetError(
            f"{sample.id} is {width}×{height}: to fill its bucket of {bucket[0]}×{bucket[1]} it would have to be "
            f"scaled to {wide}×{tall}; crop it or leave it out"
        )


def _check_size(picture: FilePicture, size: Size) -> None:
    if size != (picture.width, picture.height):
        raise DatasetError(f"{picture.path} was replaced by an image of another size: queue the workflow again")
