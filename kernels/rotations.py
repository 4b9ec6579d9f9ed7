"""Block-diagonal rotations of channels: what OFT, BOFT and OFTv2 are made of.

* ``skew``: Q = B − Bᵀ, its norm limited.
* ``cayley``: R = (I + Q)(I − Q)⁻¹, orthogonal; keeps R alone for backward.
* ``turn``: channels y → y S₀ S₁ … S₍ₘ₋₁₎, every stage Sᵢ block-diagonal in an order of its own; ``turn_back``: the
  inverse, y S₍ₘ₋₁₎ᵀ … S₀ᵀ. One stage is plain OFT.
* ``OutputRotation``: an adapter that turns a layer's outputs; the family says with which ``operators``.
* ``turned_layer``: R(Wx) + b fused with the frozen layer. Since R is orthogonal, all that backward needs can be had
  from the output, which whatever comes next usually keeps anyway. Neither the input nor the layer's weight is kept.

``operators`` are (stages, blocks, n, n) and act on row vectors, from the right. Channels are the last dimension, or the
second with ``second=True`` (convolutions; weights as (1, out, in·kernel)). Stage i is the butterfly's (Liu et al.
2024, arXiv:2311.06243): a block takes n/2 neighbouring channels and the n/2 that are 2ⁱ·n/2 further on, in this order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from .adapter import Adapter, Options, scalar, wide
from .dense import dense_contribution, through_weight
from .frozen import FrozenLayer, no_view, own_output
from .products import ConvGeometry, channel_dim, channel_sum, input_gradient, per_channel

BLOCKS, RESCALE = "oft_blocks", "rescale"
WIDTH = 128  # of the blocks that a butterfly's stages are combined to, in channels
ROWS = 256  # of a linear layer's input that are worked on at once on a CPU


class OutputRotation(Adapter):
    """``oft_blocks`` ([stages,] blocks, n, n), ``rescale`` (out, 1, …); ``alpha`` is the constraint, 0 for none.

    W' = rescale ∘ (rows of W turned).
    """

    alpha: float
    factors = (BLOCKS,)

    @classmethod
    def fresh(cls, sizes: Sequence[int], shape: Sequence[int], options: Options) -> Self:
        """No rotation, by blocks of ``sizes``."""
        tensors = {BLOCKS: torch.zeros(tuple(sizes))}
        if options.rescale:
            tensors[RESCALE] = torch.ones(shape[0], *(1 for _ in shape[1:]))
        return cls(tensors, shape, options.constraint)

    @classmethod
    def fitting(cls, parts: Mapping[str, Tensor], shape: Sequence[int] | None) -> Self:
        """From a file's tensors. Raises ValueError where they do not fit the outputs."""
        if BLOCKS not in parts:
            raise ValueError(f"{BLOCKS} is missing")
        blocks = parts[BLOCKS]
        if blocks.ndim < 3 or blocks.shape[-1] != blocks.shape[-2]:
            raise ValueError(f"{BLOCKS} {tuple(blocks.shape)} are no square matrices")
        adapter = cls({name: parts[name] for name in (BLOCKS, RESCALE) if name in parts}, shape, scalar(parts) or 0.0)
        if shape is not None and adapter.outputs != shape[0]:
            turned = f"{BLOCKS} {tuple(blocks.shape)} rotate {adapter.outputs} outputs"
            raise ValueError(f"{turned}, the layer has {shape[0]}")
        if RESCALE in parts and parts[RESCALE].numel() != adapter.outputs:
            raise ValueError(f"{RESCALE} {tuple(parts[RESCALE].shape)} is not one number for each of {adapter.outputs}")
        return adapter

    def operators(self) -> Tensor:
        """(stages, blocks, n, n), orthogonal, float32 or wider, differentiable."""
        raise NotImplementedError

    @property
    def blocks(self) -> Tensor:
        return self.tensors[BLOCKS]

    @property
    def rescale(self) -> Tensor | None:
        """(out,)"""
        return self.tensors[RESCALE].flatten() if RESCALE in self.tensors else None

    @property
    def outputs(self) -> int:
        return self.blocks.shape[-3] * self.blocks.shape[-1]

    @property
    def limit(self) -> float:
        return self.alpha * self.outputs

    def difference(self, weight: Tensor) -> Tensor:
        base = wide(weight)
        turned = turn_weight(base, self.operators().to(base))
        if self.rescale is not None:
            turned = turned * self.rescale.to(base).view(-1, *(1 for _ in base.shape[1:]))
        return turned - base

    def contribution(self, x: Tensor, base_out: Tensor, layer: FrozenLayer) -> Tensor:
        geometry = layer.geometry
        if not self._turns_outputs(geometry):
            return dense_contribution(self, x, layer)
        bias = layer.bias(base_out)
        y = base_out if bias is None else base_out - per_channel(bias, geometry)
        turned = turn(y, self.operators().to(y.dtype), geometry is not None)
        if self.rescale is not None:
            turned = turned * per_channel(self.rescale.to(y.dtype), geometry)
        return turned - y

    def _on(self, x: Tensor, layer: FrozenLayer) -> Tensor:
        if not self._turns_outputs(layer.geometry):
            return through_weight(self, x, layer)
        return turned_layer(x, self.operators(), self.rescale, layer)

    def _turns_outputs(self, geometry: ConvGeometry | None) -> bool:
        """Whether turning the outputs is turning the weight: no block reaches over several groups."""
        if geometry is None or geometry.groups == 1:
            return True
        return self.blocks.ndim == 3 and self.outputs // geometry.groups % self.blocks.shape[-1] == 0

    def norm(self) -> Tensor:
        """‖Q‖ without the constraint."""
        return skew(self.blocks).norm()


