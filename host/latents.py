"""Images to latents and captions to conditioning, once, with the graph's VAE and CLIP.

``EncodedExamples`` implements ``training.loop.Examples``: latents are kept on the CPU, scaled as the model wants them
(``process_latent_in``), each with its own caption and its own sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ..training.data import Dataset, Sample, batch_order, load_pixels
from ..training.loop import Batch
from .denoiser import Conditioning, UnsupportedModelError, encode_captions

# distilled guidance is an input of some models; training at 1 teaches the model itself
GUIDANCE = {"guidance": 1.0}


class EncodedExamples:
    """Every sample of a data set, encoded. Batches follow ``training.data.batch_order``."""

    def __init__(
        self, dataset: Dataset, latents: list[Tensor], conditioning: list[Conditioning], batch_size: int, seed: int
    ) -> None:
        self.dataset, self.latents, self.conditioning = dataset, latents, conditioning
        self.batch_size, self.seed = batch_size, seed
        self.batches_per_epoch = len(batch_order(dataset, batch_size, seed, 0))
        self._order: tuple[int, list[tuple[int, ...]]] = (-1, [])

    def batch(self, epoch: int, index: int) -> Batch:
        if self._order[0] != epoch:
            self._order = (epoch, batch_order(self.dataset, self.batch_size, self.seed, epoch))
        picked = self._order[1][index]
        return Batch(torch.cat([self.latents[i] for i in picked]), [self.conditioning[i] for i in picked])


def encode_dataset(
    dataset: Dataset, patcher: Any, clip: Any, vae: Any, advance: Callable[[], None]
) -> tuple[list[Tensor], list[Conditioning]]:
    """(latents, conditioning) of every sample, in order; ``advance`` is called once per image.

    Raises UnsupportedModelError when the VAE belongs to another family, ValueError when the sizes do not fit it.
    """
    _check_sizes(dataset, vae)
    latent_format = patcher.get_model_object("latent_format")
    replaced = latent_format is not patcher.model.latent_format  # by a node; it is on the model only while loaded
    scaled = latent_format.process_in if replaced else patcher.model.process_latent_in
    captions = encode_captions(clip, [sample.caption for sample in dataset.samples])
    latents, conditioning = [], []
    for sample in dataset.samples:
        comfy.model_management.throw_exception_if_processing_interrupted()
        pixels = torch.from_numpy(load_pixels(sample))[None]
        latent = vae.encode(pixels)
        _check_latent(latent, latent_format.latent_channels)
        with torch.inference_mode(False):
            latents.append(scaled(latent.detach().to("cpu", torch.float32, copy=True)))
        context, extras = captions[sample.caption]
        conditioning.append(conditioning_for(sample, context, extras))
        advance()
    return latents, conditioning


def conditioning_for(sample: Sample, context: Tensor, extras: dict[str, Any]) -> Conditioning:
    """The caption and the sizes of one sample."""
    return Conditioning(
        context, {**GUIDANCE, **extras}, (sample.width, sample.height), sample.crop, sample.bucket
    )


def _check_sizes(dataset: Dataset, vae: Any) -> None:
    factor = vae.spacial_compression_encode()
    for sample in dataset.samples:
        if any(side % factor for side in sample.bucket):
            width, height = sample.bucket
            raise ValueError(
                f"{sample.id} would be trained at {width}×{height}, but this VAE needs multiples of {factor}: "
                f"set bucket_step of the dataset loader to a multiple of {factor}"
            )


def _check_latent(latent: Tensor, wanted: int) -> None:
    if latent.shape[1] != wanted:
        raise UnsupportedModelError(
            f"vae: this VAE makes latents with {latent.shape[1]} channels, the MODEL wants {wanted}. "
            "Connect the VAE that belongs to the MODEL."
        )
