"""What several host tests share: adapters on a tiny model, conditioning for a batch, a loss."""

from __future__ import annotations

import torch

import tiny
from lora_loom.host.denoiser import Conditioning, HostDenoiser
from lora_loom.host.loan import borrow
from lora_loom.kernels.adapter import Options
from lora_loom.kernels.layers import select_targets
from lora_loom.kernels.lora import LoRA
from lora_loom.training.dataset.model import Access, BucketOptions, Concept
from lora_loom.training.dataset.opening import open_dataset
from lora_loom.training.learners import Component
from lora_loom.training.objective import sample_losses


def adapters_for(patcher, preset="full", conv=True, rank=3, seed=0, dtype=torch.float32, filled=True):
    """Fresh adapters on every chosen layer, with non-zero factors so that every gradient is alive."""
    draws = torch.Generator().manual_seed(seed)
    adapters = {}
    for target in select_targets(patcher.model, preset, conv):
        adapter = LoRA.create(target.shape, Options(rank, 2.0), draws).to(dtype=dtype)
        if filled:
            adapter.up.copy_(torch.randn(adapter.up.shape, generator=draws, dtype=torch.float64).to(dtype) * 0.1)
        adapters[target.path] = adapter
    for adapter in adapters.values():
        for tensor in adapter.parameters():
            tensor.requires_grad_(True)
    return adapters


def learners(adapters, plan):
    """What a Trainer is given when adapters of the diffusion model are all that is trained."""
    return [Component("model", adapters, plan.learning_rate)]


def samples_for(name, batch, seed=1, dtype=torch.float32, side=None):
    """(x0, noise, times, conditioning) of ``batch`` different samples for the tiny model ``name``, ``side`` wide."""
    draws = torch.Generator().manual_seed(seed)
    shape = (batch, *tiny.SPECS[name].latent)
    if side is not None:
        shape = (*shape[:-2], side, side)
    x0 = torch.randn(shape, generator=draws, dtype=torch.float64).to(dtype)
    noise = torch.randn(shape, generator=draws, dtype=torch.float64).to(dtype)
    times = 0.1 + 0.8 * torch.rand(batch, generator=draws, dtype=torch.float64)
    conditioning = []
    for index in range(batch):
        context, extras = tiny.conditioning(name, seed=seed + index)[0]
        conditioning.append(Conditioning(context, extras, (96 + 8 * index, 128), (4, 2 * index), (128, 128)))
    return x0, noise, times, conditioning


def opened(folder, resolution, step):
    """The data set in a plain folder."""
    concept = Concept(resolutions=((resolution, resolution),), buckets=BucketOptions(step=step))
    return open_dataset(folder, concept, Access(allowed=lambda path: True, advice=str))


def loss_of(denoiser: HostDenoiser, samples):
    """The training loss of fixed samples, in their own precision (the host hands its predictions over in float32)."""
    x0, noise, times, conditioning = samples
    sigma = denoiser.noise_levels(times)
    kind = denoiser.prediction
    output = denoiser.predict(kind.noisy(x0, noise, sigma), sigma, conditioning)
    return sample_losses(output.to(x0.dtype), kind.target(x0, noise, sigma)).mean()


__all__ = ["adapters_for", "borrow", "learners", "loss_of", "opened", "samples_for"]
