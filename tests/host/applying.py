"""LoRAs put on tiny models and what comes out of a sampler."""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import torch

import tiny
from lora_loom.kernels.adapter import Options
from lora_loom.kernels.layers import select_targets
from lora_loom.kernels.names import NameTable
from lora_loom.kernels.reading import LoRAFile
from lora_loom.kernels.registry import make_adapter
from lora_loom.kernels.writing import to_tensors


def random_adapter(family, shape, options, weight, seed, size=0.1):
    """With something in every tensor."""
    draws = torch.Generator().manual_seed(seed)
    fresh = make_adapter(family, shape, Options(**{"rank": 3, "alpha": 2.0, "block_size": 8} | options), draws, weight)
    return fresh.with_tensors({k: t + size * torch.randn(t.shape, generator=draws) for k, t in fresh.tensors.items()})


def lora_on(patcher, family="LoRA", options=None, preset="full", conv=True, seed=0, every=1, size=0.1):
    """(adapters by path, the same as a file has them) on every layer that a preset chooses, or each ``every``-th."""
    state, adapters = patcher.model.state_dict(), {}
    for number, target in enumerate(select_targets(patcher.model, preset, conv)[seed % every :: every]):
        weight, how = state[f"{target.path}.weight"].float(), dict(options or {})
        if f"{target.path}.bias" not in state:
            how.pop("bias", None)
        adapters[target.path] = random_adapter(family, target.shape, how, weight, 1000 * seed + number, size)
    return adapters, to_tensors(LoRAFile(adapters, names=NameTable.of(patcher.model)))


def norms(patcher, seed, size=0.2):
    """Differences of all vectors that are weights."""
    draws = torch.Generator().manual_seed(seed)
    found = {}
    for key, weight in patcher.model.named_parameters():
        if weight.ndim == 1 and key.endswith(".weight"):
            found[f"{key[:-7]}.diff"] = size * torch.randn(weight.shape, generator=draws)
    return found


def noise_for(name, seed=3):
    return comfy.sample.prepare_noise(tiny.latent(name), seed)


def sampled(patcher, name, steps=3, cfg=3.0, sampler="euler", scheduler="normal", sigmas=None, start=None, noise=True):
    """The latents a sampler gives; with ``sigmas`` a part of a run, from the latents ``start``."""
    positive, negative = tiny.conditioning(name, seed=1), tiny.conditioning(name, seed=2)
    latent = tiny.latent(name) if start is None else start
    drawn = noise_for(name) if noise else torch.zeros_like(latent)
    with torch.inference_mode():
        if sigmas is None:
            how = (steps, cfg, sampler, scheduler)
            return comfy.sample.sample(patcher, drawn, *how, positive, negative, latent, seed=3, disable_pbar=True)
        kernel = comfy.samplers.ksampler(sampler)
        return comfy.sample.sample_custom(
            patcher, drawn, cfg, kernel, sigmas, positive, negative, latent, disable_pbar=True, seed=3
        )


def relative(got, wanted):
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()
