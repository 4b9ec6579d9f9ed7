"""LoHa on linear layers and convolutions: the elementwise product of two low-rank matrices.

* ``LoHa``: W' = W + s · (w1_a w1_b) ∘ (w2_a w2_b), s = alpha / rank (FedPara, Hyeon-Woo et al. 2021, arXiv:2108.06098;
  LyCORIS' modules/loha.py). w*_a (out, rank), w*_b (rank, in·kernel). With Tucker's decomposition of k×k kernels
  w*_a (rank, out), w*_b (rank, in) and a core t* (rank, rank, *kernel):
  Wₙ[o, i] = Σ wn_a[p, o] tn[p, q] wn_b[q, i]. Core and w*_b together are a w*_b of the plain form.
* Trained and applied in the cheaper of two ways; both keep only the input for backward, of linear layers.
  - narrow: as a LoRA of rank², ΔW = s · (w1_a ⊙ w2_a)(w1_b ⊙ w2_b); ⊙ (Khatri-Rao) multiplies all pairs of ranks.
  - dense: ΔW and ∂L/∂ΔW are built for a moment, in forward and again in backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import Self

from .adapter import Additive, Options, fitted, low_rank_scale, scalar, wide
from .frozen import FrozenLayer, own_output
from .lora import LoRA
from .products import apply_weight, input_gradient, kernel_gradient, per_channel, walked

W1_A, W1_B, W2_A, W2_B = "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"
T1, T2 = "hada_t1", "hada_t2"
PARTS = (W1_A, W1_B, W2_A, W2_B, T1, T2)
TILE = 1 << 20  # numbers of a dense matrix that are worked on at once (half as many are no slower, an eighth is)
# Measured on CPUs in float32, for 1280² with 1024 tokens and 3072² with 512, where rank 16 and 29 are the cross-over:
SKINNY = 4 / 3  # a multiplication in a product of width rank², in ordinary ones
REBUILDING = 550  # to build ΔW twice and the factors' gradients from its own, in multiplications per number of ΔW

Pairs = tuple[Tensor, Tensor, Tensor, Tensor]  # w1_a, w1_b, w2_a, w2_b without cores: (out, rank), (rank, in·kernel)


class LoHa(Additive):
    """Four factors and, with Tucker's decomposition, two cores; see the formulas above."""

    name = "LoHa"
    fast_parts = frozenset({W2_A})

    @classmethod
    def create(cls, shape: Sequence[int], options: Options, draws: torch.Generator) -> Self:
        """w1_a ~ N(0, 0.1²), w1_b, w2_b ~ N(0, 1), cores ~ N(0, 0.1²), w2_a = 0."""
        out_features, in_features, *kernel = shape
        rank, tucker = options.rank, options.tucker and math.prod(kernel) > 1

        def normal(std: float, *size: int) -> Tensor:
            return std * torch.randn(size, generator=draws)

        columns = in_features if tucker else math.prod(shape[1:])
        w1_a, w2_a = normal(0.1, out_features, rank), torch.zeros(out_features, rank)
        tensors = {W1_A: w1_a, W1_B: normal(1, rank, columns), W2_A: w2_a, W2_B: normal(1, rank, columns)}
        if tucker:
            tensors |= {name: tensors[name].T.contiguous() for name in (W1_A, W2_A)}
            tensors |= {name: normal(0.1, rank, rank, *kernel) for name in (T1, T2)}
        return cls(tensors, shape, options.scaling_alpha)

    @classmethod
    def read(cls, parts: Mapping[str, Tensor], shape: Sequence[int] | None) -> Self:
        tensors = {name: parts[name] for name in PARTS if name in parts}
        missing = {*PARTS[:4], *(PARTS[4:] if T1 in parts or T2 in parts else ())} - tensors.keys()
        if missing:
            raise ValueError(f"{', '.join(sorted(missing))} is missing")
        w1_a, w1_b, core = tensors[W1_A], tensors[W1_B], tensors.get(T1)
        if any(tensors[name].ndim != 2 for name in PARTS[:4]) or not len(w1_b):
            sizes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
            raise ValueError(f"these are no low-rank factors: {sizes}")
        rank = len(w1_b)
        cores: tuple[int, ...] = ()
        if core is None:
            size = (len(w1_a), w1_b.shape[1]) if shape is None else (shape[0], math.prod(shape[1:]))
            outs, ins = (size[0], rank), (rank, size[1])
        else:
            shape = (w1_a.shape[1], w1_b.shape[1], *core.shape[2:]) if shape is None else shape
            outs, ins, cores = (rank, shape[0]), (rank, shape[1]), (rank, rank, *shape[2:])
        wanted = dict(zip(PARTS, (outs, ins, outs, ins, cores, cores), strict=True))
        tensors = {name: fitted(tensor, wanted[name], name) for name, tensor in tensors.items()}
        alpha = scalar(parts)
        return cls(tensors, shape, rank if alpha is None else alpha)

    @property
    def factors(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self.tensors)

    @property
    def rank(self) -> int:
        return self.tensors[W1_B].shape[0]

    @property
    def scale(self) -> float:
        return low_rank_scale(self.alpha, self.rank)

    def pairs(self) -> Pairs:
        """The factors with their cores multiplied in, in float32 or wider."""
        w1_a, w1_b, w2_a, w2_b, *cores = (wide(self.tensors[name]) for name in PARTS if name in self.tensors)
        if cores:
            pairs = zip(cores, (w1_b, w2_b), strict=True)
            w1_b, w2_b = (torch.einsum("pq...,qi->pi...", core, factor).flatten(1) for core, factor in pairs)
            w1_a, w2_a = w1_a.T, w2_a.T
        return w1_a, w1_b, w2_a, w2_b

    def delta(self) -> Tensor:
        """ΔW (out, in, *kernel) = (alpha / rank) · W₁ ∘ W₂; (out, in·kernel) where the shape is not known."""
        w1_a, w1_b, w2_a, w2_b = self.pairs()
        delta = (self.scale * w1_a @ w1_b) * (w2_a @ w2_b)
        return delta if self.shape is None else delta.view(self.shape)

    def moved_rows(self, weight: Tensor) -> Iterator[Tensor]:
        w1_a, w1_b, w2_a, w2_b = (factor.to(weight.device) for factor in self.pairs())
        rows = weight.flatten(1)
        for some in _tiles(rows.shape):
            yield torch.addcmul(wide(rows[some]), w1_a[some] @ w1_b, w2_a[some] @ w2_b, value=self.scale)

    def contribution(self, x: Tensor, base_out: Tensor, layer: FrozenLayer) -> Tensor:
        if self._narrow(x, layer):
            return self._as_lora(layer).contribution(x, base_out, layer)
        return super().contribution(x, base_out, layer)

    def _on(self, x: Tensor, layer: FrozenLayer) -> Tensor:
        if not self._narrow(x, layer):
            return _WithDense.apply(x, *self.pairs(), self.scale, layer)
        if layer.geometry is None:
            return _LinearWithNarrow.apply(x, *self.pairs(), self.scale, layer)
        return self._as_lora(layer).on(x, layer)

    def _as_lora(self, layer: FrozenLayer) -> LoRA:
        """The LoRA of rank² with the same ΔW."""
        w1_a, w1_b, w2_a, w2_b = self.pairs()
        kernel = () if layer.geometry is None or self.shape is None else self.shape[2:]
        down, up = khatri_rao(w1_b, w2_b), khatri_rao(w1_a.T, w2_a.T).T
        down, up = down.view(len(down), -1, *kernel), up.reshape(*up.shape, *(1 for _ in kernel))
        return LoRA(down, up, self.scale * len(down))

    def _narrow(self, x: Tensor, layer: FrozenLayer) -> bool:
        """Whether the LoRA of rank² costs less than a dense ΔW, for this input; counted in multiplications."""
        geometry = layer.geometry
        if geometry is None:
            positions = x.numel() // x.shape[-1]
        elif geometry.groups == 1 and self.shape is not None:
            positions = len(x) * math.prod(walked(x.shape[2:], self.shape[2:], geometry))
        else:
            return False
        size = self.shape or (len(self.tensors[W1_A]), self.tensors[W1_B].shape[1])
        out_features, columns = size[0], math.prod(size[1:])
        # six products of width rank², against the gradient of ΔW and, with no merging in half precision, ΔW twice
        narrow = SKINNY * 3 * positions * self.rank**2 * (out_features + columns)
        dense = ((1 if _exact(x.dtype) else 3) * positions + REBUILDING) * out_features * columns
        return narrow < dense


