"""Derived blocks on the host's full-size models."""

import pytest
import torch

from full_size import FAMILIES, full_size
from lora_loom.kernels.blocks import base_parameters, block_map
from lora_loom.kernels.layers import attention_blocks
from tiny import NEWER

# blocks per stack, and the share of the parameters (in percent) that stays outside
EXPECTED = {
    "sd15": ({"input_blocks": 12, "middle_block": 1, "output_blocks": 12}, 0.2),
    "sd2": ({"input_blocks": 12, "middle_block": 1, "output_blocks": 12}, 0.2),
    "sdxl": ({"input_blocks": 9, "middle_block": 1, "output_blocks": 9}, 0.3),
    "ssd1b": ({"input_blocks": 9, "middle_block": 1, "output_blocks": 9}, 0.5),
    "koala": ({"input_blocks": 6, "output_blocks": 6}, 0.9),
    "sd35_medium": ({"joint_blocks": 24}, 0.9),
    "flux": ({"double_blocks": 19, "single_blocks": 38}, 0.5),
    "flux2": ({"double_blocks": 8, "single_blocks": 48}, 2.5),
    "chroma": ({"distilled_guidance_layer.layers": 5, "double_blocks": 19, "single_blocks": 38}, 0.3),
    "lumina2": ({"noise_refiner": 2, "context_refiner": 2, "layers": 26}, 0.4),
    "z_image": ({"noise_refiner": 2, "context_refiner": 2, "layers": 30}, 0.2),
    "qwen_image": ({"transformer_blocks": 60}, 0.2),
    "wan_14b": ({"blocks": 40}, 1.6),
    "hunyuan_video": (
        {"txt_in.individual_token_refiner.blocks": 2, "double_blocks": 20, "single_blocks": 40},
        0.7,
    ),
    "ltxv": ({"transformer_blocks": 28}, 2.2),
    "cosmos2": ({"blocks": 28}, 1.0),
    "aura": ({"double_layers": 4, "single_layers": 32}, 0.5),
}
if NEWER:
    EXPECTED["anima"] = ({"blocks": 28, "llm_adapter.blocks": 6}, 2.5)
AUXILIARY = {
    "distilled_guidance_layer.layers",
    "noise_refiner",
    "context_refiner",
    "txt_in.individual_token_refiner.blocks",
    "llm_adapter.blocks",
}
ROLES = {"input_blocks": "in", "middle_block": "mid", "output_blocks": "out"}


@pytest.mark.parametrize("name", EXPECTED)
def test_stacks_and_what_stays_outside(name):
    model = full_size(name)
    blocks = block_map(model)
    stacks = {}
    for block in blocks:
        stacks[block.group] = stacks.get(block.group, 0) + 1
    expected, outside = EXPECTED[name]
    assert list(stacks.items()) == list(expected.items())  # in forward order

    sizes = {key: value.numel() for key, value in model.named_parameters()}
    rest = base_parameters(model)
    assert 100 * sum(sizes[key] for key in rest) / sum(sizes.values()) == pytest.approx(outside, abs=0.06)
    inside = [key for block in blocks for key in block.parameters]
    assert len(inside) == len(set(inside))
    assert sorted([*inside, *rest]) == sorted(key for key in sizes if key.startswith("diffusion_model."))


@pytest.mark.parametrize(
    ("name", "long", "short"), [("sd15", 26, 17), ("sd2", 26, 17), ("sdxl", 20, 12), ("flux", 58, 58)]
)
def test_vectors_people_know(name, long, short):
    blocks = block_map(full_size(name))
    assert (1 + len(blocks), 1 + len(attention_blocks(blocks))) == (long, short)


@pytest.mark.parametrize("name", EXPECTED)
def test_roles(name):
    for block in block_map(full_size(name)):
        assert block.role == ROLES.get(block.group, "aux" if block.group in AUXILIARY else "trunk")


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_and_modules(name):
    model = full_size(name)
    blocks = block_map(model)
    assert len({block.id for block in blocks}) == len(blocks) > 0
    for block in blocks:
        (path,) = block.modules
        assert isinstance(model.get_submodule(path), torch.nn.Module)
        assert path == f"diffusion_model.{block.id}"
        assert all(parameter.startswith(path + ".") for parameter in block.parameters)
    bare = block_map(model.diffusion_model)  # the network alone has the same blocks
    assert [block.id for block in bare] == [block.id for block in blocks]
