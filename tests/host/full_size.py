"""Full-size models of the families people train, without weights: the host's own classes on the meta device."""

from __future__ import annotations

from functools import cache
from typing import Any

import comfy.supported_models
import torch

from tiny import NEWER


def _unet(channels: int, context: int, mult: tuple[int, ...] = (1, 2, 4, 4), **settings: Any) -> dict[str, Any]:
    return {
        "image_size": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": channels,
        "num_res_blocks": [2] * len(mult),
        "channel_mult": list(mult),
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1] * 9 + [0] * 3,
        "transformer_depth_middle": 1,
        "use_linear_in_transformer": True,
        "context_dim": context,
        "adm_in_channels": None,
        "use_temporal_resblock": False,
        "use_temporal_attention": False,
        **settings,
    }


def _sdxl(depths: list[int], depths_out: list[int], middle: int, adm: int = 2816, **settings: Any) -> dict[str, Any]:
    depth = {"transformer_depth": depths, "transformer_depth_output": depths_out, "transformer_depth_middle": middle}
    base = _unet(320, 2048, (1, 2, 4), num_classes="sequential", adm_in_channels=adm)
    return {**base, **depth, **settings}


def _flux(hidden: int, double: int, single: int, context: int, **settings: Any) -> dict[str, Any]:
    newer = {"txt_ids_dims": [], "yak_mlp": False, "txt_norm": False} if NEWER else {}
    base = {
        "image_model": "flux",
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "hidden_size": hidden,
        "context_in_dim": context,
        "vec_in_dim": 768,
        "num_heads": hidden // 128,
        "axes_dim": [16, 56, 56],
        "mlp_ratio": 4.0,
        "theta": 10000,
        "qkv_bias": True,
        "depth": double,
        "depth_single_blocks": single,
        "guidance_embed": True,
    }
    return {**base, **newer, **settings}


def _lumina(dim: int, layers: int, heads: int, kv_heads: int, context: int, **settings: Any) -> dict[str, Any]:
    return {
        "image_model": "lumina2",
        "patch_size": 2,
        "in_channels": 16,
        "dim": dim,
        "cap_feat_dim": context,
        "n_layers": layers,
        "qk_norm": True,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "axes_dims": [32, 32, 32],
        "axes_lens": [300, 512, 512],
        "rope_theta": 10000.0,
        "ffn_dim_multiplier": 4.0,
        **settings,
    }


def _cosmos(image_model: str) -> dict[str, Any]:
    return {
        "image_model": image_model,
        "max_img_h": 240,
        "max_img_w": 240,
        "max_frames": 128,
        "in_channels": 16,
        "out_channels": 16,
        "patch_spatial": 2,
        "patch_temporal": 1,
        "model_channels": 2048,
        "num_blocks": 28,
        "num_heads": 16,
        "concat_padding_mask": True,
        "crossattn_emb_channels": 1024,
        "pos_emb_cls": "rope3d",
        "pos_emb_learnable": True,
        "pos_emb_interpolation": "crop",
        "min_fps": 1,
        "max_fps": 30,
        "use_adaln_lora": True,
        "adaln_lora_dim": 256,
        "extra_per_block_abs_pos_emb": False,
        "rope_h_extrapolation_ratio": 4.0,
        "rope_w_extrapolation_ratio": 4.0,
        "rope_t_extrapolation_ratio": 1.0,
        "extra_h_extrapolation_ratio": 1.0,
        "extra_w_extrapolation_ratio": 1.0,
        "extra_t_extrapolation_ratio": 1.0,
        "rope_enable_fps_modulation": False,
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
    "hidden_size": 3072,
    "context_in_dim": 4096,
    "num_heads": 24,
    "axes_dim": [16, 56, 56],
    "mlp_ratio": 4.0,
    "theta": 10000,
    "qkv_bias": True,
    "depth": 19,
    "depth_single_blocks": 38,
    "in_dim": 64,
    "out_dim": 3072,
    "hidden_dim": 5120,
    "n_layers": 5,
    **({"txt_ids_dims": [], "vec_in_dim": None} if NEWER else {}),
}
_SD35_MEDIUM: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "depth": 24,
    "input_size": None,
    "adm_in_channels": 2048,
    "num_patches": 384 * 384,
    "pos_embed_max_size": 384,
    "pos_embed_scaling_factor": None,
    "qk_norm": "rms",
    "x_block_self_attn_layers": list(range(13)),
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}},
}
_WAN_14B: dict[str, Any] = {
    "image_model": "wan2.1",
    "dim": 5120,
    "out_dim": 16,
    "in_dim": 16,
    "num_heads": 40,
    "ffn_dim": 13824,
    "num_layers": 40,
    "patch_size": (1, 2, 2),
    "freq_dim": 256,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "model_type": "t2v",
}
_HUNYUAN_VIDEO: dict[str, Any] = {
    "image_model": "hunyuan_video",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "vec_in_dim": 768,
    "axes_dim": [16, 56, 56],
    "meanflow": False,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 20,
    "depth_single_blocks": 40,
    "theta": 256,
    "qkv_bias": True,
    "byt5": False,
    "guidance_embed": True,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    **({"meanflow_sum": False} if NEWER else {}),
}
_REFINER = {
    "model_channels": 384,
    "context_dim": 1280,
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": [2, 2, 2, 2],
}
_AURA = {
    "max_seq": 256,
    "cond_seq_dim": 2048,
    "n_double_layers": 4,
    "n_layers": 36,
    "dim": 3072,
    "n_heads": 12,
    "global_conddim": 3072,
}
_Z_IMAGE = {
    "axes_dims": [32, 48, 48],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
}

