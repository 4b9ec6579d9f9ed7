"""How much each noise level counts. The weights multiply.

They are written down once, in terms of the signal-to-noise ratio SNR and of q = ``Prediction.loss_per_x0_loss``, the
factor between the square error of a prediction and that of the x̂0 it stands for (ε: SNR, v: SNR + 1, flow:
(1 + √SNR)² = 1/σ²). A weight w(SNR) on the error of x̂0 is the weight w / q on the error of the prediction: so a model
of one kind is weighted exactly as a model of another kind that says the same.

* min-SNR-γ, w = min(SNR, γ): ε min(SNR, γ) / SNR, v min(SNR, γ) / (SNR + 1), flow min((1 − σ)², γ σ²).
* debiased estimation, 1/√q, half-way between the prediction's error and that of x̂0: ε 1/√SNR, v 1/√(SNR + 1) as
  OneTrainer has it (sd-scripts has its square, which is the plain error of x̂0), flow σ.
* P2, (1 + SNR)^−γ, on whatever the model predicts.
* like noise prediction (v only), SNR / (SNR + 1).
* like v-prediction (ε only), the loss plus λ times the loss times (SNR + 1) / SNR.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..settings import ObjectiveSettings
from .prediction import Prediction

CLEAN = 1000.0  # greater ratios count as this one, where a weight has no other bound


def loss_weights(sigma: Tensor, prediction: Prediction, settings: ObjectiveSettings) -> Tensor | None:
    """What the loss of each sample is multiplied with, (B,) float32 on σ's device; None where that is 1."""
    snr = prediction.snr(sigma)
    bounded = snr.clamp(max=CLEAN)
    factors = []
    if settings.min_snr_gamma:
        factors.append(_min_snr(snr, prediction, settings.min_snr_gamma))
    if settings.debiased:
        factors.append(prediction.loss_per_x0_loss(bounded).rsqrt())
    if settings.p2_gamma:
        factors.append((1 + snr) ** -settings.p2_gamma)
    if settings.v_loss_scale:
        factors.append(bounded / (bounded + 1))
    if settings.v_like_loss:
        factors.append(1 + settings.v_like_loss * (bounded + 1) / bounded)
    return torch.stack(factors).prod(0).float().to(sigma.device) if factors else None


def _min_snr(snr: Tensor, prediction: Prediction, gamma: float) -> Tensor:
    return snr.clamp(max=gamma) / prediction.loss_per_x0_loss(snr)
