"""Pictures of a dataset as the graph's IMAGE and MASK, one after the other, and text files below the output folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import folder_paths
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ..kernels.safetensors_io import replace_file
from ..training.dataset.graph import image_and_mask
from ..training.dataset.model import Dataset
from .checking import stepping
from .runs import checked_name

_BLOCKED = ExecutionBlocker("Dataset to Graph decodes nothing: switch with_images on, or disconnect images and masks")
NOTHING = _BLOCKED, _BLOCKED  # in the place of images and masks: whatever needs them is stopped with this message


def images_and_masks(
    dataset: Dataset, indices: Iterable[int], node_id: str | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Batches of one, each sample whole: (1, height, width, 3) and (1, height, width)."""
    indices = list(indices)
    advance = stepping(len(indices), node_id)
    images, masks = [], []
    for index in indices:
        image, mask = image_and_mask(dataset, dataset.samples[index])
        images.append(image[None])
        masks.append(mask[None])
        advance()
    return images, masks


def write_text(text: str, name: str, suffix: str) -> Path:
    """Write ``name`` + ``suffix`` into the output folder, never over another file. RunError names ``name``.

    The same text under that name is left as it is; beside another text it gets the next number.
    """
    checked, folder = checked_name(name, "name"), Path(folder_paths.get_output_directory())
    folder.mkdir(parents=True, exist_ok=True)
    content, number = text.encode(), 1
    while True:
        place = folder / f"{checked}{'' if number == 1 else f'-{number}'}{suffix}"
        try:
            open(place, "xb").close()  # ours from here on
            break
        except FileExistsError:
            if place.is_file() and place.read_bytes() == content:
                return place
            number += 1
    try:
        replace_file(place, content)
    except BaseException:
        place.unlink()
        raise
    return place
