"""Layers that share their input: the same numbers as one by one, gradients against finite differences."""

import pytest
import torch
from torch import nn

from cases import Lent, kept_for_backward, randomised
from lora_loom.kernels.adapter import Dropout, Options
from lora_loom.kernels.lora import DyLoRA, LoRA
from lora_loom.kernels.siblings import can_share, on_shared

WIDTHS, RANKS, ALPHAS = (6, 4, 9), (2, 3, 1), (2.0, 0.6, -1.5)


def siblings(dtype=torch.float64, width=7):
    torch.manual_seed(0)
    pairs = []
    for n, (out, rank, alpha) in enumerate(zip(WIDTHS, RANKS, ALPHAS, strict=True)):
        adapter = LoRA.create((out, width), Options(rank, alpha), torch.Generator().manual_seed(n)).to(dtype=dtype)
        pairs.append((randomised(adapter, n), Lent(nn.Linear(width, out, bias=n != 1).to(dtype))))
    return pairs


@pytest.mark.parametrize("shape", ((5, 7), (2, 3, 7), (2, 3, 2, 7)), ids=str)
def test_the_same_as_one_by_one(shape):
    pairs, x = siblings(), torch.randn(shape, dtype=torch.float64)
    tensors = [x, *(tensor for adapter, _ in pairs for tensor in adapter.parameters())]
    for tensor in tensors:
        tensor.requires_grad_()
    together = on_shared(x, pairs)
    apart = [adapter.on(x, layer) for adapter, layer in pairs]
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other)
    gradients = [torch.autograd.grad(sum(y.square().sum() for y in ys), tensors) for ys in (together, apart)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("input_too", (True, False))
def test_gradients(input_too):
    pairs, x = siblings(), torch.randn(2, 3, 7, dtype=torch.float64).requires_grad_(input_too)
    factors = [t.requires_grad_() for adapter, _ in pairs for t in (adapter.down, adapter.up)]

    def run(x, *factors):
        made = [
            (LoRA(down, up, adapter.alpha), layer)
            for down, up, (adapter, layer) in zip(factors[::2], factors[1::2], pairs, strict=True)
        ]
        return on_shared(x, made)

    assert torch.autograd.gradcheck(run, [x, *factors])


def test_an_output_nobody_uses():
    """Autograd hands zeros for it; the others' gradients are theirs."""
    pairs, x = siblings(), torch.randn(5, 7, dtype=torch.float64)
    for adapter, _ in pairs:
        for tensor in adapter.parameters():
            tensor.requires_grad_()
    first, *_ = on_shared(x, pairs)
    gradients = torch.autograd.grad(first.sum(), [pairs[0][0].up, pairs[1][0].up])
    alone = pairs[0][0].on(x, pairs[0][1]).sum()
    torch.testing.assert_close(gradients[0], torch.autograd.grad(alone, pairs[0][0].up)[0])
    assert not gradients[1].any()


@pytest.mark.parametrize("half", (torch.bfloat16, torch.float16))
def test_half_precision(half):
    pairs, x = siblings(torch.float32), torch.randn(5, 7)
    exact = on_shared(x, pairs)
    got = on_shared(x.to(half), pairs)
    for one, other in zip(got, exact, strict=True):
        assert one.dtype == half
        assert (one.float() - other).norm() < 0.02 * other.norm()


def test_only_the_input_is_kept():
    pairs, x = siblings(), torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    for adapter, _ in pairs:
        adapter.up.requires_grad_()
    kept = [tuple(tensor.shape) for tensor in kept_for_backward(lambda: on_shared(x, pairs))]
    assert sorted(kept) == sorted([(5, 7), *(tuple(t.shape) for adapter, _ in pairs for t in adapter.parameters())])


def test_who_can_share():
    adapter = siblings()[0][0]
    assert can_share(adapter)
    adapter.seed = 3
    assert can_share(adapter)  # nothing is left out
    adapter.dropout = Dropout(rank=0.5)
    assert not can_share(adapter)
    assert not can_share(DyLoRA(adapter.down, adapter.up, 1.0))
    assert not can_share(LoRA(torch.zeros(2, 3, 1, 1), torch.zeros(4, 2, 1, 1), 1.0))
    assert not can_share(None)
