"""Several adapters on one layer, each at a strength of its own: W + Σ sᵢ (Wᵢ' − W).

* ``fused``, ``fused_bias``: the weight itself, and the bias.
* ``LayerBranch``: what they add to the output instead, at strengths that may change from call to call: the low-rank
  ones as one product with their stacked ``down`` factors and one with their ``up`` factors for each group of rows they
  act on, all others by their own ``contribution``. Changing a strength touches no weight.
* ``can_branch``: whether an adapter acts on a layer's input and output at all, or has to be fused.

All of them see the layer as it is without any: their order does not matter, and both ways agree. A branch keeps no
factor in a wider type than the file has it: narrower ones are widened for the time of a product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from .adapter import Adapter, Additive, wide
from .compose import Sliced, Sum, Wrapper
from .control import Widened
from .frozen import FrozenLayer
from .lora import LoRA
from .products import ConvGeometry, add_pointwise, convolve, per_channel

PASSES = 8  # over a weight, in multiplications per number: what a moved one costs besides the product (dev/LOG.md)


def can_branch(adapter: Adapter) -> bool:
    """False where the adapter changes how wide the layer's input is."""
    if isinstance(adapter, Sum):
        return all(can_branch(part) for part in adapter.parts)
    return not isinstance(adapter, Widened) and (not isinstance(adapter, Wrapper) or can_branch(adapter.inner))


def fused(weight: Tensor, parts: Sequence[tuple[Adapter, float]]) -> Tensor:
    """W + Σ s (W' − W) of (adapter, strength), float32 or wider; ``weight`` itself, overwritten, where it is that."""
    base = wide(weight)
    pieces = [(piece, strength) for adapter, strength in parts for piece in _pieces(adapter)]
    wider = [(adapter, strength) for adapter, strength in pieces if not can_branch(adapter)]
    if wider:
        return _fused_wider(base, [piece for piece in pieces if piece not in wider], wider)
    apart = [strength * adapter.difference(base) for adapter, strength in pieces if needs_weight(adapter)]
    for adapter, strength in pieces:
        if not needs_weight(adapter):
            base = adapter.added_to(base, strength)
    for difference in apart:
        base = base.add_(difference)
    return base


def _fused_wider(
    weight: Tensor, plain: Sequence[tuple[Adapter, float]], wider: Sequence[tuple[Adapter, float]]
) -> Tensor:
    """Where some make the layer wider: [W 0] + Σ s (W' − [W 0]), and the others on the columns that were there."""
    grown = [adapter.merged(weight, strength) for adapter, strength in wider]
    total = sum(grown[1:], grown[0])
    columns = total[:, : weight.shape[1]]
    columns.sub_(weight, alpha=len(grown) - 1)
    columns.add_(fused(weight.clone(), plain) - weight)
    return total


def fused_bias(bias: Tensor, parts: Sequence[tuple[Adapter, float]]) -> Tensor:
    """b + Σ s (b' − b), float32 or wider; a new tensor."""
    base = wide(bias)
    moved = [adapter.merged_bias(base, strength) for adapter, strength in parts]
    return sum((other - base for other in moved if other is not None), base.clone())


def needs_weight(adapter: Adapter) -> bool:
    """Whether what it adds depends on the weight it is put on: rotations, DoRA, (IA)³, GLoRA."""
    if isinstance(adapter, Sum):
        return any(needs_weight(part) for part in adapter.parts)
    return needs_weight(adapter.inner) if isinstance(adapter, Wrapper) else not isinstance(adapter, Additive)


class _Pair(NamedTuple):
    """A low-rank difference on ``rows`` (start, length) of a layer, of all rows with None; ``part`` is whose it is."""

    part: int
    lora: LoRA
    rows: tuple[int, int] | None


@dataclass
class _Group:
    """The pairs on the same rows: ``up`` (rows, Σ ranks), where their ranks are among all, and what scales them.

    ``members``: (part, rank, alpha / rank) of each. ``factor`` scales all of them, or else ``vector`` each rank.
    """

    rows: tuple[int, int] | None
    up: Tensor
    start: int
    members: tuple[tuple[int, int, float], ...]
    factor: float = 0.0
    vector: Tensor | None = None

    @property
    def end(self) -> int:
        return self.start + sum(rank for _, rank, _ in self.members)


