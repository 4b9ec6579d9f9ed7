"""What the model is shown and what it should answer.

* noise offset: ε + w n with one normal n for each sample and channel, so that the noise has a mean of its own
  (variance 1 + w²). Its strength w can be drawn for each picture, and grow with the mean of the picture's latent.
* multi-resolution noise: coarser and coarser layers on top of ε, brought back to variance 1.
* input perturbation: the model sees ε + γ ξ and is asked for ε.

All of it is drawn on the CPU from the given generator, ε first; what is switched off draws nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..settings import ObjectiveSettings
from .prediction import Prediction, per_sample


@dataclass(frozen=True)
class Noised:
    """``noisy`` goes into the model, ``target`` is what a perfect one would predict; both (B, …)."""

    noisy: Tensor
    target: Tensor


def add_noise(
    latents: Tensor, sigma: Tensor, prediction: Prediction, settings: ObjectiveSettings, draws: torch.Generator
) -> Noised:
    """Latents (B, C, …) at the noise levels σ (B,)."""
    drawn = torch.randn(latents.shape, generator=draws)
    if settings.multires_noise_iterations:
        drawn = multires(drawn, settings.multires_noise_iterations, settings.multires_noise_discount, draws)
    if settings.noise_offset:
        drawn = drawn + offset(latents, settings, draws)
    noise = drawn.to(latents.device, latents.dtype)
    shown = noise
    if settings.input_perturbation:
        more = torch.randn(latents.shape, generator=draws).to(noise)
        shown = noise + settings.input_perturbation * more
    return Noised(prediction.noisy(latents, shown, sigma), prediction.target(latents, noise, sigma))


def offset(latents: Tensor, settings: ObjectiveSettings, draws: torch.Generator) -> Tensor:
    """(B, C, 1, …), float32 on the CPU: max(0, w + a · |mean x0|) times a normal number."""
    normal = torch.randn((*latents.shape[:2], *(1 for _ in latents.shape[2:])), generator=draws)
    strength: Tensor | float = settings.noise_offset
    if settings.noise_offset_random:
        strength = per_sample(strength * torch.rand(len(latents), generator=draws), normal)
    if settings.adaptive_noise_offset:
        places = tuple(range(2, latents.ndim))
        means = latents.float().mean(places, keepdim=True).abs().cpu()
        strength = (strength + settings.adaptive_noise_offset * means).clamp(min=0)
    return strength * normal


def multires(noise: Tensor, iterations: int, discount: float, draws: torch.Generator) -> Tensor:
    """ε plus ``discount``^i / √2 times noise of 1/r^i its height and width, r in [2, 4), for i = 1, 2, …; until it is
    one place high or wide. Each sample is then divided by its own standard deviation.

    The published loop begins at i = 0: a second noise in full size, and ε + ε' is √2 times a white noise of which half
    is ε. Here all of the white noise is ε; what comes out is distributed alike. It also divides by the standard
    deviation of the whole batch, so that what a picture gets depends on its neighbours. Frames of (B, C, T, H, W) get
    layers of their own.
    """
    batch, *_, height, width = noise.shape
    total = noise.flatten(1, -3).clone()
    for i in range(1, iterations + 1):
        ratio = (2 + 2 * torch.rand((), generator=draws).item()) ** i
        size = max(1, int(height / ratio)), max(1, int(width / ratio))
        coarse = torch.randn((batch, total.shape[1], *size), generator=draws)
        total += discount**i / 2**0.5 * interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
        if 1 in size:
            break
    return (total / total.flatten(1).std(1).view(-1, 1, 1, 1)).view_as(noise)
