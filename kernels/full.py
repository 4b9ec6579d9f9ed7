"""Differences stored as they are: of weights, of biases, of norm layers.

* ``Full``: W' = W + diff, b' = b + diff_b (``lycoris/modules/full.py``), and the same for norm layers under the names
  w_norm and b_norm (``lycoris/modules/norms.py``). Any of them may come alone. There is no alpha.
* ``Full._on``: one product with W + diff forward and one backward, as if the layer itself were trained; kept for
  backward is the input alone. In half precision W + diff would round small differences away: there the difference has
  a product of its own in forward.

Norm layers are merged: what they add to their output cannot be told from the output (1 / √variance is gone).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import Self

from .adapter import Additive, Options, fitted, wide
from .frozen import FrozenLayer, own_output
from .products import (
    apply_weight,
    channel_dim,
    channel_sum,
    conv_input_gradient,
    convolve,
    per_channel,
    weight_gradient,
)

WEIGHTS, BIASES = ("diff", "w_norm"), ("diff_b", "b_norm")


class Full(Additive):
    """``diff`` or ``w_norm`` in the weight's shape, ``diff_b`` or ``b_norm`` (out,), each of them optional."""

    name = "full"

    @classmethod
    def create(cls, shape: Sequence[int], options: Options, draws: torch.Generator) -> Self:
        """Zeros; with ``options.bias`` of the bias too. Nothing is drawn."""
        tensors = {"diff": torch.zeros(tuple(shape))}
        return cls(tensors | ({"diff_b": torch.zeros(shape[0])} if options.bias else {}), shape)

    @classmethod
    def read(cls, parts: Mapping[str, Tensor], shape: Sequence[int] | None) -> Self:
        tensors = {name: parts[name] for name in (*WEIGHTS, *BIASES) if name in parts}
        if not tensors:
            raise ValueError(f"none of {', '.join((*WEIGHTS, *BIASES))} is there")
        if shape is None:
            shape = next((tensors[name].shape for name in WEIGHTS if name in tensors), None)
        if shape is not None:
            sizes = {name: tuple(shape if name in WEIGHTS else shape[:1]) for name in tensors}
            tensors = {name: fitted(tensor, sizes[name], name) for name, tensor in tensors.items()}
        return cls(tensors, shape)

    @property
    def factors(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(name for name in WEIGHTS if name in self.tensors)

    def delta(self) -> Tensor:
        """diff, in the weight's shape. Raises ValueError where a bias is all there is and no shape is known."""
        if not self.factors:
            if self.shape is None:
                raise ValueError("this adapter changes a bias only")
            return next(iter(self.tensors.values())).new_zeros(self.shape)
        first, *others = (self.tensors[name] for name in self.factors)
        return sum(others, first)

    def difference(self, weight: Tensor) -> Tensor:
        return super().difference(weight) if self.factors else torch.zeros_like(wide(weight))

    def bias_difference(self) -> Tensor | None:
        """(out,), or None where the bias stays."""
        found = [self.tensors[name] for name in BIASES if name in self.tensors]
        return sum(found[1:], found[0]) if found else None

    def merged_bias(self, bias: Tensor | None, strength: float = 1.0) -> Tensor | None:
        extra = self.bias_difference()
        if extra is None or strength == 0:
            return super().merged_bias(bias, strength)
        if bias is None:
            return strength * extra
        return (wide(bias) + strength * wide(extra).to(bias.device)).to(bias.dtype)

    def contribution(self, x: Tensor, base_out: Tensor, layer: FrozenLayer) -> Tensor:
        self._needs_products(x)
        bias = self.bias_difference()
        extra = None if bias is None else per_channel(bias.to(x.dtype), layer.geometry).expand_as(base_out)
        if not self.factors:
            assert extra is not None
            return extra
        own = super().contribution(x, base_out, layer)
        return own if extra is None else own + extra

    def _needs_products(self, x: Tensor) -> None:
        if (self.shape is not None and len(self.shape) < 2) or not x.is_floating_point():
            raise ValueError("differences of norm layers and embeddings have no branch; merge them")

    def _on(self, x: Tensor, layer: FrozenLayer) -> Tensor:
        if not self.factors:
            return super()._on(x, layer)
        self._needs_products(x)
        return _LayerWithDifference.apply(x, self.delta(), self.bias_difference(), layer)


class _LayerWithDifference(torch.autograd.Function):
    """y = (W + D) x + b + d over linear layers and convolutions; saves x."""

    @staticmethod
    @own_output
    def forward(ctx, x: Tensor, difference: Tensor, bias_difference: Tensor | None, layer: FrozenLayer):
        ctx.layer, ctx.bias_dtype = layer, None if bias_difference is None else bias_difference.dtype
        ctx.save_for_backward(x, difference)
        geometry = layer.geometry
        biases = [] if bias_difference is None else [bias_difference]
        if wide(x) is x:
            biases += [bias for bias in [layer.bias(x)] if bias is not None]
            with layer.weight(x) as weight:
                if geometry is None:
                    y = x.new_zeros((*x.shape[:-1], len(weight)))
                    _add_product(y.view(-1, len(weight)), x.reshape(-1, x.shape[-1]), weight.T, difference.T)
                else:
                    y = convolve(x, (weight + difference.view(weight.shape)).to(x.dtype), geometry)
        else:
            y = layer.forward(x)
            y.add_(apply_weight(x, difference.to(x.dtype), geometry))
        for bias in biases:
            y.add_(per_channel(bias.to(y.dtype), geometry))
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, difference = ctx.saved_tensors
        geometry, (needs_x, needs_difference, needs_bias, _) = ctx.layer.geometry, ctx.needs_input_grad
        grad = grad.to(x.dtype)
        grad_x = grad_difference = grad_bias = None
        if needs_x:
            with ctx.layer.weight(grad) as weight:
                if geometry is None:
                    grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
                    _add_product(grad_x.view(-1, x.shape[-1]), grad.reshape(-1, len(weight)), weight, difference)
                else:
                    moved = (weight + difference.view(weight.shape)).to(x.dtype)
                    grad_x = conv_input_gradient(grad, x.shape, moved, geometry)
        if needs_difference:
            grad_difference = weight_gradient(grad, x, difference.to(x.dtype), geometry).to(difference.dtype)
        if needs_bias:
            grad_bias = channel_sum(grad, channel_dim(geometry)).to(ctx.bias_dtype)
        return grad_x, grad_difference, grad_bias, None


def _add_product(y: Tensor, x: Tensor, weight: Tensor, difference: Tensor) -> None:
    """y += x (W + D), of y (positions, m), x (positions, n) and W (n, m).

    Piece by piece along n, so that no copy of the whole weight is made: on a CPU that costs up to a fifth of the
    product.
    """
    length = max(1, (1 << 20 if weight.device.type == "cpu" else 1 << 26) // weight.shape[1])
    for some, rows, others in zip(x.split(length, 1), weight.split(length), difference.split(length), strict=True):
        y.addmm_(some, (rows + others).to(x.dtype))
