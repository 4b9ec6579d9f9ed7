"""Which base model an adapter file was made for, told from its names, its shapes and its metadata.

* ``guess``: (architecture, what speaks for it), or (None, …) where nothing does.
* ``same_base``: whether a guess can be the model that a ``NameTable`` describes.
* ``local``: a layer's name in a file without the prefix of the component it belongs to.

Architectures are called as the families in ``dialects_transformers``; SD1, SD2 and SDXL are "sd1", "sd2" and "sdxl",
and "sd" where nothing tells which of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from .lora import DOWN

_COMPONENTS = re.compile(
    r"(?:base_model[._]model[._])?(?:model[._]diffusion_model[._]|diffusion_model[._]"
    r"|(?:lora|lycoris|oft)_(?:prior_)?(?:unet|transformer)_{1,2}|lycoris_|transformer\.|unet\.|prior\.)?"
    r"(?:base_model[._]model[._])?"
)
_TEXT = re.compile(
    r"(?:base_model\.model\.)?(?:text_encoders?(?:_\d)?\.|(?:lora|lycoris)_te\d?_|lora_prior_te_|te\d?\."
    r"|(?:clip_[lgh]|t5(?:xxl)?)\.|(?:text_model|lycoris_text_model)[._])"
)
# The first whose pattern is found among the names decides. Names come without prefix, with "_" for ".".
_NAMES: tuple[tuple[str, str], ...] = (
    ("chroma", r"distilled_guidance_layer_"),
    ("flux2", r"(?:double|single)_stream_modulation|single_transformer_blocks_\d+_attn_to_qkv_mlp_proj"),
    ("flux2", r"transformer_blocks_\d+_ff(?:_context)?_linear_(?:in|out)$"),
    ("qwen_image", r"transformer_blocks_\d+_(?:img|txt)_(?:mod|mlp)_"),
    ("hidream", r"(?:double|single)_stream_blocks_\d+_block_"),
    ("hunyuan_video", r"(?:txt_in_individual|context_embedder)_token_refiner|double_blocks_\d+_(?:img|txt)_mlp_fc"),
    ("hunyuan_video", r"double_blocks_19_|single_blocks_3[89]_"),  # one more than Flux has
    ("flux", r"double_blocks_\d+_(?:img|txt|processor)_|single_blocks_\d+_(?:linear[12]|modulation|processor)"),
    ("flux", r"single_transformer_blocks_\d+_"),
    ("sd3", r"joint_blocks_\d+_|transformer_blocks_\d+_attn_add_[qkv]_proj"),
    ("auraflow", r"(?:double|single)_layers_\d+_|joint_transformer_blocks_"),
    ("mochi", r"blocks_\d+_attn_(?:qkv|proj)_[xy]"),
    ("hunyuan_dit", r"blocks_\d+_(?:attn1_Wqkv|attn2_kv_proj|default_modulation)"),
    ("pixart", r"blocks_\d+_cross_attn_kv_linear|adaln_single_emb_resolution"),
    ("wan", r"blocks_\d+_(?:self|cross)_attn_(?:[qkvo]|[kv]_img)$|blocks_\d+_ffn_(?:0|2|net_)"),
    ("anima", r"llm_adapter_"),
    ("cosmos2", r"blocks_\d+_(?:(?:self|cross)_attn_(?:[qkv]|output)_proj|mlp_layer[12]|adaln_modulation)"),
    ("cosmos1", r"blocks_block\d+_"),
    ("z_image", r"context_refiner_\d+_attention_to_|(?:layers|noise_refiner)_\d+_attention_to_"),
    ("lumina2", r"(?:layers|noise_refiner|context_refiner)_\d+_(?:attention|feed_forward|adaLN)"),
    ("cascade_c", r"(?:down|up)_blocks_\d+_\d+_(?:attention|mapper|channelwise|kv_mapper)"),
    ("sd", r"(?:down|up)_blocks_\d+_(?:attentions|resnets|(?:down|up)samplers)_|mid_block_(?:attentions|resnets)_"),
    ("sd", r"(?:input|output)_blocks_\d+_\d+|middle_block_\d+|time_embed_\d|label_emb_\d"),
    ("ltxv", r"transformer_blocks_\d+_attn[12]_to_"),
)
_COMPILED = [(architecture, re.compile(pattern)) for architecture, pattern in _NAMES]
_CONTEXTS = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl_refiner"}  # what cross-attention takes in
_METADATA = (  # key, beginning of its value, architecture
    *(("modelspec.architecture", value, kind) for value, kind in (
        ("stable-diffusion-v1", "sd1"), ("stable-diffusion-v2", "sd2"), ("stable-diffusion-xl", "sdxl"),
        ("stable-diffusion-3", "sd3"), ("flux-1", "flux"), ("flux-2", "flux2"), ("chroma", "chroma"),
        ("hunyuan-video", "hunyuan_video"), ("wan", "wan"), ("qwen-image", "qwen_image"), ("lumina-2", "lumina2"),
        ("z-image", "z_image"), ("auraflow", "auraflow"), ("hidream", "hidream"),
    )),
    *(("ss_base_model_version", value, kind) for value, kind in (
        ("sdxl", "sdxl"), ("sd_v1", "sd1"), ("sd_v2", "sd2"), ("sd3", "sd3"), ("flux1", "flux"), ("flux2", "flux2"),
        ("chroma", "chroma"), ("hunyuan_video", "hunyuan_video"), ("wan", "wan"), ("qwen", "qwen_image"),
        ("lumina2", "lumina2"), ("z_image", "z_image"),
    )),
)  # fmt: skip
_UNETS = {"sd1", "sd2", "sdxl", "sdxl_refiner"}
_STREAMS = {"flux2", "chroma", "hunyuan_video", "hunyuan_video15", "hunyuan_image"}
_ALSO = {  # guess -> what it may be as well, as long as none of the layers that it alone has are in the file
    "sd": _UNETS,
    "sd1": {"sd"},
    "sd2": {"sd"},
    "sdxl": {"sdxl_refiner"},
    "flux": _STREAMS | {"auraflow"},
    "sd3": _STREAMS | {"flux", "qwen_image"},
    "hunyuan_video": {"hunyuan_video15", "hunyuan_image"},
    "ltxv": {"ltxav", "pixart", "mochi", "cosmos1", "cosmos2", "anima", "sd3"},
    "cosmos2": {"anima"},
    "lumina2": {"z_image", "omnigen2"},
    "z_image": {"lumina2"},
    "cascade_c": {"cascade_b"},
}


def local(name: str) -> str:
    """The name without prefix, flat: "transformer.single_transformer_blocks.0.attn.to_q" → "single_transformer_…"."""
    return _COMPONENTS.sub("", name, count=1).replace(".", "_")


def has_prefix(name: str) -> bool:
    """Whether the name begins like those of some trainer, for a diffusion model."""
    match = _COMPONENTS.match(name)
    return bool(match and match.end())


def known(name: str) -> bool:
    """Whether some architecture has a layer called so."""
    short = local(name)
    return any(pattern.match(short) for _, pattern in _COMPILED)


def in_text_encoder(name: str) -> bool:
    return bool(encoder_prefix(name))


def encoder_prefix(name: str) -> str:
    """What stands before a layer of a text encoder and says which one it is; empty for all other names."""
    match = _TEXT.match(name)
    return match.group() if match else ""


def guess(layers: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, str]) -> tuple[str | None, str]:
    """From layer name -> part -> tensor. Names weigh more than metadata, which converters copy along."""
    told, said = _from_metadata(metadata)
    flat = {local(name): name for name in layers if not in_text_encoder(name)}
    for architecture, pattern in _COMPILED:
        found = next((short for short in flat if pattern.match(short)), None)
        if found is None:
            continue
        evidence = f"it has a layer called {flat[found][:100]!r}"
        if architecture == "sd":
            architecture, further = _which_sd({short: layers[name] for short, name in flat.items()}, told)
            evidence += f", {further}"
        if told and told in _ALSO.get(architecture, ()):
            return told, f"{evidence}, and {said}"
        if told and told != architecture:
            evidence += f"; {said} all the same"
        return architecture, evidence
    return told, said or "no name and no metadata of it is known"


def same_base(guessed: str | None, table: str | None) -> bool:
    """False only where both are known and differ. Tables call SD1 and SD2 "sd"."""
    return not guessed or not table or guessed == table or table in _ALSO.get(guessed, ())


def _from_metadata(metadata: Mapping[str, str]) -> tuple[str | None, str]:
    for key, beginning, architecture in _METADATA:
        value = metadata.get(key, "")
        if value.lower().startswith(beginning):
            return architecture, f"{key} says {value[:60]!r}"
    return None, ""


def _which_sd(layers: Mapping[str, Mapping[str, Tensor]], told: str | None) -> tuple[str, str]:
    for name, parts in layers.items():
        if "attn2_to_k" in name and DOWN in parts and parts[DOWN].ndim > 1:
            width = parts[DOWN].shape[1]
            if width in _CONTEXTS:
                return _CONTEXTS[width], f"and its cross-attention takes {width} numbers per token"
    deep = next((name for name in layers if re.search(r"_transformer_blocks_[1-9]", name)), None)
    if deep:
        return "sdxl", "and transformers of several blocks as only SDXL has them"
    if told in _UNETS:
        return told, "as SD1, SD2 and SDXL have it, and the metadata tells which"
    return "sd", "as SD1, SD2 and SDXL have it; which, nothing tells"
