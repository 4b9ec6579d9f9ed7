"""How far predictions are from their targets.

* ``sample_losses``: d² (L2), |d| (L1), 2c (√(d² + c²) − c) (Huber), 2 (√(d² + c²) − c) (smooth L1).
* ``huber_threshold``: the c of the last two, which may follow the timestep.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..settings import ObjectiveSettings
from .prediction import Prediction, per_sample

PLAIN = ObjectiveSettings()


def sample_losses(
    output: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    sigma: Tensor | None = None,
    times: Tensor | None = None,
    prediction: Prediction = Prediction.EPSILON,
    settings: ObjectiveSettings = PLAIN,
) -> Tensor:
    """The loss of each sample (B,), before any weight, in float32 or better; the mean square unless ``settings`` say
    otherwise, which may need the noise levels σ (B,) and the ``times`` (B,) they belong to.

    ``mask`` (B, 1, …), 0 to 1, weighs the places; the mean is over its area, so that a small mask is no weak lesson.
    """
    wide = torch.promote_types(output.dtype, torch.float32)
    difference = output.to(wide) - target.to(wide)
    if settings.loss == "L2":
        errors = difference.square()
    elif settings.loss == "L1":
        errors = difference.abs()
    else:
        assert sigma is not None and times is not None, f"{settings.loss} needs the noise levels"
        c = per_sample(huber_threshold(sigma, times, prediction, settings).to(difference), difference)
        errors = _rounded(difference, c) * (2 * c if settings.loss == "Huber" else 2)
    if mask is None:
        return errors.flatten(1).mean(1)
    weights = mask.to(errors).expand_as(errors)
    return (errors * weights).flatten(1).sum(1) / weights.flatten(1).sum(1)


def _rounded(difference: Tensor, c: Tensor) -> Tensor:
    """√(d² + c²) − c without its cancellation for small d."""
    square = difference.square()
    return square / ((square + c**2).sqrt() + c)


def huber_threshold(sigma: Tensor, times: Tensor, prediction: Prediction, settings: ObjectiveSettings) -> Tensor:
    """c (B,), float64 on the CPU: scale times huber_c, huber_c^t, or (1 − huber_c) / (1 + 1/√SNR)² + huber_c.

    1/√SNR is σ of ε- and v-models and σ / (1 − σ) of flow models, which makes it (1 − huber_c) (1 − σ)² + huber_c.
    """
    c = settings.huber_c
    if settings.huber_schedule == "constant":
        threshold = torch.full((len(sigma),), c, dtype=torch.float64)
    elif settings.huber_schedule == "exponential":
        threshold = torch.exp(times.to("cpu", torch.float64) * math.log(c))
    else:
        threshold = (1 - c) / (1 + prediction.snr(sigma).rsqrt()).square() + c
    return threshold * settings.huber_scale
