"""Names from layouts alone; tests/host compares them with the host's own maps."""

import pytest
from torch import nn

from lora_loom.kernels.names import NameTable, UNetLayout, diffusers_paths, kohya_name, sd_unet_layout

SD1 = UNetLayout((2, 2, 2, 2), (1, 1, 1, 1, 1, 1, 0, 0), 1, (0, 0, 0, *([1] * 9)), sdxl=False)
SDXL = UNetLayout((2, 2, 2), (0, 0, 2, 2, 10, 10), 10, (10, 10, 10, 2, 2, 2, 0, 0, 0), sdxl=True)


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
    assert kohya_name("diffusion_model." + path, SD1) == name
    table = NameTable(["diffusion_model." + path], SD1)
    assert table.write("diffusion_model." + path) == name
    assert table.find(name) == "diffusion_model." + path


def test_sdxl_is_written_as_kohya_writes_it_and_read_in_either_spelling():
    path = "diffusion_model.input_blocks.4.1.transformer_blocks.1.attn1.to_out.0"
    name = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_out_0"
    table = NameTable([path], SDXL)
    assert kohya_name(path, SDXL) == table.write(path) == name
    diffusers = "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_out.0"
    older = "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.processor.to_out"
    for spelling in (name, path, "lora_unet_" + diffusers.replace(".", "_"), "unet." + diffusers, older):
        assert table.find(spelling) == path
    assert table.find("lora_unet_elsewhere") is None


def test_no_two_layers_share_a_name():
    for layout in (SD1, SDXL):
        table = diffusers_paths(layout)
        assert len(set(table.values())) == len(table)


def test_a_path_of_another_model_has_no_kohya_name():
    with pytest.raises(ValueError, match="double_blocks"):
        kohya_name("diffusion_model.double_blocks.0.img_attn.qkv", SD1)


def test_other_families_keep_the_hosts_paths():
    model = nn.Module()
    model.diffusion_model = nn.Module()
    model.diffusion_model.double_blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])
    assert sd_unet_layout(model) is None
    table = NameTable.of(model)
    path = "diffusion_model.double_blocks.0.0"
    assert table.write(path) == path
    assert table.find("lora_unet_double_blocks_0_0") == path
