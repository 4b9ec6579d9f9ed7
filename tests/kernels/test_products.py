"""The input gradient of convolutions as one matrix product, against autograd."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F

from lora_loom.kernels.adapter import Options
from lora_loom.kernels.lora import LoRA
from lora_loom.kernels.products import ConvGeometry, conv_input_gradient_by_product, wants_product

GEOMETRIES = {
    "3×3": (ConvGeometry((1, 1), (1, 1), (1, 1)), (3, 3)),
    "strided": (ConvGeometry((2, 2), (1, 1), (1, 1)), (3, 3)),
    "dilated, uneven": (ConvGeometry((2, 1), (2, 0), (2, 1)), (3, 2)),
    "1×1": (ConvGeometry((1, 1), (0, 0), (1, 1)), (1, 1)),
    "patches": (ConvGeometry((3, 2), (0, 0), (1, 1)), (3, 2)),  # as many columns as the input has numbers
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_two_kernels_at_once(name):
    geometry, kernel = GEOMETRIES[name]
    draws = torch.Generator().manual_seed(0)
    x = torch.randn((2, 3, 9, 8), generator=draws, dtype=torch.float64, requires_grad=True)
    wide, narrow = (torch.randn((out, 3, *kernel), generator=draws, dtype=torch.float64) for out in (7, 2))
    outputs = [F.conv2d(x, w, None, geometry.stride, geometry.padding, geometry.dilation) for w in (wide, narrow)]
    grads = [torch.randn(y.shape, generator=draws, dtype=torch.float64) for y in outputs]
    (expected,) = torch.autograd.grad(outputs, x, grads)
    parts = zip(grads, (wide, narrow), strict=True)
    torch.testing.assert_close(conv_input_gradient_by_product(x.shape, geometry, *parts), expected)


class _Layer:
    """A 3×3 convolution on loan."""

    geometry = GEOMETRIES["3×3"][0]

    def __init__(self, weight):
        self.own = weight

    def forward(self, x):
        return F.conv2d(x, self.own, padding=1)

    def weight(self, like):
        return nullcontext(self.own)


def test_a_large_weight_at_few_positions_takes_the_product():
    """Both roads give the same gradients; the figures that decide between them are in dev/LOG.md."""
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn((950, 950, 3, 3), generator=draws) / 100
    adapter = LoRA.create(weight.shape, Options(4, 4.0), draws)
    adapter.up.normal_(generator=draws)
    x = torch.randn((1, 950, 4, 4), generator=draws)
    grad = torch.randn((1, 950, 4, 4), generator=draws)
    assert wants_product(grad, weight, _Layer.geometry)
    assert not wants_product(torch.randn(1, 950, 64, 64), weight, _Layer.geometry)
    tensors = [x, adapter.down, adapter.up]
    for tensor in tensors:
        tensor.requires_grad_(True)
    got = torch.autograd.grad(adapter.on(x, _Layer(weight)), tensors, grad)
    expected = torch.autograd.grad(adapter.branch(x, F.conv2d(x, weight, padding=1), _Layer(weight)), tensors, grad)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)
