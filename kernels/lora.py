"""LoRA on linear layers, LoCon on convolutions, DyLoRA, LoRA-FA.

* ``LoRA``: W' = W + (alpha / rank) · up · down (Hu et al. 2021, arXiv:2106.09685). On k×k convolutions ``down`` carries
  the kernel and ``up`` is 1×1 (LoCon, as in LyCORIS); with Tucker's decomposition ``down`` and ``up`` are both 1×1 and
  ``mid`` (rank, rank, *kernel) lies between them: ΔW[o, i] = s · Σ up[o, p] mid[p, q] down[q, i].
* ``LoRA._on``: fused with the frozen layer. ΔW is never built and the layer's weight never saved; kept for backward are
  the input and, of convolutions, the rank-sized product.
* ``DyLoRA``: every step trains a random prefix of the ranks (Valipour et al. 2022, arXiv:2210.07558, as in kohya's
  networks/dylora.py), so that the file can be cut to any rank. A plain LoRA otherwise.
* ``LoRAFA``: ``down`` stays as it was drawn (Zhang et al. 2023, arXiv:2308.03303). A plain LoRA otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import Self

from .adapter import Additive, Options, fitted, kaiming, low_rank_scale, scalar, wide
from .frozen import FrozenConvolution, FrozenLayer, own_output
from .products import (
    add_pointwise,
    channel_dim,
    conv_gradients,
    conv_input_gradient,
    conv_input_gradient_by_product,
    convolve,
    kernel_gradient,
    mix,
    outer,
    pointwise,
    walked,
    wants_product,
)

DOWN, UP, MID = "lora_down.weight", "lora_up.weight", "lora_mid.weight"


class LoRA(Additive):
    """``down`` (rank, in, *kernel), ``up`` (out, rank, *ones); with ``mid`` (rank, rank, *kernel) both are 1×1."""

    name = "LoRA"
    fast_parts = frozenset({UP})
    alpha: float

    def __init__(self, down: Tensor, up: Tensor, alpha: float, mid: Tensor | None = None) -> None:
        if down.shape[0] != up.shape[1] or (mid is not None and mid.shape[:2] != (len(down), len(down))):
            ranks = f"lora_down has rank {down.shape[0]} but lora_up has rank {up.shape[1]}"
            raise ValueError(ranks if mid is None else f"{ranks} and lora_mid {tuple(mid.shape[:2])}")
        kernel = down.shape[2:] if mid is None else mid.shape[2:]
        tensors = {DOWN: down, UP: up} | ({} if mid is None else {MID: mid})
        super().__init__(tensors, (up.shape[0], down.shape[1], *kernel), alpha)

    @classmethod
    def create(cls, shape: Sequence[int], options: Options, draws: torch.Generator) -> Self:
        """down, mid ~ U(−1/√fan_in, 1/√fan_in) (kaiming, a = √5), up = 0."""
        out_features, in_features, *kernel = shape
        rank, ones = options.rank, [1] * len(kernel)
        tucker = options.tucker and math.prod(kernel) > 1
        mid = None
        down = kaiming((rank, in_features, *(ones if tucker else kernel)), draws)
        if tucker:
            mid = kaiming((rank, rank, *kernel), draws)
        return cls(down, torch.zeros((out_features, rank, *ones)), options.scaling_alpha, mid)

    @classmethod
    def read(cls, parts: Mapping[str, Tensor], shape: Sequence[int] | None) -> Self:
        if not {DOWN, UP} <= parts.keys():
            raise ValueError(f"{UP if DOWN in parts else DOWN} is missing")
        down, up, mid = parts[DOWN], parts[UP], parts.get(MID)
        if down.ndim < 2 or up.ndim < 2 or not len(down):
            raise ValueError(f"lora_down {tuple(down.shape)} and lora_up {tuple(up.shape)} are not a pair of factors")
        if shape is not None:
            out_features, in_features, *kernel = shape
            rank, ones = len(down), [1] * len(kernel)
            # a 1×1 convolution and a linear layer differ by trailing ones only
            down = fitted(down, (rank, in_features, *(kernel if mid is None else ones)), "lora_down")
            up = fitted(up, (out_features, rank, *ones), "lora_up")
            mid = None if mid is None else fitted(mid, (rank, rank, *kernel), "lora_mid")
        alpha = scalar(parts)
        return cls(down, up, len(down) if alpha is None else alpha, mid)

    @property
    def down(self) -> Tensor:
        return self.tensors[DOWN]

    @property
    def up(self) -> Tensor:
        return self.tensors[UP]

    @property
    def mid(self) -> Tensor | None:
        return self.tensors.get(MID)

    @property
    def factors(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(name for name in self.tensors if name not in self.fixed_parts)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return low_rank_scale(self.alpha, self.rank)

    def delta(self) -> Tensor:
        """ΔW (out, in, *kernel) = (alpha / rank) · up · down."""
        assert self.shape is not None
        up, down = self.matrices()
        return (self.scale * up @ down).view(self.shape)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """up (out, rank), down (rank, in · kernel) with its core in it, without scale; float32 or wider."""
        up, down = wide(self.up).flatten(1), wide(self.down).flatten(1)
        if self.mid is not None:
            down = torch.einsum("pq...,qi->pi...", wide(self.mid), down).flatten(1)
        return up, down

    def added_to(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """One product into the weight where it lies."""
        if not weight.is_contiguous():
            return super().added_to(weight, strength)
        up, down = (factor.to(weight.device, weight.dtype) for factor in self.matrices())
        weight.view(len(weight), -1).addmm_(up, down, alpha=strength * self.scale)
        return weight

    def norm(self) -> Tensor:
        """From the factors' Gram matrices where they say all: ‖up · down‖² = ⟨upᵀ up, down downᵀ⟩."""
        if self.mid is not None:
            return super().norm()
        up, down = wide(self.up).flatten(1), wide(self.down).flatten(1)
        return abs(self.scale) * (up.T @ up).mul(down @ down.T).sum().clamp_min(0).sqrt()

    def moved_rows(self, weight: Tensor) -> Iterator[Tensor]:
        """A piece at a time stays in the processor's cache: several times faster than the whole at once."""
        up, down = self.matrices()
        dtype = torch.promote_types(weight.dtype, up.dtype)
        up, down = up.to(weight.device, dtype), down.to(weight.device, dtype)
        rows = max(1, (1 << 19 if weight.device.type == "cpu" else 1 << 26) // down.shape[1])
        for part, some in zip(weight.flatten(1).split(rows), up.split(rows), strict=True):
            yield torch.addmm(part.to(dtype), some, down, alpha=self.scale)

    def contribution(self, x: Tensor, base_out: Tensor, layer: FrozenLayer) -> Tensor:
        geometry = layer.geometry
        if geometry is not None and geometry.groups > 1:
            return super().contribution(x, base_out, layer)
        down, up = self.down.to(x.dtype), self.up.flatten(1).to(x.dtype)
        if geometry is None:
            return self.scale * mix(mix(x, down.flatten(1), None), up, None)
        if self.mid is None:
            return self.scale * pointwise(up, convolve(x, down, geometry))
        hidden = convolve(pointwise(down.flatten(1), x), self.mid.to(x.dtype), geometry)
        return self.scale * pointwise(up, hidden)

    def _on(self, x: Tensor, layer: FrozenLayer) -> Tensor:
        return self._fused(x, layer, None)

    def _on_with_dropout(self, x: Tensor, layer: FrozenLayer, draws: torch.Generator) -> Tensor:
        """Dropout on the rank-sized product, where kohya's trainers have it."""
        if self.mid is not None or (layer.geometry is not None and layer.geometry.groups > 1):
            return super()._on_with_dropout(x, layer, draws)
        geometry = layer.geometry
        if geometry is None:
            shape: tuple[int, ...] = (*x.shape[:-1], self.rank)
        else:
            shape = (len(x), self.rank, *walked(x.shape[2:], self.down.shape[2:], geometry))
        mask = self.dropout.mask(shape, channel_dim(geometry), draws)
        if mask is not None:
            mask = mask.to(x.device, x.dtype)
            mask = mask.expand(shape).reshape(-1, self.rank) if geometry is None else mask
        return self._fused(x, layer, mask)

    def _fused(self, x: Tensor, layer: FrozenLayer, mask: Tensor | None) -> Tensor:
        if layer.geometry is None:
            return _LinearWithLoRA.apply(x, self.down, self.up, mask, self.scale, layer)
        if self.mid is not None or layer.geometry.groups > 1:
            return super()._on(x, layer)
        return _ConvWithLoRA.apply(x, self.down, self.up, mask, self.scale, layer)


class DyLoRA(LoRA):
    """Trains ranks [b, b + unit) against the ranks before them, b drawn per step; scaled by √(rank / (b + unit))."""

    name = "DyLoRA"

    def __init__(self, down: Tensor, up: Tensor, alpha: float, mid: Tensor | None = None, unit: int = 1) -> None:
        super().__init__(down, up, alpha, mid)
        if unit < 1 or self.rank % unit:
            raise ValueError(f"unit is {unit}, expected a divisor of the rank {self.rank}")
        self.unit = unit

    @classmethod
    def create(cls, shape: Sequence[int], options: Options, draws: torch.Generator) -> Self:
        plain = LoRA.create(shape, options, draws)
        return cls(plain.down, plain.up, plain.alpha, plain.mid, options.unit)

    def active_ranks(self) -> tuple[int, int]:
        """(first, end) of the ranks this step trains; all of them when no seed is set."""
        if self.seed is None:
            return 0, self.rank
        draws = torch.Generator().manual_seed(self.seed ^ 0x0D71)  # other draws than those of the dropout
        first = int(torch.randint(self.rank // self.unit, (), generator=draws)) * self.unit
        return first, first + self.unit

    def on(self, x: Tensor, layer: FrozenLayer) -> Tensor:
        if self.seed is None:
            return super().on(x, layer)
        first, end = self.active_ranks()
        down = torch.cat([self.down[:first].detach(), self.down[first:end]])
        up = torch.cat([self.up[:, :first].detach(), self.up[:, first:end]], 1)
        mid = None if self.mid is None else self.mid[:end, :end]
        step = LoRA(down, up, self.scale * math.sqrt(self.rank / end) * end, mid)
        step.dropout, step.seed = self.dropout, self.seed
        return step.on(x, layer)


class LoRAFA(LoRA):
    """LoRA whose ``down`` is frozen; only ``up`` is trained."""

    name = "LoRA-FA"
    fixed_parts = frozenset({DOWN})


class _LinearWithLoRA(torch.autograd.Function):
    """y = x Wᵀ + b + s h Bᵀ over x (…, in), h = x Aᵀ; saves x, or h alone where A is not trained.

    Where the rank is not small against the width, h is worth keeping as well: it costs more to make than to store.
    """

    @staticmethod
    @own_output
    def forward(ctx, x: Tensor, down: Tensor, up: Tensor, mask: Tensor | None, scale: float, layer: FrozenLayer):
        y = layer.forward(x)
        hidden = _hidden(x, down, mask)
        y.view(-1, y.shape[-1]).addmm_(hidden.to(y.dtype), up.flatten(1).to(y.dtype).T, alpha=scale)
        ctx.layer, ctx.scale, ctx.shape, ctx.dtype = layer, scale, x.shape, x.dtype
        trains_down = ctx.needs_input_grad[1]
        keep = not trains_down or 32 * len(down) > x.shape[-1]
        ctx.save_for_backward(x if trains_down else None, hidden if keep else None, down, up, mask)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, hidden, down, up, mask = ctx.saved_tensors
        needs_x, needs_down, needs_up, *_ = ctx.needs_input_grad
        grads = grad.to(ctx.dtype).reshape(-1, grad.shape[-1])
        grad_x = grad_down = grad_up = None
        if needs_up:
            hidden = _hidden(x, down, mask) if hidden is None else hidden
            grad_up = _scaled((hidden.T @ grads).T.to(up.dtype).reshape(up.shape), ctx.scale)
        if needs_x or needs_down:
            grad_hidden = grads @ up.flatten(1).to(ctx.dtype)
            if mask is not None:
                grad_hidden.mul_(mask)
        if needs_down:
            grad_down = _scaled((grad_hidden.T @ x.reshape(-1, x.shape[-1])).to(down.dtype).view(down.shape), ctx.scale)
        if needs_x:
            with ctx.layer.weight(grads) as weight:
                grad_x = grads @ weight
            grad_x = grad_x.addmm_(grad_hidden, down.flatten(1).to(ctx.dtype), alpha=ctx.scale).view(ctx.shape)
        return grad_x, grad_down, grad_up, None, None, None


def _hidden(x: Tensor, down: Tensor, mask: Tensor | None) -> Tensor:
    """x Aᵀ, masked, as rows (positions, rank)."""
    hidden = x.reshape(-1, x.shape[-1]) @ down.flatten(1).to(x.dtype).T
    return hidden if mask is None else hidden.mul_(mask)


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    """In place; most adapters have alpha = rank and need no pass over the tensor."""
    return tensor if scale == 1 else tensor.mul_(scale)


class _ConvWithLoRA(torch.autograd.Function):
    """y = conv(x, W) + b + B·h over x (N, in, *space), h = s conv(x, A) (N, rank, *space'); saves h, and x for A."""

    @staticmethod
    @own_output
    def forward(ctx, x: Tensor, down: Tensor, up: Tensor, mask: Tensor | None, scale: float, layer: FrozenConvolution):
        y = layer.forward(x)
        hidden = _scaled(convolve(x, down.to(x.dtype), layer.geometry), scale)
        if mask is not None:
            hidden.mul_(mask)
        add_pointwise(y, up.flatten(1).to(x.dtype), hidden)
        ctx.layer, ctx.scale, ctx.shape, ctx.dtype = layer, scale, x.shape, x.dtype
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, hidden, down, up, mask)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, hidden, down, up, mask = ctx.saved_tensors
        geometry, (needs_x, needs_down, *_) = ctx.layer.geometry, ctx.needs_input_grad
        grad = grad.to(ctx.dtype)
        a, grad_x, grad_down = down.to(ctx.dtype), None, None
        grad_up = outer(grad, hidden).to(up.dtype).view(up.shape)
        grad_hidden = _scaled(pointwise(up.flatten(1).T.to(ctx.dtype), grad), ctx.scale)
        if mask is not None:
            grad_hidden.mul_(mask)
        if needs_x:
            with ctx.layer.weight(grad) as weight:
                if wants_product(grad, weight, geometry):
                    grad_x = conv_input_gradient_by_product(ctx.shape, geometry, (grad, weight), (grad_hidden, a))
                elif needs_down:  # both gradients of the branch in one call
                    branch_x, grad_down = conv_gradients(grad_hidden, x, a, geometry, (True, True))
                    grad_x = conv_input_gradient(grad, ctx.shape, weight, geometry).add_(branch_x)
                else:
                    grad_x = conv_input_gradient(grad, ctx.shape, weight, geometry)
                    grad_x.add_(conv_input_gradient(grad_hidden, ctx.shape, a, geometry))
        if needs_down and grad_down is None:
            grad_down = kernel_gradient(grad_hidden, x, a, geometry)
        return grad_x, None if grad_down is None else grad_down.to(down.dtype), grad_up, None, None, None
