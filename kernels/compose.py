"""Adapters made of adapters.

* ``Sum``: several on one layer; their differences add up.
* ``Wrapper``: what the following have in common.
* ``Sliced``: one that belongs to some of the rows of a fused projection (q, k or v of a qkv).
* ``Swapped``: one made for the weight with the two halves of its rows the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from typing_extensions import Self

from .adapter import Adapter, wide
from .frozen import FrozenLayer
from .products import channel_dim


class Sum(Adapter):
    """W' = W + Σ (Wᵢ' − W). ``tensors`` carry the number of their part in front: "0.lora_up.weight"."""

    name = "sum"

    def __init__(self, parts: Sequence[Adapter]) -> None:
        self.parts = tuple(parts)
        tensors = {f"{n}.{key}": tensor for n, part in enumerate(parts) for key, tensor in part.tensors.items()}
        super().__init__(tensors, next((part.shape for part in parts if part.shape is not None), None))

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """The same parts with other values."""
        other = super().with_tensors(tensors)
        other.parts = tuple(part.with_tensors(_below(tensors, n)) for n, part in enumerate(self.parts))
        return other

    def state(self) -> dict[str, Tensor]:
        return {f"{n}.{key}": tensor for n, part in enumerate(self.parts) for key, tensor in part.state().items()}

    def difference(self, weight: Tensor) -> Tensor:
        return torch.stack([part.difference(weight) for part in self.parts]).sum(0)

    def contribution(self, x: Tensor, base_out: Tensor, layer: FrozenLayer) -> Tensor:
        total = self.parts[0].contribution(x, base_out, layer)
        for part in self.parts[1:]:
            total = total + part.contribution(x, base_out, layer)
        return total

    def merged_bias(self, bias: Tensor | None, strength: float = 1.0) -> Tensor | None:
        """b + Σ (bᵢ' − b)."""
        base = None if bias is None else wide(bias)
        changed = [moved for moved in (part.merged_bias(base, strength) for part in self.parts) if moved is not None]
        if bias is None or base is None:
            return sum(changed[1:], changed[0]) if changed else None
        return sum((moved - base for moved in changed), base).to(bias.dtype)

    def parameters(self) -> list[Tensor]:
        return [tensor for part in self.parts for tensor in part.parameters()]

    def fast_parameters(self) -> list[Tensor]:
        return [tensor for part in self.parts for tensor in part.fast_parameters()]

    def limit_norm(self, maximum: float) -> bool:
        return any([part.limit_norm(maximum) for part in self.parts])


class Wrapper(Adapter):
    """An adapter that is ``inner`` somewhere else; what it holds and trains is what ``inner`` does."""

    def __init__(self, inner: Adapter, shape: Sequence[int] | None) -> None:
        super().__init__(inner.tensors, shape, inner.alpha)
        self.inner = inner

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """The same place with other values."""
        other = super().with_tensors(tensors)
        other.inner = self.inner.with_tensors(tensors)
        return other

    def state(self) -> dict[str, Tensor]:
        return self.inner.state()

    def parameters(self) -> list[Tensor]:
        return self.inner.parameters()

    def fast_parameters(self) -> list[Tensor]:
        return self.inner.fast_parameters()

    def norm(self) -> Tensor:
        return self.inner.norm()

    def limit_norm(self, maximum: float) -> bool:
        return self.inner.limit_norm(maximum)


class Sliced(Wrapper):
    """``inner`` on rows ``start`` … ``start + length`` of a weight of ``shape``."""

    name = "sliced"

    def __init__(self, inner: Adapter, start: int, length: int, shape: Sequence[int] | None = None) -> None:
        if inner.shape is not None and inner.shape[0] != length:
            raise ValueError(f"this adapter has {inner.shape[0]} rows, its part of the fused layer has {length}")
        super().__init__(inner, shape)
        self.start, self.length = start, length

    def difference(self, weight: Tensor) -> Tensor:
        return self._among(self.inner.difference(weight.narrow(0, self.start, self.length)), len(weight))

    def added_to(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        self.inner.added_to(weight.narrow(0, self.start, self.length), strength)
        return weight

    def contribution(self, x: Tensor, base_out: Tensor, layer: FrozenLayer) -> Tensor:
        channels = channel_dim(layer.geometry) % base_out.ndim
        rows = base_out.narrow(channels, self.start, self.length)
        extra = self.inner.contribution(x, rows, _Rows(layer, self.start, self.length))
        return self._among(extra, base_out.shape[channels], channels)

    def merged_bias(self, bias: Tensor | None, strength: float = 1.0) -> Tensor | None:
        own = None if bias is None else bias.narrow(0, self.start, self.length)
        rows = self.inner.merged_bias(own, strength)
        if rows is None:
            return None if bias is None else bias.clone()
        if bias is not None:
            return torch.cat([bias[: self.start], rows, bias[self.start + self.length :]])
        if self.shape is None:
            raise ValueError("a part of a fused layer brings a bias of its own; how long the layer's is, is not known")
        return self._among(rows, self.shape[0])

    def _among(self, rows: Tensor, total: int, dimension: int = 0) -> Tensor:
        """``rows`` in their place among ``total`` along ``dimension``, and zeros."""
        after = total - self.start - self.length
        # padding counts from the last dimension
        return torch.nn.functional.pad(rows, [0, 0] * (rows.ndim - 1 - dimension) + [self.start, after])


class Swapped(Wrapper):
    """``inner`` for P W, where P exchanges the halves of the rows: W' = Pᵀ (P W)' = P (P W)'."""

    name = "swapped"

    def __init__(self, inner: Adapter) -> None:
        if inner.shape is not None and inner.shape[0] % 2:
            raise ValueError(f"{inner.shape[0]} rows have no halves to exchange")
        super().__init__(inner, inner.shape)

    def difference(self, weight: Tensor) -> Tensor:
        return swapped(self.inner.difference(swapped(weight)))

    def contribution(self, x: Tensor, base_out: Tensor, layer: FrozenLayer) -> Tensor:
        channels = channel_dim(layer.geometry) % base_out.ndim
        extra = self.inner.contribution(x, swapped(base_out, channels), _SwappedRows(layer))
        return swapped(extra, channels)

    def merged_bias(self, bias: Tensor | None, strength: float = 1.0) -> Tensor | None:
        merged = self.inner.merged_bias(None if bias is None else swapped(bias), strength)
        return None if merged is None else swapped(merged)


def swapped(tensor: Tensor, dimension: int = 0) -> Tensor:
    """The two halves along ``dimension`` exchanged."""
    return tensor.roll(tensor.shape[dimension] // 2, dimension)


class _SwappedRows:
    """A layer with the halves of its rows exchanged."""

    def __init__(self, layer: FrozenLayer) -> None:
        self._layer, self.geometry = layer, layer.geometry

    def forward(self, x: Tensor) -> Tensor:
        y = self._layer.forward(x)
        return swapped(y, channel_dim(self.geometry) % y.ndim)

    @contextmanager
    def weight(self, like: Tensor) -> Iterator[Tensor]:
        with self._layer.weight(like) as weight:
            yield swapped(weight)

    def bias(self, like: Tensor) -> Tensor | None:
        bias = self._layer.bias(like)
        return None if bias is None else swapped(bias)


class _Rows:
    """Some rows of a layer, as a layer."""

    def __init__(self, layer: FrozenLayer, start: int, length: int) -> None:
        self._layer, self._start, self._length = layer, start, length
        self.geometry = layer.geometry

    def forward(self, x: Tensor) -> Tensor:
        return self._layer.forward(x).narrow(channel_dim(self.geometry), self._start, self._length)

    @contextmanager
    def weight(self, like: Tensor) -> Iterator[Tensor]:
        with self._layer.weight(like) as weight:
            yield weight.narrow(0, self._start, self._length)

    def bias(self, like: Tensor) -> Tensor | None:
        bias = self._layer.bias(like)
        return None if bias is None else bias.narrow(0, self._start, self._length)


def _below(tensors: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    prefix = f"{number}."
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
