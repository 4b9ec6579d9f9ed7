"""GLoRA: values against LyCORIS, old files, what is kept for backward, how a fresh one is drawn."""

import math

import pytest
import torch

import run_host
from cases import CASES, Case, Lent, build, kept_for_backward, randomised, storages, with_weight
from lora_loom.kernels.adapter import Dropout, Options
from lora_loom.kernels.glora import PARTS, GLoRA
from lora_loom.kernels.registry import read_adapter

run_host.prepare_imports()  # the reference imports torchvision, which may need its operators declared first

from lycoris.modules.glora import GLoRAModule  # noqa: E402

GLORA_CASES = [case for case in CASES if case.family == "GLoRA" and not case.options.rank_stabilised]
SWAPPED = {"a1.weight": "a2.weight", "a2.weight": "a1.weight", "b1.weight": "b2.weight", "b2.weight": "b1.weight"}


@pytest.mark.parametrize("strength", (1.0, 0.5, -0.7))
@pytest.mark.parametrize("case", [case for case in GLORA_CASES if "grouped" not in case.layer], ids=str)
def test_output_equals_lycoris(case, strength):
    module, adapter, x = build(case)
    adapter = randomised(adapter)
    merged = with_weight(module, adapter.merged(module.weight, strength), x)
    branch = adapter.branch(x, module(x), Lent(module), strength)
    reference = GLoRAModule("layer", module, strength, adapter.rank, adapter.alpha).to(x.dtype)
    with torch.no_grad():
        for name in PARTS:
            reference.get_parameter(name).copy_(adapter.tensors[name])
        reference.apply_to()
        expected = module(x)
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(branch, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("case", GLORA_CASES, ids=str)
def test_merged_equals_the_closed_form(case):
    module, adapter, _ = build(case)
    adapter = randomised(adapter)
    a1, a2, b1, b2 = (adapter.tensors[name] for name in PARTS)
    weight = module.weight
    inputs = torch.einsum("ir,rj->ij", a1.flatten(1), a2.flatten(1))
    added = torch.einsum("or,ri...->oi...", b1.flatten(1), b2)
    expected = weight + 0.75 * (torch.einsum("oi...,ij->oj...", weight, inputs) + added)
    torch.testing.assert_close(adapter.merged(weight), expected, rtol=1e-9, atol=1e-11)


def test_rank_stabilised_scale_is_lycoriss():
    module, adapter, x = build(Case("GLoRA", "linear", Options(4, 3.0, rank_stabilised=True)))
    adapter = randomised(adapter)
    expected = adapter.on(x, Lent(module))
    reference = GLoRAModule("layer", module, 1.0, 4, 3.0, rs_lora=True).to(x.dtype)
    with torch.no_grad():
        for name in PARTS:
            reference.get_parameter(name).copy_(adapter.tensors[name])
        reference.apply_to()
        torch.testing.assert_close(expected, module(x), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("told", (True, False))
@pytest.mark.parametrize("layer", ("linear", "conv2d", "conv1x1", "linear 4-D"))
def test_old_files_have_one_and_two_swapped(layer, told):
    module, adapter, _ = build(Case("GLoRA", layer, Options(2, 1.5)))
    adapter = randomised(adapter)
    state = adapter.state()
    old = {SWAPPED.get(name, name): tensor for name, tensor in state.items()}
    again, left = read_adapter(old, module.weight.shape if told else None)
    assert not left
    torch.testing.assert_close(again.merged(module.weight), adapter.merged(module.weight))
    assert {name: tensor.shape for name, tensor in again.state().items()} == {n: t.shape for n, t in state.items()}


@pytest.mark.parametrize("rank", (2, 5, 7))
def test_square_layers_tell_old_from_new_by_the_rank(rank):
    """Rank 5 = in = out leaves both ways open: then it is a new file."""
    draws = torch.Generator().manual_seed(0)
    adapter = randomised(GLoRA.create((5, 5), Options(rank, 2.0), draws))
    weight = torch.randn(5, 5, generator=draws)
    new, old = adapter.state(), {SWAPPED.get(name, name): tensor for name, tensor in adapter.state().items()}
    torch.testing.assert_close(read_adapter(new, (5, 5))[0].merged(weight), adapter.merged(weight))
    assert torch.allclose(read_adapter(old, (5, 5))[0].merged(weight), adapter.merged(weight)) == (rank != 5)


def test_the_graph_keeps_the_input_alone():
    module, adapter, x = build(Case("GLoRA", "linear", Options(3, 2.0)))
    for tensor in adapter.parameters():
        tensor.requires_grad_()
    kept = kept_for_backward(lambda: adapter.on(x.requires_grad_(), Lent(module)))
    assert storages(kept) == storages([x, *adapter.parameters()])


@pytest.mark.parametrize("shape", ((5, 7), (6, 4, 3), (4, 3, 1, 1), (3, 2, 3, 3, 3)), ids=str)
def test_fresh_adapters_are_lycoriss(shape):
    def fresh(seed):
        return GLoRA.create(shape, Options(64, 16.0), torch.Generator().manual_seed(seed)).tensors

    tensors, again, other = fresh(3), fresh(3), fresh(4)
    assert not tensors["a2.weight"].any() and not tensors["b2.weight"].any()
    for name, channels in (("a1.weight", shape[1]), ("b1.weight", shape[0])):
        factor = tensors[name]
        assert factor.shape == (channels, 64, *(1 for _ in shape[2:])) and factor.dtype == torch.float32
        assert 0.9 / 8 < factor.abs().max() <= 1 / 8 and abs(factor.std() * 8 * math.sqrt(3) - 1) < 0.15
        assert torch.equal(factor, again[name]) and not torch.equal(factor, other[name])


def test_dropout_is_on_both_rank_sized_products():
    module, adapter, x = build(Case("GLoRA", "linear 3-D", Options(4, 4.0)))
    adapter = randomised(adapter)
    adapter.tensors["a1.weight"].zero_()  # leaves the second product
    adapter.seed, adapter.dropout = 3, Dropout(rank=0.5)
    hidden = x @ adapter.tensors["b2.weight"].T
    y = adapter.on(x, Lent(module)) - module(x)
    masks = y @ torch.linalg.pinv(adapter.tensors["b1.weight"]).T / hidden
    torch.testing.assert_close(masks, masks[:, :1].expand_as(masks))  # one mask per sample
    torch.testing.assert_close(masks, 2 * (masks > 1).double())


@pytest.mark.parametrize(
    "change, message",
    (
        ({"b2.weight": None}, "b2.weight is missing"),
        ({"b2.weight": torch.zeros(3, 8)}, "do not fit"),
        ({"a1.weight": torch.zeros(8)}, "are no matrices"),
    ),
)
def test_broken_files_are_refused(change, message):
    parts = GLoRA.create((6, 8), Options(2), torch.Generator()).state() | change
    with pytest.raises(ValueError, match=message):
        read_adapter({name: tensor for name, tensor in parts.items() if tensor is not None}, (6, 8))
