"""LoRA on linear layers and 1×1 convolutions, LoCon on k×k convolutions.

* ``LoRA``: the two factors and alpha of one adapter; W' = W + strength · (alpha / rank) · up · down
  (Hu et al. 2021, arXiv:2106.09685; LoCon as in LyCORIS: ``down`` carries the kernel, ``up`` is 1×1).
* ``LoRA.merged`` and ``LoRA.branch``: the same adapter in a weight, or beside it.
* ``LoRA.on``: the branch fused with a frozen layer, for training. ΔW is never built, the layer's weight is never
  saved, and the only tensors kept for backward are the input and the rank-sized product ``down · x``.

Factors stay in their own dtype (float32 in training); products run in the input's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .frozen import (
    ConvGeometry,
    FrozenConvolution,
    FrozenLayer,
    conv_gradients,
    conv_input_gradient_by_product,
    is_pointwise,
    wants_product,
)


class LoRA:
    """``down`` (rank, in, *kernel), ``up`` (out, rank, *ones), ``alpha`` a plain number that is never trained."""

    def __init__(self, down: Tensor, up: Tensor, alpha: float) -> None:
        if down.shape[0] != up.shape[1]:
            raise ValueError(f"lora_down has rank {down.shape[0]} but lora_up has rank {up.shape[1]}")
        self.down, self.up, self.alpha = down, up, float(alpha)

    @classmethod
    def create(
        cls,
        shape: Sequence[int],
        rank: int,
        alpha: float,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
    ) -> LoRA:
        """A fresh adapter for a weight of ``shape``: ΔW = 0, down ~ U(−1/√fan_in, 1/√fan_in) (kaiming, a = √5)."""
        out_features, in_features, *kernel = shape
        bound = 1 / math.sqrt(in_features * math.prod(kernel))
        uniform = torch.rand((rank, in_features, *kernel), generator=generator, dtype=torch.float64)
        down = ((2 * uniform - 1) * bound).to(dtype)
        up = torch.zeros((out_features, rank, *(1 for _ in kernel)), dtype=dtype)
        return cls(down, up, alpha)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight this adapter belongs to: (out, in, *kernel)."""
        return (self.up.shape[0], *self.down.shape[1:])

    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return [self.down, self.up]

    def to(self, device: torch.device) -> LoRA:
        return LoRA(self.down.to(device), self.up.to(device), self.alpha)

    def state(self) -> dict[str, Tensor]:
        """Tensors under the names every loader knows; contiguous, detached and on the CPU."""
        return {
            "lora_down.weight": self.down.detach().to("cpu", copy=True).contiguous(),
            "lora_up.weight": self.up.detach().to("cpu", copy=True).contiguous(),
            "alpha": torch.tensor(self.alpha),
        }

    def delta(self) -> Tensor:
        """ΔW (out, in, *kernel) = (alpha / rank) · up · down."""
        return (self.scale * self.up.flatten(1) @ self.down.flatten(1)).view(self.shape)

    def merged(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """W + strength · ΔW in ``weight``'s dtype and shape (a 1×1 adapter also fits a linear weight)."""
        delta = self.delta().to(weight.device).reshape(weight.shape)
        return (weight.to(delta.dtype) + strength * delta).to(weight.dtype)

    def branch(
        self, x: Tensor, base_out: Tensor, geometry: ConvGeometry | None = None, strength: float = 1.0
    ) -> Tensor:
        """base_out + strength · ΔW x, differentiable in everything; ``geometry`` for convolutions."""
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if geometry is None:
            return base_out + (strength * self.scale) * F.linear(F.linear(x, down.flatten(1)), up.flatten(1))
        hidden = _convolve(x, down, geometry)
        return base_out + (strength * self.scale) * _pointwise(up.flatten(1), hidden)

    def on(self, x: Tensor, layer: FrozenLayer) -> Tensor:
        """The layer's output with the adapter, W x + b + ΔW x, for training."""
        if layer.geometry is None:
            return _LinearWithLoRA.apply(x, self.down, self.up, self.scale, layer)
        return _ConvWithLoRA.apply(x, self.down, self.up, self.scale, layer)


class _LinearWithLoRA(torch.autograd.Function):
    """y = x Wᵀ + b + h Bᵀ over x (…, in); saves x and h = s x Aᵀ (…, rank)."""

    @staticmethod
    def forward(ctx, x: Tensor, down: Tensor, up: Tensor, scale: float, layer: FrozenLayer) -> Tensor:
        y = layer.forward(x)
        rows = x.reshape(-1, x.shape[-1])
        # narrow factors go in as contiguous (in, rank) and (rank, out): transposed they slow the product by a third
        hidden = (rows @ down.flatten(1).to(x.dtype).T.contiguous()).mul_(scale)
        y.view(-1, y.shape[-1]).addmm_(hidden.to(y.dtype), up.flatten(1).to(y.dtype).T.contiguous())
        ctx.layer, ctx.scale = layer, scale
        ctx.save_for_backward(x, hidden, down, up)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, hidden, down, up = ctx.saved_tensors
        a, b = down.flatten(1).to(x.dtype), up.flatten(1).to(x.dtype)
        rows, grads = x.reshape(-1, x.shape[-1]), grad.to(x.dtype).reshape(-1, grad.shape[-1])
        grad_hidden = (grads @ b).mul_(ctx.scale)
        grad_up = (hidden.T @ grads).T.to(up.dtype).reshape(up.shape)
        grad_down = (grad_hidden.T @ rows).to(down.dtype).view(down.shape)
        grad_x = None
        if ctx.needs_input_grad[0]:
            with ctx.layer.weight(grads) as weight:
                grad_x = grads @ weight
            grad_x = grad_x.addmm_(grad_hidden, a).view(x.shape)
        return grad_x, grad_down, grad_up, None, None


class _ConvWithLoRA(torch.autograd.Function):
    """y = conv(x, W) + b + B·h over x (N, in, *space); saves x and h = s conv(x, A) (N, rank, *space')."""

    @staticmethod
    def forward(ctx, x: Tensor, down: Tensor, up: Tensor, scale: float, layer: FrozenConvolution) -> Tensor:
        y = layer.forward(x)
        hidden = _convolve(x, down.to(x.dtype), layer.geometry).mul_(scale)
        _add_pointwise(y, up.flatten(1).to(x.dtype), hidden)
        ctx.layer, ctx.scale = layer, scale
        ctx.save_for_backward(x, hidden, down, up)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, hidden, down, up = ctx.saved_tensors
        geometry, needs_x = ctx.layer.geometry, ctx.needs_input_grad[0]
        grad = grad.to(x.dtype)
        a, grad_x = down.to(x.dtype), None
        grad_hidden = _pointwise(up.flatten(1).T.to(x.dtype), grad).mul_(ctx.scale)
        grad_up = _outer(grad, hidden)
        if not needs_x:
            grad_down = _kernel_gradient(grad_hidden, x, a, geometry)
        else:
            with ctx.layer.weight(grad) as weight:
                if wants_product(grad, weight, geometry):
                    grad_x = conv_input_gradient_by_product(x.shape, geometry, (grad, weight), (grad_hidden, a))
                    grad_down = _kernel_gradient(grad_hidden, x, a, geometry)
                else:
                    branch_x, grad_down = conv_gradients(grad_hidden, x, a, geometry, (True, True))
                    grad_x = conv_gradients(grad, x, weight, geometry, (True, False))[0].add_(branch_x)
        return grad_x, grad_down.to(down.dtype), grad_up.to(up.dtype).view(up.shape), None, None


def _convolve(x: Tensor, kernel: Tensor, geometry: ConvGeometry) -> Tensor:
    """conv(x, kernel) in one, two or three dimensions."""
    if is_pointwise(kernel, geometry):
        return _pointwise(kernel.flatten(1), x)
    zeros = [0] * geometry.dimensions
    return torch.convolution(
        x, kernel, None, geometry.stride, geometry.padding, geometry.dilation, False, zeros, geometry.groups
    )


def _kernel_gradient(grad: Tensor, x: Tensor, kernel: Tensor, geometry: ConvGeometry) -> Tensor:
    """∂L/∂kernel of conv(x, kernel)."""
    if is_pointwise(kernel, geometry):
        return _outer(grad, x).view(kernel.shape)
    return conv_gradients(grad, x, kernel, geometry, (False, True))[1]


def _pointwise(matrix: Tensor, x: Tensor) -> Tensor:
    """A 1×1 convolution: (out, in) · (N, in, *space) → (N, out, *space)."""
    product = torch.bmm(matrix.expand(len(x), -1, -1), x.flatten(2))
    return product.view(*product.shape[:2], *x.shape[2:])


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """Σ over samples and positions of a bᵀ: (N, p, *space), (N, q, *space) → (p, q)."""
    return torch.bmm(a.flatten(2), b.flatten(2).transpose(1, 2)).sum(0)


def _add_pointwise(y: Tensor, matrix: Tensor, x: Tensor) -> None:
    """y += matrix · x, in place."""
    if y.is_contiguous():
        y.flatten(2).baddbmm_(matrix.expand(len(x), -1, -1), x.flatten(2))
    else:
        y.add_(_pointwise(matrix, x))
