"""Names in all other transformers, and the list of families.

* ``FAMILIES``: every family whose layers others call by other names than the host.
* ``family_of``: the family of a model, from the paths of its layers.

Entries are explained in dialects.py.
"""

from __future__ import annotations

from collections.abc import Iterable

from .dialects import ADDED_QKV, FINAL, KEEP, QKV, Family, Stack, Table, embedder
from .dialects_flux import FLUX_FAMILIES

_SD3: Table = (
    Stack(
        "joint_blocks.#",
        "transformer_blocks.#",
        {
            "x_block.attn.qkv": QKV,
            "x_block.attn.proj": "attn.to_out.0",
            "x_block.attn.ln_q": "attn.norm_q",
            "x_block.attn.ln_k": "attn.norm_k",
            "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
            "x_block.attn2.proj": "attn2.to_out.0",
            "x_block.attn2.ln_q": "attn2.norm_q",
            "x_block.attn2.ln_k": "attn2.norm_k",
            "x_block.mlp.fc1": "ff.net.0.proj",
            "x_block.mlp.fc2": "ff.net.2",
            "x_block.adaLN_modulation.1": "norm1.linear",
            "context_block.attn.qkv": ADDED_QKV,
            "context_block.attn.proj": "attn.to_add_out",
            "context_block.attn.ln_q": "attn.norm_added_q",
            "context_block.attn.ln_k": "attn.norm_added_k",
            "context_block.mlp.fc1": "ff_context.net.0.proj",
            "context_block.mlp.fc2": "ff_context.net.2",
            "context_block.adaLN_modulation.1": "~2 norm1_context.linear",
        },
    ),
    embedder("t_embedder.mlp", "time_text_embed.timestep_embedder"),
    embedder("y_embedder.mlp", "time_text_embed.text_embedder"),
    Stack("", "", {"context_embedder": "context_embedder", "x_embedder.proj": "pos_embed.proj", **FINAL}),
)

_AURA_MLP = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
_AURA: Table = (
    *(
        Stack(f"double_layers.#.{here}", f"joint_transformer_blocks.#.{there}", _AURA_MLP)
        for here, there in (("mlpX", "ff"), ("mlpC", "ff_context"))
    ),
    Stack("single_layers.#.mlp", "single_transformer_blocks.#.ff", _AURA_MLP),
    Stack(
        "double_layers.#",
        "joint_transformer_blocks.#",
        {
            "attn.w2q": "attn.to_q",
            "attn.w2k": "attn.to_k",
            "attn.w2v": "attn.to_v",
            "attn.w2o": "attn.to_out.0",
            "attn.w1q": "attn.add_q_proj",
            "attn.w1k": "attn.add_k_proj",
            "attn.w1v": "attn.add_v_proj",
            "attn.w1o": "attn.to_add_out",
            "modX.1": "norm1.linear",
            "modC.1": "norm1_context.linear",
        },
    ),
    Stack(
        "single_layers.#",
        "single_transformer_blocks.#",
        {
            "attn.w1q": "attn.to_q",
            "attn.w1k": "attn.to_k",
            "attn.w1v": "attn.to_v",
            "attn.w1o": "attn.to_out.0",
            "modCX.1": "norm1.linear",
        },
    ),
    embedder("t_embedder.mlp", "time_step_proj"),
    Stack(
        "",
        "",
        {
            "cond_seq_linear": "context_embedder",
            "init_x_linear": "pos_embed.proj",
            "final_linear": "proj_out",
            "modF.1": "~norm_out.linear",
        },
    ),
)

