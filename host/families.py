"""Which of the host's model families are trained.

``check_family`` refuses the others by name: a family is only offered when the tests show, on a small model of it, that
gradients, files and loaders are right (tests/host/test_families_on_models.py), and when what it is conditioned on is
all in a dataset of captioned pictures.
"""

from __future__ import annotations

from typing import Any

import torch

from .denoiser import UnsupportedModelError

# the host's class -> what people call it
PROVEN = {
    "BaseModel": "Stable Diffusion 1 and 2",
    "SDXL": "SDXL",
    "SD3": "Stable Diffusion 3",
    "Flux": "Flux",
    "Flux2": "Flux 2",
    "Chroma": "Chroma",
    "PixArt": "PixArt",
    "AuraFlow": "AuraFlow",
    "Lumina2": "Lumina 2 and Z-Image",
    "QwenImage": "Qwen-Image",
    "Omnigen2": "OmniGen 2",
    "CosmosPredict2": "Cosmos-Predict2",
    "Anima": "Anima",
    "ErnieImage": "Ernie-Image",
    "Krea2": "Krea 2",
    "HunyuanVideo": "HunyuanVideo",
    "WAN21": "Wan 2.1 and 2.2 14B",
    "LTXV": "LTX-Video",
}


def check_family(model: Any) -> None:
    """Raises UnsupportedModelError for a ``model`` of a family that is not trained, or that needs pictures beside."""
    kind = type(model).__name__
    if kind not in PROVEN:
        raise UnsupportedModelError(
            f"models of the kind {kind} are not trained yet, nothing shows that their LoRAs would be right. Connect "
            f"one of {', '.join(PROVEN.values())}"
        )
    if needs_picture(model):
        raise UnsupportedModelError(
            f"this {PROVEN[kind]} model paints over or goes on from a picture that it is given beside the text (an "
            "inpainting, image-to-video or control model), which a dataset of captioned pictures does not hold. "
            "Connect the model for text alone that it was made from"
        )


def needs_picture(model: Any) -> bool:
    """Whether the host would join another picture to the noise."""
    if getattr(model, "concat_keys", ()):
        return True
    layout = model.latent_format
    frames = (1,) if layout.latent_dimensions == 3 else ()
    noise = torch.zeros(1, layout.latent_channels, *frames, 8, 8)
    return model.concat_cond(noise=noise, device=noise.device) is not None