# what scales the ranks, by the factors and where they are needed: most layers have the same
Vectors = dict[tuple[tuple[float, ...], torch.device, torch.dtype], Tensor]


class LayerBranch:
    """``adapters`` on one layer; ``geometry`` as in ``FrozenLayer``. Not differentiable in the adapters' tensors.

    ``prepare`` puts the factors where the layer computes; ``set`` says how strong each adapter is from now on.
    """

    def __init__(self, adapters: Sequence[Adapter], geometry: ConvGeometry | None) -> None:
        grouped = geometry is not None and geometry.groups > 1
        self.adapters, self.geometry = tuple(adapters), geometry
        self.strengths: tuple[float, ...] = (0.0,) * len(adapters)
        self._others: list[tuple[int, Adapter]] = []
        self._pairs: list[_Pair] = []
        for number, adapter in enumerate(adapters):
            for piece in _pieces(adapter):
                pair = None if grouped else _low_rank(number, piece)
                if pair is None:
                    self._others.append((number, piece))
                else:
                    self._pairs.append(pair)
        self._pairs.sort(key=lambda pair: pair.rows or (0, 0))
        self._sizes = self._product_sizes()
        self._down: Tensor | None = None
        self._groups: list[_Group] = []
        self._place: tuple[torch.device, torch.dtype] | None = None
        self.acts = False  # whether any strength is other than 0
        self._acting: list[tuple[float, Adapter]] = []  # of the others
        self._multiplies = False  # whether any of the pairs does

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Stack the factors on ``device``, for inputs of ``dtype``; a single pair stays the very tensors it was."""
        self._others = [(number, adapter.to(device)) for number, adapter in self._others]
        self._down, self._groups = None, []
        if self._pairs:
            down = _joined([pair.lora.down for pair in self._pairs], 0, device, dtype)
            self._down = down.flatten(1) if self.geometry is None else down
            start = 0
            for rows in dict.fromkeys(pair.rows for pair in self._pairs):
                own = [pair for pair in self._pairs if pair.rows == rows]
                up = _joined([pair.lora.up.flatten(1) for pair in own], 1, device, dtype)
                members = tuple((pair.part, pair.lora.rank, pair.lora.scale) for pair in own)
                self._groups.append(_Group(rows, up, start, members))
                start = self._groups[-1].end
        self._place = (device, dtype)
        self.set(self.strengths, {})

    def set(self, strengths: tuple[float, ...], vectors: Vectors) -> None:
        """From now on the adapters act at ``strengths``, in their order; ``vectors`` are shared with other layers."""
        self.strengths = strengths
        self.acts = any(strengths)
        self._acting = [(strengths[number], adapter) for number, adapter in self._others if strengths[number]]
        self._multiplies = any(strengths[pair.part] for pair in self._pairs)
        for group in self._groups:
            factors = [strengths[part] * scale for part, _, scale in group.members]
            group.factor, group.vector = factors[0], None
            if any(factor != factors[0] for factor in factors):
                by_rank = tuple(f for (_, rank, _), f in zip(group.members, factors, strict=True) for _ in range(rank))
                key = (by_rank, group.up.device, group.up.dtype)
                if key not in vectors:
                    kind = torch.promote_types(group.up.dtype, torch.float32)
                    vectors[key] = torch.tensor(by_rank, dtype=kind, device=group.up.device)
                group.vector = vectors[key]

    def memory(self) -> int:
        """Bytes of what ``prepare`` has made for this layer, beyond the adapters' own tensors."""
        own = {tensor.data_ptr() for adapter in self.adapters for tensor in adapter.tensors.values()}
        stacked = [tensor for tensor in (self._down, *(group.up for group in self._groups)) if tensor is not None]
        return sum(tensor.nbytes for tensor in stacked if tensor.data_ptr() not in own)

    def __call__(self, x: Tensor, base_out: Tensor, layer: FrozenLayer) -> Tensor:
        """The layer's output with the adapters, from ``base_out``, its output without; may write into that."""
        if self._place != (x.device, x.dtype):
            self.prepare(x.device, x.dtype)
        y = base_out
        for strength, adapter in self._acting:  # all of them see what the layer gives without any
            y = y + strength * adapter.contribution(x, base_out, layer)
        if not self._multiplies:
            return y
        if y is base_out and torch.is_grad_enabled():
            y = y.clone()
        return self._add_products(x, y)

    def _product_sizes(self) -> tuple[int, int, int, int] | None:
        """(Σ ranks, inputs · kernel, outputs, numbers of the input per position); None where there is more than pairs
        of factors, or it is not known."""
        if self._others or not self._pairs:
            return None
        shape = self._pairs[0].lora.shape if self._pairs[0].rows is None else self.adapters[0].shape
        if shape is None:
            return None
        rank, stride = sum(pair.lora.rank for pair in self._pairs), 1
        if self.geometry is not None:
            stride = math.prod(self.geometry.stride)
        return rank, math.prod(shape[1:]), shape[0], shape[1] * stride

    def prefers_weight(self, x: Tensor) -> bool:
        """Whether ``on_weight`` is cheaper than what this adds to an output, and as exact: many positions, few outputs.

        In half precision the moved weight would round the difference away.
        """
        if self._sizes is None or x.dtype not in (torch.float32, torch.float64):
            return False
        rank, inner, outer, numbers = self._sizes
        return (rank + PASSES) * inner * outer < x.numel() // numbers * rank * (inner + outer)

    def on_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output with the adapters of a layer with ``weight`` and ``bias``, in the dtype of ``x``, by a weight
        W + Σ s ΔW that lives as long as the product."""
        if self._place != (x.device, x.dtype):
            self.prepare(x.device, x.dtype)
        down = self._down
        assert down is not None
        moved = weight
        for group in self._groups:
            up, own = group.up.to(x.dtype), down[group.start : group.end].flatten(1).to(x.dtype)
            if group.vector is not None:
                up = up * group.vector
            alpha = group.factor if group.vector is None else 1.0
            if moved is weight and group.rows is None:
                moved = torch.addmm(weight.flatten(1), up, own, alpha=alpha).view(weight.shape)
            else:
                moved = weight.clone() if moved is weight else moved
                _rows(moved.view(len(moved), -1), group.rows, 0).addmm_(up, own, alpha=alpha)
        if self.geometry is None:
            return torch.nn.functional.linear(x, moved, bias)
        y = convolve(x, moved, self.geometry)
        return y if bias is None else y.add_(per_channel(bias, self.geometry))

    def _add_products(self, x: Tensor, y: Tensor) -> Tensor:
        assert self._down is not None
        down = self._down.to(x.dtype)
        if self.geometry is not None:
            hidden = convolve(x, down, self.geometry)
            for group in self._groups:
                own = hidden[:, group.start : group.end] if len(self._groups) > 1 else hidden
                scale = group.factor if group.vector is None else per_channel(group.vector, self.geometry)
                add_pointwise(_rows(y, group.rows, 1), group.up.to(x.dtype), (own * scale).to(x.dtype))
            return y
        hidden = torch.nn.functional.linear(x, down).reshape(-1, len(down))
        flat = y.view(-1, y.shape[-1]) if y.is_contiguous() else y.reshape(-1, y.shape[-1])
        for group in self._groups:
            own, alpha = hidden, group.factor
            if len(self._groups) > 1:
                own = hidden[:, group.start : group.end]
            if group.vector is not None:
                own, alpha = own.mul_(group.vector), 1.0
            _rows(flat, group.rows, 1).addmm_(own, group.up.to(x.dtype).T, alpha=alpha)
        return flat.view(y.shape)


def _pieces(adapter: Adapter) -> Iterator[Adapter]:
    """The parts of a sum, one by one: differences add up."""
    if isinstance(adapter, Sum):
        for part in adapter.parts:
            yield from _pieces(part)
    else:
        yield adapter


def _low_rank(number: int, adapter: Adapter) -> _Pair | None:
    rows, inner = None, adapter
    if isinstance(adapter, Sliced):
        rows, inner = (adapter.start, adapter.length), adapter.inner
    return _Pair(number, inner, rows) if isinstance(inner, LoRA) and inner.mid is None else None


def _joined(tensors: Sequence[Tensor], dimension: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Together on ``device``; in ``dtype`` where that is no wider than what they are."""
    stored = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    kept = dtype if dtype.itemsize <= stored.itemsize else stored
    moved = [tensor.to(device, kept) for tensor in tensors]
    return moved[0] if len(moved) == 1 else torch.cat(moved, dimension)


def _rows(y: Tensor, rows: tuple[int, int] | None, dimension: int) -> Tensor:
    return y if rows is None else y.narrow(dimension, *rows)
