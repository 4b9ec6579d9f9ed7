"""GLoRA on linear layers and convolutions: a low-rank change of the weight that is partly made of the weight itself.

* ``GLoRA``: W' = W + s · (W a1 a2 + b1 b2), s = alpha / rank, where W a1 a2 works on W's inputs (Chavan et al. 2023,
  arXiv:2306.07967; LyCORIS' modules/glora.py). a1 (in, rank), a2 (rank, in), b1 (out, rank), b2 (rank, in, *kernel);
  all but b2 with trailing ones on convolutions. So y = W (x + s a1 a2 x) + s b1 b2 x + b: one call of the layer.
* Trained fused with linear layers; kept for backward is the input alone.
* ``GLoRA.read`` takes old files as well, which have 1 and 2 the other way round. Their tensors do not say so where
  in, out and rank are the same number; then they are taken as new ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import Self

from .adapter import Adapter, Options, fitted, kaiming, low_rank_scale, scalar, wide
from .dense import dense_contribution, through_weight
from .frozen import FrozenLayer, frozen, own_output
from .products import ConvGeometry, channel_dim, convolve, mix, per_channel

A1, A2, B1, B2 = "a1.weight", "a2.weight", "b1.weight", "b2.weight"
PARTS = (A1, A2, B1, B2)


class GLoRA(Adapter):
    """``a1``, ``a2``, ``b1``, ``b2`` as above."""

    name = "GLoRA"
    fast_parts = frozenset({A1, B1})  # those next to the outputs, whichever of a pair starts at zero
    alpha: float

    @classmethod
    def create(cls, shape: Sequence[int], options: Options, draws: torch.Generator) -> Self:
        """a1, b1 ~ U(−1/√rank, 1/√rank) (kaiming, a = √5), a2 = b2 = 0."""
        out_features, in_features, *kernel = shape
        rank, ones = options.rank, [1] * len(kernel)
        tensors = {
            A1: kaiming((in_features, rank, *ones), draws),
            A2: torch.zeros(rank, in_features, *ones),
            B1: kaiming((out_features, rank, *ones), draws),
            B2: torch.zeros(rank, in_features, *kernel),
        }
        return cls(tensors, shape, options.scaling_alpha)

    @classmethod
    def read(cls, parts: Mapping[str, Tensor], shape: Sequence[int] | None) -> Self:
        if missing := [name for name in PARTS if name not in parts]:
            raise ValueError(f"{', '.join(missing)} is missing")
        new = [parts[name] for name in PARTS]
        old = [parts[name] for name in (A2, A1, B2, B1)]
        if any(tensor.ndim < 2 for tensor in new):
            raise ValueError(f"{', '.join(PARTS)} are no matrices")
        wanted = None if shape is None else tuple(shape[:2])
        fitting = [tensors for tensors in (new, old) if _sizes(tensors) and wanted in (None, _sizes(tensors))]
        if not fitting:
            sizes = ", ".join(f"{name} {tuple(parts[name].shape)}" for name in PARTS)
            raise ValueError(sizes + (" do not fit together" if shape is None else f" do not fit {tuple(shape)}"))
        a1, a2, b1, b2 = min(fitting, key=lambda tensors: tensors[0].shape[1])  # a rank is no greater than a width
        if shape is not None:
            (out_features, in_features, *kernel), rank = shape, a1.shape[1]
            ones = [1] * len(kernel)
            a1, a2 = fitted(a1, (in_features, rank, *ones), A1), fitted(a2, (rank, in_features, *ones), A2)
            b1, b2 = fitted(b1, (out_features, rank, *ones), B1), fitted(b2, (rank, in_features, *kernel), B2)
        alpha = scalar(parts)
        tensors = dict(zip(PARTS, (a1, a2, b1, b2), strict=True))
        return cls(tensors, (len(b1), *b2.shape[1:]), a1.shape[1] if alpha is None else alpha)

    @property
    def rank(self) -> int:
        return self.tensors[A1].shape[1]

    @property
    def scale(self) -> float:
        return low_rank_scale(self.alpha, self.rank)

    def _matrices(self, dtype: torch.dtype) -> list[Tensor]:
        return [self.tensors[name].flatten(1).to(dtype) for name in PARTS]

    def difference(self, weight: Tensor) -> Tensor:
        base = wide(weight)
        a1, a2, b1, b2 = (matrix.to(base.device) for matrix in self._matrices(base.dtype))
        mixed = torch.einsum("oi...,ir,rj->oj...", base, a1, a2)
        return self.scale * (mixed + (b1 @ b2).view(base.shape))

    def contribution(self, x: Tensor, base_out: Tensor, layer: FrozenLayer) -> Tensor:
        if layer.geometry is not None and layer.geometry.groups > 1:
            return dense_contribution(self, x, layer)
        change, extra = self._halves(x, layer, None)
        moved, bias = frozen(change, layer), layer.bias(base_out)
        return (moved if bias is None else moved - per_channel(bias, layer.geometry)) + extra

    def _on(self, x: Tensor, layer: FrozenLayer) -> Tensor:
        if layer.geometry is None:
            a1, a2, b1, b2 = (self.tensors[name].flatten(1) for name in PARTS)
            return _LinearWithGLoRA.apply(x, a1, a2, b1, b2, self.scale, layer)
        if layer.geometry.groups > 1:
            return through_weight(self, x, layer)
        change, extra = self._halves(x, layer, None)
        return frozen(x + change, layer) + extra

    def _on_with_dropout(self, x: Tensor, layer: FrozenLayer, draws: torch.Generator) -> Tensor:
        """Dropout on both rank-sized products."""
        if layer.geometry is not None and layer.geometry.groups > 1:
            return super()._on_with_dropout(x, layer, draws)
        change, extra = self._halves(x, layer, draws)
        return frozen(x + change, layer) + extra

    def _halves(self, x: Tensor, layer: FrozenLayer, draws: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """(s a1 a2 x, s b1 b2 x), with dropout in between where there are ``draws``."""
        geometry = layer.geometry
        a1, a2, b1, b2 = self._matrices(x.dtype)
        inner = mix(x, a2, geometry)
        outer = mix(x, b2, None) if geometry is None else convolve(x, self.tensors[B2].to(x.dtype), geometry)
        if draws is not None:
            inner, outer = self._dropped(inner, geometry, draws), self._dropped(outer, geometry, draws)
        return mix(self.scale * inner, a1, geometry), mix(self.scale * outer, b1, geometry)

    def _dropped(self, hidden: Tensor, geometry: ConvGeometry | None, draws: torch.Generator) -> Tensor:
        mask = self.dropout.mask(hidden.shape, channel_dim(geometry), draws)
        return hidden if mask is None else hidden * mask.to(hidden.device, hidden.dtype)

    def norm(self) -> Tensor:
        """s · ‖(a1 a2, b1 b2)‖: what ΔW is made of beside the weight."""
        a1, a2, b1, b2 = self._matrices(torch.promote_types(self.tensors[A1].dtype, torch.float32))
        squares = [(up.T @ up).mul(down @ down.T).sum() for up, down in ((a1, a2), (b1, b2))]
        return abs(self.scale) * (squares[0] + squares[1]).clamp_min(0).sqrt()

    def limit_norm(self, maximum: float) -> bool:
        norm = self.norm().item()
        if norm <= maximum:
            return False
        with torch.no_grad():  # each of the two terms is a product of two
            for tensor in self.tensors.values():
                tensor.mul_(math.sqrt(maximum / norm))
        return True


def _sizes(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """(out, in) of a1, a2, b1, b2; None where they do not fit together."""
    a1, a2, b1, b2 = tensors
    rank, in_features = a1.shape[1], len(a1)
    ranks, widths = {len(a2), b1.shape[1], len(b2)}, {a2.shape[1], b2.shape[1]}
    return (len(b1), in_features) if ranks == {rank} and widths == {in_features} else None


class _LinearWithGLoRA(torch.autograd.Function):
    """y = (x + s x a2ᵀ a1ᵀ) Wᵀ + b + s x b2ᵀ b1ᵀ over x (…, in); saves x."""

    @staticmethod
    @own_output
    def forward(ctx, x: Tensor, a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor, scale: float, layer: FrozenLayer):
        rows = x.reshape(-1, x.shape[-1])
        inner, outer = _hidden(rows, a2, b2)
        moved = torch.addmm(rows, inner, a1.T.to(x.dtype), alpha=scale)
        y = layer.forward(moved.view(x.shape))
        y.view(-1, y.shape[-1]).addmm_(outer, b1.T.to(x.dtype), alpha=scale)
        ctx.layer, ctx.scale = layer, scale
        ctx.save_for_backward(x, a1, a2, b1, b2)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, *factors = ctx.saved_tensors
        a1, a2, b1, b2 = (factor.to(x.dtype) for factor in factors)
        grads, rows, scale = grad.to(x.dtype).reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]), ctx.scale
        with ctx.layer.weight(grads) as weight:
            grad_x = grads @ weight  # of x + s a1 a2 x
        gradients: list[Tensor | None] = [None] * 4
        grad_hidden = torch.cat([grad_x @ a1, grads @ b1], 1).mul_(scale)
        if any(ctx.needs_input_grad[1:5]):
            inner, outer = _hidden(rows, a2, b2)
            down = grad_hidden.T @ rows
            up_a, up_b = (inner.T @ grad_x).T.mul(scale), (outer.T @ grads).T.mul(scale)
            products = (up_a, down[: len(a2)], up_b, down[len(a2) :])
            gradients = [product.to(factor.dtype) for product, factor in zip(products, factors, strict=True)]
        grad_x = grad_x.addmm_(grad_hidden, torch.cat([a2, b2])).view(x.shape)
        return grad_x, *gradients, None, None


def _hidden(rows: Tensor, a2: Tensor, b2: Tensor) -> tuple[Tensor, ...]:
    """(x a2ᵀ, x b2ᵀ), each (positions, rank), by one product."""
    return (rows @ torch.cat([a2, b2]).to(rows.dtype).T).chunk(2, 1)
