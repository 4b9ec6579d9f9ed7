"""BOFT: values against LyCORIS, PEFT and dense butterflies; how stages are combined."""

import types

import pytest
import torch
from torch import nn

import run_host
from cases import CASES, LAYERS, Case, Lent, build, randomised, with_weight
from lora_loom.kernels import rotations
from lora_loom.kernels.adapter import Options
from lora_loom.kernels.boft import BOFT, PeftBOFT, butterfly
from lora_loom.kernels.registry import read_adapter

run_host.prepare_imports()  # the references import torchvision, which may need its operators declared first

import peft  # noqa: E402
from lycoris.functional import power2factorization  # noqa: E402
from lycoris.modules.boft import ButterflyOFTModule  # noqa: E402
from peft.tuners.boft.layer import BOFTLayer  # noqa: E402

BOFT_CASES = [case for case in CASES if case.family == "BOFT"]


def cayley(blocks):
    q = blocks - blocks.mT
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype)
    return (eye + q) @ torch.inverse(eye - q)


def dense_butterfly(blocks):
    """Bₘ₋₁ … B₀ as one matrix, index by index, in LyCORIS' order."""
    stages, count, n, _ = blocks.shape
    whole = torch.eye(count * n, dtype=blocks.dtype)
    for stage, r in enumerate(cayley(blocks)):
        distance = 2**stage * n // 2
        # pairs of an output and the one ``distance`` further on, n/2 pairs to a block
        order = [start + pair + side * distance
                 for start in range(0, count * n, 2 * distance) for pair in range(distance) for side in (0, 1)]
        matrix = torch.zeros_like(whole)
        matrix[torch.tensor(order)[:, None], torch.tensor(order)] = torch.block_diag(*r)
        whole = matrix @ whole
    return whole


def lycoris_output(module, adapter, x, options):
    size = adapter.blocks.shape[-1]
    reference = ButterflyOFTModule("layer", module, 1.0, size, constraint=options.constraint, rescaled=options.rescale)
    with torch.no_grad():
        reference.oft_blocks.copy_(adapter.blocks)
        if options.rescale:
            reference.rescale.copy_(adapter.tensors["rescale"])
        reference.apply_to()
        return module(x)


