"""DoRA: direction by any additive family, norms learnt apart.

* ``DoRA``: W' = m ∘ V / ‖V‖ with V = W + ΔW (Liu et al. 2024, arXiv:2402.09353). The norm runs along one axis of the
  weight: one m per output (LyCORIS' default, PEFT, ai-toolkit) or per input (OneTrainer's default). ΔW comes from an
  adapter of another family; nothing is built that this adapter would not build.
* ``attached``: from a file's tensor, whatever its spelling, to a ``DoRA`` around the adapter that came with it.
* ``constant_norms``: for finite differences, which have to see the same constants as the gradients.

‖V‖ is a constant to gradients (§4.3 of the paper; PEFT and OneTrainer do the same, LyCORIS does not). It is never kept
from one step to the next: a layer on loan cannot promise that its weight is still the same, and ``moved_rows`` takes as
long as the terms that such a memory would not save.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from typing_extensions import Self

from .adapter import Adapter, Additive, wide
from .frozen import FrozenLayer, frozen
from .products import channel_sum, per_channel

SCALE = "dora_scale"
AXES = ("output", "input")  # of a weight (out, in, *kernel)
# LyCORIS, kohya, OneTrainer; PEFT, with and without its module; ai-toolkit
PARTS = (SCALE, "lora_magnitude_vector", "lora_magnitude_vector.weight", "magnitude")


class DoRA(Adapter):
    """``inner`` and ``magnitude`` m, (out, 1, *ones) or (1, in, *ones)."""

    name = "DoRA"

    def __init__(self, inner: Additive, magnitude: Tensor, axis: int) -> None:
        super().__init__({**inner.tensors, SCALE: magnitude}, inner.shape, inner.alpha)
        self.inner, self.axis = inner, axis
        self._held: list[Tensor] | None = None  # the norms that ``constant_norms`` holds on to

    @classmethod
    def around(cls, inner: Additive, weight: Tensor, axis: str) -> Self:
        """A fresh adapter, ΔW = 0, with the norms of ``weight`` along ``axis``."""
        if axis not in AXES:
            raise ValueError(f"dora is {axis!r}, expected one of {', '.join(AXES)}")
        along = AXES.index(axis)
        with torch.no_grad():
            norms = _norms(inner.moved_rows(weight), weight.shape, along)
        sizes = [1] * weight.ndim
        sizes[along] = len(norms)
        return cls(inner, norms.to(next(iter(inner.tensors.values())).device).view(sizes), along)

    @property
    def fast_parts(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner.fast_parts

    @property
    def fixed_parts(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner.fixed_parts

    @property
    def magnitude(self) -> Tensor:
        return self.tensors[SCALE]

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        other = copy.copy(self)
        other.inner, other._held = self.inner.with_tensors(tensors), None
        other.tensors = {**other.inner.tensors, SCALE: tensors[SCALE]}
        return other

    def state(self) -> dict[str, Tensor]:
        magnitude = self.magnitude.detach().to("cpu", copy=True).contiguous()
        return {**self.inner.state(), SCALE: magnitude}

    def norms(self, weight: Tensor) -> Tensor:
        """‖W + ΔW‖ along the axis, (out,) or (in,), float32 or wider; a constant to autograd."""
        if self._held:
            return self._held[0]
        with torch.no_grad():
            norms = _norms(self.inner.moved_rows(weight), weight.shape, self.axis)
        if self._held is not None:
            self._held.append(norms)
        return norms

    def _excess(self, weight: Tensor) -> Tensor:
        """m / ‖V‖ − 1, which stays exact in half precision while it is small; 0 where V has no direction."""
        norms = self.norms(weight)
        magnitude = wide(self.magnitude).flatten().to(norms.device)
        if len(norms) != len(magnitude):
            raise ValueError(f"{SCALE} has {len(magnitude)} numbers, a weight of {tuple(weight.shape)} {len(norms)}")
        return torch.where(norms > 0, magnitude / norms.where(norms > 0, 1.0) - 1, 0.0)

    def difference(self, weight: Tensor) -> Tensor:
        delta = self.inner.difference(weight)
        sizes = [1] * weight.ndim
        sizes[self.axis] = -1
        return delta + (wide(weight) + delta) * self._excess(weight).view(sizes)

    def contribution(self, x: Tensor, base_out: Tensor, layer: FrozenLayer) -> Tensor:
        """Per output Δx + e ∘ (Wx + Δx), per input W(e ∘ x) + Δ(x + e ∘ x), with e = m / ‖V‖ − 1."""
        excess, bias = self._excess_on(x, layer).to(x.dtype), layer.bias(x)
        bias = None if bias is None else per_channel(bias, layer.geometry)
        if self.axis == 0:
            extra = self.inner.contribution(x, base_out, layer)
            moved = base_out + extra
            return extra + (moved if bias is None else moved - bias) * excess
        turned = frozen(x * excess, layer)
        extra = self.inner.contribution(torch.addcmul(x, x, excess), base_out, layer)
        return extra + (turned if bias is None else turned - bias)

    def _excess_on(self, x: Tensor, layer: FrozenLayer) -> Tensor:
        """``_excess`` broadcastable over the layer's output or its input ``x``."""
        with layer.weight(x) as weight:
            excess = self._excess(weight)
        if self.axis == 1 and layer.geometry is not None:
            excess = excess.repeat(layer.geometry.groups)
        return per_channel(excess, layer.geometry)

    def _on(self, x: Tensor, layer: FrozenLayer) -> Tensor:
        return self._gained(x, layer, self.inner._on)

    def _on_with_dropout(self, x: Tensor, layer: FrozenLayer, draws: torch.Generator) -> Tensor:
        """Dropout where the inner family has it; the norms are those of all of V."""
        inner = copy.copy(self.inner)
        inner.dropout = self.dropout
        return self._gained(x, layer, lambda x, layer: inner._on_with_dropout(x, layer, draws))

    def _gained(self, x: Tensor, layer: FrozenLayer, on: Callable[[Tensor, FrozenLayer], Tensor]) -> Tensor:
        excess = self._excess_on(x, layer)
        if self.axis == 1:
            return on(_Gain.apply(x, excess, None), layer)
        bias = layer.bias(x)
        return _Gain.apply(on(x, layer), excess, None if bias is None else per_channel(bias, layer.geometry))

    def norm(self) -> Tensor:
        """‖ΔW‖ of the inner adapter: m is no deviation."""
        return self.inner.norm()

    def limit_norm(self, maximum: float) -> bool:
        return self.inner.limit_norm(maximum)


