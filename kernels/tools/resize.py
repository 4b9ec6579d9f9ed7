"""A file with other ranks: by rank, energy, ratio, sum, or shared out within a size.

* ``resize``: every layer in the fewest ranks that the ``Cut`` asks for, or as many as its share of the ``Budget``.

Layers of low rank are never made dense; the others become LoRAs too, those that depend on the weight with the help of
``weights``. No rank is added: a LoRA of the rank that would stay is kept to the last bit. Biases, norms, tables of
embeddings and what replaces a weight stay as they are. The new factors have alpha = rank, and so the same ΔW.

kohya's resize_lora.py keeps one rank more than it takes to get to its sv_fro t (here energy = t²), sv_cumulative and
sv_ratio; here it is the fewest that do.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from ..adapter import Adapter
from ..compose import Sliced, Sum, Swapped
from ..control import Replacement, Widened
from ..full import Full
from ..lora import LoRA
from ..low_rank import Cut, changes_bias_only, factors_of
from ..reading import LoRAFile
from .budget import Budget, Layer, decided, decomposed
from .deltas import (
    Progress,
    Weights,
    bias,
    dense,
    joined,
    scales_bias,
    shape_at,
    stays_difference,
    told,
    widest_part,
)
from .outcome import Outcome, fused_loss

_KINDS = {
    "carried": "biases, norms, tables and replacements, as they were",
    "kept": "no more ranks than are asked for; as they were, since more would hold nothing",
    "made": "of another family, LoRA now",
    "none": "without any effect, left out",
    "bias": "scaled the bias as well, which a LoRA cannot",
}


def resize(
    file: LoRAFile,
    cut: Cut | Budget,
    weights: Weights | None = None,
    *,
    progress: Progress | None = None,
) -> Outcome:
    """``weights(path)`` is the base's weight. ``progress(done, total)`` may raise to stop.

    Raises ValueError naming the layer where its difference depends on the weight, and that is not given.
    """
    biases = {path: bias(path, adapter) for path, adapter in file.adapters.items()}
    carried = {
        path: adapter
        for path, adapter in file.adapters.items()
        if isinstance(adapter, Replacement | Widened) or stays_difference(path, adapter)
    }
    sizes = {path: extra.numel() for path, extra in biases.items() if extra is not None}
    sizes |= {path: sum(tensor.numel() for tensor in adapter.tensors.values()) for path, adapter in carried.items()}
    widest = cut if isinstance(cut, Cut) else Cut(rank=cut.widest(_matrices(file, carried, weights), sizes))
    layers: dict[str, Layer] = {}
    counts: Counter[str] = Counter(carried=len(carried))
    for path, adapter in told(list(file.adapters.items()), progress):
        if path not in carried:
            layers[path] = _decomposed(path, adapter, shape_at(path, [adapter], file.names, weights), widest, weights)
            counts["bias"] += scales_bias(adapter)
    effective = [layer for layer in layers.values() if layer.factors.rank]
    kept, notes = decided(effective, cut, sizes)
    ranks = {layer.path: rank for layer, rank in zip(effective, kept, strict=True)}
    adapters: dict[str, Adapter] = {}
    for path, adapter in file.adapters.items():
        extra, rank = biases[path], ranks.get(path, 0)
        made = layers[path].adapter(rank) if rank else None
        if path in carried or made is adapter:
            adapters[path] = adapter
        else:
            beside = None if extra is None else Full({"diff_b": extra}, layers[path].shape)
            both = joined((made, beside))
            adapters |= {} if both is None else {path: both}
        counts["kept"] += made is adapter
        counts["made"] += made is not None and layers[path].own is None
        counts["none"] += path not in carried and path not in ranks
    outcomes = tuple(layer.outcome(ranks[layer.path]) for layer in effective)
    notes += [f"{counts[kind]} of {len(file.adapters)} layers: {text}" for kind, text in _KINDS.items() if counts[kind]]
    notes += fused_loss(outcomes, {path: widest_part(adapter) for path, adapter in file.adapters.items()})
    if file.unplaced:
        notes.append(f"keys of the file that could not be used, and are not in the result: {len(file.unplaced)}")
    return Outcome(replace(file, adapters=adapters, unplaced=[]), outcomes, (*file.notes, *notes))


def _is_pair(adapter: Adapter) -> bool:
    """Whether it is made of plain LoRAs, and so has the rank that its factors have."""
    if isinstance(adapter, Sum):
        return all(changes_bias_only(part) or _is_pair(part) for part in adapter.parts)
    if isinstance(adapter, Sliced | Swapped):
        return _is_pair(adapter.inner)
    return isinstance(adapter, LoRA) and adapter.mid is None


def _matrices(file: LoRAFile, carried: Mapping[str, Adapter], weights: Weights | None) -> dict[str, tuple[int, int]]:
    """The shapes of what becomes factors."""
    shapes = {
        path: shape_at(path, [adapter], file.names, weights)
        for path, adapter in file.adapters.items()
        if path not in carried
    }
    return {path: (shape[0], math.prod(shape[1:])) for path, shape in shapes.items()}


def _decomposed(path: str, adapter: Adapter, shape: tuple[int, ...], cut: Cut, weights: Weights | None) -> Layer:
    matrix = factors_of(adapter)
    if matrix is None:
        return decomposed(path, shape, dense(path, adapter, shape, weights).flatten(1), cut)
    return decomposed(path, shape, matrix, cut, own=adapter if _is_pair(adapter) else None)
