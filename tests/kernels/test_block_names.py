"""What people call blocks, on trees like those of the host's models (tests/host/test_block_vectors.py has the real)."""

import pytest
from torch import nn

from lora_loom.kernels.block_names import resolve
from lora_loom.kernels.blocks import block_map


def stack(count, width=8):
    block = nn.Sequential(nn.Linear(width, width), nn.ModuleDict({"x": nn.Linear(width, width)}))
    return nn.ModuleList([block] * count)


def tree(**stacks):
    module = nn.Module()
    for name, child in stacks.items():
        at = module
        *parents, last = name.split("__")
        for parent in parents:
            at.add_module(parent, nn.Module())
            at = getattr(at, parent)
        at.add_module(last, child)
    return block_map(module)


def composite():
    return nn.Sequential(nn.ModuleDict({"x": nn.Linear(8, 8)}), nn.ModuleDict({"x": nn.Linear(8, 8)}))


UNET = tree(input_blocks=stack(12), middle_block=composite(), output_blocks=stack(12))
FLUX = tree(double_blocks=stack(19), single_blocks=stack(38))
HUNYUAN = tree(txt_in__refiner__blocks=stack(2, 2), double_blocks=stack(20), single_blocks=stack(40))
LUMINA = tree(noise_refiner=stack(2, 2), context_refiner=stack(2, 2), layers=stack(26))


def ids(group, *numbers):
    return {f"{group}.{number}" for number in numbers}


INPUTS, OUTPUTS = ids("input_blocks", *range(12)), ids("output_blocks", *range(12))


@pytest.mark.parametrize(
    "blocks, text, wanted",
    [
        (UNET, "base", {"base"}),
        (UNET, "in", INPUTS),
        (UNET, "IN", INPUTS),
        (UNET, "input_blocks", INPUTS),
        (UNET, "input", INPUTS),
        (UNET, "mid", {"middle_block"}),
        (UNET, "M00", {"middle_block"}),
        (UNET, "MID", {"middle_block"}),
        (UNET, "middle_block", {"middle_block"}),
        (UNET, "out", OUTPUTS),
        (UNET, "all", {"base", "middle_block"} | INPUTS | OUTPUTS),
        (FLUX, "in", ids("double_blocks", *range(19))),
        (FLUX, "mid, OUT0", ids("single_blocks", *range(20))),
        (LUMINA, "out", ids("layers", *range(17, 26))),
        (UNET, "IN4", ids("input_blocks", 4)),
        (UNET, "IN04", ids("input_blocks", 4)),
        (UNET, "in.4", ids("input_blocks", 4)),
        (UNET, "input_blocks.4", ids("input_blocks", 4)),
        (UNET, "OUT3", ids("output_blocks", 3)),
        (UNET, "IN4-8", ids("input_blocks", 4, 5, 6, 7, 8)),
        (UNET, "IN04-IN08", ids("input_blocks", 4, 5, 6, 7, 8)),
        (UNET, "OUT10-", ids("output_blocks", 10, 11)),
        (UNET, " IN1 , mid,OUT11 ", ids("input_blocks", 1) | {"middle_block"} | ids("output_blocks", 11)),
        (FLUX, "double", ids("double_blocks", *range(19))),
        (FLUX, "D3", ids("double_blocks", 3)),
        (FLUX, "double.7", ids("double_blocks", 7)),
        (FLUX, "double_blocks.7", ids("double_blocks", 7)),
        (FLUX, "double_blocks.0-7", ids("double_blocks", *range(8))),
        (FLUX, "Single_Blocks_36-37", ids("single_blocks", 36, 37)),
        (FLUX, "single.10-", ids("single_blocks", *range(10, 38))),
        (FLUX, "trunk", ids("double_blocks", *range(19)) | ids("single_blocks", *range(38))),
        (FLUX, "trunk18-19", ids("double_blocks", 18) | ids("single_blocks", 0)),
        (HUNYUAN, "aux", ids("txt_in.refiner.blocks", 0, 1)),
        (HUNYUAN, "txt_in", ids("txt_in.refiner.blocks", 0, 1)),
        (HUNYUAN, "txt_in.refiner.blocks.1", ids("txt_in.refiner.blocks", 1)),
        (LUMINA, "layers.25", ids("layers", 25)),
        (LUMINA, "aux", ids("noise_refiner", 0, 1) | ids("context_refiner", 0, 1)),
        (LUMINA, "aux2", ids("context_refiner", 0)),
    ],
)
def test_names(blocks, text, wanted):
    assert resolve(text, blocks) == wanted


@pytest.mark.parametrize(
    "blocks, text, message",
    [
        (UNET, "", r"no block is named; this model has base, input_blocks\.0-11 \(in\), middle_block \(mid\)"),
        (UNET, " , ", "no block is named"),
        (UNET, "IN12", r"'IN12': there is no number 12, expected 0 to 11"),
        (UNET, "IN4-12", "there is no number 12"),
        (UNET, "M01", "there is no number 1, expected 0"),
        (UNET, "IN8-4", "ends before it begins"),
        (UNET, "IN12-", r"'IN12-': there is no number 12, expected 0 to 11"),
        (UNET, "IN4-OUT8", "begins in one group of blocks and ends in another"),
        (UNET, "double.3", r"there is no block 'double\.3'; this model has"),
        (UNET, "ouput_blocks.3", r"'ouput_blocks\.3', do you mean 'output_blocks\.3'"),
        (UNET, "output_block", "do you mean 'output_blocks'"),
        (UNET, "base3", "there is no block 'base3'"),
        (UNET, "4", "there is no block '4'"),
        (FLUX, "inn", r"there is no block .inn.*double_blocks\.0-18 \(trunk\), single_blocks\.0-37.*; in, mid and out"),
        (FLUX, "IN19", "there is no number 19, expected 0 to 18"),
        (FLUX, "blocks.3", "there is no block 'blocks.3'"),
        (LUMINA, "refiner.0", r"there is no block 'refiner\.0', do you mean 'noise_refiner\.0'"),
        (UNET, "IN1," * 1000, "expected at most 2000"),
        (UNET, "IN-4", "there is no block 'IN-4'"),
        (UNET, "IN1_000", "there is no block"),
    ],
)
def test_what_is_no_name(blocks, text, message):
    with pytest.raises(ValueError, match=message):
        resolve(text, blocks)
