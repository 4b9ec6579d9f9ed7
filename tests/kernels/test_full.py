"""Differences of weights, biases and norm layers: against LyCORIS and closed forms; what comes alone; precision."""

import pytest
import torch
from torch import nn

import run_host
from cases import CASES, Case, Lent, build, kept_for_backward, randomised, with_weight
from lora_loom.kernels.adapter import Options
from lora_loom.kernels.full import Full
from lora_loom.kernels.lora import DOWN, UP
from lora_loom.kernels.registry import make_adapter, read_adapter

run_host.prepare_imports()

from lycoris.modules.full import FullModule  # noqa: E402
from lycoris.modules.norms import NormModule  # noqa: E402

STRENGTHS = (1.0, 0.5, -0.7)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("case", [case for case in CASES if case.family == "full"], ids=str)
def test_output_equals_lycoris(case, strength):
    module, adapter, x = build(case)
    adapter = randomised(adapter)
    weight, bias = adapter.merged(module.weight, strength), adapter.merged_bias(module.bias, strength)
    if not case.options.bias:
        expected_bias = module.bias
    else:
        zero = 0 if module.bias is None else module.bias
        expected_bias = zero + strength * adapter.tensors["diff_b"]
    torch.testing.assert_close(weight, module.weight + strength * adapter.tensors["diff"], rtol=1e-9, atol=0)
    assert (bias is None) == (expected_bias is None)
    if bias is not None:
        torch.testing.assert_close(bias, expected_bias, rtol=1e-9, atol=0)
    ours = with_weight(module, weight, x, bias), adapter.branch(x, module(x), Lent(module), strength)
    if case.options.bias and module.bias is None:
        torch.testing.assert_close(*ours)
        return  # LyCORIS trains no bias where there is none
    network = FullModule("layer", module, strength).to(x.dtype)
    with torch.no_grad():
        network.weight.copy_(adapter.tensors["diff"])
        if case.options.bias:
            network.bias.copy_(adapter.tensors["diff_b"])
    network.apply_to()
    for output in ours:
        torch.testing.assert_close(output, module(x), rtol=1e-6, atol=1e-8)


NORMS = {
    "layer norm": (lambda: nn.LayerNorm(6), (2, 5, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (2, 6, 4, 3)),
}


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("name", NORMS)
def test_norm_layers_equal_lycoris(name, strength):
    torch.manual_seed(0)
    make, shape = NORMS[name]
    module, x = make().double().requires_grad_(False), torch.randn(shape, dtype=torch.float64)
    module.weight.copy_(torch.randn(6))
    module.bias.copy_(torch.randn(6))
    parts = {"w_norm": torch.randn(6, dtype=torch.float64), "b_norm": torch.randn(6, dtype=torch.float64)}
    adapter, left = read_adapter(parts, (6,))
    assert not left and adapter.state().keys() == parts.keys()
    merged = adapter.merged(module.weight, strength), adapter.merged_bias(module.bias, strength)
    ours = with_weight(module, merged[0], x, merged[1])
    network = NormModule("layer", module, strength).double()
    with torch.no_grad():
        network.w_norm.copy_(parts["w_norm"])
        network.b_norm.copy_(parts["b_norm"])
    network.apply_to()
    torch.testing.assert_close(ours, module(x), rtol=1e-6, atol=1e-8)


def test_a_bias_comes_alone():
    """b_norm without w_norm, diff_b without diff, and that for layers that have no bias."""
    extra, bias, weight = torch.randn(6), torch.randn(6), torch.randn(6)
    for name, target in (("b_norm", weight), ("diff_b", torch.randn(6, 4))):
        for shape in (tuple(target.shape), None):
            adapter, left = read_adapter({name: extra}, shape)
            assert not left and torch.equal(adapter.merged(target), target)
            torch.testing.assert_close(adapter.merged_bias(bias, -0.7), bias - 0.7 * extra)
            torch.testing.assert_close(adapter.merged_bias(None, 0.5), 0.5 * extra)
            assert torch.equal(adapter.merged_bias(bias, 0.0), bias) and adapter.merged_bias(None, 0.0) is None
    for module, x in ((nn.Linear(4, 6), torch.randn(2, 3, 4)), (nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5))):
        module.requires_grad_(False)
        adapter, _ = read_adapter({"diff_b": extra}, module.weight.shape)
        expected = with_weight(module, module.weight, x, module.bias + extra)
        torch.testing.assert_close(adapter.branch(x, module(x), Lent(module)), expected)
        torch.testing.assert_close(adapter.on(x, Lent(module)), expected)


