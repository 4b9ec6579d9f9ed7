"""Pictures to latents, with the graph's VAE: as the trainer sees them, on the CPU, scaled as the model wants them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ..training.dataset.batches import Item
from ..training.dataset.model import Dataset, Size
from ..training.dataset.pixels import load_many
from .denoiser import UnsupportedModelError


@dataclass(frozen=True)
class EncodedPicture:
    """One variation of a picture at one resolution."""

    latent: Tensor  # (1, C, …), scaled (``process_latent_in``)
    mask: Tensor | None  # (1, 1, …, h, w) at the latent's size, how much each place counts
    crop: tuple[int, int]  # (left, top) of what was taken of the resized picture


def encode_pictures(
    dataset: Dataset,
    wanted: Sequence[tuple[Item, int]],
    seed: int,
    patcher: Any,
    vae: Any,
    advance: Callable[[], None] = lambda: None,
) -> list[EncodedPicture]:
    """Each wanted (item, variation), in order; ``advance`` is called once per picture.

    Raises UnsupportedModelError when the VAE belongs to another family.
    """
    latent_format = patcher.get_model_object("latent_format")
    replaced = latent_format is not patcher.model.latent_format  # by a node; it is on the model only while loaded
    scaled = latent_format.process_in if replaced else patcher.model.process_latent_in
    encoded = []
    for pixels in load_many(dataset, wanted, seed):
        comfy.model_management.throw_exception_if_processing_interrupted()
        latent = vae.encode(pixels.image[None])
        _check_latent(latent, latent_format.latent_channels)
        with torch.inference_mode(False):
            latent = scaled(latent.detach().to("cpu", torch.float32, copy=True))
            mask = None if pixels.mask is None else _at_size(pixels.mask.clone(), latent)
        encoded.append(EncodedPicture(latent, mask, pixels.crop))
        advance()
    return encoded


def _at_size(mask: Tensor, latent: Tensor) -> Tensor:
    """A mask (H, W) at the size of a latent (1, C, …, h, w): the mean over what each place of the latent covers."""
    height, width = latent.shape[-2:]
    small = torch.nn.functional.interpolate(mask[None, None], (height, width), mode="area")
    return small.view(1, 1, *(1 for _ in latent.shape[2:-2]), height, width)


def check_sizes(dataset: Dataset, items: Sequence[Item], vae: Any) -> None:
    """ValueError where a picture would be trained at a size the VAE cannot take."""
    factor = vae.spacial_compression_encode()
    for item in items:
        if any(side % factor for side in item.bucket):
            raise ValueError(
                f"{dataset.samples[item.sample].id} would be trained at {_shown(item.bucket)}, but this VAE needs "
                f"multiples of {factor}: set bucket_step of the dataset loader to a multiple of {factor}"
            )


def _shown(size: Size) -> str:
    return f"{size[0]}×{size[1]}"


def _check_latent(latent: Tensor, wanted: int) -> None:
    if latent.shape[1] != wanted:
        raise UnsupportedModelError(
            f"vae: this VAE makes latents with {latent.shape[1]} channels, the MODEL wants {wanted}. "
            "Connect the VAE that belongs to the MODEL."
        )