@contextmanager
def constant_norms(adapters: Iterable[Adapter]) -> Iterator[None]:
    """For the time of a ``with``, ‖V‖ of each ``DoRA`` stays what it is when it is asked for first."""
    held = [adapter for adapter in adapters if isinstance(adapter, DoRA)]
    for adapter in held:
        adapter._held = []
    try:
        yield
    finally:
        for adapter in held:
            adapter._held = None


def attached(inner: Additive, name: str, stored: Tensor, shape: Sequence[int] | None) -> DoRA:
    """A ``DoRA`` from ``stored``, found under ``name`` next to the tensors of ``inner``, for a weight of ``shape``.

    The axis is told by the tensor's own shape, (out, 1, …) or (1, in, …), so that square weights are no riddle. Vectors
    are per output, and so is whatever PEFT stores, which on convolutions is (1, out, 1, 1). Raises ValueError.
    """
    shape = inner.shape if shape is None else shape
    lengths = stored.shape if name == SCALE and stored.ndim > 1 else (stored.numel(),)
    for axis, length in enumerate(lengths[:2]):
        if length == stored.numel() and (shape is None or length == shape[axis]):
            sizes = [1] * (2 if shape is None else len(shape))
            sizes[axis] = length
            return DoRA(inner, stored.reshape(sizes), axis)
    raise ValueError(f"{name} is {tuple(stored.shape)}, which is no axis of {'any' if shape is None else tuple(shape)}")


def _norms(rows: Iterable[Tensor], shape: Sequence[int], axis: int) -> Tensor:
    """‖·‖ along ``axis`` of a weight of ``shape`` that comes as pieces of rows."""
    if axis == 0:
        return torch.cat([torch.linalg.vector_norm(piece, dim=1) for piece in rows])
    columns = torch.stack([piece.mul_(piece).sum(0) for piece in rows]).sum(0)
    return columns.view(shape[1], -1).sum(1).sqrt_()


class _Gain(torch.autograd.Function):
    """z + e ∘ (z − b), of which b stays as it is; saves z."""

    @staticmethod
    def forward(ctx, z: Tensor, excess: Tensor, bias: Tensor | None):
        ctx.save_for_backward(z, excess, bias)
        factor = excess.to(z.dtype)
        return torch.addcmul(z, z, factor) if bias is None else torch.lerp(z, bias, -factor)

    @staticmethod
    def backward(ctx, grad: Tensor):
        z, excess, bias = ctx.saved_tensors
        channels = grad.ndim - excess.ndim
        product = grad * z
        grad_excess = channel_sum(product, channels).view(excess.shape)
        if bias is not None:
            grad_excess.sub_(channel_sum(grad, channels).view(excess.shape).mul_(bias))
        grad_z = torch.addcmul(grad, grad, excess.to(grad.dtype), out=product) if ctx.needs_input_grad[0] else None
        return grad_z, grad_excess.to(excess.dtype), None
