"""LoKr on linear layers and convolutions: a Kronecker product.

* ``LoKr``: W' = W + s · w1 ⊗ w2 (LyCORIS' modules/lokr.py; KronA, Edalati et al. 2022, arXiv:2212.10650). w1 (o₁, i₁),
  w2 (o₂, i₂, *kernel), out = o₁·o₂, in = i₁·i₂: ΔW[(o₁ o₂), (i₁ i₂), k] = s · w1[o₁, i₁] w2[o₂, i₂, k]. Either half
  may be a product of low rank: w1 = w1_a w1_b; w2 = w2_a (o₂, rank) · w2_b (rank, i₂·kernel); with Tucker's
  decomposition w2[o₂, i₂] = Σ w2_a[p, o₂] t2[p, q] w2_b[q, i₂]. Core and w2_b together are a w2_b of the plain form.
* s = alpha / rank of the half in low rank; 1 when both are full, whatever alpha says (trainers write 1e10 there, which
  is infinite in half precision). LyCORIS' rank-stabilised runs with two full halves train at √rank, though no loader
  reads them so, LyCORIS' own included; a file does not tell. Ours train at 1, as they are loaded.
* The product is never built but for merging: w1 mixes the i₁ groups of channels, in rank space if w2 is of low rank.
* ``split``: how the dimensions are split, as LyCORIS does it (ComfyUI's own trainer splits otherwise).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from .adapter import Additive, Options, kaiming, low_rank_scale, scalar, wide
from .frozen import FrozenLayer, frozen, own_output
from .products import convolve, pointwise

W1, W1_A, W1_B = "lokr_w1", "lokr_w1_a", "lokr_w1_b"
W2, W2_A, W2_B, T2 = "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"
PARTS = (W1, W1_A, W1_B, W2, W2_A, W2_B, T2)


class LoKr(Additive):
    """The halves' tensors by LyCORIS' names; see the formulas above."""

    name = "LoKr"
    fast_parts = frozenset({W2, W2_B})

    @classmethod
    def create(cls, shape: Sequence[int], options: Options, draws: torch.Generator) -> Self:
        """Kaiming (a = √5) everywhere, but w2 = 0, or w2_b = 0 if w2 is of low rank.

        w2 is full where the rank is no less than half its longer side; so is w1, unless ``decompose_both``.
        """
        rank, kernel = options.rank, shape[2:]
        (o1, o2), (i1, i2) = (split(dimension, options.factor) for dimension in shape[:2])
        full_w1 = options.full_rank or not options.decompose_both or rank >= max(o1, i1) / 2
        full_w2 = options.full_rank or rank >= max(o2, i2) / 2
        if full_w1:
            tensors = {W1: kaiming((o1, i1), draws)}
        else:
            tensors = {W1_A: kaiming((o1, rank), draws), W1_B: kaiming((rank, i1), draws)}
        if full_w2:
            tensors[W2] = torch.zeros(o2, i2, *kernel)
        elif options.tucker and math.prod(kernel) > 1:
            tensors |= {W2_A: kaiming((rank, o2), draws), W2_B: torch.zeros(rank, i2)}
            tensors[T2] = kaiming((rank, rank, *kernel), draws)
        else:
            tensors |= {W2_A: kaiming((o2, rank), draws), W2_B: torch.zeros(rank, i2 * math.prod(kernel))}
        # of two full halves nothing reads it
        return cls(tensors, shape, options.alpha if full_w1 and full_w2 else options.scaling_alpha)

    @classmethod
    def read(cls, parts: Mapping[str, Tensor], shape: Sequence[int] | None) -> Self:
        """Any split whose products fit: also unbalanced ones, and w2 over (in·kernel) as ComfyUI's trainer has it."""
        tensors: dict[str, Tensor] = {}
        for full, *pair in ((W1, W1_A, W1_B), (W2, W2_A, W2_B)):
            names = [full] if full in parts else pair
            if missing := [name for name in names if name not in parts]:
                raise ValueError(f"{full} is missing" + (f", or {missing[0]}" if len(missing) == 1 else ""))
            tensors |= {name: parts[name] for name in names}
        if W2_A in tensors and T2 in parts:
            tensors[T2] = parts[T2]
        adapter = cls(tensors, None, scalar(parts))
        if empty := [name for name, tensor in tensors.items() if not tensor.numel()]:
            raise ValueError(f"{', '.join(empty)}: nothing in it")
        try:
            # on the meta device: sizes alone, since small factors of a hostile file may have a product of gigabytes
            w1, outer, inner = adapter.to("meta").halves()
            (o1, i1), o2, columns = w1.shape, len(outer), (outer if inner is None else outer @ inner).shape[1]
        except (RuntimeError, ValueError, IndexError) as error:
            sizes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
            raise ValueError(f"these are no halves of a Kronecker product: {sizes}") from error
        spatial = tensors.get(T2, tensors.get(W2, outer)).shape[2:]
        if shape is None and spatial:
            shape = (o1 * o2, i1 * columns // math.prod(spatial), *spatial)
        adapter.shape = None if shape is None else tuple(shape)
        if shape is not None:
            given, wanted = ([side for side in kernel if side != 1] for kernel in (spatial, shape[2:]))
            if (o1 * o2, i1 * columns) != (shape[0], math.prod(shape[1:])) or (spatial and given != wanted):
                raise ValueError(f"w1 {(o1, i1)} ⊗ w2 {(o2, columns)} is no weight of {tuple(shape)}")
        return adapter

    @property
    def factors(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self.tensors)

    @property
    def scale(self) -> float:
        """By the rank of the half in low rank, of w2 where both are."""
        for name in (W2_B, W1_B):
            if name in self.tensors:
                return low_rank_scale(self.alpha, len(self.tensors[name]))
        return 1.0

    def halves(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """w1 (o₁, i₁); w2 as (o₂, i₂·kernel), None if full, as (o₂, rank), (rank, i₂·kernel) if of low rank.

        In float32 or wider.
        """
        parts = {name: wide(tensor) for name, tensor in self.tensors.items()}
        w1 = parts[W1] if W1 in parts else parts[W1_A] @ parts[W1_B]
        if W2 in parts:
            return w1, parts[W2].flatten(1), None
        if T2 not in parts:
            return w1, parts[W2_A].flatten(1), parts[W2_B].flatten(1)
        return w1, parts[W2_A].T, torch.einsum("pq...,qi->pi...", parts[T2], parts[W2_B]).flatten(1)

    def _whole_halves(self) -> tuple[Tensor, Tensor]:
        """s · w1 (o₁, i₁) and w2 (o₂, i₂·kernel)."""
        w1, outer, inner = self.halves()
        return self.scale * w1, outer if inner is None else outer @ inner

    def delta(self) -> Tensor:
        """ΔW (out, in, *kernel) = s · w1 ⊗ w2; (out, in·kernel) where the shape is not known."""
        delta = torch.kron(*self._whole_halves())
        return delta if self.shape is None else delta.view(self.shape)

    def norm(self) -> Tensor:
        """‖w1 ⊗ w2‖ = ‖w1‖ ‖w2‖."""
        w1, w2 = self._whole_halves()
        return w1.norm() * w2.norm()

    def moved_rows(self, weight: Tensor) -> Iterator[Tensor]:
        w1, w2 = (half.to(weight.device) for half in self._whole_halves())
        for row, rows in zip(w1, weight.flatten(1).split(len(w2)), strict=True):
            yield wide(rows) + torch.kron(row[None], w2)

    def contribution(self, x: Tensor, base_out: Tensor, layer: FrozenLayer) -> Tensor:
        """w1 mixes groups of channels, as early as they are few: after w2_b, or before a full w2."""
        geometry = layer.geometry
        w1, outer, inner = self.halves()
        w1, outer = (self.scale * w1).to(x.dtype), outer.to(x.dtype)
        inner = None if inner is None else inner.to(x.dtype)
        groups = w1.shape[1]
        if geometry is None:
            z = x.unflatten(-1, (groups, x.shape[-1] // groups))
            z = z if inner is None else F.linear(z, inner)
            return F.linear(w1 @ z, outer).flatten(-2)
        kernel = () if self.shape is None else self.shape[2:]
        if geometry.groups > 1 or x.shape[1] % groups:
            return super().contribution(x, base_out, layer)
        z = x.reshape(len(x) * groups, x.shape[1] // groups, *x.shape[2:])
        if inner is None:
            y = convolve(_mixed(w1, z), outer.view(len(outer), -1, *kernel), geometry)
        else:
            y = pointwise(outer, _mixed(w1, convolve(z, inner.view(len(inner), -1, *kernel), geometry)))
        return y.reshape(len(x), len(w1) * y.shape[1], *y.shape[2:])

    def _on(self, x: Tensor, layer: FrozenLayer) -> Tensor:
        if layer.geometry is None:
            return _LinearWithLoKr.apply(x, *self.halves(), self.scale, layer)
        base = frozen(x, layer)
        return base + self.contribution(x, base, layer)


def split(dimension: int, factor: int) -> tuple[int, int]:
    """m ≤ n with m·n = ``dimension``: ``factor`` and its cofactor, else the greatest m up to ``factor`` (−1: any)."""
    m = factor
    if factor < 1 or dimension % factor:
        limit = min(math.isqrt(dimension), factor if factor >= 0 else dimension)
        m = next((m for m in range(limit, 0, -1) if dimension % m == 0), 1)
    return min(m, dimension // m), max(m, dimension // m)


def _mixed(w1: Tensor, groups: Tensor) -> Tensor:
    """Σ w1[o, i] groups[i] for every sample: (N·i₁, *rest) → (N·o₁, *rest)."""
    groups_out, groups_in = w1.shape
    samples = len(groups) // groups_in
    mixed = torch.bmm(w1.expand(samples, -1, -1), groups.reshape(samples, groups_in, math.prod(groups.shape[1:])))
    return mixed.view(samples * groups_out, *groups.shape[1:])


class _LinearWithLoKr(torch.autograd.Function):
    """y = x Wᵀ + b + s (w1 ⊗ w2) x over x (…, in), w2 = outer · inner, or outer alone; saves x and the halves."""

    @staticmethod
    @own_output
    def forward(ctx, x: Tensor, w1: Tensor, outer: Tensor, inner: Tensor | None, scale: float, layer: FrozenLayer):
        y = layer.forward(x)
        ctx.layer, ctx.scale = layer, scale
        ctx.save_for_backward(x, w1, outer, inner)
        mixed = _mixed(scale * w1.to(x.dtype), _hidden(x, w1, inner))
        y.view(-1, len(outer)).addmm_(mixed, outer.T.to(x.dtype))
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, w1, outer, inner = ctx.saved_tensors
        groups_out, groups_in = w1.shape
        scaled, grads = ctx.scale * w1.to(x.dtype), grad.to(x.dtype).reshape(-1, len(outer))
        hidden = _hidden(x, w1, inner)
        grad_outer = (grads.T @ _mixed(scaled, hidden)).to(outer.dtype)
        grad_mixed = grads @ outer.to(x.dtype)
        by_position = grad_mixed.view(-1, groups_out, grad_mixed.shape[1])
        hidden = hidden.view(-1, groups_in, hidden.shape[1])
        grad_w1 = torch.bmm(by_position, hidden.transpose(1, 2)).sum(0).to(w1.dtype).mul_(ctx.scale)
        grad_x = grad_inner = None
        if ctx.needs_input_grad[0]:
            with ctx.layer.weight(grads) as weight:
                grad_x = grads.view(-1, len(weight)) @ weight
        if inner is not None:
            grad_hidden = _mixed(scaled.T, grad_mixed)
            grad_inner = (grad_hidden.T @ x.reshape(-1, inner.shape[1])).to(inner.dtype)
            if grad_x is not None:
                grad_x.view(-1, inner.shape[1]).addmm_(grad_hidden, inner.to(x.dtype))
        elif grad_x is not None:
            grad_x.view(hidden.shape).baddbmm_(scaled.T.expand(len(hidden), -1, -1), by_position)
        return None if grad_x is None else grad_x.view(x.shape), grad_w1, grad_outer, grad_inner, None, None


def _hidden(x: Tensor, w1: Tensor, inner: Tensor | None) -> Tensor:
    """x by groups of channels, (positions·i₁, i₂); in rank space, (positions·i₁, rank), where w2 is of low rank."""
    groups = x.reshape(-1, x.shape[-1] // w1.shape[1])
    # a narrow factor goes in as contiguous (in, rank): transposed it slows the product
    return groups if inner is None else groups @ inner.T.to(x.dtype).contiguous()