@pytest.mark.parametrize("case", [case for case in BOFT_CASES if "grouped" not in case.layer], ids=str)
def test_output_equals_lycoris(case):
    module, adapter, x = build(case, torch.float32)
    adapter = randomised(adapter)
    merged = with_weight(module, adapter.merged(module.weight), x)
    branch = adapter.branch(x, module(x), Lent(module))
    expected = lycoris_output(module, adapter, x, case.options)
    torch.testing.assert_close(merged, expected, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(branch, expected, rtol=2e-4, atol=2e-5)


DEEP = {  # (outputs, block size, stages)
    "pairs": (16, 2, 4),
    "eights": (64, 8, 4),
    "one block": (6, 6, 1),
}


def deep(name, make=nn.Linear):
    outputs, size, stages = DEEP[name]
    torch.manual_seed(0)
    module = make(5, outputs, *(() if make is nn.Linear else (1,))).double().requires_grad_(False)
    adapter = BOFT.create(module.weight.shape, Options(block_size=size), torch.Generator()).to(dtype=torch.float64)
    assert adapter.blocks.shape[:1] + adapter.blocks.shape[-1:] == (stages, size)
    x = torch.randn(3, 5, *(() if make is nn.Linear else (4,)), dtype=torch.float64)
    return module, randomised(adapter), x


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("width", (2, 8, 128))
@pytest.mark.parametrize("make", (nn.Linear, nn.Conv1d))
def test_stages_combine_to_the_dense_butterfly(name, width, make, monkeypatch):
    """Whatever number of stages is taken at once, and for whatever number of rows."""
    monkeypatch.setattr(rotations, "WIDTH", width)
    monkeypatch.setattr(rotations, "ROWS", 2)
    module, adapter, x = deep(name, make)
    matrix = dense_butterfly(adapter.blocks)
    expected = (matrix @ module.weight.flatten(1)).view(module.weight.shape)
    torch.testing.assert_close(adapter.merged(module.weight), expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(adapter.on(x, Lent(module)), with_weight(module, expected, x))
    y = x.mT if make is nn.Conv1d else x
    inputs = torch.randn(3, *y.shape[1:-1], len(matrix), dtype=torch.float64)
    there = rotations.turn(inputs, adapter.operators(), False)
    torch.testing.assert_close(there, inputs @ matrix.T)
    torch.testing.assert_close(rotations.turn_back(there, adapter.operators(), False), inputs)


@pytest.mark.parametrize("width", (2, 4, 128))
@pytest.mark.parametrize("make", (nn.Linear, nn.Conv1d))
def test_gradients_of_many_stages(width, make, monkeypatch):
    monkeypatch.setattr(rotations, "WIDTH", width)
    module, adapter, x = deep("pairs", make)
    rescale = torch.linspace(0.5, 1.5, 16, dtype=torch.float64)
    for extra in ({}, {"rescale": rescale}):
        whole = BOFT({**adapter.tensors, **extra}, None, 0.0)
        names, values = list(whole.tensors), [t.detach().requires_grad_() for t in whole.tensors.values()]

        def on(x, *tensors, whole=whole, names=names):
            return whole.with_tensors(dict(zip(names, tensors, strict=True))).on(x, Lent(module))

        assert torch.autograd.gradcheck(on, [x.requires_grad_(), *values])


@pytest.mark.parametrize("outputs", (2, 12, 320, 640, 768, 1280, 3072))
@pytest.mark.parametrize("size", (32, 33, 64))
def test_block_sizes_are_lycoriss(outputs, size):
    assert butterfly(outputs, size) == power2factorization(outputs, size)
    reference = ButterflyOFTModule("layer", nn.Linear(2, outputs), 1.0, size)
    adapter = BOFT.create((outputs, 2), Options(block_size=size), torch.Generator())
    assert adapter.blocks.shape == reference.oft_blocks.shape


@pytest.mark.parametrize("outputs, cure", ((12, "6 or more would do"), (27, "an odd number never does")))
def test_outputs_that_make_no_butterfly_are_refused(outputs, cure):
    with pytest.raises(ValueError, match=f"block_size is 4, but {outputs} .*{cure}"):
        BOFT.create((outputs, 3), Options(block_size=4), torch.Generator())


def test_only_the_output_and_the_rotations_are_kept():
    module, adapter, x = deep("eights")
    adapter.blocks.requires_grad_()
    x.requires_grad_()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = adapter.on(x, Lent(module))
    operators = adapter.blocks.numel()
    assert sum(kept.values()) <= y.numel() + 2 * operators and x.data_ptr() not in kept


def peft_parts(inputs, outputs, stages, size, shape=None):
    draws = torch.Generator().manual_seed(3)
    r = torch.randn(stages, inputs // size, size, size, generator=draws, dtype=torch.float64)
    s = 1 + 0.3 * torch.randn(outputs, generator=draws, dtype=torch.float64)
    return {"boft_R": r, "boft_s": s.view(shape or (outputs, 1))}


@pytest.mark.filterwarnings("ignore")  # what peft says about compilers
@pytest.mark.parametrize("name", ("linear", "linear 3-D", "conv2d"))
def test_pefts_files_give_pefts_output(name):
    """Without its CUDA extension peft knows one stage only."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    module, x = make().double(), torch.randn(shape, dtype=torch.float64)
    inputs, conv = module.weight[0].numel(), module.weight.ndim > 2
    parts = peft_parts(inputs, len(module.weight), 1, 2, (1, -1) if conv else None)
    adapter, left = read_adapter(parts, module.weight.shape)
    assert isinstance(adapter, PeftBOFT) and not left
    merged = with_weight(module, adapter.merged(module.weight), x)
    branch = adapter.branch(x, module(x), Lent(module))
    config = peft.BOFTConfig(boft_block_size=2, target_modules=["layer"])
    layer = peft.inject_adapter_in_model(config, nn.ModuleDict({"layer": module}))["layer"].double()
    with torch.no_grad():
        layer.boft_R["default"].copy_(parts["boft_R"])
        layer.boft_s["default"].copy_(parts["boft_s"])
        layer.cayley_batch = lambda data: BOFTLayer.cayley_batch(layer, data.float()).double()
        if conv:  # peft 0.21 takes the kernel for square and the padding for symmetric, as they are here
            assert module.padding == (1, 1)
        expected = layer(x)
    torch.testing.assert_close(merged, expected, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(branch, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("stages", (1, 2, 3))
def test_pefts_butterflies(stages):
    """peft's own permutations, which it only uses where its CUDA extension is built."""
    inputs, size = 16, 4
    parts = peft_parts(inputs, 6, stages, size)
    free = types.SimpleNamespace()
    whole = torch.eye(inputs, dtype=torch.float64)
    for stage in range(stages):
        count = inputs // size // 2**stage
        indices = BOFTLayer.block_butterfly_perm(free, inputs, count, size // 2, stages - 1)
        p = BOFTLayer.perm2mat(free, indices).double()
        q = (parts["boft_R"][stage] - parts["boft_R"][stage].mT) / 2
        eye = torch.eye(size, dtype=torch.float64)
        whole = p @ torch.block_diag(*((eye - q) @ torch.inverse(eye + q))) @ p.T @ whole
    module, x = nn.Linear(inputs, 6).double(), torch.randn(3, inputs, dtype=torch.float64)
    adapter, _ = read_adapter(parts, module.weight.shape)
    expected = (x @ whole @ module.weight.T) * parts["boft_s"].T + module.bias
    merged = with_weight(module, adapter.merged(module.weight), x)
    torch.testing.assert_close(merged, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(adapter.branch(x, module(x), Lent(module)), expected, rtol=1e-9, atol=1e-11)
    assert adapter.norm() == pytest.approx(float((parts["boft_R"] - parts["boft_R"].mT).norm() / 2))


def test_pefts_files_must_fit():
    parts = peft_parts(8, 6, 2, 4)
    again, _ = read_adapter(read_adapter(parts, (6, 8))[0].state(), None)
    weight = torch.randn(6, 8, dtype=torch.float64)
    torch.testing.assert_close(again.merged(weight), read_adapter(parts, (6, 8))[0].merged(weight))
    for shape in ((6, 10), (8, 8)):
        with pytest.raises(ValueError, match="8 inputs and 6 outputs"):
            read_adapter(parts, shape)
    with pytest.raises(ValueError, match="boft_s is missing"):
        read_adapter({"boft_R": parts["boft_R"]}, (6, 8))


def test_a_file_without_butterfly_is_refused():
    for blocks in (torch.zeros(3, 2, 4, 4), torch.zeros(1, 2, 3, 3)):
        with pytest.raises(ValueError, match="no butterfly"):
            read_adapter({"oft_blocks": blocks}, None)


def test_four_dimensions_are_a_butterfly():
    _, adapter, _ = build(Case("BOFT", "linear", Options(block_size=6)))
    again, left = read_adapter(adapter.state(), None)
    assert isinstance(again, BOFT) and not left
