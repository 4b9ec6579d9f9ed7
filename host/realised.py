"""What arrives of a LoRA on weights of low precision: the ΔW that is asked for against the one the model gets.

* ``realised(patcher, shares, adapters)`` → ``Realised`` for a few layers, from the weakest change to the strongest:
  merged, round(W + ΔW) − W as the host rounds it, against ΔW; as a branch, its product in the precision the model
  computes in, against ΔW x in float64.
* ``realised_lines``: in words.

``error`` is ‖realised − asked‖ / ‖asked‖, ``gain`` ⟨realised, asked⟩ / ⟨asked, asked⟩: how much of the asked change is
there at all, the noise aside. Weights in float32 lose nothing that matters, and are left out.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.adapter import Adapter
from ..kernels.compose import Sliced
from ..kernels.control import Widened
from ..kernels.lora import LoRA
from ..kernels.products import ConvGeometry, apply_weight
from .diagnosis import LayerShare, Shares, percent
from .layers import conv_geometry
from .originals import Originals
from .precision import host_dtype
from .targets import is_product

LAYERS, NUMBERS = 8, 1 << 20  # that are tried, and of each so many numbers where some can be had alone
VECTORS = 64
ARRIVES = 0.95  # gain from which on nothing is lost but in noise
FULL = ("float32", "float64")


class Loss(NamedTuple):
    error: float
    gain: float


class Realised(NamedTuple):
    """One layer whose weights are ``kept`` in so many bits, with the ``share`` that is asked for; ``branched`` is None
    for layers that have no branch."""

    path: str
    block: str
    kept: str
    share: float
    merged: Loss
    branched: Loss | None


@torch.no_grad()
def realised(patcher: Any, shares: Shares, adapters: Mapping[str, Adapter], layers: int = LAYERS) -> list[Realised]:
    """At the strengths that ``shares`` was measured with; the weakest change first. Empty where all is float32."""
    originals, dtype = Originals(patcher), host_dtype(patcher)
    able = [layer for layer in shares.layers if 0 < layer.share < float("inf") and not _widens(adapters[layer.path])]
    low = [layer for layer in able if originals.kept(layer.path) not in FULL]
    return [_measured(originals, layer, adapters[layer.path], dtype) for layer in _sample(low, originals, layers)]


def realised_lines(found: Sequence[Realised], names: Mapping[str, str]) -> list[str]:
    """One line for each kind of weights; ``names``: id of a block → what to call it."""
    kinds: dict[str, list[Realised]] = defaultdict(list)
    for one in found:
        kinds[one.kept].append(one)
    return [_line(kind, own, names) for kind, own in kinds.items()]


def _line(kind: str, own: Sequence[Realised], names: Mapping[str, str]) -> str:
    ranked = sorted(own, key=lambda one: one.merged.error)
    ends = [f"{percent(one.merged.error)} ({names[one.block]})" for one in ([ranked[0], ranked[-1]][: len(ranked)])]
    worst = min(own, key=lambda one: one.merged.gain)
    lost = ""
    if worst.merged.gain < ARRIVES:
        lost = f", and of what {names[worst.block]} is asked for only {percent(max(0.0, worst.merged.gain))} arrives"
    branches = [one.branched.error for one in own if one.branched is not None]
    beside = f"; as a branch it is off by {percent(statistics.median(branches))}" if branches else ""
    return f"{kind} weights: merged into them, the change is off by {' to '.join(ends)}{lost}{beside}"


def _sample(layers: Sequence[LayerShare], originals: Originals, count: int) -> list[LayerShare]:
    """Some, evenly spread from the weakest change to the strongest; none that is larger than most."""
    if not layers:
        return []
    sizes = {layer.path: math.prod(originals.shape(layer.path)) for layer in layers}
    usual = max(NUMBERS, statistics.median_high(sizes.values()))
    ranked = sorted((layer for layer in layers if sizes[layer.path] <= usual), key=lambda layer: layer.share)
    if len(ranked) <= count:
        return ranked
    return [ranked[round(n * (len(ranked) - 1) / max(1, count - 1))] for n in range(count)]


def _measured(originals: Originals, layer: LayerShare, adapter: Adapter, dtype: torch.dtype) -> Realised:
    path = layer.path
    owner = originals.owner(path)
    geometry = conv_geometry(owner)
    adapter, weight = _part(originals, path, adapter, geometry)
    asked = layer.factor * adapter.difference(weight)
    merged = _loss(originals.rounded(path, weight + asked) - weight, asked)
    branched = _branched(adapter, weight, geometry, dtype) if is_product(owner) else None
    return Realised(path, layer.block, originals.kept(path), layer.share, merged, branched)


def _part(originals: Originals, path: str, adapter: Adapter, geometry: ConvGeometry | None) -> tuple[Adapter, Tensor]:
    """An adapter and the weight it is for; of a large layer some rows of both, where these can be had alone."""
    count, *others = originals.shape(path)
    alone = originals.in_rows(path) and originals.rounds_alone(path) and (geometry is None or geometry.groups == 1)
    if not (alone and isinstance(adapter, LoRA) and adapter.mid is None and count * math.prod(others) > NUMBERS):
        return adapter, originals.dense(path)
    some = torch.arange(0, count, -(-count * math.prod(others) // NUMBERS))
    part = LoRA(adapter.down, adapter.up[some.to(adapter.up.device)], adapter.alpha)
    return part, originals.rows(path, some).view(len(some), *others)


def _branched(adapter: Adapter, weight: Tensor, geometry: ConvGeometry | None, dtype: torch.dtype) -> Loss:
    """At full strength: as a branch, strength is a factor of the whole."""
    channels, *kernel = weight.shape[1:]
    shape: tuple[int, ...] = (VECTORS, channels)
    if geometry is not None:
        space = (gap * side + 3 for gap, side in zip(geometry.dilation, kernel, strict=True))
        shape = (1, channels * geometry.groups, *space)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight.device, dtype)
    layer = _Layer(weight.to(dtype), geometry)
    got = adapter.to(weight.device).contribution(x, layer.forward(x), layer)
    delta = adapter.to(weight.device, torch.float64).difference(weight.double())
    return _loss(got, apply_weight(x.double(), delta, geometry))


def _loss(got: Tensor, asked: Tensor) -> Loss:
    got, asked = got.flatten().double(), asked.flatten().double()
    return Loss(((got - asked).norm() / asked.norm()).item(), (got.dot(asked) / asked.dot(asked)).item())


def _widens(adapter: Adapter) -> bool:
    return isinstance(adapter, Widened) or (isinstance(adapter, Sliced) and _widens(adapter.inner))


class _Layer:
    """A weight as a layer without a bias; see ``kernels.frozen.FrozenLayer``."""

    def __init__(self, weight: Tensor, geometry: ConvGeometry | None) -> None:
        self._weight, self.geometry = weight, geometry

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return apply_weight(x, self._weight, self.geometry)

    @contextmanager
    def weight(self, like: Tensor) -> Iterator[Tensor]:
        yield self._weight.to(like.device, like.dtype)

    def bias(self, like: Tensor) -> Tensor | None:
        return None
