"""Names in models of double and single streams: Flux and its kin, and Hunyuan's video and image models.

Entries are explained in dialects.py.
"""

from __future__ import annotations

from .dialects import ADDED_QKV, FINAL, KEEP, QKV, Family, Stack, Table, embedder

_FLUX_STREAMS = {
    "img_attn.qkv": QKV,
    "img_attn.proj": "attn.to_out.0",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "img_mod.lin": "norm1.linear",
    "txt_attn.qkv": ADDED_QKV,
    "txt_attn.proj": "attn.to_add_out",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "txt_mod.lin": "norm1_context.linear",
}
_NET = {
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_GATED = {
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k", "modulation.lin": "norm.linear"}
_SINGLE = {
    **_SINGLE_NORMS,
    "linear1": "attn.to_q attn.to_k attn.to_v | proj_mlp",
    "linear2": "proj_out",
}
_DOUBLE_BLOCKS = Stack("double_blocks.#", "transformer_blocks.#", _FLUX_STREAMS | _NET)
_SINGLE_BLOCKS = Stack("single_blocks.#", "single_transformer_blocks.#", _SINGLE)
_FLUX_OUTSIDE = {"img_in": "x_embedder", "txt_in": "context_embedder", **FINAL}
_FLUX: Table = (
    _DOUBLE_BLOCKS,
    _SINGLE_BLOCKS,
    embedder("time_in", "time_text_embed.timestep_embedder"),
    embedder("vector_in", "time_text_embed.text_embedder"),
    embedder("guidance_in", "time_text_embed.guidance_embedder"),
    Stack("", "", _FLUX_OUTSIDE),
)
_FLUX2: Table = (
    Stack("double_blocks.#", "transformer_blocks.#", _FLUX_STREAMS | _GATED),
    Stack(
        "single_blocks.#",
        "single_transformer_blocks.#",
        _SINGLE_NORMS | {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"},
    ),
    embedder("time_in", "time_guidance_embed.timestep_embedder"),
    embedder("guidance_in", "time_guidance_embed.guidance_embedder"),
    Stack("double_stream_modulation_img", "double_stream_modulation_img", {"lin": "linear"}),
    Stack("double_stream_modulation_txt", "double_stream_modulation_txt", {"lin": "linear"}),
    Stack("single_stream_modulation", "single_stream_modulation", {"lin": "linear"}),
    Stack("", "", _FLUX_OUTSIDE),
)
_CHROMA: Table = (
    embedder("distilled_guidance_layer.layers.#", "distilled_guidance_layer.layers.#"),
    Stack("distilled_guidance_layer", "distilled_guidance_layer", KEEP),
    *_FLUX,
)
_QKV_OF_SINGLE: Table = (Stack("single_blocks.#", "single_blocks.#", {"linear1": "3*linear1_qkv | -"}),)
_PROCESSORS: Table = (  # XLabs
    Stack(
        "double_blocks.#",
        "double_blocks.#.processor",
        {
            "img_attn.qkv": "qkv_lora1",
            "img_attn.proj": "proj_lora1",
            "txt_attn.qkv": "qkv_lora2",
            "txt_attn.proj": "proj_lora2",
        },
    ),
    Stack("single_blocks.#", "single_blocks.#.processor", {"linear1": "3*qkv_lora | -", "linear2": "proj_lora"}),
)
_SHORT_PROCESSORS: Table = (  # the same where "_lora" was read as the beginning of the adapter's own key
    Stack("single_blocks.#", "single_blocks.#.processor", {"linear1": "3*qkv | -", "linear2": "proj"}),
)
_FLUX_FILES = (_QKV_OF_SINGLE, _PROCESSORS, _SHORT_PROCESSORS)

_REFINER_BLOCK = {
    "self_attn.qkv": QKV,
    "self_attn.proj": "attn.to_out.0",
    "mlp.0": "ff.net.0.proj",
    "mlp.2": "ff.net.2",
    "adaLN_modulation.1": "norm_out.linear",
    "norm1": "norm1",
    "norm2": "norm2",
}
_HUNYUAN_BLOCKS: Table = (
    _DOUBLE_BLOCKS,
    _SINGLE_BLOCKS,
    Stack(
        "txt_in.individual_token_refiner.blocks.#", "context_embedder.token_refiner.refiner_blocks.#", _REFINER_BLOCK
    ),
    embedder("txt_in.t_embedder", "context_embedder.time_text_embed.timestep_embedder"),
    embedder("txt_in.c_embedder", "context_embedder.time_text_embed.text_embedder"),
    Stack(
        "byt5_in",
        "context_embedder_2",
        {"layernorm": "norm", "fc1": "linear_1", "fc2": "linear_2", "fc3": "linear_3"},
    ),
    Stack("", "", {"img_in.proj": "x_embedder.proj", "txt_in.input_embedder": "context_embedder.proj_in", **FINAL}),
)
_HUNYUAN_VIDEO: Table = (*_FLUX[2:5], *_HUNYUAN_BLOCKS)
_HUNYUAN_VIDEO15: Table = (
    embedder("time_in", "time_embed.timestep_embedder"),
    embedder("time_r_in", "time_embed.timestep_embedder_r"),
    Stack("vision_in.proj", "image_embedder", {"0": "norm_in", "1": "linear_1", "3": "linear_2", "4": "norm_out"}),
    Stack("", "", {"cond_type_embedding": "cond_type_embed"}),
    *_HUNYUAN_BLOCKS,
)
_HUNYUAN_IMAGE: Table = (
    embedder("time_in", "time_guidance_embed.timestep_embedder"),
    embedder("time_r_in", "time_guidance_embed.timestep_embedder_r"),
    embedder("guidance_in", "time_guidance_embed.guidance_embedder"),
    *_HUNYUAN_BLOCKS,
)
_TENCENT_MLP = {"mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
_TENCENT: Table = (  # the authors' own names, in the files of musubi-tuner and diffusion-pipe
    Stack(
        "double_blocks.#",
        "double_blocks.#",
        {
            f"{stream}_{here}": f"{stream}_{there}"
            for stream in ("img", "txt")
            for here, there in (
                *(("mod.lin", "mod.linear"), ("attn.qkv", "attn_qkv"), ("attn.proj", "attn_proj")),
                *(("attn.norm.query_norm", "attn_q_norm"), ("attn.norm.key_norm", "attn_k_norm")),
                *_TENCENT_MLP.items(),
            )
        },
    ),
    Stack("single_blocks.#", "single_blocks.#", {"modulation.lin": "modulation.linear"}),
    Stack(
        "txt_in.individual_token_refiner.blocks.#",
        "txt_in.individual_token_refiner.blocks.#",
        {"self_attn.qkv": "self_attn_qkv", "self_attn.proj": "self_attn_proj", **_TENCENT_MLP},
    ),
    Stack("txt_in.t_embedder", "txt_in.t_embedder.mlp", {"in_layer": "0", "out_layer": "2"}),
    Stack("txt_in.c_embedder", "txt_in.c_embedder", {"in_layer": "linear_1", "out_layer": "linear_2"}),
    *(Stack(name, f"{name}.mlp", {"in_layer": "0", "out_layer": "2"}) for name in ("time_in", "guidance_in")),
)


FLUX_FAMILIES = (
    Family(
        "flux2", ("double_stream_modulation_img.lin", "single_blocks.0.linear1"), _FLUX2, (_FLUX, *_FLUX_FILES), True
    ),
    Family(
        "chroma",
        ("distilled_guidance_layer.in_proj", "double_blocks.0.img_attn.qkv"),
        _CHROMA,
        (_FLUX2, *_FLUX_FILES),
        True,
    ),
    Family(
        "hunyuan_video15",
        ("txt_in.input_embedder", "vision_in.proj.0", "double_blocks.0.img_attn.qkv"),
        _HUNYUAN_VIDEO15,
        (_TENCENT,),
    ),
    Family(
        "hunyuan_video",
        ("txt_in.input_embedder", "vector_in.in_layer", "double_blocks.0.img_attn.qkv"),
        _HUNYUAN_VIDEO,
        (_TENCENT,),
    ),
    Family(
        "hunyuan_image",
        ("txt_in.input_embedder", "double_blocks.0.img_attn.qkv"),
        _HUNYUAN_IMAGE,
        (_TENCENT,),
    ),
    Family("flux", ("img_in", "txt_in", "double_blocks.0.img_attn.qkv"), _FLUX, (_FLUX2, *_FLUX_FILES), True),
)