def skew(blocks: Tensor, limit: float = 0.0) -> Tensor:
    """Q = B − Bᵀ (…, n, n), all together shrunk to ‖Q‖ ≤ ``limit``; none if that is 0 or beyond all numbers."""
    q = wide(blocks)
    q = q - q.mT
    if 0 < limit < torch.finfo(q.dtype).max:
        q = q * (limit / q.norm().clamp_min(limit))
    return q


def cayley(q: Tensor) -> Tensor:
    """R = (I + Q)(I − Q)⁻¹ for skew-symmetric ``q`` (…, n, n), float32 or wider."""
    return _Cayley.apply(q)


class _Cayley(torch.autograd.Function):
    """R = 2M − I with M = (I − Q)⁻¹; saves R. dR = 2 M dQ M."""

    @staticmethod
    def forward(ctx, q: Tensor):
        eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
        # I − Q is never singular, so nothing waits for the device to say whether it was
        r = torch.linalg.inv_ex(eye - q)[0].mul_(2).sub_(eye)
        ctx.save_for_backward(r)
        return r

    @staticmethod
    def backward(ctx, grad: Tensor):
        (r,) = ctx.saved_tensors
        twice_m = (r + torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)).mT
        return (twice_m @ grad @ twice_m).mul_(0.5)


class Stage(NamedTuple):
    """A block-diagonal matrix ``r`` (blocks, n, n): blocks of ``groups`` · n/groups channels, ``far`` groups apart."""

    far: int
    groups: int
    r: Tensor

    @property
    def back(self) -> Stage:
        return self._replace(r=self.r.mT)


def combined(operators: Tensor) -> list[Stage]:
    """``operators`` as few stages of blocks up to ``WIDTH``: larger products, each of them faster; differentiable."""
    stages, half = len(operators), operators.shape[-1] // 2
    if stages == 1:
        return [Stage(1, 1, operators[0])]
    at_once = max(1, int(math.log2(WIDTH / half)))
    return [_composed(operators[first : first + at_once], 1 << first) for first in range(0, stages, at_once)]


