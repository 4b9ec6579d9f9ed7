"""Names from layouts and shapes alone; tests/host compares them with the host's own maps."""

import pytest
from torch import nn

from lora_loom.kernels.dialects import Stack, spelled
from lora_loom.kernels.dialects_text import encoder_prefixes
from lora_loom.kernels.dialects_transformers import FAMILIES, family_of
from lora_loom.kernels.dialects_unet import UNetLayout, diffusers_paths, sd_unet_layout
from lora_loom.kernels.names import DIALECTS, NameTable, Place, layer_shapes

SD1 = UNetLayout((2, 2, 2, 2), (1, 1, 1, 1, 1, 1, 0, 0), 1, (0, 0, 0, *([1] * 9)), sdxl=False)
SDXL = UNetLayout((2, 2, 2), (0, 0, 2, 2, 10, 10), 10, (10, 10, 10, 2, 2, 2, 0, 0, 0), sdxl=True)


def unet(layout):
    """A table of every layer that a UNet of this layout can have, the label embedding of SDXL included."""
    outside = () if layout.sdxl else ("label_emb.0.0", "label_emb.0.2")
    return NameTable({f"diffusion_model.{path}": (4, 4) for path in diffusers_paths(layout) if path not in outside})


def flux(hidden=8):
    table = {
        "img_in": (hidden, 4),
        "txt_in": (hidden, 4),
        "double_blocks.0.img_attn.qkv": (3 * hidden, hidden),
        "double_blocks.0.img_attn.norm.query_norm.scale": (4,),
        "single_blocks.0.linear1": (7 * hidden, hidden),
        "single_blocks.0.linear1.bias": (7 * hidden,),
        "single_blocks.0.linear2": (hidden, 5 * hidden),
        "final_layer.adaLN_modulation.1": (2 * hidden, hidden),
    }
    return NameTable({f"diffusion_model.{path}": shape for path, shape in table.items()})


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("input_blocks.0.0", "lora_unet_conv_in"),
        ("time_embed.2", "lora_unet_time_embedding_linear_2"),
        ("input_blocks.1.0.in_layers.2", "lora_unet_down_blocks_0_resnets_0_conv1"),
        ("input_blocks.1.1.proj_in", "lora_unet_down_blocks_0_attentions_0_proj_in"),
        ("input_blocks.3.0.op", "lora_unet_down_blocks_0_downsamplers_0_conv"),
        ("input_blocks.4.0.skip_connection", "lora_unet_down_blocks_1_resnets_0_conv_shortcut"),
        ("middle_block.0.in_layers.2", "lora_unet_mid_block_resnets_0_conv1"),
        (
            "middle_block.1.transformer_blocks.0.ff.net.0.proj",
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
        ),
        ("output_blocks.2.1.conv", "lora_unet_up_blocks_0_upsamplers_0_conv"),
        ("output_blocks.5.2.conv", "lora_unet_up_blocks_1_upsamplers_0_conv"),
        (
            "output_blocks.11.1.transformer_blocks.0.attn2.to_out.0",
            "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_out_0",
        ),
        ("out.2", "lora_unet_conv_out"),
    ],
)
def test_kohya_names_of_sd1(path, name):
    table = unet(SD1)
    assert table.write("diffusion_model." + path) == table.write("diffusion_model." + path, "kohya") == name
    assert table.find(name) == Place("diffusion_model." + path)


def test_sdxl_is_written_as_kohya_writes_it_and_read_in_either_spelling():
    path = "diffusion_model.input_blocks.4.1.transformer_blocks.1.attn1.to_out.0"
    name = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_out_0"
    table = unet(SDXL)
    assert table.write(path) == name
    diffusers = "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_out.0"
    assert table.write(path, "diffusers") == "unet." + diffusers
    older = "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.processor.to_out"
    for spelling in (name, path, "lora_unet_" + diffusers.replace(".", "_"), "unet." + diffusers, older):
        assert table.find(spelling) == Place(path)
        assert table.find("base_model.model." + spelling) == Place(path)
    assert table.find("lora_unet_elsewhere") is None


