"""The tiny architectures of ``tiny.py``: the host's configuration classes, and settings as small as they run with.

* ``SPECS``: all of them; ``NAMES``: those that every host has and every test of all models goes over.
* ``FURTHER``: more families, and some that only newer hosts have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.ops
import comfyui_version
import torch

HOST_VERSION = tuple(int(part) for part in comfyui_version.__version__.split("."))
NEWER = HOST_VERSION >= (0, 30, 0)  # these configurations carry a few more keys
TOKENS = 7


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
    state: dict[str, torch.Tensor] = field(default_factory=dict)  # of the file that the host tells the prediction by
    adjust: Callable[[Any], None] = lambda network: None  # for parts whose size no setting decides


def unet_settings(channels: int, context: int, **settings: Any) -> dict[str, Any]:
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

FULL_SD15: dict[str, Any] = {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1] * 9 + [0] * 3,
}

# what SD2's v-models have and its ε-models lack: a bias that is not small
_V_PREDICTION = {"output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.linspace(-1, 1, 8)}

_SDXL: dict[str, Any] = {
    "transformer_depth": [0, 2],
    "transformer_depth_output": [0, 0, 2, 2],
    "transformer_depth_middle": 2,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 6 * 256 + 32,  # six size numbers and the pooled text
}

_Z_IMAGE: dict[str, Any] = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 256,
    "cap_feat_dim": 64,
    "n_layers": 1,
    "qk_norm": True,
    "n_heads": 2,
    "n_kv_heads": 2,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
}

_PIXART: dict[str, Any] = {
    "image_model": "pixart_sigma",
    "num_heads": 4,
    "patch_size": 2,
    "hidden_size": 64,
    "in_channels": 4,
    "depth": 2,
    "caption_channels": 64,
    "model_max_length": 120,
    "micro_condition": False,
}

_AURA: dict[str, Any] = {
    "max_seq": 64,
    "cond_seq_dim": 64,
    "n_double_layers": 1,
    "n_layers": 2,
    "dim": 128,
    "n_heads": 1,
    "global_conddim": 128,
}

_OMNIGEN2: dict[str, Any] = {
    "image_model": "omnigen2",
    "axes_dim_rope": [16, 24, 24],
    "hidden_size": 128,
    "in_channels": 16,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "text_feat_dim": 64,
}

_ERNIE: dict[str, Any] = {
    "image_model": "ernie",
    "hidden_size": 128,
    "num_attention_heads": 1,
    "num_layers": 2,
    "ffn_hidden_size": 256,
    "in_channels": 128,
    "out_channels": 128,
    "text_in_dim": 64,
}

_KREA2: dict[str, Any] = {
    "image_model": "krea2",
    "features": 128,
    "channels": 16,
    "patch": 2,
    "layers": 2,
    "heads": 2,
    "kvheads": 1,
    "txtlayers": 2,
    "txtdim": 64,
    "txtheads": 1,
    "txtkvheads": 1,
}


def _cosmos(image_model: str, context: int) -> dict[str, Any]:
    return {
        "image_model": image_model,
        "max_img_h": 240,
        "max_img_w": 240,
        "max_frames": 128,
        "in_channels": 16,
        "out_channels": 16,
        "patch_spatial": 2,
        "patch_temporal": 1,
        "model_channels": 128,
        "num_blocks": 2,
        "num_heads": 2,
        "concat_padding_mask": True,
        "crossattn_emb_channels": context,
        "pos_emb_cls": "rope3d",
        "pos_emb_learnable": True,
        "pos_emb_interpolation": "crop",
        "min_fps": 1,
        "max_fps": 30,
        "use_adaln_lora": True,
        "adaln_lora_dim": 32,
        "extra_per_block_abs_pos_emb": False,
        "rope_h_extrapolation_ratio": 4.0,
        "rope_w_extrapolation_ratio": 4.0,
        "rope_t_extrapolation_ratio": 1.0,
        "extra_h_extrapolation_ratio": 1.0,
        "extra_w_extrapolation_ratio": 1.0,
        "extra_t_extrapolation_ratio": 1.0,
        "rope_enable_fps_modulation": False,
    }


def _small_adapter(network: Any) -> None:
    """Anima's own text model in front of it, 134 M numbers by default, in small."""
    like = network.llm_adapter.out_proj.weight
    with torch.device(like.device):
        network.llm_adapter = type(network.llm_adapter)(
            source_dim=64, target_dim=64, model_dim=64, num_layers=1, num_heads=2,
            dtype=like.dtype, operations=comfy.ops.manual_cast if network.llm_adapter.out_proj.comfy_cast_weights
            else comfy.ops.disable_weight_init,
        )


def _mask(batch: int) -> torch.Tensor:
    return torch.ones(batch, TOKENS, dtype=torch.long)


_BLOCKS = ("depth", "depth_single_blocks")

SPECS: dict[str, Spec] = {
    "sd15": Spec("SD15", unet_settings(32, 64), (4, 16, 16), 64),
    "sd2": Spec("SD20", unet_settings(64, 64, use_linear_in_transformer=True), (4, 16, 16), 64),
    "sdxl": Spec("SDXL", unet_settings(64, 64, **_SDXL), (4, 16, 16), 64, pooled=32),
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
        extra={"attention_mask": _mask},
    ),
}
NAMES = tuple(SPECS)

# further models, trained and saved by tests/host/test_families_on_models.py; the last three need a newer host
FURTHER: dict[str, Spec] = {
    "sd2_v": Spec("SD20", unet_settings(64, 64, use_linear_in_transformer=True), (4, 16, 16), 64, state=_V_PREDICTION),
    "z_image": Spec("ZImage", _Z_IMAGE, (16, 8, 8), 64, depth_keys=("n_layers",)),
    "cosmos2": Spec("CosmosT2IPredict2", _cosmos("cosmos_predict2", 64), (16, 1, 8, 8), 64, depth_keys=("num_blocks",)),
    "pixart": Spec("PixArtSigma", _PIXART, (4, 64, 64), 64, depth_keys=("depth",)),
    "aura": Spec("AuraFlow", _AURA, (4, 8, 8), 64),
    "omnigen2": Spec("Omnigen2", _OMNIGEN2, (16, 8, 8), 64, extra={"attention_mask": _mask}),
}
if NEWER:
    FURTHER |= {
        "anima": Spec(
            "Anima",
            _cosmos("anima", 64),
            (16, 1, 8, 8),
            64,
            depth_keys=("num_blocks",),
            extra={
                "t5xxl_ids": lambda batch: torch.arange(5, 5 + TOKENS),
                "t5xxl_weights": lambda batch: torch.ones(TOKENS),
            },
            adjust=_small_adapter,
        ),
        "ernie": Spec("ErnieImage", _ERNIE, (128, 4, 4), 64, depth_keys=("num_layers",)),
        "krea2": Spec("Krea2", _KREA2, (16, 1, 8, 8), 128, depth_keys=("layers",)),
    }
SPECS |= FURTHER