_PIXART: Table = (
    Stack(
        "blocks.#",
        "transformer_blocks.#",
        {
            "attn.qkv": "attn1.to_q attn1.to_k attn1.to_v",
            "attn.proj": "attn1.to_out.0",
            "cross_attn.q_linear": "attn2.to_q",
            "cross_attn.kv_linear": "attn2.to_k attn2.to_v",
            "cross_attn.proj": "attn2.to_out.0",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
        },
    ),
    embedder("t_embedder.mlp", "adaln_single.emb.timestep_embedder"),
    embedder("csize_embedder.mlp", "adaln_single.emb.resolution_embedder"),
    embedder("ar_embedder.mlp", "adaln_single.emb.aspect_ratio_embedder"),
    Stack("y_embedder.y_proj", "caption_projection", {"fc1": "linear_1", "fc2": "linear_2"}),
    Stack(
        "",
        "",
        {"x_embedder.proj": "pos_embed.proj", "t_block.1": "adaln_single.linear", "final_layer.linear": "proj_out"},
    ),
)

_HUNYUAN_DIT: Table = (
    Stack(
        "blocks.#",
        "blocks.#",
        {
            "attn1.Wqkv": "attn1.to_q attn1.to_k attn1.to_v",
            "attn2.q_proj": "attn2.to_q",
            "attn2.kv_proj": "attn2.to_k attn2.to_v",
            **{f"attn{n}.out_proj": f"attn{n}.to_out.0" for n in (1, 2)},
            **{f"attn{n}.{x}_norm": f"attn{n}.norm_{x}" for n in (1, 2) for x in "qk"},
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
            "default_modulation.1": "norm1.linear",
            "norm1": "norm1.norm",
            "norm2": "norm3",
            "norm3": "norm2",
            "skip_linear": "skip_linear",
            "skip_norm": "skip_norm",
        },
    ),
    embedder("t_embedder.mlp", "time_extra_emb.timestep_embedder"),
    embedder("extra_embedder", "time_extra_emb.extra_embedder"),
    embedder("mlp_t5", "text_embedder"),
    Stack("pooler", "time_extra_emb.pooler", KEEP),
    Stack("", "", {"x_embedder.proj": "pos_embed.proj", "style_embedder": "time_extra_emb.style_embedder", **FINAL}),
)

_LUMINA_BLOCK = {
    "attention.qkv": "attn.to_q | attn.to_k attn.to_v",
    "attention.out": "attn.to_out.0",
    "attention.q_norm": "attn.norm_q",
    "attention.k_norm": "attn.norm_k",
    **{f"feed_forward.w{n}": f"feed_forward.linear_{n}" for n in (1, 2, 3)},
    "attention_norm1": "norm1.norm",
    "attention_norm2": "norm2",
    "adaLN_modulation.1": "norm1.linear",
    "ffn_norm1": "ffn_norm1",
    "ffn_norm2": "ffn_norm2",
}
_LUMINA2: Table = (
    *(Stack(f"{stack}.#", f"{stack}.#", _LUMINA_BLOCK) for stack in ("layers", "noise_refiner")),
    Stack("context_refiner.#", "context_refiner.#", _LUMINA_BLOCK | {"attention_norm1": "norm1"}),
    embedder("t_embedder.mlp", "time_caption_embed.timestep_embedder"),
    Stack("cap_embedder", "time_caption_embed.caption_embedder", KEEP),
    Stack(
        "",
        "",
        {
            "x_embedder": "x_embedder",
            "final_layer.adaLN_modulation.1": "norm_out.linear_1",
            "final_layer.linear": "norm_out.linear_2",
        },
    ),
)
_Z_IMAGE_BLOCK = {
    "attention.qkv": "attention.to_q | attention.to_k attention.to_v",
    "attention.out": "attention.to_out.0",
    "attention.q_norm": "attention.norm_q",
    "attention.k_norm": "attention.norm_k",
    **KEEP,
}
_Z_IMAGE: Table = (
    *(Stack(f"{stack}.#", f"{stack}.#", _Z_IMAGE_BLOCK) for stack in ("layers", "noise_refiner", "context_refiner")),
    Stack("final_layer", "all_final_layer.2-1", KEEP),
    Stack("", "", {"x_embedder": "all_x_embedder.2-1", "norm_final": "", **KEEP}),
)

