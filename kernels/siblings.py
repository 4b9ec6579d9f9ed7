"""LoRA on several linear layers that take the same input: query, key and value.

* ``on_shared``: all their outputs at once. The narrow products of all adapters are one product with the stacked
  ``down`` factors, forward and backward, and the input's gradient is summed in place instead of once per layer.

Kept for backward: the input, once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .frozen import FrozenLayer, no_view
from .lora import LoRA


def can_share(adapter: object) -> bool:
    """Whether ``on_shared`` serves this adapter: a plain LoRA, trained whole, on a linear layer, without dropout."""
    if type(adapter) is not LoRA or adapter.shape is None or len(adapter.shape) != 2:
        return False
    return adapter.seed is None or not adapter.dropout


def on_shared(x: Tensor, pairs: Sequence[tuple[LoRA, FrozenLayer]]) -> tuple[Tensor, ...]:
    """[W x + b + ΔW x] over x (…, in) for each pair of adapter and layer; equals ``adapter.on(x, layer)`` for each."""
    factors = [tensor for adapter, _ in pairs for tensor in (adapter.down, adapter.up)]
    scales = tuple(adapter.scale for adapter, _ in pairs)
    return _SharedInput.apply(x, scales, tuple(layer for _, layer in pairs), *factors)


class _SharedInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scales: tuple[float, ...], layers: tuple[FrozenLayer, ...], *factors: Tensor):
        downs, ups = factors[::2], factors[1::2]
        hidden = _rows(x) @ _stacked(downs, x).T
        outputs = []
        for layer, scale, up, own in zip(layers, scales, ups, _split(hidden, downs), strict=True):
            y = layer.forward(x)
            y.view(-1, y.shape[-1]).addmm_(own.to(y.dtype), up.to(y.dtype).T, alpha=scale)
            outputs.append(no_view(y))
        ctx.layers, ctx.scales = layers, scales
        ctx.save_for_backward(x, *factors)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        x, *factors = ctx.saved_tensors
        downs, ups = factors[::2], factors[1::2]
        rows, stacked = _rows(x), _stacked(downs, x)
        hidden = _split(rows @ stacked.T, downs)
        grads = [_rows(gradient.to(x.dtype)) for gradient in gradients]
        parts = zip(grads, ups, ctx.scales, strict=True)
        narrow = torch.cat([(grad @ up.to(x.dtype)).mul_(scale) for grad, up, scale in parts], 1)
        grad_downs = (narrow.T @ rows).split([len(down) for down in downs])
        found: list[Tensor] = []
        for grad, own, scale, down, grad_down in zip(grads, hidden, ctx.scales, downs, grad_downs, strict=True):
            found += [grad_down.to(down.dtype), (own.T @ grad).T.to(down.dtype).mul_(scale)]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = narrow @ stacked
            for layer, grad in zip(ctx.layers, grads, strict=True):
                with layer.weight(grad) as weight:
                    grad_x.addmm_(grad, weight)
            grad_x = grad_x.view(x.shape)
        return grad_x, None, None, *found


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _stacked(downs: Sequence[Tensor], like: Tensor) -> Tensor:
    """(Σ ranks, in)"""
    return torch.cat([down.to(like.dtype) for down in downs])


def _split(hidden: Tensor, downs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return hidden.split([len(down) for down in downs], 1)
