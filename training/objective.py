"""What is predicted, what is compared, and which timesteps are drawn.

* ``Prediction``: the three spaces a diffusion model predicts in, each with its noising and its target.
* ``draw_times``: positions on the trajectory, drawn per sample, untouched by any inference shift.
* ``Denoiser``: the one protocol through which training talks to a model.

The loss is the plain mean square in the model's own space. x̂0 is never formed: that would weight every draw by σ².
Notation: x0 clean latents, ε noise, σ noise level. ε- and v-models live on x = x0 + σ ε (so ᾱ = 1 / (1 + σ²)), flow
models on x = (1 − σ) x0 + σ ε.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor

from .settings import ObjectiveSettings


class Prediction(Enum):
    EPSILON = "epsilon"
    VELOCITY = "v"
    FLOW = "flow"

    @property
    def is_flow(self) -> bool:
        return self is Prediction.FLOW

    def noisy(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """The model's input before its own scaling; ``sigma`` (B,)."""
        level = _per_sample(sigma, x0)
        return (1 - level) * x0 + level * noise if self.is_flow else x0 + level * noise

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """What a perfect model would predict: ε, v = √ᾱ ε − √(1−ᾱ) x0, or the velocity ε − x0 of the flow."""
        if self is Prediction.EPSILON:
            return noise
        if self is Prediction.FLOW:
            return noise - x0
        level = _per_sample(sigma, x0)
        return (noise - level * x0) / (1 + level**2).sqrt()


class Denoiser(Protocol):
    """A model on loan, as training sees it."""

    prediction: Prediction

    def noise_levels(self, times: Tensor) -> Tensor:
        """σ (B,) for positions ``times`` (B,) in [0, 1), 0 being clean."""
        ...

    def predict(self, noisy: Tensor, sigma: Tensor, conditioning: Sequence[Any]) -> Tensor:
        """The raw prediction (B, …) for a batch of latents, each sample with its own conditioning."""
        ...


def _per_sample(sigma: Tensor, like: Tensor) -> Tensor:
    return sigma.to(like.dtype).view(-1, *(1 for _ in like.shape[1:]))


def draw_times(count: int, prediction: Prediction, settings: ObjectiveSettings, generator: torch.Generator) -> Tensor:
    """Positions (count,) in [0, 1), float64 on the CPU."""
    kind = settings.timesteps
    if kind == "automatic":
        kind = "logit-normal" if prediction.is_flow else "uniform"
    if kind == "uniform":
        return torch.rand(count, generator=generator, dtype=torch.float64)
    normal = torch.randn(count, generator=generator, dtype=torch.float64)
    return torch.sigmoid(settings.logit_mean + settings.logit_std * normal).clamp(max=1 - 1e-7)


def sample_losses(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean square error of each sample (B,), in float32 or better.

    ``mask`` (B, 1, …), 0 to 1, weighs the places; the mean is over its area, so that a small mask is no weak lesson.
    """
    wide = torch.promote_types(prediction.dtype, torch.float32)
    squares = (prediction.to(wide) - target.to(wide)).square()
    if mask is None:
        return squares.flatten(1).mean(1)
    weights = mask.to(squares).expand_as(squares)
    return (squares * weights).flatten(1).sum(1) / weights.flatten(1).sum(1)
