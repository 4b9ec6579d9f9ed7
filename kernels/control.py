"""What BFL's control LoRAs do to a model besides adding products.

* ``Replacement``: the weight becomes another one (scales of norms): W' = V.
* ``Widened``: the layer takes more inputs than before: W' = [W 0] + ΔW, for adapters whose ΔW is wider than W.

Both are merged; a widened layer has no branch, since its input has another width than the layer takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .adapter import Adapter, fitted, wide
from .compose import Wrapper
from .frozen import FrozenLayer
from .products import apply_weight, per_channel

SET_WEIGHT, WIDTH = "set_weight", "reshape_weight"


class Replacement(Adapter):
    """``set_weight`` V in the weight's shape: W + s (V − W)."""

    name = "replacement"

    def __init__(self, value: Tensor, shape: Sequence[int] | None = None) -> None:
        value = value if shape is None else fitted(value, shape, SET_WEIGHT)
        super().__init__({SET_WEIGHT: value}, value.shape)

    def difference(self, weight: Tensor) -> Tensor:
        value = self.tensors[SET_WEIGHT].to(weight.device)
        if value.shape != weight.shape:
            raise ValueError(f"{SET_WEIGHT} is {tuple(value.shape)}, the weight is {tuple(weight.shape)}")
        return wide(value) - wide(weight)

    def contribution(self, x: Tensor, base_out: Tensor, layer: FrozenLayer) -> Tensor:
        own = apply_weight(x, self.tensors[SET_WEIGHT].to(x.dtype), layer.geometry)
        bias = layer.bias(x)
        return own - (base_out if bias is None else base_out - per_channel(bias, layer.geometry))


class Widened(Wrapper):
    """``inner``, made for a weight with more inputs than the layer's own, which are zero before it acts."""

    name = "widened"

    def state(self) -> dict[str, Tensor]:
        assert self.inner.shape is not None
        return {**self.inner.state(), WIDTH: torch.tensor(self.inner.shape)}

    def widened(self, weight: Tensor) -> Tensor:
        """[W 0], in the shape that ``inner`` is made for."""
        assert self.inner.shape is not None
        wider = weight.new_zeros(self.inner.shape)
        wider[:, : weight.shape[1]] = weight
        return wider

    def merged(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """Wider than ``weight``; at strength 0 with nothing but zeros added."""
        return self.inner.merged(self.widened(weight), strength)

    def merged_bias(self, bias: Tensor | None, strength: float = 1.0) -> Tensor | None:
        return self.inner.merged_bias(bias, strength)

    def difference(self, weight: Tensor) -> Tensor:
        raise ValueError("this adapter widens the layer; it can only be merged")

    def contribution(self, x: Tensor, base_out: Tensor, layer: FrozenLayer) -> Tensor:
        raise ValueError("this adapter widens the layer; it can only be merged")
