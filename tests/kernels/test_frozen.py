"""Frozen layers: gradients with respect to the input against finite differences, weights asked for and given back."""

import pytest
import torch
from torch import nn

from cases import CONVS, LAYERS, LINEARS, Lent
from lora_loom.kernels.frozen import frozen_conv, frozen_linear, frozen_other


def make(name):
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    return build().double(), torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("name", LINEARS)
def test_gradients_of_frozen_linear(name):
    module, x = make(name)
    assert torch.autograd.gradcheck(lambda x: frozen_linear(x, Lent(module)), x.requires_grad_())


@pytest.mark.parametrize("name", CONVS)
def test_gradients_of_frozen_conv(name):
    module, x = make(name)
    assert torch.autograd.gradcheck(lambda x: frozen_conv(x, Lent(module)), x.requires_grad_())


@pytest.mark.parametrize(
    "module, shape, arguments",
    (
        (nn.LayerNorm(5), (2, 3, 5), {}),
        (nn.GroupNorm(2, 4), (2, 4, 3, 3), {}),
        (nn.ConvTranspose2d(3, 2, 3, stride=2), (1, 3, 3, 3), {"output_size": (8, 8)}),
        (nn.Conv2d(2, 3, 3, padding="same", padding_mode="reflect"), (1, 2, 4, 5), {}),
    ),
    ids=("layer norm", "group norm", "transposed conv with an argument", "reflecting conv"),
)
def test_gradients_of_frozen_other(module, shape, arguments):
    layer = Lent(module.double())
    layer.geometry = None
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with torch.no_grad():  # weights unlike ones and zeros
        for tensor in module.parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape, dtype=torch.float64))
    torch.testing.assert_close(frozen_other(x, layer, **arguments), module(x, **arguments))
    assert torch.autograd.gradcheck(lambda x: frozen_other(x, layer, **arguments), x)
