"""Layers whose weights are borrowed: used forward and backward, never saved by autograd.

* ``FrozenLayer``: what a borrowed layer offers: its own forward, its dense weight and bias for a moment.
* ``frozen``: the layer as a function of its input alone; ``frozen_other`` for layers that are neither linear nor
  convolutions.
* ``own_output``: for forwards of autograd Functions: callers may write into what they give.

A host may cast, move or evict a weight between forward and backward, or reuse the buffer a cast went into. So the
graph holds the *layer*: backward asks it for the weight again and gives it back at once. No copy of a weight outlives
a single product.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, Protocol

import torch
from torch import Tensor

from .products import ConvGeometry, conv_input_gradient


class FrozenLayer(Protocol):
    """A layer on loan. ``geometry`` is None for everything but convolutions."""

    geometry: ConvGeometry | None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The owner's own forward."""
        ...

    def weight(self, like: Tensor) -> AbstractContextManager[Tensor]:
        """The dense weight in ``like``'s dtype and device, valid inside the ``with`` only."""
        ...

    def bias(self, like: Tensor) -> Tensor | None:
        """The bias (out,) in ``like``'s dtype and device, the caller's to keep; None where there is none."""
        ...


def no_view(tensor: Tensor) -> Tensor:
    """``tensor`` itself, or the same memory as something that is no view; for code that autograd does not watch."""
    return tensor if tensor._base is None else torch.ops.aten._unsafe_view.default(tensor, tensor.shape)


def own_output(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A Function's ``forward`` whose output is no view.

    Products over more than two dimensions come as views of what was computed inside, where nothing has a history: into
    those nobody may write in place, as hosts do into what their own layers give.
    """

    @wraps(forward)
    def wrapped(*args: Any) -> Tensor:
        return no_view(forward(*args))

    return wrapped


class FrozenConvolution(FrozenLayer, Protocol):
    """A convolution on loan."""

    geometry: ConvGeometry


class _FrozenLinear(torch.autograd.Function):
    """y = x Wᵀ + b; saves nothing."""

    @staticmethod
    @own_output
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
    @own_output
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
    @own_output
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


def frozen(x: Tensor, layer: FrozenLayer) -> Tensor:
    """A linear layer or convolution, differentiable in ``x`` only."""
    return frozen_linear(x, layer) if layer.geometry is None else frozen_conv(x, layer)


def frozen_linear(x: Tensor, layer: FrozenLayer) -> Tensor:
    """x (…, in) → (…, out)."""
    return _FrozenLinear.apply(x, layer)


def frozen_conv(x: Tensor, layer: FrozenLayer) -> Tensor:
    """x (B, in, *space) → (B, out, *space')."""
    return _FrozenConv.apply(x, layer)


def frozen_other(x: Tensor, layer: FrozenLayer, *args: Any, **kwargs: Any) -> Tensor:
    """Any shape; only ``x`` is differentiated."""
    return _FrozenOther.apply(x, layer, args, kwargs)