# name -> (the host's configuration class, its settings)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": ("SD15", _unet(320, 768, use_linear_in_transformer=False)),
    "sd2": ("SD20", _unet(320, 1024)),
    "sd2_unclip": ("SD21UnclipL", _unet(320, 1024, num_classes="sequential", adm_in_channels=1536)),
    "sdxl": ("SDXL", _sdxl([0, 0, 2, 2, 10, 10], [0, 0, 0, 2, 2, 2, 10, 10, 10], 10)),
    "sdxl_refiner": ("SDXLRefiner", _sdxl([0, 0, 4, 4, 4, 4, 0, 0], [0] * 3 + [4] * 6 + [0] * 3, 4, 2560, **_REFINER)),
    "ssd1b": ("SSD1B", _sdxl([0, 0, 2, 2, 4, 4], [0, 0, 0, 1, 1, 2, 10, 4, 4], -1)),
    "koala": ("KOALA_700M", _sdxl([0, 2, 5], [0, 0, 2, 2, 5, 5], -2, num_res_blocks=[1, 1, 1])),
    "sd35_medium": ("SD3", _SD35_MEDIUM),
    "flux": ("Flux", _flux(3072, 19, 38, 4096)),
    "flux2": ("Flux2", _flux(6144, 8, 48, 15360, **_FLUX2)),
    "chroma": ("Chroma", _CHROMA),
    "lumina2": ("Lumina2", _lumina(2304, 26, 24, 8, 2304)),
    "z_image": ("ZImage", _lumina(3840, 30, 30, 30, 2560, **_Z_IMAGE)),
    "qwen_image": ("QwenImage", {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60}),
    "wan_14b": ("WAN21_T2V", _WAN_14B),
    "hunyuan_video": ("HunyuanVideo", _HUNYUAN_VIDEO),
    "ltxv": ("LTXV", {"image_model": "ltxv", "num_layers": 28, "attention_head_dim": 64, "cross_attention_dim": 2048}),
    "cosmos2": ("CosmosT2IPredict2", _cosmos("cosmos_predict2")),
    "aura": ("AuraFlow", _AURA),
    "hunyuan_dit": ("HunyuanDiT", {"image_model": "hydit", "depth": 40, "hidden_size": 1408}),
}
if NEWER:
    FAMILIES["anima"] = ("Anima", _cosmos("anima"))
SD_UNETS = ("sd15", "sd2", "sd2_unclip", "sdxl", "sdxl_refiner", "ssd1b", "koala")


@cache
def full_size(name: str) -> torch.nn.Module:
    """The host's model (BaseModel) of a family at its real size, with no memory behind its weights."""
    config_class, settings = FAMILIES[name]
    config = getattr(comfy.supported_models, config_class)(dict(settings))
    config.set_inference_dtype(torch.bfloat16, None)
    with torch.device("meta"):
        return config.get_model({}, "", device=torch.device("meta"))
