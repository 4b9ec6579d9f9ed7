"""Tiny models with random weights, built through the host's own classes.

* ``tiny(name)``: a MODEL (ModelPatcher) of ``SPECS``, 0.2 M to 6 M parameters; the same seed gives the same bits.
* ``unet(model_channels)``: the full SD1.5 topology at a chosen width, for benchmarks.
* ``conditioning(name)`` and ``latent(name)``: what a sampler node would hand over for it.
* ``tiny_clip()``, ``tiny_dual_clip()``, ``tiny_vae()``, ``pixel_vae()``: text encoders and VAEs.

The host's layers leave weights uninitialised, some buffers too: everything is filled here. ``inference=True`` builds
under ``torch.inference_mode``, as the host's loader nodes do, so that all weights are inference tensors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL

from tiny_specs import FULL_SD15, FURTHER, NAMES, NEWER, SPECS, TOKENS, Spec, unet_settings

CLIP_CONFIG = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
VAE_CONFIG = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 64,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def fill(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter, and every position table kept as a buffer, its random value."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=draws)
            if value.ndim >= 2:
                noise *= 0.7 / max(1, value[0].numel()) ** 0.5
            else:
                noise = 0.01 * noise if name.endswith("bias") else 1.0 + 0.02 * noise
            value.copy_(noise.to(value.dtype))
        for name, value in module.named_buffers():
            if name.endswith("pos_embed"):
                value.copy_((0.1 * torch.randn(value.shape, generator=draws)).to(value.dtype))
    return module


def _build(
    spec: Spec, seed: int, dtype: torch.dtype, compute_dtype: torch.dtype | None, inference: bool
) -> comfy.model_patcher.ModelPatcher:
    with torch.inference_mode(inference):
        config = getattr(comfy.supported_models, spec.config)(dict(spec.settings))
        config.set_inference_dtype(dtype, compute_dtype)
        model = config.get_model(dict(spec.state), "")
        spec.adjust(model.diffusion_model)
        fill(model.diffusion_model, seed)
        model.requires_grad_(False)
        management = comfy.model_management
        patcher = comfy.model_patcher.ModelPatcher(
            model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
        )

    def again(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
        return _build(spec, seed, dtype, compute_dtype, inference)

    patcher.cached_patcher_init = (again, ())  # newer hosts reload through it where they need an own copy
    return patcher


def tiny(
    name: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    *,
    depth: int | None = None,
    compute_dtype: torch.dtype | None = None,
    inference: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """A tiny MODEL of architecture ``name``.

    ``depth`` sets the number of blocks of each stack (transformers only). Weights are kept in ``dtype``; with
    ``compute_dtype`` the host casts them to it whenever they are used, else the network runs in ``dtype``.
    """
    spec = SPECS[name]
    if depth is not None:
        if not spec.depth_keys:
            raise ValueError(f"{name} has no depth to choose")
        spec = replace(spec, settings={**spec.settings, **dict.fromkeys(spec.depth_keys, depth)})
    return _build(spec, seed, dtype, compute_dtype, inference)


def unet(
    model_channels: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    *,
    compute_dtype: torch.dtype | None = None,
    inference: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """SD1.5's full topology (context 768, 8 heads) with ``model_channels`` in place of 320."""
    spec = Spec("SD15", unet_settings(model_channels, 768, **FULL_SD15), (4, 64, 64), 768)
    return _build(spec, seed, dtype, compute_dtype, inference)


def latent(name: str, batch: int = 1) -> torch.Tensor:
    """Zeros of the shape this model works on, as an empty-latent node gives them."""
    return torch.zeros(batch, *SPECS[name].latent)


def conditioning(name: str, batch: int = 1, seed: int = 1) -> list:
    """A CONDITIONING of one entry: random text (batch, 7, width), and what else this architecture asks for."""
    spec = SPECS[name]
    draws = torch.Generator().manual_seed(seed)
    text = torch.randn(batch, TOKENS, spec.context, generator=draws)
    options: dict[str, Any] = {key: make(batch) for key, make in spec.extra.items()}
    if spec.pooled:
        options["pooled_output"] = torch.randn(batch, spec.pooled, generator=draws)
    return [[text, options]]


def _clip(target: comfy.supported_models_base.ClipTarget, options: dict, seed: int, inference: bool) -> comfy.sd.CLIP:
    with torch.inference_mode(inference):
        clip = comfy.sd.CLIP(target, model_options=options)
        fill(clip.cond_stage_model, seed)
    return clip


def tiny_clip(seed: int = 0, *, inference: bool = False) -> comfy.sd.CLIP:
    """CLIP-L as SD1.5 uses it, width 64, two layers, the real tokenizer."""
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    return _clip(target, {"clip_l_model_config": CLIP_CONFIG}, seed, inference)


def tiny_dual_clip(seed: int = 0, *, inference: bool = False) -> comfy.sd.CLIP:
    """SDXL's pair of encoders, width 64 each (context 128, pooled 64), three layers."""
    target = comfy.supported_models_base.ClipTarget(comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel)
    deeper = {**CLIP_CONFIG, "num_hidden_layers": 3}
    return _clip(target, {"clip_l_model_config": deeper, "clip_g_model_config": deeper}, seed, inference)


def tiny_vae(seed: int = 0, *, inference: bool = False) -> comfy.sd.VAE:
    """AutoencoderKL, eight pixels to one of four-channel latent."""
    with torch.inference_mode(inference):
        model = fill(AutoencoderKL(ddconfig=dict(VAE_CONFIG), embed_dim=4), seed)
        weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        return comfy.sd.VAE(sd=weights, config={"params": {"ddconfig": dict(VAE_CONFIG), "embed_dim": 4}})


def pixel_vae() -> comfy.sd.VAE:
    """The host's pixel-space VAE: latents are the pixels, in [-1, 1]."""
    return comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})


__all__ = [
    "FURTHER",
    "NAMES",
    "NEWER",
    "SPECS",
    "TOKENS",
    "Spec",
    "conditioning",
    "fill",
    "latent",
    "pixel_vae",
    "tiny",
    "tiny_clip",
    "tiny_dual_clip",
    "tiny_vae",
    "unet",
    "unet_settings",
]
