"""OFTv2: values against PEFT and OneTrainer's formula, what is kept for backward, sizes of blocks."""

import math

import pytest
import torch
from torch import nn

import run_host
from cases import CASES, LINEARS, Case, Lent, build, kept_for_backward, randomised, storages, with_weight
from lora_loom.kernels.adapter import Options
from lora_loom.kernels.oftv2 import OFTv2
from lora_loom.kernels.registry import read_adapter

run_host.prepare_imports()  # the reference imports torchvision, which may need its operators declared first

import peft  # noqa: E402

OFTV2_CASES = [case for case in CASES if case.family == "OFTv2"]


def neumann(packed, size, scaled=False):
    """R as one matrix: OneTrainer's oft_utils.py, by loops and powers."""
    blocks = []
    for row in packed / (2 * math.sqrt(size - 1) if scaled else 1):
        q, values = torch.zeros(size, size, dtype=row.dtype), iter(row)
        for i in range(size):
            for j in range(i + 1, size):
                q[i, j] = next(values)
        q = q - q.T
        powers = [torch.linalg.matrix_power(q, n) for n in range(5)]
        blocks.append(powers[0] + 2 * (powers[1] + powers[2] + powers[3]) + powers[4])
    return torch.block_diag(*blocks)


@pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`")
@pytest.mark.parametrize("name", LINEARS)
def test_output_equals_pefts(name):
    case = Case("OFTv2", name, Options(block_size=3))
    module, adapter, x = build(case)
    adapter = randomised(adapter)
    merged = with_weight(module, adapter.merged(module.weight), x)
    branch = adapter.branch(x, module(x), Lent(module))
    config = peft.OFTConfig(oft_block_size=adapter.size, target_modules=["layer"])
    layer = peft.inject_adapter_in_model(config, nn.ModuleDict({"layer": module}))["layer"].double()
    with torch.no_grad():
        layer.oft_R["default"].weight.copy_(adapter.packed)
        # peft takes every input of four dimensions for pictures
        expected = layer(x.flatten(0, -2)).view(merged.shape)
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(branch, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("scaled", (False, True))
@pytest.mark.parametrize("shared", (False, True))
@pytest.mark.parametrize("strength", (1.0, 0.5, -0.7))
@pytest.mark.parametrize("case", OFTV2_CASES, ids=str)
def test_merged_equals_the_closed_form(case, strength, shared, scaled):
    """W Rᵀ of linear layers, W R of convolutions (OneTrainer's LoRAModule.py)."""
    module, adapter, x = build(case)
    packed = randomised(adapter).packed[: 1 if shared else None]
    parts = {"oft_R.weight": packed} | ({"oft_R.scaled_oft": torch.tensor(True)} if scaled else {})
    weight, linear = module.weight, module.weight.ndim == 2
    blocks = weight[0].numel() // adapter.size
    r = neumann(packed.expand(blocks, -1), adapter.size, scaled)
    turned = (weight.flatten(1) @ (r.T if linear else r)).view(weight.shape)
    expected = weight + strength * (turned - weight)
    for shape in (weight.shape, None):
        again, left = read_adapter(parts, shape)
        assert not left and isinstance(again, OFTv2) and again.state().keys() == parts.keys()
        torch.testing.assert_close(again.merged(weight, strength), expected, rtol=1e-9, atol=1e-11)
        if strength == 1:
            torch.testing.assert_close(again.on(x, Lent(module)), with_weight(module, expected, x))


@pytest.mark.parametrize("name", ("linear", "conv1x1", "conv2d"))
@pytest.mark.parametrize("variant", ("shared", "scaled"))
def test_gradients_of_what_is_shared_or_scaled(name, variant):
    module, adapter, x = build(Case("OFTv2", name, Options(block_size=3)))
    packed = randomised(adapter).packed[: 1 if variant == "shared" else None]
    whole = OFTv2(packed, None, variant == "scaled")

    def on(x, packed):
        return whole.with_tensors({"oft_R.weight": packed}).on(x, Lent(module))

    assert torch.autograd.gradcheck(on, (x.requires_grad_(), packed.requires_grad_()))


@pytest.mark.parametrize("name", ("linear", "conv1x1", "conv2d"))
def test_the_graph_keeps_the_input_alone(name):
    module, adapter, x = build(Case("OFTv2", name, Options(block_size=3)))
    adapter.packed.requires_grad_()
    kept = kept_for_backward(lambda: adapter.on(x.requires_grad_(), Lent(module)))
    assert storages(kept) == storages([x, adapter.packed])


@pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`")
@pytest.mark.parametrize("inputs", (2, 9, 30, 64, 320, 1280))
@pytest.mark.parametrize("size", (4, 31, 32, 64))
def test_block_sizes_are_pefts(inputs, size):
    network = nn.ModuleDict({"layer": nn.Linear(inputs, 2)})
    config = peft.OFTConfig(oft_block_size=size, target_modules=["layer"])
    theirs = peft.inject_adapter_in_model(config, network)["layer"].oft_R["default"].weight
    adapter = OFTv2.create((2, inputs), Options(block_size=size), torch.Generator())
    assert adapter.packed.shape == theirs.shape and not adapter.packed.any() and not theirs.any()


def test_blocks_of_one_are_not_made():
    """peft: in = 7 at size 4 gives seven blocks of one, and nothing to train."""
    assert OFTv2.create((2, 7), Options(block_size=4), torch.Generator()).packed.shape == (1, 21)
    with pytest.raises(ValueError, match="single input"):
        OFTv2.create((5, 1), Options(), torch.Generator())


@pytest.mark.parametrize(
    "packed, message",
    ((torch.zeros(2, 5), "rows of 5"), (torch.zeros(3, 3, 1), "is not"), (torch.zeros(3, 3), "3 blocks of 3")),
)
def test_broken_files_are_refused(packed, message):
    with pytest.raises(ValueError, match=message):
        read_adapter({"oft_R.weight": packed}, (4, 8))


def test_the_norm_is_that_of_the_rotation():
    packed = torch.tensor([[3.0, 0.0, 4.0]])
    assert OFTv2(packed, None).norm() == pytest.approx(5 * math.sqrt(2))
    assert OFTv2(packed, None, scaled=True).norm() == pytest.approx(5 / 2)
