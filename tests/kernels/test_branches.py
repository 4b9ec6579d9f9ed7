"""Several adapters on one layer, fused and branched, against W + Σ s (W' − W) in float64."""

import itertools

import pytest
import torch
from torch import nn

from cases import CASES, LAYERS, Lent, build, randomised
from lora_loom.kernels.adapter import Options
from lora_loom.kernels.branches import LayerBranch, can_branch, fused, fused_bias
from lora_loom.kernels.compose import Sliced, Sum, Swapped
from lora_loom.kernels.control import Widened
from lora_loom.kernels.registry import make_adapter


def moved_layer(module, parts):
    """The output of a layer whose weight and bias are W + Σ s (W' − W), by nothing but ``merged``."""
    def run(x):
        with torch.no_grad():
            moved = [adapter.merged(module.weight) - module.weight for adapter, _ in parts]
            weight = module.weight + sum(s * difference for (_, s), difference in zip(parts, moved, strict=True))
            state = {"weight": weight}
            if module.bias is not None:
                biases = [adapter.merged_bias(module.bias) - module.bias for adapter, _ in parts]
                state["bias"] = module.bias + sum(s * d for (_, s), d in zip(parts, biases, strict=True))
            y = torch.func.functional_call(module, state, (x,))
            for adapter, strength in parts:  # a bias for a layer that has none
                extra = adapter.merged_bias(None) if module.bias is None else None
                if extra is not None:
                    y = y + strength * (extra if module.weight.ndim == 2 else extra.view(-1, *(1 for _ in y.shape[2:])))
            return y

    return run


def branched(module, parts, x, branch=None):
    layer = Lent(module)
    branch = branch or LayerBranch([adapter for adapter, _ in parts], layer.geometry)
    branch.set(tuple(strength for _, strength in parts), {})
    with torch.no_grad():
        return branch(x, layer.forward(x), layer)