def khatri_rao(a: Tensor, b: Tensor) -> Tensor:
    """All products of a row of ``a`` with a row of ``b``: (p, n), (q, n) → (p·q, n)."""
    return (a[:, None] * b[None]).flatten(0, 1)


def _khatri_rao_gradients(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """∂L/∂a, ∂L/∂b from ∂L/∂khatri_rao(a, b)."""
    grad = grad.view(len(a), len(b), -1)
    return (grad * b[None]).sum(1), (grad * a[:, None]).sum(0)


class _LinearWithNarrow(torch.autograd.Function):
    """y = x Wᵀ + b + s (x Dᵀ) U over x (…, in), D = w1_b ⊙ w2_b, U = w1_aᵀ ⊙ w2_aᵀ; saves x and the factors."""

    @staticmethod
    @own_output
    def forward(
        ctx, x: Tensor, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, scale: float, layer: FrozenLayer
    ) -> Tensor:
        y = layer.forward(x)
        down, up = khatri_rao(w1_b, w2_b).to(x.dtype), khatri_rao(w1_a.T, scale * w2_a.T).to(x.dtype)
        y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]) @ down.T, up)
        ctx.layer, ctx.scale = layer, scale
        ctx.save_for_backward(x, w1_a, w1_b, w2_a, w2_b)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, w1_a, w1_b, w2_a, w2_b = ctx.saved_tensors
        rows, grads = x.reshape(-1, x.shape[-1]), grad.to(x.dtype).reshape(-1, grad.shape[-1])
        down, up = khatri_rao(w1_b, w2_b).to(x.dtype), khatri_rao(w1_a.T, ctx.scale * w2_a.T).to(x.dtype)
        grad_up = ((rows @ down.T).T @ grads).to(w1_a.dtype)
        grad_hidden = grads @ up.T
        grad_down = (grad_hidden.T @ rows).to(w1_b.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            with ctx.layer.weight(grads) as weight:
                grad_x = grads @ weight
            grad_x = grad_x.addmm_(grad_hidden, down).view(x.shape)
        grad_w1_a, grad_w2_a = _khatri_rao_gradients(grad_up.mul_(ctx.scale), w1_a.T, w2_a.T)
        grad_w1_b, grad_w2_b = _khatri_rao_gradients(grad_down, w1_b, w2_b)
        return grad_x, grad_w1_a.T, grad_w1_b, grad_w2_a.T, grad_w2_b, None, None


class _WithDense(torch.autograd.Function):
    """The layer with W + ΔW for its weight; saves x and the factors."""

    @staticmethod
    @own_output
    def forward(
        ctx, x: Tensor, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, scale: float, layer: FrozenLayer
    ) -> Tensor:
        ctx.layer, ctx.scale = layer, scale
        ctx.save_for_backward(x, w1_a, w1_b, w2_a, w2_b)
        pairs = (w1_a, w1_b, scale * w2_a, w2_b)
        with layer.weight(x) as weight:
            ctx.kernel = weight.shape
            y = _with_both(lambda matrix: apply_weight(x, matrix, layer.geometry), weight, pairs)
        bias = layer.bias(x)
        return y if bias is None else y.add_(per_channel(bias, layer.geometry))

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, w1_a, w1_b, w2_a, w2_b = ctx.saved_tensors
        geometry, grad = ctx.layer.geometry, grad.to(x.dtype)
        pairs = (w1_a, w1_b, ctx.scale * w2_a, w2_b)

        grad_x = None
        if ctx.needs_input_grad[0]:
            with ctx.layer.weight(grad) as weight:
                grad_x = _with_both(lambda matrix: input_gradient(grad, x.shape, matrix, geometry), weight, pairs)
        if geometry is None:
            rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
            gradients = _hadamard_gradients(lambda some: grads[:, some].T @ rows, pairs)
        else:
            dense = kernel_gradient(grad, x, x.new_empty(ctx.kernel), geometry).flatten(1)
            gradients = _hadamard_gradients(lambda some: dense[some], pairs)
        gradients[2].mul_(ctx.scale)
        return grad_x, *gradients, None, None


def _with_both(product: Callable[[Tensor], Tensor], weight: Tensor, pairs: Pairs) -> Tensor:
    """A product with W + ΔW; in half precision, where that sum would round ΔW away, one with each."""
    if _exact(weight.dtype):
        return product(_plus_hadamard(weight, pairs))
    delta = _plus_hadamard(torch.zeros_like(weight, dtype=torch.float32), pairs)
    return product(weight).add_(product(delta.to(weight.dtype)))


def _exact(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.float64)


def _tiles(shape: Sequence[int]) -> Iterator[slice]:
    """Rows of a dense matrix, some at a time, that they stay in the cache."""
    rows = max(1, TILE // shape[1])
    return (slice(first, first + rows) for first in range(0, shape[0], rows))


def _plus_hadamard(weight: Tensor, pairs: Pairs) -> Tensor:
    """W + (w1_a w1_b) ∘ (w2_a w2_b)."""
    w1_a, w1_b, w2_a, w2_b = (factor.to(weight.dtype) for factor in pairs)
    total, base = weight.new_empty(weight.shape), weight.flatten(1)
    for some in _tiles(base.shape):
        torch.addcmul(base[some], w1_a[some] @ w1_b, w2_a[some] @ w2_b, out=total.flatten(1)[some])
    return total


def _hadamard_gradients(gradient_of: Callable[[slice], Tensor], pairs: Pairs) -> list[Tensor]:
    """∂L/∂(w1_a, w1_b, w2_a, w2_b), from ∂L/∂ΔW some rows at a time."""
    gradients = [torch.zeros_like(factor) for factor in pairs]
    for some in _tiles((len(pairs[0]), pairs[1].shape[1])):
        grad = gradient_of(some).to(pairs[0].dtype)
        for this, other in ((0, 2), (2, 0)):
            a, b, other_a, other_b = *pairs[this : this + 2], *pairs[other : other + 2]
            half = (other_a[some] @ other_b).mul_(grad)
            torch.mm(half, b.T, out=gradients[this][some])
            gradients[this + 1].addmm_(a[some].T, half)
    return gradients
