"""Tiny models with random weights, built through the host's own classes.

* ``tiny(name)``: a MODEL (ModelPatcher) of ``NAMES``, 0.4 M to 6 M parameters; the same seed gives the same bits.
* ``unet(model_channels)``: the full SD1.5 topology at a chosen width, for benchmarks.
* ``conditioning(name)`` and ``latent(name)``: what a sampler node would hand over for it.
* ``tiny_clip()``, ``tiny_dual_clip()``, ``tiny_vae()``, ``pixel_vae()``: text encoders and VAEs.

The host's layers leave weights uninitialised, some buffers too: everything is filled here. ``inference=True`` builds
under ``torch.inference_mode``, as the host's loader nodes do, so that all weights are inference tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import comfyui_version
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL

HOST_VERSION = tuple(int(part) for part in comfyui_version.__version__.split("."))
NEWER = HOST_VERSION >= (0, 30, 0)  # these configurations carry a few more keys

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


@dataclass(frozen=True)
class Spec:
    """One tiny architecture: the host's configuration class, its settings, and the shapes of its inputs."""

    config: str
    settings: dict[str, Any]
    latent: tuple[int, ...]  # without the batch
    context: int  # width of a text token
    pooled: int | None = None
    depth_keys: tuple[str, ...] = ()
    extra: dict[str, Callable[[int], torch.Tensor]] = field(default_factory=dict)


def _unet(channels: int, context: int, **settings: Any) -> dict[str, Any]:
    return {
        "image_size": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": channels,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1],
        "transformer_depth_middle": 1,
        "use_linear_in_transformer": False,
        "context_dim": context,
        "adm_in_channels": None,
        "use_temporal_resblock": False,
        "use_temporal_attention": False,
        **settings,
    }


def _flux(**settings: Any) -> dict[str, Any]:
    newer = {"txt_ids_dims": [], "yak_mlp": False, "txt_norm": False} if NEWER else {}
    return {
        "image_model": "flux",
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "hidden_size": 128,
        "context_in_dim": 64,
        "vec_in_dim": 32,
        "num_heads": 1,
        "axes_dim": [16, 56, 56],
        "mlp_ratio": 4.0,
        "theta": 10000,
        "qkv_bias": True,
        "depth": 1,
        "depth_single_blocks": 1,
        "guidance_embed": True,
        **newer,
        **settings,
    }


_FLUX2: dict[str, Any] = {
    "image_model": "flux2",
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "vec_in_dim": None,
    "axes_dim": [32] * 4,
    "mlp_ratio": 3.0,
    "theta": 2000,
    "qkv_bias": False,
    "ops_bias": False,
    "global_modulation": True,
    "mlp_silu_act": True,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
    **({"txt_ids_dims": [3]} if NEWER else {}),
}

_CHROMA: dict[str, Any] = {
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "patch_size": 2,
    "hidden_size": 128,
    "context_in_dim": 64,
    "num_heads": 1,
    "axes_dim": [16, 56, 56],
    "mlp_ratio": 4.0,
    "theta": 10000,
    "qkv_bias": True,
    "depth": 1,
    "depth_single_blocks": 1,
    "in_dim": 64,
    "out_dim": 128,
    "hidden_dim": 64,
    "n_layers": 1,
    **({"txt_ids_dims": [], "vec_in_dim": None} if NEWER else {}),
}

_SD3: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "depth": 2,
    "input_size": None,
    "adm_in_channels": 32,
    "num_patches": 256,
    "pos_embed_max_size": 16,
    "pos_embed_scaling_factor": None,
    "qk_norm": "rms",
    "x_block_self_attn_layers": [],
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}},
}

_HUNYUAN_VIDEO: dict[str, Any] = {
    "image_model": "hunyuan_video",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "vec_in_dim": 768,
    "axes_dim": [16, 56, 56],
    "meanflow": False,
    "context_in_dim": 64,
    "hidden_size": 128,
    "mlp_ratio": 4.0,
    "num_heads": 1,
    "depth": 1,
    "depth_single_blocks": 1,
    "theta": 256,
    "qkv_bias": True,
    "byt5": False,
    "guidance_embed": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    **({"meanflow_sum": False} if NEWER else {}),
}

_WAN: dict[str, Any] = {
    "image_model": "wan2.1",
    "dim": 128,
    "out_dim": 16,
    "in_dim": 16,
    "num_heads": 1,
    "ffn_dim": 256,
    "num_layers": 1,
    "patch_size": (1, 2, 2),
    "freq_dim": 256,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "model_type": "t2v",
    "text_dim": 64,
}

_QWEN_IMAGE: dict[str, Any] = {
    "image_model": "qwen_image",
    "in_channels": 64,
    "num_layers": 1,
    "attention_head_dim": 128,
    "num_attention_heads": 1,
    "joint_attention_dim": 64,
}

_LUMINA2: dict[str, Any] = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 96,
    "cap_feat_dim": 64,
    "n_layers": 1,
    "qk_norm": True,
    "n_heads": 1,
    "n_kv_heads": 1,
    "axes_dims": [32, 32, 32],
    "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0,
    "ffn_dim_multiplier": 4.0,
}

_LTXV: dict[str, Any] = {
    "image_model": "ltxv",
    "num_layers": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 128,
}

_FULL_SD15: dict[str, Any] = {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1] * 9 + [0] * 3,
}

_SDXL: dict[str, Any] = {
    "transformer_depth": [0, 2],
    "transformer_depth_output": [0, 0, 2, 2],
    "transformer_depth_middle": 2,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 6 * 256 + 32,  # six size numbers and the pooled text
}

_BLOCKS = ("depth", "depth_single_blocks")

SPECS: dict[str, Spec] = {
    "sd15": Spec("SD15", _unet(32, 64), (4, 16, 16), 64),
    "sd2": Spec("SD20", _unet(64, 64, use_linear_in_transformer=True), (4, 16, 16), 64),
    "sdxl": Spec("SDXL", _unet(64, 64, **_SDXL), (4, 16, 16), 64, pooled=32),
    "sd3": Spec("SD3", _SD3, (16, 8, 8), 64, pooled=32),
    "flux": Spec("Flux", _flux(), (16, 8, 8), 64, pooled=32, depth_keys=_BLOCKS),
    "flux2": Spec("Flux2", _flux(**_FLUX2), (128, 4, 4), 64, pooled=32, depth_keys=_BLOCKS),
    "chroma": Spec("Chroma", _CHROMA, (16, 8, 8), 64, pooled=32, depth_keys=_BLOCKS),
    "hunyuan_video": Spec("HunyuanVideo", _HUNYUAN_VIDEO, (16, 1, 8, 8), 64, pooled=768, depth_keys=_BLOCKS),
    "wan": Spec("WAN21_T2V", _WAN, (16, 1, 8, 8), 64, depth_keys=("num_layers",)),
    "qwen_image": Spec("QwenImage", _QWEN_IMAGE, (16, 1, 8, 8), 64, depth_keys=("num_layers",)),
    "lumina2": Spec("Lumina2", _LUMINA2, (16, 8, 8), 64, depth_keys=("n_layers",)),
    "ltxv": Spec(
        "LTXV",
        _LTXV,
        (128, 1, 4, 4),
        4096,
        depth_keys=("num_layers",),
        extra={"attention_mask": lambda batch: torch.ones(batch, TOKENS, dtype=torch.long)},
    ),
}
NAMES = tuple(SPECS)
TOKENS = 7


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
        model = config.get_model({}, "")
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
    spec = Spec("SD15", _unet(model_channels, 768, **_FULL_SD15), (4, 64, 64), 768)
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
