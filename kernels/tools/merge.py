"""Several LoRAs as one, of any families and ranks, each at its strength, layer by layer.

* ``METHODS``: concat (exact), sum (exact, then cut to the best approximation), TIES, DARE, both together, and magnitude
  pruning, on true differences ΔW as in PEFT's ``*_svd`` combinations. ``merge``: files to an ``Outcome``.

Low-rank ingredients stay factors in concat and sum: nothing dense is made. One layer is dense at a time otherwise.
Biases, norm layers and other vectors are summed exactly whatever the method; embeddings are carried along. A strength
is one number, or one for each layer (of blocks, of components); at 0 an ingredient is not there, below 0 its ΔW is
turned round. What cancels out, but for the rounding of float32, is nothing. What the methods do to ΔW is in
``combining``, what files need in common in ``together``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..adapter import Adapter, wide
from ..branches import needs_weight
from ..control import Widened
from ..full import Full
from ..low_rank import NOISE, NOT_FINITE, Cut, LowRank, as_lora, beside, changes_bias_only, factors_of, size
from ..reading import LoRAFile
from .budget import decomposed
from .combining import MAJORITIES, combined, draws_for
from .deltas import (
    Progress,
    Weights,
    bias,
    dense,
    is_no_matrix,
    joined,
    scaled,
    scales_bias,
    shape_at,
    told,
    widest_part,
)
from .outcome import LayerOutcome, Outcome, fused_loss
from .provenance import shared
from .together import architecture, carried, common_names

METHODS = {
    "concat": (
        "Exact: the ranks of all of them beside each other. As large as all of them together; what has no ranks (DoRA, "
        "rotations, large LoHa or LoKr) becomes a whole difference, unless it is alone on a layer."
    ),
    "sum": "The exact sum, then its best approximation of the rank or energy that is asked for.",
    "ties": (
        "Small numbers of every ΔW are dropped, signs are put to the vote, and the mean of those that agree is taken "
        "(Yadav et al. 2023, arXiv:2306.01708). For LoRAs that get in each other's way."
    ),
    "dare": "Numbers of every ΔW are dropped at random, the others scaled up (Yu et al. 2023, arXiv:2311.03099).",
    "dare_ties": "DARE, then the vote and the mean of TIES.",
    "prune": "Small numbers of every ΔW are dropped, then the sum.",
}

ZERO = 4 * NOISE  # of the sizes of all ingredients together: no more is left of them than what they were rounded by
_USES = {  # option → the methods that it has an effect on
    "density": ("ties", "dare", "dare_ties", "prune"),
    "majority": ("ties", "dare_ties"),
    "seed": ("dare", "dare_ties"),
}


def without_effect(method: str, density: float, majority: str, seed: int) -> list[str]:
    """What was set and changes nothing, in sentences."""
    defaults = {"density": (density, 0.5), "majority": (majority, "total"), "seed": (seed, 0)}
    return [
        f"{name}: no effect with {method}"
        for name, (value, default) in defaults.items()
        if method not in _USES[name] and value != default
    ]


@dataclass(frozen=True)
class Ingredient:
    """``strength``: a number, or path → number ("" is on no layer). ``name``: what it is called in messages."""

    file: LoRAFile
    strength: float | Callable[[str], float] = 1.0
    name: str = "the LoRA"

    def at(self, path: str) -> float:
        strength = float(self.strength(path) if callable(self.strength) else self.strength)
        if not math.isfinite(strength):
            raise ValueError(f"{self.name}: its strength at {path} is {strength}; give a number")
        return strength

    @property
    def acts(self) -> bool:
        """Whether anything of it is in the result. What it brings besides layers goes with these."""
        return any(self.at(path) for path in self.file.adapters or [""])


@dataclass(frozen=True)
class _Recipe:
    method: str
    cut: Cut | None
    density: float
    majority: str
    seed: int
    exact: bool

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: {self.method[:60]!r} is unknown; choose one of {', '.join(METHODS)}")
        if self.majority not in MAJORITIES:
            raise ValueError(f"majority: {self.majority[:60]!r} is unknown; choose one of {', '.join(MAJORITIES)}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density is {self.density!r}, expected 0 < density ≤ 1 (the part that is kept)")
        if self.method == "concat" and self.cut is not None:
            raise ValueError("concat keeps every rank and has nothing to cut; choose sum to merge to fewer ranks")
        if self.method != "concat" and self.cut is None:
            raise ValueError(f"{self.method} needs a cut: give a rank or an energy (concat is exact without one)")


@dataclass(frozen=True)
class _Part:
    """One ingredient on one layer."""

    adapter: Adapter
    strength: float
    name: str


def merge(
    ingredients: Sequence[Ingredient],
    method: str = "concat",
    cut: Cut | None = None,
    weights: Weights | None = None,
    *,
    density: float = 0.5,
    majority: str = "total",
    seed: int = 0,
    exact: bool = True,
    progress: Progress | None = None,
) -> Outcome:
    """Σ strength · ΔW of the ingredients, or what ``method`` makes of them.

    ``cut``: how many ranks stay, for every method but concat. ``weights``: path → weight of the base model, for
    families that depend on it. ``density``: the part of the numbers that ties, dare and prune keep; ``majority``: one
    of ``MAJORITIES``; ``seed``: of dare. ``exact=False``: dense matrices are cut by random products with them where
    these come close to the best (``sketch``). The file's metadata is what all ingredients say alike
    (``provenance.with_parents`` adds the rest). Raises ValueError naming the option, or the layer and whose it is.
    """
    if not ingredients:
        raise ValueError("there is nothing to merge; give at least one LoRA")
    recipe = _Recipe(method, cut, density, majority, seed, exact)
    files = [(each.file, each.name) for each in ingredients]
    names, (kind, evidence) = common_names(files), architecture(files)
    paths = list(dict.fromkeys(path for file, _ in files for path in file.adapters))
    adapters: dict[str, Adapter] = {}
    adapter: Adapter | None
    layers: list[LayerOutcome] = []
    counts: Counter[str] = Counter()
    widest: dict[str, int] = {}
    for path in told(paths, progress):
        parts = [
            _Part(each.file.adapters[path], each.at(path), each.name)
            for each in ingredients
            if path in each.file.adapters
        ]
        shape = shape_at(path, (part.adapter for part in parts), names, weights)
        _check(path, parts)
        present = [part for part in parts if part.strength]
        alone = _alone(path, present, shape, recipe)
        if alone is not None:
            adapter, layer = alone, _as_it_is(path, alone, shape)
        else:
            adapter, layer = _Layer(path, shape, present, weights).merged(recipe, counts)
        if adapter is None:
            counts["nothing is left of what changes there, so they are not in the result"] += 1
        else:
            adapters[path] = adapter
            layers.append(layer)
            widest[path] = max(widest_part(part.adapter) for part in present)
    acting = [each for each in ingredients if each.acts]
    embeddings, notes = carried([(each.file, each.name) for each in acting])
    metadata = shared([each.file.metadata for each in acting or ingredients])
    merged = LoRAFile(adapters, metadata, [], kind, evidence, embeddings, names=names)
    counted = [f"{count} layers: {what}" for what, count in counts.items() if count]
    return Outcome(merged, tuple(layers), (*_left_out(ingredients), *counted, *fused_loss(layers, widest), *notes))


@dataclass(frozen=True)
class _Layer:
    """What all ingredients that are not at 0 have on one layer."""

    path: str
    shape: tuple[int, ...]
    parts: Sequence[_Part]
    weights: Weights | None

    def merged(self, recipe: _Recipe, counts: Counter[str]) -> tuple[Adapter | None, LayerOutcome]:
        """The one adapter, None where nothing is changed, and how good it is."""
        if any(scales_bias(part.adapter) for part in self.parts):
            counts["PEFT's (IA)³ scales their biases too, which are left as they are"] += 1
        moving = [part for part in self.parts if not changes_bias_only(part.adapter)]
        change, outcome = self._weight(moving, recipe, counts) if moving else (None, self._made(0, 0, 0.0))
        extra = self._bias()
        alone = None if extra is None else Full({self._key("diff_b", "b_norm"): extra}, self.shape)
        if isinstance(change, Full) and alone is not None:
            return Full(change.tensors | alone.tensors, self.shape), outcome
        return joined((change, alone)), outcome

    def _weight(
        self, parts: Sequence[_Part], recipe: _Recipe, counts: Counter[str]
    ) -> tuple[Adapter | None, LayerOutcome]:
        """By factors where that is exact, else by dense differences."""
        factors = [factors_of(part.adapter) if len(self.shape) > 1 else None for part in parts]
        known = [each.scaled(part.strength) for each, part in zip(factors, parts, strict=True) if each is not None]
        before = sum(each.rank for each in known) if len(known) == len(parts) else None
        no_matrix = before is None and is_no_matrix(self.path, self.shape)
        method = "sum" if no_matrix or recipe.method == "concat" else recipe.method
        whole: LowRank | Tensor
        if before is not None and method == "sum":
            sizes, whole = [each.norm() for each in known], beside(known)
            norm = whole.norm()
        else:
            sizes = []
            whole = combined(
                self._deltas(parts, sizes), method, recipe.density, recipe.majority, draws_for(recipe.seed, self.path)
            )
            norm = size(whole)
        if not math.isfinite(norm):
            raise ValueError(
                f"{self.path}: what {', '.join(part.name for part in parts)} change here goes beyond all numbers at "
                "these strengths; choose smaller ones, or inspect the files"
            )
        if norm <= ZERO * math.fsum(sizes):
            return None, self._made(0, before, 0.0)
        if no_matrix or recipe.method == "concat":
            counts["what changes there has no ranks, so the whole difference is kept, which is large"] += (
                before is None and not no_matrix
            )
            return self._uncut(whole, norm, before, counts)
        assert recipe.cut is not None
        whole = whole if isinstance(whole, LowRank) else whole.reshape(self._size())
        layer = decomposed(self.path, self.shape, whole, recipe.cut, recipe.exact)
        rank = layer.factors.rank
        return layer.adapter(rank), replace(layer.outcome(rank), before=before)

    def _uncut(
        self, whole: LowRank | Tensor, norm: float, before: int | None, counts: Counter[str]
    ) -> tuple[Adapter, LayerOutcome]:
        """A LoRA of all ranks, or the difference itself where that is no larger."""
        if isinstance(whole, LowRank):
            rows, columns = self._size()
            if whole.rank * (rows + columns) <= rows * columns:
                return as_lora(whole, self.shape), self._made(whole.rank, before, norm)
            counts["all ranks together hold more numbers than the whole difference, which is kept instead"] += 1
            whole = whole.dense()
        change = Full({self._key("diff", "w_norm"): whole.reshape(self.shape)}, self.shape)
        return change, self._made(0, before, norm)

    def _deltas(self, parts: Sequence[_Part], sizes: list[float]) -> Iterator[tuple[Tensor, float]]:
        """(ΔW, strength), one after the other, and how large they are."""
        for part in parts:
            delta = self._delta(part)
            sizes.append(abs(part.strength) * size(delta))
            yield delta, part.strength

    def _delta(self, part: _Part) -> Tensor:
        try:
            return dense(self.path, part.adapter, self.shape, self.weights)
        except ValueError as error:
            raise ValueError(f"{part.name}: {error}") from error

    def _bias(self) -> Tensor | None:
        """Σ strength · (b' − b)."""
        found = [(bias(self.path, part.adapter), part.strength) for part in self.parts]
        changes = [wide(extra) * strength for extra, strength in found if extra is not None]
        total = sum(changes[1:], changes[0]) if changes else None
        return total if total is not None and total.any() else None

    def _size(self) -> tuple[int, int]:
        """Of the weight as a matrix; a vector has one column."""
        return (self.shape[0] if self.shape else 1), math.prod(self.shape[1:])

    def _key(self, plain: str, of_norm: str) -> str:
        """What differences of norm layers are called in files of LyCORIS, if this is one."""
        normed = any(key.endswith(("w_norm", "b_norm")) for part in self.parts for key in part.adapter.tensors)
        return of_norm if normed else plain

    def _made(self, rank: int, before: int | None, norm: float, error: float = 0.0) -> LayerOutcome:
        return LayerOutcome(self.path, rank, before, norm, error)


def _alone(path: str, parts: Sequence[_Part], shape: tuple[int, ...], recipe: _Recipe) -> Adapter | None:
    """What there is nothing to merge and nothing to cut of: one ingredient as it is, at its strength."""
    if len(parts) != 1:
        return None
    (part,) = parts
    no_matrix = is_no_matrix(path, shape) and factors_of(part.adapter) is None
    if not (recipe.method == "concat" or no_matrix or isinstance(part.adapter, Widened)):
        return None
    return part.adapter if part.strength == 1 else scaled(part.adapter, part.strength)


def _as_it_is(path: str, adapter: Adapter, shape: tuple[int, ...]) -> LayerOutcome:
    """Its norm counts as 0 where only the weights would tell."""
    inner = adapter.inner if isinstance(adapter, Widened) else adapter
    matrix = factors_of(inner)
    if matrix is not None:
        norm = matrix.norm()
    else:
        norm = 0.0 if needs_weight(inner) else size(dense(path, inner, inner.shape or shape, None))
    if not math.isfinite(norm):
        raise ValueError(f"{path}: {NOT_FINITE}, or choose a smaller strength")
    rank = None if matrix is None else matrix.rank
    return LayerOutcome(path, rank or 0, rank, norm, 0.0)


def _check(path: str, parts: Sequence[_Part]) -> None:
    """Raises ValueError for adapters that cannot be together on one layer."""
    known = [part for part in parts if part.adapter.shape is not None]
    for part in known[1:]:
        sizes = [(shape[0], math.prod(shape[1:])) for p in (known[0], part) if (shape := p.adapter.shape)]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"{path}: {known[0].name} is made for {known[0].adapter.shape}, {part.name} for {part.adapter.shape}; "
                "they are for different base models"
            )
    wider = next((part for part in parts if isinstance(part.adapter, Widened)), None)
    if wider is not None and (len(parts) > 1 or wider.strength not in (0, 1)):
        raise ValueError(
            f"{path}: {wider.name} widens this layer, which cannot be scaled or added to; merge it at strength 1 with "
            "files that leave the layer alone"
        )


def _left_out(ingredients: Sequence[Ingredient]) -> list[str]:
    """What was in the files and is not in the result, and what was read otherwise than it is written."""
    notes = []
    for each in ingredients:
        notes += [f"{each.name}: {note}" for note in each.file.notes]
        if each.file.unplaced:
            key, _, detail = each.file.unplaced[0]
            count = len(each.file.unplaced)
            notes.append(f"{each.name}: {count} keys found no place and are left out ({key[:80]}: {detail[:200]})")
        if not each.acts:
            notes.append(f"{each.name}: its strength is 0, nothing of it is in the result")
    return notes
