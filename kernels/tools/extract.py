"""A LoRA out of two sets of weights: what one model has that the other has not.

* ``Change``: a layer before and after, read when it is its turn.
* ``extract``: linear layers and convolutions of any kernel as factors of the rank that a ``Cut`` says, or as a
  ``Budget`` shares them out; biases, norms, other vectors and tables of embeddings as differences.

One layer is in memory at a time, beside the factors found so far. What differs by no more than rounding of the types
it is stored in is left out. The error of a layer is measured, on the factors that go into the file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy
import torch
from torch import Tensor

from ..adapter import Adapter, wide
from ..full import Full
from ..low_rank import Cut, LowRank, distance, pieces, size
from ..names import NameTable
from ..reading import LoRAFile
from .budget import Budget, Layer, decided, decomposed
from .deltas import Progress, is_table, joined, told
from .outcome import LayerOutcome, Outcome

_KINDS = {  # what becomes of a layer, where that is no LoRA
    "same": "the same in both models, left out",
    "rounding": "different by rounding alone, left out",
    "small": "changed by less than min_change, left out",
    "bias": "changed in the bias only",
    "vector": "vectors, such as those of norms, kept as differences",
    "table": "tables of embeddings, kept as whole differences",
}

Source = Tensor | Callable[[], Tensor]


@dataclass(frozen=True)
class Change:
    """A layer by its canonical path: its weight ``before`` and ``after``, each in the type it is stored in.

    ``bias``: the same two of its bias. ``table``: whether its rows are looked up (an embedding); None: as it is called.
    """

    path: str
    before: Source
    after: Source
    bias: tuple[Source, Source] | None = None
    table: bool | None = None

    @property
    def looked_up(self) -> bool:
        return is_table(self.path) if self.table is None else self.table


def extract(
    changes: Iterable[Change],
    cut: Cut | Budget,
    *,
    min_change: float = 0.0,
    clamp_quantile: float | None = None,
    exact: bool = False,
    names: NameTable | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """What has to be added to the weights before to get those after.

    ``min_change``: layers with ‖ΔW‖ / ‖W‖ below it are left out. ``clamp_quantile``: the numbers of the factors are
    limited to this quantile of them (0.99 in kohya's tools), which costs accuracy; not with a ``Budget``. ``exact``: a
    whole decomposition even where random products come close enough. ``names``, ``metadata``: of the file to make.
    Bytes as a budget take a second pass over all weights. Where nothing differs the file is empty, and the notes say
    why. ``progress(done, total)`` may raise to stop. Raises ValueError naming the layer or the option.
    """
    _check(cut, min_change, clamp_quantile)
    changes = list(changes)
    twice = [path for path, count in Counter(change.path for change in changes).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0][:200]}: is there twice; give each layer once")
    first, widest = 0, cut
    if isinstance(cut, Budget) and cut.bytes is not None:
        sizes = [_sizes(change, min_change) for change in told(changes, progress, 0, 2 * len(changes))]
        matrices = {path: shape for path, shape, _ in sizes if shape}
        widest = Cut(rank=cut.widest(matrices, {path: carried for path, _, carried in sizes if carried}))
        first = len(changes)
    elif isinstance(cut, Budget):
        widest = Cut(rank=cut.widest({}, {}))
    assert isinstance(widest, Cut)
    made = {
        change.path: _made(change, widest, min_change, clamp_quantile, exact)
        for change in told(changes, progress, first, first + len(changes))
    }
    fulls = {path: one.full for path, one in made.items() if one.full is not None}
    layers = [one.layer for one in made.values() if one.layer is not None]
    kept, notes = decided(layers, cut, {path: _count(full.tensors) for path, full in fulls.items()})
    ranks = {layer.path: rank for layer, rank in zip(layers, kept, strict=True)}
    adapters: dict[str, Adapter] = {}
    outcomes = []
    for path, one in made.items():
        adapter = joined((one.layer.adapter(ranks[path]) if one.layer and ranks[path] else None, one.full))
        if adapter is not None:
            adapters[path] = adapter
        if one.layer:
            outcomes.append(one.layer.outcome(ranks[path]))
        elif one.full and one.kind == "table":
            outcomes.append(LayerOutcome(path, 0, None, size(one.full.delta()), 0.0))
    counts = Counter(one.kind for one in made.values())
    notes = [f"{counts[kind]} of {len(made)} layers: {text}" for kind, text in _KINDS.items() if counts[kind]] + notes
    architecture = names.architecture if names else None
    evidence = "the model that it was extracted from" if names else ""
    file = LoRAFile(adapters, dict(metadata or {}), architecture=architecture, evidence=evidence, names=names)
    return Outcome(file, tuple(outcomes), tuple(notes))


@dataclass(frozen=True)
class _Made:
    """``kind``: a key of ``_KINDS``, or "matrix"."""

    kind: str
    layer: Layer | None
    full: Full | None


@dataclass(frozen=True)
class _Found:
    """The differences of a layer: of its weight where that becomes factors, and what else there is."""

    kind: str
    shape: tuple[int, ...]
    matrix: Tensor | None
    parts: Mapping[str, Tensor]


def _made(change: Change, cut: Cut, min_change: float, clamp_quantile: float | None, exact: bool) -> _Made:
    found = _differences(change, min_change)
    full = Full(found.parts, found.shape) if found.parts else None
    if found.matrix is None:
        return _Made(found.kind, None, full)
    layer = decomposed(change.path, found.shape, found.matrix, cut, exact)
    layer = replace(layer, factors=LowRank(layer.factors.up.cpu(), layer.factors.down.cpu()), values=layer.values.cpu())
    if clamp_quantile is not None:
        factors = _clamped(layer.factors, layer.values, clamp_quantile)
        layer = replace(layer, factors=factors, error=distance(found.matrix, factors))
    return _Made(found.kind, layer, full)


def _sizes(change: Change, min_change: float) -> tuple[str, tuple[int, int] | None, int]:
    """(path, the shape of what becomes factors, how many numbers there are besides)."""
    found = _differences(change, min_change)
    shape = None if found.matrix is None else (len(found.matrix), found.matrix.shape[1])
    return change.path, shape, _count(found.parts)


def _differences(change: Change, min_change: float) -> _Found:
    parts = {}
    if change.bias is not None:
        bias, kind, _ = _difference(f"{change.path} (bias)", *change.bias)
        if not kind:
            parts["diff_b"] = bias.cpu()
    delta, kind, norm = _difference(change.path, change.before, change.after)
    shape = tuple(delta.shape)
    if not kind and size(delta) < min_change * norm:
        kind = "small"
    if kind:
        return _Found("bias" if parts else kind, shape, None, parts)
    if delta.ndim > 1 and not change.looked_up:
        return _Found("matrix", shape, delta.flatten(1), parts)
    return _Found("table" if delta.ndim > 1 else "vector", shape, None, parts | {"diff": delta.cpu()})


def _difference(path: str, before: Source, after: Source) -> tuple[Tensor, str, float]:
    """(after − before, why that counts for nothing, ‖before‖); float32 or wider."""
    old, new = (source() if callable(source) else source for source in (before, after))
    if old.shape != new.shape:
        raise ValueError(
            f"{path[:200]}: {tuple(old.shape)} in one model and {tuple(new.shape)} in the other; give a model and the "
            "base that it was made from"
        )
    if not (old.is_floating_point() and new.is_floating_point()):
        raise ValueError(f"{path[:200]}: is stored as {old.dtype} and {new.dtype}; give weights that are not packed")
    old, new = old.detach().to(new.device), new.detach()
    delta = wide(new) - wide(old)
    norm = size(delta)
    if not math.isfinite(norm):
        raise ValueError(f"{path[:200]}: holds numbers that are not finite; one of the two models is damaged")
    kind = "same" if not norm else "rounding" if _is_rounding(delta, old, new) else ""
    return delta, kind, size(old)


def _is_rounding(delta: Tensor, old: Tensor, new: Tensor) -> bool:
    """Whether no number differs by more than one unit in the last place of the coarser type."""
    kinds = [torch.finfo(tensor.dtype) for tensor in (old, new)]
    coarse = max(kinds, key=lambda kind: kind.eps)
    least = max(kind.tiny * kind.eps for kind in kinds)  # the steps of numbers next to zero
    for part, one, other in zip(*(pieces(tensor) for tensor in (delta, old, new)), strict=True):
        unit = torch.maximum(wide(one).abs(), wide(other).abs()).mul_(coarse.eps).clamp_min_(least)
        if (part.abs() > unit).any():
            return False
    return True


def _clamped(factors: LowRank, values: Tensor, quantile: float) -> LowRank:
    """kohya's way: no number of U S and Vᵀ is greater than this quantile of them all."""
    roots = values.sqrt().to(factors.up)
    up, down = factors.up * roots, factors.down / roots[:, None]
    limit = float(numpy.quantile(torch.cat([up.flatten(), down.flatten()]).numpy(), quantile))
    return LowRank(up.clamp(-limit, limit), down.clamp(-limit, limit))


def _count(parts: Mapping[str, Tensor]) -> int:
    return sum(part.numel() for part in parts.values())


def _check(cut: Cut | Budget, min_change: float, clamp_quantile: float | None) -> None:
    if not 0 <= min_change < math.inf:
        raise ValueError(f"min_change is {min_change!r}, expected 0 or more (a part of the weight's norm)")
    if clamp_quantile is None:
        return
    if not 0 < clamp_quantile <= 1:
        raise ValueError(f"clamp_quantile is {clamp_quantile!r}, expected 0 < clamp_quantile ≤ 1; kohya's is 0.99")
    if isinstance(cut, Budget):
        raise ValueError("clamp_quantile goes with a rank or an energy, not with a budget; leave one of them out")