_MOCHI: Table = (
    Stack("", "", {"blocks.47.mod_y": "transformer_blocks.47.norm1_context.linear_1"}),  # the last, of another kind
    Stack(
        "blocks.#",
        "transformer_blocks.#",
        {
            "attn.qkv_x": "attn1.to_q attn1.to_k attn1.to_v",
            "attn.qkv_y": "attn1.add_q_proj attn1.add_k_proj attn1.add_v_proj",
            "attn.proj_x": "attn1.to_out.0",
            "attn.proj_y": "attn1.to_add_out",
            "attn.q_norm_x": "attn1.norm_q",
            "attn.k_norm_x": "attn1.norm_k",
            "attn.q_norm_y": "attn1.norm_added_q",
            "attn.k_norm_y": "attn1.norm_added_k",
            "mlp_x.w1": "~ff.net.0.proj",
            "mlp_x.w2": "ff.net.2",
            "mlp_y.w1": "~ff_context.net.0.proj",
            "mlp_y.w2": "ff_context.net.2",
            "mod_x": "norm1.linear",
            "mod_y": "norm1_context.linear",
        },
    ),
    embedder("t_embedder.mlp", "time_embed.timestep_embedder"),
    Stack("t5_y_embedder", "time_embed.pooler", KEEP),
    Stack(
        "",
        "",
        {
            "x_embedder.proj": "patch_embed.proj",
            "t5_yproj": "time_embed.caption_proj",
            "final_layer.mod": "~norm_out.linear",
            "final_layer.linear": "proj_out",
        },
    ),
)

