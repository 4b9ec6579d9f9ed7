"""Files of any family as plain LoRAs, and in another precision.

* ``plain``: LoHa, LoKr, DoRA, rotations, (IA)³, GLoRA, full differences … → LoRA, linear or convolutional. Exact where
  the family is of low rank: LoHa has rank², LoKr the ranks of its halves multiplied, cores are multiplied out. What is
  of full rank keeps ``ENERGY`` of ‖ΔW‖², or what the ``cut`` says; every layer's error is in the ``Outcome``.
* ``in_precision``: every number in another dtype. Factors whose numbers it cannot hold are balanced first, by powers of
  two, so that their product is the same to the last bit; a layer that even so goes beyond it stays as it is.

What is a LoRA already stays as it is, to the last bit (an alpha of 0 or infinity becomes the rank); biases, norms and
other vectors stay differences. What does nothing is left out. Converted layers are float32. The metadata is not
touched: ``provenance`` has it put right.
"""

from __future__ import annotations

import copy
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapter import Adapter, wide
from ..compose import Sliced, Sum, Swapped, Wrapper, swapped
from ..control import SET_WEIGHT, Replacement, Widened
from ..dora import SCALE
from ..full import Full
from ..glora import A1, A2, B1, B2
from ..ia3 import PEFT as FACTORS
from ..loha import PARTS as LOHA
from ..loha import khatri_rao
from ..lokr import PARTS as LOKR
from ..lokr import LoKr
from ..lora import DOWN, MID, UP, LoRA
from ..low_rank import NOT_FINITE, Cut, LowRank, as_lora, changes_bias_only, distance, factors_of, size, whole
from ..reading import LoRAFile
from ..rotations import RESCALE
from ..tlora import PARTS as TLORA
from .budget import decomposed
from .deltas import (
    Progress,
    Weights,
    apart,
    bias,
    dense,
    joined,
    scales_bias,
    shape_at,
    stays_difference,
    told,
)
from .outcome import EXACT as UNSEEN
from .outcome import LayerOutcome, Outcome

ENERGY = 0.9999  # of ‖ΔW‖², where a layer is of full rank: an error of 1 % of its difference
RANKS, EXACT = 64, 1e-6  # a dense difference of no greater rank is taken whole; the relative error it may have
PRECISIONS = {
    name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float8_e4m3fn")
}  # the last is read by ComfyUI's own loaders and by this pack, by few others
# ΔW knows only the product of these
_PRODUCTS = ((DOWN, MID, UP), LOHA, LOKR, (A1, A2), (B1, B2))
# what multiplies the weight itself, or stands in its place: rounded, it would move more than a whole adapter does
GAINS = frozenset({SCALE, RESCALE, FACTORS, SET_WEIGHT, *TLORA})
_NESTED = re.compile(r"(?:\d+\.)*")


@dataclass(frozen=True)
class _Made:
    """``adapter`` None where there is nothing to write; ``before``: the rank that it had, None where it was dense."""

    adapter: Adapter | None
    rank: int
    before: int | None
    norm: float
    error: float