def _composed(operators: Tensor, far: int) -> Stage:
    """The product of neighbouring stages, by turning the rows of identities."""
    stages, blocks, n, _ = operators.shape
    groups, half = 1 << stages, n // 2
    size = groups * half
    count = blocks * n // size
    r = torch.eye(size, dtype=operators.dtype, device=operators.device).expand(count, -1, -1)
    for stage, own in enumerate(operators.unbind()):
        apart, pairs = 1 << stage, 1 << (stages - 1 - stage)
        own = own.view(count // far, pairs, apart, far, n, n).permute(0, 3, 1, 2, 4, 5).reshape(count, -1, n, n)
        r = r.reshape(count, size, pairs, 2, apart, half).permute(0, 2, 4, 1, 3, 5).reshape(count, -1, size, n) @ own
        r = r.view(count, pairs, apart, size, 2, half).permute(0, 3, 1, 4, 2, 5).reshape(count, size, size)
    return Stage(far, groups, r)


def turn(y: Tensor, operators: Tensor, second: bool) -> Tensor:
    """y S₀ S₁ …, in y's shape; differentiable."""
    for stage in combined(operators):
        y = _staged(y, stage, second)
    return y


def turn_back(y: Tensor, operators: Tensor, second: bool) -> Tensor:
    """y … S₁ᵀ S₀ᵀ, in y's shape; differentiable."""
    for stage in reversed(combined(operators)):
        y = _staged(y, stage.back, second)
    return y


def turn_weight(weight: Tensor, operators: Tensor) -> Tensor:
    """The rows of ``weight`` (out, in, *kernel) turned as the layer's outputs are."""
    return turn(weight.reshape(1, len(weight), -1), operators, True).view(weight.shape)


def turned_layer(x: Tensor, operators: Tensor, rescale: Tensor | None, layer: FrozenLayer) -> Tensor:
    """rescale ∘ (Wx S₀ S₁ …) + b; ``rescale`` (out,). Differentiable in all three tensors."""
    return _TurnedLayer.apply(x, operators, rescale, layer)


class _TurnedLayer(torch.autograd.Function):
    """Saves the output, or with ``rescale`` the turned product before it, and ``operators``."""

    @staticmethod
    @own_output
    def forward(ctx, x: Tensor, operators: Tensor, rescale: Tensor | None, layer: FrozenLayer):
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        geometry, z = layer.geometry, layer.forward(x)
        bias, stages = layer.bias(z), _in(z.dtype, combined(operators))
        for stage in stages:
            z = turned_stage(z, stage, geometry is not None, True)
        if bias is not None:  # went into the turn with the rest
            turned = bias[None]
            for stage in stages:
                turned = turned_stage(turned, stage, False, False)
            z.add_(per_channel(bias - turned[0] if rescale is None else -turned[0], geometry))
        z = no_view(z)  # before it is saved: a write into it has to be noticed
        ctx.save_for_backward(z, operators, rescale)
        if rescale is None:
            return z
        out = z * per_channel(rescale.to(z.dtype), geometry)
        return out if bias is None else out.add_(per_channel(bias, geometry))

    @staticmethod
    def backward(ctx, grad: Tensor):
        z, operators, rescale = ctx.saved_tensors
        needs_x, needs_operators, needs_rescale, _ = ctx.needs_input_grad
        layer, geometry, second = ctx.layer, ctx.layer.geometry, ctx.layer.geometry is not None
        grad, grad_x, grad_operators, grad_rescale = grad.to(ctx.dtype), None, None, None
        if rescale is not None:
            grad_rescale = channel_sum(grad * z, channel_dim(geometry)).to(rescale.dtype) if needs_rescale else None
            grad = grad * per_channel(rescale.to(grad.dtype), geometry)
        bias = layer.bias(z) if rescale is None else None
        bias = None if bias is None else bias[None].to(operators.dtype)
        with torch.set_grad_enabled(needs_operators):
            leaf = operators.detach().requires_grad_(needs_operators)
            exact = combined(leaf)
        gradients: list[Tensor] = []
        stages = [stage._replace(r=stage.r.detach()) for stage in exact]
        own = _in(ctx.dtype, stages)
        for n in reversed(range(len(stages))):
            reuse = n < len(stages) - 1
            products, sums, before = back_through(z, grad, own[n], second, bias is not None, reuse)
            if needs_operators:
                if bias is not None:  # cheaper to take out here than from the output
                    products -= _blocks(bias, own[n], False).mT @ _blocks(sums[None].to(bias.dtype), own[n], False)
                # what came into the stage is z Rᵀ; its products with the gradients are R times those of z
                gradients.insert(0, stages[n].r @ products.to(operators.dtype))
                if n:
                    z = turned_stage(z, own[n].back, second, reuse)
                    bias = None if bias is None else turned_stage(bias, stages[n].back, False, False)
            grad = before
        if needs_operators:
            (grad_operators,) = torch.autograd.grad([stage.r for stage in exact], leaf, gradients)
        if needs_x:
            with layer.weight(grad) as weight:
                grad_x = input_gradient(grad, ctx.shape, weight, geometry)
        return grad_x, grad_operators, grad_rescale, None


def _in(dtype: torch.dtype, stages: Sequence[Stage]) -> list[Stage]:
    return [stage._replace(r=stage.r.to(dtype)) for stage in stages]


def turned_stage(y: Tensor, stage: Stage, second: bool, reuse: bool) -> Tensor:
    """y S for one stage, without autograd; ``reuse``: y may be overwritten."""
    if second:
        return _staged(y, stage, second)
    rows = y.reshape(-1, y.shape[-1])
    out = rows if reuse else torch.empty_like(rows, memory_format=torch.contiguous_format)
    for part, target in zip(rows.split(_piece(rows)), out.split(_piece(out)), strict=True):
        target = _spread(target, stage)
        target.copy_(torch.bmm(_blocks(part, stage, second), stage.r).view(target.shape))
    return out.view(y.shape)


def back_through(
    y: Tensor, grad: Tensor, stage: Stage, second: bool, summed: bool, reuse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(Σ yᵀ grad over samples and positions per block (blocks, n, n), Σ grad (channels,), grad Sᵀ), without autograd.

    The first two in float32 or wider, the second only if ``summed``; ``reuse``: grad may be overwritten.
    """
    if second:
        sums = channel_sum(grad, 1) if summed else grad.new_empty(0)
        products = (_blocks(y, stage, True) @ _blocks(grad, stage, True).mT).sum(0)
        return wide(products), sums, _staged(grad, stage.back, True)
    rows = grad.reshape(-1, grad.shape[-1])
    out = rows if reuse else torch.empty_like(rows, memory_format=torch.contiguous_format)
    products = torch.zeros_like(stage.r, dtype=torch.promote_types(grad.dtype, torch.float32))
    sums = products.new_zeros(rows.shape[1])
    for part, own, target in zip(*(t.split(_piece(t)) for t in (rows, y.reshape(rows.shape), out)), strict=True):
        blocks = _blocks(part, stage, False)
        products += torch.bmm(_blocks(own, stage, False).mT, blocks)
        if summed:
            sums += channel_sum(part, -1)
        target = _spread(target, stage)
        target.copy_(torch.bmm(blocks, stage.r.mT).view(target.shape))
    return products, sums, out.view(grad.shape)


def _piece(rows: Tensor) -> int:
    """How many rows to work on at once: those that stay in a CPU's cache, all of them elsewhere."""
    return ROWS if rows.device.type == "cpu" else max(1, len(rows))


def _staged(y: Tensor, stage: Stage, second: bool) -> Tensor:
    """y S for one stage; differentiable."""
    blocks, (far, groups, r) = _blocks(y, stage, second), stage
    part = r.shape[-1] // groups
    if second:
        blocks = r.mT @ blocks
        if far > 1:
            blocks = blocks.view(len(y), len(r) // far, far, groups, part, blocks.shape[-1]).transpose(2, 3)
    else:
        blocks = torch.bmm(blocks, r)
        if far > 1:
            blocks = blocks.view(len(r) // far, far, blocks.shape[1], groups, part).permute(2, 0, 3, 1, 4)
        else:
            blocks = blocks.transpose(0, 1)
    return blocks.reshape(y.shape)


def _blocks(y: Tensor, stage: Stage, second: bool) -> Tensor:
    """(blocks, rows, n) of channels in the last dimension, (N, blocks, n, positions) of channels in the second."""
    far, groups, size = stage.far, stage.groups, stage.r.shape[-1]
    if not second:
        rows = y.reshape(-1, y.shape[-1])
        return _spread(rows, stage).reshape(rows.shape[1] // size, len(rows), size)
    samples, channels, positions = len(y), y.shape[1], math.prod(y.shape[2:])
    if far > 1:
        y = y.reshape(samples, channels // (size * far), groups, far, size // groups, positions).transpose(2, 3)
    return y.reshape(samples, channels // size, size, positions)


def _spread(rows: Tensor, stage: Stage) -> Tensor:
    """A view of (rows, channels) as (blocks, rows, n), or (blocks/far, far, rows, groups, n/groups)."""
    far, groups, size = stage.far, stage.groups, stage.r.shape[-1]
    count = rows.shape[1] // (size * far)
    if far == 1:
        return rows.view(len(rows), count, size).transpose(0, 1)
    return rows.view(len(rows), count, groups, far, size // groups).permute(1, 3, 0, 2, 4)