_WAN_BLOCK = {
    **{
        f"{here}.{leaf}": f"{there}.{other}"
        for here, there in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for leaf, other in (
            *(("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), ("norm_q", "norm_q")),
            *(("norm_k", "norm_k"), ("k_img", "add_k_proj"), ("v_img", "add_v_proj"), ("norm_k_img", "norm_added_k")),
        )
    },
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm3": "norm2",
    "before_proj": "proj_in",
    "after_proj": "proj_out",
}
_WAN: Table = (
    *(Stack(f"{stack}.#", f"{stack}.#", _WAN_BLOCK) for stack in ("blocks", "vace_blocks")),
    embedder("time_embedding", "condition_embedder.time_embedder"),
    embedder("text_embedding", "condition_embedder.text_embedder"),
    Stack(
        "img_emb.proj",
        "condition_embedder.image_embedder",
        {"0": "norm1", "1": "ff.net.0.proj", "3": "ff.net.2", "4": "norm2"},
    ),
    Stack(
        "",
        "",
        {
            "time_projection.1": "condition_embedder.time_proj",
            "patch_embedding": "patch_embedding",
            "vace_patch_embedding": "vace_patch_embedding",
            "head.head": "proj_out",
        },
    ),
)

_LTX_NORMS = {
    f"{attention}.{x}_norm": f"{attention}.norm_{x}"
    for attention in ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
    for x in "qk"
}
_LTX_BLOCKS = Stack("transformer_blocks.#", "transformer_blocks.#", _LTX_NORMS | KEEP)
_LTXV: Table = (
    _LTX_BLOCKS,
    Stack("adaln_single", "time_embed", KEEP),
    Stack("", "", {"patchify_proj": "proj_in", **KEEP}),
)
_LTXAV: Table = (
    _LTX_BLOCKS,
    Stack("adaln_single", "time_embed", KEEP),
    Stack("audio_adaln_single", "audio_time_embed", KEEP),
    Stack("av_ca_video_scale_shift_adaln_single", "av_cross_attn_video_scale_shift", KEEP),
    Stack("av_ca_audio_scale_shift_adaln_single", "av_cross_attn_audio_scale_shift", KEEP),
    Stack("av_ca_a2v_gate_adaln_single", "av_cross_attn_video_a2v_gate", KEEP),
    Stack("av_ca_v2a_gate_adaln_single", "av_cross_attn_audio_v2a_gate", KEEP),
    Stack("video_embeddings_connector", "", {"*": ""}),  # another model of diffusers' pipeline
    Stack("audio_embeddings_connector", "", {"*": ""}),
    Stack("", "", {"patchify_proj": "proj_in", "audio_patchify_proj": "audio_proj_in", **KEEP}),
)

_COSMOS_OUTSIDE = (
    Stack("t_embedder.1", "time_embed.t_embedder", KEEP),
    Stack(
        "",
        "",
        {
            "x_embedder.proj.1": "patch_embed.proj",
            "final_layer.linear": "proj_out",
            **{
                f"final_layer.{ada}_modulation.{n}": f"norm_out.linear_{n}"
                for ada in ("adaln", "adaLN")
                for n in (1, 2)
            },
            "affline_norm": "time_embed.norm",
            "t_embedding_norm": "time_embed.norm",
        },
    ),
)
_COSMOS1: Table = (
    *(
        Stack(
            f"blocks.block#.blocks.{n}.block.attn",
            f"transformer_blocks.#.attn{n + 1}",
            {f"to_{x}.0": f"to_{x}" for x in "qkv"} | {f"to_{x}.1": f"norm_{x}" for x in "qk"} | KEEP,
        )
        for n in (0, 1)
    ),
    Stack("blocks.block#.blocks.2.block", "transformer_blocks.#.ff", {"layer1": "net.0.proj", "layer2": "net.2"}),
    *(
        Stack(
            f"blocks.block#.blocks.{n}.adaLN_modulation",
            f"transformer_blocks.#.norm{n + 1}",
            {"1": "linear_1", "2": "linear_2"},
        )
        for n in (0, 1, 2)
    ),
    *_COSMOS_OUTSIDE,
)
_COSMOS2: Table = (
    Stack(
        "blocks.#",
        "transformer_blocks.#",
        {
            **{
                f"{here}.{leaf}": f"{there}.{other}"
                for here, there in (("self_attn", "attn1"), ("cross_attn", "attn2"))
                for leaf, other in (
                    *(("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("output_proj", "to_out.0")),
                    *(("q_norm", "norm_q"), ("k_norm", "norm_k")),
                )
            },
            **{
                f"adaln_modulation_{part}.{n}": f"norm{place}.linear_{n}"
                for place, part in enumerate(("self_attn", "cross_attn", "mlp"), start=1)
                for n in (1, 2)
            },
            "mlp.layer1": "ff.net.0.proj",
            "mlp.layer2": "ff.net.2",
        },
    ),
    *_COSMOS_OUTSIDE,
)
_ANIMA: Table = (Stack("llm_adapter", "text_conditioner", KEEP), *_COSMOS2)

_KREA_BLOCK = {
    **{f"attn.w{x}": f"attn.to_{x}" for x in "qkv"},
    "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate",
    "attn.qknorm.qnorm": "attn.norm_q",
    "attn.qknorm.knorm": "attn.norm_k",
    "mlp.gate": "ff.gate",
    "mlp.up": "ff.up",
    "mlp.down": "ff.down",
    "prenorm": "norm1",
    "postnorm": "norm2",
}
_KREA_STACKS = (
    ("blocks.#", "transformer_blocks.#"),
    ("txtfusion.layerwise_blocks.#", "text_fusion.layerwise_blocks.#"),
    ("txtfusion.refiner_blocks.#", "text_fusion.refiner_blocks.#"),
)
_KREA2: Table = (
    *(Stack(here, there, _KREA_BLOCK) for here, there in _KREA_STACKS),
    embedder("tmlp", "time_embed"),
    Stack("txtmlp", "txt_in", {"0": "norm", "1": "linear_1", "3": "linear_2"}),
    Stack(
        "",
        "",
        {
            "first": "img_in",
            "tproj.1": "time_mod_proj",
            "txtfusion.projector": "text_fusion.projector",
            "last.linear": "final_layer.linear",
            "last.norm": "final_layer.norm",
        },
    ),
)
_KREA2_SHORT: Table = tuple(Stack(here, there, {"attn.wo": "attn.to_out"}) for here, there in _KREA_STACKS)

_ACE15_ATTENTION = {
    f"{attention}.{here}": f"{attention}.{there}"
    for attention in ("self_attn", "cross_attn")
    for here, there in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("o_proj", "to_out.0"))
}
_ACE15: Table = (Stack("decoder.layers.#", "layers.#", _ACE15_ATTENTION | KEEP), Stack("decoder", "", KEEP))
_DECODER: Table = (Stack("decoder", "", KEEP),)
_SAME: Table = (Stack("", "", KEEP),)

FAMILIES = (
    *FLUX_FAMILIES,
    Family("sd3", ("joint_blocks.0.x_block.attn.qkv",), _SD3),
    Family("auraflow", ("double_layers.0.attn.w1q",), _AURA),
    Family("hunyuan_dit", ("mlp_t5.0", "blocks.0.attn1.Wqkv"), _HUNYUAN_DIT),
    Family("pixart", ("t_block.1", "blocks.0.cross_attn.kv_linear"), _PIXART),
    Family("z_image", ("cap_embedder.1", "layers.0.attention.qkv", "layers.0.adaLN_modulation.0"), _Z_IMAGE),
    Family("lumina2", ("cap_embedder.1", "layers.0.attention.qkv"), _LUMINA2, (_Z_IMAGE,)),
    Family("mochi", ("t5_yproj", "blocks.0.attn.qkv_x"), _MOCHI),
    Family("wan", ("head.head", "blocks.0.self_attn.q", "blocks.0.ffn.0"), _WAN),
    Family("ltxav", ("audio_patchify_proj", "transformer_blocks.0.attn1.to_q"), _LTXAV),
    Family("ltxv", ("patchify_proj", "transformer_blocks.0.attn1.to_q"), _LTXV),
    Family("cosmos1", ("blocks.block0.blocks.0.block.attn.to_q.0",), _COSMOS1),
    Family("anima", ("llm_adapter.out_proj", "blocks.0.mlp.layer1"), _ANIMA),
    Family("cosmos2", ("blocks.0.mlp.layer1", "blocks.0.self_attn.q_proj"), _COSMOS2),
    Family("qwen_image", ("txt_norm", "transformer_blocks.0.img_mod.1"), _SAME),
    Family("hidream", ("double_stream_blocks.0.block.attn1.to_q",), _SAME),
    Family("omnigen2", ("ref_image_refiner.0.attn.to_q", "layers.0.attn.to_q"), _SAME),
    Family("ace_step", ("genre_embedder", "transformer_blocks.0.cross_attn.to_q"), _SAME),
    Family("ace_step15", ("decoder.layers.0.self_attn.q_proj", "encoder.lyric_encoder.norm"), _ACE15, (_DECODER,)),
    Family("kandinsky5", ("visual_transformer_blocks.0.cross_attention.to_query",), _SAME),
    Family("ernie_image", ("layers.0.mlp.linear_fc2", "layers.0.self_attention.to_q"), _SAME),
    Family("krea2", ("txtfusion.projector", "blocks.0.attn.wq"), _KREA2, (_KREA2_SHORT,)),
    Family("cascade_c", ("clip_txt_mapper", "clf.1"), kohya="lora_prior_unet_"),
    Family("cascade_b", ("clip_mapper", "clf.1")),
)


def family_of(layers: Iterable[str]) -> Family | None:
    """The first family all of whose marks are among ``layers``, the paths without "diffusion_model."."""
    present = {path.removesuffix(".scale") for path in layers}
    return next((family for family in FAMILIES if present.issuperset(family.marks)), None)
