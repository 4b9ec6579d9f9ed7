"""Adapters by way of their dense weight, for the layers on which a family has nothing better.

* ``through_weight``: the layer with W' in place of W.
* ``dense_contribution``: (W' − W) x.

For backward both keep the input alone: W' is made again from the layer's weight and forgotten again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .adapter import Adapter, wide
from .frozen import FrozenLayer, own_output
from .products import apply_weight, input_gradient, per_channel, weight_gradient


def through_weight(adapter: Adapter, x: Tensor, layer: FrozenLayer) -> Tensor:
    """W' x + b; differentiable in ``x`` and the adapter's tensors."""
    return _Dense.apply(x, layer, adapter, True, *adapter.tensors.values())


def dense_contribution(adapter: Adapter, x: Tensor, layer: FrozenLayer) -> Tensor:
    """(W' − W) x; differentiable in ``x`` and the adapter's tensors."""
    return _Dense.apply(x, layer, adapter, False, *adapter.tensors.values())


class _Dense(torch.autograd.Function):
    """W' x + b if ``whole``, else (W' − W) x; saves x and the adapter's own tensors."""

    @staticmethod
    @own_output
    def forward(ctx, x: Tensor, layer: FrozenLayer, adapter: Adapter, whole: bool, *tensors: Tensor):
        ctx.layer, ctx.adapter, ctx.whole = layer, adapter, whole
        ctx.save_for_backward(x, *tensors)
        # in half precision W' would round a small difference away: there the difference has a product of its own
        at_once = whole and wide(x) is x
        with layer.weight(x) as weight:
            change = adapter.difference(weight)
            y = apply_weight(x, (change + weight if at_once else change).to(x.dtype), layer.geometry)
        if whole and not at_once:
            return layer.forward(x).add_(y)
        bias = layer.bias(y) if whole else None
        return y if bias is None else y.add_(per_channel(bias, layer.geometry))

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, *tensors = ctx.saved_tensors
        needs_x, geometry, grad_x = ctx.needs_input_grad[0], ctx.layer.geometry, None
        grad = grad.to(x.dtype)
        trained = [n for n, needed in enumerate(ctx.needs_input_grad[4:]) if needed]
        leaves = [t.detach().requires_grad_(n in trained) for n, t in enumerate(tensors)]
        gradients: list[Tensor | None] = [None] * len(leaves)
        with ctx.layer.weight(grad) as weight:
            with torch.enable_grad():
                names = ctx.adapter.tensors
                change = ctx.adapter.with_tensors(dict(zip(names, leaves, strict=True))).difference(weight)
            if needs_x:
                used = (change.detach() + weight if ctx.whole else change.detach()).to(x.dtype)
                grad_x = input_gradient(grad, x.shape, used, geometry)
            if trained:
                product = weight_gradient(grad, x, weight, geometry)
                wanted = [leaves[n] for n in trained]
                found = torch.autograd.grad(change, wanted, product.to(change.dtype).view(change.shape))
                for n, gradient in zip(trained, found, strict=True):
                    gradients[n] = gradient
        return grad_x, None, None, None, *gradients
