"""Kinds and presets by name, on small hand-made trees."""

import pytest
from torch import nn

from lora_loom.kernels.layers import PRESETS, kind_of, select_targets


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q", "attention"),
        ("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_out.0", "attention"),
        ("diffusion_model.input_blocks.1.1.transformer_blocks.0.ff.net.0.proj", "mlp"),
        ("diffusion_model.input_blocks.1.1.proj_in", "other"),
        ("diffusion_model.input_blocks.1.0.in_layers.2", "other"),
        ("diffusion_model.joint_blocks.3.context_block.attn.qkv", "attention"),
        ("diffusion_model.joint_blocks.3.x_block.mlp.fc1", "mlp"),
        ("diffusion_model.joint_blocks.3.x_block.adaLN_modulation.1", "other"),
        ("diffusion_model.double_blocks.0.img_attn.proj", "attention"),
        ("diffusion_model.double_blocks.0.img_attn.norm.query_norm", "other"),
        ("diffusion_model.double_blocks.0.txt_mlp.2", "mlp"),
        ("diffusion_model.double_blocks.0.img_mod.lin", "other"),
        ("diffusion_model.single_blocks.7.linear1", "attention"),
        ("diffusion_model.single_blocks.7.linear2", "attention"),
        ("diffusion_model.single_blocks.7.modulation.lin", "other"),
        ("diffusion_model.layers.0.attention.out", "attention"),
        ("diffusion_model.layers.0.feed_forward.w3", "mlp"),
        ("diffusion_model.blocks.0.cross_attn.k_img", "attention"),
        ("diffusion_model.blocks.0.ffn.0", "mlp"),
        ("diffusion_model.blocks.0.adaln_modulation_self_attn.1", "other"),
        ("diffusion_model.blocks.0.adaln_modulation_mlp.2", "other"),
        ("diffusion_model.double_layers.0.mlpC.c_fc1", "mlp"),
        ("diffusion_model.double_layers.0.modX.1", "other"),
        ("diffusion_model.noise_refiner.0.norm1.linear", "other"),
        ("diffusion_model.final_layer.linear", "other"),
    ],
)
def test_kind_of(path, kind):
    assert kind_of(path) == kind


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj_in = nn.Conv2d(8, 8, 1)
        block = nn.Module()
        block.attn1 = nn.Module()
        block.attn1.to_q = nn.Linear(8, 8)
        block.ff = nn.Linear(8, 16)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = nn.Conv2d(8, 8, 1)


def small_unet():
    model = nn.Module()
    model.embed = nn.Linear(4, 8)
    resnet = nn.Module()
    resnet.conv = nn.Conv2d(8, 8, 3)
    resnet.depthwise = nn.Conv2d(8, 8, 3, groups=8)
    resnet.up = nn.ConvTranspose2d(8, 8, 2)
    resnet.proj_out = nn.Linear(8, 8)  # not beside transformer blocks
    model.input_blocks = nn.ModuleList([nn.Sequential(resnet, Transformer())])
    return model


def chosen(preset, conv=False):
    return [target.path.removeprefix("input_blocks.0.") for target in select_targets(small_unet(), preset, conv)]


def test_presets():
    attention = "1.transformer_blocks.0.attn1.to_q"
    assert chosen("attention") == [attention]
    assert chosen("attention+MLP") == ["1.proj_in", attention, "1.transformer_blocks.0.ff", "1.proj_out"]
    everything = ["embed", "0.conv", "0.proj_out", "1.proj_in", attention, "1.transformer_blocks.0.ff", "1.proj_out"]
    assert chosen("full", conv=True) == everything
    assert chosen("full") == [path for path in everything if path != "0.conv"]


def test_targets_say_what_they_are():
    targets = {target.path: target for target in select_targets(small_unet(), "full", conv=True)}
    conv = targets["input_blocks.0.0.conv"]
    assert (conv.kind, conv.shape, conv.block) == ("conv", (8, 8, 3, 3), "input_blocks.0")
    embed = targets["embed"]
    assert (embed.kind, embed.shape, embed.block) == ("linear", (8, 4), None)


def test_layers_that_are_no_torch_layers_count_by_their_attributes():
    packed = nn.Module()
    packed.in_features, packed.out_features, packed.weight = 6, 10, "packed elsewhere"
    block = nn.Module()
    block.attn = packed
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Sequential(block)])
    (target,) = select_targets(model, "full", conv=False)
    assert (target.path, target.shape) == ("blocks.0.0.attn", (10, 6))


def test_nothing_matched_names_the_preset_and_what_there_is():
    model = nn.Module()
    model.embed = nn.Linear(2, 2)
    model.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])
    with pytest.raises(ValueError, match=r"'attention' matches no layer .* 1 × outside the blocks, 1 × other"):
        select_targets(model, "attention", conv=False)


def test_unknown_preset_lists_the_presets():
    with pytest.raises(ValueError, match="'atention'.*attention, attention\\+MLP, full"):
        select_targets(small_unet(), "atention", conv=False)
    assert all(preset.name == name and preset.description for name, preset in PRESETS.items())