def test_a_bias_beside_a_lora_adds_up():
    module, adapter, x = build(Case("LoRA", "linear", Options(2, 1.5)))
    adapter, extra = randomised(adapter), torch.randn(12)
    both, left = read_adapter({**adapter.state(), "diff_b": extra}, module.weight.shape)
    assert not left
    for strength in STRENGTHS:
        bias = module.bias + strength * extra
        expected = with_weight(module, adapter.merged(module.weight, strength), x, bias)
        torch.testing.assert_close(both.branch(x, module(x), Lent(module), strength), expected)
        torch.testing.assert_close(both.merged_bias(module.bias, strength), bias)


def test_several_kinds_on_one_layer_add_up():
    """The host keeps the last one (its own test is in tests/host/test_host_adapter_errors.py)."""
    weight = torch.randn(6, 4)
    parts = {DOWN: torch.randn(2, 4), UP: torch.randn(6, 2), "diff": torch.randn(6, 4)}
    adapter, left = read_adapter(parts, (6, 4))
    assert not left
    torch.testing.assert_close(adapter.merged(weight, 0.5), weight + 0.5 * (parts[UP] @ parts[DOWN] + parts["diff"]))


def test_linear_layers_and_pointwise_convolutions_are_the_same():
    difference, weight = torch.randn(6, 4), torch.randn(6, 4)
    flat, _ = read_adapter({"diff": difference[..., None, None]}, (6, 4))
    spatial, _ = read_adapter({"diff": difference}, (6, 4, 1, 1))
    assert flat.tensors["diff"].shape == (6, 4) and spatial.tensors["diff"].shape == (6, 4, 1, 1)
    torch.testing.assert_close(flat.merged(weight), weight + difference)
    torch.testing.assert_close(spatial.merged(weight[..., None, None]).flatten(1), weight + difference)
    unknown, _ = read_adapter({"diff": difference}, None)
    torch.testing.assert_close(unknown.merged(weight[..., None, None]).flatten(1), weight + difference)


@pytest.mark.parametrize("parts, shape", (
    ({"diff": (4, 6)}, (6, 4)),
    ({"diff": (6, 4, 3, 3)}, (6, 4)),
    ({"diff": (6, 4), "diff_b": (4,)}, (6, 4)),
    ({"w_norm": (5,)}, (6,)),
    ({"b_norm": (5,)}, (6,)),
))
def test_what_does_not_fit_is_refused(parts, shape):
    with pytest.raises(ValueError, match="the layer needs"):
        Full.read({name: torch.zeros(size) for name, size in parts.items()}, shape)
    with pytest.raises(ValueError, match="none of diff, w_norm, diff_b, b_norm"):
        Full.read({}, shape)


def test_norm_layers_and_embeddings_are_merged_only():
    norm, embedding = nn.LayerNorm(6), nn.Embedding(7, 6)
    of_norm, _ = read_adapter({"w_norm": torch.ones(6)}, (6,))
    x = torch.randn(2, 6)
    with pytest.raises(ValueError, match="merge them"):
        of_norm.branch(x, norm(x), Lent(norm))
    of_rows, _ = read_adapter({"diff": torch.ones(7, 6)}, (7, 6))
    tokens = torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match="merge them"):
        of_rows.branch(tokens, embedding(tokens), Lent(embedding))
    torch.testing.assert_close(of_rows.merged(embedding.weight.detach()), embedding.weight.detach() + 1)


def test_small_differences_survive_half_precision():
    """What W + diff would round away, as every difference is at the start of a training run, reaches the output."""
    module = nn.Linear(64, 4, bias=False).bfloat16().requires_grad_(False)
    module.weight.fill_(1.0)
    signs = torch.tensor([1.0, -1.0]).repeat(32)
    adapter = make_adapter("full", (4, 64), Options(), torch.Generator())
    adapter.tensors["diff"].copy_(2**-11 * signs.expand(4, 64))
    assert torch.equal(adapter.merged(module.weight), module.weight)
    y = adapter.on(signs[None].bfloat16(), Lent(module))
    assert torch.equal(y, torch.full_like(y, 64 * 2**-11))


def test_the_graph_keeps_the_input():
    module, adapter, x = build(Case("full", "linear", Options(bias=True)))
    for tensor in adapter.parameters():
        tensor.requires_grad_()
    kept = kept_for_backward(lambda: adapter.on(x.requires_grad_(), Lent(module)))
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), adapter.tensors["diff"].data_ptr()}


def test_fresh_adapters():
    for shape in ((6, 4), (6, 4, 3, 3)):
        plain = Full.create(shape, Options(), torch.Generator())
        assert plain.tensors.keys() == {"diff"} and plain.tensors["diff"].shape == shape
        assert plain.alpha is None and "alpha" not in plain.state()
        both = Full.create(shape, Options(bias=True), torch.Generator())
        assert both.tensors["diff_b"].shape == (6,) and not any(tensor.any() for tensor in both.tensors.values())
