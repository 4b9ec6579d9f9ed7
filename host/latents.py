"""Pictures to latents, with the graph's VAE: as the trainer sees them, on the CPU, scaled as the model wants them.

* ``encode_pictures``: the mean of each latent, and where it is asked for how far the VAE's distribution spreads
* ``EncodedPicture.drawn``: a fresh latent from that distribution
* ``PictureCache``: what was encoded before, on disk, known by the content of the picture's file, what is shown of it
  and the content of the VAE
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ..training.caches import DiskCache, Entry, key_of
from ..training.dataset.augmentation import view_of
from ..training.dataset.balancing import content_of
from ..training.dataset.batches import Item
from ..training.dataset.model import Dataset, DatasetError, FilePicture, Picture, Size
from ..training.dataset.pixels import Pixels, load_many
from ..training.options import OptionError
from .contents import UnknownContentError, content_of_model
from .denoiser import UnsupportedModelError
from .distributions import encode_moments, has_distribution


@dataclass(frozen=True)
class EncodedPicture:
    """One variation of a picture at one resolution."""

    latent: Tensor  # (1, C, …), scaled (``process_latent_in``): the mean of the VAE's distribution
    mask: Tensor | None  # (1, 1, …, h, w) at the latent's size, how much each place counts
    crop: tuple[int, int]  # (left, top) of what was taken of the resized picture
    deviation: Tensor | None = None  # (1, C, …), scaled; None where the mean is all that is wanted

    def drawn(self, draws: torch.Generator) -> Tensor:
        """A latent from the distribution; the mean where there is nothing else."""
        if self.deviation is None:
            return self.latent
        return self.latent + self.deviation * torch.randn(self.latent.shape, generator=draws)


def check_distribution(vae: Any) -> None:
    """Raises OptionError for a VAE that gives nothing but one latent."""
    if not has_distribution(vae):
        raise OptionError(
            f"sample_latents is True, expected False: this VAE ({type(vae.first_stage_model).__name__}) gives one "
            "latent for a picture and no distribution"
        )


def encode_pictures(
    dataset: Dataset,
    wanted: Sequence[tuple[Item, int]],
    seed: int,
    patcher: Any,
    vae: Any,
    advance: Callable[[], None] = lambda: None,
    *,
    sampled: bool = False,
    cache: PictureCache | None = None,
) -> list[EncodedPicture]:
    """Each wanted (item, variation), in order; ``advance`` is called once per picture.

    Raises UnsupportedModelError when the VAE belongs to another family.
    """
    latent_format = patcher.get_model_object("latent_format")
    replaced = latent_format is not patcher.model.latent_format  # by a node; it is on the model only while loaded
    scaled = latent_format.process_in if replaced else patcher.model.process_latent_in
    asked = [None if cache is None else cache.ask(dataset, item, variation, seed) for item, variation in wanted]
    missing = [one for one, known in zip(wanted, asked, strict=True) if known is None or known.entry is None]
    pixels = load_many(dataset, missing, seed)
    encoded = []
    for known in asked:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raw = known.entry if known is not None else None
        if raw is None:
            raw = _encoded(vae, next(pixels), sampled)
            if cache is not None and known is not None:
                cache.keep(known, raw)
        _check_latent(raw.tensors["mean"], latent_format.latent_channels)
        with torch.inference_mode(False):
            encoded.append(_scaled(raw, scaled))
        advance()
    return encoded


def _encoded(vae: Any, pixels: Pixels, sampled: bool) -> Entry:
    """What a VAE makes of a picture, before it is scaled for a model."""
    if sampled:
        latent, log_variance = encode_moments(vae, pixels.image[None])
    else:
        latent, log_variance = vae.encode(pixels.image[None]), None
    with torch.inference_mode(False):
        tensors = {"mean": latent.detach().to("cpu", torch.float32, copy=True)}
        if log_variance is not None:
            tensors["log_variance"] = log_variance.detach().to("cpu", torch.float32, copy=True)
        if pixels.mask is not None:
            tensors["mask"] = _at_size(pixels.mask.clone(), latent)
    return Entry(tensors, {"crop": list(pixels.crop)})


def _scaled(raw: Entry, scaled: Callable[[Tensor], Tensor]) -> EncodedPicture:
    """Scaling is linear but for a constant, so the deviation is what it makes of it, less what it makes of nothing."""
    left, top = raw.facts["crop"]
    deviation = None
    if "log_variance" in raw.tensors:
        wide = (0.5 * raw.tensors["log_variance"].double()).exp()
        deviation = (scaled(wide) - scaled(torch.zeros_like(wide))).abs().float()
    return EncodedPicture(scaled(raw.tensors["mean"]), raw.tensors.get("mask"), (left, top), deviation)


def _at_size(mask: Tensor, latent: Tensor) -> Tensor:
    """A mask (H, W) at the size of a latent (1, C, …, h, w): the mean over what each place of the latent covers."""
    height, width = latent.shape[-2:]
    small = torch.nn.functional.interpolate(mask[None, None], (height, width), mode="area")
    return small.view(1, 1, *(1 for _ in latent.shape[2:-2]), height, width)


# -- on disk


@dataclass(frozen=True)
class _Asked:
    """A picture's key, the state its files were in then, and what was found."""

    key: str
    files: tuple[tuple[str, int, int], ...]
    entry: Entry | None


class PictureCache:
    """What one VAE has encoded, on disk. Raises OptionError for a VAE that nothing can be kept of."""

    def __init__(self, disk: DiskCache, vae: Any, sampled: bool) -> None:
        self.disk = disk
        try:
            network = type(vae.first_stage_model).__qualname__
            self.vae_key = key_of("picture", sampled, network, str(vae.vae_dtype), content_of_model(vae.patcher))
        except UnknownContentError as error:
            raise OptionError(
                f"latent_cache is 'disk', expected 'memory': this VAE cannot be told from others ({error})"
            ) from error
        self._contents: dict[tuple[str, int, int], str] = {}

    def ask(self, dataset: Dataset, item: Item, variation: int, seed: int) -> _Asked:
        sample = dataset.samples[item.sample]
        options = dataset.of(sample).images
        files = _files(sample.picture, sample.mask)
        key = key_of(
            self.vae_key,
            self._content(sample.picture),
            sample.mask and self._content(sample.mask),
            view_of(sample, item, options, variation, seed),
            (options.background, options.alpha_mask, options.mask_floor, options.invert_mask, options.crop),
        )
        return _Asked(key, files, self.disk.get(key))

    def keep(self, asked: _Asked, raw: Entry) -> None:
        """Unless a file has changed since it was asked for: what was encoded then need not be what the key says."""
        if all(_state(path) == (path, *state) for path, *state in asked.files):
            self.disk.put(asked.key, raw)

    def _content(self, picture: Picture) -> str:
        if not isinstance(picture, FilePicture):
            return picture.fingerprint
        state = _state(picture.path)
        if state not in self._contents:
            self._contents[state] = content_of(picture)
        return self._contents[state]


def _files(*pictures: Picture | None) -> tuple[tuple[str, int, int], ...]:
    return tuple(_state(picture.path) for picture in pictures if isinstance(picture, FilePicture))


def _state(path: str) -> tuple[str, int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror}): check the file") from error
    return path, status.st_size, status.st_mtime_ns


# -- what does not fit


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
