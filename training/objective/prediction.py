"""The spaces a diffusion model predicts in, and the one protocol through which training talks to a model.

* ``Prediction``: ε, v and flow, each with its noising, its target and its signal-to-noise ratio.
* ``Denoiser``: a model on loan, as training sees it.

The loss lives in the model's own space. x̂0 is never formed: that would weight every draw by σ². Notation: x0 clean
latents, ε noise, σ noise level. ε- and v-models live on x = x0 + σ ε (so ᾱ = 1 / (1 + σ²)), flow models on
x = (1 − σ) x0 + σ ε.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor


class Prediction(Enum):
    EPSILON = "epsilon"
    VELOCITY = "v"
    FLOW = "flow"

    @property
    def is_flow(self) -> bool:
        return self is Prediction.FLOW

    def noisy(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """The model's input before its own scaling; ``sigma`` (B,)."""
        level = per_sample(sigma, x0)
        return (1 - level) * x0 + level * noise if self.is_flow else x0 + level * noise

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """What a perfect model would predict: ε, v = √ᾱ ε − √(1−ᾱ) x0, or the velocity ε − x0 of the flow."""
        if self is Prediction.EPSILON:
            return noise
        if self is Prediction.FLOW:
            return noise - x0
        level = per_sample(sigma, x0)
        return (noise - level * x0) / (1 + level**2).sqrt()

    def snr(self, sigma: Tensor) -> Tensor:
        """Signal over noise power: 1/σ² of ε- and v-models, ((1 − σ)/σ)² of flow models; infinite at σ = 0.

        (B,), float64 on the CPU: not every device has float64.
        """
        level = sigma.to("cpu", torch.float64)
        return ((1 - level) / level).square() if self.is_flow else level.pow(-2)

    def loss_per_x0_loss(self, snr: Tensor) -> Tensor:
        """How many times the square error of the prediction is that of the x̂0 it stands for.

        ε: x̂0 = (x − σ ε̂) with SNR = 1/σ², so SNR. v: x̂0 = √ᾱ x − √(1−ᾱ) v̂ and 1 − ᾱ = 1/(SNR + 1), so SNR + 1.
        Flow: x̂0 = x − σ û and σ = 1/(1 + √SNR), so (1 + √SNR)².
        """
        if self is Prediction.EPSILON:
            return snr
        return (1 + snr.sqrt()).square() if self.is_flow else snr + 1


class Denoiser(Protocol):
    """A model on loan, as training sees it."""

    prediction: Prediction

    def noise_levels(self, times: Tensor) -> Tensor:
        """σ (B,) for positions ``times`` (B,) in [0, 1), 0 being clean."""
        ...

    def predict(self, noisy: Tensor, sigma: Tensor, conditioning: Sequence[Any]) -> Tensor:
        """The raw prediction (B, …) for a batch of latents, each sample with its own conditioning."""
        ...

    def predict_base(self, noisy: Tensor, sigma: Tensor, conditioning: Sequence[Any]) -> Tensor:
        """The same without what is being trained, and without gradients."""
        ...


def per_sample(sigma: Tensor, like: Tensor) -> Tensor:
    """(B,) in the shape and dtype that multiplies ``like`` (B, …)."""
    return sigma.to(like.dtype).view(-1, *(1 for _ in like.shape[1:]))
