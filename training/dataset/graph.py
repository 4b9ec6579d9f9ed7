"""Between a dataset and tensors of the graph.

- ``dataset_of``: images of a batch or a list, of any sizes; one caption and mask for each image, or one for all
- ``image_and_mask``: a sample whole and upright, as the graph takes images and masks
- ``frames``: single pictures or masks of batches
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .edits import doubts, update
from .images import decode_mask
from .model import Concept, Dataset, DatasetError, GraphPicture, Picture, Sample, some
from .pixels import whole

SOURCE = "images of the graph"


def dataset_of(
    images: Sequence[Tensor], captions: Sequence[str], masks: Sequence[Tensor] | None, concept: Concept
) -> Dataset:
    """``images`` are (height, width, 3 or 4), ``masks`` (height, width)."""
    if not images:
        raise DatasetError("images: there are none; connect at least one")
    names = [f"image-{number:04}" for number in range(1, len(images) + 1)]
    texts = _captions(captions, len(images))
    if masks is not None and len(masks) == 1:
        masks = [*masks] * len(images)
    empty = GraphPicture(torch.zeros(1, 1, 3))
    samples = tuple(Sample(name, empty, text) for name, text in zip(names, texts, strict=True))
    filled = update(Dataset(SOURCE, (concept,), samples), names, images=images, masks=masks)
    notes = doubts(filled, dict(zip(names, images, strict=True)), filled.samples if masks is not None else [])
    return dataclasses.replace(filled, notes=tuple(notes))


def _captions(texts: Sequence[str], count: int) -> list[str]:
    """One text per image. A single text is split into lines, except for a single image."""
    if len(texts) == 1 and count > 1:
        lines = [line.strip() for line in texts[0].strip("\n").split("\n")]
        if len(lines) not in (1, count):
            raise DatasetError(
                f"captions: {len(lines)} lines for {count} images; write one line for each image, or one for all"
            )
        return lines * (count // len(lines))
    if len(texts) != count:
        given = f"{some(texts, 'text')} for {some(range(count), 'image')}"
        raise DatasetError(f"captions: a list of {given}; give one for each")
    return [text.strip() for text in texts]


def image_and_mask(dataset: Dataset, sample: Sample) -> tuple[Tensor, Tensor]:
    """(height, width, 3) and (height, width), in [0, 1]; transparency is laid onto the background.

    The mask is light where the picture is learned: the mask picture, times transparency where that counts as a mask.
    """
    options = dataset.of(sample).images
    pixels = whole(sample.picture, options.background)
    size = pixels.image.shape[:2]
    mask = torch.ones(size) if sample.mask is None else _levels(sample.mask, sample.id, size)
    if options.alpha_mask and pixels.mask is not None:
        mask = mask * pixels.mask
    return pixels.image, mask


def _levels(mask: Picture, name: str, size: Sequence[int]) -> Tensor:
    """A mask as it is stored, at its picture's size."""
    if isinstance(mask, GraphPicture):
        levels = mask.pixels[..., 0].float()
    else:
        try:
            levels = torch.from_numpy(np.asarray(decode_mask(mask.path), np.float32) / 255)
        except Exception as error:  # decoders raise nearly anything on damaged files
            raise DatasetError(
                f"the mask of {name}, {mask.path}, cannot be decoded ({error}): save it again or remove it"
            ) from error
    return torch.nn.functional.interpolate(levels[None, None], tuple(size), mode="bilinear", antialias=True)[0, 0]


def frames(batches: Sequence[Tensor] | None) -> list[Tensor] | None:
    """The pictures or masks in batches, one by one; None for nothing."""
    return None if batches is None else [frame for batch in batches for frame in batch]
