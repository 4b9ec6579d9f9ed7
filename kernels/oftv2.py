"""OFTv2 on linear layers and convolutions: inputs rotated in blocks, as PEFT and OneTrainer have it.

* ``OFTv2``: y = W (x R) + b, so W' = W Rᵀ (Qiu et al. 2025, arXiv:2506.19847; PEFT's tuners/oft/layer.py and
  OneTrainer's modules/module/oft_utils.py). R is block-diagonal, R = I + 2Q + 2Q² + 2Q³ + Q⁴ per block: the Cayley
  transform (I + Q)(I − Q)⁻¹ cut short, which both trainers use unless told otherwise. A file does not tell; without
  the cut PEFT would turn the other way.
* ``oft_R.weight`` (blocks, n(n − 1)/2) is what lies above Q's diagonal, row by row; a single row may be shared by all
  blocks. ``oft_R.scaled_oft`` (OneTrainer) divides it by 2√(n − 1).
* Convolutions as OneTrainer has them: W' = W R over (in·kernel), which is the other way round. (PEFT turns overlapping
  patches of the input instead, which no weight does.)
* Linear layers and 1×1 convolutions are trained fused with the frozen layer; kept for backward is the input alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import Self

from .adapter import Adapter, Options, wide
from .dense import dense_contribution, through_weight
from .frozen import FrozenLayer, frozen, own_output
from .products import channel_dim, input_gradient, per_channel
from .rotations import Stage, back_through, turn, turned_stage

WEIGHT, SCALED = "oft_R.weight", "oft_R.scaled_oft"


class OFTv2(Adapter):
    """``oft_R.weight`` (blocks or 1, n(n − 1)/2); ``scaled``: OneTrainer's scaled OFT."""

    name = "OFTv2"
    factors = (WEIGHT,)

    def __init__(self, packed: Tensor, shape: Sequence[int] | None, scaled: bool = False) -> None:
        super().__init__({WEIGHT: packed}, shape)
        self.scaled = scaled
        self.size = (1 + math.isqrt(1 + 8 * packed.shape[1])) // 2
        if self.size * (self.size - 1) // 2 != packed.shape[1]:
            raise ValueError(f"{WEIGHT} has rows of {packed.shape[1]}, which fill no triangle")

    @classmethod
    def create(cls, shape: Sequence[int], options: Options, draws: torch.Generator) -> Self:
        """Zeros, in blocks of the divisor of in·kernel that is nearest to ``block_size``, as in PEFT and OneTrainer."""
        inputs = math.prod(shape[1:])
        if inputs < 2:
            raise ValueError("a layer with a single input has nothing to rotate")
        divisors = [size for size in range(2, inputs + 1) if inputs % size == 0]  # PEFT allows 1, which does nothing
        size = min(divisors, key=lambda divisor: (abs(divisor - options.block_size), divisor))
        return cls(torch.zeros(inputs // size, size * (size - 1) // 2), shape)

    @classmethod
    def read(cls, parts: Mapping[str, Tensor], shape: Sequence[int] | None) -> Self:
        if WEIGHT not in parts:
            raise ValueError(f"{WEIGHT} is missing")
        packed = parts[WEIGHT]
        if packed.ndim != 2:
            raise ValueError(f"{WEIGHT} {tuple(packed.shape)} is not (blocks, numbers)")
        adapter = cls(packed, shape, SCALED in parts and bool(parts[SCALED].all()))
        if shape is not None:
            inputs = math.prod(shape[1:])
            if inputs != len(packed) * adapter.size and (len(packed) > 1 or inputs % adapter.size):
                turned = f"{len(packed)} blocks of {adapter.size}"
                raise ValueError(f"{WEIGHT} has {turned}, the layer {inputs} inputs")
        return adapter

    def state(self) -> dict[str, Tensor]:
        return super().state() | ({SCALED: torch.tensor(True)} if self.scaled else {})

    @property
    def packed(self) -> Tensor:
        return self.tensors[WEIGHT]

    @property
    def factor(self) -> float:
        """What ``packed`` is multiplied with."""
        return 1 / (2 * math.sqrt(self.size - 1)) if self.scaled else 1.0

    def operators(self, inputs: int) -> Tensor:
        """R over ``inputs`` as (1, blocks, n, n)."""
        return rotation(self.packed, self.factor, inputs // self.size)[None]

    def difference(self, weight: Tensor) -> Tensor:
        base = wide(weight)
        rows = base.flatten(1)
        r = self.operators(rows.shape[1]).to(base)
        turned = turn(rows, r.mT if weight.ndim == 2 else r, False)
        return turned.view(base.shape) - base

    def contribution(self, x: Tensor, base_out: Tensor, layer: FrozenLayer) -> Tensor:
        if not self._turns_inputs(layer):
            return dense_contribution(self, x, layer)
        geometry = layer.geometry
        operators = self.operators(x.shape[channel_dim(geometry)]).to(x.dtype)
        # as columns, channels of a convolution's input turn by R = (Rᵀ)ᵀ
        turned = turn(x, operators if geometry is None else operators.mT, geometry is not None)
        extra, bias = frozen(turned - x, layer), layer.bias(base_out)
        return extra if bias is None else extra - per_channel(bias, geometry)

    def _on(self, x: Tensor, layer: FrozenLayer) -> Tensor:
        if not self._turns_inputs(layer):
            return through_weight(self, x, layer)
        return _LayerOnTurned.apply(x, self.packed, self.factor, self.size, layer)

    def _turns_inputs(self, layer: FrozenLayer) -> bool:
        """Whether turning the inputs is turning the weight: it mixes channels only."""
        if layer.geometry is None or layer.geometry.groups > 1:
            return layer.geometry is None
        if self.shape is not None:
            return math.prod(self.shape[2:]) == 1
        with layer.weight(self.packed) as weight:
            return math.prod(weight.shape[2:]) == 1

    def norm(self) -> Tensor:
        """‖Q‖ of the numbers as they are stored."""
        return wide(self.packed).norm() * math.sqrt(2) * self.factor


def rotation(packed: Tensor, factor: float, blocks: int) -> Tensor:
    """R = I + 2Q + 2Q² + 2Q³ + Q⁴ (blocks, n, n) for Q above the diagonal = factor · packed; float32 or wider."""
    values = wide(packed) * factor
    size = (1 + math.isqrt(1 + 8 * packed.shape[1])) // 2
    rows, columns = torch.triu_indices(size, size, 1, device=packed.device)
    upper = values.new_zeros(len(packed), size, size)
    upper[:, rows, columns] = values
    q = upper - upper.mT
    eye = torch.eye(size, dtype=q.dtype, device=q.device)
    r = eye + q @ (2 * eye + q @ (2 * eye + q @ (2 * eye + q)))
    return r.expand(blocks, -1, -1)


class _LayerOnTurned(torch.autograd.Function):
    """y = W (x R) + b, R for Rᵀ on convolutions (1×1); saves x."""

    @staticmethod
    @own_output
    def forward(ctx, x: Tensor, packed: Tensor, factor: float, size: int, layer: FrozenLayer):
        ctx.layer, ctx.factor, ctx.size = layer, factor, size
        ctx.save_for_backward(x, packed)
        stage = _stage(rotation(packed, factor, _blocks(x, size, layer)), x, layer)
        return layer.forward(turned_stage(x, stage, layer.geometry is not None, False))

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, packed = ctx.saved_tensors
        layer, (needs_x, needs_packed, *_) = ctx.layer, ctx.needs_input_grad
        second, grad_packed = layer.geometry is not None, None
        with layer.weight(x) as weight:
            grad_turned = input_gradient(grad.to(x.dtype), x.shape, weight, layer.geometry)
        with torch.set_grad_enabled(needs_packed):
            leaf = packed.detach().requires_grad_(needs_packed)
            r = rotation(leaf, ctx.factor, _blocks(x, ctx.size, layer))
        stage = _stage(r.detach(), x, layer)
        products, _, grad_x = back_through(x, grad_turned, stage, second, False, True)
        if needs_packed:
            (grad_packed,) = torch.autograd.grad(r, leaf, (products.mT if second else products).to(r.dtype))
        return grad_x if needs_x else None, grad_packed, None, None, None


def _blocks(x: Tensor, size: int, layer: FrozenLayer) -> int:
    return x.shape[channel_dim(layer.geometry)] // size


def _stage(r: Tensor, x: Tensor, layer: FrozenLayer) -> Stage:
    """What acts on ``x`` as row vectors: R, on a convolution's input Rᵀ."""
    r = r.to(x.dtype)
    return Stage(1, 1, r if layer.geometry is None else r.mT)
