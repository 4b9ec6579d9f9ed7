"""The rule that derives blocks, on small hand-made trees."""

import pytest
from torch import nn

from lora_loom.kernels import block_map
from lora_loom.kernels.blocks import BlockIndex, base_parameters


class Layer(nn.Module):
    """A composite module: a block's usual content."""

    def __init__(self, width=8):
        super().__init__()
        self.linear = nn.Linear(width, width)


def tree(**children):
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def ids(module):
    return [block.id for block in block_map(module)]


def test_module_lists_of_composites_are_stacks_and_lists_of_leaves_are_not():
    model = tree(
        embed=nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]),
        blocks=nn.ModuleList([Layer(), Layer()]),
        head=nn.Sequential(nn.Linear(8, 8), nn.SiLU()),
    )
    assert ids(model) == ["blocks.0", "blocks.1"]
    assert base_parameters(model)[0] == "embed.0.weight"


def test_a_sequential_needs_two_composites():
    assert ids(tree(one=nn.Sequential(Layer(), nn.SiLU()), two=nn.Sequential(Layer(), Layer()))) == ["two.0", "two.1"]


def test_only_the_outermost_stack_counts():
    inner = tree(transformer_blocks=nn.ModuleList([Layer(), Layer()]))
    assert ids(tree(blocks=nn.ModuleList([inner, inner]))) == ["blocks.0", "blocks.1"]


def test_the_middle_is_one_block_even_with_one_child():
    for children in ([Layer()], [Layer(), Layer(), Layer()]):
        (block,) = block_map(tree(middle_block=nn.Sequential(*children)))
        assert (block.id, block.group, block.role) == ("middle_block", "middle_block", "mid")
        assert block.modules == ("middle_block",)
        assert len(block.parameters) == 2 * len(children)


def test_roles_come_from_names_and_shares():
    model = tree(
        down_blocks=nn.ModuleList([Layer()]),
        up_blocks=nn.ModuleList([Layer()]),
        refiner=nn.ModuleList([Layer()]),
        layers=nn.ModuleList([Layer(64)]),
    )
    assert [block.role for block in block_map(model)] == ["in", "out", "aux", "trunk"]


def test_a_loaded_model_counts_from_its_diffusion_model():
    model = tree(
        diffusion_model=tree(blocks=nn.ModuleList([Layer()])),
        noise_augmentor=tree(blocks=nn.ModuleList([Layer()])),
    )
    (block,) = block_map(model)
    assert (block.id, block.modules) == ("blocks.0", ("diffusion_model.blocks.0",))
    assert block.parameters == ("diffusion_model.blocks.0.linear.weight", "diffusion_model.blocks.0.linear.bias")


def test_stacks_without_parameters_are_left_out():
    assert ids(tree(maps=nn.ModuleList([nn.Sequential(nn.SiLU())]), blocks=nn.ModuleList([Layer()]))) == ["blocks.0"]


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("blocks.1", "blocks.1"),
        ("blocks.1.linear", "blocks.1"),
        ("blocks.10.linear", "blocks.10"),
        ("blocks", None),
        ("embed", None),
    ],
)
def test_index(path, block):
    index = BlockIndex(block_map(tree(blocks=nn.ModuleList([Layer() for _ in range(11)]), embed=nn.Linear(2, 2))))
    found = index.of(path)
    assert (found.id if found else None) == block