def lora_on(shape, rank, seed, dtype=torch.float64):
    draws = torch.Generator().manual_seed(seed)
    adapter = make_adapter("LoRA", shape, Options(rank=rank, alpha=1.5), draws)
    return randomised(adapter, seed).to(dtype=dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_family_beside_a_lora(case):
    module, adapter, x = build(case)
    parts = [(randomised(adapter, 3), -0.7)]
    if module.weight.ndim == 2 or module.groups == 1:
        parts += [(lora_on(module.weight.shape, 3, 5), 0.4), (lora_on(module.weight.shape, 2, 6), 1.3)]
    wanted, plain = moved_layer(module, parts)(x), module(x)
    torch.testing.assert_close(branched(module, parts, x), wanted, rtol=1e-9, atol=1e-9)
    weight = fused(module.weight.clone(), parts)
    if module.bias is not None or adapter.merged_bias(None) is None:
        state = {"weight": weight} | ({} if module.bias is None else {"bias": fused_bias(module.bias, parts)})
        torch.testing.assert_close(torch.func.functional_call(module, state, (x,)), wanted, rtol=1e-9, atol=1e-9)
    assert (wanted - plain).norm() > 0.01 * plain.norm()
    assert torch.equal(branched(module, [(part, 0.0) for part, _ in parts], x), plain)


@pytest.mark.parametrize("layer", ["linear", "linear 3-D", "conv2d", "conv1x1", "conv3d"])
def test_strengths_change_and_come_back(layer):
    make, shape = LAYERS[layer]
    torch.manual_seed(1)
    module, x = make().double().requires_grad_(False), torch.randn(shape, dtype=torch.float64)
    adapters = [lora_on(module.weight.shape, rank, rank) for rank in (1, 4, 2)]
    branch = LayerBranch(adapters, Lent(module).geometry)
    for strengths in itertools.product((0.0, 0.5, -2.0), repeat=3):
        parts = list(zip(adapters, strengths, strict=True))
        torch.testing.assert_close(branched(module, parts, x, branch), moved_layer(module, parts)(x))
    assert torch.equal(branched(module, [(a, 0.0) for a in adapters], x, branch), module(x))


def test_parts_of_a_fused_layer():
    """q and v of one file, k of two files, and a LoRA on all rows."""
    torch.manual_seed(2)
    module, x = nn.Linear(7, 15).double().requires_grad_(False), torch.randn(2, 3, 7, dtype=torch.float64)
    q, v = Sliced(lora_on((5, 7), 2, 1), 0, 5, (15, 7)), Sliced(lora_on((5, 7), 3, 2), 10, 5, (15, 7))
    k = [Sliced(lora_on((5, 7), 2, seed), 5, 5, (15, 7)) for seed in (3, 4)]
    swapped = Swapped(lora_on((14, 7), 2, 8))
    whole = lora_on((15, 7), 4, 5)
    parts = [(Sum([q, v]), 0.3), (k[0], -1.1), (Sum([k[1], whole]), 0.8)]
    torch.testing.assert_close(branched(module, parts, x), moved_layer(module, parts)(x))
    torch.testing.assert_close(fused(module.weight.clone(), parts), sum(
        (s * (a.merged(module.weight) - module.weight) for a, s in parts), module.weight))
    other = nn.Linear(7, 14).double().requires_grad_(False)
    torch.testing.assert_close(branched(other, [(swapped, 0.6)], x), moved_layer(other, [(swapped, 0.6)])(x))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("computed", [torch.bfloat16, torch.float32])
def test_nothing_is_kept_wider_than_the_file(stored, computed):
    torch.manual_seed(3)
    module, x = nn.Linear(40, 30).requires_grad_(False).to(computed), torch.randn(6, 40).to(computed)
    adapters = [lora_on((30, 40), 4, seed, stored) for seed in (1, 2)]
    alone, both = (LayerBranch(some, None) for some in (adapters[:1], adapters))
    for branch, parts in ((alone, [(adapters[0], 0.5)]), (both, [(adapters[0], 0.5), (adapters[1], 0.25)])):
        got = branched(module, parts, x, branch)
        wide = nn.Linear(40, 30).double().requires_grad_(False)
        wide.load_state_dict({name: value.double() for name, value in module.state_dict().items()})
        exact = moved_layer(wide, [(adapter.to(dtype=torch.float64), s) for adapter, s in parts])(x.double())
        assert (got - exact).norm() <= (0.02 if computed == torch.bfloat16 else 1e-5) * exact.norm()
    size = min(stored.itemsize, computed.itemsize) * 4 * 70
    assert both.memory() == 2 * size
    assert alone.memory() == (size if computed.itemsize < stored.itemsize or stored.itemsize == computed.itemsize
                              and stored != computed else 0)  # the very tensors, or narrower ones


def test_layers_that_become_wider_are_fused():
    inner = lora_on((6, 9), 2, 1)
    wider = Widened(inner, (6, 4))
    weight = torch.randn(6, 4, dtype=torch.float64)
    assert not can_branch(wider) and not can_branch(Sum([wider])) and can_branch(inner)
    padded = torch.cat([weight, weight.new_zeros(6, 5)], 1)
    torch.testing.assert_close(fused(weight, [(wider, 0.5)]), inner.merged(padded, 0.5))


def test_with_autograd_the_layers_output_stays():
    """Somebody who trains beside a branch has the layer's own output in the graph."""
    torch.manual_seed(4)
    module, x = nn.Linear(5, 4).double(), torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    module.requires_grad_(False)
    adapter = lora_on((4, 5), 2, 1)
    branch = LayerBranch([adapter], None)
    branch.set((0.5,), {})
    base = module(x)
    kept = base.detach().clone()
    y = branch(x, base, Lent(module))
    assert torch.equal(base, kept)
    (got,) = torch.autograd.grad(y.square().sum(), x)
    again = x.detach().requires_grad_(True)
    (wanted,) = torch.autograd.grad((again @ adapter.merged(module.weight, 0.5).T + module.bias).square().sum(), again)
    torch.testing.assert_close(got, wanted)
