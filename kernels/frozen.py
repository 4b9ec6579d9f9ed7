"""Layers whose weights are borrowed: used forward and backward, never saved by autograd.

* ``FrozenLayer``: what a borrowed layer offers (its own forward, and its dense weight for the time of one product).
* ``frozen_linear``, ``frozen_conv``, ``frozen_other``: differentiable with respect to the input only.

A host may cast, move or evict a weight between forward and backward, or reuse the buffer a cast went into. So the
graph holds the *layer*: backward asks it for the weight again and gives it back at once. No copy of a weight outlives
a single product.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ConvGeometry:
    """How a convolution walks over its input; one entry per spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @property
    def dimensions(self) -> int:
        return len(self.stride)


class FrozenLayer(Protocol):
    """A layer on loan. ``geometry`` is None for everything but convolutions."""

    geometry: ConvGeometry | None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The owner's own forward."""
        ...

    def weight(self, like: Tensor) -> AbstractContextManager[Tensor]:
        """The dense weight in ``like``'s dtype and device, valid inside the ``with`` only."""
        ...


class FrozenConvolution(FrozenLayer, Protocol):
    """A convolution on loan."""

    geometry: ConvGeometry


def is_pointwise(weight: Tensor, geometry: ConvGeometry) -> bool:
    """A kernel of one pixel: the same matrix at every position."""
    return math.prod((*weight.shape[2:], *geometry.stride, geometry.groups)) == 1 and not any(geometry.padding)


def wants_product(grad: Tensor, weight: Tensor, geometry: ConvGeometry) -> bool:
    """Whether the input gradient is cheaper as one matrix product than from the convolution library (dev/LOG.md).

    Measured on CPUs: for 1×1 kernels, and for weights beyond 32 MB that meet few positions, whose reordering is most
    of the library's time.
    """
    if grad.device.type != "cpu" or grad.dtype not in (torch.float32, torch.float64):
        return False
    if is_pointwise(weight, geometry):
        return True
    size = weight.numel()
    if size < 8_000_000 or geometry.dimensions != 2 or geometry.groups != 1:
        return False
    few = 32 * grad.numel() // grad.shape[1]
    return size // weight.shape[0] >= few


def conv_input_gradient(grad: Tensor, shape: torch.Size, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """∂L/∂x of ``y = conv(x, weight)`` for an input of ``shape``; the input itself is not needed."""
    if wants_product(grad, weight, geometry):
        return conv_input_gradient_by_product(shape, geometry, (grad, weight))
    placeholder = grad.new_empty(shape)  # never read; anything but plain contiguous would be copied into that
    return conv_gradients(grad, placeholder, weight, geometry, (True, False))[0]


def conv_input_gradient_by_product(shape: torch.Size, geometry: ConvGeometry, *parts: tuple[Tensor, Tensor]) -> Tensor:
    """∂L/∂x of y = Σ conv(x, Wᵢ) from pairs (∂L/∂conv(x, Wᵢ), Wᵢ): columns Σ Wᵢᵀ gradᵢ, then overlaps added up."""
    (grad, weight), *others = parts
    columns = _transposed(weight, grad) @ grad.flatten(2)  # (N, in·kernel, positions)
    for other_grad, other in others:
        columns.baddbmm_(_transposed(other, other_grad), other_grad.flatten(2))
    if columns.numel() == shape.numel():
        return columns.view(shape)
    return F.fold(columns, shape[2:], weight.shape[2:], geometry.dilation, geometry.padding, geometry.stride)


def _transposed(weight: Tensor, grad: Tensor) -> Tensor:
    """(N, in·kernel, out) without a copy."""
    return weight.flatten(1).T.expand(len(grad), -1, -1)


def conv_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: ConvGeometry, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """(∂L/∂x, ∂L/∂weight) of ``y = conv(x, weight)``; what is not ``wanted`` is None."""
    zeros = [0] * geometry.dimensions
    gradients = torch.ops.aten.convolution_backward.default(
        grad,
        x,
        weight,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        zeros,
        geometry.groups,
        [*wanted, False],
    )
    return gradients[0], gradients[1]


class _FrozenLinear(torch.autograd.Function):
    """y = x Wᵀ + b; saves nothing."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: FrozenLayer) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return layer.forward(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.to(ctx.dtype)
        with ctx.layer.weight(grad) as weight:
            return grad @ weight, None


class _FrozenConv(torch.autograd.Function):
    """y = conv(x, W) + b; saves the input's shape."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: FrozenLayer) -> Tensor:
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        return layer.forward(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.to(ctx.dtype)
        with ctx.layer.weight(grad) as weight:
            return conv_input_gradient(grad, ctx.shape, weight, ctx.layer.geometry), None


class _FrozenOther(torch.autograd.Function):
    """Any other layer (norms, …): saves the input and runs the owner's forward once more in backward."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: FrozenLayer, args: tuple, kwargs: dict) -> Tensor:
        ctx.layer, ctx.args, ctx.kwargs = layer, args, kwargs
        ctx.save_for_backward(x)
        return layer.forward(x, *args, **kwargs)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            again = x.detach().requires_grad_(True)
            y = ctx.layer.forward(again, *ctx.args, **ctx.kwargs)
        return torch.autograd.grad(y, again, grad)[0], None, None, None


def frozen_linear(x: Tensor, layer: FrozenLayer) -> Tensor:
    """x (…, in) → (…, out)."""
    return _FrozenLinear.apply(x, layer)


def frozen_conv(x: Tensor, layer: FrozenLayer) -> Tensor:
    """x (B, in, *space) → (B, out, *space')."""
    return _FrozenConv.apply(x, layer)


def frozen_other(x: Tensor, layer: FrozenLayer, *args: Any, **kwargs: Any) -> Tensor:
    """Any shape; only ``x`` is differentiated."""
    return _FrozenOther.apply(x, layer, args, kwargs)
