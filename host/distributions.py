"""The distribution that a VAE encodes to, of which the host itself hands over the mean.

Encoders of the usual kind end in a mean and a log-variance. They are listened to inside the host's own ``encode``, so
that its loading, casting and tiling stay its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.ldm.lightricks.vae.causal_video_autoencoder
import comfy.ldm.models.autoencoder
import comfy.ldm.wan.vae
import comfy.ldm.wan.vae2_2
import torch
from torch import Tensor, nn

LOWEST, HIGHEST = -30.0, 20.0  # what the log-variance is clamped to, as where these models were trained
GAIN = 1024.0  # deviations are minute; magnified, what the host adds to them does not swallow their digits

# VAEs that take the mean out of what this layer gives (mean and log-variance, joined)
_ENDS = {
    comfy.ldm.wan.vae.WanVAE: "conv1",
    comfy.ldm.wan.vae2_2.WanVAE: "conv1",
    comfy.ldm.lightricks.vae.causal_video_autoencoder.VideoVAE: "encoder",
}


def has_distribution(vae: Any) -> bool:
    return _source(vae) is not None


def encode_moments(vae: Any, image: Tensor) -> tuple[Tensor, Tensor]:
    """(latent, log-variance) of an image, of the same shape; the latent is what ``vae.encode`` gives."""
    heard: list[Tensor] = []
    with _listening(vae, lambda moments: heard.append(moments.detach().float().cpu())):
        latent = vae.encode(image)
    mean, log_variance = heard[0].chunk(2, dim=1)
    if len(heard) == 1 and mean.shape == latent.shape and torch.equal(mean.to(latent.dtype), latent.cpu()):
        return latent, log_variance.clamp(LOWEST, HIGHEST)
    # the host normalises, rearranges or tiles what comes out: all of it linear but for a constant, so ask it for both
    with _listening(vae, lambda moments: GAIN * _deviation(moments)):
        magnified = vae.encode(image)
    with _listening(vae, lambda moments: torch.zeros_like(_deviation(moments))):
        constant = vae.encode(image)
    deviation = (magnified.float() - constant.float()).abs().cpu() / GAIN
    return latent, 2 * deviation.log()


def _deviation(moments: Tensor) -> Tensor:
    """exp(½ log σ²)"""
    return (0.5 * moments.float().chunk(2, dim=1)[1].clamp(LOWEST, HIGHEST)).exp()


def _source(vae: Any) -> tuple[nn.Module, bool] | None:
    """The module that has the moments, and whether it gives them (or takes them)."""
    network = vae.first_stage_model
    for module in network.modules():
        if isinstance(module, comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer):
            return module, False
    for kind, name in _ENDS.items():
        if isinstance(network, kind):
            return getattr(network, name), True
    return None


@contextmanager
def _listening(vae: Any, answer: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """``answer`` hears the moments (B, 2C, …); what it gives goes on in place of the mean."""
    found = _source(vae)
    assert found is not None, "this VAE has no distribution"
    module, gives = found

    def hook(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        moments = output if gives else arguments[0]
        instead = answer(moments)
        if instead is None:
            return None
        return torch.cat([instead, moments.chunk(2, dim=1)[1].to(instead)], 1) if gives else (instead, *output[1:])

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
