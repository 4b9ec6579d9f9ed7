"""Diag-OFT: values against LyCORIS and a closed form, what is kept for backward, kohya's files."""

import pytest
import torch

import run_host
from cases import CASES, LAYERS, Case, Lent, build, randomised, with_weight
from lora_loom.kernels import rotations
from lora_loom.kernels.adapter import Options
from lora_loom.kernels.compose import Sum
from lora_loom.kernels.oft import OFT
from lora_loom.kernels.registry import read_adapter

run_host.prepare_imports()  # the reference imports torchvision, which may need its operators declared first

from lycoris.functional import factorization  # noqa: E402
from lycoris.modules.diag_oft import DiagOFTModule  # noqa: E402

OFT_CASES = [case for case in CASES if case.family == "OFT"]


def rotation(blocks, limit=0.0):
    """R as one matrix, by the definition."""
    q = blocks - blocks.mT
    if limit and q.norm() > limit:
        q = q * limit / q.norm()
    eye = torch.eye(blocks.shape[-1], dtype=q.dtype)
    return torch.block_diag(*((eye + block) @ torch.inverse(eye - block) for block in q))


@pytest.mark.parametrize("case", [case for case in OFT_CASES if "grouped" not in case.layer], ids=str)
def test_output_equals_lycoris(case):
    module, adapter, x = build(case, torch.float32)
    adapter = randomised(adapter)
    merged = with_weight(module, adapter.merged(module.weight), x)
    branch = adapter.branch(x, module(x), Lent(module))
    options = case.options
    reference = DiagOFTModule(
        "layer", module, 1.0, options.block_size, constraint=options.constraint, rescaled=options.rescale
    )
    # LyCORIS turns as many outputs as block_size into blocks of one, which cannot rotate; we make one block of them
    reference.block_num, reference.block_size, _ = adapter.blocks.shape
    reference.oft_blocks = torch.nn.Parameter(adapter.blocks)
    with torch.no_grad():
        if options.rescale:
            reference.rescale.copy_(adapter.tensors["rescale"])
        reference.apply_to()
        expected = module(x)
    torch.testing.assert_close(merged, expected, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(branch, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("strength", (1.0, 0.5, -0.7))
@pytest.mark.parametrize("case", OFT_CASES, ids=str)
def test_merged_equals_the_closed_form(case, strength):
    module, adapter, _ = build(case)
    adapter, weight = randomised(adapter), module.weight
    limit = case.options.constraint * len(weight)
    turned = (rotation(adapter.blocks, limit).T @ weight.flatten(1)).view(weight.shape)
    turned = turned * adapter.tensors.get("rescale", 1.0)
    expected = weight + strength * (turned - weight)
    torch.testing.assert_close(adapter.merged(weight, strength), expected, rtol=1e-9, atol=1e-11)


def test_the_constraint_is_alpha_times_the_outputs():
    """LyCORIS and kohya multiply alpha by the outputs; 0 is no constraint."""
    blocks = torch.randn(3, 4, 4, dtype=torch.float64)
    free = OFT({"oft_blocks": blocks}, None, 0.0)
    wide = OFT({"oft_blocks": blocks}, None, 100.0)
    torch.testing.assert_close(wide.operators(), free.operators())
    weight, alpha = torch.eye(12, dtype=torch.float64), 1e-4
    narrow = OFT({"oft_blocks": blocks}, None, alpha).difference(weight)
    # for small Q, W' − W = −2 Q W
    assert narrow.norm() == pytest.approx(2 * alpha * 12, rel=1e-4)


def test_the_bias_is_not_rotated():
    module, adapter, x = build(Case("OFT", "linear", Options(block_size=4)))
    adapter = randomised(adapter)
    before, after = module(x) - module.bias, adapter.on(x, Lent(module)) - module.bias
    assert not torch.allclose(before, after)
    lengths = [rows.view(5, -1, adapter.blocks.shape[-1]).norm(dim=-1) for rows in (before, after)]
    torch.testing.assert_close(*lengths)


def bytes_kept(run):
    """(bytes of the storages that autograd keeps, those storages)."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    return sum(kept.values()), kept, result


@pytest.mark.parametrize("layer", ("linear", "conv2d"))
def test_the_graph_keeps_the_output_and_the_rotation(layer):
    module, adapter, x = build(Case("OFT", layer, Options(block_size=4)))
    adapter.blocks.requires_grad_()
    x.requires_grad_()
    size, kept, y = bytes_kept(lambda: adapter.on(x, Lent(module)))
    assert y.untyped_storage().data_ptr() in kept and x.untyped_storage().data_ptr() not in kept
    assert size == y.untyped_storage().nbytes() + adapter.blocks.untyped_storage().nbytes()


def test_rows_are_turned_a_piece_at_a_time(monkeypatch):
    module, adapter, x = build(Case("OFT", "linear", Options(block_size=4)))
    adapter = randomised(adapter)
    adapter.blocks.requires_grad_()
    results = []
    for rows in (rotations.ROWS, 2):
        monkeypatch.setattr(rotations, "ROWS", rows)
        leaf = x.detach().requires_grad_()
        y = adapter.on(leaf, Lent(module))
        results.append((y, *torch.autograd.grad((y - 1).square().sum(), (leaf, adapter.blocks))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_large_rotations_stay_orthogonal():
    q = rotations.skew(1000 * torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0)))
    r = rotations.cayley(q)
    torch.testing.assert_close(r @ r.mT, torch.eye(8).expand(4, 8, 8), atol=1e-3, rtol=0)


@pytest.mark.parametrize("outputs", (2, 8, 12, 40, 64, 250, 320, 640, 1280, 3072))
@pytest.mark.parametrize("size", (4, 32, 64))
def test_block_sizes_are_lycoriss(outputs, size):
    smaller, larger = factorization(outputs, size)
    adapter = OFT.create((outputs, 3), Options(block_size=size), torch.Generator())
    assert adapter.shape == (outputs, 3)
    expected = (larger, smaller) if smaller > 1 else (smaller, larger)
    assert adapter.blocks.shape == (*expected, expected[1]) and not adapter.blocks.any()


def test_outputs_without_a_block_size_are_refused():
    assert OFT.create((7, 3), Options(block_size=8), torch.Generator()).blocks.shape == (1, 7, 7)
    with pytest.raises(ValueError, match="block_size is 8"):
        OFT.create((11, 3), Options(block_size=8), torch.Generator())


def test_files_of_parts():
    """kohya's networks/oft_flux.py: every part of a fused projection has blocks of its own, and a constraint."""
    sizes, alpha = ((2, 3), (2, 3), (2, 6)), 0.05
    draws = torch.Generator().manual_seed(0)
    blocks = [torch.randn(k, n, n, generator=draws, dtype=torch.float64) for k, n in sizes]
    weight = torch.randn(24, 5, generator=draws, dtype=torch.float64)
    parts = {f"oft_blocks.{n}": tensor for n, tensor in enumerate(blocks)} | {"alpha": torch.tensor(alpha)}
    adapter, left = read_adapter(parts, weight.shape)
    assert isinstance(adapter, Sum) and not left
    limits = [float(torch.tensor(alpha)) * k * n for k, n in sizes]
    r = torch.block_diag(*(rotation(*pair) for pair in zip(blocks, limits, strict=True)))
    torch.testing.assert_close(adapter.merged(weight), r.T @ weight, rtol=1e-9, atol=1e-11)
    with pytest.raises(ValueError, match="rotate 24 outputs, the layer has 26"):
        read_adapter(parts, (26, 5))


@pytest.mark.parametrize(
    "parts, message",
    (
        ({"oft_blocks": torch.zeros(2, 3, 4)}, "no square matrices"),
        ({"oft_blocks": torch.zeros(2, 3, 3), "rescale": torch.ones(5, 1)}, "one number for each of 6"),
    ),
)
def test_broken_files_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        read_adapter(parts, None)


def test_fresh_adapters_scale_by_one():
    shape = LAYERS["conv2d"][0]().weight.shape
    adapter = OFT.create(shape, Options(block_size=4, rescale=True, constraint=0.5), torch.Generator())
    assert torch.equal(adapter.tensors["rescale"], torch.ones(8, 1, 1, 1))
    assert adapter.state()["alpha"] == 0.5 and adapter.state().keys() == {"oft_blocks", "rescale", "alpha"}
