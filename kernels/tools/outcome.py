"""What a tool made, and how good it is.

* ``LayerOutcome``: rank, ‖ΔW‖ and error of one layer; ``Outcome``: the file, its layers, notes.
* ``retained``: the part of ‖ΔW‖² that is left, of any number of layers.
* ``fused_loss``: what to say of layers whose parts would need a rank each.
* ``Outcome.lines``: the same for people: in all, per block, the layers that lost most.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..reading import LoRAFile

EXACT = 1e-6  # of the energy: less than that is rounding
MUCH = 0.05  # of the energy, lost by a layer that has as many ranks as each of its parts had
WORST = 3  # layers that are told


@dataclass(frozen=True)
class LayerOutcome:
    """``rank`` of the result, 0 where the layer is a difference as it is, or left out; ``before``: what it was, None
    where that was dense.

    ``norm``: ‖ΔW‖ as it is wanted; ``error``: ‖ΔW' − ΔW‖ of what was made (Frobenius).
    """

    path: str
    rank: int
    before: int | None
    norm: float
    error: float

    @property
    def energy(self) -> float:
        return retained([self])


def retained(layers: Iterable[LayerOutcome]) -> float:
    """1 − Σ error² / Σ norm²; 1 where there is nothing to retain."""
    layers = list(layers)
    norm = math.fsum(layer.norm**2 for layer in layers)
    return 1 - math.fsum(layer.error**2 for layer in layers) / norm if norm else 1.0


@dataclass(frozen=True)
class Outcome:
    file: LoRAFile
    layers: tuple[LayerOutcome, ...]
    notes: tuple[str, ...] = ()

    @property
    def energy(self) -> float:
        return retained(self.layers)

    def lines(self, block_of: Callable[[str], str] | None = None) -> list[str]:
        """``block_of``: the name of the block that a path belongs to."""
        lines = [f"{_layers(len(self.layers))}: {_ranks(self.layers)}; {_kept(self.energy)}"] if self.layers else []
        if 1 - self.energy > EXACT:
            lines += _per_block(self.layers, block_of) if block_of else []
            losing = [
                layer for layer in sorted(self.layers, key=lambda layer: layer.energy) if 1 - layer.energy > EXACT
            ]
            lines += [f"least of {layer.path}: {_kept(layer.energy)} at rank {layer.rank}" for layer in losing[:WORST]]
        return [*lines, *self.notes]


def fused_loss(layers: Iterable[LayerOutcome], widest: Mapping[str, int]) -> list[str]:
    """``widest``: path → the greatest rank of parts that were on rows of their own, 0 where there were none."""
    losing = [
        layer
        for layer in layers
        if layer.rank >= widest.get(layer.path, 0) > 0 and 1 - layer.energy > MUCH and layer.before is not None
    ]
    if not losing:
        return []
    return [
        f"{_layers(len(losing))} made of parts such as q, k and v: each had as many ranks as all of them together have "
        f"now; with rank {max(layer.before or 0 for layer in losing)} nothing of them is lost"
    ]


def _per_block(layers: Iterable[LayerOutcome], block_of: Callable[[str], str]) -> list[str]:
    blocks: dict[str, list[LayerOutcome]] = {}
    for layer in layers:
        blocks.setdefault(block_of(layer.path), []).append(layer)
    return [f"{block}: {_kept(retained(inside))} ({_layers(len(inside))})" for block, inside in blocks.items()]


def _kept(energy: float) -> str:
    if 1 - energy <= EXACT:
        return "all of the energy retained"
    # not rounded up: 99.99 % is not all
    return f"{math.floor(energy * 1e4) / 100:.2f} % of the energy retained"


def _ranks(layers: Sequence[LayerOutcome]) -> str:
    counts = Counter(layer.rank for layer in layers)
    gone = sum(not layer.rank and layer.error >= layer.norm > 0 for layer in layers)
    whole = counts.pop(0, 0) - gone
    told = []
    if counts:
        low, high, usual = min(counts), max(counts), counts.most_common(1)[0][0]
        told.append(f"rank {low}" if low == high else f"ranks {low} to {high} (mostly {usual})")
    if whole:
        told.append(f"{whole} as whole differences")
    if gone:
        told.append(f"{gone} left out")
    return ", ".join(told) or "nothing"


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"