@pytest.mark.parametrize("layout", [SD1, SDXL])
def test_the_layout_is_read_back_and_no_two_layers_share_a_name(layout):
    assert unet(layout).layout == layout
    paths = diffusers_paths(layout)
    assert len(set(paths.values())) == len(paths)


def test_other_families_keep_the_hosts_paths():
    model = nn.Module()
    model.diffusion_model = nn.Module()
    model.diffusion_model.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])
    assert sd_unet_layout(["blocks.0.0"]) is None
    table = NameTable.of(model)
    path = "diffusion_model.blocks.0.0"
    assert table.architecture is None
    assert table.write(path) == path
    assert table.write(path, "kohya") == "lora_unet_blocks_0_0"
    for spelling in ("lora_unet_blocks_0_0", "blocks.0.0", "transformer.blocks.0.0", "lycoris_blocks_0_0"):
        assert table.find(spelling) == Place(path)
    for dialect in ("diffusers", "bfl"):
        with pytest.raises(ValueError, match=f"no name in {dialect}"):
            table.write(path, dialect)


def test_without_layers_nothing_is_found():
    assert NameTable({}).find("lora_unet_conv_in") is None


def test_fused_projections():
    table = flux()
    qkv = "diffusion_model.double_blocks.0.img_attn.qkv"
    linear1 = "diffusion_model.single_blocks.0.linear1"
    attention = "transformer.transformer_blocks.0.attn."
    assert table.parts(qkv, "diffusers") == [
        (attention + "to_q", Place(qkv, (0, 0, 8))),
        (attention + "to_k", Place(qkv, (0, 8, 8))),
        (attention + "to_v", Place(qkv, (0, 16, 8))),
    ]
    assert table.write(Place(qkv, (0, 8, 8)), "diffusers") == attention + "to_k"
    assert [place.slice for _, place in table.parts(linear1, "diffusers")] == [
        *((0, 0, 8), (0, 8, 8), (0, 16, 8)),
        (0, 24, 32),
    ]
    fused = table.find("diffusion_model.single_blocks.0.linear1_qkv")
    assert fused == table.find("single_blocks.0.processor.qkv_lora") == Place(linear1, (0, 0, 24))
    assert [name.rpartition("_")[2] for name, _ in table.parts(fused, "diffusers")] == ["q", "k", "v"]
    assert table.whole("lora_unet_single_blocks_0_linear1") == linear1
    assert table.whole("diffusion_model.single_blocks.0.linear1_qkv") is None


def test_what_a_dialect_cannot_say_is_refused():
    table = flux()
    qkv = "diffusion_model.double_blocks.0.img_attn.qkv"
    with pytest.raises(ValueError, match="but as .*to_q, .*to_k, .*to_v"):
        table.write(qkv, "diffusers")
    for dialect in ("native", "kohya", "host", "bfl"):
        with pytest.raises(ValueError, match=rf"qkv\[8:16\]: has no name in {dialect}"):
            table.write(Place(qkv, (0, 8, 8)), dialect)
    for beside in ((0, 4, 8), (0, 0, 12), (1, 0, 8)):
        with pytest.raises(ValueError, match="no name in diffusers"):
            table.write(Place(qkv, beside), "diffusers")
    with pytest.raises(ValueError, match="not a layer of this model"):
        table.write("diffusion_model.elsewhere")
    with pytest.raises(ValueError, match=f"no dialect 'latin'; choose one of {', '.join(DIALECTS)}"):
        table.write(qkv, "latin")


def test_exchanged_halves_are_said():
    table = flux()
    path = "diffusion_model.final_layer.adaLN_modulation.1"
    assert table.find("transformer.norm_out.linear") == Place(path, swapped=True)
    assert table.whole("transformer.norm_out.linear") is None
    assert table.parts(path, "diffusers") == [("transformer.norm_out.linear", Place(path, swapped=True))]
    with pytest.raises(ValueError, match="not held as it is"):
        table.write(path, "diffusers")
    assert table.write(Place(path, swapped=True), "diffusers") == "transformer.norm_out.linear"


