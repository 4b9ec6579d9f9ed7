"""Tiny text encoders beside those of ``tiny``: what Flux, SD3 and Z-Image read, width 64, the real tokenizers; and what
tests that train them share."""

from __future__ import annotations

import dataclasses

import comfy.supported_models_base
import comfy.text_encoders.flux
import comfy.text_encoders.sd3_clip
import comfy.text_encoders.z_image
import torch

import tiny
from lora_loom.host.denoiser import Conditioning
from lora_loom.host.text_loan import text_components, trainable_clip
from lora_loom.training.loop import Batch
from lora_loom.training.settings import ComponentSettings, Plan

T5_CONFIG = {"d_model": 64, "d_kv": 32, "num_heads": 2, "d_ff": 96, "num_layers": 2}
# SD3 joins the others to a T5 of just this width; its words are those that come first in the vocabulary
SD3_T5_CONFIG = {**T5_CONFIG, "d_model": 4096, "vocab_size": 1300}
QWEN_CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,  # the last but one is read, and the host wants more than two then
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def tiny_flux_clip(seed=0, *, inference=False):
    """CLIP-L and T5."""
    host = comfy.text_encoders.flux
    target = comfy.supported_models_base.ClipTarget(host.FluxTokenizer, host.flux_clip(dtype_t5=torch.float32))
    options = {"clip_l_model_config": tiny.CLIP_CONFIG, "t5xxl_model_config": T5_CONFIG}
    return tiny._clip(target, options, seed, inference)


def tiny_sd3_clip(seed=0, *, inference=False):
    """CLIP-L, CLIP-G and T5: three encoders, context 4096 wide, pooled 128."""
    host = comfy.text_encoders.sd3_clip
    target = comfy.supported_models_base.ClipTarget(host.SD3Tokenizer, host.sd3_clip(dtype_t5=torch.float32))
    deeper = {**tiny.CLIP_CONFIG, "num_hidden_layers": 3}
    three = {"clip_l": deeper, "clip_g": deeper, "t5xxl": SD3_T5_CONFIG}
    return tiny._clip(target, {f"{name}_model_config": config for name, config in three.items()}, seed, inference)


def tiny_sd3():
    """A MODEL that takes what ``tiny_sd3_clip`` gives."""
    spec = tiny.SPECS["sd3"]
    context = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}}
    settings = {**spec.settings, "adm_in_channels": 128, "context_embedder_config": context}
    return tiny._build(dataclasses.replace(spec, settings=settings), 0, torch.float32, None, True)


def tiny_qwen_clip(seed=0, *, inference=False):
    """Qwen 3, a language model."""
    host = comfy.text_encoders.z_image
    target = comfy.supported_models_base.ClipTarget(host.ZImageTokenizer, host.te(dtype_llama=torch.float32))
    return tiny._clip(target, {"qwen3_4b_model_config": QWEN_CONFIG}, seed, inference)


CLIPS = {"sd15": tiny.tiny_clip, "sdxl": tiny.tiny_dual_clip, "flux": tiny_flux_clip, "qwen": tiny_qwen_clip}


def components_for(clip, *, rates=(), words="", rank=3, preserve=False, filled=True):
    """What learns on the text, with nothing left at zero, and the CLIP it learns on."""
    given = {f"te{number}_learning_rate": rate for number, rate in enumerate(rates, 1)}
    settings = ComponentSettings(**given, embeddings=words, preserve_embedding_norm=preserve)
    own, _ = trainable_clip(clip)
    with torch.inference_mode(False):
        components, _ = text_components(own, Plan(rank=rank, components=settings))
        draws = torch.Generator().manual_seed(5)
        for component in components:
            for adapter in component.adapters.values():
                if filled:
                    adapter.up.copy_(torch.randn(adapter.up.shape, generator=draws) * 0.3)
                for tensor in adapter.parameters():
                    tensor.requires_grad_(True)
            for tensor in component.loose.values():
                tensor.requires_grad_(True)
    return own, components


def tensors_of(components):
    """name -> what is trained."""
    found = {}
    for component in components:
        for path, adapter in component.adapters.items():
            found |= {f"{path}.{index}": tensor for index, tensor in enumerate(adapter.parameters())}
        found |= component.loose
    return found


def encoded(clip, text):
    """(context, extras) as a text node gives them."""
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0]


class TextExamples:
    """Two captions and two pictures for ever, encoded live; ``sd15`` and its CLIP."""

    def __init__(self, live, captions):
        self.live, self.captions = live, captions
        draws = torch.Generator().manual_seed(3)
        self.latents = torch.randn(len(captions), 4, 8, 8, generator=draws)

    def batch(self, position):
        items = [Conditioning(*one, (64, 64), (0, 0), (64, 64)) for one in self.live.encode(self.captions)]
        return Batch(self.latents, items)