def plain(
    file: LoRAFile,
    cut: Cut | None = None,
    weights: Weights | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """``file`` with every layer as a LoRA. ``cut``: what stays of layers that are none yet; None as it says above.

    ``weights(path)`` are those of the base, for families that depend on them. ``progress(done, total)`` may raise to
    stop. Raises ValueError naming the layer, and what is missing.
    """
    adapters: dict[str, Adapter] = {}
    layers: list[LayerOutcome] = []
    kept: Counter[str] = Counter()
    for path, adapter in told(list(file.adapters.items()), progress):
        if stays_difference(path, adapter):
            adapters[path] = adapter
            continue
        shape = shape_at(path, [adapter], file.names, weights)
        made = _made(path, adapter, shape, weights, cut)
        if made.adapter is not None:
            adapters[path] = made.adapter
        layers.append(LayerOutcome(path, made.rank, made.before, made.norm, made.error))
        converted = made.adapter is not adapter
        kept["as it is"] += not converted
        kept["nothing"] += made.adapter is None
        kept["large"] += converted and made.rank * (shape[0] + math.prod(shape[1:])) > math.prod(shape)
    return Outcome(replace(file, adapters=adapters), tuple(layers), (*file.notes, *_notes(file, kept, cut)))


def in_precision(file: LoRAFile, dtype: torch.dtype) -> tuple[LoRAFile, list[str]]:
    """(``file`` with its numbers in ``dtype``, what there is to say). Raises ValueError for another than these."""
    name = str(dtype).removeprefix("torch.")
    if dtype not in PRECISIONS.values():
        raise ValueError(f"precision: LoRA files are not kept in {name}; choose one of {', '.join(PRECISIONS)}")
    casts = {path: _Cast.of(adapter, dtype) for path, adapter in file.adapters.items()}
    words = {word: _embedding(vectors, dtype) for word, vectors in file.embeddings.items()}
    beyond = [path for path, cast in casts.items() if cast.beyond]
    beyond += [f"the word {word[:60]}" for word, vectors in file.embeddings.items() if words[word] is vectors]
    balanced, gains = ([path for path, cast in casts.items() if getattr(cast, what)] for what in ("balanced", "gains"))
    lost = {path: cast.error for path, cast in casts.items() if cast.error > torch.finfo(dtype).eps / 2}
    lost = dict(sorted(lost.items(), key=lambda item: -item[1]))
    end = torch.finfo(dtype).max
    found = (
        (beyond, f"numbers beyond {name}, which ends at {end:g}; kept as they were"),
        (balanced, f"numbers that {name} cannot hold; the factors were balanced, with the same product"),
        (list(lost), f"numbers too small for {name} are lost, up to {max(lost.values(), default=0):.1%} of a tensor"),
        (gains, "norms, factors and values of the weight itself stay as they were: rounding them moves all of it"),
    )
    notes = [f"{_some(paths)}: {what}" for paths, what in found if paths]
    worst = max((cast.error for path, cast in casts.items() if path not in lost), default=0.0)
    if worst**2 > UNSEEN:
        few = "; few programs besides ComfyUI read it" if dtype.itemsize == 1 else ""
        notes.append(f"{name} rounds tensors by up to {worst:.1%}{few}")
    if casts and all(cast.grows for cast in casts.values()):
        notes.append(f"{name} holds no more than the file did: it only grows")
    return replace(file, adapters={path: cast.adapter for path, cast in casts.items()}, embeddings=words), notes


def _embedding(vectors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """``vectors`` themselves where ``dtype`` does not hold their numbers."""
    fits = all(math.isfinite(_rounding(tensor, dtype)) for tensor in vectors.values())
    return {encoder: tensor.to(dtype) for encoder, tensor in vectors.items()} if fits else vectors


def _some(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{len(paths)} layers, such as {paths[0]}"


# -- to plain LoRAs


def _made(path: str, adapter: Adapter, shape: Sequence[int], weight: Weights | None, cut: Cut | None) -> _Made:
    """``weight`` of ``shape`` is that of the rows which the adapter is on."""
    if _is_plain(adapter):
        known = factors_of(adapter)
        norm, rank = (0.0, 0) if known is None else (known.norm(), known.rank)
        if not math.isfinite(norm):
            raise ValueError(f"{path[:200]}: {NOT_FINITE}")
        idle = known is not None and not norm and adapter.merged_bias(None) is None
        return _Made(None if idle else _with_true_alpha(adapter), rank, rank, norm, 0.0)
    if isinstance(adapter, Replacement):  # stays what it is
        return _Made(adapter, 0, None, 0.0, 0.0)
    if isinstance(adapter, Widened) and adapter.inner.shape is not None:
        made = _made(path, adapter.inner, adapter.inner.shape, weight and _then(weight, adapter.widened), cut)
        return _again(made, lambda inner: Widened(inner, adapter.shape))
    if isinstance(adapter, Swapped):
        return _again(_made(path, adapter.inner, shape, weight and _then(weight, swapped), cut), Swapped)
    if isinstance(adapter, Sliced):
        return _of_rows(path, adapter, shape, weight, cut)
    if isinstance(adapter, Sum) and apart(adapter.parts):  # q, k and v of a fused layer stay three
        parts = [_made(path, part, shape, weight, cut) for part in adapter.parts]
        before = None if any(part.before is None for part in parts) else sum(part.before or 0 for part in parts)
        norm, error = (math.hypot(*(getattr(part, name) for part in parts)) for name in ("norm", "error"))
        return _Made(joined(part.adapter for part in parts), sum(part.rank for part in parts), before, norm, error)
    return _as_lora(path, adapter, shape, weight, cut)


def _of_rows(path: str, adapter: Sliced, shape: Sequence[int], weight: Weights | None, cut: Cut | None) -> _Made:
    start, length = adapter.start, adapter.length
    rows = weight and _then(weight, lambda whole: whole.narrow(0, start, length))
    made = _made(path, adapter.inner, (length, *shape[1:]), rows, cut)
    return _again(made, lambda inner: Sliced(inner, start, length, shape))


def _again(made: _Made, wrap: Callable[[Adapter], Adapter]) -> _Made:
    return made if made.adapter is None else replace(made, adapter=wrap(made.adapter))


def _then(weight: Weights, change: Callable[[Tensor], Tensor]) -> Weights:
    return lambda path: change(weight(path))


def _as_lora(path: str, adapter: Adapter, shape: Sequence[int], weight: Weights | None, cut: Cut | None) -> _Made:
    """One layer as one LoRA, with its difference of the bias."""
    known = factors_of(adapter)
    if known is not None:
        matrix, norm, lost = _of_low_rank(path, known, cut)
    elif isinstance(adapter, LoKr):
        matrix, norm, lost = _of_kronecker(path, adapter, cut)
    else:
        matrix, norm, lost = _of_dense(path, _difference(path, adapter, tuple(shape), weight), cut)
    moved = bias(path, adapter)
    made = joined((
        as_lora(LowRank(matrix.up.float(), matrix.down.float()), shape) if matrix.rank else None,
        None if moved is None else Full({"diff_b": moved}, shape),
    ))  # fmt: skip
    return _Made(made, matrix.rank, known.rank if known else None, norm, lost)


def _of_low_rank(path: str, known: LowRank, cut: Cut | None) -> tuple[LowRank, float, float]:
    """(what stays of it, its norm, the error)."""
    layer = decomposed(path, known.shape, known, cut or Cut(rank=max(known.rank, 1)))
    rank = layer.factors.rank
    if cut is None and rank * sum(known.shape) > math.prod(known.shape):  # more numbers than the matrix has
        rank = Cut(energy=ENERGY).of(layer.values)
    outcome = layer.outcome(rank)
    return LowRank(layer.factors.up[:, :rank], layer.factors.down[:rank]), outcome.norm, outcome.error


def _of_kronecker(path: str, adapter: LoKr, cut: Cut | None) -> tuple[LowRank, float, float]:
    """The singular vectors of w1 ⊗ w2 are the products of those of w1 and w2."""
    w1, outer, low = adapter.halves()
    w2 = outer if low is None else outer @ low
    if not (w1.isfinite().all() and w2.isfinite().all()):
        raise ValueError(f"{path[:200]}: {NOT_FINITE}")
    (u1, s1, v1), (u2, s2, v2) = (torch.linalg.svd(half.double(), full_matrices=False) for half in (w1, w2))
    values, order = (abs(adapter.scale) * s1[:, None] * s2).flatten().sort(descending=True, stable=True)
    kept = (cut or Cut(rank=len(values))).of(values)
    if cut is None and kept * (len(w1) * len(w2) + w1.shape[1] * w2.shape[1]) > w1.numel() * w2.numel():
        kept = Cut(energy=ENERGY).of(values)
    one, two = order[:kept] // len(s2), order[:kept] % len(s2)
    roots = values[:kept].sqrt()
    up = math.copysign(1, adapter.scale) * roots * khatri_rao(u1[:, one], u2[:, two])
    down = roots[:, None] * khatri_rao(v1[one].T, v2[two].T).T
    return LowRank(up, down), values.norm().item(), values[kept:].norm().item()


def _of_dense(path: str, delta: Tensor, cut: Cut | None) -> tuple[LowRank, float, float]:
    """From ΔW in float64."""
    rows = delta.flatten(1)
    if not rows.isfinite().all():
        raise ValueError(f"{path[:200]}: {NOT_FINITE}")
    found = whole(rows, RANKS, EXACT) if cut is None else None
    if found is not None:
        return found, size(rows), distance(rows, found)
    layer = decomposed(path, delta.shape, rows.float(), cut or Cut(energy=ENERGY))
    return layer.factors, layer.norm, layer.error


def _difference(path: str, adapter: Adapter, shape: tuple[int, ...], weight: Weights | None) -> Tensor:
    """ΔW in float64, since the rounding of float32 is of full rank."""
    wide_weight = weight and _then(weight, lambda tensor: tensor.double())
    return dense(path, adapter.to(dtype=torch.float64), shape, wide_weight).double()


def _is_plain(adapter: Adapter) -> bool:
    """Whether it is a LoRA without core already, or several, on whatever rows."""
    if isinstance(adapter, Sum):
        return all(_is_plain(part) or changes_bias_only(part) for part in adapter.parts)
    if isinstance(adapter, Wrapper):
        return _is_plain(adapter.inner)
    return isinstance(adapter, LoRA) and adapter.mid is None


def _with_true_alpha(adapter: Adapter) -> Adapter:
    """Alphas of 0 and infinity, which loaders take for different things, as the rank; itself without any."""
    if isinstance(adapter, Sum):
        parts = [_with_true_alpha(part) for part in adapter.parts]
        return adapter if all(map(operator.is_, parts, adapter.parts)) else Sum(parts)
    if isinstance(adapter, Wrapper):
        inner = _with_true_alpha(adapter.inner)
        other = copy.copy(adapter)
        other.inner, other.alpha = inner, inner.alpha
        return adapter if inner is adapter.inner else other
    if not isinstance(adapter, LoRA) or (adapter.alpha and math.isfinite(adapter.alpha)):
        return adapter
    true = copy.copy(adapter)
    true.alpha = float(adapter.rank)
    return true


def _notes(file: LoRAFile, kept: Counter[str], cut: Cut | None) -> list[str]:
    """What ``plain`` has to say about layers as a whole."""
    notes = []
    if kept["as it is"]:
        told = "; the cut is for the others, resizing cuts these too" if cut else ""
        notes.append(f"{kept['as it is']} layers are plain LoRAs already and stay as they are{told}")
    if kept["nothing"]:
        notes.append(f"{kept['nothing']} layers that do nothing were left out")
    if kept["large"]:
        notes.append(f"{kept['large']} layers take more numbers as LoRAs than as differences; choose a smaller cut")
    if any(isinstance(adapter, Replacement) for adapter in file.adapters.values()):
        notes.append("parameters that the file replaces as a whole stay replaced")
    if any(map(scales_bias, file.adapters.values())):
        notes.append("PEFT's (IA)³ scales the biases of its layers too, which are left as they are")
    return notes


# -- precision


@dataclass(frozen=True)
class _Cast:
    """``adapter`` in another precision; ``error``: the worst ‖rounded − tensor‖ / ‖tensor‖ of its tensors."""

    adapter: Adapter
    error: float = 0.0
    balanced: bool = False  # factors were
    beyond: bool = False  # it stays as it was
    gains: bool = False  # what multiplies the weight stays as it was
    grows: bool = False  # without a gain

    @classmethod
    def of(cls, adapter: Adapter, dtype: torch.dtype) -> _Cast:
        floats = {name: tensor for name, tensor in adapter.tensors.items() if tensor.is_floating_point()}
        gains = {name for name in floats if _part(name) in GAINS and _is_wider(floats[name], dtype)}
        values = {name: tensor for name, tensor in floats.items() if name not in gains}
        found = _balanced(values, dtype)
        error = max((_rounding(tensor, dtype) for tensor in found.values()), default=0.0)
        if math.isinf(error):
            return cls(adapter, beyond=True)
        cast = {name: tensor.to(dtype) for name, tensor in found.items()}
        changed = any(found[name] is not values[name] for name in found)
        grows = not gains and not any(_is_wider(t, dtype) or t.dtype == dtype for t in values.values())
        return cls(adapter.with_tensors(adapter.tensors | cast), error, changed, gains=bool(gains), grows=grows)


def _is_wider(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``dtype`` cannot hold all that ``tensor``'s can."""
    own, other = torch.finfo(tensor.dtype), torch.finfo(dtype)
    return own.eps < other.eps or own.max > other.max


def _balanced(values: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same products of factors that ``dtype`` holds, where it does not hold the factors as they are."""
    found = dict(values)
    for prefix in dict.fromkeys(name[: len(name) - len(_part(name))] for name in values):
        for parts in _PRODUCTS:
            names = [prefix + part for part in parts if prefix + part in values]
            worst = max((_rounding(values[name], dtype) for name in names), default=0.0)
            if len(names) > 1 and worst > torch.finfo(dtype).eps / 2:
                even = _even([values[name] for name in names])
                if max(_rounding(tensor, dtype) for tensor in even) < worst:
                    found |= dict(zip(names, even, strict=True))
    return found


def _even(factors: Sequence[Tensor]) -> list[Tensor]:
    """Factors times powers of two that together are 1, their largest numbers as much alike as can be."""
    factors = [wide(factor) for factor in factors]
    sizes = [math.log2(factor.abs().max().item() or 1.0) for factor in factors]
    mean = sum(sizes) / len(sizes)
    shifts = [round(mean - size) for size in sizes]
    shifts[sizes.index(max(sizes))] -= sum(shifts)
    return [factor * 2.0**shift for factor, shift in zip(factors, shifts, strict=True)]


def _rounding(tensor: Tensor, dtype: torch.dtype) -> float:
    """‖rounded − tensor‖ / ‖tensor‖, infinite where a number goes beyond ``dtype``."""
    exact = tensor.double()
    error, norm = (tensor.to(dtype).double() - exact).norm().item(), exact.norm().item()
    return (error / norm if norm else 0.0) if math.isfinite(error) else math.inf


def _part(name: str) -> str:
    """Without the numbers of the parts of a sum."""
    return _NESTED.sub("", name, count=1)
