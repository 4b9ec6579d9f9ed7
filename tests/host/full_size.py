"""Models of the families people train, without weights: the host's own classes on the meta device.

* ``full_size(name)``: the model of a family in ``FAMILIES``, at its real size.
* ``FURTHER``: further families, with fewer or thinner blocks: enough for all kinds of layers they have.
* ``text_encoders(name)``: the text encoders of ``TEXT_ENCODERS``, at their real size.
"""

from __future__ import annotations

import importlib
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
_PIXART: dict[str, Any] = {
    "num_heads": 16,
    "patch_size": 2,
    "hidden_size": 64,
    "in_channels": 4,
    "depth": 2,
    "model_max_length": 120,
}
_MOCHI: dict[str, Any] = {
    "image_model": "mochi_preview",
    "depth": 48,
    "patch_size": 2,
    "num_heads": 24,
    "hidden_size_x": 3072,
    "hidden_size_y": 1536,
    "in_channels": 12,
    "mlp_ratio_x": 4.0,
    "mlp_ratio_y": 4.0,
    "learn_sigma": False,
    "qk_norm": True,
    "qkv_bias": False,
    "out_bias": True,
    "attend_to_padding": False,
    "use_t5": True,
    "t5_feat_dim": 4096,
    "t5_token_length": 256,
}
_HIDREAM: dict[str, Any] = {
    "image_model": "hidream",
    "attention_head_dim": 128,
    "axes_dims_rope": [64, 32, 32],
    "caption_channels": [4096, 4096],
    "in_channels": 16,
    "llama_layers": [0, 1, 2],
    "num_attention_heads": 20,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "num_layers": 2,
    "num_single_layers": 2,
    "out_channels": 16,
    "patch_size": 2,
    "text_emb_dim": 2048,
}
_ACE_STEP: dict[str, Any] = {
    "audio_model": "ace",
    "attention_head_dim": 128,
    "in_channels": 8,
    "inner_dim": 2560,
    "mlp_ratio": 2.5,
    "num_attention_heads": 20,
    "num_layers": 2,
    "out_channels": 8,
    "patch_size": [16, 1],
    "ssl_encoder_depths": [8, 8],
    "ssl_latent_dims": [1024, 768],
    "ssl_names": ["mert", "m-hubert"],
}
_OMNIGEN2: dict[str, Any] = {
    "image_model": "omnigen2",
    "axes_dim_rope": [40, 40, 40],
    "hidden_size": 2520,
    "in_channels": 16,
    "num_attention_heads": 21,
    "num_kv_heads": 7,
    "num_layers": 2,
    "num_refiner_layers": 2,
    "patch_size": 2,
    "text_feat_dim": 2048,
}
_CASCADE: dict[str, Any] = {
    "c_hidden": [64, 64],
    "nhead": [2, 2],
    "blocks": [[1, 1], [1, 1]],
    "block_repeat": [[1, 1], [1, 1]],
}
_COSMOS1: dict[str, Any] = {
    "image_model": "cosmos",
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 4096,
    "block_config": "FA-CA-MLP",
    "concat_padding_mask": True,
    "pos_emb_cls": "rope3d",
    "pos_emb_interpolation": "crop",
    "block_x_format": "THWBD",
    "affline_emb_norm": True,
    "use_adaln_lora": True,
    "adaln_lora_dim": 256,
    "num_blocks": 2,
    "num_heads": 32,
    "extra_per_block_abs_pos_emb": True,
    "extra_per_block_abs_pos_emb_type": "learnable",
}
_KREA2: dict[str, Any] = {
    "image_model": "krea2",
    "features": 6144,
    "channels": 16,
    "patch": 2,
    "layers": 2,
    "heads": 48,
    "kvheads": 12,
    "txtlayers": 12,
    "txtdim": 2560,
}
_KANDINSKY5: dict[str, Any] = {
    "image_model": "kandinsky5",
    "model_dim": 1792,
    "axes_dims": (16, 24, 24),
    "time_dim": 512,
    "ff_dim": 7168,
    "visual_embed_dim": 132,
    "num_text_blocks": 2,
    "num_visual_blocks": 2,
}
_ACE_STEP15: dict[str, Any] = {"audio_model": "ace1.5", "hidden_size": 256, "intermediate_size": 512, "num_heads": 2}
_HUNYUAN_IMAGE: dict[str, Any] = {"vec_in_dim": None, "patch_size": [1, 1], "axes_dim": [64, 64], "byt5": True}
_HUNYUAN15: dict[str, Any] = {"vec_in_dim": None, "vision_in_dim": 1152, "use_cond_type_embedding": True, "byt5": True}

FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "pixart_alpha": ("PixArtAlpha", {**_PIXART, "image_model": "pixart_alpha", "micro_condition": True}),
    "pixart_sigma": ("PixArtSigma", {**_PIXART, "image_model": "pixart_sigma", "micro_condition": False}),
    "mochi": ("GenmoMochi", _MOCHI),
    "hidream": ("HiDream", _HIDREAM),
    "ace_step": ("ACEStep", _ACE_STEP),
    "omnigen2": ("Omnigen2", _OMNIGEN2),
    "cascade_c": ("Stable_Cascade_C", {"stable_cascade_stage": "c", "c_cond": 64, **_CASCADE}),
    "cascade_b": ("Stable_Cascade_B", {"stable_cascade_stage": "b", "c_cond": 64, **_CASCADE}),
    "cosmos1": ("CosmosT2V", _COSMOS1),
    "hunyuan_video15": ("HunyuanVideo15", {**_HUNYUAN_VIDEO, **_HUNYUAN15, "depth": 2, "depth_single_blocks": 0}),
    "hunyuan_image": ("HunyuanImage21", {**_HUNYUAN_VIDEO, **_HUNYUAN_IMAGE, "depth": 2, "depth_single_blocks": 2}),
    "wan_i2v": ("WAN21_I2V", {**_WAN_14B, "num_layers": 2, "model_type": "i2v", "in_dim": 36}),
    "wan_vace": (
        "WAN21_Vace",
        {**_WAN_14B, "num_layers": 2, "model_type": "vace", "vace_in_dim": 96, "vace_layers": 1},
    ),
}
if NEWER:
    FURTHER |= {
        "krea2": ("Krea2", _KREA2),
        "kandinsky5": ("Kandinsky5", _KANDINSKY5),
        "ace_step15": ("ACEStep15", _ACE_STEP15),
        "ernie_image": ("ErnieImage", {"image_model": "ernie"}),
        "ltxav": (
            "LTXAV",
            {"image_model": "ltxav", "num_layers": 2, "attention_head_dim": 128, "cross_attention_dim": 4096},
        ),
    }
_REAL = ("pixart_alpha", "pixart_sigma", "cascade_c", "cascade_b", "ace_step15")  # read tensors while they are built

# name -> (module, class or maker of it, settings of the maker)
TEXT_ENCODERS: dict[str, tuple[str, str, dict[str, Any] | None]] = {
    "sd1": ("comfy.sd1_clip", "SD1ClipModel", None),
    "sd2": ("comfy.text_encoders.sd2_clip", "SD2ClipModel", None),
    "sdxl": ("comfy.sdxl_clip", "SDXLClipModel", None),
    "sdxl_refiner": ("comfy.sdxl_clip", "SDXLRefinerClipModel", None),
    "cascade": ("comfy.sdxl_clip", "StableCascadeClipModel", None),
    "sd3": ("comfy.text_encoders.sd3_clip", "sd3_clip", {}),
    "sd3_without_t5": ("comfy.text_encoders.sd3_clip", "sd3_clip", {"t5": False}),
    "sd3_without_clip_l": ("comfy.text_encoders.sd3_clip", "sd3_clip", {"clip_l": False}),
    "sd3_t5_alone": ("comfy.text_encoders.sd3_clip", "sd3_clip", {"clip_l": False, "clip_g": False}),
    "flux": ("comfy.text_encoders.flux", "flux_clip", {}),
    "flux2": ("comfy.text_encoders.flux", "flux2_te", {}),
    "hunyuan_dit": ("comfy.text_encoders.hydit", "HyditModel", None),
    "hidream": ("comfy.text_encoders.hidream", "hidream_clip", {}),
    "pixart": ("comfy.text_encoders.pixart_t5", "pixart_te", {}),
    "hunyuan_video": ("comfy.text_encoders.hunyuan_video", "hunyuan_video_clip", {}),
    "hunyuan_image": ("comfy.text_encoders.hunyuan_image", "te", {}),
    "z_image": ("comfy.text_encoders.z_image", "te", {}),
    "qwen_image": ("comfy.text_encoders.qwen_image", "te", {}),
    "lumina2": ("comfy.text_encoders.lumina2", "te", {}),
    "omnigen2": ("comfy.text_encoders.omnigen2", "te", {}),
    "wan": ("comfy.text_encoders.wan", "te", {}),
    "aura": ("comfy.text_encoders.aura_t5", "AuraT5Model", None),
    "ace_step": ("comfy.text_encoders.ace", "AceT5Model", None),
}
if NEWER:
    for _name, _module in (
        ("anima", "anima"),
        ("ace_step15", "ace15"),
        ("kandinsky5", "kandinsky5"),
        ("krea2", "krea2"),
    ):
        TEXT_ENCODERS[_name] = (f"comfy.text_encoders.{_module}", "te", {})
SD_UNETS = ("sd15", "sd2", "sd2_unclip", "sdxl", "sdxl_refiner", "ssd1b", "koala")


@cache
def full_size(name: str) -> torch.nn.Module:
    """The host's model (BaseModel) of a family, with no memory behind its weights."""
    config_class, settings = FAMILIES[name] if name in FAMILIES else FURTHER[name]
    config = getattr(comfy.supported_models, config_class)(dict(settings))
    config.set_inference_dtype(torch.bfloat16, None)
    device = torch.device("cpu" if name in _REAL else "meta")
    with device:
        return config.get_model({}, "", device=device)


@cache
def text_encoders(name: str) -> torch.nn.Module:
    """What the host keeps of a CLIP as ``cond_stage_model``, with no memory behind its weights."""
    module, maker, settings = TEXT_ENCODERS[name]
    made = getattr(importlib.import_module(module), maker)
    with torch.device("meta"):
        model_class = made if settings is None else made(**settings)
        return model_class(device="meta", dtype=torch.bfloat16, model_options={})