@pytest.mark.parametrize(
    ("entry", "shape", "parts"),
    [
        ("a", (6, 2), [("x.3.a", None, False)]),
        ("~a", (6, 2), [("x.3.a", None, True)]),
        ("~2 a", (4, 2), [("x.3.a", None, True)]),
        ("~2 a", (6, 2), [("x.3.a", None, False)]),
        ("a b c", (6, 2), [("x.3.a", (0, 2), False), ("x.3.b", (2, 2), False), ("x.3.c", (4, 2), False)]),
        ("a | b c", (6, 2), [("x.3.a", (0, 2), False), ("x.3.b", (2, 2), False), ("x.3.c", (4, 2), False)]),
        ("a | b c", (10, 2), [("x.3.a", (0, 2), False), ("x.3.b", (2, 4), False), ("x.3.c", (6, 4), False)]),
        ("3*a | -", (14, 2), [("x.3.a", (0, 6), False)]),
        ("a b c", (7, 2), []),
        ("3*a | -", (6, 2), []),
        ("", (6, 2), []),
        ("*", (6, 2), [("x.3.layer", None, False)]),
    ],
)
def test_entries_of_a_table(entry, shape, parts):
    table = (Stack("blocks.#", "x.#", {"layer": entry}), Stack("", "", {"*": "*"}))
    assert spelled(table, {"blocks.3.layer": shape}) == {"blocks.3.layer": parts}


def test_families_are_told_from_all_their_marks():
    for family in FAMILIES:
        found = family_of(family.marks)
        assert found is family
        assert family_of(family.marks[1:]) is not family
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_text_encoders_are_numbered_as_trainers_number_them():
    def numbered(*encoders):
        return {name: prefixes.kohya[0] for name, prefixes in encoder_prefixes(encoders).items()}

    assert numbered("clip_l") == {"clip_l": "lora_te_"}
    assert numbered("clip_g", "clip_l") == {"clip_l": "lora_te1_", "clip_g": "lora_te2_"}
    assert numbered("t5xxl", "clip_l", "clip_g") == {
        **{"clip_l": "lora_te1_", "clip_g": "lora_te2_"},
        "t5xxl": "lora_te3_",
    }
    assert numbered("clip_l", "t5xxl") == {"clip_l": "lora_te1_", "t5xxl": "lora_te3_"}
    assert numbered("qwen3_06b") == {"qwen3_06b": "lora_te_"}
    assert numbered("clip_l", "llama") == {"clip_l": "lora_te_"}
    assert encoder_prefixes(["clip_l", "t5xxl"])["t5xxl"].diffusers == "text_encoder_2."


def test_text_encoders():
    layer = "transformer.text_model.encoder.layers.0.mlp.fc1"
    table = NameTable(
        {f"clip_l.{layer}": (4, 4), f"clip_g.{layer}": (4, 4), "clip_g.transformer.text_projection": (4, 4)}
    )
    assert table.write(f"clip_g.{layer}") == "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    assert table.write(f"clip_g.{layer}", "diffusers") == "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"
    assert table.write(f"clip_g.{layer}", "host") == f"text_encoders.clip_g.{layer}"
    for dialect in ("native", "kohya", "diffusers", "host"):
        assert table.find(table.write(f"clip_l.{layer}", dialect)) == Place(f"clip_l.{layer}")
    assert table.write("clip_g.transformer.text_projection") == "text_encoders.clip_g.transformer.text_projection"


def test_shapes_are_those_of_what_a_layer_computes():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 8, 6
            self.weight = nn.Parameter(nn.Linear(1, 24).weight.data)

    tree = nn.Module()
    tree.packed, tree.norm, tree.plain = Packed(), nn.LayerNorm(4, elementwise_affine=False), nn.Conv2d(2, 3, 1)
    tree.table = nn.Parameter(nn.Linear(2, 5).weight.data)
    assert layer_shapes(tree) == {"packed": (6, 8), "plain": (3, 2, 1, 1), "plain.bias": (3,), "table": (5, 2)}
