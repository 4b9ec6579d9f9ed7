"""Adapters for a layer with its halves exchanged, for another weight, for more inputs."""

import copy

import pytest
import torch
from torch import nn

from cases import Lent, with_weight
from lora_loom.kernels.adapter import Dropout, Options
from lora_loom.kernels.compose import Sliced, Sum, Swapped
from lora_loom.kernels.control import Replacement, Widened
from lora_loom.kernels.full import Full
from lora_loom.kernels.ia3 import PEFT, PeftIA3
from lora_loom.kernels.products import apply_weight, per_channel
from lora_loom.kernels.registry import make_adapter


def made(family, shape, seed=0):
    draws = torch.Generator().manual_seed(seed)
    adapter = make_adapter(family, shape, Options(2, 1.0, block_size=2), draws)
    tensors = {name: torch.randn(t.shape, generator=draws, dtype=torch.float64) for name, t in adapter.tensors.items()}
    return adapter.with_tensors(tensors)


LAYERS = [(nn.Linear(4, 6), (3, 4)), (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5))]


@pytest.mark.parametrize(("layer", "size"), LAYERS, ids=["linear", "conv"])
@pytest.mark.parametrize("family", ["LoRA", "OFT", "full"])
def test_branch_and_merge_agree(layer, size, family):
    layer, x = layer.double(), torch.randn(size, dtype=torch.float64)
    shape = tuple(layer.weight.shape)
    inner = made(family, shape)
    part = Sliced(Swapped(made(family, (4, *shape[1:]))), 2, 4, shape)
    for adapter in (Swapped(inner), part, Sum([part, Swapped(inner)]), Replacement(torch.randn_like(layer.weight))):
        for strength in (1.0, -0.5):
            merged = adapter.merged(layer.weight, strength)
            wanted = with_weight(layer, merged, x, adapter.merged_bias(layer.bias, strength))
            torch.testing.assert_close(adapter.branch(x, layer(x), Lent(layer), strength), wanted)


@pytest.mark.parametrize(("layer", "size"), LAYERS, ids=["linear", "conv"])
def test_biases_for_a_layer_without_one(layer, size):
    """They reach their rows of the fused layer; those of several kinds add up as the outputs do."""
    layer, x = copy.deepcopy(layer).double(), torch.randn(size, dtype=torch.float64)
    shape, bias = tuple(layer.weight.shape), torch.randn(6, dtype=torch.float64)
    rows, whole = (Full({"diff_b": torch.randn(n, dtype=torch.float64)}, (n, *shape[1:])) for n in (2, 6))
    rescaled = PeftIA3({PEFT: torch.randn(6, 1, dtype=torch.float64)}, shape, False)
    part, swapped_part = Sliced(rows, 3, 2, shape), Sliced(Swapped(rows), 1, 2, shape)
    for adapter in (part, swapped_part, Sum([part, whole]), Sum([rescaled, part]), Sum([whole, rescaled, rescaled])):
        for own in (None, bias):
            layer.bias = None if own is None else nn.Parameter(own, requires_grad=False)
            for strength in (1.0, -0.5, 0.0):
                total = adapter.merged_bias(own, strength)
                merged = apply_weight(x, adapter.merged(layer.weight, strength), Lent(layer).geometry)
                if total is not None:
                    merged = merged + per_channel(total, Lent(layer).geometry)
                torch.testing.assert_close(adapter.branch(x, layer(x), Lent(layer), strength), merged)
    assert Sliced(made("LoRA", (2, *shape[1:])), 3, 2).merged_bias(None) is None


def test_other_values_leave_the_rest_as_it_is():
    """Also of adapters made of adapters: what drops out, and the seed of the step."""
    inner = made("LoRA", (6, 4))
    several = Sum([inner, Sliced(made("LoRA", (2, 4)), 1, 2, (6, 4))])
    for adapter in (inner, several, Sliced(inner, 1, 6, (8, 4)), Swapped(inner), Widened(inner, (6, 2))):
        adapter.dropout, adapter.seed = Dropout(network=0.5), 3
        other = adapter.to(dtype=torch.float32)
        assert (other.dropout, other.seed, other.shape) == (adapter.dropout, 3, adapter.shape)
        assert [id(t) for t in other.parameters()] == [id(t) for t in other.tensors.values()]
        assert {t.dtype for t in other.tensors.values()} == {torch.float32}


def test_halves_are_exchanged():
    weight, difference = torch.randn(6, 4), torch.randn(6, 4)
    adapter = Swapped(Full({"diff": difference, "diff_b": torch.arange(6.0)}, (6, 4)))
    wanted = torch.cat([difference[3:], difference[:3]])
    torch.testing.assert_close(adapter.merged(weight, 2.0), weight + 2 * wanted)
    assert adapter.merged_bias(torch.zeros(6)).tolist() == [3, 4, 5, 0, 1, 2]
    assert torch.equal(adapter.norm(), difference.norm())
    with pytest.raises(ValueError, match="5 rows have no halves"):
        Swapped(Full({"diff": torch.ones(5, 4)}, (5, 4)))


def test_a_wider_layer():
    inner = made("LoRA", (6, 9))
    adapter = Widened(inner, (6, 4))
    weight = torch.randn(6, 4, dtype=torch.float64)
    wider = torch.cat([weight, torch.zeros(6, 5, dtype=torch.float64)], 1)
    torch.testing.assert_close(adapter.merged(weight, 0.5), wider + 0.5 * inner.delta())
    torch.testing.assert_close(adapter.merged(weight, 0.0), wider)
    layer = nn.Linear(4, 6).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    for act in (lambda: adapter.difference(weight), lambda: adapter.branch(x, layer(x), Lent(layer))):
        with pytest.raises(ValueError, match="it can only be merged"):
            act()
