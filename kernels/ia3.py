"""(IA)³ on linear layers and convolutions: a learnt factor for every output, or for every input.

* ``IA3``: W' = (1 + w) ∘ W along the outputs, or along the inputs with ``on_input`` (Liu et al. 2022, arXiv:2205.05638;
  LyCORIS' modules/ia3.py). ``weight`` (channels,), of convolutions (1, channels, 1, …).
* ``PeftIA3``: PEFT's files, W' = l ∘ W; on outputs PEFT scales the bias as well. ``ia3_l`` is (out, 1) or (1, in); of
  convolutions always (1, channels, 1, …): there, where a layer has as many inputs as outputs, the outputs are meant
  (PEFT's ``feedforward_modules``, its inputs, are in its configuration only).
* Trained fused with the frozen layer; kept for backward is the output before scaling, or the input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import Self

from .adapter import Adapter, Options, scalar, wide
from .frozen import FrozenLayer, frozen, own_output
from .products import channel_dim, channel_sum, input_gradient, per_channel

WEIGHT, ON_INPUT, PEFT = "weight", "on_input", "ia3_l"


class IA3(Adapter):
    """``weight`` w; ``on_input`` None where only the layer can tell."""

    name = "IA3"
    factors = (WEIGHT,)
    scales_bias = False

    def __init__(self, tensors: Mapping[str, Tensor], shape: Sequence[int] | None, on_input: bool | None) -> None:
        super().__init__(tensors, shape)
        self.on_input = on_input

    @classmethod
    def create(cls, shape: Sequence[int], options: Options, draws: torch.Generator) -> Self:
        """Zeros."""
        channels = shape[1 if options.on_input else 0]
        sizes = (channels,) if len(shape) == 2 else (1, channels, *(1 for _ in shape[2:]))
        return cls({WEIGHT: torch.zeros(sizes)}, shape, options.on_input)

    @classmethod
    def read(cls, parts: Mapping[str, Tensor], shape: Sequence[int] | None) -> Adapter:
        if PEFT in parts:
            return PeftIA3.read(parts, shape)
        on_input = scalar(parts, ON_INPUT)
        if WEIGHT not in parts or on_input is None:
            raise ValueError(f"{ON_INPUT if WEIGHT in parts else WEIGHT} is missing")
        adapter = cls({WEIGHT: parts[WEIGHT]}, shape, bool(on_input))
        if shape is not None:
            adapter.scales_inputs(*shape[:2])
        return adapter

    def state(self) -> dict[str, Tensor]:
        return super().state() | {ON_INPUT: torch.tensor(int(bool(self.on_input)))}

    def excess(self) -> Tensor:
        """w (channels,)"""
        return self.tensors[WEIGHT].flatten()

    def scales_inputs(self, outputs: int, inputs: int) -> bool:
        """Whether the factors are those of the inputs. Raises ValueError where they are not as many."""
        count = self.excess().numel()
        on_input = count != outputs if self.on_input is None else self.on_input
        if count != (inputs if on_input else outputs):
            raise ValueError(f"(IA)³ has {count} factors, the layer {outputs} outputs and {inputs} inputs")
        return on_input

    def difference(self, weight: Tensor) -> Tensor:
        base = wide(weight)
        sizes = [1] * base.ndim
        sizes[1 if self.scales_inputs(*weight.shape[:2]) else 0] = -1
        return base * self.excess().to(base).view(sizes)

    def contribution(self, x: Tensor, base_out: Tensor, layer: FrozenLayer) -> Tensor:
        geometry = layer.geometry
        channels, groups = channel_dim(geometry), 1 if geometry is None else geometry.groups
        excess, bias = self.excess().to(x.dtype), layer.bias(base_out)
        if self.scales_inputs(base_out.shape[channels], x.shape[channels] // groups):
            extra = frozen(x * per_channel(excess.repeat(groups), geometry), layer)
            return extra if bias is None else extra - per_channel(bias, geometry)
        y = base_out if bias is None or self.scales_bias else base_out - per_channel(bias, geometry)
        return y * per_channel(excess, geometry)

    def merged_bias(self, bias: Tensor | None, strength: float = 1.0) -> Tensor | None:
        if bias is None or not self.scales_bias or self.on_input or len(bias) != self.excess().numel():
            return super().merged_bias(bias, strength)
        return (wide(bias) * (1 + strength * self.excess().to(bias.device))).to(bias.dtype)

    def _on(self, x: Tensor, layer: FrozenLayer) -> Tensor:
        if self.on_input is None:
            return super()._on(x, layer)
        factors = 1 + wide(self.excess())
        if self.on_input:
            factors = factors.repeat(1 if layer.geometry is None else layer.geometry.groups)
            return _OnScaled.apply(x, factors, layer)
        return _Scaled.apply(x, factors, self.scales_bias, layer)

    def norm(self) -> Tensor:
        """‖w‖: how far the factors are from 1."""
        return self.excess().norm()


class PeftIA3(IA3):
    """``ia3_l`` l = 1 + w, as PEFT 0.21 uses it (tuners/ia3/layer.py)."""

    scales_bias = True

    @classmethod
    def read(cls, parts: Mapping[str, Tensor], shape: Sequence[int] | None) -> Self:
        factors = parts[PEFT]
        if factors.ndim < 2 or factors.numel() != max(factors.shape):
            raise ValueError(f"{PEFT} {tuple(factors.shape)} is not one number per channel")
        adapter = cls({PEFT: factors}, shape, len(factors) == 1 if factors.ndim == 2 else None)
        if shape is not None:
            adapter.on_input = adapter.scales_inputs(*shape[:2])
        return adapter

    def state(self) -> dict[str, Tensor]:
        return Adapter.state(self)

    def excess(self) -> Tensor:
        return self.tensors[PEFT].flatten() - 1

    def limit_norm(self, maximum: float) -> bool:
        norm = self.norm().item()
        if norm <= maximum:
            return False
        with torch.no_grad():
            self.tensors[PEFT].sub_(1).mul_(maximum / norm).add_(1)
        return True


class _Scaled(torch.autograd.Function):
    """y = f ∘ Wx + b, or f ∘ (Wx + b) if ``with_bias``; saves Wx + b."""

    @staticmethod
    @own_output
    def forward(ctx, x: Tensor, factors: Tensor, with_bias: bool, layer: FrozenLayer):
        y, geometry = layer.forward(x), layer.geometry
        ctx.layer, ctx.with_bias, ctx.shape = layer, with_bias, x.shape
        ctx.save_for_backward(y, factors)
        own = per_channel(factors.to(y.dtype), geometry)
        bias = None if with_bias else layer.bias(y)
        return y * own if bias is None else torch.addcmul(per_channel(bias, geometry) * (1 - own), y, own)

    @staticmethod
    def backward(ctx, grad: Tensor):
        y, factors = ctx.saved_tensors
        layer, geometry, grad = ctx.layer, ctx.layer.geometry, grad.to(y.dtype)
        grad_x = grad_factors = None
        if ctx.needs_input_grad[1]:
            grad_factors = channel_sum(grad * y, channel_dim(geometry))
            bias = None if ctx.with_bias else layer.bias(y)
            if bias is not None:
                grad_factors -= bias * channel_sum(grad, channel_dim(geometry))
            grad_factors = grad_factors.to(factors.dtype)
        if ctx.needs_input_grad[0]:
            with layer.weight(y) as weight:
                scaled = grad * per_channel(factors.to(y.dtype), geometry)
                grad_x = input_gradient(scaled, ctx.shape, weight, geometry)
        return grad_x, grad_factors, None, None


class _OnScaled(torch.autograd.Function):
    """y = W (f ∘ x) + b; saves x."""

    @staticmethod
    @own_output
    def forward(ctx, x: Tensor, factors: Tensor, layer: FrozenLayer):
        ctx.layer = layer
        ctx.save_for_backward(x, factors)
        return layer.forward(x * per_channel(factors.to(x.dtype), layer.geometry))

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, factors = ctx.saved_tensors
        geometry, grad_factors = ctx.layer.geometry, None
        with ctx.layer.weight(x) as weight:
            grad_x = input_gradient(grad.to(x.dtype), x.shape, weight, geometry)
        if ctx.needs_input_grad[1]:
            grad_factors = channel_sum(grad_x * x, channel_dim(geometry)).to(factors.dtype)
        return grad_x.mul_(per_channel(factors.to(x.dtype), geometry)), grad_factors, None
